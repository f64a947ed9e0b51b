//! What the kernel says of a running container, as a posture.
//!
//! The text is the kernel's, but of a hostile container: its mount points are paths that it chose. For a microVM the whole
//! of it comes from the guest, and is as trusted as that.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use engine::observation::{Instruction, Observation, StrayKind, Thread};

use super::config::NAMESPACES;
use super::filter::Filter;
use super::mount_table::{At, Line, Table};
use super::objects::{self, Maker};
use super::posture::{Fact, IdRange, Mount, Posture, Sharing};

/// The capability sets by the specification's names, and the kernel's.
const SETS: [(&str, &str); 5] = [
    ("bounding", "CapBnd"),
    ("effective", "CapEff"),
    ("permitted", "CapPrm"),
    ("inheritable", "CapInh"),
    ("ambient", "CapAmb"),
];

/// The posture of what was observed.
pub fn posture(seen: &Observation) -> Posture {
    let mut posture = without_objects(seen);
    let objects = objects::of(seen, &posture).filter(|(_, maker)| *maker == Maker::Other);
    let objects: Vec<Fact<String>> = objects
        .map(|(one, _)| Fact::new(&one.at, one.target.clone()))
        .collect();
    posture.outside.extend(objects);
    posture
}

fn without_objects(seen: &Observation) -> Posture {
    let file = |name: &str| format!("/proc/{}/{name}", seen.pid);
    let mounts = Table::new(seen);
    let root = mounts.root();
    Posture {
        namespaces: namespaces(seen),
        user_ids: Fact::new(
            file("uid_map"),
            id_ranges(seen, &seen.uid_map).map(|ranges| read_at(&file("uid_map"), ranges)),
        ),
        group_ids: read_at(
            &file("gid_map"),
            id_ranges(seen, &seen.gid_map).unwrap_or_default(),
        ),
        uid: uid(seen),
        gids: gids(seen),
        capabilities: capabilities(seen),
        no_new_privileges: of_all(seen, "NoNewPrivs", |value| value == "1"),
        seccomp: seccomp(seen),
        profile: None,
        // Whether somebody asked for no profile, the kernel cannot know.
        apparmor: Fact::new(file("attr/current"), None),
        selinux: Fact::new(
            file("attr/current"),
            seen.label.clone().filter(|label| label.contains(':')),
        ),
        sysctls: Vec::new(),
        masked: Fact::new(file("mountinfo"), masked(&mounts)),
        read_only: Fact::new(file("mountinfo"), read_only(&mounts)),
        root: Fact::new(file("mountinfo"), root.and_then(|root| mounts.source(root))),
        root_is_read_only: Fact::new(
            file("mountinfo"),
            root.is_some_and(|root| root.is_read_only),
        ),
        root_is_shared: Fact::new(
            file("mountinfo"),
            root.is_some_and(|root| mounts.is_shared(root)),
        ),
        mounts: facts(&mounts),
        cgroups_below: Vec::new(),
        bundle: None,
        devices: seen
            .devices
            .iter()
            .flatten()
            .filter_map(|line| line.parse().ok())
            .map(|devices| Fact::new("the cgroup's device rules", devices))
            .collect(),
        nodes: Vec::new(),
        interfaces: Vec::new(),
        memory_limit: Fact::new("the cgroup's memory limit", seen.limits.memory),
        pids_limit: Fact::new("the cgroup's pids limit", seen.limits.pids),
        has_cpu_limit: Fact::new("the cgroup's cpu limit", seen.limits.cpu.is_some()),
        real_time: Vec::new(),
        oom_score: Fact::new(file("oom_score_adj"), seen.oom_score),
        has_no_oom_killer: Fact::new("the cgroup's memory.oom_control", has_no_oom_killer(seen)),
        // Which flags a filter was made with, the kernel does not tell.
        speculates: Fact::new(file("status"), false),
        hooks: Vec::new(),
        outside: seen
            .outside
            .iter()
            .map(|one| Fact::new(&one.at, one.target.clone()))
            .collect(),
    }
}

/// cgroups(7), memory.oom_control: `oom_kill_disable 0`.
fn has_no_oom_killer(seen: &Observation) -> bool {
    let text = seen.cgroup.get("memory.oom_control");
    let own = text.and_then(|texts| texts.first());
    own.is_some_and(|text| text.lines().any(|line| line == "oom_kill_disable 1"))
}

/// The value of a line of a thread's status.
pub(super) fn status<'a>(thread: &'a Thread, name: &str) -> Option<&'a str> {
    let mut lines = thread.status.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.map(str::trim)
}

