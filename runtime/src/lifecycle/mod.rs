//! The life of a container: creating, created, running, paused, stopped, gone.
//!
//! The one place that decides what may happen when, in which order hooks run, and what is written down before and
//! after. The two isolation models do the work; the command line and the shim ask for it.

mod checkpoint;
mod create;
mod error;
mod events;
mod exec;
mod foreground;
mod update;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use engine::hooks::{self, Kind, Surroundings};
use engine::observation::Observation;
use engine::{ProcessInfo, fault};
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::unistd::linkat;
use oci_spec::runtime::Hook;
use serde::Serialize;

pub use create::{CreateOptions, Created};
pub use error::Error;
pub use events::{Event, Events};
pub use exec::{ExecOptions, Executed};
pub use foreground::{Exit, Foreground, console_size};

use crate::bundle;
use crate::config::Config;
use crate::id::ContainerId;
use crate::isolation::{Isolation, IsolationError, Model, Target};
use crate::process::{PidFd, ProcessId};
use crate::signal::Signal;
use crate::state::{LockedContainer, Phase, Record, SAVED_CONFIG, StateError, Status, Store};

/// Where the master of a process's terminal goes, if the process has one.
#[derive(Debug, Clone, Copy)]
pub enum Console<'a> {
    /// Nowhere: the process must not have a terminal.
    None,
    /// To the Unix socket at this path.
    Socket(&'a Path),
    /// To the caller, who relays it.
    Ours,
}

/// The containers of one state root.
#[derive(Debug)]
pub struct Lifecycle {
    store: Store,
    config: Config,
}

/// A container's state as the `state` command prints it: the OCI's, with runc's additions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// The version of the specification that the bundle follows.
    pub oci_version: String,
    /// The container's id.
    pub id: ContainerId,
    /// The init process as the host sees it; 0 when it has ended.
    pub pid: i32,
    /// What is true now.
    pub status: Status,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// The root directory.
    pub rootfs: PathBuf,
    /// When it was created.
    pub created: String,
    /// The bundle's annotations.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// The user who created it, by name if it has one.
    pub owner: String,
    /// The isolation model.
    #[serde(skip)]
    pub isolation: Model,
}

impl State {
    fn of(record: Record) -> Self {
        let pid = record.live_pid().unwrap_or(0);
        Self {
            pid,
            status: record.status(),
            oci_version: record.oci_version,
            id: record.id,
            bundle: record.bundle,
            rootfs: record.rootfs,
            created: record.created,
            annotations: record.annotations,
            owner: user_name(record.owner),
            isolation: record.isolation,
        }
    }
}

/// A user's name from the host's `/etc/passwd`, else the number. Not by the C library, which is linked statically and
/// would have to load modules.
fn user_name(uid: u32) -> String {
    let number = uid.to_string();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == number).then(|| name.to_owned())
    });
    name.unwrap_or(number)
}

/// What hooks get on standard input (OCI runtime specification, "State").
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct HookState<'a> {
    oci_version: &'a str,
    id: &'a ContainerId,
    status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<i32>,
    bundle: &'a Path,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
}

fn run_hooks(
    kind: Kind,
    hooks: Option<&Vec<Hook>>,
    record: &Record,
    status: Status,
) -> Result<(), Error> {
    let Some(hooks) = hooks.filter(|hooks| !hooks.is_empty()) else {
        return Ok(());
    };
    tracing::debug!("{}: running {} {kind} hooks", record.id, hooks.len());
    let state = HookState {
        oci_version: &record.oci_version,
        id: &record.id,
        status: status.name(),
        pid: record
            .process
            .filter(|_| status != Status::Stopped)
            .map(|process| process.pid),
        bundle: &record.bundle,
        annotations: &record.annotations,
    };
    let state = serde_json::to_vec(&state).map_err(|source| Error::Encode {
        what: "the state for hooks",
        source,
    })?;
    let surroundings = Surroundings {
        state: &state,
        directory: &record.bundle,
        env: &[],
    };
    Ok(hooks::run(kind, hooks, &surroundings)?)
}

