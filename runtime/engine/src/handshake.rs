//! What a container's first process and the runtime that makes it say to each other, in order:
//!
//! 1. the helper that joins namespaces, if there is one: `Born`, with the first process's pid;
//! 2. the runtime: that the id maps are written;
//! 3. the first process: `Hooks`, when namespaces and mounts are made; the runtime, when the hooks have run;
//! 4. the first process: `Ready`, and nothing any more; or at any time what failed.
//!
//! One packet each, through a pair of sockets. The first process runs our code only while it holds its end.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair};

use crate::error::{Context, Error};
use crate::report::Failure;

/// A packet from the first process's side.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// The first process exists and has this pid.
    Born(i32),
    /// It waits for the hooks that run before the root is changed.
    Hooks,
    /// It waits for its start.
    Ready,
    /// It could not be made.
    Failed(Failure),
}

/// The runtime's end.
pub(crate) struct ParentEnd(OwnedFd);

/// The first process's end.
pub(crate) struct ChildEnd(OwnedFd);

/// Longer reports are cut.
const LIMIT: usize = 16 * 1024;

const BORN: u8 = b'b';
const HOOKS: u8 = b'h';
const READY: u8 = b'r';
const GO_ON: &[u8] = b"g";

/// Makes both ends; each is closed when the process that has it executes a program.
pub(crate) fn pair() -> Result<(ParentEnd, ChildEnd), Error> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
    let (parent, child) = pair.context(|| "cannot make a pair of sockets".to_owned())?;
    Ok((ParentEnd(parent), ChildEnd(child)))
}

fn send(socket: &OwnedFd, packet: &[u8]) -> io::Result<()> {
    let parts = [IoSlice::new(packet)];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &parts,
        &[],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

fn receive(socket: &OwnedFd, packet: &mut [u8]) -> io::Result<usize> {
    loop {
        match recv(socket.as_raw_fd(), packet, MsgFlags::empty()) {
            Err(nix::errno::Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

impl ParentEnd {
    /// Waits for the next packet; that the other side has ended without one is an error.
    pub(crate) fn receive(&self) -> Result<Message, Error> {
        let mut packet = vec![0; LIMIT];
        let length = receive(&self.0, &mut packet)
            .context(|| "cannot hear from the container's first process".to_owned())?;
        match packet[..length].split_first() {
            Some((&BORN, pid)) => {
                let pid = pid.try_into().map(i32::from_ne_bytes);
                pid.map(Message::Born)
                    .map_err(|_| Error::Setup("a pid that is none".to_owned()))
            }
            Some((&HOOKS, _)) => Ok(Message::Hooks),
            Some((&READY, _)) => Ok(Message::Ready),
            Some((kind, text)) => Ok(Message::Failed(Failure::from_parts(*kind, text))),
            None => Err(Error::Setup(
                "the container's first process ended before it was ready".to_owned(),
            )),
        }
    }

    /// Lets the first process go on.
    pub(crate) fn go_on(&self) -> Result<(), Error> {
        send(&self.0, GO_ON).context(|| "cannot wake the container's first process".to_owned())
    }
}

impl ChildEnd {
    /// Sends a packet. That nobody listens any more is found out by [`ChildEnd::wait`].
    pub(crate) fn send(&self, message: &Message) {
        let packet = match message {
            Message::Born(pid) => [&[BORN], pid.to_ne_bytes().as_slice()].concat(),
            Message::Hooks => vec![HOOKS],
            Message::Ready => vec![READY],
            Message::Failed(failure) => {
                let (kind, text) = failure.parts();
                let mut packet = vec![kind];
                packet.extend_from_slice(text.as_bytes());
                packet.truncate(LIMIT);
                packet
            }
        };
        let _ = send(&self.0, &packet);
    }

    /// Waits until the runtime says that it goes on.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        let mut packet = [0; 8];
        let length =
            receive(&self.0, &mut packet).context(|| "cannot hear from the runtime".to_owned())?;
        match &packet[..length] {
            GO_ON => Ok(()),
            _ => Err(Error::Setup("the runtime has ended".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_received() {
        let (parent, child) = pair().unwrap();
        for message in [
            Message::Born(77),
            Message::Hooks,
            Message::Failed(Failure::NotFound("no such".into())),
            Message::Ready,
        ] {
            child.send(&message);
            assert_eq!(parent.receive().unwrap(), message);
        }
        parent.go_on().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_end_of_either_side_is_noticed() {
        let (parent, child) = pair().unwrap();
        drop(child);
        assert!(parent.receive().is_err());
        let (parent, child) = pair().unwrap();
        drop(parent);
        child.send(&Message::Ready);
        assert!(child.wait().is_err());
    }
}
