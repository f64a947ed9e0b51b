//! The standard streams of a process in the guest, carried between our own descriptors and the guest's agent.
//!
//! One thread a direction, which blocks: a reader or writer that stalls on the host holds up only its own stream, and
//! through the stream's flow control the process behind it. Bytes are not looked at, and a thread can do nothing but
//! pass them on. The descriptors stay in blocking mode, since they are shared with whoever gave them to us.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::socket::{Shutdown, shutdown};
use protocol::{STDIO_PORT, StdioHeader, message};
use rustix::rand::{GetRandomFlags, getrandom};
use vmm::seccomp::{self, SeccompError, Thread};

use super::confinement;
use super::terminal::HostTerminal;

/// Bytes moved at a time; also what a Linux pipe holds.
const CHUNK: usize = 64 << 10;

/// The threads' stacks: the copy loop's buffer is on the heap.
const STACK: usize = 64 << 10;

/// The streams of one process, being relayed.
#[derive(Debug)]
pub struct Relay {
    /// The threads that end when the process's output has been written.
    outputs: Vec<Copying>,
    /// What the agent has to be told.
    stdio: message::Stdio,
}

impl Relay {
    /// Connects the process-to-be's streams with `connect` (a connection to a port of the guest) and starts to relay
    /// our standard streams, or the terminal's.
    ///
    /// # Errors
    /// A connection or a thread could not be made.
    pub fn start(
        mut connect: impl FnMut(u32) -> io::Result<UnixStream>,
        terminal: Option<&HostTerminal>,
    ) -> io::Result<Self> {
        let mut open = || -> io::Result<(u64, UnixStream)> {
            let token = token()?;
            let mut stream = connect(STDIO_PORT)?;
            stream.write_all(&StdioHeader { token }.encode())?;
            Ok((token, stream))
        };
        if let Some(terminal) = terminal {
            let (token, stream) = open()?;
            let device = terminal.device().try_clone_to_owned()?;
            copy(
                "relay-in",
                device.try_clone()?,
                stream.try_clone()?,
                hang_up,
            )?;
            let output = copy("relay-out", stream, device, leave_open)?;
            let console = message::Console {
                token,
                size: terminal.size(),
            };
            let stdio = message::Stdio {
                console: Some(console),
                ..message::Stdio::default()
            };
            return Ok(Self {
                outputs: vec![output],
                stdio,
            });
        }
        let (stdin, to_guest) = open()?;
        let (stdout, from_stdout) = open()?;
        let (stderr, from_stderr) = open()?;
        copy(
            "relay-in",
            io::stdin().as_fd().try_clone_to_owned()?,
            to_guest,
            hang_up,
        )?;
        let outputs = vec![
            copy(
                "relay-out",
                from_stdout,
                io::stdout().as_fd().try_clone_to_owned()?,
                leave_open,
            )?,
            copy(
                "relay-err",
                from_stderr,
                io::stderr().as_fd().try_clone_to_owned()?,
                leave_open,
            )?,
        ];
        Ok(Self {
            outputs,
            stdio: message::Stdio {
                console: None,
                stdin,
                stdout,
                stderr,
            },
        })
    }

    /// The streams' names, for the request that creates the process.
    pub fn stdio(&self) -> message::Stdio {
        self.stdio.clone()
    }

    /// Waits until everything that the process wrote has been passed on.
    pub fn finish(self) {
        for output in self.outputs {
            output.finish();
        }
    }

    /// As [`Relay::finish`], but a reader who reads nothing is waited for no longer than this.
    pub fn finish_within(self, limit: Duration) {
        let end = Instant::now() + limit;
        for output in self.outputs {
            // Nothing is sent any more: it comes back when the thread has ended.
            let _ = output
                .ended
                .recv_timeout(end.saturating_duration_since(Instant::now()));
        }
    }
}

/// A thread that copies.
#[derive(Debug)]
struct Copying {
    thread: JoinHandle<()>,
    /// The other end is the thread's as long as it lives.
    ended: Receiver<Result<(), SeccompError>>,
}

impl Copying {
    /// Waits for its end.
    fn finish(self) {
        // A thread that panicked has nothing more to pass on.
        let _ = self.thread.join();
    }
}

/// A number that names a stream and cannot be guessed. Never 0, which names none.
fn token() -> io::Result<u64> {
    let mut bytes = [0; 8];
    loop {
        // It gives no fewer bytes than so few.
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        match u64::from_ne_bytes(bytes) {
            0 => {}
            token => return Ok(token),
        }
    }
}

/// The process's input has ended.
fn hang_up(stream: &File) {
    // Fails only if the other end is gone already.
    let _ = shutdown(stream.as_raw_fd(), Shutdown::Write);
}

/// Our own descriptors are closed when we end.
fn leave_open(_: &File) {}

/// Starts a thread that copies; it is confined when this returns.
fn copy(
    name: &str,
    from: impl Into<OwnedFd>,
    to: impl Into<OwnedFd>,
    at_end: fn(&File),
) -> io::Result<Copying> {
    let (mut from, mut to) = (File::from(from.into()), File::from(to.into()));
    let (report, ended) = mpsc::sync_channel(1);
    let thread = thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK)
        .spawn(move || {
            let result = seccomp::confine(Thread::Relay, confinement());
            let ready = result.is_ok();
            if report.send(result).is_ok() && ready {
                copy_until_end(&mut from, &mut to);
                at_end(&to);
            }
        })?;
    ended
        .recv()
        .map_err(io::Error::other)?
        .map_err(io::Error::other)?;
    Ok(Copying { thread, ended })
}

/// Copies until the reader's end. When nobody reads any more, goes on reading and drops the bytes, so that the writer
/// is not held up; it learns of it no other way than a process whose pipe was closed would at its own end.
fn copy_until_end(from: &mut impl Read, to: &mut impl Write) {
    let mut buffer = vec![0; CHUNK];
    let mut writable = true;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => writable = writable && to.write_all(&buffer[..length]).is_ok(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A terminal whose other side is closed reads as EIO, a descriptor that was never open as EBADF.
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_and_the_end_are_passed_on() {
        let (mut host, relay_in) = UnixStream::pair().unwrap();
        let (relay_out, mut guest) = UnixStream::pair().unwrap();
        let thread = copy("test", relay_in, relay_out, hang_up).unwrap();
        let sent: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
        let reader = thread::spawn(move || {
            let mut received = Vec::new();
            guest.read_to_end(&mut received).unwrap();
            received
        });
        host.write_all(&sent).unwrap();
        drop(host);
        assert!(reader.join().unwrap() == sent);
        thread.finish();
    }

    #[test]
    fn a_reader_that_went_away_does_not_hold_up_the_writer() {
        let (mut process, relay_in) = UnixStream::pair().unwrap();
        let (relay_out, host) = UnixStream::pair().unwrap();
        drop(host);
        let thread = copy("test", relay_in, relay_out, leave_open).unwrap();
        process.write_all(&vec![0; 4 << 20]).unwrap();
        drop(process);
        thread.finish();
    }

    #[test]
    fn tokens_differ() {
        assert_ne!(token().unwrap(), token().unwrap());
    }
}
