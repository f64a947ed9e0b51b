//! The container's network: the interfaces of the machine, set up as those on the host are.
//!
//! What is to be comes from the host, which is trusted. Whoever calls this has a network namespace that is to become
//! the container's.

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use engine::netlink::Netlink;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns, unshare};
use protocol::message::{Interface, InterfaceAddress, Neighbour, Network, Route};
use thiserror::Error;

/// How long the other ends of connections may take to receive the rest.
const SENDING_LIMIT: Duration = Duration::from_secs(10);

/// FIN_WAIT1, LAST_ACK and CLOSING, as `/proc/net/tcp` numbers the states.
const SENDING: [&str; 3] = ["04", "09", "0B"];

/// The network cannot be set up.
#[derive(Debug, Error)]
pub(crate) enum NetworkError {
    /// A call of the kernel.
    #[error("cannot {action}")]
    Io {
        /// What was to be done.
        action: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The machine has no device with the address.
    #[error(
        "the guest has no network device for the interface {0}: has its kernel CONFIG_VIRTIO_NET?"
    )]
    NoDevice(String),
    /// The host sent bytes that are no address.
    #[error("{0:?} is no address")]
    Address(Vec<u8>),
    /// The loopback device.
    #[error(transparent)]
    Loopback(#[from] engine::Error),
}

fn io_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Io {
        action: action.into(),
        source,
    }
}

/// Makes a network namespace with the machine's interfaces in it, and keeps it at `path`, a file to be made, also when no
/// process is in it. The caller stays where it is.
///
/// # Errors
/// [`NetworkError`] for the first thing that fails.
pub(crate) fn make_namespace(network: &Network, path: &Path) -> Result<(), NetworkError> {
    let own =
        File::open("/proc/thread-self/ns/net").map_err(io_error("open the network namespace"))?;
    let mut outside = Netlink::open().map_err(io_error("open a netlink socket"))?;
    unshare(CloneFlags::CLONE_NEWNET)
        .map_err(|errno| io_error("make a network namespace")(errno.into()))?;
    let made = set_up(network, &mut outside).and_then(|()| keep_namespace(path));
    setns(own, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| io_error("leave the network namespace")(errno.into()))?;
    made
}

/// Brings the machine's interfaces into the caller's namespace; `outside` reaches where they are.
fn set_up(network: &Network, outside: &mut Netlink) -> Result<(), NetworkError> {
    let namespace =
        File::open("/proc/thread-self/ns/net").map_err(io_error("open the network namespace"))?;
    engine::loopback_up()?;
    for interface in &network.interfaces {
        let mut moved = LinkMessage::default();
        moved.header.index = device(outside, interface)?;
        moved.attributes = vec![
            LinkAttribute::NetNsFd(namespace.as_raw_fd()),
            LinkAttribute::IfName(interface.name.clone()),
            LinkAttribute::Mtu(interface.mtu),
        ];
        if !interface.device_address.is_empty() {
            let address = LinkAttribute::Address(interface.link_address.clone());
            moved.attributes.push(address);
        }
        outside
            .change(RouteNetlinkMessage::SetLink(moved), 0)
            .map_err(io_error(format!(
                "take over the interface {}",
                interface.name
            )))?;
    }
    let mut inside = Netlink::open().map_err(io_error("open a netlink socket"))?;
    for interface in &network.interfaces {
        let index = index(&interface.name)?;
        for address in &interface.addresses {
            let add = add_address(index, address)?;
            inside
                .change(add, NLM_F_CREATE | NLM_F_EXCL)
                .map_err(io_error(format!("give {} its address", interface.name)))?;
        }
        inside
            .bring_up(index)
            .map_err(io_error(format!("bring up {}", interface.name)))?;
    }
    for neighbour in &network.neighbours {
        let add = add_neighbour(neighbour)?;
        inside
            .change(add, NLM_F_CREATE | NLM_F_REPLACE)
            .map_err(io_error(format!(
                "add a neighbour on {}",
                neighbour.interface
            )))?;
    }
    for route in &network.routes {
        let add = add_route(route)?;
        let failed = || {
            let destination = ip(&route.destination).map(|ip| ip.to_string());
            let destination = destination.unwrap_or_default();
            format!("add the route to {destination}/{}", route.prefix_length)
        };
        inside
            .change(add, NLM_F_CREATE | NLM_F_EXCL)
            .map_err(io_error(failed()))?;
    }
    Ok(())
}

/// Keeps the caller's network namespace at `path`.
fn keep_namespace(path: &Path) -> Result<(), NetworkError> {
    let failed = || io_error("keep the network namespace");
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed())?;
    }
    File::create(path).map_err(failed())?;
    let namespace = Some("/proc/thread-self/ns/net");
    let none = None::<&str>;
    mount(namespace, path, none, MsFlags::MS_BIND, none).map_err(|errno| failed()(errno.into()))
}

/// Keeps the namespace at `path` no longer, if it is one.
pub(crate) fn let_go(path: &Path) {
    let _ = umount2(path, MntFlags::MNT_DETACH);
    let _ = fs::remove_file(path);
}

