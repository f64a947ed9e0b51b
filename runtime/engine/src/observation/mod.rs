//! What the kernel says of a container's processes, word for word, for whoever compares it with what was asked for.
//!
//! It reads and changes nothing; only for a seccomp filter is the process held for a moment, as by a debugger. The
//! processes are hostile: nothing is looked up in their root, and what they can make long is bounded. It runs in the
//! guest too, from where its answer is as trusted as the guest.

mod descriptors;
mod filters;
mod limits;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::Pid;
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error};

/// How many bytes of a file are read.
const TEXT_LIMIT: u64 = 4 << 20;

/// How many threads are looked at.
const THREAD_LIMIT: usize = 4096;

/// The lines of a thread's status that are about its rights, and its name.
const RIGHTS: [&str; 6] = ["Name:", "Uid:", "Gid:", "Cap", "NoNewPrivs:", "Seccomp"];

/// Files of the kernel that tell of it or change it; those that a kernel does not have need not be hidden.
const SENSITIVE: [&str; 20] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/bus",
    "/proc/fs",
    "/proc/interrupts",
    "/proc/irq",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kmsg",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/sys",
    "/proc/sysrq-trigger",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/kernel",
    "/sys/module",
];

/// What was read.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Observation {
    /// The process that the rest is about: the container's first.
    pub pid: i32,
    /// `/proc/version`.
    pub kernel: String,
    /// The inode numbers of its namespaces, and of those of the system's first process and ours; by the names of
    /// /proc/pid/ns.
    pub namespaces: BTreeMap<String, Namespace>,
    /// `/proc/pid/uid_map`.
    pub uid_map: String,
    /// `/proc/pid/mountinfo`.
    pub mounts: String,
    /// The same of the system's first process.
    pub host_mounts: String,
    /// `/proc/pid/attr/current`, where there is a security module that has it.
    pub label: Option<String>,
    /// Every thread of every process.
    pub threads: Vec<Thread>,
    /// `/proc/pid/oom_score_adj`.
    pub oom_score: i32,
    /// Which of the kernel's sensitive files, and of those that the configuration names, there are not.
    pub absent: Vec<String>,
    /// Descriptors, working directories and roots that are in none of the process's mounts.
    pub outside: Vec<Outside>,
    /// The devices that may be used, in the form of the devices cgroup: `c 1:3 rwm`. `Err`: why that is not known.
    pub devices: Result<Vec<String>, String>,
    /// The limits in force, also those of cgroups above.
    pub limits: Limits,
    /// The seccomp filters of the process, the newest first. `Err`: why they cannot be read.
    pub seccomp: Result<Vec<Vec<Instruction>>, String>,
}

/// A namespace's identity.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Namespace {
    /// The process's.
    pub own: u64,
    /// Those of the system's first process and of the one that looks.
    pub host: Vec<u64>,
}

/// A thread.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Thread {
    /// Its process.
    pub pid: i32,
    /// Its own id.
    pub tid: i32,
    /// The lines of `/proc/pid/task/tid/status` that are about its rights.
    pub status: String,
}

/// Something held outside the container.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Outside {
    /// The file of /proc that leads there.
    pub at: String,
    /// Where it leads.
    pub target: String,
}

/// Limits in force; `None`: there is none.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Processor time, in thousandths of a processor.
    pub cpu: Option<u64>,
}

/// An instruction of a filter (`struct sock_filter`).
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Instruction(pub u16, pub u8, pub u8, pub u32);

/// Looks at the process `pid`, and at the threads and descriptors of `others`, which are of the same container. `spec` is
/// what it was made from, if that is known: which of the paths to be hidden there are is then told too.
///
/// # Errors
/// The process is not there, or its files cannot be read by this user.
pub fn observe(pid: Pid, others: &[Pid], spec: Option<&Spec>) -> Result<Observation, Error> {
    let file = |name: &str| format!("/proc/{pid}/{name}");
    let text = |name: &str| {
        let path = file(name);
        read(&path).context(|| format!("cannot read {path}"))
    };
    let mounts = text("mountinfo")?;
    let host_mounts = host_mounts().context(|| "cannot read /proc/self/mountinfo".to_owned())?;
    let mut processes = vec![pid];
    processes.extend(others.iter().filter(|other| **other != pid));
    let status = text("status")?;
    let cgroups = limits::Cgroups::of(&text("cgroup")?);
    Ok(Observation {
        pid: pid.as_raw(),
        kernel: read("/proc/version").unwrap_or_default().trim().to_owned(),
        namespaces: namespaces(pid)?,
        uid_map: text("uid_map")?,
        outside: descriptors::outside(&processes, &mounts, &host_mounts),
        host_mounts,
        mounts,
        label: label(&file("attr/current")),
        threads: threads(&processes),
        oom_score: text("oom_score_adj")?.trim().parse().unwrap_or(0),
        absent: absent(spec),
        devices: cgroups.devices(),
        limits: cgroups.limits(),
        seccomp: if cgroups.are_frozen_by_v1() {
            Err("the container is paused".to_owned())
        } else {
            filters::read(pid, &status)
        },
    })
}

