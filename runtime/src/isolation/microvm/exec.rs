//! `exec` in a microVM: a host process that stands for the one in the guest.
//!
//! It is a plain fork of `rt`, which has one thread. It inherits the caller's standard streams, gets the signals that
//! clients send to its pid, and ends as the process in the guest ends; so `--detach`, `--pid-file` and conmon work as
//! with a process of the host.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

use engine::cgroup::Cgroup;
use engine::fault;
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, setsid};
use oci_spec::runtime::Process;
use protocol::RPC_PORT;
use protocol::message::{DeleteRequest, ExecRequest, Outcome};
use protocol::method::{Delete, Exec};

use super::agent::{Agent, AgentError, connect};
use super::relay::Relay;
use super::report::{self, Reporter};
use super::supervise::{End, Supervised, catch_signals, end_like};
use super::terminal::HostTerminal;

/// A process to start in a running container.
#[derive(Debug)]
pub struct Execution<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The container's `vm` directory.
    pub vm_dir: &'a Path,
    /// The container's cgroup, which the stand-in enters.
    pub cgroup_path: &'a Path,
    /// The process.
    pub process: &'a Process,
    /// Where its terminal's master goes.
    pub console_socket: Option<&'a Path>,
    /// Whether to go on in a paused container.
    pub ignore_paused: bool,
    /// Its cgroup in the guest, below the container's.
    pub sub_cgroup: &'a str,
}

/// Why a process was not started.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
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

fn io_error(action: &'static str) -> impl Fn(io::Error) -> ExecError {
    move |source| ExecError::Io { action, source }
}

/// A process that runs in the guest, and what is needed to stand for it.
struct StandIn {
    agent: Agent,
    exec_id: String,
    terminal: Option<HostTerminal>,
    relay: Relay,
    waiting: UnixStream,
    signals: SignalFd,
}

impl Execution<'_> {
    /// Starts the process and gives the pid of its stand-in, a child of ours.
    ///
    /// # Errors
    /// The process could not be started; no stand-in is left.
    pub fn start(&self) -> Result<i32, ExecError> {
        let (report, reporter) = report::channel().map_err(io_error("make a pipe"))?;
        // SAFETY: this process has one thread, so the child may do whatever its parent may.
        match unsafe { fork() }.map_err(|errno| io_error("fork")(errno.into()))? {
            ForkResult::Parent { child } => {
                drop(reporter);
                fault::point("exec.stand-in-made");
                if let Err(failure) = report.wait("the process that stands for it") {
                    let _ = waitpid(child, None);
                    return Err(failure.into());
                }
                Ok(child.as_raw())
            }
            ForkResult::Child => {
                drop(report);
                std::process::exit(self.stand_in(reporter).into())
            }
        }
    }

    /// The stand-in's life; its exit code, if it does not end by a signal.
    fn stand_in(&self, reporter: Reporter) -> u8 {
        vmm::seccomp::prepare_allocator();
        let begun = reporter
            .close_all_but(&[])
            .map_err(io_error("close inherited descriptors"))
            .and_then(|()| self.begin());
        let stand_in = match begun {
            Ok(stand_in) => stand_in,
            Err(error) => {
                reporter.failed(&error);
                return 1;
            }
        };
        // A parent that is gone leaves the process as it would leave one of the host.
        let _ = reporter.ready();
        fault::point("stand-in.reported");
        stand_in.until_its_end(self.id)
    }

    /// Starts the process in the guest.
    fn begin(&self) -> Result<StandIn, ExecError> {
        fault::point("stand-in.born");
        let signals = catch_signals().map_err(io_error("catch signals"))?;
        // So that whoever removes the container finds and ends us.
        Cgroup::new(self.cgroup_path)?.enter()?;
        fault::point("stand-in.in-cgroup");
        let mut agent = Agent::connect(self.vm_dir)?;
        let terminal = match self.console_socket {
            Some(socket) if self.process.terminal().unwrap_or(false) => {
                setsid().map_err(|errno| io_error("start a session")(errno.into()))?;
                Some(
                    HostTerminal::open(self.process, socket)
                        .map_err(io_error("make a terminal"))?,
                )
            }
            _ => None,
        };
        let relay = Relay::start(|port| connect(self.vm_dir, port), terminal.as_ref())
            .map_err(io_error("connect the standard streams"))?;
        fault::point("stand-in.streams-connected");
        let exec_id = format!("exec-{}", std::process::id());
        agent.call::<Exec>(&ExecRequest {
            id: self.id.to_owned(),
            exec_id: exec_id.clone(),
            process_json: serde_json::to_string(self.process)
                .map_err(|error| io_error("encode the process")(error.into()))?,
            stdio: Some(relay.stdio()),
            sub_cgroup: self.sub_cgroup.to_owned(),
            ignore_paused: self.ignore_paused,
        })?;
        fault::point("stand-in.process-runs");
        let waiting =
            connect(self.vm_dir, RPC_PORT).map_err(io_error("connect to the guest's agent"))?;
        Ok(StandIn {
            agent,
            exec_id,
            terminal,
            relay,
            waiting,
            signals,
        })
    }
}

impl StandIn {
    fn until_its_end(mut self, id: &str) -> u8 {
        let process = Supervised {
            id,
            exec_id: &self.exec_id,
            terminal: self.terminal.as_ref(),
        };
        let end = process
            .until_its_end(&mut self.agent, self.waiting, &self.signals, None)
            .unwrap_or(End::Machine);
        self.relay.finish();
        match end {
            End::Process(outcome) => {
                let request = DeleteRequest {
                    id: id.to_owned(),
                    exec_id: self.exec_id,
                    force: false,
                };
                // If the agent is gone, so is its record of the process.
                let _ = self.agent.call::<Delete>(&request);
                end_like(outcome)
            }
            // With the machine, every process in it was killed.
            End::Machine => end_like(Outcome::Signaled(libc::SIGKILL.unsigned_abs())),
        }
    }
}
