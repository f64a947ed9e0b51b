//! One container, as the engine needs it named, and the engine's operations with encoded results.
//!
//! The operations block and fork: they run in a child ([`Operation`](crate::operation::Operation)).

use std::borrow::Cow;
use std::error::Error;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use engine::cgroup::OomWatch;
use engine::{Cgroup, CreateRequest, Engine, Stdio};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Spec};
use prost::Message;
use protocol::message::{
    CreateContainerRequest, Empty, ExecRequest, Network, ObserveResponse, Process, ProcessStarted,
    ProcessesResponse, StatsResponse,
};
use protocol::{Code, Failure};
use serde::de::DeserializeOwned;

use crate::disks::{self, AttachedDisk};
use crate::{boot, network};

/// A process's stdio, for the engine.
#[derive(Debug)]
pub(crate) enum ProcessIo {
    /// Standard input, output and error.
    Files([OwnedFd; 3]),
    /// The console socket that the terminal's master goes to.
    Terminal(PathBuf),
}

/// A container and the names of what belongs to it.
#[derive(Debug)]
pub(crate) struct Container {
    id: String,
    spec: Spec,
    engine: Engine,
    cgroup_path: PathBuf,
    /// The bundle that hooks are told; made if there are any.
    bundle: PathBuf,
    /// Where its network namespace is kept, if it has interfaces of the machine.
    network: PathBuf,
    /// The disks of the machine that its spec names.
    disks: Vec<AttachedDisk>,
}

/// What an operation gives: an encoded response.
pub(crate) type Encoded = Result<Vec<u8>, Failure>;

