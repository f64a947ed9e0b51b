//! Control groups on v1, hybrid and v2: one container, one path, in every hierarchy there is.
//!
//! Everything is found again from the path alone, so a cgroup can be killed and removed after a crash of whoever
//! made it. The processes in it are hostile; the files under the mount point are the kernel's.

mod device_access;
mod devices;
mod kill;
mod layout;
mod oom;
mod resources;
mod stats;

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use nix::unistd::Pid;
use oci_spec::runtime::LinuxResources;

use crate::fault;

pub(crate) use device_access::allowed_devices;
pub use devices::{block_device_access, default_devices};
pub use layout::{Hierarchy, Layout};
pub use oom::OomWatch;
pub(crate) use resources::swap_max;
pub use resources::{Throttle, cpu_weight, io_weight, throttles};
pub use stats::{
    Block, BlockCount, Cpu, Cpuset, HugePages, Memory, MemoryUse, Pids, Pressure, Stall, Stats,
    Throttling, memory_bound,
};

/// A cgroup operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `linux.cgroupsPath` cannot be used.
    #[error("linux.cgroupsPath {path:?}: {reason}")]
    Path {
        /// The path as given.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No cgroup file system is mounted.
    #[error("no cgroup file system is mounted below /sys/fs/cgroup; mount cgroup2 there")]
    NotMounted,
    /// A limit needs a controller that this system, or this user, does not have here.
    #[error("{field} needs the cgroup controller {controller:?}, which is not available here")]
    NoController {
        /// Where in config.json.
        field: String,
        /// The controller's name.
        controller: &'static str,
    },
    /// A limit has no meaning on this system's cgroup version.
    #[error("{field}: {reason}")]
    Unsupported {
        /// Where in config.json.
        field: String,
        /// Why not.
        reason: &'static str,
    },
    /// The kernel refused a limit.
    #[error("{field} cannot be set")]
    Refused {
        /// Where in config.json.
        field: String,
        /// The write that failed.
        #[source]
        source: Box<Error>,
    },
    /// A file or system call failed.
    #[error("cannot {operation} {path}")]
    Io {
        /// What was tried.
        operation: String,
        /// Its object.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A container cannot have a cgroup in which there are processes.
    #[error("linux.cgroupsPath: {path:?}: container's cgroup is not empty: process {pid} is in it")]
    InUse {
        /// The cgroup.
        path: PathBuf,
        /// One of them.
        pid: Pid,
    },
    /// No process would begin in the cgroup.
    #[error(
        "linux.cgroupsPath: {0:?}: container's cgroup unexpectedly frozen: thaw it, or the one above it that is"
    )]
    Frozen(PathBuf),
    /// The processes of the cgroup did not end after SIGKILL.
    #[error("processes in the cgroup {0} did not end in 10 s after SIGKILL")]
    StillPopulated(PathBuf),
}

pub(crate) type Result<T> = std::result::Result<T, Error>;

/// The cgroup of a container whose configuration names none begins so, and ends with its id.
///
/// It has no parent of ours, which would cost half as much again to make and to remove, in each hierarchy.
const DEFAULT_PREFIX: &str = "/rt-";

/// The control group of a container, in all hierarchies of the system.
#[derive(Clone, Debug)]
pub struct Cgroup {
    layout: &'static Layout,
    path: PathBuf,
    /// A process that is in it for no other reason than to hold it.
    keeper: Option<Pid>,
    /// Without a cgroup, the first process, whose pid namespace tells who belongs to it.
    init: Option<Pid>,
}

impl Cgroup {
    /// The final cgroup path of a container: `linux.cgroupsPath`, or `/rt-<id>` if there is none.
    ///
    /// The result is absolute below the root of each hierarchy. A relative path counts from that root too.
    ///
    /// # Errors
    /// A path with `..`, the root itself, and the `slice:prefix:name` form of the systemd driver are refused.
    pub fn path_for(cgroups_path: Option<&Path>, id: &str) -> Result<PathBuf> {
        let Some(given) = cgroups_path.filter(|path| !path.as_os_str().is_empty()) else {
            return Ok(format!("{DEFAULT_PREFIX}{id}").into());
        };
        let refuse = |reason| Error::Path {
            path: given.to_owned(),
            reason,
        };
        let text = given
            .to_str()
            .ok_or_else(|| refuse("it is not valid UTF-8"))?;
        if !text.starts_with('/') && text.matches(':').count() == 2 {
            return Err(refuse(
                "this is the systemd driver's form (slice:prefix:name): give --systemd-cgroup, \
                 or set the client's cgroup driver to cgroupfs",
            ));
        }
        let mut path = PathBuf::from("/");
        for component in given.components() {
            match component {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => path.push(name),
                Component::ParentDir | Component::Prefix(_) => {
                    return Err(refuse("it must not contain \"..\""));
                }
            }
        }
        if path == Path::new("/") {
            return Err(refuse("it names the root cgroup"));
        }
        Ok(path)
    }

