//! What an isolation model does for a container, and which model a bundle gets.
//!
//! [`Isolation`] is the border between the lifecycle, which owns the state record and the order of events, and a
//! model, which owns processes, mounts and machines. A model keeps no record of its own: whatever it needs later it
//! finds again by the container's id, its directory and its cgroup, also after a crash.

mod container;
mod criu;
pub mod microvm;

use std::error::Error as StdError;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use engine::observation::Observation;
use engine::{Hold, ProcessInfo, cgroup};
use nix::poll::PollFlags;
use oci_spec::runtime::{LinuxResources, Process, Spec};
use serde::{Deserialize, Serialize};

use crate::bundle::Bundle;
use crate::config::Config;
use crate::id::ContainerId;
use crate::process::ProcessId;
use crate::signal::Signal;
use crate::state::Status;

pub use container::ContainerModel;

/// The annotation that chooses a model.
pub const ISOLATION_ANNOTATION: &str = "dev.rt.isolation";

/// The two ways to isolate a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Model {
    /// Namespaces, a cgroup and seccomp on the host's kernel.
    Container,
    /// A virtual machine with a kernel of its own.
    Microvm,
}

impl Model {
    /// What carries it out.
    pub fn isolation(self) -> &'static dyn Isolation {
        match self {
            Self::Container => &ContainerModel,
            Self::Microvm => &microvm::MicrovmModel,
        }
    }

    /// Executes this program anew where containers cannot write to its binary, if processes of a command will enter one.
    /// To be called before anything is made.
    ///
    /// # Errors
    /// It cannot be done; then no container may be entered.
    pub fn seal(self) -> Result<(), IsolationError> {
        match self {
            Self::Container => engine::seal(engine::Stay::Command).map_err(IsolationError::failed),
            // What enters a container there is the agent, which the guest keeps on a read-only file system.
            Self::Microvm => Ok(()),
        }
    }

    /// The name as the command line, the annotation and the configuration spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Microvm => "microvm",
        }
    }

    /// The model that the name of the binary stands for: `rt-container`, `rt-microvm`. Clients such as podman can
    /// give a path and no flags.
    pub fn of_binary(argv0: &Path) -> Option<Self> {
        argv0
            .file_name()?
            .to_str()?
            .strip_prefix("rt-")?
            .parse()
            .ok()
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no model's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown isolation model {0:?}: use `container` or `microvm`")]
pub struct UnknownModel(pub String);

impl FromStr for Model {
    type Err = UnknownModel;

    fn from_str(name: &str) -> Result<Self, UnknownModel> {
        match name {
            "container" => Ok(Self::Container),
            "microvm" => Ok(Self::Microvm),
            _ => Err(UnknownModel(name.to_owned())),
        }
    }
}

/// The annotation names no model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("annotation `{ISOLATION_ANNOTATION}`")]
pub struct SelectionError(#[source] UnknownModel);

/// Chooses the model of a bundle: the flag, else the annotation (if the configuration allows it), else a `vm` section,
/// else the configuration, else the binary's name, else `container`.
///
/// # Errors
/// The annotation counts and names no model. There is no silent fall-back from a model that was asked for.
pub fn select(
    flag: Option<Model>,
    bundle: &Bundle,
    config: &Config,
    binary: Option<Model>,
) -> Result<Model, SelectionError> {
    let annotation = bundle
        .annotation(ISOLATION_ANNOTATION)
        .filter(|_| config.allows_annotation(ISOLATION_ANNOTATION));
    Ok(if let Some(model) = flag {
        model
    } else if let Some(name) = annotation {
        name.parse().map_err(SelectionError)?
    } else if bundle.vm().is_some() {
        Model::Microvm
    } else {
        config.isolation.or(binary).unwrap_or(Model::Container)
    })
}

/// Why a model could not do something.
#[derive(Debug, thiserror::Error)]
pub enum IsolationError {
    /// The model has no such operation.
    #[error("the {model} model cannot {operation}: {reason}")]
    Unsupported {
        /// The model.
        model: Model,
        /// What was asked, as a verb.
        operation: &'static str,
        /// Why not, and what to do instead.
        reason: &'static str,
    },
    /// There is no such process, or no more.
    #[error("container not running")]
    NotRunning,
    /// The model tried and failed.
    #[error(transparent)]
    Failed(Box<dyn StdError + Send + Sync>),
}

impl IsolationError {
    /// Wraps a model's own error.
    pub fn failed(error: impl StdError + Send + Sync + 'static) -> Self {
        Self::Failed(Box::new(error))
    }
}

/// Everything about a container that is to be made, resolved.
#[derive(Debug)]
pub struct CreateContext<'a> {
    /// The container's id.
    pub id: &'a ContainerId,
    /// The bundle; `linux.cgroupsPath` in its spec is [`CreateContext::cgroup_path`].
    pub bundle: &'a Bundle,
    /// The container's directory in the state root, which exists and is locked by the caller. A model puts its files
    /// into a directory of its own there: `engine/`, `vm/`.
    pub dir: &'a Path,
    /// The cgroup, as a path below the hierarchies' mount points that begins with `/`.
    pub cgroup_path: &'a Path,
    /// A process that is in the cgroup already, to hold it until the container's are there.
    pub cgroup_keeper: Option<nix::unistd::Pid>,
    /// Where to send the terminal's master if the spec's process has a terminal: a Unix socket.
    pub console_socket: Option<&'a Path>,
    /// How many of our descriptors from 3 on the workload gets.
    pub preserve_fds: u32,
    /// Use `chroot` and a moved mount, not `pivot_root` (for an initramfs).
    pub no_pivot: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
    /// The administrator's configuration.
    pub config: &'a Config,
}

/// A container that was made, as its record describes it.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The container's id.
    pub id: &'a ContainerId,
    /// The container's directory in the state root.
    pub dir: &'a Path,
    /// The bundle's directory.
    pub bundle: &'a Path,
    /// The cgroup, as [`CreateContext::cgroup_path`].
    pub cgroup_path: &'a Path,
    /// The pid of the init process as the host sees it, if it is alive.
    pub pid: Option<i32>,
    /// The init process, told apart from later ones with the same pid; set when `pid` is.
    pub process: Option<ProcessId>,
    /// The administrator's configuration.
    pub config: &'a Config,
}

