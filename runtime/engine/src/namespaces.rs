//! Which namespaces a new process is made in, and how to join those of another.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};

use crate::error::{Context, Error};
use crate::spec::{namespace, path_of};

/// `CLONE_NEWTIME` is not among nix's flags.
pub(crate) const NEWTIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

/// The namespaces in which another process is and this one is not.
pub(crate) fn foreign(pid: Pid) -> Result<CloneFlags, Error> {
    let kinds = [
        ("user", CloneFlags::CLONE_NEWUSER),
        ("mnt", CloneFlags::CLONE_NEWNS),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("net", CloneFlags::CLONE_NEWNET),
        ("cgroup", CloneFlags::CLONE_NEWCGROUP),
        ("time", NEWTIME),
    ];
    let mut foreign = CloneFlags::empty();
    for (name, flag) in kinds {
        let theirs = format!("/proc/{pid}/ns/{name}");
        let (Ok(ours), theirs) = (fs::metadata(format!("/proc/self/ns/{name}")), &theirs) else {
            // The kernel does not have this kind.
            continue;
        };
        let theirs = fs::metadata(theirs).context(|| format!("cannot look at {theirs}"))?;
        if (ours.dev(), ours.ino()) != (theirs.dev(), theirs.ino()) {
            foreign |= flag;
        }
    }
    Ok(foreign)
}

/// Joins namespaces of the process behind a descriptor, all at once.
pub(crate) fn join(pidfd: BorrowedFd<'_>, flags: CloneFlags) -> Result<(), Error> {
    if flags.is_empty() {
        return Ok(());
    }
    setns(pidfd, flags).context(|| "cannot join the container's namespaces".to_owned())
}

/// The pid and time namespaces that this process's next children get; put back when dropped.
///
/// A process enters these two kinds only by being born in them, so the parent must choose them.
#[derive(Default)]
pub(crate) struct ForChildren {
    own_pid: Option<OwnedFd>,
    own_time: Option<OwnedFd>,
}

impl ForChildren {
    /// Chooses the namespaces for the first process of a container.
    pub(crate) fn of_spec(spec: &Spec) -> Result<Self, Error> {
        let mut chosen = Self::default();
        if let Some(pid) = namespace(spec, LinuxNamespaceType::Pid)
            && let Some(path) = path_of(pid)
        {
            let what = || format!("cannot join the pid namespace {}", path.display());
            let target = File::open(path).context(what)?;
            chosen.keep_pid()?;
            setns(&target, CloneFlags::CLONE_NEWPID).context(what)?;
        }
        if let Some(time) = namespace(spec, LinuxNamespaceType::Time) {
            chosen.own_time = Some(own("time")?);
            match path_of(time) {
                Some(path) => {
                    let what = || format!("cannot join the time namespace {}", path.display());
                    let target = File::open(path).context(what)?;
                    setns(&target, NEWTIME).context(what)?;
                }
                None => new_time(spec)?,
            }
        }
        Ok(chosen)
    }

    /// Chooses the pid namespace of the process behind a descriptor.
    pub(crate) fn of_process(pidfd: BorrowedFd<'_>, flags: CloneFlags) -> Result<Self, Error> {
        let mut chosen = Self::default();
        if flags.contains(CloneFlags::CLONE_NEWPID) {
            chosen.keep_pid()?;
            join(pidfd, CloneFlags::CLONE_NEWPID)?;
        }
        Ok(chosen)
    }

    fn keep_pid(&mut self) -> Result<(), Error> {
        self.own_pid = Some(own("pid")?);
        Ok(())
    }
}

impl Drop for ForChildren {
    fn drop(&mut self) {
        // Coming home is always granted; were it not, the next child would fail to find its parent's namespace.
        if let Some(own) = &self.own_pid {
            let _ = setns(own.as_fd(), CloneFlags::CLONE_NEWPID);
        }
        if let Some(own) = &self.own_time {
            let _ = setns(own.as_fd(), NEWTIME);
        }
    }
}

