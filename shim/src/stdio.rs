//! The standard streams of a container's processes, as containerd names them: fifos, files, or a program that takes the
//! output.
//!
//! A process without a terminal gets the fifos themselves: nobody copies between it and containerd. We keep the other
//! end of each open, so that a containerd that is started again finds everything as it was. With a terminal two threads
//! copy between its master and the fifos.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use command_fds::{CommandFdExt, FdMapping};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::OFlags;
use rustix::termios::{Winsize, tcsetwinsize};

use crate::error::{Failure, Kind};

/// How long a logging program may take to begin, in milliseconds.
const READY_LIMIT: u16 = 10_000;

/// The streams' addresses, as containerd gave them; empty for none.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    /// The process has a terminal, and no stderr of its own.
    pub terminal: bool,
}

/// Whom a logging program is told to log.
#[derive(Debug, Clone, Copy)]
pub struct Logged<'a> {
    pub id: &'a str,
    pub namespace: &'a str,
}

/// What a process gets.
#[derive(Debug)]
pub struct Streams {
    files: [OwnedFd; 3],
    kept: Kept,
}

/// What we keep of a process's streams while it lives.
#[derive(Debug, Default)]
pub struct Kept {
    /// The end of stdin that makes it end when it is closed.
    stdin: Option<File>,
    /// The reading ends, without which a write would fail while containerd is away.
    readers: Vec<File>,
    terminal: Option<OwnedFd>,
}

impl Kept {
    /// Lets stdin end.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Gives the terminal a size, if there is one.
    pub fn resize(&self, columns: u32, rows: u32) -> Result<(), Failure> {
        let Some(terminal) = &self.terminal else {
            return Ok(());
        };
        let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let size = Winsize {
            ws_row: cells(rows),
            ws_col: cells(columns),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(terminal, size)
            .map_err(|error| Failure::io("resize the terminal")(error.into()))
    }
}

impl Streams {
    /// Opens what the addresses name. The streams belong to `owner` then, unless that is root.
    pub fn open(
        addresses: &Addresses,
        logged: Logged<'_>,
        owner: (u32, u32),
    ) -> Result<Self, Failure> {
        let mut kept = Kept::default();
        let stdin = if addresses.stdin.is_empty() {
            null()?
        } else {
            let path = Path::new(addresses.stdin.trim_start_matches("fifo://"));
            let (reader, writer) = fifo(path)?;
            kept.stdin = Some(writer);
            reader.into()
        };
        let (stdout, stderr) =
            Output::parse(&addresses.stdout, &addresses.stderr)?.open(&mut kept, logged)?;
        let files = [stdin, stdout, stderr];
        if owner != (0, 0) {
            let (uid, gid) = owner;
            for file in &files {
                std::os::unix::fs::fchown(file, Some(uid), Some(gid))
                    .map_err(Failure::io("give a stream to its user"))?;
            }
        }
        Ok(Self { files, kept })
    }

    /// The standard streams of a process that has no terminal.
    pub fn files(&self) -> [BorrowedFd<'_>; 3] {
        self.files.each_ref().map(AsFd::as_fd)
    }

    /// The process runs: lets go of what is its alone, and begins to copy if it has a terminal.
    pub fn into_kept(self, terminal: Option<OwnedFd>) -> Result<Kept, Failure> {
        let Self { files, mut kept } = self;
        let Some(terminal) = terminal else {
            return Ok(kept);
        };
        let [stdin, stdout, _] = files;
        let master = || terminal.try_clone().map(File::from);
        let (input, output) = master()
            .and_then(|input| Ok((input, master()?)))
            .map_err(Failure::io("copy a descriptor"))?;
        copy(File::from(stdin), input)?;
        copy(output, File::from(stdout))?;
        kept.terminal = Some(terminal);
        Ok(kept)
    }
}

/// Copies until one of the ends is gone.
fn copy(mut from: File, mut to: File) -> Result<(), Failure> {
    thread::Builder::new()
        .name("terminal".to_owned())
        // Buffers are on the heap.
        .stack_size(64 << 10)
        .spawn(move || {
            // EIO is how a terminal's master ends.
            let _ = io::copy(&mut from, &mut to);
        })
        .map(drop)
        .map_err(Failure::io("start a thread"))
}

fn null() -> Result<OwnedFd, Failure> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/null");
    Ok(file.map_err(Failure::io("open /dev/null"))?.into())
}

