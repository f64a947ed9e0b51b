//! The container model: the engine on the host's kernel.
//!
//! The bundle and the container's processes are hostile; the engine treats them so. What this module adds is the
//! mapping of the trait to the engine, which lives in `engine/` of the container's directory.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use engine::cgroup::Cgroup;
use engine::observation::Observation;
use engine::{CreateRequest, Engine, ProcessInfo, Stdio};
use nix::poll::PollFlags;
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxResources, Spec};

use super::criu::{self, CriuError};
use super::{
    CreateContext, ExecRequest, Images, Isolation, IsolationError, Made, Model, OomWatch, Stats,
    Target,
};
use crate::bundle;
use crate::process::PidFd;
use crate::signal::Signal;
use crate::state::{SAVED_CONFIG, Status};

/// The engine's directory in a container's.
const ENGINE_DIR: &str = "engine";

/// The model.
#[derive(Debug)]
pub struct ContainerModel;

/// A signal that could not be sent.
#[derive(Debug, thiserror::Error)]
#[error("send {signal} to process {pid}")]
struct SignalError {
    signal: Signal,
    pid: i32,
    #[source]
    source: io::Error,
}

/// The engine of the container whose directory in the state root this is.
fn engine_in(dir: &Path) -> Engine {
    // No id begins so.
    Engine::new(dir.join(ENGINE_DIR)).with_seccomp_cache(dir.with_file_name("~seccomp"))
}

fn engine_of(container: &Target<'_>) -> Engine {
    engine_in(container.dir)
}

fn cgroup_of(container: &Target<'_>) -> Result<Cgroup, IsolationError> {
    if container.cgroup_path.as_os_str().is_empty() {
        return Ok(Cgroup::none(container.pid.map(Pid::from_raw)));
    }
    Cgroup::new(container.cgroup_path).map_err(IsolationError::failed)
}

/// The cgroup of a container that is made, which may have a process that keeps it.
fn cgroup_to_make(context: &CreateContext<'_>) -> Result<Cgroup, IsolationError> {
    let cgroup = Cgroup::new(context.cgroup_path).map_err(IsolationError::failed)?;
    Ok(match context.cgroup_keeper {
        Some(keeper) => cgroup.kept_by(keeper),
        None => cgroup,
    })
}

fn stdio(console_socket: Option<&std::path::Path>) -> Stdio {
    console_socket.map_or(Stdio::Inherit, |socket| {
        Stdio::Console(PathBuf::from(socket))
    })
}

/// The root directory; the saved configuration has it absolute.
fn root_of(spec: &Spec) -> PathBuf {
    let root = spec.root().as_ref();
    root.map(|root| root.path().clone()).unwrap_or_default()
}

/// Whether the container's first process began its pid namespace.
fn began_pid_namespace(container: &Target<'_>) -> Result<bool, IsolationError> {
    let config = bundle::load_config(&container.dir.join(SAVED_CONFIG));
    let (spec, _) = config.map_err(IsolationError::failed)?;
    Ok(engine::begins_pid_namespace(&spec))
}

/// Sends a signal to a process; that it is gone is an error of its own.
fn signal_process(pid: i32, signal: Signal) -> Result<(), IsolationError> {
    PidFd::open(pid)
        .and_then(|process| process.signal(signal))
        .map_err(|source| {
            if source.raw_os_error() == Some(libc::ESRCH) {
                IsolationError::NotRunning
            } else {
                IsolationError::failed(SignalError {
                    signal,
                    pid,
                    source,
                })
            }
        })
}

/// The kernel's own news of the container's cgroup.
struct CgroupWatch {
    watch: engine::cgroup::OomWatch,
    known: u64,
}

impl OomWatch for CgroupWatch {
    fn polled(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        self.watch.polled()
    }

    fn news(&mut self) -> Result<u64, IsolationError> {
        let kills = self.watch.kills().map_err(IsolationError::failed)?;
        Ok(kills.saturating_sub(std::mem::replace(&mut self.known, kills)))
    }
}

impl Isolation for ContainerModel {
    fn model(&self) -> Model {
        Model::Container
    }

    fn create(&self, context: &CreateContext<'_>) -> Result<Made, IsolationError> {
        let cgroup = cgroup_to_make(context)?;
        let request = CreateRequest {
            id: context.id.as_str(),
            spec: context.bundle.spec(),
            bundle: context.bundle.dir(),
            cgroup: &cgroup,
            stdio: stdio(context.console_socket),
            preserve_fds: context.preserve_fds,
            no_pivot: context.no_pivot,
            no_new_keyring: context.no_new_keyring,
        };
        let (created, hold) = engine_in(context.dir)
            .create(request)
            .map_err(IsolationError::failed)?;
        Ok(Made {
            pid: created.pid.as_raw(),
            hold,
        })
    }

    fn start(&self, container: &Target<'_>) -> Result<(), IsolationError> {
        engine_of(container).start().map_err(IsolationError::failed)
    }

    fn status(&self, container: &Target<'_>) -> Result<Status, IsolationError> {
        let has_started = engine_of(container)
            .has_started()
            .map_err(IsolationError::failed)?;
        Ok(match has_started {
            false => Status::Created,
            true if cgroup_of(container)?.is_frozen() => Status::Paused,
            true => Status::Running,
        })
    }

