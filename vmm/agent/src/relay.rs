//! Moves a process's stdio between its pipes (or terminal) and a stream to the host.
//!
//! Neither end is trusted to read or to close: each direction holds one buffer, reads no more while it is
//! full, and works until the kernel says "would block", as edge-triggered events need.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd::{read, write};

/// Bytes of one direction's buffer: a pipe's default capacity.
const BUFFER: usize = 64 << 10;

/// How many buffers one call moves before others get their turn.
const TURNS: usize = 8;

/// One stream and what it is attached to.
#[derive(Debug, Default)]
pub(crate) struct Relay {
    stream: Option<OwnedFd>,
    /// To the process.
    input: Option<Direction>,
    /// From the process.
    output: Option<Direction>,
    draining: bool,
    /// Nothing is moved: the machine is being written down, or its streams are lost.
    held: bool,
}

/// One direction: the process's end and the bytes under way.
#[derive(Debug)]
struct Direction {
    end: OwnedFd,
    transit: Transit,
}

/// Bytes that were read and are not yet written.
#[derive(Debug, Default)]
struct Transit {
    buffer: Vec<u8>,
    start: usize,
    source_ended: bool,
}

/// What stopped a direction.
enum Stop {
    /// It continues at the next event.
    Blocked,
    /// Its turns are used up; it continues without an event.
    Again,
    /// All bytes up to the source's end are delivered.
    Ended,
    /// The target takes no more.
    Broken,
}

impl Relay {
    /// A relay to a process's standard input, by the pipe's write end.
    pub(crate) fn input(end: OwnedFd) -> Self {
        Self {
            input: Some(Direction::new(end)),
            ..Self::default()
        }
    }

    /// A relay from a process's standard output or error, by the pipe's read end.
    pub(crate) fn output(end: OwnedFd) -> Self {
        Self {
            output: Some(Direction::new(end)),
            ..Self::default()
        }
    }

    /// A relay of both directions of a terminal, by its master.
    pub(crate) fn terminal(master: OwnedFd) -> io::Result<Self> {
        let input = Some(Direction::new(master.try_clone()?));
        Ok(Self {
            input,
            output: Some(Direction::new(master)),
            ..Self::default()
        })
    }

    /// A relay from an output that has ended: the host learns of it when it connects. `end` is any descriptor.
    pub(crate) fn ended(end: OwnedFd) -> Self {
        let transit = Transit {
            source_ended: true,
            ..Transit::default()
        };
        Self {
            output: Some(Direction { end, transit }),
            ..Self::default()
        }
    }

    /// The descriptor of the process's end, to be watched.
    pub(crate) fn process_end(&self) -> Option<BorrowedFd<'_>> {
        self.output
            .as_ref()
            .or(self.input.as_ref())
            .map(|direction| direction.end.as_fd())
    }

    /// Whether the host has connected.
    pub(crate) fn is_connected(&self) -> bool {
        self.stream.is_some()
    }

    /// Attaches the host's connection.
    pub(crate) fn connect(&mut self, stream: OwnedFd) {
        self.stream = Some(stream);
    }

    /// Moves nothing until [`Relay::release`] or [`Relay::disconnect`].
    pub(crate) fn hold(&mut self) {
        self.held = true;
    }

    /// Goes on by the host's connection as before.
    pub(crate) fn release(&mut self) {
        self.held = false;
    }

    /// Lets go of the host's connection, for another one. What has not been delivered is kept for that.
    pub(crate) fn disconnect(&mut self) {
        self.stream = None;
        self.held = false;
    }

    /// The process has ended: its input goes nowhere, and of its output only what is there now is still
    /// delivered, even if another process holds the other end open.
    pub(crate) fn drain(&mut self) {
        self.draining = true;
        if self.output.is_none() {
            self.close();
        }
    }

    /// Whether there is nothing left to deliver to a host that listens.
    pub(crate) fn is_settled(&self) -> bool {
        self.output.is_none() || self.stream.is_none()
    }

    /// Whether the relay has done all it ever will.
    pub(crate) fn is_finished(&self) -> bool {
        self.input.is_none() && self.output.is_none()
    }

    /// Moves what can be moved now. `true` asks for another call without an event.
    pub(crate) fn advance(&mut self) -> bool {
        let Some(stream) = self.stream.as_ref().filter(|_| !self.held) else {
            return false;
        };
        let mut again = false;
        let mut finished = false;
        if let Some(input) = &mut self.input {
            match input.transit.pump(stream.as_fd(), input.end.as_fd(), false) {
                Stop::Blocked => {}
                Stop::Again => again = true,
                Stop::Ended | Stop::Broken => {
                    self.input = None;
                    finished = self.output.is_none();
                }
            }
        }
        if let Some(output) = &mut self.output {
            match output
                .transit
                .pump(output.end.as_fd(), stream.as_fd(), self.draining)
            {
                Stop::Blocked => {}
                Stop::Again => again = true,
                Stop::Ended => {
                    // An error means that the host is gone already.
                    let _ = shutdown(stream.as_raw_fd(), Shutdown::Write);
                    finished = true;
                }
                Stop::Broken => finished = true,
            }
        }
        if finished {
            self.close();
        }
        again && !finished
    }

    fn close(&mut self) {
        self.input = None;
        self.output = None;
        self.stream = None;
    }
}

impl Direction {
    fn new(end: OwnedFd) -> Self {
        Self {
            end,
            transit: Transit::default(),
        }
    }
}

