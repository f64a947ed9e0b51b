//! The machine's control socket, by which a process of the host asks the VMM process for what is not the agent's to do.
//!
//! It is in the container's `vm` directory, which is root's alone: who asks is trusted, and may still end at any moment.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde::{Deserialize, Serialize};

/// The socket, in the container's `vm` directory.
pub const CONTROL: &str = "control.sock";

/// How long who asks may take to say for what.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// No request has more text, or more descriptors.
const TEXT: usize = 256;
const DESCRIPTORS: usize = 4;

/// What the VMM process is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// To write the machine down, in the files that come along.
    Checkpoint {
        /// Whether the machine goes on then.
        leave_running: bool,
    },
    /// To tell how much memory the machine has.
    Memory,
    /// To tell that, and then to have as many bytes of it in all.
    SetMemory(u64),
}

/// A request as the VMM process has it.
#[derive(Debug)]
pub struct Received {
    /// What is asked for.
    pub request: Request,
    /// What came along.
    pub fds: Vec<OwnedFd>,
    /// Who asks.
    pub asker: UnixStream,
}

/// Asks the VMM process of the machine with this `vm` directory; it answers by the stream, or by one of `fds`.
///
/// # Errors
/// There is none.
pub fn ask(vm_dir: &Path, request: Request, fds: &[RawFd]) -> io::Result<UnixStream> {
    let socket = vm_dir.join(CONTROL);
    let stream = engine::with_short_path(&socket, |short| UnixStream::connect(short))?;
    engine::send_with_files(&stream, &serde_json::to_vec(&request)?, fds)?;
    Ok(stream)
}

/// The next request at the socket.
///
/// # Errors
/// Nobody is there any more, or what is asked for makes no sense.
pub fn receive(control: &UnixListener) -> io::Result<Received> {
    let (asker, _) = control.accept()?;
    asker.set_read_timeout(Some(REQUEST_LIMIT))?;
    let mut text = [0; TEXT];
    let mut space = cmsg_space!([RawFd; DESCRIPTORS]);
    let mut slices = [IoSliceMut::new(&mut text)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(asker.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = part {
            // SAFETY: the kernel has just given us these descriptors; nobody else knows them.
            let owned = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
            fds.extend(received.into_iter().map(owned));
        }
    }
    let length = message.bytes;
    Ok(Received {
        request: serde_json::from_slice(&text[..length])?,
        fds,
        asker,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_arrives_with_its_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        let control = UnixListener::bind(dir.path().join(CONTROL)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let fds = [file.as_raw_fd(); DESCRIPTORS];
        let request = Request::Checkpoint {
            leave_running: true,
        };
        for (request, fds) in [
            (request, &fds[..]),
            (Request::Memory, &[]),
            (Request::SetMemory(u64::MAX), &[]),
        ] {
            let _asker = ask(dir.path(), request, fds).unwrap();
            let received = receive(&control).unwrap();
            assert_eq!((received.request, received.fds.len()), (request, fds.len()));
        }
        drop(ask(dir.path(), Request::Memory, &[]));
        assert!(receive(&control).is_ok());
        drop(UnixStream::connect(dir.path().join(CONTROL)));
        assert!(receive(&control).is_err());
    }
}
