//! `exec`: one more process in a container.

use std::os::fd::OwnedFd;
use std::path::Path;

use engine::console::Listener;
use engine::fault;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use oci_spec::runtime::{Process, Spec};

use super::create::{check_console, listen_at};
use super::{Console, Error, Lifecycle, send_pidfd, write_pid_file};
use crate::bundle;
use crate::id::ContainerId;
use crate::isolation::ExecRequest;
use crate::process::PidFd;
use crate::signal::Signal;
use crate::state::{SAVED_CONFIG, Status};

/// What a process in a container is made from.
#[derive(Debug)]
pub struct ExecOptions<'a> {
    /// The container.
    pub id: &'a ContainerId,
    /// The process.
    pub process: &'a Process,
    /// Where its terminal goes.
    pub console: Console<'a>,
    /// Where to write its pid.
    pub pid_file: Option<&'a Path>,
    /// The Unix socket to send a descriptor of it to.
    pub pidfd_socket: Option<&'a Path>,
    /// How many of our descriptors from 3 on it gets.
    pub preserve_fds: u32,
    /// A cgroup below the container's to put it into.
    pub cgroup: Option<&'a Path>,
    /// Go on although the container is paused.
    pub ignore_paused: bool,
}

/// A process that runs.
#[derive(Debug)]
pub struct Executed {
    /// Its pid as the host sees it; a child of the caller.
    pub pid: i32,
    /// The terminal's master, for [`Console::Ours`].
    pub terminal: Option<OwnedFd>,
}

impl Lifecycle {
    /// The configuration that a container was made with.
    ///
    /// # Errors
    /// There is no such container, or its directory was damaged.
    pub fn spec(&self, id: &ContainerId) -> Result<Spec, Error> {
        self.load(id)?;
        Ok(bundle::load_config(&self.store.dir(id).join(SAVED_CONFIG))?.0)
    }

    /// Starts a process in a container that lives.
    ///
    /// # Errors
    /// The container does not live or is paused, or the process could not be started.
    pub fn exec(&self, options: &ExecOptions<'_>) -> Result<Executed, Error> {
        let record = self.load(options.id)?;
        let problem = match record.status() {
            Status::Created | Status::Running => None,
            Status::Paused if options.ignore_paused => None,
            Status::Paused => {
                Some("cannot exec in a paused container (use --ignore-paused to override)")
            }
            Status::Creating | Status::Stopped => {
                Some("cannot exec in a stopped container: container not running")
            }
        };
        if let Some(problem) = problem {
            return Err(Error::Status {
                problem,
                id: options.id.clone(),
            });
        }
        let wants_terminal = options.process.terminal().unwrap_or(false);
        check_console(wants_terminal, options.console)?;
        let dir = self.store.dir(options.id);
        let listener = if wants_terminal && matches!(options.console, Console::Ours) {
            Some(listen_at(
                &dir,
                &format!("exec-{}.sock", std::process::id()),
            )?)
        } else {
            None
        };
        let request = ExecRequest {
            process: options.process,
            console_socket: match options.console {
                Console::Socket(path) => Some(path),
                Console::Ours => listener.as_ref().map(Listener::path),
                Console::None => None,
            },
            preserve_fds: options.preserve_fds,
            cgroup: options.cgroup,
            ignore_paused: options.ignore_paused,
        };
        let pid = record
            .isolation
            .isolation()
            .exec(&self.target(&record, &dir), &request)?;
        fault::point("exec.model-done");
        tracing::debug!("{}: started process {pid}", options.id);
        finish(pid, options, listener.as_ref()).inspect_err(|_| {
            // Nobody will know of it: it must not go on.
            let _ = PidFd::open(pid).and_then(|process| process.signal(Signal::KILL));
            let _ = waitpid(Pid::from_raw(pid), None);
        })
    }
}

fn finish(
    pid: i32,
    options: &ExecOptions<'_>,
    listener: Option<&Listener>,
) -> Result<Executed, Error> {
    if let Some(path) = options.pid_file {
        write_pid_file(path, pid)?;
    }
    if let Some(socket) = options.pidfd_socket {
        send_pidfd(socket, pid, "setns")?;
    }
    let terminal = listener.map(Listener::receive).transpose();
    let terminal = terminal.map_err(|source| Error::Console {
        operation: "receive the terminal",
        source,
    })?;
    Ok(Executed { pid, terminal })
}