/// What a process holds outside its own mounts, as [`Observation::outside`].
///
/// # Errors
/// Its mounts or the system's cannot be read.
pub fn outside(process: Pid) -> io::Result<Vec<Outside>> {
    let mounts = read(&format!("/proc/{process}/mountinfo"))?;
    Ok(descriptors::outside(&[process], &mounts, &host_mounts()?))
}

/// The mounts of the system's first process.
fn host_mounts() -> io::Result<String> {
    read("/proc/1/mountinfo").or_else(|_| read("/proc/self/mountinfo"))
}

/// The seccomp filters of a thread, the newest first. `Err`: why they cannot be read.
///
/// # Errors
/// As [`Observation::seccomp`].
pub fn filters_of(tid: i32) -> Result<Vec<Vec<Instruction>>, String> {
    let status = read(&format!("/proc/{tid}/status")).map_err(|error| error.to_string())?;
    filters::read(Pid::from_raw(tid), &status)
}

fn read(path: &str) -> io::Result<String> {
    let mut text = Vec::new();
    fs::File::open(path)?
        .take(TEXT_LIMIT)
        .read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// An unconfined process has the label `unconfined`; without a module, or with one that labels nothing, there is none.
fn label(path: &str) -> Option<String> {
    let text = read(path).ok()?;
    let text = text.trim_matches(['\0', '\n', ' ']);
    (!text.is_empty()).then(|| text.to_owned())
}

/// Which of the kernel's files that are sensitive, or to be hidden or protected, there are not.
fn absent(spec: Option<&Spec>) -> Vec<String> {
    let linux = spec.and_then(|spec| spec.linux().as_ref());
    let lists = linux.map(|linux| [linux.masked_paths(), linux.readonly_paths()]);
    let named = lists.into_iter().flatten().flatten().flatten();
    let known = SENSITIVE.into_iter().chain(named.map(String::as_str));
    known
        .filter(|path| !Path::new(path).exists())
        .map(str::to_owned)
        .collect()
}

fn namespaces(pid: Pid) -> Result<BTreeMap<String, Namespace>, Error> {
    let id = |process: &str, name: &str| {
        let path = format!("/proc/{process}/ns/{name}");
        let metadata = fs::metadata(&path);
        metadata
            .map(|file| file.ino())
            .context(|| format!("cannot look at {path}"))
    };
    let mut all = BTreeMap::new();
    for name in ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"] {
        let own = match id(&pid.to_string(), name) {
            Ok(own) => own,
            // A kernel without this kind.
            Err(_) if !Path::new(&format!("/proc/self/ns/{name}")).exists() => continue,
            Err(error) => return Err(error),
        };
        let host = ["1", "self"].into_iter();
        let host = host.filter_map(|process| id(process, name).ok()).collect();
        all.insert(name.to_owned(), Namespace { own, host });
    }
    Ok(all)
}

fn threads(processes: &[Pid]) -> Vec<Thread> {
    let mut threads = Vec::new();
    for pid in processes {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else {
            continue;
        };
        for entry in entries.flatten() {
            if threads.len() == THREAD_LIMIT {
                return threads;
            }
            let name = entry.file_name();
            let Some(tid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // One that ended meanwhile does nothing any more.
            if let Ok(status) = read(&format!("/proc/{pid}/task/{tid}/status")) {
                let is_right = |line: &&str| RIGHTS.iter().any(|name| line.starts_with(name));
                let lines: Vec<&str> = status.lines().filter(is_right).collect();
                threads.push(Thread {
                    pid: pid.as_raw(),
                    tid,
                    status: lines.join("\n"),
                });
            }
        }
    }
    threads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_in_the_hosts_namespaces_and_holds_nothing_outside() {
        // What a descriptor of memory leads to is nothing of the host's.
        let _memory =
            nix::sys::memfd::memfd_create(c"name", nix::sys::memfd::MemFdCreateFlag::empty())
                .unwrap();
        let seen = observe(nix::unistd::getpid(), &[], None).unwrap();
        assert!(
            seen.namespaces
                .values()
                .all(|one| one.host.contains(&one.own))
        );
        assert!(seen.threads.iter().any(|one| one.tid == seen.pid));
        assert!(seen.kernel.starts_with("Linux version"));
        assert!(seen.outside.is_empty(), "{:?}", seen.outside);
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error_that_names_its_file() {
        let error = observe(Pid::from_raw(i32::MAX), &[], None).unwrap_err();
        let text = crate::error_chain(&error);
        assert!(
            text.starts_with("cannot read /proc/2147483647/mountinfo: "),
            "{text}"
        );
    }
}