    /// Finds the hierarchies of this system and names a cgroup in them. Nothing is made yet.
    ///
    /// An empty path is [`Cgroup::none`].
    ///
    /// # Errors
    /// The path is not absolute or no cgroup file system is mounted.
    pub fn new(path: &Path) -> Result<Self> {
        if path.as_os_str().is_empty() {
            return Ok(Self::none(None));
        }
        let path = Self::path_for(Some(path), "")?;
        Ok(Self {
            layout: Layout::of_system()?,
            path,
            keeper: None,
            init: None,
        })
    }

    /// What a container has whose user may not make a cgroup: no limit can be set, and its processes are those of its
    /// first process's pid namespace, if it has one of its own.
    #[must_use]
    pub fn none(init: Option<Pid>) -> Self {
        Self {
            layout: Layout::none(),
            path: PathBuf::new(),
            keeper: None,
            init,
        }
    }

    /// The path for a container of an ordinary user: as [`Cgroup::path_for`], but one that is not given lies below the
    /// caller's own cgroup. It is empty where the user may not make that cgroup and put processes into it.
    ///
    /// # Errors
    /// As [`Cgroup::path_for`].
    pub fn path_for_user(cgroups_path: Option<&Path>, id: &str) -> Result<PathBuf> {
        let path = Self::path_for(cgroups_path, id)?;
        let layout = Layout::of_system()?;
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = own.lines().find_map(|line| line.strip_prefix("0::"));
        // Version 1 lets nobody but root delegate safely, and nobody does.
        let (
            [
                Hierarchy {
                    mount,
                    controllers: None,
                },
            ],
            Some(own),
        ) = (&layout.hierarchies[..], own)
        else {
            return Ok(PathBuf::new());
        };
        let own = Path::new(own);
        let path = match cgroups_path.is_some_and(|path| !path.as_os_str().is_empty()) {
            true => path,
            false => own.join(path.strip_prefix("/").unwrap_or(&path)),
        };
        let at = |path: &Path| mount.join(path.strip_prefix("/").unwrap_or(path));
        let writable =
            |path: &Path| nix::unistd::access(path, nix::unistd::AccessFlags::W_OK).is_ok();
        let existing = path.ancestors().map(at).find(|one| one.exists());
        // cgroups(7): who moves a process needs to write to the nearest cgroup above both places.
        let common = path.ancestors().find(|above| own.starts_with(above));
        let common = common.map(|above| at(above).join("cgroup.procs"));
        let permitted = existing.is_some_and(|one| writable(&one))
            && common.is_some_and(|procs| writable(&procs));
        Ok(if permitted { path } else { PathBuf::new() })
    }