/// A process that is to be started in a running container.
#[derive(Debug)]
pub struct ExecRequest<'a> {
    /// Everything about the process, as in config.json.
    pub process: &'a Process,
    /// Where to send the terminal's master if the process has a terminal: a Unix socket.
    pub console_socket: Option<&'a Path>,
    /// How many of our descriptors from 3 on the process gets.
    pub preserve_fds: u32,
    /// A cgroup below the container's to put the process into.
    pub cgroup: Option<&'a Path>,
    /// Go on although the container is paused; the process then waits until it is resumed.
    pub ignore_paused: bool,
}

/// What a model made.
#[derive(Debug)]
pub struct Made {
    /// The init process as the host sees it, a child of the caller.
    pub pid: i32,
    /// It ends with the caller until this is released.
    pub hold: Hold,
}

/// What criu does with the cgroups that the images name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ManageCgroups {
    /// Make those that are missing, with their limits.
    #[default]
    Soft,
    /// As soft, and set the limits of those that exist.
    Full,
    /// Refuse if one exists.
    Strict,
    /// Leave the processes where criu is: in the container's cgroup, but without a cgroup namespace.
    Ignore,
}

impl FromStr for ManageCgroups {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "soft" => Ok(Self::Soft),
            "full" => Ok(Self::Full),
            "strict" => Ok(Self::Strict),
            "ignore" => Ok(Self::Ignore),
            _ => Err(format!("{name:?} is none of soft, full, strict and ignore")),
        }
    }
}

impl fmt::Display for ManageCgroups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Soft => "soft",
            Self::Full => "full",
            Self::Strict => "strict",
            Self::Ignore => "ignore",
        })
    }
}

/// The images of a checkpoint, and how they are made or used.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Images {
    /// Their directory, absolute.
    pub image_path: PathBuf,
    /// For logs and working files, absolute; `None` for the images' own.
    pub work_path: Option<PathBuf>,
    /// The images that these build on, relative to them.
    pub parent_path: Option<PathBuf>,
    /// Let the processes go on.
    pub leave_running: bool,
    /// Write the memory alone, and let the processes go on.
    pub pre_dump: bool,
    /// Allow open files without a name.
    pub link_remap: bool,
    /// Allow open TCP connections.
    pub tcp_established: bool,
    /// Allow Unix sockets that lead out of the container.
    pub ext_unix_sk: bool,
    /// Allow a session that began outside of the container.
    pub shell_job: bool,
    /// Allow file locks.
    pub file_locks: bool,
    /// What becomes of cgroups.
    pub manage_cgroups: ManageCgroups,
    /// Leave the network namespace empty: somebody else fills it.
    pub empty_network: bool,
    /// Give memory of the images back as soon as it is used or superseded.
    pub auto_dedup: bool,
}