/// Waits until the other ends of the TCP connections in the namespace at `path` have received all that processes which
/// have ended sent. As a host's kernel goes on sending for them, so must this one, before its machine ends.
///
/// # Errors
/// [`NetworkError::Io`].
pub(crate) fn finish_sending(path: &Path) -> Result<(), NetworkError> {
    let Ok(namespace) = File::open(path) else {
        // There is no network but a loopback device.
        return Ok(());
    };
    setns(namespace, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| io_error("enter the network namespace")(errno.into()))?;
    let begin = Instant::now();
    // Not every guest's kernel tells when a connection has ended; most often there is none to wait for.
    while is_sending().map_err(io_error("list the TCP connections"))?
        && begin.elapsed() < SENDING_LIMIT
    {
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Whether a connection of the caller's network namespace has an end that was closed and not all of which has been
/// acknowledged.
fn is_sending() -> io::Result<bool> {
    for table in ["tcp", "tcp6"] {
        let lines = match fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
            Ok(lines) => lines,
            // Without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        // A heading; then number, local address, other address, state.
        let mut states = lines
            .lines()
            .skip(1)
            .map(|line| line.split_whitespace().nth(3));
        if states.any(|state| state.is_some_and(|state| SENDING.contains(&state))) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The interface's device.
fn device(netlink: &mut Netlink, interface: &Interface) -> Result<u32, NetworkError> {
    let address = match interface.device_address.as_slice() {
        [] => &interface.link_address,
        _ => &interface.device_address,
    };
    let wanted = LinkAttribute::Address(address.clone());
    let all = netlink
        .list(RouteNetlinkMessage::GetLink(LinkMessage::default()))
        .map_err(io_error("list network devices"))?;
    let found = all.into_iter().find_map(|message| match message {
        RouteNetlinkMessage::NewLink(link) => {
            let is_wanted = link.attributes.contains(&wanted);
            is_wanted.then_some(link.header.index)
        }
        _ => None,
    });
    found.ok_or_else(|| NetworkError::NoDevice(interface.name.clone()))
}

fn index(interface: &str) -> Result<u32, NetworkError> {
    if_nametoindex(interface)
        .map_err(|errno| io_error(format!("find the interface {interface}"))(errno.into()))
}

fn ip(bytes: &[u8]) -> Result<IpAddr, NetworkError> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Ok(bytes.into());
    }
    let bytes = <[u8; 16]>::try_from(bytes).map_err(|_| NetworkError::Address(bytes.to_vec()))?;
    Ok(bytes.into())
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// The low byte: what is numbered here has no more.
fn byte(number: u32) -> u8 {
    number.to_le_bytes()[0]
}

fn add_address(
    index: u32,
    address: &InterfaceAddress,
) -> Result<RouteNetlinkMessage, NetworkError> {
    let local = ip(&address.address)?;
    let peer = match address.peer.is_empty() {
        true => local,
        false => ip(&address.peer)?,
    };
    let mut message = AddressMessage::default();
    message.header.family = family(local);
    message.header.index = index;
    message.header.prefix_len = byte(address.prefix_length);
    message.header.scope = byte(address.scope).into();
    // That nobody else on the link has it is known: the host's interface had it.
    let mut flags = AddressFlags::Nodad;
    flags.set(AddressFlags::Noprefixroute, address.no_prefix_route);
    message.attributes = vec![
        AddressAttribute::Local(local),
        AddressAttribute::Address(peer),
        AddressAttribute::Flags(flags),
    ];
    if let Ok(broadcast) = <[u8; 4]>::try_from(address.broadcast.as_slice()) {
        let broadcast = AddressAttribute::Broadcast(broadcast.into());
        message.attributes.push(broadcast);
    }
    Ok(RouteNetlinkMessage::NewAddress(message))
}

fn add_route(route: &Route) -> Result<RouteNetlinkMessage, NetworkError> {
    let destination = ip(&route.destination)?;
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(destination);
    header.destination_prefix_length = byte(route.prefix_length);
    header.table = RouteHeader::RT_TABLE_MAIN;
    header.protocol = RouteProtocol::Static;
    header.scope = byte(route.scope).into();
    header.kind = RouteType::Unicast;
    header.flags.set(RouteFlags::Onlink, route.on_link);
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Oif(index(&route.interface)?));
    if route.prefix_length > 0 {
        let destination = RouteAddress::from(destination);
        attributes.push(RouteAttribute::Destination(destination));
    }
    if !route.gateway.is_empty() {
        let gateway = RouteAddress::from(ip(&route.gateway)?);
        attributes.push(RouteAttribute::Gateway(gateway));
    }
    if !route.source.is_empty() {
        let source = RouteAddress::from(ip(&route.source)?);
        attributes.push(RouteAttribute::PrefSource(source));
    }
    if route.priority > 0 {
        attributes.push(RouteAttribute::Priority(route.priority));
    }
    if route.mtu > 0 {
        let metrics = vec![RouteMetric::Mtu(route.mtu)];
        attributes.push(RouteAttribute::Metrics(metrics));
    }
    Ok(RouteNetlinkMessage::NewRoute(message))
}

fn add_neighbour(neighbour: &Neighbour) -> Result<RouteNetlinkMessage, NetworkError> {
    let address = ip(&neighbour.address)?;
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index(&neighbour.interface)?;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(match address {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        }),
        NeighbourAttribute::LinkLayerAddress(neighbour.link_address.clone()),
    ];
    Ok(RouteNetlinkMessage::NewNeighbour(message))
}
