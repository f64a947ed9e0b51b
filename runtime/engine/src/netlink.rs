//! Requests to the kernel about interfaces, addresses, routes and queueing disciplines (rtnetlink(7)).
//!
//! One socket, one request at a time, no events: whoever needs more than that needs another library. Only the kernel
//! answers here, and it is trusted.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// A message begins at a multiple of this.
const ALIGNMENT: usize = 4;

/// A way to the network namespace in which it was opened, wherever its owner is later.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the caller's network namespace.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // Nobody but the kernel is heard.
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Asks for a change, with `flags` such as `NLM_F_CREATE`, and waits until it is made.
    ///
    /// # Errors
    /// The kernel's.
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.request(message, NLM_F_ACK | flags).map(drop)
    }

    /// Asks for all things of one kind.
    ///
    /// # Errors
    /// The kernel's, or that it says what is not understood.
    pub fn list(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.request(message, NLM_F_DUMP)
    }

    /// Brings up the interface with this index.
    ///
    /// # Errors
    /// The kernel's.
    pub fn bring_up(&mut self, index: u32) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        self.change(RouteNetlinkMessage::SetLink(link), 0)
    }

    fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(io::Error::other)?;
                let length = usize::try_from(answer.header.length).unwrap_or(usize::MAX);
                let next = length.next_multiple_of(ALIGNMENT).min(rest.len());
                rest = &rest[next..];
                if answer.header.sequence_number != self.sequence {
                    // The rest of an answer that ended in an error.
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::LinkAttribute;

    use super::*;

    #[test]
    fn the_loopback_device_is_listed() {
        let mut netlink = Netlink::open().unwrap();
        let all = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let names = |message| match message {
            RouteNetlinkMessage::NewLink(link) => link.attributes,
            other => panic!("{other:?}"),
        };
        let links = netlink.list(all).unwrap();
        let is_loopback = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::IfName(name) if name == "lo");
        assert!(
            links
                .into_iter()
                .any(|link| names(link).iter().any(is_loopback))
        );
    }

    #[test]
    fn an_error_of_the_kernel_is_told_and_the_next_request_served() {
        let mut netlink = Netlink::open().unwrap();
        let mut missing = LinkMessage::default();
        missing.header.index = 0x7fff_fff0;
        let error = netlink
            .change(RouteNetlinkMessage::SetLink(missing), 0)
            .unwrap_err();
        assert!(
            matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EPERM)),
            "{error}"
        );
        let all = RouteNetlinkMessage::GetLink(LinkMessage::default());
        assert!(!netlink.list(all).unwrap().is_empty());
    }
}