    fn kill(
        &self,
        container: &Target<'_>,
        signal: Signal,
        all: bool,
    ) -> Result<(), IsolationError> {
        let cgroup = cgroup_of(container)?;
        let is_kill = signal == Signal::KILL;
        // The end of a first process that began no pid namespace ends nobody else.
        if is_kill && (all || !began_pid_namespace(container)?) {
            return cgroup.kill_all().map_err(IsolationError::failed);
        }
        if !all {
            signal_process(container.pid.ok_or(IsolationError::NotRunning)?, signal)?;
            if is_kill && cgroup.is_frozen() {
                // Version 1 has it end only then.
                cgroup.thaw().map_err(IsolationError::failed)?;
            }
            return Ok(());
        }
        for pid in cgroup.pids().map_err(IsolationError::failed)? {
            match signal_process(pid.as_raw(), signal) {
                // It ended since the list was read.
                Err(IsolationError::NotRunning) | Ok(()) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn delete(&self, container: &Target<'_>) -> Result<(), IsolationError> {
        engine_of(container)
            .delete(&cgroup_of(container)?)
            .map_err(IsolationError::failed)
    }

    fn exec(
        &self,
        container: &Target<'_>,
        request: &ExecRequest<'_>,
    ) -> Result<i32, IsolationError> {
        let init = container.process.ok_or(IsolationError::NotRunning)?;
        let (spec, _) = bundle::load_config(&container.dir.join(SAVED_CONFIG))
            .map_err(IsolationError::failed)?;
        let cgroup = cgroup_of(container)?;
        let request = engine::ExecRequest {
            init: Pid::from_raw(init.pid),
            init_start: init.start_time,
            process: request.process,
            linux: spec.linux().as_ref(),
            state: serde_json::json!({
                "ociVersion": spec.version(),
                "id": container.id,
                "status": "running",
                "bundle": container.bundle,
                "annotations": spec.annotations().clone().unwrap_or_default(),
            }),
            cgroup: &cgroup,
            sub_cgroup: request.cgroup,
            stdio: stdio(request.console_socket),
            preserve_fds: request.preserve_fds,
            ignore_paused: request.ignore_paused,
            no_new_keyring: false,
        };
        let created = engine_of(container)
            .exec(request)
            .map_err(IsolationError::failed)?;
        Ok(created.pid.as_raw())
    }

    fn pause(&self, container: &Target<'_>) -> Result<(), IsolationError> {
        cgroup_of(container)?
            .freeze()
            .map_err(IsolationError::failed)
    }

    fn resume(&self, container: &Target<'_>) -> Result<(), IsolationError> {
        cgroup_of(container)?.thaw().map_err(IsolationError::failed)
    }

    fn update(
        &self,
        container: &Target<'_>,
        resources: &LinuxResources,
    ) -> Result<(), IsolationError> {
        cgroup_of(container)?
            .apply(resources)
            .map_err(IsolationError::failed)
    }

    fn stats(&self, container: &Target<'_>) -> Result<Stats, IsolationError> {
        let workload = cgroup_of(container)?
            .stats()
            .map_err(IsolationError::failed)?;
        Ok(Stats {
            workload,
            machine: None,
        })
    }

    fn watch_oom(&self, container: &Target<'_>) -> Result<Box<dyn OomWatch>, IsolationError> {
        let mut watch = cgroup_of(container)?
            .watch_oom()
            .map_err(IsolationError::failed)?;
        let known = watch.kills().map_err(IsolationError::failed)?;
        Ok(Box::new(CgroupWatch { watch, known }))
    }

    fn checkpoint(&self, container: &Target<'_>, images: &Images) -> Result<(), IsolationError> {
        let pid = container.pid.ok_or(IsolationError::NotRunning)?;
        let (spec, _) = bundle::load_config(&container.dir.join(SAVED_CONFIG))
            .map_err(IsolationError::failed)?;
        criu::dump(pid, &spec, &root_of(&spec), images).map_err(IsolationError::failed)
    }

    fn restore(&self, context: &CreateContext<'_>, images: &Images) -> Result<i32, IsolationError> {
        if context.preserve_fds > 0 {
            return Err(IsolationError::Unsupported {
                model: Model::Container,
                operation: "preserve descriptors at a restore",
                reason: "the processes have theirs from the checkpoint",
            });
        }
        let spec = context.bundle.spec();
        let cgroup = cgroup_to_make(context)?;
        engine_in(context.dir)
            .adopt(&cgroup)
            .map_err(IsolationError::failed)?;
        cgroup.create().map_err(IsolationError::failed)?;
        if let Some(resources) = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref())
        {
            cgroup.apply(resources).map_err(IsolationError::failed)?;
        }
        let pid_file = context.dir.join("restore.pid");
        let pid = criu::restore(spec, context.bundle.rootfs(), &cgroup, &pid_file, images)
            .map_err(IsolationError::failed)?;
        let pids = cgroup.pids().map_err(IsolationError::failed)?;
        if !pids.contains(&Pid::from_raw(pid)) {
            // In no cgroup of ours, so nobody else would end it.
            signal_process(pid, Signal::KILL)?;
            return Err(IsolationError::failed(CriuError::OtherCgroup));
        }
        Ok(pid)
    }

    fn processes(&self, container: &Target<'_>) -> Result<Vec<ProcessInfo>, IsolationError> {
        engine::processes(&cgroup_of(container)?).map_err(IsolationError::failed)
    }

    fn console(&self, _: &Target<'_>) -> Result<Vec<u8>, IsolationError> {
        Err(IsolationError::Unsupported {
            model: Model::Container,
            operation: "logs --console",
            reason: "its kernel is the host's, whose messages dmesg(1) prints",
        })
    }

    fn observe(&self, container: &Target<'_>, spec: &Spec) -> Result<Observation, IsolationError> {
        let init = Pid::from_raw(container.pid.ok_or(IsolationError::NotRunning)?);
        let pids = cgroup_of(container)?
            .pids()
            .map_err(IsolationError::failed)?;
        engine::observation::observe(init, &pids, Some(spec)).map_err(IsolationError::failed)
    }
}