fn own(name: &str) -> Result<OwnedFd, Error> {
    let path = format!("/proc/self/ns/{name}");
    let file = File::open(&path).context(|| format!("cannot open {path}"))?;
    Ok(file.into())
}

fn new_time(spec: &Spec) -> Result<(), Error> {
    // SAFETY: no memory is passed.
    if unsafe { libc::unshare(libc::CLONE_NEWTIME) } < 0 {
        return Err(std::io::Error::last_os_error())
            .context(|| "cannot make a time namespace".to_owned());
    }
    let offsets = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.time_offsets().as_ref());
    let mut lines = String::new();
    for (clock, offset) in offsets.into_iter().flatten() {
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(Error::unsupported(
                format!("linux.timeOffsets.{clock}"),
                "the clock must be monotonic or boottime",
            ));
        }
        let seconds = offset.secs().unwrap_or_default();
        let nanoseconds = offset.nanosecs().unwrap_or_default();
        lines.push_str(&format!("{clock} {seconds} {nanoseconds}\n"));
    }
    if !lines.is_empty() {
        fs::write("/proc/self/timens_offsets", lines)
            .context(|| "cannot set linux.timeOffsets".to_owned())?;
    }
    Ok(())
}

/// Writes the id maps of a new user namespace.
pub(crate) fn write_id_maps(pid: Pid, spec: &Spec) -> Result<(), Error> {
    let Some(linux) = spec.linux() else {
        return Ok(());
    };
    for (file, field, map) in [
        ("gid_map", "gidMappings", linux.gid_mappings()),
        ("uid_map", "uidMappings", linux.uid_mappings()),
    ] {
        let path = format!("/proc/{pid}/{file}");
        let lines: String = map.iter().flatten().map(line).collect();
        File::options()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(lines.as_bytes()))
            .context(|| format!("cannot set linux.{field}"))?;
    }
    Ok(())
}

fn line(mapping: &LinuxIdMapping) -> String {
    format!(
        "{} {} {}\n",
        mapping.container_id(),
        mapping.host_id(),
        mapping.size()
    )
}

/// A user namespace to join by its path.
pub(crate) fn joined_user(spec: &Spec) -> Result<Option<OwnedFd>, Error> {
    let Some(path) = namespace(spec, LinuxNamespaceType::User).and_then(path_of) else {
        return Ok(None);
    };
    let file = File::open(path)
        .context(|| format!("cannot open the user namespace {}", path.display()))?;
    Ok(Some(file.into()))
}

/// The flags of clone3(2) for the namespaces that the first process is born into.
pub(crate) fn birth_flags(spec: &Spec) -> u64 {
    let new = |kind| namespace(spec, kind).is_some_and(|one| path_of(one).is_none());
    let mut flags = 0;
    if new(LinuxNamespaceType::User) {
        flags |= libc::CLONE_NEWUSER as u64;
    }
    if new(LinuxNamespaceType::Pid) {
        flags |= libc::CLONE_NEWPID as u64;
    }
    flags
}

/// Becomes root of the user namespace that this process is in.
pub(crate) fn become_root() -> Result<(), Error> {
    let root = nix::unistd::Gid::from_raw(0);
    nix::unistd::setresgid(root, root, root)
        .context(|| "cannot become group 0 of the user namespace".to_owned())?;
    let root = nix::unistd::Uid::from_raw(0);
    nix::unistd::setresuid(root, root, root)
        .context(|| "cannot become user 0 of the user namespace".to_owned())
}

/// Joins the user namespace behind a descriptor.
pub(crate) fn join_user(user: &OwnedFd) -> Result<(), Error> {
    setns(user.as_fd(), CloneFlags::CLONE_NEWUSER)
        .context(|| format!("cannot join the user namespace ({})", user.as_raw_fd()))
}
