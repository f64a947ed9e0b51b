//! A process of the host that stands for one in a guest whose machine is another's: that of `exec`, and the init of a
//! container in a pod's machine.
//!
//! It is a plain fork of the caller, which has one thread. It inherits the caller's standard streams, gets the signals
//! that clients send to its pid, and ends as the process in the guest ends; so `--detach`, `--pid-file` and conmon work
//! as with a process of the host.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use engine::cgroup::Cgroup;
use nix::sys::signalfd::SignalFd;
use nix::unistd::{ForkResult, Pid, fork, setsid};
use oci_spec::runtime::Process;
use protocol::RPC_PORT;
use protocol::message::{DeleteRequest, Outcome};
use protocol::method::Delete;

use super::agent::{Agent, AgentError, connect};
use super::relay::Relay;
use super::report::{self, Report, Reporter};
use super::supervise::{End, Supervised, catch_signals, end_like};
use super::terminal::HostTerminal;

/// Why there is no process to stand for.
#[derive(Debug, thiserror::Error)]
pub enum StandInError {
    /// A call of the kernel.
    #[error("cannot {action}")]
    Io {
        /// What was to be done.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The container's cgroup.
    #[error(transparent)]
    Cgroup(#[from] engine::cgroup::Error),
    /// The guest said no.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The stand-in process said why.
    #[error(transparent)]
    StandIn(#[from] protocol::Failure),
}

/// The error of a call of the kernel that was to `action`.
pub fn io_error(action: &'static str) -> impl Fn(io::Error) -> StandInError {
    move |source| StandInError::Io { action, source }
}

/// Forks the stand-in, whose life `live` is; gives its pid and its report. It keeps only the standard streams and what
/// `keep` has.
///
/// # Errors
/// The kernel's.
pub fn spawn(
    keep: &[&dyn AsRawFd],
    live: impl FnOnce(Reporter) -> u8,
) -> Result<(Pid, Report), StandInError> {
    let (report, reporter) =
        report::channel("the process that stands for it").map_err(io_error("make a pipe"))?;
    // SAFETY: this process has one thread, so the child may do whatever its parent may.
    match unsafe { fork() }.map_err(|errno| io_error("fork")(errno.into()))? {
        ForkResult::Parent { child } => Ok((child, report)),
        ForkResult::Child => {
            drop(report);
            // For who lists processes: the command line stays that of the caller.
            let _ = nix::sys::prctl::set_name(c"rt-stand-in");
            let keep: Vec<_> = keep.iter().map(|fd| fd.as_raw_fd()).collect();
            let code = match reporter.close_all_but(&keep) {
                Ok(()) => live(reporter),
                Err(error) => {
                    reporter.failed(&io_error("close inherited descriptors")(error));
                    1
                }
            };
            std::process::exit(code.into())
        }
    }
}

/// A process that has taken its place on the host, and has the ends of what it will relay.
pub struct Connected {
    /// The machine's agent.
    pub agent: Agent,
    /// The host's side of the process's terminal.
    pub terminal: Option<HostTerminal>,
    /// Its standard streams.
    pub relay: Relay,
    signals: SignalFd,
}

/// Enters the cgroup, so that whoever removes the container finds and ends us, and begins a session if there is to be
/// a terminal or the process is a container's `first`. Signals wait from now on.
///
/// # Errors
/// The kernel's.
pub fn take_place(cgroup: &Path, begins_session: bool) -> Result<SignalFd, StandInError> {
    let signals = catch_signals().map_err(io_error("catch signals"))?;
    Cgroup::new(cgroup)?.enter()?;
    if begins_session {
        setsid().map_err(|errno| io_error("start a session")(errno.into()))?;
    }
    Ok(signals)
}

/// Connects the streams of a process that is to be, in the machine whose `vm` directory is given. A terminal's master
/// goes to `console_socket`.
///
/// # Errors
/// The machine is gone, or the kernel refuses something.
pub fn connect_streams(
    signals: SignalFd,
    machine: &Path,
    process: &Process,
    console_socket: Option<&Path>,
) -> Result<Connected, StandInError> {
    let agent = Agent::connect(machine)?;
    let terminal = console_socket
        .filter(|_| process.terminal().unwrap_or(false))
        .map(|socket| HostTerminal::open(process, socket).map_err(io_error("make a terminal")))
        .transpose()?;
    let relay = Relay::start(|port| connect(machine, port), terminal.as_ref())
        .map_err(io_error("connect the standard streams"))?;
    Ok(Connected {
        agent,
        terminal,
        relay,
        signals,
    })
}

/// A process that runs in the guest, and what is needed to stand for it.
pub struct StandIn {
    connected: Connected,
    waiting: UnixStream,
}

impl StandIn {
    /// Stands for a process that is in the guest now.
    ///
    /// # Errors
    /// The machine is gone.
    pub fn new(connected: Connected, machine: &Path) -> Result<Self, StandInError> {
        let waiting =
            connect(machine, RPC_PORT).map_err(io_error("connect to the guest's agent"))?;
        Ok(Self { connected, waiting })
    }

    /// Stands for it until it ends; the result is the exit code, if it does not end by a signal. `exec_id` is empty for
    /// a container's init, whose record is left to `delete`.
    pub fn until_its_end(mut self, id: &str, exec_id: &str) -> u8 {
        let process = Supervised {
            id,
            exec_id,
            terminal: self.connected.terminal.as_ref(),
        };
        let agent = &mut self.connected.agent;
        let end = process
            .until_its_end(agent, self.waiting, &self.connected.signals, None)
            .unwrap_or(End::Machine);
        self.connected.relay.finish();
        match end {
            End::Process(outcome) => {
                if !exec_id.is_empty() {
                    let request = DeleteRequest {
                        id: id.to_owned(),
                        exec_id: exec_id.to_owned(),
                        force: false,
                    };
                    // If the agent is gone, so is its record of the process.
                    let _ = agent.call::<Delete>(&request);
                }
                end_like(outcome)
            }
            // With the machine, every process in it was killed. Nobody asks us anything.
            End::Machine | End::Asked => end_like(Outcome::Signaled(libc::SIGKILL.unsigned_abs())),
        }
    }
}