/// A running container, as it was asked for and as it is.
#[derive(Debug)]
pub struct Observed {
    /// The model.
    pub isolation: Model,
    /// The init process as the host sees it: for a microVM the VMM process.
    pub pid: i32,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// The configuration that the container was made from, with what `update` changed.
    pub spec: oci_spec::runtime::Spec,
    /// What the kernel says that runs it.
    pub observation: Observation,
}

impl Lifecycle {
    /// The containers whose state is in `store`.
    pub fn new(store: Store, config: Config) -> Self {
        Self { store, config }
    }

    /// The administrator's configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Reads a container's record.
    fn load(&self, id: &ContainerId) -> Result<Record, Error> {
        Ok(self.settle(self.store.load(id)?))
    }

    /// While the status is being changed, and after a change that was cut off, the model knows it.
    fn settle(&self, mut record: Record) -> Record {
        if record.phase == Phase::Changing {
            let dir = self.store.dir(&record.id);
            let isolation = record.isolation.isolation();
            record.phase = match isolation.status(&self.target(&record, &dir)) {
                Ok(Status::Created) => Phase::Created,
                Ok(Status::Paused) => Phase::Paused,
                // Who cannot be asked waits for nobody.
                Ok(_) | Err(_) => Phase::Running,
            };
        }
        record
    }

    /// What is true of a container whose lock we hold. Not to be written down if the model was asked: a workload that has
    /// been told to start, by a command that was cut off, begins when it will.
    fn status(&self, container: &LockedContainer) -> Status {
        self.settle(container.record().clone()).status()
    }

