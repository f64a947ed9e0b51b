//! What a container may do, in a form that does not tell whether its configuration or the kernel says so: the rules judge
//! both alike.
//!
//! Nothing here is trusted or checked: it is what somebody said, with the place where it was read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::filter::Filter;

/// Something that was read, and where: a JSON path of `config.json`, or a file of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact<T> {
    /// The place.
    pub at: String,
    /// What it says.
    pub value: T,
}

impl<T> Fact<T> {
    /// `value`, read at `at`.
    pub fn new(at: impl Into<String>, value: T) -> Self {
        Self {
            at: at.into(),
            value,
        }
    }
}

impl Fact<Option<u64>> {
    /// The same, but nothing from `end` on.
    pub fn below(self, end: u64) -> Self {
        let value = self.value.filter(|value| *value < end);
        Self { value, ..self }
    }
}

/// Whose namespace it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Not the host's; it may be shared with other containers.
    Own,
    /// The host's.
    Host,
}

/// A range of user or group ids (user_namespaces(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first id in the container.
    pub inside: u32,
    /// The same one's id on the host.
    pub outside: u32,
    /// How many there are.
    pub size: u32,
}

/// A mount of the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is, in the container.
    pub destination: PathBuf,
    /// The type of file system; `bind` where that is the source's.
    pub kind: String,
    /// The path on the host, for a bind mount.
    pub source: Option<PathBuf>,
    /// The directories of the host that an overlay is made of.
    pub layers: Vec<PathBuf>,
    /// It is a file system, and not a part of one.
    pub is_whole: bool,
    /// Nothing can be written through it.
    pub is_read_only: bool,
    /// Set-user-id programs have no effect.
    pub is_nosuid: bool,
    /// Device nodes have no effect.
    pub is_nodev: bool,
    /// What is mounted in it appears on the host too.
    pub is_shared: bool,
    /// It is a cgroup file system through which a container in a cgroup namespace of its own changes none of its limits.
    pub is_delegated: bool,
}

impl Mount {
    /// The paths of the host that are seen through it.
    pub fn sources(&self) -> impl Iterator<Item = &Path> {
        self.source.iter().chain(&self.layers).map(PathBuf::as_path)
    }
}

/// Where the parts of a seccomp profile are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// The place of what is said to calls that no rule names.
    pub default: String,
    /// The calls that each of its rules may let through.
    pub rules: Vec<Fact<BTreeSet<String>>>,
}

/// A device node that is made for a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Where it is, in the container.
    pub path: PathBuf,
    /// The device, and all that one can do with it.
    pub device: Devices,
}

/// Devices that may be used, as the devices cgroup of version 1 writes them: `c 1:3 rwm`, with `*` for any number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices {
    /// `b`, `c`, or `a` for both.
    pub kind: char,
    /// None: any.
    pub major: Option<u32>,
    /// None: any.
    pub minor: Option<u32>,
    /// Some of `rwm`.
    pub access: String,
}

impl Devices {
    /// Whether all that one may do with these is among what `others` allow together.
    pub fn are_among(&self, others: &[Self]) -> bool {
        self.access.chars().all(|letter| {
            let allows = |one: &Self| one.cover_numbers(self) && one.access.contains(letter);
            others.iter().any(allows)
        })
    }

    /// Whether all devices of `other` are among these, whatever one may do with them.
    pub fn cover_numbers(&self, other: &Self) -> bool {
        let covers = |own: Option<u32>, other: Option<u32>| own.is_none() || own == other;
        (self.kind == 'a' || self.kind == other.kind)
            && covers(self.major, other.major)
            && covers(self.minor, other.minor)
    }
}

impl std::str::FromStr for Devices {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (kind, rest) = text.split_once(' ')?;
            let (numbers, access) = rest.split_once(' ')?;
            let (major, minor) = numbers.split_once(':')?;
            let number = |text: &str| match text {
                "*" => Some(None),
                number => number.parse().ok().map(Some),
            };
            let is_access =
                !access.is_empty() && access.chars().all(|letter| "rwm".contains(letter));
            Some(Self {
                kind: kind
                    .parse()
                    .ok()
                    .filter(|kind| "abc".contains(*kind) && is_access)?,
                major: number(major)?,
                minor: number(minor)?,
                access: access.to_owned(),
            })
        };
        parse().ok_or_else(|| format!("{text:?} is not of the form \"c 1:3 rwm\""))
    }
}

impl std::fmt::Display for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let number =
            |number: Option<u32>| number.map_or("*".to_owned(), |number| number.to_string());
        let (major, minor) = (number(self.major), number(self.minor));
        write!(f, "{} {major}:{minor} {}", self.kind, self.access)
    }
}