fn place(thread: &Thread, name: &str) -> String {
    format!("/proc/{}/task/{}/status: {name}", thread.pid, thread.tid)
}

/// Whether something holds for every thread, with the first for which it does not.
fn of_all(seen: &Observation, name: &str, holds: impl Fn(&str) -> bool) -> Fact<bool> {
    let is_broken = |thread: &&Thread| !status(thread, name).is_some_and(&holds);
    match seen.threads.iter().find(is_broken) {
        Some(thread) => Fact::new(place(thread, name), false),
        None => Fact::new(format!("/proc/{}/status: {name}", seen.pid), true),
    }
}

fn namespaces(seen: &Observation) -> BTreeMap<&'static str, Fact<Sharing>> {
    let fact = |(name, _, file): (&'static str, _, &str)| {
        let found = seen.namespaces.get(file)?;
        let sharing = if found.host.contains(&found.own) {
            Sharing::Host
        } else {
            Sharing::Own
        };
        let at = format!("/proc/{}/ns/{file}", seen.pid);
        Some((name, Fact::new(at, sharing)))
    };
    NAMESPACES.into_iter().filter_map(fact).collect()
}

/// The ranges of `map`, which is the text of uid_map or gid_map; none if the user namespace is the host's.
/// (user_namespaces(7): `inside outside size` a line, the outside as the reader's namespace has it.)
pub(super) fn id_ranges(seen: &Observation, map: &str) -> Option<Vec<IdRange>> {
    let user = seen.namespaces.get("user")?;
    let is_own = !user.host.contains(&user.own);
    is_own.then(|| ranges(map))
}

/// The ranges in such a text.
pub(super) fn ranges(map: &str) -> Vec<IdRange> {
    let range = |line: &str| {
        let mut numbers = line.split_whitespace().map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some(IdRange {
            inside: next()?,
            outside: next()?,
            size: next()?,
        })
    };
    map.lines().filter_map(range).collect()
}

/// Ranges as they were read in a file.
fn read_at(file: &str, ranges: Vec<IdRange>) -> Vec<Fact<IdRange>> {
    let ranges = ranges.into_iter();
    ranges.map(|range| Fact::new(file, range)).collect()
}

/// An id of the host as the container has it.
pub(super) fn inside(ranges: &[IdRange], outside: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let distance = outside.checked_sub(range.outside)?;
        (distance < range.size).then(|| range.inside.saturating_add(distance))
    })
}

/// The least user id of all threads, as the container has it.
fn uid(seen: &Observation) -> Fact<u32> {
    let ranges = id_ranges(seen, &seen.uid_map);
    let inside = |outside: u32| match &ranges {
        None => Some(outside),
        Some(ranges) => inside(ranges, outside),
    };
    let of = |thread: &Thread| {
        // Real, effective, saved and file system id.
        let ids = status(thread, "Uid")?.split_whitespace();
        ids.filter_map(|id| inside(id.parse().ok()?)).min()
    };
    let threads = seen.threads.iter();
    let least = threads
        .filter_map(|thread| Some((of(thread)?, thread)))
        .min_by_key(|(uid, _)| *uid);
    match least {
        Some((uid, thread)) => Fact::new(place(thread, "Uid"), uid),
        // Nobody of the namespace.
        None => Fact::new(format!("/proc/{}/status: Uid", seen.pid), u32::MAX),
    }
}

/// The root group, where a thread is in it.
fn gids(seen: &Observation) -> Vec<Fact<u32>> {
    let ranges = id_ranges(seen, &seen.gid_map);
    let is_root = |group: &str| match (&ranges, group.parse()) {
        (Some(ranges), Ok(group)) => inside(ranges, group) == Some(0),
        (None, group) => group == Ok(0),
        (Some(_), Err(_)) => false,
    };
    let found = ["Gid", "Groups"].into_iter().filter_map(|name| {
        let has_root = |thread: &&Thread| {
            let groups = status(thread, name).unwrap_or_default();
            groups.split_whitespace().any(is_root)
        };
        let thread = seen.threads.iter().find(has_root)?;
        Some(Fact::new(place(thread, name), 0))
    });
    found.collect()
}