    /// Has the model change the status; `phase` comes of it. As long as that is open, the record says so.
    fn change(
        &self,
        container: &mut LockedContainer,
        phase: Phase,
        change: impl FnOnce(&dyn Isolation, &Target<'_>) -> Result<(), IsolationError>,
    ) -> Result<(), Error> {
        container.update(|record| record.phase = Phase::Changing)?;
        fault::point("change.announced");
        let record = container.record();
        let target = self.target(record, container.dir());
        change(record.isolation.isolation(), &target)?;
        fault::point("change.model-done");
        Ok(container.update(|record| record.phase = phase)?)
    }

    fn target<'a>(&'a self, record: &'a Record, dir: &'a Path) -> Target<'a> {
        let process = record.process.filter(|process| process.is_alive());
        Target {
            id: &record.id,
            dir,
            bundle: &record.bundle,
            cgroup_path: &record.cgroup_path,
            pid: process.map(|process| process.pid),
            process,
            config: &self.config,
        }
    }

    /// Lets the workload of a created container run.
    ///
    /// # Errors
    /// It is not in the state `created`, or could not be started, or a poststart hook failed: then it has been killed.
    pub fn start(&self, id: &ContainerId) -> Result<(), Error> {
        let mut container = self.store.lock(id)?;
        let status = self.status(&container);
        if !status.may_be_started() {
            let problem = match status {
                _ if container.record().phase == Phase::Creating => {
                    "cannot start a container whose creation was cut off: delete it"
                }
                Status::Running | Status::Paused => "cannot start an already running container",
                _ => "cannot start a container that has stopped",
            };
            return Err(Error::Status {
                problem,
                id: id.clone(),
            });
        }
        self.change(&mut container, Phase::Running, |isolation, target| {
            isolation.start(target)
        })?;
        tracing::debug!("{id}: started");
        let hooks = saved_hooks(&container)?;
        let poststart = hooks.as_ref().and_then(|hooks| hooks.poststart().as_ref());
        if let Err(error) = run_hooks(
            Kind::Poststart,
            poststart,
            container.record(),
            Status::Running,
        ) {
            let target = self.target(container.record(), container.dir());
            let isolation = container.record().isolation.isolation();
            let _ = isolation.kill(&target, Signal::KILL, true);
            return Err(error);
        }
        Ok(())
    }

    /// Sends a signal to the workload's first process, or to every process of the container.
    ///
    /// # Errors
    /// Nobody is there to get it.
    pub fn kill(&self, id: &ContainerId, signal: Signal, all: bool) -> Result<(), Error> {
        // Without the lock, so that a hook or another `start` that hangs can be ended.
        let record = self.load(id)?;
        let dir = self.store.dir(id);
        let (isolation, target) = (record.isolation.isolation(), self.target(&record, &dir));
        let lives = record.status().may_be_killed();
        // Where the first process began no pid namespace, others may have outlived it.
        let all = all || !lives && signal == Signal::KILL && has_processes(isolation, &target);
        if !lives && !all {
            return Err(Error::Status {
                problem: "container not running",
                id: id.clone(),
            });
        }
        let whom = if all {
            "every process"
        } else {
            "the first process"
        };
        tracing::debug!("{id}: sending {signal} to {whom}");
        Ok(isolation.kill(&target, signal, all)?)
    }

    /// Removes a container that has ended or was never started; with `force` any container, also one whose record is
    /// junk or missing.
    ///
    /// # Errors
    /// It lives and `force` is not given, or something could not be removed; then it may be tried again.
    pub fn delete(&self, id: &ContainerId, force: bool) -> Result<(), Error> {
        let mut container = match self.store.lock(id) {
            Err(StateError::NotFound { .. }) if force => {
                // Perhaps of a `create` or a `delete` that was cut off.
                self.store.sweep();
                return Ok(());
            }
            Err(error) if force && error.is_junk() => {
                tracing::warn!("{error}: removing the directory only");
                return Ok(self.store.discard(id)?);
            }
            container => container?,
        };
        let status = self.status(&container);
        if !force && !status.may_be_deleted() {
            return Err(Error::NotStopped {
                id: id.clone(),
                status: status.name(),
            });
        }
        let hooks = if container.record().phase == Phase::Creating {
            None
        } else {
            saved_hooks(&container).unwrap_or_default()
        };
        self.remove(&mut container)?;
        fault::point("delete.model-done");
        let record = container.record().clone();
        container.remove()?;
        tracing::debug!("{id}: deleted");
        let poststop = hooks.as_ref().and_then(|hooks| hooks.poststop().as_ref());
        // The container is gone whatever they do (OCI runtime specification, "Lifecycle").
        if let Err(error) = run_hooks(Kind::Poststop, poststop, &record, Status::Stopped) {
            tracing::warn!("{}", crate::error_chain(&error));
        }
        Ok(())
    }

    /// Ends and removes whatever the model made.
    fn remove(&self, container: &mut LockedContainer) -> Result<(), Error> {
        let isolation = container.record().isolation.isolation();
        isolation.delete(&self.target(container.record(), container.dir()))?;
        if let Some(scope) = &container.record().scope
            && let Err(error) = scope.stop()
        {
            // Its processes are gone, with which a scope ends; a systemd that is gone must not keep a container.
            tracing::warn!("{}", crate::error_chain(&error));
        }
        Ok(())
    }

    /// What is true of a container now.
    ///
    /// # Errors
    /// There is none, or its record is junk.
    pub fn state(&self, id: &ContainerId) -> Result<State, Error> {
        Ok(State::of(self.load(id)?))
    }

    /// All containers, by id. One whose record is junk is named in the log and left out.
    ///
    /// # Errors
    /// The state root cannot be read.
    pub fn list(&self) -> Result<Vec<State>, Error> {
        let containers = self.store.list()?;
        Ok(containers
            .into_iter()
            .filter_map(|(_, record)| match record {
                Ok(record) => Some(State::of(self.settle(record))),
                Err(error) => {
                    tracing::warn!("{}", crate::error_chain(&error));
                    None
                }
            })
            .collect())
    }

    /// Stops all processes of a running container where they are.
    ///
    /// # Errors
    /// It does not run, or could not be paused.
    pub fn pause(&self, id: &ContainerId) -> Result<(), Error> {
        let mut container = self.store.lock(id)?;
        if !self.status(&container).may_be_paused() {
            return Err(Error::Status {
                problem: "container not running",
                id: id.clone(),
            });
        }
        self.change(&mut container, Phase::Paused, |isolation, target| {
            isolation.pause(target)
        })
    }

    /// Lets a paused container go on.
    ///
    /// # Errors
    /// It is not paused, or could not be resumed.
    pub fn resume(&self, id: &ContainerId) -> Result<(), Error> {
        let mut container = self.store.lock(id)?;
        if !self.status(&container).may_be_resumed() {
            return Err(Error::Status {
                problem: "container not paused",
                id: id.clone(),
            });
        }
        self.change(&mut container, Phase::Running, |isolation, target| {
            isolation.resume(target)
        })
    }

    /// A container's processes. Their pids are the host's for the container model, the guest's for a microVM.
    ///
    /// # Errors
    /// They could not be read.
    pub fn processes(&self, id: &ContainerId) -> Result<Vec<ProcessInfo>, Error> {
        let record = self.load(id)?;
        let dir = self.store.dir(id);
        Ok(record
            .isolation
            .isolation()
            .processes(&self.target(&record, &dir))?)
    }

    /// What the container's own kernel wrote to its console, also after its end.
    ///
    /// # Errors
    /// It has none, or it cannot be read.
    pub fn console(&self, id: &ContainerId) -> Result<Vec<u8>, Error> {
        let record = self.load(id)?;
        let dir = self.store.dir(id);
        let target = self.target(&record, &dir);
        Ok(record.isolation.isolation().console(&target)?)
    }

    /// What is known of a running container, to be compared: what was asked for, and what the kernel says.
    ///
    /// # Errors
    /// It does not run, or could not be looked at.
    pub fn observe(&self, id: &ContainerId) -> Result<Observed, Error> {
        let record = self.load(id)?;
        let dir = self.store.dir(id);
        let (spec, _) = bundle::load_config(&dir.join(SAVED_CONFIG))?;
        let target = self.target(&record, &dir);
        let pid = target.pid.ok_or(IsolationError::NotRunning)?;
        let observation = record.isolation.isolation().observe(&target, &spec)?;
        Ok(Observed {
            isolation: record.isolation,
            pid,
            bundle: record.bundle.clone(),
            spec,
            observation,
        })
    }
}

