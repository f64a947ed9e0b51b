//! Standing in for a process: `run` and `exec` in the foreground.
//!
//! Signals are blocked before the first fork and read from a descriptor, so that none is lost and none ends us while
//! the workload lives. The end of the process is an event of its pidfd. With a terminal of the workload's, bytes are
//! relayed both ways, each direction with one buffer: nothing is read while the other side does not take it.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::Winsize;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal as NixSignal, sigaction};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, read, write};
use oci_spec::runtime::{Box as ConsoleSize, BoxBuilder};

use super::Error;
use crate::process::PidFd;
use crate::signal::{self, Signal};

nix::ioctl_read_bad!(get_window_size, libc::TIOCGWINSZ, Winsize);
nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, Winsize);

/// A terminal or a pipe that is ready for writing takes this much without blocking (`PIPE_BUF`).
const CHUNK: usize = 4096;

/// Ctrl-D, which a terminal takes for the end of input.
const END_OF_INPUT: u8 = 4;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With this code.
    Code(u8),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// As a shell tells it: the code, or 128 and the signal's number.
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(number) => u8::try_from(number.saturating_add(128)).unwrap_or(u8::MAX),
        }
    }
}

/// The size of our terminal, if standard input is one that has a size. A process that is to run on it is started with
/// this size: one that came later could be too late for a program that asks at once.
pub fn console_size() -> Option<ConsoleSize> {
    let size = window_size().filter(|size| size.ws_row > 0 && size.ws_col > 0)?;
    BoxBuilder::default()
        .height(size.ws_row)
        .width(size.ws_col)
        .build()
        .ok()
}

fn window_size() -> Option<Winsize> {
    let stdin = io::stdin();
    let mut size = Winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel fills in the structure, which lives until the call returns.
    let read = unsafe { get_window_size(stdin.as_raw_fd(), &mut size) };
    read.is_ok().then_some(size)
}

/// The signals of this process, held for a workload. Make it before anything is forked.
#[derive(Debug)]
pub struct Foreground {
    signals: SignalFd,
}

impl Foreground {
    /// Takes over the signals of this process for the rest of its life.
    ///
    /// # Errors
    /// The kernel gives no descriptor.
    pub fn new() -> Result<Self, Error> {
        let error = |errno: Errno| Error::Console {
            operation: "take over signals",
            source: errno.into(),
        };
        let mut forwarded = signal::all();
        for own in [
            // What a fault of our own raises, and what cannot be blocked.
            NixSignal::SIGSEGV,
            NixSignal::SIGBUS,
            NixSignal::SIGFPE,
            NixSignal::SIGILL,
            NixSignal::SIGTRAP,
            NixSignal::SIGABRT,
            NixSignal::SIGSYS,
            NixSignal::SIGKILL,
            NixSignal::SIGSTOP,
            // A reader of ours that went away is our own affair.
            NixSignal::SIGPIPE,
            // The pidfd tells us.
            NixSignal::SIGCHLD,
        ] {
            forwarded.remove(own);
        }
        forwarded.thread_block().map_err(error)?;
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: no handler is installed. A caller that ignored SIGCHLD would have the kernel reap our child for us.
        unsafe { sigaction(NixSignal::SIGCHLD, &default) }.map_err(error)?;
        let signals =
            SignalFd::with_flags(&forwarded, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
                .map_err(error)?;
        Ok(Self { signals })
    }

    /// Waits until the child `pid` has ended; hands on signals by `forward` and relays its terminal. Our own terminal
    /// is as before when this returns.
    ///
    /// # Errors
    /// The child cannot be waited for.
    pub fn wait(
        &self,
        pid: i32,
        terminal: Option<OwnedFd>,
        forward: impl Fn(Signal),
    ) -> Result<Exit, Error> {
        let error = |source| Error::Process {
            operation: "wait for",
            pid,
            source,
        };
        let process = PidFd::open(pid).map_err(error)?;
        let mut relay = match terminal {
            Some(master) => Some(Relay::new(master).map_err(error)?),
            None => None,
        };
        loop {
            let ready = {
                let mut fds = vec![
                    PollFd::new(process.as_fd(), PollFlags::POLLIN),
                    PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                ];
                let sides = relay.as_ref().map(Relay::interests).unwrap_or_default();
                fds.extend(sides.iter().map(|(fd, _, flags)| PollFd::new(*fd, *flags)));
                match poll(&mut fds, PollTimeout::NONE) {
                    Err(Errno::EINTR) => continue,
                    Err(errno) => return Err(error(errno.into())),
                    Ok(_) => {}
                }
                let is_ready =
                    |index: usize| fds.get(index).is_some_and(|fd| fd.any().unwrap_or(true));
                let sides = sides
                    .iter()
                    .enumerate()
                    .filter(|(index, _)| is_ready(index + 2));
                Ready {
                    exited: is_ready(0),
                    signals: is_ready(1),
                    sides: sides.map(|(_, side)| side.1).collect(),
                }
            };
            if ready.signals {
                self.forward(relay.as_ref(), &forward).map_err(error)?;
            }
            if let Some(relay) = &mut relay {
                ready
                    .sides
                    .into_iter()
                    .for_each(|side| relay.transfer(side));
            }
            if ready.exited {
                if let Some(relay) = &mut relay {
                    relay.drain();
                }
                break;
            }
        }
        loop {
            return match waitpid(Pid::from_raw(pid), None) {
                Ok(WaitStatus::Exited(_, code)) => Ok(Exit::Code((code & 0xff) as u8)),
                Ok(WaitStatus::Signaled(_, signal, _)) => Ok(Exit::Signal(signal as i32)),
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(errno) => Err(error(errno.into())),
            };
        }
    }

    fn forward(&self, relay: Option<&Relay>, forward: &impl Fn(Signal)) -> io::Result<()> {
        while let Some(info) = self.signals.read_signal()? {
            let number = info.ssi_signo.cast_signed();
            if let (libc::SIGWINCH, Some(relay)) = (number, relay) {
                relay.copy_window_size();
            } else if let Ok(signal) = Signal::try_from(number) {
                forward(signal);
            }
        }
        Ok(())
    }
}

/// One direction of a relay.
#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// The reading end has ended.
    closed: bool,
}