    /// Whether it is [`Cgroup::none`].
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.layout.hierarchies.is_empty()
    }

    /// Does not count a process among those in the cgroup; it holds the cgroup until others are there.
    #[must_use]
    pub fn kept_by(mut self, keeper: Pid) -> Self {
        self.keeper = Some(keeper);
        self
    }

    /// The path below the root of each hierarchy.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The hierarchies of this system.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        self.layout
    }

    /// Whether the cgroup exists in any hierarchy.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.directories().any(|directory| directory.exists())
    }

    fn join(&self, mount: &Path) -> PathBuf {
        match self.path.strip_prefix("/") {
            Ok(relative) => mount.join(relative),
            Err(_) => mount.join(&self.path),
        }
    }

    /// The cgroup's directory in each hierarchy.
    pub(crate) fn directories(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.layout
            .hierarchies
            .iter()
            .map(|hierarchy| self.join(&hierarchy.mount))
    }

    /// The cgroup's directory where a controller of version 1 is.
    fn v1(&self, controller: &str) -> Option<PathBuf> {
        self.layout
            .v1(controller)
            .map(|hierarchy| self.join(&hierarchy.mount))
    }

    /// The cgroup's directory in the version 2 hierarchy.
    pub(crate) fn unified(&self) -> Option<PathBuf> {
        self.layout
            .unified()
            .map(|hierarchy| self.join(&hierarchy.mount))
    }

    /// Makes the cgroup in every hierarchy, with the controllers that its ancestors can give.
    ///
    /// It may exist already: then it is used as it is.
    ///
    /// # Errors
    /// A directory cannot be made. What was made before that is left for [`Cgroup::remove`].
    pub fn create(&self) -> Result<()> {
        for hierarchy in &self.layout.hierarchies {
            let directory = self.join(&hierarchy.mount);
            let made = match fs::create_dir(&directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    fs::create_dir_all(&directory)
                }
                other => other,
            };
            match made {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(source) => return Err(io_error("create the cgroup", &directory, source)),
            }
            if hierarchy.has("cpuset") {
                inherit_cpuset(&hierarchy.mount, &self.path)?;
            }
            // Beside version 1 it has what is seldom wanted: a limit that does enables it.
            if hierarchy.is_unified() && self.layout.hierarchies.len() == 1 {
                let own = read(&directory.join("cgroup.controllers"))?;
                let has = |name: &&str| own.split_whitespace().any(|one| one == *name);
                if !COUNTERS.iter().all(has) {
                    enable_above(&hierarchy.mount, &self.path);
                }
            }
            fault::point("cgroup.made");
        }
        Ok(())
    }

    /// Sets the limits of `linux.resources`; called again, it changes those that are given.
    ///
    /// # Errors
    /// The field of config.json that the kernel refused, with the file written and the kernel's answer.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        resources::apply(self, resources)
    }

    /// Moves a process into the cgroup, with all its threads.
    ///
    /// # Errors
    /// The cgroup is missing, or the process is.
    pub fn add(&self, pid: Pid) -> Result<()> {
        for directory in self.directories() {
            write(&directory.join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }

    /// Moves this process into the cgroup. With one thread this is far cheaper than [`Cgroup::add`]
    /// on version 1: the kernel then need not stop every fork on the system.
    ///
    /// # Errors
    /// The cgroup is missing.
    pub fn enter(&self) -> Result<()> {
        for hierarchy in &self.layout.hierarchies {
            let directory = self.join(&hierarchy.mount);
            write(&directory.join(entry_file(hierarchy)), "0")?;
        }
        Ok(())
    }

    /// How a new process gets in without being moved by somebody else.
    pub(crate) fn entrance(&self) -> Result<Entrance> {
        let mut entrance = Entrance {
            born_in: None,
            join: Vec::new(),
        };
        for hierarchy in &self.layout.hierarchies {
            let directory = self.join(&hierarchy.mount);
            if hierarchy.is_unified() {
                let file = fs::OpenOptions::new()
                    .read(true)
                    .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
                    .open(&directory)
                    .map_err(|source| io_error("open", &directory, source))?;
                entrance.born_in = Some(file.into());
            } else {
                let path = directory.join(entry_file(hierarchy));
                let file = fs::OpenOptions::new()
                    .write(true)
                    .open(&path)
                    .map_err(|source| io_error("open", &path, source))?;
                entrance.join.push((file, path));
            }
        }
        Ok(entrance)
    }

    /// The processes in the cgroup and in those below it.
    ///
    /// # Errors
    /// The list cannot be read. A cgroup that does not exist has no processes.
    pub fn pids(&self) -> Result<Vec<Pid>> {
        let mut pids = kill::pids(self)?;
        pids.retain(|pid| Some(*pid) != self.keeper);
        Ok(pids)
    }

    /// Makes sure that a container can begin in the cgroup, which need not be there yet.
    ///
    /// # Errors
    /// A process is in it, or it is frozen.
    pub fn ensure_unused(&self) -> Result<()> {
        let path = || self.path.clone();
        if let Some(&pid) = self.pids()?.first() {
            return Err(Error::InUse { path: path(), pid });
        }
        match kill::would_freeze(self) {
            true => Err(Error::Frozen(path())),
            false => Ok(()),
        }
    }

    /// Sends a signal to every process in the cgroup and in those below it.
    ///
    /// # Errors
    /// The list of processes cannot be read.
    pub fn signal_all(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        kill::signal_all(self, signal)
    }

    /// Kills every process in the cgroup and in those below it, and waits until they have ended.
    ///
    /// # Errors
    /// A process did not end in ten seconds (it hangs in the kernel).
    pub fn kill_all(&self) -> Result<()> {
        kill::kill_all(self)
    }

    /// Stops every process of the cgroup where it is; returns when all have stopped.
    ///
    /// # Errors
    /// There is no freezer, or it did not reach the state in ten seconds.
    pub fn freeze(&self) -> Result<()> {
        kill::set_frozen(self, true)
    }

    /// Lets the processes of a frozen cgroup run again.
    ///
    /// # Errors
    /// There is no freezer.
    pub fn thaw(&self) -> Result<()> {
        kill::set_frozen(self, false)
    }

    /// Whether the cgroup is frozen. One that does not exist is not.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        kill::is_frozen(self)
    }

    /// What the cgroup has used.
    ///
    /// # Errors
    /// A file of the kernel cannot be read.
    pub fn stats(&self) -> Result<Stats> {
        stats::read(self)
    }

    /// How many processes of this cgroup the kernel's out-of-memory killer has killed.
    ///
    /// # Errors
    /// The counter cannot be read.
    pub fn oom_kills(&self) -> Result<u64> {
        stats::oom_kills(self)
    }

    /// Watches for processes that the kernel kills for want of memory.
    ///
    /// # Errors
    /// The cgroup is gone, or the kernel gives no events.
    pub fn watch_oom(&self) -> Result<OomWatch> {
        OomWatch::new(self)
    }

    /// Kills what is left in the cgroup and removes it with all below it, in every hierarchy.
    ///
    /// It may be gone already, wholly or in part.
    ///
    /// # Errors
    /// A process does not end, or a directory cannot be removed.
    pub fn remove(&self) -> Result<()> {
        kill::remove(self)
    }
}