impl Container {
    /// A container that is to be created as `request` says. The engine's files for it go below `directory`.
    pub(crate) fn new(directory: &Path, request: &CreateContainerRequest) -> Result<Self, Failure> {
        let id = &request.id;
        let mut spec: Spec = parse(&request.spec_json, "the spec")?;
        let disks = disks::attach(&request.disks, &mut spec).map_err(|error| internal(&error))?;
        let cgroups_path = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.cgroups_path().as_deref());
        let cgroup_path = Cgroup::path_for(cgroups_path, id)
            .map_err(|error| Failure::from_error(Code::InvalidArgument, &error))?;
        Ok(Self {
            id: id.clone(),
            spec,
            engine: Engine::new(directory.join(id)).with_seccomp_cache(directory.join("~seccomp")),
            bundle: directory.join(format!("{id}.bundle")),
            network: directory.join(format!("{id}.network")),
            cgroup_path,
            disks,
        })
    }

    /// Creates the container, with the shares and the network that it needs.
    pub(crate) fn create(
        &self,
        shares: &[String],
        network: Option<&Network>,
        io: ProcessIo,
    ) -> Encoded {
        for tag in shares {
            boot::mount_share(tag).map_err(|error| internal(&error))?;
        }
        if !self.has_namespace(LinuxNamespaceType::Network) {
            engine::loopback_up().map_err(|error| internal(&error))?;
        }
        let spec = match network {
            Some(network) => {
                network::make_namespace(network, &self.network)
                    .map_err(|error| internal(&error))?;
                Cow::Owned(self.spec_with_own_network()?)
            }
            None => Cow::Borrowed(&self.spec),
        };
        if self.spec.hooks().is_some() {
            self.write_bundle().map_err(|error| internal(&error))?;
        }
        let cgroup = self.cgroup()?;
        let request = CreateRequest {
            id: &self.id,
            spec: &spec,
            bundle: &self.bundle,
            cgroup: &cgroup,
            stdio: stdio(io),
            preserve_fds: 0,
            no_pivot: false,
            no_new_keyring: false,
        };
        let (created, hold) = self
            .engine
            .create(request)
            .map_err(|error| engine_failure(&error))?;
        // The agent keeps no record that could be cut off.
        hold.release().map_err(|error| internal(&error))?;
        Ok(started(created.pid))
    }

    /// The spec for a container that joins the network namespace that was made for it.
    fn spec_with_own_network(&self) -> Result<Spec, Failure> {
        let mut spec = self.spec.clone();
        let namespaces = spec
            .linux_mut()
            .as_mut()
            .and_then(|linux| linux.namespaces_mut().as_mut());
        let mut namespaces = namespaces.into_iter().flatten();
        let network = namespaces
            .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
            .ok_or_else(|| {
                let text = "a network needs a network namespace in the spec";
                Failure::new(Code::InvalidArgument, text)
            })?;
        network.set_path(Some(self.network.clone()));
        Ok(spec)
    }

    /// Hooks are told a bundle and may look for its configuration there.
    fn write_bundle(&self) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.bundle)?;
        std::fs::write(
            self.bundle.join("config.json"),
            serde_json::to_vec(&self.spec)?,
        )
    }

    /// Lets the created container's init run.
    pub(crate) fn start(&self) -> Encoded {
        self.engine
            .start()
            .map_err(|error| engine_failure(&error))?;
        Ok(empty())
    }

    /// Starts a process beside the init process `init`, which is not reaped yet.
    pub(crate) fn exec(&self, init: i32, request: &ExecRequest, io: ProcessIo) -> Encoded {
        let process = parse(&request.process_json, "the process")?;
        let init = Pid::from_raw(init);
        let init_start = engine::start_time(init).ok_or_else(|| {
            let text = format!("container {} is not running", self.id);
            Failure::new(Code::FailedPrecondition, text)
        })?;
        let sub_cgroup = Path::new(&request.sub_cgroup);
        let created = self.engine.exec(engine::ExecRequest {
            init,
            init_start,
            process: &process,
            linux: self.spec.linux().as_ref(),
            // Only who is notified by a seccomp profile would see it, and nobody in the guest is.
            state: serde_json::Value::Null,
            cgroup: &self.cgroup()?,
            sub_cgroup: Some(sub_cgroup).filter(|path| !path.as_os_str().is_empty()),
            stdio: stdio(io),
            preserve_fds: 0,
            ignore_paused: request.ignore_paused,
            no_new_keyring: false,
        });
        Ok(started(
            created.map_err(|error| engine_failure(&error))?.pid,
        ))
    }

    /// Waits until what was sent has been received, if there are connections to elsewhere.
    pub(crate) fn finish_sending(&self) -> Encoded {
        network::finish_sending(&self.network).map_err(|error| internal(&error))?;
        Ok(empty())
    }

    /// Tells what the kernel says of the processes.
    pub(crate) fn observe(&self, init: i32) -> Encoded {
        let pids = self.cgroup()?.pids().map_err(|error| internal(&error))?;
        let seen = engine::observation::observe(Pid::from_raw(init), &pids, Some(&self.spec));
        let mut seen = seen.map_err(|error| internal(&error))?;
        for rule in seen.devices.iter_mut().flatten() {
            disks::name_as_on_host(rule, &self.disks);
        }
        let observation = serde_json::to_vec(&seen).map_err(|error| internal(&error))?;
        Ok(ObserveResponse { observation }.encode_to_vec())
    }

    /// Lists the processes.
    pub(crate) fn processes(&self) -> Encoded {
        let infos = engine::processes(&self.cgroup()?).map_err(|error| internal(&error))?;
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let process = |info: engine::ProcessInfo| Process {
            pid: info.pid.unsigned_abs(),
            parent: info.parent.unsigned_abs(),
            uid: info.uid,
            cpu_millis: millis(info.cpu),
            started_millis: millis(info.started),
            command: info.command,
            terminal: info.terminal,
        };
        let processes = infos.into_iter().map(process).collect();
        Ok(ProcessesResponse { processes }.encode_to_vec())
    }

    /// Reads the resource use.
    pub(crate) fn stats(&self) -> Encoded {
        let stats = self.cgroup()?.stats().map_err(|error| internal(&error))?;
        let stats_json = serde_json::to_string(&stats).map_err(|error| internal(&error))?;
        Ok(StatsResponse { stats_json }.encode_to_vec())
    }

    /// Watches for processes that are killed for want of memory.
    pub(crate) fn watch_oom(&self) -> Result<OomWatch, Failure> {
        self.cgroup()?.watch_oom().map_err(|error| internal(&error))
    }

    /// Freezes all processes.
    pub(crate) fn pause(&self) -> Encoded {
        self.cgroup()?.freeze().map_err(|error| internal(&error))?;
        Ok(empty())
    }

    /// Thaws all processes.
    pub(crate) fn resume(&self) -> Encoded {
        self.cgroup()?.thaw().map_err(|error| internal(&error))?;
        Ok(empty())
    }

    /// Whether the processes are frozen.
    pub(crate) fn is_paused(&self) -> bool {
        self.cgroup().is_ok_and(|cgroup| cgroup.is_frozen())
    }

    /// Sets the resource limits in the text of a `linux.resources` object.
    pub(crate) fn update(&self, resources_json: &str) -> Encoded {
        let resources: LinuxResources = parse(resources_json, "the resources")?;
        self.cgroup()?
            .apply(&resources)
            .map_err(|error| internal(&error))?;
        Ok(empty())
    }

    /// Sends a signal to every process.
    pub(crate) fn signal_all(&self, signal: i32) -> Encoded {
        let signal = Signal::try_from(signal).map_err(|_| {
            let text = format!("signal {signal} cannot be sent to all processes of a container");
            Failure::new(Code::InvalidArgument, text)
        })?;
        let cgroup = self.cgroup()?;
        let sent = match signal {
            Signal::SIGKILL => cgroup.kill_all(),
            other => cgroup.signal_all(other),
        };
        sent.map_err(|error| internal(&error))?;
        Ok(empty())
    }

    /// Kills what is left, and removes the cgroup and the engine's files.
    pub(crate) fn delete(&self) -> Encoded {
        let deleted = self.engine.delete(&self.cgroup()?);
        deleted.map_err(|error| engine_failure(&error))?;
        // The host keeps open what this kernel remembers of the root. In a guest only: there this is process 1's child.
        if nix::unistd::getppid() == Pid::from_raw(1) {
            let _ = std::fs::write("/proc/sys/vm/drop_caches", "2");
        }
        // It is there only if the container has hooks.
        let _ = std::fs::remove_dir_all(&self.bundle);
        network::let_go(&self.network);
        Ok(empty())
    }

    fn cgroup(&self) -> Result<Cgroup, Failure> {
        Cgroup::new(&self.cgroup_path).map_err(|error| internal(&error))
    }

    fn has_namespace(&self, kind: LinuxNamespaceType) -> bool {
        let namespaces = self
            .spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.namespaces().as_ref());
        namespaces
            .into_iter()
            .flatten()
            .any(|namespace| namespace.typ() == kind)
    }
}

