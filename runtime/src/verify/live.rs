//! What the kernel says of a running container, as a posture.
//!
//! The text is the kernel's, but of a hostile container: its mount points are paths that it chose. For a microVM the whole
//! of it comes from the guest, and is as trusted as that.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use engine::observation::{Instruction, Observation, Thread};

use super::config::NAMESPACES;
use super::filter::Filter;
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
    let file = |name: &str| format!("/proc/{}/{name}", seen.pid);
    let mounts = Mounts::new(seen);
    let root = mounts.root();
    Posture {
        namespaces: namespaces(seen),
        user_ids: Fact::new(file("uid_map"), user_ids(seen)),
        group_ids: Vec::new(),
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
        masked: Fact::new(file("mountinfo"), mounts.masked(&seen.absent)),
        read_only: Fact::new(file("mountinfo"), mounts.read_only()),
        root: Fact::new(file("mountinfo"), root.and_then(|root| mounts.source(root))),
        root_is_read_only: Fact::new(
            file("mountinfo"),
            root.is_some_and(|root| root.is_read_only),
        ),
        root_is_shared: Fact::new(
            file("mountinfo"),
            root.is_some_and(|root| mounts.is_shared(root)),
        ),
        mounts: mounts.facts(),
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
        memory_limit: Fact::new("the cgroup's memory limit", seen.limits.memory),
        pids_limit: Fact::new("the cgroup's pids limit", seen.limits.pids),
        has_cpu_limit: Fact::new("the cgroup's cpu limit", seen.limits.cpu.is_some()),
        real_time: Vec::new(),
        oom_score: Fact::new(file("oom_score_adj"), seen.oom_score),
        hooks: Vec::new(),
        outside: seen
            .outside
            .iter()
            .map(|one| Fact::new(&one.at, one.target.clone()))
            .collect(),
    }
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

/// user_namespaces(7): `inside outside size` a line, the outside as the reader's namespace has it.
fn user_ids(seen: &Observation) -> Option<Vec<Fact<IdRange>>> {
    let user = seen.namespaces.get("user")?;
    if user.host.contains(&user.own) {
        return None;
    }
    let range = |line: &str| {
        let mut numbers = line.split_whitespace().map(str::parse);
        let mut next = || numbers.next()?.ok();
        let range = IdRange {
            inside: next()?,
            outside: next()?,
            size: next()?,
        };
        Some(Fact::new(format!("/proc/{}/uid_map", seen.pid), range))
    };
    Some(seen.uid_map.lines().filter_map(range).collect())
}