impl Transit {
    /// Moves bytes until either side blocks. With `draining`, a source that blocks has ended.
    fn pump(&mut self, source: BorrowedFd<'_>, target: BorrowedFd<'_>, draining: bool) -> Stop {
        let mut turns = TURNS;
        loop {
            while self.start < self.buffer.len() {
                match write(target, &self.buffer[self.start..]) {
                    Ok(length) => self.start += length,
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => return Stop::Blocked,
                    Err(_) => return Stop::Broken,
                }
            }
            if self.source_ended {
                return Stop::Ended;
            }
            if turns == 0 {
                return Stop::Again;
            }
            turns -= 1;
            self.start = 0;
            self.buffer.resize(BUFFER, 0);
            let result = read(source.as_raw_fd(), &mut self.buffer);
            self.buffer.truncate(result.unwrap_or(0));
            match result {
                Ok(1..) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if !draining => return Stop::Blocked,
                // A terminal whose other side is closed says EIO.
                Ok(0) | Err(_) => self.source_ended = true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use nix::fcntl::OFlag;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::unistd::pipe2;

    use super::*;

    fn stream_pair() -> (OwnedFd, UnixStream) {
        let (agent, host) = UnixStream::pair().unwrap();
        agent.set_nonblocking(true).unwrap();
        (agent.into(), host)
    }

    fn wait_for(relay: &Relay) {
        let flags = PollFlags::POLLIN | PollFlags::POLLOUT;
        let mut fds = Vec::new();
        fds.extend(relay.process_end().map(|fd| PollFd::new(fd, flags)));
        fds.extend(
            relay
                .stream
                .as_ref()
                .map(|fd| PollFd::new(fd.as_fd(), flags)),
        );
        poll(&mut fds, PollTimeout::NONE).unwrap();
    }

    fn run_to_end(relay: &mut Relay) {
        while !relay.is_finished() {
            if !relay.advance() && !relay.is_finished() {
                wait_for(relay);
            }
        }
    }

    #[test]
    fn output_is_delivered_whole_and_then_ends() {
        let (read_end, write_end) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        nix::fcntl::fcntl(
            write_end.as_raw_fd(),
            nix::fcntl::FcntlArg::F_SETFL(OFlag::empty()),
        )
        .unwrap();
        let (stream, mut host) = stream_pair();
        let sent: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
        let expected = sent.clone();
        let writer = thread::spawn(move || std::fs::File::from(write_end).write_all(&sent));
        let reader = thread::spawn(move || {
            let mut received = Vec::new();
            host.read_to_end(&mut received).unwrap();
            received
        });
        let mut relay = Relay::output(read_end);
        relay.connect(stream);
        run_to_end(&mut relay);
        writer.join().unwrap().unwrap();
        assert!(reader.join().unwrap() == expected);
    }

    #[test]
    fn the_host_s_half_close_ends_the_process_s_input() {
        let (read_end, write_end) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let (stream, mut host) = stream_pair();
        let mut relay = Relay::input(write_end);
        relay.connect(stream);
        host.write_all(b"input").unwrap();
        assert!(!relay.advance());
        host.shutdown(std::net::Shutdown::Write).unwrap();
        run_to_end(&mut relay);
        let mut input = String::new();
        std::fs::File::from(read_end)
            .read_to_string(&mut input)
            .unwrap();
        assert_eq!(input, "input");
    }

    #[test]
    fn draining_ends_although_another_process_holds_the_pipe() {
        let (read_end, write_end) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let (stream, mut host) = stream_pair();
        let mut relay = Relay::output(read_end);
        write(&write_end, b"last words").unwrap();
        relay.drain();
        assert!(
            relay.is_settled(),
            "without a host there is nobody to deliver to"
        );
        relay.connect(stream);
        assert!(!relay.is_settled());
        relay.advance();
        assert!(relay.is_finished());
        let mut received = String::new();
        host.read_to_string(&mut received).unwrap();
        assert_eq!(received, "last words");
        drop(write_end);
    }

    #[test]
    fn what_a_held_relay_has_goes_to_the_next_stream() {
        let (read_end, write_end) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let (stream, host) = stream_pair();
        let mut relay = Relay::output(read_end);
        relay.connect(stream);
        relay.hold();
        write(&write_end, b"kept").unwrap();
        drop(host);
        assert!(!relay.advance());
        assert!(!relay.is_finished());
        relay.disconnect();
        assert!(!relay.is_connected());
        let (stream, mut host) = stream_pair();
        relay.connect(stream);
        drop(write_end);
        run_to_end(&mut relay);
        let mut received = String::new();
        host.read_to_string(&mut received).unwrap();
        assert_eq!(received, "kept");
    }

    #[test]
    fn an_output_that_has_ended_tells_who_connects() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut relay = Relay::ended(null.into());
        assert!(relay.is_settled() && !relay.is_finished());
        let (stream, mut host) = stream_pair();
        relay.connect(stream);
        relay.advance();
        assert!(relay.is_finished());
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_host_that_went_away_closes_the_process_s_end() {
        let (read_end, write_end) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let (stream, host) = stream_pair();
        drop(host);
        let mut relay = Relay::output(read_end);
        relay.connect(stream);
        write(&write_end, b"x").unwrap();
        relay.advance();
        assert!(relay.is_finished());
        assert_eq!(write(&write_end, b"x"), Err(Errno::EPIPE));
    }
}
