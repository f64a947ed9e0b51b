//! Which processes are a container's, and which of their threads are elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::Pid;

use super::{Namespace, Stray, StrayKind, Thread, read};
use crate::error::{Context, Error};

/// How many threads are looked at.
const THREAD_LIMIT: usize = 4096;

/// How many processes of the system are looked at.
const PROCESS_LIMIT: usize = 1 << 17;

/// How many kinds of resource limits are told.
const RLIMITS_LIMIT: usize = 64;

/// How many strays are told.
const STRAY_LIMIT: usize = 64;

/// The lines of a thread's status that are about its rights, and its name.
const RIGHTS: [&str; 7] = [
    "Name:",
    "Uid:",
    "Gid:",
    "Groups:",
    "Cap",
    "NoNewPrivs:",
    "Seccomp",
];

/// The kinds of namespaces, as /proc/pid/ns names them.
pub(super) const KINDS: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// The kernel gives its first namespaces numbers below this one, and all others from it on (`linux/proc_ns.h`). Before
/// Linux 6.18 the first of `mnt` and `net` are numbered as the others.
const FIRST_OF_OTHERS: u64 = 0xF000_0000;

/// The first thread of the kernel's own, which is in the first namespaces.
const KTHREADD: &str = "2";

fn id(process: &str, kind: &str) -> io::Result<u64> {
    Ok(fs::metadata(format!("/proc/{process}/ns/{kind}"))?.ino())
}

/// The namespace that the kernel opens for a `request` of this file: of a socket its network, of a namespace its owner.
pub(super) fn related(file: &impl AsRawFd, request: libc::Ioctl) -> io::Result<u64> {
    // SAFETY: these requests take no argument, and answer with a new descriptor.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), request) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just opened it, for nobody else.
    let namespace = unsafe { File::from_raw_fd(answer) };
    Ok(namespace.metadata()?.ino())
}

/// The user namespace in which a process was born, as far as that is told: that of its pid namespace, which it cannot
/// leave, unless it `joined` one; else of its mount namespace.
pub(super) fn user_namespace_of(
    pid: Pid,
    namespaces: &BTreeMap<String, Namespace>,
    joined: bool,
) -> Option<u64> {
    let own = namespaces.get("user")?.own;
    let kinds = if joined {
        &["mnt"][..]
    } else {
        &["pid", "mnt"]
    };
    let is_new = |kind: &&&str| {
        let known = namespaces.get(**kind);
        known.is_some_and(|one| !one.host.contains(&one.own))
    };
    let kind = kinds.iter().find(is_new)?;
    let file = File::open(format!("/proc/{pid}/ns/{kind}")).ok()?;
    let owner = related(&file, libc::NS_GET_USERNS).ok()?;
    (owner != own).then_some(owner)
}

/// The namespaces of a process that it made for itself, since they are owned by a user namespace that it made. `born_in`:
/// the user namespace that it left for that.
pub(super) fn left(
    pid: Pid,
    namespaces: &BTreeMap<String, Namespace>,
    born_in: Option<u64>,
) -> BTreeSet<String> {
    let own = namespaces.get("user").filter(|_| born_in.is_some());
    let Some(own) = own.map(|one| one.own) else {
        return BTreeSet::new();
    };
    let is_its_own = |kind: &&String| {
        let file = File::open(format!("/proc/{pid}/ns/{kind}"));
        let owner = file.and_then(|file| related(&file, libc::NS_GET_USERNS));
        *kind == "user" || owner.is_ok_and(|owner| owner == own)
    };
    namespaces.keys().filter(is_its_own).cloned().collect()
}

