//! What a new process of a container and the runtime that makes it say to each other, in order:
//!
//! 1. the helper that joins namespaces, if there is one: `Born`, with the first process's pid;
//! 2. the runtime: that the id maps are written and the network devices are there;
//! 3. the first process: `Hooks`, when namespaces and mounts are made; the runtime, when the hooks have run;
//! 4. the process: `Listener`, if its seccomp filter notifies; the runtime, when that has been handed on;
//! 5. the first process: `Ready`, and nothing any more; a further process ends the talk by becoming its program;
//! 6. the runtime, when it has noted all that there is: that it lets the first process go ([`crate::Hold`]).
//!
//! At any time it may be told what failed. One packet each, through a pair of sockets whose ends are closed when a program
//! is executed: only our code ever holds one.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    recvmsg, sendmsg, socketpair,
};

use crate::Hold;
use crate::clone::{ExitGuard, clone, exit_now};
use crate::error::{Context, Error};
use crate::report::Failure;

/// A packet from the new process's side.
#[derive(Debug)]
pub(crate) enum Message {
    /// The first process exists and has this pid.
    Born(i32),
    /// It waits for the hooks that run before the root is changed.
    Hooks,
    /// Its seccomp filter is in force, and this is where the filter's notifications come.
    Listener(OwnedFd),
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
const LISTENER: u8 = b'l';
const GO_ON: &[u8] = b"g";

/// Makes both ends; each is closed when the process that has it executes a program.
pub(crate) fn pair() -> Result<(ParentEnd, ChildEnd), Error> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
    let (parent, child) = pair.context(|| "cannot make a pair of sockets".to_owned())?;
    Ok((ParentEnd(parent), ChildEnd(child)))
}

fn send(socket: &OwnedFd, packet: &[u8], file: Option<RawFd>) -> io::Result<()> {
    let parts = [IoSlice::new(packet)];
    let files = file.map(|file| [file]);
    let control: Vec<ControlMessage<'_>> = files
        .iter()
        .map(|files| ControlMessage::ScmRights(files))
        .collect();
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &parts, &control, flags, None)?;
    Ok(())
}