/// The sets of all threads together; the place is that of a thread that has most. A process that made a user namespace for
/// itself has all of them there, and its threads are all in it.
fn capabilities(seen: &Observation) -> BTreeMap<&'static str, Fact<BTreeSet<String>>> {
    let strays = seen.strays.iter();
    let elsewhere: BTreeSet<i32> = strays
        .filter(|one| one.kind == StrayKind::InAnother && one.at.ends_with("/ns/user"))
        .map(|one| one.pid)
        .collect();
    let mut sets = BTreeMap::new();
    for (set, name) in SETS {
        let mut all = 0_u64;
        let mut most: Option<(u32, &Thread)> = None;
        let threads = seen.threads.iter();
        for thread in threads.filter(|thread| !elsewhere.contains(&thread.pid)) {
            let bits = mask(thread, name);
            all |= bits;
            if most.is_none_or(|(count, _)| bits.count_ones() > count) {
                most = Some((bits.count_ones(), thread));
            }
        }
        if let Some((_, thread)) = most {
            sets.insert(set, Fact::new(place(thread, name), names(all)));
        }
    }
    sets
}

/// The capabilities in a set of a thread, by the kernel's name for it.
pub(super) fn capabilities_of(thread: &Thread, set: &str) -> BTreeSet<String> {
    names(mask(thread, set))
}

fn mask(thread: &Thread, set: &str) -> u64 {
    let text = status(thread, set).unwrap_or_default();
    u64::from_str_radix(text, 16).unwrap_or_default()
}

/// The capabilities of a mask; one that is newer than this program has its number.
fn names(mask: u64) -> BTreeSet<String> {
    let known: BTreeMap<u8, String> = caps::all()
        .into_iter()
        .map(|one| (one.index(), one.to_string()))
        .collect();
    let set = (0..64_u8).filter(|bit| mask >> bit & 1 == 1);
    set.map(|bit| {
        known
            .get(&bit)
            .cloned()
            .unwrap_or_else(|| format!("CAP_{bit}"))
    })
    .collect()
}

fn seccomp(seen: &Observation) -> Fact<Option<Vec<Filter>>> {
    let all = of_all(seen, "Seccomp", |mode| mode != "0");
    if !all.value {
        return Fact::new(all.at, Some(Vec::new()));
    }
    let filters = seen.seccomp.as_ref().ok();
    let filters = filters.map(|filters| filters.iter().map(|one| filter_of(one)).collect());
    Fact::new(
        format!("the seccomp filter of process {}", seen.pid),
        filters,
    )
}

/// A filter that was read back.
pub(super) fn filter_of(instructions: &[Instruction]) -> Filter {
    let program = instructions.iter().map(|one| libc::sock_filter {
        code: one.0,
        jt: one.1,
        jf: one.2,
        k: one.3,
    });
    Filter::new(program.collect())
}

/// The paths at which nothing can be read, and the mount points that hide something.
fn masked(table: &Table<'_>) -> Vec<PathBuf> {
    let is_masked = |at: &At<'_>| matches!(at, At::Masked | At::Absent);
    let paths = table.paths().filter(|(_, at)| is_masked(at));
    paths.map(|(path, _)| PathBuf::from(path)).collect()
}

/// The paths below which nothing can be written.
fn read_only(table: &Table<'_>) -> Vec<PathBuf> {
    let is_protected = |at: &At<'_>| match at {
        At::File(file, line) => table.is_read_only(file, line, |_| false),
        _ => false,
    };
    let paths = table.paths().filter(|(_, at)| is_protected(at));
    paths.map(|(path, _)| PathBuf::from(path)).collect()
}

