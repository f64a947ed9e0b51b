//! Standard input, output and error of a container's process.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::error::{Context, Error};

/// Where a process reads and writes.
#[derive(Debug)]
pub enum Stdio {
    /// The caller's own descriptors 0, 1 and 2.
    Inherit,
    /// These descriptors. They are closed in the caller when the call returns.
    Files {
        /// Standard input.
        stdin: OwnedFd,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
    /// A new terminal of the container, whose master is sent to the Unix socket at this path.
    Console(PathBuf),
}

/// The descriptors, ready to be put in place by the child.
pub(crate) enum Ready {
    Inherit,
    Files([OwnedFd; 3]),
    Console(OwnedFd),
}

impl Stdio {
    /// Opens what must be opened before the process is made.
    pub(crate) fn ready(self, terminal: bool) -> Result<Ready, Error> {
        match self {
            Self::Console(path) if terminal => {
                let socket = with_short_path(&path, |short| UnixStream::connect(short))
                    .map_err(|source| Error::ConsoleSocket { path, source })?;
                Ok(Ready::Console(above_stdio(socket.into())?))
            }
            Self::Console(_) => Err(Error::unsupported(
                "process.terminal",
                "a console socket was given, but no terminal is asked for",
            )),
            _ if terminal => Err(Error::unsupported(
                "process.terminal",
                "a terminal needs a console socket to send it to",
            )),
            Self::Inherit => Ok(Ready::Inherit),
            Self::Files {
                stdin,
                stdout,
                stderr,
            } => Ok(Ready::Files([
                above_stdio(stdin)?,
                above_stdio(stdout)?,
                above_stdio(stderr)?,
            ])),
        }
    }
}

impl Ready {
    /// Makes them this process's standard descriptors; a terminal is still to be made.
    pub(crate) fn put_in_place(&self) -> Result<(), Error> {
        let Self::Files(files) = self else {
            return Ok(());
        };
        for (target, file) in (0..).zip(files) {
            nix::unistd::dup2(file.as_raw_fd(), target)
                .context(|| format!("cannot put standard descriptor {target} in place"))?;
        }
        Ok(())
    }

    pub(crate) fn console(&self) -> Option<RawFd> {
        match self {
            Self::Console(socket) => Some(socket.as_raw_fd()),
            _ => None,
        }
    }
}

/// A descriptor numbered 0 to 2 would be overwritten while the three are put in place one by one.
fn above_stdio(fd: OwnedFd) -> Result<OwnedFd, Error> {
    if fd.as_raw_fd() > 2 {
        return Ok(fd);
    }
    // The standard library duplicates to numbers from 3 on.
    fd.try_clone()
        .context(|| "cannot duplicate a standard descriptor".to_owned())
}

/// Calls with a path that stands for the one given but is short: a socket's address has room for 107 bytes.
///
/// # Errors
/// Those of the call, and that the path's directory cannot be opened.
pub fn with_short_path<T>(path: &Path, call: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return call(path);
    };
    if path.as_os_str().len() < 100 {
        return call(path);
    }
    let directory = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(parent)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    call(&short)
}

/// Sends a text with descriptors beside it, in one message of a Unix socket.
///
/// # Errors
/// Nobody is at the other end any more.
pub fn send_with_files(socket: &impl AsRawFd, text: &[u8], files: &[RawFd]) -> io::Result<()> {
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[io::IoSlice::new(text)],
        &[ControlMessage::ScmRights(files)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_long_socket_path_can_be_used() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("s.sock");
        let listener = with_short_path(&path, |short| UnixListener::bind(short)).unwrap();
        with_short_path(&path, |short| UnixStream::connect(short)).unwrap();
        drop(listener);
    }

    #[test]
    fn a_terminal_and_a_console_socket_belong_together() {
        assert!(Stdio::Inherit.ready(true).is_err());
        assert!(Stdio::Console("/x".into()).ready(false).is_err());
        let error = Stdio::Console("/no/such.sock".into())
            .ready(true)
            .err()
            .unwrap();
        assert_eq!(
            error.to_string(),
            "cannot use the console socket /no/such.sock"
        );
    }
}
