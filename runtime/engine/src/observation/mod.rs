//! What the kernel says of a container's processes, word for word, for whoever compares it with what was asked for.
//!
//! It reads and changes nothing; only for a seccomp filter is a thread held for a moment, as by a debugger, and a socket is
//! asked by a copy of its descriptor. The processes are hostile: what is looked up in their root cannot lead out of it and
//! is not opened, what they can make long is bounded, and where a bound was met that is told. It runs in the guest too, from
//! where its answer is as trusted as the guest.

mod descriptors;
mod filters;
mod id_maps;
mod limits;
mod objects;
mod places;
mod processes;
mod sockets;
mod sysctls;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error};
use crate::spec::{namespace, path_of};
use descriptors::{Container, Extent};
pub use objects::{Needs, needs};

/// How long a container that is observed may take to run its program.
const PROGRAM_PATIENCE: Duration = Duration::from_secs(2);

/// How many bytes of a file are read.
const TEXT_LIMIT: u64 = 4 << 20;

/// An option in mountinfo.
const IS_MAPPED: &str = "idmapped";

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
    /// Those of its namespaces that it made for itself, as far as that is seen: they are not its container's.
    pub left: BTreeSet<String>,
    /// `/proc/pid/uid_map`.
    pub uid_map: String,
    /// `/proc/pid/gid_map`.
    pub gid_map: String,
    /// `/proc/pid/limits`.
    pub rlimits: String,
    /// The same of other processes, one for each text that differs.
    pub other_rlimits: Vec<(i32, String)>,
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
    /// What is at the kernel's sensitive files, at the paths that the configuration names, and at each mount point.
    pub places: Vec<Place>,
    /// Whether nothing is above the root, as after pivot_root(2): whoever only called chroot(2) gets out by calling it
    /// again. `Err`: why that is not known.
    pub root_is_top: Result<bool, String>,
    /// Descriptors, directories, programs and mappings that are in none of the process's mounts, sockets of another
    /// network, namespaces of the host, and processes that are not the container's.
    pub outside: Vec<Outside>,
    /// Objects of the kernel that processes hold, of which nobody tells who made them: bpf programs and maps, perf events,
    /// io_urings and the like, and namespaces that are neither the process's nor the host's.
    pub objects: Vec<Outside>,
    /// Threads that are elsewhere than the process.
    pub strays: Vec<Stray>,
    /// The devices that may be used, in the form of the devices cgroup: `c 1:3 rwm`. `Err`: why that is not known.
    pub devices: Result<Vec<String>, String>,
    /// The limits in force, also those of cgroups above.
    pub limits: Limits,
    /// The files of the cgroup that have the limits which the configuration asks for beside those: of each what it says in
    /// the process's cgroup, and in those above.
    pub cgroup: BTreeMap<String, Vec<String>>,
    /// The kernel parameters that the configuration names, in the process's namespaces. `Err`: why one is not known.
    pub sysctls: BTreeMap<String, Result<String, String>>,
    /// The seccomp filters of the process, the newest first. `Err`: why they cannot be read.
    pub seccomp: Result<Vec<Vec<Instruction>>, String>,
    /// The filters of other threads, a thread for each kind that is not the process's.
    pub other_filters: Vec<ThreadFilters>,
    /// What was not looked at whole, and why.
    pub unseen: BTreeMap<Topic, String>,
}

/// What can be too much to be looked at whole.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Topic {
    /// `mounts`, and `places`.
    Mounts,
    /// `threads`.
    Threads,
    /// `outside`.
    Descriptors,
    /// `strays`.
    Processes,
    /// `other_filters`.
    Filters,
}

/// A namespace's identity.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Namespace {
    /// The process's.
    pub own: u64,
    /// Those of the system's first process, of the kernel's threads, and of the one that looks.
    pub host: Vec<u64>,
    /// Whether the system's first one is among them.
    pub is_host_known: bool,
}

/// A path of the container.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Place {
    /// As it is named.
    pub path: String,
    /// What a process of the container sees there. `Err`: why that is not known.
    pub found: Result<Option<Visible>, String>,
}

/// What is at a path.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Visible {
    /// The path without links, in the container's root.
    pub path: String,
    /// The mount that it is in, by its number in mountinfo.
    pub mount: u64,
    /// The type of file (`S_IFMT`).
    pub file: u32,
    /// The device that it is, if it is one.
    pub device: (u32, u32),
    /// The device that it is on.
    pub of: (u32, u32),
    /// Its inode.
    pub inode: u64,
    /// Bytes; what that means for a directory is the file system's to say.
    pub size: u64,
    /// The maps of the mount, where it has some and the kernel tells them.
    pub maps: Option<IdMaps>,
}

/// The ids that an id-mapped mount maps, in the form of `/proc/pid/uid_map`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct IdMaps {
    /// Of users.
    pub users: String,
    /// Of groups.
    pub groups: String,
}