/// The open files through which a new process enters its cgroup.
pub(crate) struct Entrance {
    /// The directory of the unified hierarchy, for clone3(2).
    pub(crate) born_in: Option<OwnedFd>,
    join: Vec<(fs::File, PathBuf)>,
}

impl Entrance {
    /// Enters the version 1 hierarchies; for the new process, before it has threads.
    pub(crate) fn pass(&self) -> Result<()> {
        for (file, path) in &self.join {
            (&*file)
                .write_all(b"0")
                .map_err(|source| io_error("join the cgroup through", path, source))?;
        }
        Ok(())
    }
}

/// On version 1 `tasks` moves one thread, without the lock that `cgroup.procs` takes.
fn entry_file(hierarchy: &Hierarchy) -> &'static str {
    if hierarchy.is_unified() {
        "cgroup.procs"
    } else {
        "tasks"
    }
}

/// The controllers without which a cgroup cannot say what it has used.
const COUNTERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// Gives a cgroup the controllers that its ancestors have. What cannot be given is found out when a limit needs it:
/// then the error names the limit.
fn enable_above(mount: &Path, path: &Path) {
    let mut directory = mount.to_owned();
    for component in path.iter().skip(1) {
        enable_controllers(&directory);
        directory.push(component);
    }
}

fn enable_controllers(directory: &Path) {
    let available = fs::read_to_string(directory.join("cgroup.controllers")).unwrap_or_default();
    let control = directory.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&control).unwrap_or_default();
    let missing: Vec<String> = available
        .split_whitespace()
        .filter(|name| !enabled.split_whitespace().any(|have| have == *name))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() || write(&control, &missing.join(" ")).is_ok() {
        return;
    }
    for name in missing {
        let _ = write(&control, &name);
    }
}

/// A new cpuset of version 1 is empty and takes no process: fill it with its parent's values, and its parent before
/// that if need be.
fn inherit_cpuset(mount: &Path, path: &Path) -> Result<()> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    let below = |path: &Path, file: &str| {
        mount
            .join(path.strip_prefix("/").unwrap_or(path))
            .join(file)
    };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let mut value = read(&below(parent, file))?;
        if value.trim().is_empty() {
            inherit_cpuset(mount, parent)?;
            value = read(&below(parent, file))?;
        }
        write(&below(path, file), value.trim())?;
    }
    Ok(())
}

/// Whether this process lacks the rights of the system's root: by its user, or because its user namespace is not the
/// first one.
#[must_use]
pub fn is_rootless() -> bool {
    if !nix::unistd::geteuid().is_root() {
        return true;
    }
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let all: Vec<&str> = map.split_whitespace().collect();
    !map.is_empty() && all != ["0", "0", "4294967295"]
}

fn io_error(operation: &str, path: &Path, source: io::Error) -> Error {
    Error::Io {
        operation: operation.to_owned(),
        path: path.to_owned(),
        source,
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|source| io_error("read", path, source))
}

fn write(path: &Path, value: &str) -> Result<()> {
    let attempt = || {
        fs::OpenOptions::new()
            .write(true)
            .open(path)?
            .write_all(value.as_bytes())
    };
    attempt().map_err(|source| io_error(&format!("write {value:?} to"), path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_without_a_path_is_named_by_its_id() {
        for none in [None, Some(Path::new(""))] {
            assert_eq!(Cgroup::path_for(none, "c1").unwrap(), Path::new("/rt-c1"));
        }
    }

    #[test]
    fn paths_count_from_the_root() {
        for given in ["/a/b", "a/b", "/a//b/.", "//a/b/"] {
            assert_eq!(
                Cgroup::path_for(Some(Path::new(given)), "x").unwrap(),
                Path::new("/a/b")
            );
        }
    }

    #[test]
    fn a_path_cannot_leave_the_hierarchy() {
        for given in ["/a/../b", "../b", "/", "."] {
            assert!(
                Cgroup::path_for(Some(Path::new(given)), "x").is_err(),
                "{given}"
            );
        }
    }

    #[test]
    fn the_systemd_form_is_told_apart() {
        let error = Cgroup::path_for(Some(Path::new("user.slice:rt:c1")), "c1").unwrap_err();
        assert!(
            error.to_string().contains("cgroup driver to cgroupfs"),
            "{error}"
        );
    }
}