fn stdio(io: ProcessIo) -> Stdio {
    match io {
        ProcessIo::Files([stdin, stdout, stderr]) => Stdio::Files {
            stdin,
            stdout,
            stderr,
        },
        ProcessIo::Terminal(path) => Stdio::Console(path),
    }
}

fn parse<T: DeserializeOwned>(json: &str, what: &str) -> Result<T, Failure> {
    serde_json::from_str(json).map_err(|error| {
        let texts = vec![format!("cannot read {what}"), error.to_string()];
        Failure::from_texts(Code::InvalidArgument, texts)
    })
}

fn started(pid: Pid) -> Vec<u8> {
    ProcessStarted {
        pid: pid.as_raw().unsigned_abs(),
    }
    .encode_to_vec()
}

fn empty() -> Vec<u8> {
    Empty {}.encode_to_vec()
}

fn internal(error: &(dyn Error + 'static)) -> Failure {
    Failure::from_error(Code::Internal, error)
}

/// The engine's error, with the exit code that it stands for.
fn engine_failure(error: &engine::Error) -> Failure {
    let code = match error {
        engine::Error::Unsupported { .. } => Code::InvalidArgument,
        engine::Error::NotRunning(_) | engine::Error::Paused => Code::FailedPrecondition,
        _ => Code::Internal,
    };
    Failure::from_error(code, error).with_exit_code(error.exit_code())
}
