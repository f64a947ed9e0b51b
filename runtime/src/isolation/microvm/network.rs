//! The machine's network: whatever arrives at an interface of the container's network namespace goes to the guest, and
//! whatever the guest sends leaves by that interface.
//!
//! Somebody else sets the namespace up: a CNI plugin, podman, docker, a hook. Each Ethernet interface in it that is up
//! gets a tap device, and the kernel carries every packet from the one straight to the other (tc-mirred(8)). The guest
//! has the interface's link address, addresses and routes, and answers in its place; the namespace's own stack hears
//! nothing any more. A tap device goes with the process that holds it; what leads to it is removed with the container,
//! or by the next machine in the namespace.

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::thread;

use engine::netlink::Netlink;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteType,
};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
    TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key,
    TcU32Selector, TcU32SelectorFlags,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};
use protocol::message::{self, Neighbour, Network, Route};
use vmm::devices::virtio::net::{Interface, Tap, TapError};

/// The names of tap devices.
pub const TAP_NAMES: &str = "rt-tap%d";

/// The queueing discipline of what arrives; each interface has at most one, and it has this handle.
const INGRESS: TcHandle = TcHandle {
    major: u16::MAX,
    minor: 0,
};

/// Packets of every protocol (`ETH_P_ALL`).
const ALL_PROTOCOLS: u16 = 3;

/// Where the kernel says that packets are led to if the device is gone.
const NO_DEVICE: u32 = 0;

/// The place of our only filter among an interface's.
const PREFERENCE: u32 = 1;

/// Why the machine cannot have the namespace's network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A call of the kernel.
    #[error("cannot {action}")]
    Io {
        /// What was to be done.
        action: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There is no tap device.
    #[error("a microVM's network needs a tap device")]
    Tap(#[from] TapError),
    /// Another machine, or another program, takes the packets.
    #[error(
        "the interface {interface} of the network namespace has traffic filters: another microVM uses it, or a program \
         that a microVM would cut off; give each microVM a network namespace of its own"
    )]
    InUse {
        /// The interface.
        interface: String,
    },
    /// No device of a guest is like it.
    #[error(
        "the interface {interface} of the network namespace is no Ethernet interface, which a microVM cannot use: take \
         it down or away, or use --isolation container"
    )]
    NotEthernet {
        /// The interface.
        interface: String,
    },
    /// A route that the guest would not get.
    #[error(
        "a route of the network namespace by {interface} has {what}, which a microVM cannot have yet: replace it, or \
         use --isolation container"
    )]
    Route {
        /// The interface.
        interface: String,
        /// What is special about it.
        what: &'static str,
    },
}

fn io_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Io {
        action: action.into(),
        source,
    }
}

/// An interface of the namespace.
#[derive(Debug)]
struct Link {
    index: u32,
    name: String,
    address: [u8; 6],
    mtu: u16,
}

/// Takes over the interfaces of the caller's network namespace: what the machine gets devices for, and what its guest
/// is to be told of them. Nothing of either if there is only a loopback device.
///
/// # Errors
/// An interface is of another kind or in use; the kernel refuses something.
pub fn attach() -> Result<(Vec<Interface>, Option<Network>), NetworkError> {
    let mut netlink = Netlink::open().map_err(io_error("open a netlink socket"))?;
    let links = links(&mut netlink)?;
    if links.is_empty() {
        return Ok((Vec::new(), None));
    }
    let network = describe(&mut netlink, &links)?;
    let mut interfaces = Vec::with_capacity(links.len());
    for link in links {
        match redirection(&mut netlink, link.index)? {
            Redirection::None => {}
            Redirection::Dead => remove_ingress(&mut netlink, link.index)?,
            Redirection::Alive => {
                return Err(NetworkError::InUse {
                    interface: link.name,
                });
            }
        }
        let tap = Tap::create(TAP_NAMES)?;
        // The namespace's own stack is to send nothing to the guest. Without IPv6 there is no such file.
        let quiet = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", tap.name());
        let _ = fs::write(quiet, "1");
        let index = if_nametoindex(tap.name())
            .map_err(|errno| io_error(format!("find {}", tap.name()))(errno.into()))?;
        let mut sized = LinkMessage::default();
        sized.header.index = index;
        sized.attributes.push(LinkAttribute::Mtu(link.mtu.into()));
        netlink
            .change(RouteNetlinkMessage::SetLink(sized), 0)
            .and_then(|()| netlink.bring_up(index))
            .map_err(io_error(format!("bring up {}", tap.name())))?;
        let failed = || format!("lead packets between {} and {}", link.name, tap.name());
        for (from, to) in [(index, link.index), (link.index, index)] {
            redirect(&mut netlink, from, to).map_err(io_error(failed()))?;
        }
        interfaces.push(Interface {
            tap,
            mac: link.address,
            mtu: link.mtu,
        });
    }
    Ok((interfaces, Some(network)))
}

