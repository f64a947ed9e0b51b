//! Standing for a process in the guest: we get its signals, know its terminal, and end as it ends.
//!
//! The VMM process does this for the container's init, the process of `rt exec` for one more.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{self, SigHandler, SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use protocol::message::{Outcome, ProcessRequest, ResizeTerminalRequest, SignalRequest};
use protocol::method::{ResizeTerminal, Signal as SendSignal, Wait};
use protocol::wire::Decoder;
use protocol::{ClientError, decode_response, encode_request};

use super::agent::{Agent, AgentError};
use super::terminal::HostTerminal;

/// The signals that reach us as events from now on: all but those that the kernel raises for a fault of our own, and
/// those that the VMM uses among its threads.
///
/// Call it before the first thread is started, so that every thread has them blocked.
///
/// # Errors
/// The kernel's.
pub fn catch_signals() -> io::Result<SignalFd> {
    let mut caught = crate::signal::all();
    let own_faults = [
        Signal::SIGSEGV,
        Signal::SIGBUS,
        Signal::SIGILL,
        Signal::SIGFPE,
        Signal::SIGTRAP,
        Signal::SIGABRT,
        Signal::SIGSYS,
    ];
    for signal in own_faults {
        caught.remove(signal);
    }
    signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&caught), None)?;
    Ok(SignalFd::with_flags(
        &caught,
        SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
    )?)
}

/// How the supervision ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The process ended.
    Process(Outcome),
    /// The machine is gone, or its agent says nothing that makes sense any more.
    Machine,
    /// Neither: somebody asks something of the machine.
    Asked,
}

/// What becomes readable when something happens to the machine.
#[derive(Debug, Clone, Copy)]
pub struct MachineEvents<'a> {
    /// It has stopped.
    pub exit: BorrowedFd<'a>,
    /// Somebody asks something of it.
    pub control: BorrowedFd<'a>,
}

/// The process that is stood for.
#[derive(Debug)]
pub struct Supervised<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The process's id; empty for the container's init.
    pub exec_id: &'a str,
    /// Its terminal on our side.
    pub terminal: Option<&'a HostTerminal>,
}

impl Supervised<'_> {
    /// Passes signals and sizes on until the process or the machine ends, or somebody asks something of the machine.
    /// `waiting` is a new connection to the agent.
    ///
    /// # Errors
    /// The kernel's.
    pub fn until_its_end(
        &self,
        agent: &mut Agent,
        waiting: UnixStream,
        signals: &SignalFd,
        machine: Option<MachineEvents<'_>>,
    ) -> io::Result<End> {
        let request = ProcessRequest {
            id: self.id.to_owned(),
            exec_id: self.exec_id.to_owned(),
        };
        let request = encode_request::<Wait>(1, &request).map_err(io::Error::other)?;
        (&waiting).write_all(&request)?;
        waiting.set_nonblocking(true)?;
        let mut decoder = Decoder::new();
        loop {
            let mut fds = vec![
                PollFd::new(waiting.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            ];
            let of_machine = machine.map(|machine| [machine.exit, machine.control]);
            let of_machine = of_machine.into_iter().flatten();
            fds.extend(of_machine.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                result => result?,
            };
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            if ready[0]
                && let Some(end) = read_end(&waiting, &mut decoder)
            {
                return Ok(end);
            }
            if ready[1] {
                self.pass_on(agent, signals)?;
            }
            if ready.get(2) == Some(&true) {
                return Ok(End::Machine);
            }
            if ready.get(3) == Some(&true) {
                return Ok(End::Asked);
            }
        }
    }

    fn pass_on(&self, agent: &mut Agent, signals: &SignalFd) -> io::Result<()> {
        while let Some(info) = signals.read_signal()? {
            let number = info.ssi_signo;
            let result = match (i32::try_from(number), self.terminal) {
                // Our own threads and the relay's terminal are nobody's business in the guest.
                (Ok(libc::SIGCHLD | libc::SIGPIPE), _) => Ok(()),
                (Ok(libc::SIGWINCH), Some(terminal)) => self.resize(agent, terminal),
                // The terminal is gone: the relay sees it too and hangs up the one in the guest.
                (Ok(libc::SIGHUP), Some(_)) => Ok(()),
                _ => {
                    let (id, exec_id) = (self.id.to_owned(), self.exec_id.to_owned());
                    let request = SignalRequest {
                        id,
                        exec_id,
                        signal: number,
                        all: false,
                    };
                    agent.call::<SendSignal>(&request).map(drop)
                }
            };
            // A process that has just ended takes no signal; a broken agent shows at the other connection.
            if let Err(AgentError::Call(ClientError::Failed(_)) | AgentError::Connect { .. })
            | Ok(()) = result
            {
                continue;
            }
            break;
        }
        Ok(())
    }

    fn resize(&self, agent: &mut Agent, terminal: &HostTerminal) -> Result<(), AgentError> {
        let Some(size) = terminal.size() else {
            return Ok(());
        };
        agent
            .call::<ResizeTerminal>(&ResizeTerminalRequest {
                id: self.id.to_owned(),
                exec_id: self.exec_id.to_owned(),
                size: Some(size),
            })
            .map(drop)
    }
}

/// What the waiting connection says, if it says anything.
fn read_end(mut waiting: &UnixStream, decoder: &mut Decoder) -> Option<End> {
    let mut buffer = [0; 512];
    let mut input = match io::Read::read(&mut waiting, &mut buffer) {
        Ok(0) => return Some(End::Machine),
        Ok(length) => &buffer[..length],
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
        {
            return None;
        }
        Err(_) => return Some(End::Machine),
    };
    let frame = match decoder.decode(&mut input) {
        Ok(None) => return None,
        Ok(Some(frame)) => frame,
        Err(_) => return Some(End::Machine),
    };
    let response = decode_response::<Wait>(&frame).ok();
    Some(
        response
            .filter(|response| response.shell_status().is_some())
            .and_then(|response| response.outcome)
            .map_or(End::Machine, End::Process),
    )
}

/// Ends this process as the other one ended: by its signal, or with the exit code that is returned.
pub fn end_like(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Exited(code) => u8::try_from(code).unwrap_or(u8::MAX),
        Outcome::Signaled(number) => {
            die_by(number);
            u8::try_from(number).unwrap_or(0).saturating_add(128)
        }
    }
}

/// Kills this process by a signal, without a core file. Returns if the signal kills nobody.
fn die_by(number: u32) {
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let Some(signal) = i32::try_from(number)
        .ok()
        .and_then(|number| Signal::try_from(number).ok())
    else {
        return;
    };
    // SAFETY: no handler is installed, only the default action restored.
    let _ = unsafe { signal::signal(signal, SigHandler::SigDfl) };
    let mut set = SigSet::empty();
    set.add(signal);
    let _ = signal::sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&set), None);
    let _ = signal::raise(signal);
}
