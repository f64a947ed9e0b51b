//! Which namespaces a new process is made in, and how to join those of another.
//!
//! The new ones of a container's first process come with clone3(2), all in one call. Existing ones are joined by a helper
//! process in between, so that the runtime itself never leaves its own.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};

use crate::error::{Context, Error};
use crate::spec::path_of;

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

/// The pid namespace that this process's next children get; put back when dropped.
///
/// A process enters it only by being born in it, so the parent must choose it.
#[derive(Default)]
pub(crate) struct ForChildren {
    own_pid: Option<OwnedFd>,
}

impl ForChildren {
    /// Chooses the pid namespace of the process behind a descriptor.
    pub(crate) fn of_process(pidfd: BorrowedFd<'_>, flags: CloneFlags) -> Result<Self, Error> {
        let mut chosen = Self::default();
        if flags.contains(CloneFlags::CLONE_NEWPID) {
            let path = "/proc/self/ns/pid";
            let own = File::open(path).context(|| format!("cannot open {path}"))?;
            chosen.own_pid = Some(own.into());
            join(pidfd, CloneFlags::CLONE_NEWPID)?;
        }
        Ok(chosen)
    }
}

impl Drop for ForChildren {
    fn drop(&mut self) {
        // Coming home is always granted; were it not, the next child would fail to find its parent's namespace.
        if let Some(own) = &self.own_pid {
            let _ = setns(own.as_fd(), CloneFlags::CLONE_NEWPID);
        }
    }
}

/// The namespaces of a container's first process.
pub(crate) struct Namespaces {
    /// Flags of clone3(2) for the new ones that it is born into.
    pub(crate) birth: u64,
    /// Existing ones, by their kind in config.json; the user namespace, if it is one of them, last.
    joined: Vec<(LinuxNamespaceType, OwnedFd)>,
    /// A new one of the cgroup, made when the process is in its cgroup: what that is becomes its root.
    new_cgroup: bool,
    /// A new one of the clocks, with the text for its offsets. A process is born into it only after another made it.
    new_time: Option<String>,
}

impl Namespaces {
    pub(crate) fn of_spec(spec: &Spec) -> Result<Self, Error> {
        let mut found = Self {
            birth: 0,
            joined: Vec::new(),
            new_cgroup: false,
            new_time: None,
        };
        let linux = spec.linux().as_ref();
        let all = linux.and_then(|linux| linux.namespaces().as_ref());
        for one in all.into_iter().flatten() {
            if let Some(path) = path_of(one) {
                let file = File::open(path).context(|| {
                    format!("cannot open the {} namespace {}", one.typ(), path.display())
                })?;
                found.joined.push((one.typ(), file.into()));
                continue;
            }
            match one.typ() {
                LinuxNamespaceType::Cgroup => found.new_cgroup = true,
                LinuxNamespaceType::Time => found.new_time = Some(time_offsets(spec)?),
                other => found.birth |= flag(other).bits() as u64,
            }
        }
        found
            .joined
            .sort_by_key(|(kind, _)| *kind == LinuxNamespaceType::User);
        Ok(found)
    }

    /// Whether the first process is in another user namespace than the runtime.
    pub(crate) fn has_user(&self) -> bool {
        self.new_user() || self.joins_user()
    }

    /// Whether it is born into a new user namespace, which needs id maps.
    pub(crate) fn new_user(&self) -> bool {
        self.birth & libc::CLONE_NEWUSER as u64 != 0
    }

    fn joins_user(&self) -> bool {
        matches!(self.joined.last(), Some((LinuxNamespaceType::User, _)))
    }

    /// Whether a helper must prepare the birth.
    pub(crate) fn need_helper(&self) -> bool {
        !self.joined.is_empty() || self.new_time.is_some()
    }