fn facts(table: &Table<'_>) -> Vec<Fact<Mount>> {
    let is_of_note = |line: &&Line| {
        // A part of proc over itself shows nothing more; whether it can be written its path tells.
        let is_part = (line.is_read_only || line.kind == "proc") && table.is_of_itself(line);
        !table.hides(line) && !is_part && table.whole_of(line).is_none()
    };
    let fact = |line: &Line| {
        // Of these there is one for all, whoever mounts it.
        let is_the_kernels = line.is_cgroup() || line.kind == "sysfs";
        let mount = Mount {
            destination: line.point.clone(),
            kind: line.kind.clone(),
            source: table.source(line).filter(|_| !is_the_kernels),
            layers: Vec::new(),
            is_whole: line.root == Path::new("/"),
            is_read_only: line.is_read_only,
            is_nosuid: line.options.contains("nosuid"),
            is_nodev: line.options.contains("nodev"),
            is_shared: table.is_shared(line),
            is_delegated: line.is_delegated(),
        };
        let at = format!("/proc/{}/mountinfo: {}", table.pid, line.point.display());
        Fact::new(at, mount)
    };
    table.mounts().filter(is_of_note).map(fact).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use engine::observation::Stray;

    use super::*;
    use crate::verify::policy::Policy;
    use crate::verify::rules;

    /// What is seen of a container with few mounts.
    pub fn observation() -> Observation {
        serde_json::from_value(serde_json::json!({
            "pid": 7,
            "kernel": "Linux version 6",
            "namespaces": {
                "pid": {"own": 5, "host": [1], "is_host_known": true},
                "net": {"own": 2, "host": [2, 3], "is_host_known": true},
                "user": {"own": 9, "host": [4], "is_host_known": true}
            },
            "left": [],
            "uid_map": "         0     100000      65536\n",
            "mounts": "\
50 40 0:50 / / rw,relatime - overlay overlay ro,lowerdir=/x
51 50 0:51 / /proc rw,nosuid - proc proc rw
52 50 0:52 / /sys ro,nosuid - sysfs sysfs ro
53 51 0:53 /null /proc/kcore rw - tmpfs tmpfs rw
54 51 0:51 /sys /proc/sys ro - proc proc rw
55 50 8:1 /srv/a\\040b /data rw,nodev shared:3 - ext4 /dev/sda1 rw
56 50 0:24 /docker.sock /run/docker.sock rw - tmpfs tmpfs rw
",
            "host_mounts": "\
20 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
21 20 0:24 / /run rw shared:2 - tmpfs tmpfs rw
22 20 8:1 /srv /srv rw shared:3 - ext4 /dev/sda1 rw
",
            "label": null,
            "oom_score": 0,
            "threads": [
                {"pid": 7, "tid": 7, "status": "Uid:\t100000\t100000\t100000\t100000\nCapBnd:\t0000000000000401\nNoNewPrivs:\t1\nSeccomp:\t2"},
                {"pid": 8, "tid": 9, "status": "Uid:\t100001\t100001\t100001\t100001\nCapBnd:\t8000000000000401\nNoNewPrivs:\t0\nSeccomp:\t2"}
            ],
            "gid_map": "",
            "rlimits": "",
            "places": [
                {"path": "/proc/acpi", "found": {"Ok": null}},
                {"path": "/proc/kcore", "found": {"Ok": {
                    "path": "/proc/kcore", "mount": 53, "file": 0x2000, "device": [1, 3], "of": [0, 53], "inode": 4, "size": 0
                }}},
                {"path": "/proc/sys", "found": {"Ok": {
                    "path": "/proc/sys", "mount": 54, "file": 0x4000, "device": [0, 0], "of": [0, 51], "inode": 5, "size": 0
                }}},
                {"path": "/proc/keys", "found": {"Err": "not told"}}
            ],
            "root_is_top": {"Ok": true},
            "strays": [],
            "other_filters": [],
            "unseen": {},
            "outside": [{"at": "/proc/7/fd/9", "target": "/sys/fs/cgroup"}],
            "objects": [],
            "other_rlimits": [],
            "cgroup": {},
            "sysctls": {},
            "devices": {"Ok": ["c 1:3 rwm"]},
            "limits": {
                "memory": 1000, "pids": null, "cpu": null, "memory_and_swap": null, "cpus": null, "mems": null
            },
            "seccomp": {"Ok": [[[6, 0, 0, 0x7fff_0000_u32]]]}
        }))
        .unwrap()
    }

    #[test]
    fn capabilities_in_a_user_namespace_of_its_own_are_not_the_containers() {
        let mut seen = observation();
        let bounding = |seen: &Observation| posture(seen).capabilities["bounding"].value.len();
        let all = bounding(&seen);
        seen.strays.push(Stray {
            pid: 8,
            at: "/proc/8/task/9/ns/user".to_owned(),
            kind: StrayKind::InAnother,
        });
        assert_eq!(bounding(&seen), all - 1);
        seen.strays[0].kind = StrayKind::InTheHosts;
        assert_eq!(bounding(&seen), all);
    }

    #[test]
    fn an_observation_is_read_as_the_kernel_writes_it() {
        let posture = posture(&observation());
        assert_eq!(posture.namespaces["pid"].value, Sharing::Own);
        assert_eq!(posture.namespaces["network"].value, Sharing::Host);
        let ids = posture.user_ids.value.as_deref().unwrap();
        assert_eq!(
            (ids[0].value.inside, ids[0].value.outside, ids[0].value.size),
            (0, 100_000, 65_536)
        );
        assert_eq!(posture.uid, Fact::new("/proc/7/task/7/status: Uid", 0));
        let bounding = &posture.capabilities["bounding"];
        assert_eq!(bounding.at, "/proc/8/task/9/status: CapBnd");
        assert_eq!(
            Vec::from_iter(&bounding.value),
            ["CAP_63", "CAP_CHOWN", "CAP_NET_BIND_SERVICE"]
        );
        assert_eq!(
            posture.no_new_privileges,
            Fact::new("/proc/8/task/9/status: NoNewPrivs", false)
        );
        assert_eq!(posture.seccomp.value.as_ref().unwrap().len(), 1);
        assert!(posture.root_is_read_only.value);
        assert_eq!(
            posture.masked.value,
            [Path::new("/proc/acpi"), Path::new("/proc/kcore")]
        );
        assert_eq!(posture.read_only.value, [Path::new("/proc/sys")]);
        let mounts: Vec<_> = posture.mounts.iter().map(|one| &one.value).collect();
        assert_eq!(mounts.len(), 4);
        assert!(mounts[1].is_read_only && mounts[1].source.is_none());
        assert_eq!(mounts[2].source.as_deref(), Some(Path::new("/srv/a b")));
        assert!(mounts[2].is_shared && mounts[2].is_nodev && !mounts[2].is_nosuid);
        assert_eq!(
            mounts[3].source.as_deref(),
            Some(Path::new("/run/docker.sock"))
        );
        assert!(!mounts[3].is_shared);
    }

    #[test]
    fn a_file_system_of_the_kernel_is_told_from_a_file_in_one() {
        let mut seen = observation();
        seen.mounts.push_str(
            "57 52 0:7 / /sys/kernel/debug rw - debugfs debugfs rw\n\
             58 50 0:6 /null /dev/null rw - devtmpfs udev rw\n",
        );
        let posture = posture(&seen);
        let is_whole = |kind: &str| {
            let mut mounts = posture.mounts.iter().map(|one| &one.value);
            let mount = mounts.find(|one| one.kind == kind).unwrap();
            mount.is_whole
        };
        assert!(is_whole("debugfs") && !is_whole("devtmpfs"));
        let debug = Path::new("/sys/kernel/debug");
        assert!(!posture.masked.value.iter().any(|one| one == debug));
    }

    #[test]
    fn what_is_read_only_no_more_is_no_second_proc() {
        let mut seen = observation();
        seen.mounts = seen.mounts.replace("/proc/sys ro", "/proc/sys rw");
        let posture = posture(&seen);
        assert!(posture.read_only.value.is_empty());
        let mut procs = posture.mounts.iter().filter(|one| one.value.kind == "proc");
        assert_eq!(procs.next().unwrap().value.destination, Path::new("/proc"));
        assert_eq!(procs.next(), None);
    }

    #[test]
    fn a_cgroup_that_is_delegated_may_be_written_in_a_cgroup_namespace() {
        let policy = Policy::load("baseline").unwrap();
        let (_, setting) = policy.setting("writable-cgroups").unwrap();
        let rule = rules::find("writable-cgroups").unwrap();
        let is_weak = |line: &str, has_own: bool| {
            let mut seen = observation();
            seen.mounts.push_str(line);
            let mut cgroups = seen.namespaces["net"].clone();
            cgroups.own = if has_own { 99 } else { cgroups.host[0] };
            seen.namespaces.insert("cgroup".to_owned(), cgroups);
            !(rule.judge)(&posture(&seen), setting).is_empty()
        };
        let delegated = "57 52 0:30 /c /sys/fs/cgroup rw - cgroup2 cgroup rw,nsdelegate\n";
        assert!(!is_weak(delegated, true));
        assert!(is_weak(delegated, false));
        assert!(is_weak(&delegated.replace(",nsdelegate", ""), true));
        // The root of all cgroups is no container's.
        assert!(is_weak(&delegated.replace("/c ", "/ "), true));
        let named =
            "57 52 0:31 /c /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n";
        assert!(!is_weak(named, true));
        assert!(is_weak(&named.replace("name=systemd", "devices"), true));
    }

    #[test]
    fn what_a_hostile_guest_says_is_read_without_a_panic() {
        let mut seen = observation();
        seen.mounts =
            "\\\n1 2 - \n50 40 0:50 / / rw - \n\\999 a b \\12 \\ \\\\ - x y z\n".to_owned();
        seen.host_mounts = String::new();
        seen.uid_map = "4294967295 4294967295 4294967295\n-1 0 0\n".to_owned();
        seen.threads[0].status = "Uid:\nCapBnd:\tzz\nSeccomp\n".to_owned();
        seen.devices = Ok(vec!["nonsense".to_owned()]);
        let posture = posture(&seen);
        assert!(posture.devices.is_empty());
        assert!(!posture.root_is_read_only.value);
    }
}