/// The namespaces of a process, and those of the host.
pub(super) fn namespaces(pid: Pid) -> Result<BTreeMap<String, Namespace>, Error> {
    let is_kernels = read(&format!("/proc/{KTHREADD}/comm")).is_ok_and(|name| name == "kthreadd\n");
    let mut all = BTreeMap::new();
    for kind in KINDS {
        let own = match id(&pid.to_string(), kind) {
            Ok(own) => own,
            // A kernel without this kind.
            Err(_) if !Path::new(&format!("/proc/self/ns/{kind}")).exists() => continue,
            Err(error) => {
                return Err(error).context(|| format!("cannot look at /proc/{pid}/ns/{kind}"));
            }
        };
        let witnesses = ["1", KTHREADD].into_iter();
        let witnesses = witnesses.filter(|process| *process != KTHREADD || is_kernels);
        let mut host: Vec<u64> = witnesses
            .filter_map(|process| id(process, kind).ok())
            .collect();
        // Ours alone is no witness: we may be in a container, too.
        let ours = id("self", kind).ok();
        let is_numbered = |id: u64| id < FIRST_OF_OTHERS;
        let is_host_known = !host.is_empty()
            || !matches!(kind, "mnt" | "net")
            || is_numbered(own)
            || ours.is_some_and(is_numbered);
        host.extend(ours);
        host.extend(is_numbered(own).then_some(own));
        host.sort_unstable();
        host.dedup();
        all.insert(
            kind.to_owned(),
            Namespace {
                own,
                host,
                is_host_known,
            },
        );
    }
    Ok(all)
}

/// The processes of the system in a container's mount namespace, and those in its pid namespace alone; as far as these are
/// not the host's. `Err`: there are too many to look at.
pub(super) struct Sharing {
    pub(super) mounts: Vec<Pid>,
    pub(super) pids: Vec<Pid>,
    pub(super) all: Result<(), String>,
}

impl Sharing {
    pub(super) fn of(namespaces: &BTreeMap<String, Namespace>) -> Self {
        let own = |kind: &str| {
            let one = namespaces.get(kind)?;
            (!one.host.contains(&one.own)).then_some(one.own)
        };
        let (mounts, pids) = (own("mnt"), own("pid"));
        let mut found = Self {
            mounts: Vec::new(),
            pids: Vec::new(),
            all: Ok(()),
        };
        if mounts.is_none() && pids.is_none() {
            return found;
        }
        for (count, pid) in numbers("/proc").enumerate() {
            if count == PROCESS_LIMIT {
                found.all = Err(format!("more than {PROCESS_LIMIT} processes"));
                break;
            }
            let process = pid.to_string();
            let is_in = |kind: &str, own: Option<u64>| {
                own.is_some_and(|own| id(&process, kind).is_ok_and(|id| id == own))
            };
            if is_in("mnt", mounts) {
                found.mounts.push(Pid::from_raw(pid));
            } else if is_in("pid", pids) && !has_ended(&format!("/proc/{pid}")) {
                found.pids.push(Pid::from_raw(pid));
            }
        }
        found
    }
}