/// Where a thread is that it should not be.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum StrayKind {
    /// In a namespace of the host.
    InTheHosts,
    /// In a namespace that is neither the container's nor the host's.
    InAnother,
    /// In a cgroup that is not the container's.
    Outside,
}

/// A thread that is elsewhere than the container's first process.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Stray {
    /// Its process.
    pub pid: i32,
    /// The file of /proc that tells.
    pub at: String,
    /// Where it is.
    pub kind: StrayKind,
}

/// The filters of a thread.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ThreadFilters {
    /// Its process.
    pub pid: i32,
    /// Its own id.
    pub tid: i32,
    /// The newest first. `Err`: why they cannot be read.
    pub filters: Result<Vec<Vec<Instruction>>, String>,
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
    /// Bytes of memory and swap space together.
    pub memory_and_swap: Option<u64>,
    /// The processors that may be used (cpuset(7), list format), if that is told.
    pub cpus: Option<String>,
    /// The nodes of memory that may be used.
    pub mems: Option<String>,
}

/// An instruction of a filter (`struct sock_filter`).
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Instruction(pub u16, pub u8, pub u8, pub u32);

/// Waits until the first process of a container runs its program. It does so a moment after the start; until then what is
/// to confine the program need not be in force. One that is not started yet is looked at as it is.
fn wait_for_program(pid: Pid) {
    let end = Instant::now() + PROGRAM_PATIENCE;
    let mut pause = Duration::from_micros(100);
    // execve(2) is told to nobody but a tracer.
    while crate::processes::has_executed_none(pid) && Instant::now() < end {
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

/// Looks at the process `pid`. `members`: the processes that are of the same container; without any it is the process
/// alone that is looked at. `spec` is what it was made from, if that is known: what is at the paths that it names is then
/// told too.
///
/// # Errors
/// The process is not there, or its files cannot be read by this user.
pub fn observe(pid: Pid, members: &[Pid], spec: Option<&Spec>) -> Result<Observation, Error> {
    wait_for_program(pid);
    let file = |name: &str| format!("/proc/{pid}/{name}");
    let text = |name: &str| {
        let path = file(name);
        read(&path).context(|| format!("cannot read {path}"))
    };
    let mut unseen = BTreeMap::new();
    let mut note = |topic: Topic, all: Result<(), String>| {
        if let Err(reason) = all {
            unseen.entry(topic).or_insert(reason);
        }
    };
    let mounts = text("mountinfo")?;
    let host_mounts = host_mounts().context(|| "cannot read /proc/self/mountinfo".to_owned())?;
    note(Topic::Mounts, is_whole(&mounts).and(is_whole(&host_mounts)));
    let status = text("status")?;
    let cgroups = limits::Cgroups::of(&text("cgroup")?);
    let namespaces = processes::namespaces(pid)?;
    let mut all = vec![pid];
    all.extend(members.iter().filter(|other| **other != pid));
    let mut guests = Vec::new();
    let joins = spec.is_some_and(joins_processes);
    if !members.is_empty() {
        let sharing = processes::Sharing::of(&namespaces);
        note(Topic::Processes, sharing.all);
        let mut found = sharing.mounts;
        let (own, others): (Vec<Pid>, Vec<Pid>) = sharing
            .pids
            .into_iter()
            .filter(|one| !joins && !all.contains(one))
            .partition(|one| processes::is_in_cgroups_of(pid, *one));
        found.extend(own);
        found.retain(|one| !all.contains(one));
        all.extend(found);
        guests = others;
    }
    let (threads, whole) = processes::threads(&all);
    note(Topic::Threads, whole);
    let born_in = processes::user_namespace_of(pid, &namespaces, joins);
    let mut left = processes::left(pid, &namespaces, born_in);
    if descriptors::has_left_its_mounts(pid, &mounts) {
        left.insert("mnt".to_owned());
    }
    let mut strays = processes::strays(pid, members, &threads, &namespaces, born_in);
    strays.extend(guests.into_iter().map(|one| Stray {
        pid: one.as_raw(),
        at: format!("/proc/{one}/cgroup"),
        kind: StrayKind::Outside,
    }));
    let rlimits = text("limits")?;
    let (other_rlimits, whole) = processes::other_rlimits(&all, &rlimits);
    note(Topic::Threads, whole);
    let uid_map = text("uid_map")?;
    // Of the container's users that of a process which left them says nothing.
    let users = born_in.map_or(uid_map.as_str(), |_| "");
    let container = Container {
        processes: &all,
        mounts: &mounts,
        has_left_its_mounts: left.contains("mnt"),
        namespaces: &namespaces,
        uid_map: users,
    };
    let (held, whole) = descriptors::outside(&container, Extent::All);
    note(Topic::Descriptors, whole);
    let mut outside = held.outside;
    let seen = places::look(pid, paths(spec, &mounts), mounts.contains(IS_MAPPED));
    note(Topic::Mounts, seen.all);
    let is_of_its_own = |one: &Namespace| !one.host.contains(&one.own);
    if seen.root_is_top == Ok(false) && namespaces.get("mnt").is_some_and(is_of_its_own) {
        outside.push(Outside {
            at: file("root"),
            target: "what is above or over the root".to_owned(),
        });
    }
    let (seccomp, other_filters) = if cgroups.are_frozen_by_v1() {
        (Err("the container is paused".to_owned()), Vec::new())
    } else {
        let first = filters::read(pid, &status);
        // Who is looked at alone is asked thread by thread.
        let others = threads
            .iter()
            .filter(|one| one.tid != pid.as_raw() && !members.is_empty());
        let (differ, whole) = filters::that_differ(&first, others);
        note(Topic::Filters, whole);
        (first, differ)
    };
    Ok(Observation {
        pid: pid.as_raw(),
        kernel: read("/proc/version").unwrap_or_default().trim().to_owned(),
        namespaces,
        left,
        uid_map,
        gid_map: text("gid_map")?,
        rlimits,
        other_rlimits,
        outside,
        objects: held.objects,
        strays,
        host_mounts,
        mounts,
        label: label(&file("attr/current")),
        threads,
        oom_score: text("oom_score_adj")?.trim().parse().unwrap_or(0),
        places: seen.places,
        root_is_top: seen.root_is_top,
        devices: cgroups.devices(),
        limits: cgroups.limits(),
        cgroup: spec.map(|spec| cgroups.files(spec)).unwrap_or_default(),
        sysctls: spec
            .map(|spec| sysctls::read(pid, spec))
            .unwrap_or_default(),
        seccomp,
        other_filters,
        unseen,
    })
}

/// The processes that are, as far as can be told, of the container that a process is of: those of its cgroup, if that is
/// not the system's or ours. `Err`: why there may be more.
pub fn companions(pid: Pid) -> (Vec<Pid>, Result<(), String>) {
    let cgroups = |process: &str| {
        let text = read(&format!("/proc/{process}/cgroup")).unwrap_or_default();
        limits::Cgroups::of(&text)
    };
    let (mut found, all) = cgroups(&pid.to_string()).processes(&cgroups("self"));
    if !found.contains(&pid) {
        found.push(pid);
    }
    (found, all)
}

/// Whether a container is to be among the processes of others.
fn joins_processes(spec: &Spec) -> bool {
    namespace(spec, LinuxNamespaceType::Pid).is_some_and(|one| path_of(one).is_some())
}

/// Whether a text that was read did not come to the bound.
fn is_whole(text: &str) -> Result<(), String> {
    let is_cut = u64::try_from(text.len()).is_ok_and(|length| length >= TEXT_LIMIT);
    if is_cut {
        return Err(format!("more than {TEXT_LIMIT} bytes of mounts"));
    }
    Ok(())
}

/// The paths that are looked at: sensitive files of the kernel, what the configuration names, and mount points.
fn paths(spec: Option<&Spec>, mounts: &str) -> Vec<String> {
    let linux = spec.and_then(|spec| spec.linux().as_ref());
    let lists = linux.map(|linux| [linux.masked_paths(), linux.readonly_paths()]);
    let named = lists.into_iter().flatten().flatten().flatten().cloned();
    let asked = spec.and_then(|spec| spec.mounts().as_ref());
    let asked = asked.into_iter().flatten();
    let asked = asked.map(|mount| mount.destination().to_string_lossy().into_owned());
    let points = mounts.lines().filter_map(|line| {
        let point = unescape(line.split(' ').nth(4)?);
        point.into_os_string().into_string().ok()
    });
    let kernels = SENSITIVE.into_iter().map(str::to_owned);
    kernels.chain(named).chain(asked).chain(points).collect()
}

/// A path of mountinfo: space, tab, line feed and backslash are written as three octal digits behind a backslash.
pub fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let digits = bytes.get(at + 1..at + 4).filter(|_| *byte == b'\\');
        let code =
            digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        plain.push(code.unwrap_or(*byte));
        at += if code.is_some() { 4 } else { 1 };
    }
    OsString::from_vec(plain).into()
}

/// What a process holds outside its own mounts, as [`Observation::outside`], but for its memory.
///
/// # Errors
/// Its mounts or the system's cannot be read.
pub fn outside(process: Pid) -> io::Result<Vec<Outside>> {
    let mounts = read(&format!("/proc/{process}/mountinfo"))?;
    let namespaces = processes::namespaces(process).map_err(io::Error::other)?;
    let uid_map = read(&format!("/proc/{process}/uid_map"))?;
    let process = Container {
        processes: &[process],
        mounts: &mounts,
        has_left_its_mounts: false,
        namespaces: &namespaces,
        uid_map: &uid_map,
    };
    let (held, all) = descriptors::outside(&process, Extent::Descriptors);
    all.map(|()| held.outside).map_err(io::Error::other)
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