/// Opens both ends of a fifo, without waiting for somebody at the other end.
fn fifo(path: &Path) -> Result<(File, File), Failure> {
    let open = || -> io::Result<(File, File)> {
        let reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
            .open(path)?;
        if !reader.metadata()?.file_type().is_fifo() {
            return Err(io::Error::other("it is no fifo"));
        }
        // There is a reader now, so that this does not wait either.
        let writer = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        let flags = rustix::fs::fcntl_getfl(&reader)?;
        rustix::fs::fcntl_setfl(&reader, flags - OFlags::NONBLOCK)?;
        Ok((reader, writer))
    };
    open().map_err(Failure::io(format_args!(
        "open the stream {}",
        path.display()
    )))
}

/// Where output goes.
#[derive(Debug, PartialEq, Eq)]
enum Output {
    /// To fifos, an empty path meaning nowhere.
    Fifos { stdout: PathBuf, stderr: PathBuf },
    /// Both to the end of a file.
    File(PathBuf),
    /// To a program: both streams as its descriptors 3 and 4, and 5 to close when it is ready.
    Program {
        path: PathBuf,
        arguments: Vec<String>,
    },
}

impl Output {
    fn parse(stdout: &str, stderr: &str) -> Result<Self, Failure> {
        let Some((scheme, rest)) = stdout.split_once("://") else {
            return Ok(Self::Fifos {
                stdout: stdout.into(),
                stderr: stderr.trim_start_matches("fifo://").into(),
            });
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = PathBuf::from(decode(path)?);
        if !path.is_absolute() {
            let reason = format!("output {stdout:?}: the path must be absolute");
            return Err(Failure::new(Kind::Invalid, reason));
        }
        match scheme {
            "fifo" => Ok(Self::Fifos {
                stdout: path,
                stderr: stderr.trim_start_matches("fifo://").into(),
            }),
            "file" => Ok(Self::File(path)),
            "binary" => {
                // As containerd's own shims pass them: sorted, a name and its first value.
                let mut parameters = BTreeMap::new();
                for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                    let name = decode(name)?;
                    parameters.entry(name).or_insert(decode(value)?);
                }
                let arguments = parameters
                    .into_iter()
                    .flat_map(|(name, value)| [name, value])
                    .filter(|argument| !argument.is_empty())
                    .collect();
                Ok(Self::Program { path, arguments })
            }
            _ => {
                let reason = format!("output {stdout:?}: use fifo, file or binary");
                Err(Failure::new(Kind::Invalid, reason))
            }
        }
    }

    fn open(self, kept: &mut Kept, logged: Logged<'_>) -> Result<(OwnedFd, OwnedFd), Failure> {
        match self {
            Self::Fifos { stdout, stderr } => {
                let mut open = |path: &Path| -> Result<OwnedFd, Failure> {
                    if path.as_os_str().is_empty() {
                        return null();
                    }
                    let (reader, writer) = fifo(path)?;
                    kept.readers.push(reader);
                    Ok(writer.into())
                };
                Ok((open(&stdout)?, open(&stderr)?))
            }
            Self::File(path) => {
                let open = || {
                    let file = OpenOptions::new()
                        .append(true)
                        .create(true)
                        .mode(0o640)
                        .open(&path)?;
                    Ok((OwnedFd::from(file.try_clone()?), OwnedFd::from(file)))
                };
                open().map_err(Failure::io(format_args!("open {}", path.display())))
            }
            Self::Program { path, arguments } => start_logger(&path, &arguments, logged).map_err(
                Failure::io(format_args!("start the logger {}", path.display())),
            ),
        }
    }
}

