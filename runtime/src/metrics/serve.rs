//! The endpoint: GET /metrics by HTTP, on a Unix socket that only its owner can open or on the loopback device.
//!
//! Callers are hostile: a request is read up to a length and for a time, and answered one after the other.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use super::Collector;
use super::text::CONTENT_TYPE;

/// How long a caller may take for its request, and for taking the answer.
const LIMIT: Duration = Duration::from_secs(5);

/// The longest request that is read, in bytes.
const LENGTH: u64 = 8 << 10;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket of this path.
    Unix(PathBuf),
    /// A port of the loopback device.
    Loopback(SocketAddr),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.starts_with('/') {
                Ok(Self::Unix(path.into()))
            } else {
                Err(format!("{path:?} is not an absolute path"))
            };
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::Loopback(address)),
            Ok(_) => {
                Err("anybody could read there: give an address of the loopback device".to_owned())
            }
            Err(_) => Err("give unix:/PATH or an address as 127.0.0.1:9311".to_owned()),
        }
    }
}

/// Answers for ever.
///
/// # Errors
/// It cannot listen there.
pub fn serve(address: &Address, collector: &Collector) -> io::Result<()> {
    match address {
        Address::Unix(path) => {
            let listener = listen(path)?;
            for stream in listener.incoming().flatten() {
                // A caller that goes away is no failure of ours.
                let _ = answer_unix(&stream, collector);
            }
        }
        Address::Loopback(address) => {
            for stream in TcpListener::bind(address)?.incoming().flatten() {
                let _ = answer_tcp(&stream, collector);
            }
        }
    }
    Ok(())
}

/// A socket that a server left behind is replaced, one that is served is not.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err() {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn answer_unix(stream: &UnixStream, collector: &Collector) -> io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    answer(stream, stream, collector)
}

fn answer_tcp(stream: &TcpStream, collector: &Collector) -> io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    answer(stream, stream, collector)
}

fn answer(request: impl Read, mut reply: impl Write, collector: &Collector) -> io::Result<()> {
    let head = read_head(request)?;
    let mut words = head.split(|byte| byte.is_ascii_whitespace());
    let (status, kind, body) = match (words.next(), words.next()) {
        (Some(b"GET"), Some(b"/metrics")) => match collector.collect() {
            Ok(text) => ("200 OK", CONTENT_TYPE, text),
            Err(error) => {
                let text = format!("{}\n", crate::error_chain(&error));
                ("500 Internal Server Error", "text/plain", text)
            }
        },
        _ => (
            "404 Not Found",
            "text/plain",
            "there is /metrics\n".to_owned(),
        ),
    };
    write!(
        reply,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// The request up to its empty line (RFC 9112). A read has its time limit, and all of them together have as much.
fn read_head(request: impl Read) -> io::Result<Vec<u8>> {
    let begin = Instant::now();
    let mut head = Vec::new();
    let mut request = request.take(LENGTH);
    let mut piece = [0; 1024];
    while begin.elapsed() < LIMIT {
        let length = request.read(&mut piece)?;
        head.extend_from_slice(piece.get(..length).unwrap_or_default());
        if length == 0 || head.windows(4).any(|end| end == b"\r\n\r\n") {
            return Ok(head);
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::lifecycle::Lifecycle;
    use crate::state::Store;

    fn collector(root: &Path) -> Collector {
        Collector::new(Lifecycle::new(
            Store::new(root.to_owned()),
            Config::default(),
        ))
    }

    #[test]
    fn it_listens_to_its_owner_and_this_machine_alone() {
        let loopback = "127.0.0.1:9311".parse().unwrap();
        assert_eq!("127.0.0.1:9311".parse(), Ok(Address::Loopback(loopback)));
        assert_eq!("unix:/run/x".parse(), Ok(Address::Unix("/run/x".into())));
        for (wrong, reason) in [
            ("0.0.0.0:9311", "anybody could read there"),
            ("unix:here", "not an absolute path"),
            ("9311", "give unix:/PATH"),
        ] {
            let error = wrong.parse::<Address>().unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_request_is_answered_and_another_is_told_what_there_is() {
        let root = tempfile::tempdir().unwrap();
        let ask = |request: &[u8]| {
            let mut reply = Vec::new();
            answer(request, &mut reply, &collector(root.path()))
                .map(|()| String::from_utf8(reply).unwrap())
        };
        let reply = ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        assert!(reply.starts_with("HTTP/1.1 200 OK\r\n"), "{reply}");
        let running = "\nrt_containers{isolation=\"container\",status=\"running\"} 0\n";
        assert!(reply.contains(running), "{reply}");
        for request in [
            &b"POST /metrics HTTP/1.1\r\n\r\n"[..],
            b"GET / HTTP/1.1\r\n\r\n",
            b"\0\xff",
            b"",
        ] {
            assert!(ask(request).unwrap().starts_with("HTTP/1.1 404 "));
        }
        // One that never ends is not read to its end.
        let mut reply = Vec::new();
        let endless = io::repeat(b'x');
        answer(endless, &mut reply, &collector(root.path())).unwrap();
        assert!(reply.starts_with(b"HTTP/1.1 404 "));
    }

    #[test]
    fn a_socket_that_nobody_serves_is_replaced_and_one_that_is_served_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let first = listen(&path).unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        listen(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