/// What a container may do.
#[derive(Clone, Debug)]
pub struct Posture {
    /// Namespaces by the specification's names for them, all but `user`.
    pub namespaces: BTreeMap<&'static str, Fact<Sharing>>,
    /// The user ids of its user namespace, as far as they are known; `None`: it has the host's.
    pub user_ids: Fact<Option<Vec<Fact<IdRange>>>>,
    /// The group ids of its user namespace, as far as they are known.
    pub group_ids: Vec<Fact<IdRange>>,
    /// The user that it runs as, an id in the container.
    pub uid: Fact<u32>,
    /// The groups that it is in, by ids in the container, as far as they are known.
    pub gids: Vec<Fact<u32>>,
    /// Capabilities by the specification's names for the sets, as `CAP_CHOWN`.
    pub capabilities: BTreeMap<&'static str, Fact<BTreeSet<String>>>,
    /// Whether execve(2) can give no rights.
    pub no_new_privileges: Fact<bool>,
    /// The seccomp filters; each must allow a call. `None`: there are some, of which nothing is known.
    pub seccomp: Fact<Option<Vec<Filter>>>,
    /// The profile that the filter was made of, where there is one to read.
    pub profile: Option<Profile>,
    /// The AppArmor profile.
    pub apparmor: Fact<Option<String>>,
    /// The SELinux label, `user:role:type:level`.
    pub selinux: Fact<Option<String>>,
    /// Kernel parameters that it sets.
    pub sysctls: Vec<Fact<String>>,
    /// Paths that cannot be read or are not there.
    pub masked: Fact<Vec<PathBuf>>,
    /// Paths below which nothing can be written.
    pub read_only: Fact<Vec<PathBuf>>,
    /// Mounts, in their order, without the root.
    pub mounts: Vec<Fact<Mount>>,
    /// Where cgroup file systems come along with a mount whose options do not reach them, and can be written.
    pub cgroups_below: Vec<Fact<PathBuf>>,
    /// The directory of the container's bundle, where there is one to read.
    pub bundle: Option<PathBuf>,
    /// The root file system's path on the host, where it is known.
    pub root: Fact<Option<PathBuf>>,
    /// Whether the root file system is read-only.
    pub root_is_read_only: Fact<bool>,
    /// Whether what is mounted in the root file system appears on the host.
    pub root_is_shared: Fact<bool>,
    /// Devices that may be used.
    pub devices: Vec<Fact<Devices>>,
    /// Nodes of devices that are made for it.
    pub nodes: Vec<Fact<Node>>,
    /// Network interfaces of the host that are moved into it.
    pub interfaces: Vec<Fact<String>>,
    /// Bytes.
    pub memory_limit: Fact<Option<u64>>,
    /// Processes and threads.
    pub pids_limit: Fact<Option<u64>>,
    /// Whether its processor time is limited.
    pub has_cpu_limit: Fact<bool>,
    /// What lets its processes go before all others.
    pub real_time: Vec<Fact<String>>,
    /// How much rather than others it is ended where memory runs out; negative: rather others.
    pub oom_score: Fact<i32>,
    /// Whether its processes wait for memory where that runs out, instead of being ended.
    pub has_no_oom_killer: Fact<bool>,
    /// Whether its seccomp filter leaves processors free to guess, where the kernel would keep them from it.
    pub speculates: Fact<bool>,
    /// Programs that run on the host for it.
    pub hooks: Vec<Fact<String>>,
    /// What its processes hold open outside its mounts.
    pub outside: Vec<Fact<String>>,
}

impl Posture {
    /// Takes what the mounts show from `given`, mounts outside of the container: it cannot see where they are from.
    pub fn replace_sources(&mut self, given: Vec<Fact<Mount>>) {
        self.root.value = None;
        for mount in &mut self.mounts {
            mount.value.source = None;
        }
        let given = given
            .into_iter()
            .filter(|mount| mount.value.source.is_some());
        self.mounts.extend(given);
    }

    /// The mount that a path of the container is in, if it is not in the root file system.
    pub fn mount_of(&self, path: &Path) -> Option<&Fact<Mount>> {
        let mut found: Option<&Fact<Mount>> = None;
        for mount in &self.mounts {
            let destination = &mount.value.destination;
            let is_nearer = found.is_none_or(|found| {
                destination.as_os_str().len() >= found.value.destination.as_os_str().len()
            });
            if path.starts_with(destination) && is_nearer {
                found = Some(mount);
            }
        }
        found
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The posture of an empty configuration.
    pub fn nothing() -> Posture {
        let spec = serde_json::json!({"ociVersion": "1.2.0", "root": {"path": "rootfs"}});
        let spec = serde_json::from_value(spec).unwrap();
        super::super::config::posture(Path::new("/b"), &spec, Vec::new())
    }

    #[test]
    fn devices_cover_those_that_they_name() {
        let devices = |text: &str| text.parse::<Devices>().unwrap();
        let among = |these: &str, others: &[&str]| {
            let others: Vec<_> = others.iter().copied().map(devices).collect();
            devices(these).are_among(&others)
        };
        assert!(among("c 1:3 rw", &["c 1:* rwm"]));
        assert!(among("b 8:0 r", &["a *:* rwm"]));
        // Making a node is allowed to everybody, by another rule.
        assert!(among("b 8:0 rwm", &["b *:* m", "b 8:0 rw"]));
        assert!(!among("b 8:0 rwm", &["b *:* m", "b 8:0 r", "b 8:1 w"]));
        assert!(!among("c 1:3 rwm", &["c 1:3 rw"]));
        assert!(!among("c 1:* rwm", &["c 1:3 rwm"]));
        assert!(!among("a *:* m", &["b *:* rwm"]));
        assert_eq!(devices("b 8:* r").to_string(), "b 8:* r");
        for wrong in ["", "c", "c 1:3", "d 1:3 r", "c 1 r", "c 1:3 x", "c -1:3 r"] {
            assert!(wrong.parse::<Devices>().is_err(), "{wrong}");
        }
    }
}