/// Gives the interfaces of the network namespace at `path` back to it where the machine that had them has ended. A
/// namespace that is gone has none.
///
/// # Errors
/// The kernel's.
pub fn detach(path: &Path) -> Result<(), NetworkError> {
    let Ok(namespace) = File::open(path) else {
        return Ok(());
    };
    // In a thread: this process stays where it is.
    let in_namespace = || {
        if setns(namespace, CloneFlags::CLONE_NEWNET).is_err() {
            // The path has come to name something else.
            return Ok(());
        }
        let mut netlink = Netlink::open().map_err(io_error("open a netlink socket"))?;
        for link in list_links(&mut netlink)? {
            let index = link.header.index;
            if redirection(&mut netlink, index)? == Redirection::Dead {
                remove_ingress(&mut netlink, index)?;
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, in_namespace);
        let thread = thread.map_err(io_error("start a thread"))?;
        thread.join().unwrap_or_else(|_| {
            Err(io_error("clean up the network")(
                io::ErrorKind::Other.into(),
            ))
        })
    })
}

fn list_links(netlink: &mut Netlink) -> Result<Vec<LinkMessage>, NetworkError> {
    let all = netlink
        .list(RouteNetlinkMessage::GetLink(LinkMessage::default()))
        .map_err(io_error("list network interfaces"))?;
    let link = |message| match message {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    };
    Ok(all.into_iter().filter_map(link).collect())
}

/// The interfaces that a guest is to have: all that are up. A namespace may have others that never are, such as those
/// that the kernel makes for tunnels.
fn links(netlink: &mut Netlink) -> Result<Vec<Link>, NetworkError> {
    let mut links = Vec::new();
    for message in list_links(netlink)? {
        let flags = message.header.flags;
        if !flags.contains(LinkFlags::Up) || flags.contains(LinkFlags::Loopback) {
            continue;
        }
        let (mut name, mut address, mut mtu) = (String::new(), None, 0);
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(value) => name = value,
                LinkAttribute::Address(value) => address = <[u8; 6]>::try_from(value).ok(),
                LinkAttribute::Mtu(value) => mtu = value,
                _ => {}
            }
        }
        let address = address.filter(|_| message.header.link_layer_type == LinkLayerType::Ether);
        let Some(address) = address else {
            return Err(NetworkError::NotEthernet { interface: name });
        };
        links.push(Link {
            index: message.header.index,
            name,
            address,
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        });
    }
    Ok(links)
}