fn receive(socket: &OwnedFd, packet: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut parts = [IoSliceMut::new(packet)];
    let mut space = cmsg_space!(RawFd);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = loop {
        let socket = socket.as_raw_fd();
        match recvmsg::<UnixAddr>(socket, &mut parts, Some(&mut space), flags) {
            Err(nix::errno::Errno::EINTR) => {}
            other => break other?,
        }
    };
    let mut file = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(files) = control {
            for number in files {
                // SAFETY: the kernel has just put this descriptor into this process for us alone.
                file = Some(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
    }
    Ok((message.bytes, file))
}

impl ParentEnd {
    /// What is left to say.
    pub(crate) fn into_hold(self) -> Hold {
        Hold::new(self.0)
    }

    /// Waits for the next packet; `None` when the other side has ended, or become a program.
    pub(crate) fn receive(&self) -> Result<Option<Message>, Error> {
        let mut packet = vec![0; LIMIT];
        let (length, file) = receive(&self.0, &mut packet)
            .context(|| "cannot hear from the container's process".to_owned())?;
        let Some((kind, rest)) = packet[..length].split_first() else {
            return Ok(None);
        };
        let message = match (*kind, file) {
            (BORN, _) => rest
                .try_into()
                .map(|pid| Message::Born(i32::from_ne_bytes(pid)))
                .map_err(|_| Error::Setup("a pid that is none".to_owned()))?,
            (HOOKS, _) => Message::Hooks,
            (READY, _) => Message::Ready,
            (LISTENER, Some(file)) => Message::Listener(file),
            (kind, _) => Message::Failed(Failure::from_parts(kind, rest)),
        };
        Ok(Some(message))
    }

    /// The next packet of a process that has still something to say.
    pub(crate) fn expect(&self) -> Result<Message, Error> {
        self.receive()?.ok_or_else(|| {
            Error::Setup("the container's first process ended before it was ready".to_owned())
        })
    }

    /// Lets the other side go on.
    pub(crate) fn go_on(&self) -> Result<(), Error> {
        send(&self.0, GO_ON, None)
            .context(|| "cannot wake the container's first process".to_owned())
    }
}

impl ChildEnd {
    /// Waits until the runtime lets go.
    pub(crate) fn wait_for_release(&self) -> Result<(), Error> {
        crate::wait_for_release(self.0.as_fd())
            .context(|| "the process that creates the container has ended".to_owned())
    }

    /// Sends a packet. That nobody listens any more is found out by [`ChildEnd::wait`].
    pub(crate) fn send(&self, message: &Message) {
        let mut file = None;
        let packet = match message {
            Message::Born(pid) => [&[BORN], pid.to_ne_bytes().as_slice()].concat(),
            Message::Hooks => vec![HOOKS],
            Message::Ready => vec![READY],
            Message::Listener(listener) => {
                file = Some(listener.as_raw_fd());
                vec![LISTENER]
            }
            Message::Failed(failure) => {
                let (kind, text) = failure.parts();
                let mut packet = vec![kind];
                packet.extend_from_slice(text.as_bytes());
                packet.truncate(LIMIT);
                packet
            }
        };
        let _ = send(&self.0, &packet, file);
    }

    /// Waits until the runtime says that it goes on.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        let mut packet = [0; 8];
        let (length, _) =
            receive(&self.0, &mut packet).context(|| "cannot hear from the runtime".to_owned())?;
        match &packet[..length] {
            GO_ON => Ok(()),
            _ => Err(Error::Setup("the runtime has ended".to_owned())),
        }
    }
}

/// Does something in a process of its own, `what`, born in a cgroup or in the caller's; tells what failed there.
pub(crate) fn in_child(
    what: &str,
    cgroup: Option<BorrowedFd<'_>>,
    work: impl FnOnce() -> Result<(), Error>,
) -> Result<Option<Failure>, Error> {
    let (ours, theirs) = pair()?;
    let child = clone(0, cgroup).context(|| format!("cannot make {what}"))?;
    let Some(child) = child else {
        let _guard = ExitGuard;
        drop(ours);
        if let Err(error) = work() {
            theirs.send(&Message::Failed(error.into()));
            exit_now(1);
        }
        exit_now(0);
    };
    drop(theirs);
    let told = ours.receive();
    child.wait().context(|| format!("cannot wait for {what}"))?;
    Ok(match told? {
        Some(Message::Failed(failure)) => Some(failure),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_received() {
        let (parent, child) = pair().unwrap();
        child.send(&Message::Born(77));
        assert!(matches!(parent.expect(), Ok(Message::Born(77))));
        child.send(&Message::Hooks);
        assert!(matches!(parent.expect(), Ok(Message::Hooks)));
        child.send(&Message::Failed(Failure::NotFound("no such".into())));
        let told = parent.expect().unwrap();
        assert!(
            matches!(&told, Message::Failed(Failure::NotFound(text)) if text == "no such"),
            "{told:?}"
        );
        let (read, write) = nix::unistd::pipe().unwrap();
        child.send(&Message::Listener(write));
        let Ok(Message::Listener(write)) = parent.expect() else {
            panic!("no descriptor came");
        };
        nix::unistd::write(&write, b"x").unwrap();
        assert_eq!(nix::unistd::read(read.as_raw_fd(), &mut [0]).unwrap(), 1);
        parent.go_on().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_end_of_either_side_is_noticed() {
        let (parent, child) = pair().unwrap();
        drop(child);
        assert!(matches!(parent.receive(), Ok(None)));
        assert!(parent.expect().is_err());
        let (parent, child) = pair().unwrap();
        drop(parent);
        child.send(&Message::Ready);
        assert!(child.wait().is_err());
    }
}