/// What a container has used.
#[derive(Debug, Clone, PartialEq)]
pub struct Stats {
    /// The workload's use, as the kernel that it runs on counts it.
    pub workload: cgroup::Stats,
    /// What the VMM process costs the host, the guest's memory and processors with it; `None` without a machine.
    pub machine: Option<cgroup::Stats>,
}

/// A watch for processes that are killed for want of memory.
pub trait OomWatch {
    /// The descriptor to poll and what for; `None` if there never is news. An event of it need not be news.
    fn polled(&self) -> Option<(BorrowedFd<'_>, PollFlags)>;

    /// How many kills there were since the last call. It does not block.
    ///
    /// # Errors
    /// There will be no more news.
    fn news(&mut self) -> Result<u64, IsolationError>;
}

/// An isolation model.
///
/// Processes that a model starts inherit the caller's standard streams unless the spec asks for a terminal. The caller
/// may have signals blocked: a model gives workloads an empty mask and default dispositions.
pub trait Isolation: Sync {
    /// Which one it is.
    fn model(&self) -> Model;

    /// Makes the container up to the point where only `start` is missing.
    ///
    /// The init process ends with the workload's exit code or signal.
    ///
    /// # Errors
    /// The container could not be made. What exists already is removed by `delete`, which the lifecycle calls.
    fn create(&self, context: &CreateContext<'_>) -> Result<Made, IsolationError>;

    /// Lets the init process run the workload.
    ///
    /// # Errors
    /// The workload could not be started.
    fn start(&self, container: &Target<'_>) -> Result<(), IsolationError>;

    /// Whether the init process waits, runs or is paused. Asked while `start`, `pause` or `resume` is under way, or after
    /// one that was cut off.
    ///
    /// # Errors
    /// It could not be found out.
    fn status(&self, container: &Target<'_>) -> Result<Status, IsolationError>;

    /// Sends `signal` to the workload's first process, or with `all` to every process of the container.
    ///
    /// # Errors
    /// [`IsolationError::NotRunning`] if nobody is there to get it.
    fn kill(&self, container: &Target<'_>, signal: Signal, all: bool)
    -> Result<(), IsolationError>;

    /// Removes whatever the model made for the container: processes, cgroups, mounts, files. Called also for a container
    /// that is half made or half removed, and then again: what is not there is no error. Not the container's directory
    /// itself, which the lifecycle removes.
    ///
    /// # Errors
    /// Something is left.
    fn delete(&self, container: &Target<'_>) -> Result<(), IsolationError>;

    /// Starts another process in the container and returns its pid as the host sees it, a child of the caller that ends
    /// with that process's exit code or signal.
    ///
    /// # Errors
    /// The process could not be started.
    fn exec(
        &self,
        container: &Target<'_>,
        request: &ExecRequest<'_>,
    ) -> Result<i32, IsolationError>;

    /// Stops all processes where they are.
    ///
    /// # Errors
    /// They could not be stopped.
    fn pause(&self, container: &Target<'_>) -> Result<(), IsolationError>;

    /// Lets paused processes go on.
    ///
    /// # Errors
    /// They could not be resumed.
    fn resume(&self, container: &Target<'_>) -> Result<(), IsolationError>;

    /// Changes the resource limits.
    ///
    /// # Errors
    /// A limit could not be set.
    fn update(
        &self,
        container: &Target<'_>,
        resources: &LinuxResources,
    ) -> Result<(), IsolationError>;

    /// What the container has used.
    ///
    /// # Errors
    /// It could not be read.
    fn stats(&self, container: &Target<'_>) -> Result<Stats, IsolationError>;

    /// Watches for processes of the container that are killed for want of memory.
    ///
    /// # Errors
    /// There are no such events.
    fn watch_oom(&self, container: &Target<'_>) -> Result<Box<dyn OomWatch>, IsolationError>;

    /// Writes the processes to images. They end then, unless the images are made with `leave_running` or `pre_dump`.
    ///
    /// # Errors
    /// They could not be written; the container goes on.
    fn checkpoint(&self, container: &Target<'_>, images: &Images) -> Result<(), IsolationError>;

    /// Makes the container with the processes of the images, which run. Returns as [`Isolation::create`] does.
    ///
    /// # Errors
    /// As [`Isolation::create`].
    fn restore(&self, context: &CreateContext<'_>, images: &Images) -> Result<i32, IsolationError>;

    /// The container's processes, also those that outlived its first one. Their pids are the host's for the container
    /// model, the guest's for a microVM.
    ///
    /// # Errors
    /// They could not be read.
    fn processes(&self, container: &Target<'_>) -> Result<Vec<ProcessInfo>, IsolationError>;

    /// What the container's own kernel wrote to its console, also after its end.
    ///
    /// # Errors
    /// It has none, or it cannot be read.
    fn console(&self, container: &Target<'_>) -> Result<Vec<u8>, IsolationError>;

    /// What the kernel that runs the container says of its processes: the host's, or the guest's, which is as trusted as
    /// the guest. `spec` is the container's; a guest has its own form of it.
    ///
    /// # Errors
    /// They could not be looked at.
    fn observe(&self, container: &Target<'_>, spec: &Spec) -> Result<Observation, IsolationError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(extra: &str) -> (tempfile::TempDir, Bundle) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        let config = format!(
            r#"{{"ociVersion":"1.2.0","root":{{"path":"rootfs"}},"linux":{{}},
            "process":{{"cwd":"/","args":["sh"],"user":{{"uid":0,"gid":0}}}}{extra}}}"#
        );
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        let bundle = Bundle::load(dir.path()).unwrap();
        (dir, bundle)
    }

    const VM: &str = r#","vm":{"hwConfig":{"vcpus":1}}"#;
    const CONTAINER_ANNOTATION: &str = r#","annotations":{"dev.rt.isolation":"container"}"#;

    #[test]
    fn each_source_of_the_model_yields_to_the_one_before_it() {
        let microvm_config = Config {
            isolation: Some(Model::Microvm),
            ..Config::default()
        };
        let container_config = Config {
            isolation: Some(Model::Container),
            ..Config::default()
        };
        let (_plain_dir, plain) = bundle("");
        let (_vm_dir, vm) = bundle(VM);
        let (_both_dir, both) = bundle(&format!("{VM}{CONTAINER_ANNOTATION}"));
        let default = Config::default();

        assert_eq!(select(None, &plain, &default, None), Ok(Model::Container));
        assert_eq!(
            select(None, &plain, &default, Some(Model::Microvm)),
            Ok(Model::Microvm)
        );
        assert_eq!(
            select(None, &plain, &container_config, Some(Model::Microvm)),
            Ok(Model::Container)
        );
        assert_eq!(
            select(None, &vm, &container_config, None),
            Ok(Model::Microvm)
        );
        assert_eq!(
            select(None, &both, &microvm_config, None),
            Ok(Model::Container)
        );
        assert_eq!(
            select(Some(Model::Microvm), &both, &default, None),
            Ok(Model::Microvm)
        );
    }

    #[test]
    fn an_annotation_that_is_not_allowed_does_not_count() {
        let (_dir, both) = bundle(&format!("{VM}{CONTAINER_ANNOTATION}"));
        let config = Config {
            annotations: Vec::new(),
            ..Config::default()
        };
        assert_eq!(select(None, &both, &config, None), Ok(Model::Microvm));
    }

    #[test]
    fn a_wrong_annotation_is_an_error_and_no_fall_back() {
        let (_dir, wrong) = bundle(r#","annotations":{"dev.rt.isolation":"vm"}"#);
        let error = select(None, &wrong, &Config::default(), None).unwrap_err();
        assert_eq!(
            crate::error_chain(&error),
            "annotation `dev.rt.isolation`: unknown isolation model \"vm\": use `container` or `microvm`"
        );
        assert_eq!(
            select(Some(Model::Container), &wrong, &Config::default(), None),
            Ok(Model::Container)
        );
    }

    #[test]
    fn the_binary_name_stands_for_a_model() {
        assert_eq!(
            Model::of_binary(Path::new("/usr/bin/rt-microvm")),
            Some(Model::Microvm)
        );
        assert_eq!(
            Model::of_binary(Path::new("rt-container")),
            Some(Model::Container)
        );
        assert_eq!(Model::of_binary(Path::new("rt")), None);
        assert_eq!(Model::of_binary(Path::new("microvm")), None);
    }
}