/// The least user id of all threads, as the container has it.
fn uid(seen: &Observation) -> Fact<u32> {
    let ranges = user_ids(seen);
    let inside = |outside: u32| match &ranges {
        None => Some(outside),
        Some(ranges) => ranges.iter().find_map(|Fact { value: range, .. }| {
            let distance = outside.checked_sub(range.outside)?;
            (distance < range.size).then(|| range.inside.saturating_add(distance))
        }),
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

/// The root group, where a thread is in it. Which group that is in a user namespace, its map of groups would tell.
fn gids(seen: &Observation) -> Vec<Fact<u32>> {
    if user_ids(seen).is_some() {
        return Vec::new();
    }
    let found = ["Gid", "Groups"].into_iter().filter_map(|name| {
        let has_root = |thread: &&Thread| {
            let groups = status(thread, name).unwrap_or_default();
            groups.split_whitespace().any(|group| group == "0")
        };
        let thread = seen.threads.iter().find(has_root)?;
        Some(Fact::new(place(thread, name), 0))
    });
    found.collect()
}

/// The sets of all threads together; the place is that of a thread that has most.
fn capabilities(seen: &Observation) -> BTreeMap<&'static str, Fact<BTreeSet<String>>> {
    let mut sets = BTreeMap::new();
    for (set, name) in SETS {
        let mut all = 0_u64;
        let mut most: Option<(u32, &Thread)> = None;
        for thread in &seen.threads {
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

/// A line of mountinfo (proc(5)).
#[derive(Clone, Debug)]
struct Line {
    device: String,
    root: PathBuf,
    point: PathBuf,
    options: BTreeSet<String>,
    peers: Option<u32>,
    kind: String,
    is_read_only: bool,
}

fn parse(text: &str) -> Vec<Line> {
    let line = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(2);
        let mut right = right.split(' ');
        let device = left.next()?.to_owned();
        let root = unescape(left.next()?);
        let point = unescape(left.next()?);
        let options: BTreeSet<String> = left.next()?.split(',').map(str::to_owned).collect();
        let peers = left.find_map(|tag| tag.strip_prefix("shared:")?.parse().ok());
        let kind = right.next()?.to_owned();
        let mut of_super = right.nth(1)?.split(',');
        let is_read_only = options.contains("ro") || of_super.any(|option| option == "ro");
        Some(Line {
            device,
            root,
            point,
            options,
            peers,
            kind,
            is_read_only,
        })
    };
    text.lines().filter_map(line).collect()
}

/// Space, tab, line feed and backslash are written as three octal digits behind a backslash.
fn unescape(text: &str) -> PathBuf {
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
    std::ffi::OsString::from_vec(plain).into()
}

/// The mounts of a container, and those of the host.
struct Mounts {
    pid: i32,
    own: Vec<Line>,
    host: Vec<Line>,
}

impl Mounts {
    fn new(seen: &Observation) -> Self {
        Self {
            pid: seen.pid,
            own: parse(&seen.mounts),
            host: parse(&seen.host_mounts),
        }
    }

    fn root(&self) -> Option<&Line> {
        self.own
            .iter()
            .rev()
            .find(|line| line.point == Path::new("/"))
    }

    /// Whether the host has a mount in the same group: what is mounted in one appears in the other.
    fn is_shared(&self, line: &Line) -> bool {
        line.peers.is_some() && self.host.iter().any(|one| one.peers == line.peers)
    }

    /// What a mount shows, as a path of the host: where the host has the same file system.
    fn source(&self, line: &Line) -> Option<PathBuf> {
        let same = self.host.iter().filter(|one| one.device == line.device);
        // The last of several mounts on a place covers the others; a path that is on the way is the better one.
        let reaching = same.filter_map(|one| {
            let rest = line.root.strip_prefix(&one.root).ok()?;
            Some((one.root.as_os_str().len(), one.point.join(rest)))
        });
        let nearest = reaching.max_by_key(|(length, _)| *length);
        let path = nearest.map(|(_, path)| path)?;
        // Joining an empty rest leaves a slash.
        Some(path.components().collect())
    }

    /// Mounts over one of the kernel's files; of the file system itself, or of something that hides it.
    fn below_the_kernels(&self) -> impl Iterator<Item = &Line> {
        self.own.iter().filter(|line| {
            let is_below = |top: &str| line.point.starts_with(top) && line.point != Path::new(top);
            let is_cgroup = matches!(line.kind.as_str(), "cgroup" | "cgroup2");
            // One of these shows more than what it covers.
            let is_the_kernels = matches!(
                line.kind.as_str(),
                "debugfs"
                    | "tracefs"
                    | "securityfs"
                    | "bpf"
                    | "configfs"
                    | "efivarfs"
                    | "binfmt_misc"
                    | "pstore"
                    | "fusectl"
            );
            !is_the_kernels
                && (is_below("/proc") || is_below("/sys"))
                && !is_cgroup
                && !line.point.starts_with("/sys/fs/cgroup")
        })
    }

    fn masked(&self, absent: &[String]) -> Vec<PathBuf> {
        let covers = self
            .below_the_kernels()
            .filter(|line| !matches!(line.kind.as_str(), "proc" | "sysfs"));
        let covers = covers.map(|line| line.point.clone());
        covers.chain(absent.iter().map(PathBuf::from)).collect()
    }

    fn read_only(&self) -> Vec<PathBuf> {
        let lines = self.below_the_kernels().filter(|line| line.is_read_only);
        lines.map(|line| line.point.clone()).collect()
    }

    /// Whether a mount came along with the one above it, whose directory it is in on the host too.
    fn is_part(&self, line: &Line) -> bool {
        let Some(source) = self.source(line) else {
            return false;
        };
        self.own.iter().any(|above| {
            let rest = line.point.strip_prefix(&above.point);
            let rest = rest.ok().filter(|rest| !rest.as_os_str().is_empty());
            rest.zip(self.source(above)).is_some_and(|(rest, whole)| {
                source == whole.join(rest) && above.point != Path::new("/")
            })
        })
    }

    fn facts(&self) -> Vec<Fact<Mount>> {
        let masks: Vec<&Path> = self
            .below_the_kernels()
            .map(|line| line.point.as_path())
            .collect();
        let lines = self.own.iter().filter(|line| {
            line.point != Path::new("/")
                && !masks.contains(&line.point.as_path())
                && !self.is_part(line)
        });
        let fact = |line: &Line| {
            // Of these there is one for all, whoever mounts it.
            let is_the_kernels = matches!(line.kind.as_str(), "sysfs" | "cgroup" | "cgroup2");
            let mount = Mount {
                destination: line.point.clone(),
                kind: line.kind.clone(),
                source: self.source(line).filter(|_| !is_the_kernels),
                layers: Vec::new(),
                is_whole: line.root == Path::new("/"),
                is_read_only: line.is_read_only,
                is_nosuid: line.options.contains("nosuid"),
                is_nodev: line.options.contains("nodev"),
                is_shared: self.is_shared(line),
            };
            let at = format!("/proc/{}/mountinfo: {}", self.pid, line.point.display());
            Fact::new(at, mount)
        };
        lines.map(fact).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observation() -> Observation {
        serde_json::from_value(serde_json::json!({
            "pid": 7,
            "kernel": "Linux version 6",
            "namespaces": {
                "pid": {"own": 5, "host": [1]}, "net": {"own": 2, "host": [2, 3]}, "user": {"own": 9, "host": [4]}
            },
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
            "absent": ["/proc/acpi"],
            "outside": [{"at": "/proc/7/fd/9", "target": "/sys/fs/cgroup"}],
            "devices": {"Ok": ["c 1:3 rwm"]},
            "limits": {"memory": 1000, "pids": null, "cpu": null},
            "seccomp": {"Ok": [[[6, 0, 0, 0x7fff_0000_u32]]]}
        }))
        .unwrap()
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
            [Path::new("/proc/kcore"), Path::new("/proc/acpi")]
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