/// Starts a logging program and waits until it is ready. It ends with its input.
fn start_logger(
    path: &Path,
    arguments: &[String],
    logged: Logged<'_>,
) -> io::Result<(OwnedFd, OwnedFd)> {
    let (stdout, stdout_writer) = io::pipe()?;
    let (stderr, stderr_writer) = io::pipe()?;
    let (ready, ready_writer) = io::pipe()?;
    let mapping = |fd: OwnedFd, child_fd| FdMapping {
        parent_fd: fd,
        child_fd,
    };
    let mut command = Command::new(path);
    command
        .args(arguments)
        .env("CONTAINER_ID", logged.id)
        .env("CONTAINER_NAMESPACE", logged.namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .fd_mappings(vec![
            mapping(stdout.into(), 3),
            mapping(stderr.into(), 4),
            mapping(ready_writer.into(), 5),
        ])
        .map_err(io::Error::other)?;
    let mut logger = command.spawn()?;
    // With the command go our copies of what it was given.
    drop(command);
    let mut polled = [PollFd::new(ready.as_fd(), PollFlags::POLLIN)];
    if poll(&mut polled, PollTimeout::from(READY_LIMIT))? == 0 {
        let _ = logger.kill();
        return Err(io::Error::other(
            "it does not say that it is ready: it has to close its descriptor 5",
        ));
    }
    Ok((stdout_writer.into(), stderr_writer.into()))
}

/// Undoes the percent-encoding of a URI.
fn decode(text: &str) -> Result<String, Failure> {
    let wrong = || Failure::new(Kind::Invalid, format!("{text:?} is no part of a URI"));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || {
            let digit = rest.next().and_then(|digit| char::from(digit).to_digit(16));
            digit.and_then(|digit| u8::try_from(digit).ok())
        };
        let (high, low) = digit().zip(digit()).ok_or_else(wrong)?;
        bytes.push(high << 4 | low);
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_told_apart() {
        assert_eq!(
            Output::parse("/run/out", "/run/err").unwrap(),
            Output::Fifos {
                stdout: "/run/out".into(),
                stderr: "/run/err".into()
            }
        );
        assert_eq!(
            Output::parse("file:///var/log/a%20b", "").unwrap(),
            Output::File("/var/log/a b".into())
        );
        assert_eq!(
            Output::parse("binary:///bin/logger?b=2&a=1&-flag", "").unwrap(),
            Output::Program {
                path: "/bin/logger".into(),
                arguments: ["-flag", "a", "1", "b", "2"].map(String::from).to_vec()
            }
        );
        for wrong in ["npipe:///x", "file://x", "file:///%zz", "binary:///%ff"] {
            assert!(Output::parse(wrong, "").is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_fifos_ends_open_at_once_and_outlive_their_peers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let addresses = Addresses {
            stdout: path.to_str().unwrap().to_owned(),
            ..Addresses::default()
        };
        let logged = Logged {
            id: "c",
            namespace: "n",
        };
        let streams = Streams::open(&addresses, logged, (0, 0)).unwrap();
        let [_, stdout, _] = streams.files();
        // Nobody else has it open, and yet it is taken.
        assert_eq!(rustix::io::write(stdout, b"kept").unwrap(), 4);
        let mut reader = File::open(&path).unwrap();
        let kept = streams.into_kept(None).unwrap();
        let mut text = String::new();
        // The writer went: the reader sees the end, after what was there.
        io::Read::read_to_string(&mut reader, &mut text).unwrap();
        assert_eq!(text, "kept");
        drop(kept);

        std::fs::write(dir.path().join("file"), "").unwrap();
        let addresses = Addresses {
            stdin: dir.path().join("file").to_str().unwrap().to_owned(),
            ..Addresses::default()
        };
        assert!(Streams::open(&addresses, logged, (0, 0)).is_err());
    }

    #[test]
    fn a_logging_program_gets_the_streams() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let script = format!(
            "exec 5>&-; cat <&3 > {}; echo $CONTAINER_ID >> {0}",
            log.display()
        );
        let logger = dir.path().join("logger");
        std::fs::write(&logger, format!("#!/bin/sh\n{script}\n")).unwrap();
        Command::new("chmod")
            .arg("+x")
            .arg(&logger)
            .status()
            .unwrap();
        let addresses = Addresses {
            stdout: format!("binary://{}", logger.display()),
            ..Addresses::default()
        };
        let logged = Logged {
            id: "c1",
            namespace: "n",
        };
        let streams = Streams::open(&addresses, logged, (0, 0)).unwrap();
        let [_, stdout, _] = streams.files();
        rustix::io::write(stdout, b"line\n").unwrap();
        drop(streams);
        nix::sys::wait::wait().unwrap();
        assert_eq!(std::fs::read_to_string(log).unwrap(), "line\nc1\n");
    }
}