fn saved_hooks(container: &LockedContainer) -> Result<Option<oci_spec::runtime::Hooks>, Error> {
    let (spec, _) = bundle::load_config(&container.dir().join(SAVED_CONFIG))?;
    Ok(spec.hooks().clone())
}

fn has_processes(isolation: &dyn Isolation, target: &Target<'_>) -> bool {
    isolation.processes(target).is_ok_and(|all| !all.is_empty())
}

/// The process that `create` or `exec` of a model returned, told apart from later ones.
fn identify(pid: i32) -> Result<ProcessId, Error> {
    ProcessId::of(pid).map_err(|source| Error::Process {
        operation: "identify",
        pid,
        source,
    })
}

/// Sends a descriptor of a process to a client's socket.
fn send_pidfd(socket: &Path, pid: i32, what: &str) -> Result<(), Error> {
    let sent = PidFd::open(pid).and_then(|process| process.send(socket, what));
    sent.map_err(|source| Error::Path {
        operation: "send the pidfd to",
        path: socket.to_owned(),
        source,
    })
}

/// Writes a pid file as a whole, for clients that watch for it.
fn write_pid_file(path: &Path, pid: i32) -> Result<(), Error> {
    let error = |source| Error::Path {
        operation: "write",
        path: path.to_owned(),
        source,
    };
    // The directory is the client's: a file without a name leaves nothing there, whenever we end.
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let file = OpenOptions::new()
        .write(true)
        .mode(0o644)
        .custom_flags(libc::O_TMPFILE)
        .open(dir);
    let mut file = match file {
        Ok(file) => file,
        Err(refused)
            if matches!(
                refused.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT)
            ) =>
        {
            // A file system that has no such files.
            let text = pid.to_string();
            return Ok(crate::state::write_atomically(path, text.as_bytes())?);
        }
        Err(other) => return Err(error(other)),
    };
    file.write_all(pid.to_string().as_bytes()).map_err(error)?;
    fault::point("pid-file.written");
    let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
    let link = || {
        linkat(
            None,
            Path::new(&nameless),
            None,
            path,
            AtFlags::AT_SYMLINK_FOLLOW,
        )
    };
    let linked = match link() {
        Err(Errno::EEXIST) => {
            let _ = std::fs::remove_file(path);
            link()
        }
        linked => linked,
    };
    linked.map_err(|errno| error(errno.into()))?;
    fault::point("pid-file.named");
    Ok(())
}