impl Buffer {
    /// Reads into the empty buffer.
    fn read_from(&mut self, fd: BorrowedFd<'_>) {
        let mut chunk = [0; CHUNK];
        match read(fd.as_raw_fd(), &mut chunk) {
            Ok(0) => self.closed = true,
            Ok(count) => self
                .bytes
                .extend_from_slice(chunk.get(..count).unwrap_or_default()),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // EIO: everybody has left the terminal.
            Err(_) => self.closed = true,
        }
    }

    /// Writes what it can. What nobody will read any more is dropped.
    fn write_to(&mut self, fd: BorrowedFd<'_>) {
        if self.bytes.is_empty() {
            return;
        }
        match write(fd, &self.bytes) {
            Ok(count) => drop(self.bytes.drain(..count)),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => self.bytes.clear(),
        }
    }
}

/// What `poll` reported.
struct Ready {
    exited: bool,
    signals: bool,
    sides: Vec<Side>,
}

/// Where bytes come from or go to.
#[derive(Debug, Clone, Copy)]
enum Side {
    Input,
    Output,
    Master,
}

/// Our terminal (or pipes) on one side, the workload's terminal on the other.
#[derive(Debug)]
struct Relay {
    stdin: io::Stdin,
    stdout: io::Stdout,
    master: OwnedFd,
    input: Buffer,
    output: Buffer,
    saved: Option<Termios>,
}

impl Relay {
    fn new(master: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(master.as_raw_fd(), FcntlArg::F_GETFL)?);
        fcntl(
            master.as_raw_fd(),
            FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK),
        )?;
        let (stdin, stdout) = (io::stdin(), io::stdout());
        let mut relay = Self {
            stdin,
            stdout,
            master,
            input: Buffer::default(),
            output: Buffer::default(),
            saved: None,
        };
        if io::stdin().is_terminal() {
            let saved = tcgetattr(io::stdin())?;
            let mut raw = saved.clone();
            cfmakeraw(&mut raw);
            relay.saved = Some(saved);
            tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        }
        relay.copy_window_size();
        Ok(relay)
    }

    /// Gives the workload's terminal the size of ours, if we have one.
    fn copy_window_size(&self) {
        if let Some(size) = window_size() {
            // SAFETY: the kernel reads the structure, which lives until the call returns.
            let _ = unsafe { set_window_size(self.master.as_raw_fd(), &size) };
        }
    }

    /// What to wait for. A side that is not wanted now is left out: one that was hung up would report it for ever.
    fn interests(&self) -> Vec<(BorrowedFd<'_>, Side, PollFlags)> {
        let mut sides = Vec::with_capacity(3);
        if !self.input.closed && self.input.bytes.is_empty() {
            sides.push((self.stdin.as_fd(), Side::Input, PollFlags::POLLIN));
        }
        if !self.output.bytes.is_empty() {
            sides.push((self.stdout.as_fd(), Side::Output, PollFlags::POLLOUT));
        }
        let mut master = PollFlags::empty();
        master.set(PollFlags::POLLOUT, !self.input.bytes.is_empty());
        master.set(
            PollFlags::POLLIN,
            !self.output.closed && self.output.bytes.is_empty(),
        );
        if !master.is_empty() {
            sides.push((self.master.as_fd(), Side::Master, master));
        }
        sides
    }

    fn transfer(&mut self, side: Side) {
        match side {
            Side::Input => {
                self.input.read_from(self.stdin.as_fd());
                if self.input.closed {
                    self.input.bytes.push(END_OF_INPUT);
                }
            }
            Side::Output => self.output.write_to(self.stdout.as_fd()),
            Side::Master => {
                self.input.write_to(self.master.as_fd());
                if !self.output.closed && self.output.bytes.is_empty() {
                    self.output.read_from(self.master.as_fd());
                }
            }
        }
    }

    /// The workload has ended: what is still in its terminal goes out.
    fn drain(&mut self) {
        loop {
            while !self.output.bytes.is_empty() {
                let _ = poll(
                    &mut [PollFd::new(self.stdout.as_fd(), PollFlags::POLLOUT)],
                    PollTimeout::NONE,
                );
                self.output.write_to(self.stdout.as_fd());
            }
            if !self.output.closed {
                self.output.read_from(self.master.as_fd());
            }
            if self.output.bytes.is_empty() {
                return;
            }
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(saved) = &self.saved {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, saved);
        }
    }
}