    /// The helper's part: joins what exists, so that its child is born there.
    pub(crate) fn join_existing(&self) -> Result<(), Error> {
        let join = |(kind, file): &(LinuxNamespaceType, OwnedFd)| {
            setns(file.as_fd(), flag(*kind)).context(|| format!("cannot join the {kind} namespace"))
        };
        // Some belong to the host and are to be joined with its rights, others to the user namespace that is joined too.
        let (user, others) = match self.joins_user() {
            true => self.joined.split_last(),
            false => None,
        }
        .map_or((None, self.joined.as_slice()), |(user, others)| {
            (Some(user), others)
        });
        let mut left = Vec::new();
        for one in others {
            match join(one) {
                Err(_) if user.is_some() => left.push(one),
                other => other?,
            }
        }
        if let Some(user) = user {
            join(user)?;
            become_root()?;
        }
        left.into_iter().try_for_each(join)?;
        if let Some(offsets) = &self.new_time {
            nix::sched::unshare(NEWTIME).context(|| "cannot make a time namespace".to_owned())?;
            if !offsets.is_empty() {
                fs::write("/proc/self/timens_offsets", offsets)
                    .context(|| "cannot set linux.timeOffsets".to_owned())?;
            }
        }
        Ok(())
    }

    /// The first process's own part, when it is in its cgroup.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        if self.new_cgroup {
            nix::sched::unshare(CloneFlags::CLONE_NEWCGROUP)
                .context(|| "cannot make a cgroup namespace".to_owned())?;
        }
        Ok(())
    }
}

fn flag(kind: LinuxNamespaceType) -> CloneFlags {
    match kind {
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::Time => NEWTIME,
    }
}

fn time_offsets(spec: &Spec) -> Result<String, Error> {
    let linux = spec.linux().as_ref();
    let offsets = linux.and_then(|linux| linux.time_offsets().as_ref());
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
    Ok(lines)
}

/// Writes the id maps of a new user namespace.
///
/// An ordinary user may map its own id alone; more are written by newuidmap(1) and newgidmap(1), which ask the system
/// for the user's subordinate ids.
pub(crate) fn write_id_maps(pid: Pid, spec: &Spec) -> Result<(), Error> {
    let Some(linux) = spec.linux() else {
        return Ok(());
    };
    let ordinary = !nix::unistd::geteuid().is_root();
    for (file, field, map, helper, own) in [
        (
            "gid_map",
            "gidMappings",
            linux.gid_mappings(),
            "newgidmap",
            nix::unistd::getegid().as_raw(),
        ),
        (
            "uid_map",
            "uidMappings",
            linux.uid_mappings(),
            "newuidmap",
            nix::unistd::geteuid().as_raw(),
        ),
    ] {
        let map = map.as_deref().unwrap_or_default();
        if ordinary {
            let alone = matches!(map, [one] if one.size() == 1 && one.host_id() == own);
            if !alone {
                map_by_helper(pid, helper, field, map)?;
                continue;
            }
            if file == "gid_map" {
                // Else a member of a group could leave it, and with it what the group is denied.
                fs::write(format!("/proc/{pid}/setgroups"), "deny")
                    .context(|| "cannot deny setgroups to the user namespace".to_owned())?;
            }
        }
        let path = format!("/proc/{pid}/{file}");
        let lines = map_lines(map);
        File::options()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(lines.as_bytes()))
            .context(|| format!("cannot set linux.{field}"))?;
    }
    Ok(())
}

fn map_by_helper(pid: Pid, helper: &str, field: &str, map: &[LinuxIdMapping]) -> Result<(), Error> {
    let mut command = std::process::Command::new(helper);
    command.arg(pid.to_string());
    for one in map {
        command
            .args([one.container_id(), one.host_id(), one.size()].map(|number| number.to_string()));
    }
    let output = command.output().map_err(|error| {
        Error::unsupported(
            format!("linux.{field}"),
            format!(
                "an ordinary user can map its own id alone; more are mapped by {helper} (package uidmap), \
                 which cannot be started: {error}"
            ),
        )
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::unsupported(
        format!("linux.{field}"),
        format!("{said}; the user's ranges are in /etc/subuid and /etc/subgid"),
    ))
}

/// Id maps as the files of /proc take them.
pub(crate) fn map_lines(mappings: &[LinuxIdMapping]) -> String {
    mappings
        .iter()
        .map(|one| format!("{} {} {}\n", one.container_id(), one.host_id(), one.size()))
        .collect()
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