/// Whether a process or thread has ended, and waits to be waited for: it is in no namespace any more, and does nothing.
fn has_ended(directory: &str) -> bool {
    let found = fs::metadata(format!("{directory}/ns/mnt"));
    found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Whether a process is in the cgroups of another, or below them.
pub(super) fn is_in_cgroups_of(pid: Pid, other: Pid) -> bool {
    let text = |pid: Pid| read(&format!("/proc/{pid}/cgroup")).unwrap_or_default();
    are_below(&text(pid), &text(other), false)
}

/// The numbers among the names in a directory of /proc.
pub(super) fn numbers(directory: &str) -> impl Iterator<Item = i32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The threads of `processes`. `Err`: there are too many to look at.
pub(super) fn threads(processes: &[Pid]) -> (Vec<Thread>, Result<(), String>) {
    let mut threads = Vec::new();
    for pid in processes {
        for tid in numbers(&format!("/proc/{pid}/task")) {
            // One that ended meanwhile does nothing any more.
            let Ok(status) = read(&format!("/proc/{pid}/task/{tid}/status")) else {
                continue;
            };
            if threads.len() == THREAD_LIMIT {
                return (threads, Err(format!("more than {THREAD_LIMIT} threads")));
            }
            let is_right = |line: &&str| RIGHTS.iter().any(|name| line.starts_with(name));
            let lines: Vec<&str> = status.lines().filter(is_right).collect();
            threads.push(Thread {
                pid: pid.as_raw(),
                tid,
                status: lines.join("\n"),
            });
        }
    }
    (threads, Ok(()))
}

/// The texts of /proc/pid/limits that differ from `first`, each once. `Err`: there are too many.
pub(super) fn other_rlimits(
    processes: &[Pid],
    first: &str,
) -> (Vec<(i32, String)>, Result<(), String>) {
    let mut found: Vec<(i32, String)> = Vec::new();
    for pid in processes {
        // One that ended meanwhile needs nothing any more.
        let Ok(text) = read(&format!("/proc/{pid}/limits")) else {
            continue;
        };
        if text == first || found.iter().any(|(_, known)| *known == text) {
            continue;
        }
        if found.len() == RLIMITS_LIMIT {
            let why = format!("more than {RLIMITS_LIMIT} kinds of resource limits");
            return (found, Err(why));
        }
        found.push((pid.as_raw(), text));
    }
    (found, Ok(()))
}

/// The threads that are elsewhere than the first process: in other namespaces, or in a cgroup that is not below its own.
/// `members`: the processes that are known to be of the container's cgroup, if that is known. `born_in`: the user namespace
/// of the container, where its first process is in another now.
pub(super) fn strays(
    pid: Pid,
    members: &[Pid],
    threads: &[Thread],
    namespaces: &BTreeMap<String, Namespace>,
    born_in: Option<u64>,
) -> Vec<Stray> {
    let own_cgroups = read(&format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let mut found: Vec<Stray> = Vec::new();
    for thread in threads {
        let directory = format!("/proc/{}/task/{}", thread.pid, thread.tid);
        // What is left of one is in the root of all cgroups.
        if has_ended(&directory) {
            continue;
        }
        let mut push = |file: &str, kind: StrayKind| {
            // The first thread of a process stands for those that are where it is.
            let is_told = |one: &Stray| {
                one.pid == thread.pid && one.kind == kind && one.at.ends_with(&format!("/{file}"))
            };
            if found.len() < STRAY_LIMIT && !found.iter().any(is_told) {
                found.push(Stray {
                    pid: thread.pid,
                    at: format!("{directory}/{file}"),
                    kind,
                });
            }
        };
        for (kind, one) in namespaces {
            let Ok(theirs) = fs::metadata(format!("{directory}/ns/{kind}")) else {
                continue;
            };
            let born_in = born_in.filter(|_| kind == "user");
            if theirs.ino() == born_in.unwrap_or(one.own) {
                continue;
            }
            let kind_of = if one.host.contains(&theirs.ino()) {
                StrayKind::InTheHosts
            } else {
                StrayKind::InAnother
            };
            push(&format!("ns/{kind}"), kind_of);
        }
        let Ok(cgroups) = read(&format!("{directory}/cgroup")) else {
            continue;
        };
        let is_member = members.iter().any(|pid| pid.as_raw() == thread.pid);
        if !are_below(&own_cgroups, &cgroups, is_member) {
            push("cgroup", StrayKind::Outside);
        }
    }
    found
}

/// Whether each of a thread's cgroups is one of `own`, or below it. Those of the version 2 hierarchy, and of one without a
/// controller, may be moved about by who has them delegated: of a `member` they are known to be the container's.
fn are_below(own: &str, cgroups: &str, is_member: bool) -> bool {
    let own: BTreeMap<&str, &str> = own.lines().filter_map(split).collect();
    cgroups.lines().filter_map(split).all(|(names, path)| {
        let is_delegated = names.is_empty() || names.starts_with("name=");
        (is_member && is_delegated)
            || own
                .get(names)
                .is_none_or(|own| Path::new(path).starts_with(own))
    })
}

/// cgroups(7): `number:controllers:path`.
fn split(line: &str) -> Option<(&str, &str)> {
    line.split_once(':')?.1.split_once(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_below_its_containers_cgroups_in_each_hierarchy() {
        let own = "4:pids:/c\n3:cpu,cpuacct:/c\n2:name=systemd:/c/init\n0::/c/init\n";
        let is_below = |cgroups: &str, is_member| are_below(own, cgroups, is_member);
        assert!(is_below(own, false));
        assert!(is_below("4:pids:/c/a\n0::/c/init/b\n", false));
        assert!(!is_below("4:pids:/\n0::/c/init\n", true));
        assert!(!is_below("4:pids:/cc\n", true));
        assert!(!is_below("0::/c/other\n", false));
        assert!(is_below("2:name=systemd:/c/x\n0::/c/other\n", true));
    }
}