/// What the guest is told.
fn describe(netlink: &mut Netlink, links: &[Link]) -> Result<Network, NetworkError> {
    let mut interfaces: Vec<message::Interface> = links
        .iter()
        .map(|link| message::Interface {
            name: link.name.clone(),
            link_address: link.address.to_vec(),
            mtu: link.mtu.into(),
            addresses: Vec::new(),
            device_address: Vec::new(),
        })
        .collect();
    let by_index = |index: u32| links.iter().position(|link| link.index == index);

    let addresses = netlink
        .list(RouteNetlinkMessage::GetAddress(AddressMessage::default()))
        .map_err(io_error("list network addresses"))?;
    for message in addresses {
        if let RouteNetlinkMessage::NewAddress(message) = message
            && let Some(link) = by_index(message.header.index)
        {
            interfaces[link].addresses.extend(address(&message));
        }
    }

    let mut routes = Vec::new();
    let all = netlink
        .list(RouteNetlinkMessage::GetRoute(RouteMessage::default()))
        .map_err(io_error("list routes"))?;
    for message in all {
        if let RouteNetlinkMessage::NewRoute(message) = message
            && let Some(link) = outgoing(&message).and_then(by_index)
            && is_asked_for(&message)
        {
            routes.push(route(&message, &links[link].name)?);
        }
    }
    // A gateway must be reachable when the route by it is added.
    routes.sort_by_key(|route| !route.gateway.is_empty());

    let all = netlink
        .list(RouteNetlinkMessage::GetNeighbour(
            NeighbourMessage::default(),
        ))
        .map_err(io_error("list network neighbours"))?;
    let neighbours = all.into_iter().filter_map(|message| {
        let RouteNetlinkMessage::NewNeighbour(message) = message else {
            return None;
        };
        let link = by_index(message.header.ifindex)?;
        (message.header.state == NeighbourState::Permanent)
            .then(|| neighbour(&message, &links[link].name))?
    });
    Ok(Network {
        interfaces,
        routes,
        neighbours: neighbours.collect(),
    })
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// An address that somebody gave the interface; the link-local one of IPv6 comes by itself.
fn address(message: &AddressMessage) -> Option<message::InterfaceAddress> {
    let header = &message.header;
    if header.family == AddressFamily::Inet6 && header.scope == AddressScope::Link {
        return None;
    }
    let mut address = message::InterfaceAddress {
        prefix_length: header.prefix_len.into(),
        scope: u8::from(header.scope).into(),
        ..message::InterfaceAddress::default()
    };
    // IPv6 has only the one unless the link is between two; IPv4 always has both.
    let (mut local, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(value) => local = Some(octets(*value)),
            AddressAttribute::Address(value) => other = Some(octets(*value)),
            AddressAttribute::Broadcast(value) => address.broadcast = value.octets().to_vec(),
            AddressAttribute::Flags(flags) => {
                address.no_prefix_route = flags.contains(AddressFlags::Noprefixroute);
            }
            _ => {}
        }
    }
    match (local, other) {
        (Some(local), Some(peer)) if peer != local => {
            (address.address, address.peer) = (local, peer);
        }
        (Some(local), _) | (None, Some(local)) => address.address = local,
        (None, None) => return None,
    }
    Some(address)
}

fn outgoing(message: &RouteMessage) -> Option<u32> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            RouteAttribute::MultiPath(hops) => hops.first().map(|hop| hop.interface_index),
            _ => None,
        })
}

/// Whether somebody added the route: what the kernel adds with an address it adds in the guest too.
fn is_asked_for(message: &RouteMessage) -> bool {
    let header = &message.header;
    header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast
        && header.protocol != RouteProtocol::Kernel
        && matches!(
            header.address_family,
            AddressFamily::Inet | AddressFamily::Inet6
        )
}

fn route(message: &RouteMessage, interface: &str) -> Result<Route, NetworkError> {
    let header = &message.header;
    let unsupported = |what| NetworkError::Route {
        interface: interface.to_owned(),
        what,
    };
    let any = match header.address_family {
        AddressFamily::Inet => vec![0; 4],
        _ => vec![0; 16],
    };
    let mut route = Route {
        interface: interface.to_owned(),
        destination: any,
        prefix_length: header.destination_prefix_length.into(),
        scope: u8::from(header.scope).into(),
        on_link: header.flags.contains(RouteFlags::Onlink),
        ..Route::default()
    };
    let bytes = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => Ok(octets((*address).into())),
        RouteAddress::Inet6(address) => Ok(octets((*address).into())),
        _ => Err(unsupported("an address of an unknown kind")),
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(value) => route.destination = bytes(value)?,
            RouteAttribute::Gateway(value) => route.gateway = bytes(value)?,
            RouteAttribute::PrefSource(value) => route.source = bytes(value)?,
            RouteAttribute::Priority(value) => route.priority = *value,
            RouteAttribute::Metrics(metrics) => {
                let mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
                route.mtu = mtu.unwrap_or(0);
            }
            RouteAttribute::MultiPath(_) => return Err(unsupported("several next hops")),
            RouteAttribute::Via(_) => return Err(unsupported("a gateway of another protocol")),
            RouteAttribute::Encap(_) => return Err(unsupported("an encapsulation")),
            _ => {}
        }
    }
    Ok(route)
}

