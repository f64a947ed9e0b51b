//! The Unix socket on which host clients reach the guest's ports.
//!
//! A client sends `CONNECT <port>\n` and gets `OK <port on the host's side>\n` when the guest has
//! accepted; from then on the stream is the guest's. The clients are as hostile as the guest: the
//! file is for its owner alone, in a directory that the caller vouches for.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen, recv, socket,
};
use nix::sys::stat::{Mode, fchmod};
use thiserror::Error;

/// The longest request line: the word, ten digits and the newline fit well.
const MAX_LINE: usize = 32;

/// Why the socket could not be made.
#[derive(Debug, Error)]
pub enum HostSocketError {
    /// The directory cannot be opened, or is a symbolic link.
    #[error("opening the directory {} for the vsock socket", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be bound; nothing that exists is replaced.
    #[error("binding the vsock socket {} (remove what is there, if it is stale)", path.display())]
    Bind {
        /// The socket's path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A bound and listening socket. Its file stays: by a descriptor of its directory, which would be
/// needed to remove it, whoever takes this process over could leave the process's root.
#[derive(Debug)]
pub struct HostSocket {
    listener: UnixListener,
}

impl HostSocket {
    /// Binds `name` in `directory` with mode 0600, whatever the umask.
    ///
    /// # Errors
    /// The directory is a symbolic link or no directory; the name exists, as whatever.
    pub fn bind(directory: &Path, name: &str) -> Result<Self, HostSocketError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let opened =
            open(directory, flags, Mode::empty()).map_err(|error| HostSocketError::Directory {
                path: directory.to_owned(),
                source: error.into(),
            })?;
        // SAFETY: the descriptor was just opened and belongs to nobody else.
        let opened = unsafe { OwnedFd::from_raw_fd(opened) };
        match Self::bind_in(&opened, name) {
            Ok(listener) => Ok(Self { listener }),
            Err(source) => Err(HostSocketError::Bind {
                path: directory.join(name),
                source,
            }),
        }
    }

    fn bind_in(directory: &OwnedFd, name: &str) -> io::Result<UnixListener> {
        if name.is_empty() || name.contains('/') {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // By way of the descriptor: a socket's address holds 107 bytes, a path may be longer.
        let path = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
        let address = UnixAddr::new(path.as_str())?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        // The mode that bind gives to the file: it never exists with another one.
        fchmod(socket.as_raw_fd(), Mode::S_IRUSR | Mode::S_IWUSR)?;
        bind(socket.as_raw_fd(), &address)?;
        listen(&socket, Backlog::MAXALLOWABLE)?;
        Ok(UnixListener::from(socket))
    }

    /// The listening socket, which does not block.
    pub fn into_listener(self) -> UnixListener {
        self.listener
    }
}

/// What a client has said so far.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Not a whole line yet.
    Incomplete,
    /// A whole line, taken off the stream: connect to this guest port.
    Connect(u32),
    /// Nothing that can become a request.
    Invalid,
}

/// Looks for a request line on `client`, a non-blocking stream. Bytes after it stay unread: they
/// belong to the guest.
pub(super) fn read_request(client: &UnixStream) -> Request {
    let mut line = [0; MAX_LINE];
    let length = match recv(client.as_raw_fd(), &mut line, MsgFlags::MSG_PEEK) {
        Ok(0) => return Request::Invalid,
        Ok(length) => length,
        Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Request::Incomplete,
        Err(_) => return Request::Invalid,
    };
    let Some(end) = line[..length].iter().position(|&byte| byte == b'\n') else {
        return if length == MAX_LINE {
            Request::Invalid
        } else {
            Request::Incomplete
        };
    };
    let mut taken = [0; MAX_LINE];
    if recv(client.as_raw_fd(), &mut taken[..=end], MsgFlags::empty()) != Ok(end + 1) {
        return Request::Invalid;
    }
    parse(&taken[..end]).map_or(Request::Invalid, Request::Connect)
}

fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};

    use super::*;

    #[test]
    fn the_socket_is_its_owners_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v.sock");
        let socket = HostSocket::bind(directory.path(), "v.sock").unwrap();
        let metadata = path.symlink_metadata().unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(UnixStream::connect(&path).is_err());
    }

    #[test]
    fn what_exists_is_neither_followed_nor_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        symlink(path.join("target"), path.join("link")).unwrap();
        File::create(path.join("file")).unwrap();
        for name in ["link", "file", "", "../x", "."] {
            let error = HostSocket::bind(path, name).unwrap_err();
            assert!(matches!(error, HostSocketError::Bind { .. }), "{name}");
        }
        assert!(path.join("target").symlink_metadata().is_err());
        assert!(path.join("file").symlink_metadata().unwrap().is_file());
        symlink(path, path.join("elsewhere")).unwrap();
        let error = HostSocket::bind(&path.join("elsewhere"), "s").unwrap_err();
        assert!(matches!(error, HostSocketError::Directory { .. }));
    }

    #[test]
    fn a_path_longer_than_a_socket_address_is_fine() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("d".repeat(200));
        std::fs::create_dir(&deep).unwrap();
        HostSocket::bind(&deep, "v.sock").unwrap();
    }

    #[test]
    fn the_request_is_taken_and_what_follows_is_left() {
        let (mut client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        assert_eq!(read_request(&server), Request::Incomplete);
        client.write_all(b"CONNECT 10").unwrap();
        assert_eq!(read_request(&server), Request::Incomplete);
        client.write_all(b"24\nhello").unwrap();
        assert_eq!(read_request(&server), Request::Connect(1024));
        let mut rest = [0; 8];
        assert_eq!((&server).read(&mut rest).unwrap(), 5);
    }

    #[test]
    fn anything_else_is_no_request() {
        for line in [
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 4294967296\n",
            "CONNECT  1\n",
            "connect 1\n",
            "CONNECT 1 \n",
            "\n",
            "CONNECT 00000000000000000000000000000000001\n",
        ] {
            let (mut client, server) = UnixStream::pair().unwrap();
            server.set_nonblocking(true).unwrap();
            client.write_all(line.as_bytes()).unwrap();
            assert_eq!(read_request(&server), Request::Invalid, "{line:?}");
        }
        let (client, server) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(read_request(&server), Request::Invalid);
    }
}
