//! The other side of a console socket: takes the terminal that a container's process was given.
//!
//! The sender is the engine inside the container before the program runs, or a client's socket peer: what arrives is
//! checked to be a terminal.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

/// A console socket that waits for one terminal; its file is removed when it is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Makes the socket. Its directory should be the caller's alone.
    ///
    /// # Errors
    /// The file exists already or cannot be made.
    pub fn bind(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        let socket = crate::stdio::with_short_path(&path, |short| UnixListener::bind(short))?;
        Ok(Self { socket, path })
    }

    /// The path to give as [`crate::Stdio::Console`].
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the terminal's master. Call it after create or exec: those have sent it when they return.
    ///
    /// # Errors
    /// The message has no terminal in it.
    pub fn receive(&self) -> io::Result<OwnedFd> {
        let (stream, _) = self.socket.accept()?;
        let mut data = [0u8; 4096];
        let mut parts = [io::IoSliceMut::new(&mut data)];
        let mut space = cmsg_space!([libc::c_int; 4]);
        let message = recvmsg::<UnixAddr>(
            stream.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let mut files = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel has just put these descriptors into this process for us alone.
                files.extend(
                    fds.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        let master = files
            .into_iter()
            .next()
            .filter(|fd| nix::unistd::isatty(fd.as_raw_fd()).unwrap_or(false));
        master.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no terminal was sent"))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