fn neighbour(message: &NeighbourMessage, interface: &str) -> Option<Neighbour> {
    let (mut address, mut link_address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(value)) => {
                address = Some(octets((*value).into()));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(value)) => {
                address = Some(octets((*value).into()));
            }
            NeighbourAttribute::LinkLayerAddress(value) => link_address = Some(value.clone()),
            _ => {}
        }
    }
    Some(Neighbour {
        interface: interface.to_owned(),
        address: address?,
        link_address: link_address?,
    })
}

/// What happens to the packets that arrive at an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Redirection {
    /// Nobody filters them.
    None,
    /// They were led to a device that is gone, and vanish.
    Dead,
    /// Somebody takes them.
    Alive,
}

fn redirection(netlink: &mut Netlink, index: u32) -> Result<Redirection, NetworkError> {
    let message = filter(index, 0);
    let filters = netlink
        .list(RouteNetlinkMessage::GetTrafficFilter(message))
        .map_err(io_error("list traffic filters"))?;
    let mut found = Redirection::None;
    for message in filters {
        let RouteNetlinkMessage::NewTrafficFilter(message) = message else {
            continue;
        };
        for option in options(&message) {
            match option {
                TcOption::U32(TcFilterU32Option::Action(actions))
                    if targets(actions).any(|target| target == NO_DEVICE) =>
                {
                    found = Redirection::Dead;
                }
                TcOption::U32(TcFilterU32Option::Action(_)) => return Ok(Redirection::Alive),
                // The rest of a filter, and the table that the kernel makes for the first.
                TcOption::U32(_) => {}
                _ => return Ok(Redirection::Alive),
            }
        }
    }
    Ok(found)
}

fn options(message: &TcMessage) -> impl Iterator<Item = &TcOption> {
    message
        .attributes
        .iter()
        .flat_map(|attribute| match attribute {
            TcAttribute::Options(options) => options.as_slice(),
            _ => &[],
        })
}

/// The indices of the devices that packets are led to.
fn targets(actions: &[TcAction]) -> impl Iterator<Item = u32> {
    actions
        .iter()
        .flat_map(|action| &action.attributes)
        .flat_map(|attribute| match attribute {
            TcActionAttribute::Options(options) => options.as_slice(),
            _ => &[],
        })
        .filter_map(|option| match option {
            TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) => Some(mirror.ifindex),
            _ => None,
        })
}

fn message(index: u32, parent: TcHandle, handle: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    // An index is positive.
    message.header.index = index.cast_signed();
    message.header.parent = parent;
    message.header.handle = handle;
    message
}

fn filter(index: u32, info: u32) -> TcMessage {
    let mut message = message(index, INGRESS, TcHandle::UNSPEC);
    message.header.info = info;
    message
}

/// Has the kernel send each packet that arrives at the device `from` out by the device `to`, and nowhere else.
fn redirect(netlink: &mut Netlink, from: u32, to: u32) -> io::Result<()> {
    let mut discipline = message(from, TcHandle::INGRESS, INGRESS);
    let kind = TcAttribute::Kind("ingress".to_owned());
    discipline.attributes.push(kind);
    netlink.change(
        RouteNetlinkMessage::NewQueueDiscipline(discipline),
        NLM_F_CREATE,
    )?;

    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind("mirred".to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    // Nothing of a packet has to be anything: each matches. (There is a plainer kind, which not every kernel has.)
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    let protocols = u32::from(ALL_PROTOCOLS.to_be());
    let mut message = filter(from, PREFERENCE << 16 | protocols);
    message.attributes = vec![
        TcAttribute::Kind("u32".to_owned()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(selector)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]),
    ];
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    netlink.change(RouteNetlinkMessage::NewTrafficFilter(message), flags)
}

fn remove_ingress(netlink: &mut Netlink, index: u32) -> Result<(), NetworkError> {
    let discipline = message(index, TcHandle::INGRESS, INGRESS);
    let removed = netlink.change(RouteNetlinkMessage::DelQueueDiscipline(discipline), 0);
    match removed {
        // The interface has gone meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other.map_err(io_error("remove the filters of a machine that has ended")),
    }
}
