//! What was asked for against what the kernel says: a property for each promise that a configuration makes.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use engine::observation::{Namespace, Observation, Topic};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::Serialize;

use super::config::NAMESPACES;
use super::posture::{Devices, Fact, IdRange, Posture, Sharing};
use super::{mounts, printable, processes, resources, syscalls};
use crate::isolation::Model;

/// A promise, and whether it is kept. The field names are those of the JSON, and stable.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Property {
    /// Its name; stable.
    pub name: String,
    /// The model that it is about, where it is looked at in several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<Model>,
    /// What was asked for.
    pub asked: String,
    /// What is there.
    pub found: String,
    /// Whether it holds; none: that could not be seen.
    pub holds: Option<bool>,
    /// Where it was read.
    pub at: String,
}

/// How the outcome of an attack begins that reached the guest's kernel, and no more.
pub const BY_THE_MACHINE: &str = "stopped by the machine";

impl Property {
    /// Its name with the model's.
    pub fn label(&self) -> String {
        match self.model {
            Some(model) => format!("{model}.{}", self.name),
            None => self.name.clone(),
        }
    }

    /// Whether it is the virtual machine that makes it hold.
    pub fn is_by_the_machine(&self) -> bool {
        self.model == Some(Model::Microvm) && self.found.starts_with(BY_THE_MACHINE)
    }

    /// The same with nothing that would be a command to a terminal.
    pub fn printable(self) -> Self {
        Self {
            name: printable(&self.name),
            asked: printable(&self.asked),
            found: printable(&self.found),
            at: printable(&self.at),
            ..self
        }
    }

    /// Makes it one that is not known where it seems to hold and not all was looked at.
    pub(super) fn bound(&mut self, seen: &Observation, topic: Topic) {
        // Of a process that was not found nothing was looked at.
        let of_processes = matches!(topic, Topic::Threads | Topic::Descriptors | Topic::Filters);
        let others = of_processes.then(|| seen.unseen.get(&Topic::Processes));
        let why = seen.unseen.get(&topic).or(others.flatten());
        if let Some(why) = why.filter(|_| self.holds == Some(true)) {
            self.is_not_known(why);
        }
    }

    /// Makes it one that is not known.
    fn is_not_known(&mut self, why: &str) {
        self.found.push_str("; not known: ");
        self.found.push_str(why);
        self.holds = None;
    }

    /// A property that is seen to hold, or not.
    pub fn new(
        name: impl Into<String>,
        asked: impl Into<String>,
        found: &Fact<String>,
        holds: bool,
    ) -> Self {
        Self {
            name: name.into(),
            model: None,
            asked: asked.into(),
            found: found.value.clone(),
            holds: Some(holds),
            at: found.at.clone(),
        }
    }
}

/// What older runtimes give to every container beside what ours does: the tun device.
const TUN: &str = "c 10:200 rwm";

/// What is compared.
pub struct Comparison<'a> {
    /// The configuration.
    pub spec: &'a Spec,
    /// Its posture.
    pub asked: &'a Posture,
    /// What was read.
    pub seen: &'a Observation,
    /// The posture of that.
    pub found: &'a Posture,
    /// Whether it was read in a guest, where the host's files have other numbers.
    pub is_in_guest: bool,
}

/// Compares a configuration's posture with the kernel's.
pub fn compare(one: &Comparison<'_>) -> Vec<Property> {
    let Comparison { asked, found, .. } = *one;
    let mut all = Vec::new();
    for (kind, asked) in &asked.namespaces {
        if let Some(found) = found.namespaces.get(kind) {
            all.push(namespace(one, kind, asked, found));
        }
    }
    all.push(user_ids(asked, found));
    all.extend(processes::properties(one));
    for (set, found) in &found.capabilities {
        let nothing = Default::default();
        let asked = asked
            .capabilities
            .get(set)
            .map_or(&nothing, |fact| &fact.value);
        let list = |names: &std::collections::BTreeSet<String>| {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(" ")
            }
        };
        let text = Fact::new(&found.at, list(&found.value));
        let holds = found.value.is_subset(asked);
        all.push(Property::new(
            format!("capabilities.{set}"),
            list(asked),
            &text,
            holds,
        ));
    }
    all.push(Property::new(
        "no-new-privileges",
        asked.no_new_privileges.value.to_string(),
        &Fact::new(
            &found.no_new_privileges.at,
            found.no_new_privileges.value.to_string(),
        ),
        found.no_new_privileges.value || !asked.no_new_privileges.value,
    ));
    all.push(syscalls::property(one));
    all.extend(mounts::properties(one));
    all.push(devices(asked, found));
    for (name, asked, found) in [
        ("memory-limit", &asked.memory_limit, &found.memory_limit),
        ("pids-limit", &asked.pids_limit, &found.pids_limit),
    ] {
        let text = |limit: Option<u64>| limit.map_or("none".to_owned(), |limit| limit.to_string());
        let holds = asked
            .value
            .is_none_or(|asked| found.value.is_some_and(|found| found <= asked));
        let found = Fact::new(&found.at, text(found.value));
        all.push(Property::new(name, text(asked.value), &found, holds));
    }
    all.push(cpu(one));
    all.extend(resources::properties(one));
    for property in &mut all {
        let left = read_in(&property.name)
            .iter()
            .find(|kind| one.seen.left.contains(**kind));
        if let Some(kind) = left {
            let why = format!("the process is in a namespace ({kind}) that it made for itself");
            property.is_not_known(&why);
        }
    }
    let too_many = |property: &mut Property| {
        let topic = match property.name.as_str() {
            name if name.starts_with("capabilities.") => Topic::Threads,
            "no-new-privileges" => Topic::Threads,
            "masked-paths" | "read-only-paths" => Topic::Mounts,
            _ => return,
        };
        property.bound(one.seen, topic);
    };
    all.iter_mut().for_each(too_many);
    if let Some(why) = one.seen.unseen.get(&Topic::Mounts) {
        let found = Fact::new(format!("/proc/{}/mountinfo", one.seen.pid), why.clone());
        all.push(Property {
            holds: None,
            ..Property::new("mounts", "all looked at", &found, true)
        });
    }
    all
}

/// The namespaces of the first process, by their files, on which it depends what is seen of a property.
fn read_in(property: &str) -> &'static [&'static str] {
    match property {
        "user" | "groups" | "user-ids" | "group-ids" => &["user"],
        "masked-paths" | "read-only-paths" => &["mnt"],
        name if name.starts_with("root") || name.starts_with("mount ") => &["mnt"],
        name if name.starts_with("sysctl ") => &["ipc", "net", "uts"],
        name => {
            let kind = name.strip_prefix("namespace.");
            let mut all = NAMESPACES.iter();
            let found = all.find(|(name, ..)| kind == Some(*name));
            found.map_or(&[], |(_, _, file)| std::slice::from_ref(file))
        }
    }
}

/// What was not looked at whole, of a process of which nothing else is known to compare with.
pub fn bounds(seen: &Observation) -> Vec<Property> {
    let unseen = seen.unseen.iter().map(|(topic, why)| {
        let name = format!("{topic:?}").to_lowercase();
        let found = Fact::new(format!("/proc/{}", seen.pid), why.clone());
        Property {
            holds: None,
            ..Property::new(name, "all looked at", &found, true)
        }
    });
    unseen.collect()
}

fn namespace(
    one: &Comparison<'_>,
    kind: &str,
    asked: &Fact<Sharing>,
    found: &Fact<Sharing>,
) -> Property {
    let name = |sharing: &Sharing| match sharing {
        // It may be shared with other containers.
        Sharing::Own => "not the host's",
        Sharing::Host => "the host's",
    };
    let listed = NAMESPACES.into_iter().find(|(name, ..)| *name == kind);
    let file = listed.map_or(kind, |(_, _, file)| file);
    let known = one.seen.namespaces.get(file);
    let (mut said, mut holds) = (name(&found.value).to_owned(), Some(true));
    if asked.value == Sharing::Own && found.value == Sharing::Host {
        holds = Some(false);
    } else if asked.value == Sharing::Own && known.is_some_and(|one| !one.is_host_known) {
        said = "not ours; the host's cannot be seen".to_owned();
        holds = None;
    }
    if let Some((_, typ, _)) = listed
        && let Some(known) = known
        && joins_another(one, typ, file, known)
    {
        said.push_str(", and another than was to be joined");
        holds = Some(false);
    }
    let found = Fact::new(&found.at, said);
    Property {
        holds,
        ..Property::new(
            format!("namespace.{kind}"),
            name(&asked.value),
            &found,
            true,
        )
    }
}

/// Whether the namespace that was to be joined is seen to be another.
fn joins_another(
    one: &Comparison<'_>,
    typ: LinuxNamespaceType,
    file: &str,
    known: &Namespace,
) -> bool {
    let linux = one.spec.linux().as_ref();
    let listed = linux.and_then(|linux| linux.namespaces().as_ref());
    let mut listed = listed.into_iter().flatten();
    let asked = listed
        .find(|one| one.typ() == typ)
        .and_then(|one| one.path().as_ref());
    // A path may lead to something else by now, and the host's namespaces are not a guest's.
    let Some(path) = asked.filter(|_| !one.is_in_guest) else {
        return false;
    };
    let id = |path: &Path| {
        std::fs::metadata(path)
            .map(|file| (file.dev(), file.ino()))
            .ok()
    };
    let ours = id(Path::new(&format!("/proc/self/ns/{file}")));
    id(path)
        .zip(ours)
        .is_some_and(|(asked, ours)| asked.0 == ours.0 && asked.1 != known.own)
}

/// Processor time. systemd knows no finer share than a hundredth of a processor.
fn cpu(one: &Comparison<'_>) -> Property {
    let found = one.seen.limits.cpu;
    let text = |limit: Option<u64>| match limit {
        Some(limit) => format!("{}.{:03} processors", limit / 1000, limit % 1000),
        None => "not limited".to_owned(),
    };
    let resources = one
        .spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let cpu = resources.and_then(|all| all.cpu().as_ref());
    let quota = cpu
        .and_then(|cpu| cpu.quota())
        .and_then(|quota| u64::try_from(quota).ok());
    let period = cpu
        .and_then(|cpu| cpu.period())
        .filter(|period| *period > 0);
    let asked = quota.filter(|quota| *quota > 0);
    let asked = asked.and_then(|quota| {
        quota
            .saturating_mul(1000)
            .checked_div(period.unwrap_or(100_000))
    });
    let holds =
        asked.is_none_or(|asked| found.is_some_and(|found| found <= asked.next_multiple_of(10)));
    let found = Fact::new(&one.found.has_cpu_limit.at, text(found));
    Property::new("cpu-limit", text(asked), &found, holds)
}

fn user_ids(asked: &Posture, found: &Posture) -> Property {
    let values = |fact: &Fact<Option<Vec<Fact<IdRange>>>>| {
        let ranges = fact.value.as_ref()?.iter();
        Some(ranges.map(|range| range.value).collect())
    };
    let (asked, at) = (values(&asked.user_ids), &found.user_ids.at);
    id_map("user-ids", asked, values(&found.user_ids), at)
}

/// A map of ids; `None` is the host's own ids.
pub(super) fn id_map(
    name: &str,
    asked: Option<Vec<IdRange>>,
    found: Option<Vec<IdRange>>,
    at: &str,
) -> Property {
    let sorted = |ranges: Option<Vec<IdRange>>| {
        ranges.map(|mut ranges| {
            ranges.sort_by_key(|range| range.inside);
            ranges
        })
    };
    let text = |ranges: &Option<Vec<IdRange>>| match ranges {
        None => "the host's".to_owned(),
        Some(ranges) => {
            let ranges = ranges.iter().map(|one| {
                format!(
                    "{}+{} are {} on the host",
                    one.inside, one.size, one.outside
                )
            });
            ranges.collect::<Vec<_>>().join(", ")
        }
    };
    let (asked, found) = (sorted(asked), sorted(found));
    let holds = match (&asked, &found) {
        (None, _) => true,
        (Some(_), None) => false,
        // Of a namespace that is joined only that it is another was known.
        (Some(asked), Some(found)) => asked.is_empty() || asked == found,
    };
    let found = Fact::new(at, text(&found));
    Property::new(name, text(&asked), &found, holds)
}

fn devices(asked: &Posture, found: &Posture) -> Property {
    let defaults = engine::cgroup::default_devices().into_iter();
    let defaults = defaults
        .chain([TUN.to_owned()])
        .flat_map(|text| text.parse::<Devices>());
    let allowed: Vec<Devices> = asked
        .devices
        .iter()
        .map(|fact| fact.value.clone())
        .chain(defaults)
        .collect();
    let beyond: Vec<String> = found
        .devices
        .iter()
        .filter(|fact| !fact.value.are_among(&allowed))
        .map(|fact| fact.value.to_string())
        .collect();
    let at = found
        .devices
        .first()
        .map_or("the cgroup's device rules", |fact| fact.at.as_str());
    let said = if beyond.is_empty() {
        "no others".to_owned()
    } else {
        beyond.join(", ")
    };
    Property {
        name: "devices".to_owned(),
        model: None,
        asked: match asked.devices.len() {
            0 => "the usual ones".to_owned(),
            1 => "the usual ones and 1 rule".to_owned(),
            count => format!("the usual ones and {count} rules"),
        },
        found: if found.devices.is_empty() {
            "no rules that can be read".to_owned()
        } else {
            said
        },
        // In a user namespace nobody makes a device node: there are those that were mounted.
        holds: (!found.devices.is_empty() || found.user_ids.value.is_some())
            .then_some(beyond.is_empty()),
        at: at.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use engine::observation::{
        IdMaps, Instruction, Outside, Stray, StrayKind, Thread, ThreadFilters,
    };
    use serde_json::json;

    use super::*;
    use crate::verify::filter::Filter;
    use crate::verify::{config, live};

    fn spec() -> Spec {
        let spec = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs", "readonly": true},
            "process": {
                "cwd": "/", "user": {"uid": 7, "gid": 7, "additionalGids": [8]}, "noNewPrivileges": true,
                "capabilities": {}, "oomScoreAdj": 5, "apparmorProfile": "profile",
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 64}]
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec"]},
                {"destination": "/v", "type": "bind", "source": "/srv", "options": ["bind", "ro"]},
                {"destination": "/w", "type": "bind", "source": "/srv", "options": ["rbind", "rro", "nodev"],
                 "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
                 "gidMappings": [{"containerID": 0, "hostID": 2000, "size": 10}]}
            ],
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"},
                    {"type": "cgroup"}, {"type": "time"}, {"type": "user"}
                ],
                "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
                "gidMappings": [{"containerID": 0, "hostID": 2000, "size": 10}],
                "seccomp": {
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "syscalls": [{
                        "names": ["personality"], "action": "SCMP_ACT_ERRNO",
                        "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]
                    }]
                },
                "maskedPaths": ["/proc/keys", "/proc/acpi"],
                "readonlyPaths": ["/proc/sys"],
                "resources": {
                    "devices": [{"allow": false, "access": "rwm"}],
                    "memory": {
                        "limit": 4096, "swap": 8192, "reservation": 1024, "disableOOMKiller": false
                    },
                    "pids": {"limit": 9},
                    "cpu": {"quota": 1000, "cpus": "0-1", "mems": "0", "shares": 512},
                    "hugepageLimits": [{"pageSize": "2MB", "limit": 2097152}],
                    "rdma": {"mlx5_0": {"hcaHandles": 2}},
                    "blockIO": {
                        "weight": 500, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 512}]
                    },
                    "unified": {"memory.high": "2K", "cpuset.cpus": "0-1"}
                },
                "sysctl": {"net.ipv4.ip_local_port_range": "32768 60999"}
            }
        });
        serde_json::from_value(spec).unwrap()
    }

    fn filter() -> Vec<libc::sock_filter> {
        let spec = spec();
        let profile = spec.linux().as_ref().unwrap().seccomp().as_ref().unwrap();
        engine::compile_seccomp(profile).unwrap()
    }

    const STATUS: &str = "Uid:\t1007\t1007\t1007\t1007\nGid:\t2007\t2007\t2007\t2007\nGroups:\t2008 \n\
        CapInh:\t0\nCapPrm:\t0\nCapEff:\t0\nCapBnd:\t0\nCapAmb:\t0\nNoNewPrivs:\t1\nSeccomp:\t2";

    /// What is seen of a container that has what it asked for.
    fn seen() -> Observation {
        let namespace = json!({"own": 9, "host": [1], "is_host_known": true});
        let names = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
        let namespaces: serde_json::Map<_, _> = names
            .into_iter()
            .map(|name| (name.to_owned(), namespace.clone()))
            .collect();
        let place = |path: &str, mount: u64, file: u32| {
            json!({"path": path, "found": {"Ok": {
                "path": path, "mount": mount, "file": file, "device": [1, 3], "of": [0, 0], "inode": 1, "size": 60
            }}})
        };
        let (directory, device) = (libc::S_IFDIR, libc::S_IFCHR);
        let filter: Vec<Instruction> = filter()
            .into_iter()
            .map(|one| Instruction(one.code, one.jt, one.jf, one.k))
            .collect();
        let seen = json!({
            "pid": 7,
            "kernel": "Linux version 6",
            "namespaces": namespaces,
            "left": [],
            "uid_map": "0 1000 10\n",
            "gid_map": "0 2000 10\n",
            "rlimits": "Max open files            64                   64                   files     \n",
            "mounts": "\
50 40 0:50 / / ro - overlay overlay ro
51 50 0:51 / /proc rw,nosuid,noexec - proc proc rw
52 50 8:1 /srv /v ro - ext4 /dev/sda1 rw
53 50 8:1 /srv /w ro,nodev,idmapped - ext4 /dev/sda1 rw
54 53 0:60 / /w/below ro - tmpfs tmpfs rw
55 51 0:51 /sys /proc/sys ro - proc proc rw
56 51 0:53 /null /proc/keys rw - tmpfs tmpfs rw
57 50 0:54 / /dev/pts rw - devpts devpts rw
",
            "host_mounts": "\
20 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
21 20 0:60 / /srv/below rw shared:2 - tmpfs tmpfs rw
",
            "label": "profile (enforce)",
            "oom_score": 5,
            "threads": [{"pid": 7, "tid": 7, "status": STATUS}],
            "places": [
                place("/", 50, directory), place("/proc", 51, directory), place("/v", 52, directory),
                place("/w", 53, directory), place("/w/below", 54, directory), place("/proc/sys", 55, directory),
                place("/proc/keys", 56, device), place("/dev/pts", 57, directory),
                {"path": "/proc/acpi", "found": {"Ok": null}}
            ],
            "root_is_top": {"Ok": true},
            "outside": [],
            "objects": [],
            "strays": [],
            "other_rlimits": [],
            "devices": {"Ok": ["c 1:3 rwm"]},
            "limits": {
                "memory": 4096, "pids": 9, "cpu": 10, "memory_and_swap": 8192, "cpus": "0", "mems": "0"
            },
            "cgroup": {
                "hugetlb.2MB.max": ["2097152\n", "max\n"], "rdma.max": ["mlx5_0 hca_handle=2 hca_object=max\n"],
                "io.max": ["8:0 rbps=512 wbps=max riops=max wiops=max\n"], "io.weight": ["default 4950\n"],
                "cpu.weight": ["59\n"],
                "memory.low": ["1024\n"], "memory.high": ["2048\n"], "cpuset.cpus": ["0\n"],
                "memory.oom_control": ["oom_kill_disable 0\nunder_oom 0\n"]
            },
            "sysctls": {"net.ipv4.ip_local_port_range": {"Ok": "32768\t60999"}},
            "seccomp": {"Ok": [filter]},
            "other_filters": [],
            "unseen": {}
        });
        serde_json::from_value(seen).unwrap()
    }

    fn compared(spec: &Spec, seen: &Observation) -> Vec<Property> {
        let asked = config::posture(Path::new("/b"), spec, vec![Filter::new(filter())]);
        compare(&Comparison {
            spec,
            asked: &asked,
            seen,
            found: &live::posture(seen),
            is_in_guest: false,
        })
    }

    /// The names of the properties that do not hold when this is what is seen, and of those that are then not known.
    fn broken_and_unknown(change: impl Fn(&mut Observation)) -> (Vec<String>, Vec<String>) {
        let mut seen = seen();
        change(&mut seen);
        let all = compared(&spec(), &seen);
        let names = |holds| {
            let of = all.iter().filter(|one| one.holds == holds);
            of.map(|one| one.name.clone()).collect()
        };
        (names(Some(false)), names(None))
    }

    fn broken(change: impl Fn(&mut Observation)) -> Vec<String> {
        let (broken, unknown) = broken_and_unknown(change);
        assert_eq!(unknown, [""; 0]);
        broken
    }

    fn mount(seen: &mut Observation, line: &str, file: u32, size: u64) {
        seen.mounts.push_str(line);
        seen.mounts.push('\n');
        let mut words = line.split(' ');
        let id: u64 = words.next().unwrap().parse().unwrap();
        let path = words.nth(3).unwrap();
        seen.places.retain(|one| one.path != path);
        let place = json!({"path": path, "found": {"Ok": {
            "path": path, "mount": id, "file": file, "device": [1, 3], "of": [0, 0], "inode": 1, "size": size
        }}});
        seen.places.push(serde_json::from_value(place).unwrap());
    }

    fn directory(seen: &mut Observation, line: &str) {
        mount(seen, line, libc::S_IFDIR, 60);
    }

    fn swap(seen: &mut Observation, line: &str, by: &str) {
        assert!(seen.mounts.contains(line), "{line}");
        seen.mounts = seen.mounts.replace(line, by);
    }

    fn status(seen: &mut Observation, line: &str, by: &str) {
        assert!(seen.threads[0].status.contains(line), "{line}");
        seen.threads[0].status = seen.threads[0].status.replace(line, by);
    }

    #[test]
    fn each_property_can_break_and_breaks_alone() {
        assert_eq!(broken(|_| ()), [""; 0]);
        let mut shown = BTreeSet::new();
        let mut shows = |name: &str, change: &dyn Fn(&mut Observation)| {
            assert_eq!(broken(change), [name]);
            shown.insert(name.to_owned());
        };
        for (kind, _, file) in NAMESPACES {
            shows(&format!("namespace.{kind}"), &|seen| {
                seen.namespaces.get_mut(file).unwrap().own = 1;
            });
        }
        for (set, name) in [
            ("ambient", "CapAmb"),
            ("bounding", "CapBnd"),
            ("effective", "CapEff"),
            ("inheritable", "CapInh"),
            ("permitted", "CapPrm"),
        ] {
            shows(&format!("capabilities.{set}"), &|seen| {
                status(seen, &format!("{name}:\t0"), &format!("{name}:\t1"));
            });
        }
        shows("user-ids", &|seen| seen.uid_map = "0 1000 11\n".to_owned());
        shows("group-ids", &|seen| seen.gid_map = "0 2000 11\n".to_owned());
        shows("user", &|seen| status(seen, "Uid:\t1007", "Uid:\t1000"));
        shows("user", &|seen| status(seen, "Uid:\t1007", "Uid:\t1008"));
        shows("groups", &|seen| status(seen, "Gid:\t2007", "Gid:\t2000"));
        shows("groups", &|seen| status(seen, "2008 ", "2008 2009"));
        shows("groups", &|seen| status(seen, "2008 ", "2008 5"));
        shows("groups", &|seen| status(seen, "Gid:\t2007", "Gid:\t2008"));
        shows("no-new-privileges", &|seen| {
            status(seen, "Privs:\t1", "Privs:\t0")
        });
        shows("rlimits", &|seen| {
            seen.rlimits = seen.rlimits.replace("64 ", "65 ")
        });
        shows("rlimits", &|seen| {
            let more = seen.rlimits.replace("64 ", "65 ");
            seen.other_rlimits.push((8, more));
        });
        shows("oom-score", &|seen| seen.oom_score = 4);
        shows("apparmor", &|seen| {
            seen.label = Some("profile2 (enforce)".to_owned())
        });
        shows("seccomp", &|seen| {
            status(seen, "Seccomp:\t2", "Seccomp:\t0")
        });
        shows("seccomp", &|seen| seen.seccomp = Ok(Vec::new()));
        shows("seccomp", &|seen| {
            seen.other_filters.push(ThreadFilters {
                pid: 7,
                tid: 8,
                filters: Ok(vec![vec![Instruction(6, 0, 0, libc::SECCOMP_RET_ALLOW)]]),
            });
        });
        for kind in [StrayKind::InTheHosts, StrayKind::Outside] {
            shows("processes", &|seen| {
                seen.strays.push(Stray {
                    pid: 8,
                    at: "/proc/8/task/8/ns/net".to_owned(),
                    kind,
                });
            });
        }
        shows("descriptors", &|seen| {
            seen.outside.push(Outside {
                at: "/proc/7/fd/3".to_owned(),
                target: "/".to_owned(),
            });
        });
        // Without capabilities nobody makes one.
        shows("descriptors", &|seen| {
            seen.objects.push(Outside {
                at: "/proc/7/fd/3".to_owned(),
                target: "anon_inode:bpf-map".to_owned(),
            });
        });
        shows("masked-paths", &|seen| {
            seen.places.retain(|one| one.path != "/proc/acpi");
            let mut place = seen.places[0].clone();
            place.path = "/proc/acpi".to_owned();
            seen.places.push(place);
        });
        let unmask = |seen: &mut Observation| {
            directory(seen, "60 56 0:51 /keys /proc/keys ro - proc proc rw");
        };
        assert_eq!(broken(unmask), ["masked-paths", "mount /proc/keys"]);
        shows("read-only-paths", &|seen| {
            swap(seen, "/proc/sys ro", "/proc/sys rw")
        });
        shows("root-read-only", &|seen| {
            swap(
                seen,
                "/ / ro - overlay overlay ro",
                "/ / rw - overlay overlay rw",
            )
        });
        shows("root", &|seen| seen.root_is_top = Ok(false));
        shows("root", &|seen| swap(seen, "0:50 / /", "8:1 /b/other /"));
        shows("root-propagation", &|seen| {
            swap(seen, "/ / ro -", "/ / ro shared:1 -")
        });
        shows("mount /proc", &|seen| {
            swap(seen, "rw,nosuid,noexec", "rw,nosuid")
        });
        shows("mount /proc", &|seen| {
            swap(seen, "rw,nosuid,noexec", "rw,noexec")
        });
        // A second one of the same kind may be of the host's processes.
        shows("mount /proc", &|seen| {
            swap(
                seen,
                "51 50 0:51",
                "49 50 0:52 / /proc rw,nosuid,noexec - proc proc rw\n51 49 0:51",
            );
        });
        shows("mount /v", &|seen| swap(seen, "/srv /v ro", "/srv /v rw"));
        shows("mount /v", &|seen| swap(seen, "/srv /v ro", "/etc /v ro"));
        shows("mount /v", &|seen| {
            swap(seen, "/srv /v ro", "/srv /v ro shared:1")
        });
        shows("mount /v", &|seen| {
            swap(seen, "52 50 8:1 /srv /v ro - ext4 /dev/sda1 rw\n", "");
            seen.places.retain(|one| one.path != "/v");
            seen.places.push(
                serde_json::from_value(json!({"path": "/v", "found": {"Ok": null}})).unwrap(),
            );
        });
        shows("mount /w", &|seen| swap(seen, "/w/below ro", "/w/below rw"));
        shows("mount /w", &|seen| swap(seen, "/w ro,nodev", "/w ro"));
        shows("mount /w", &|seen| swap(seen, ",idmapped", ""));
        let maps = |seen: &mut Observation, users: &str| {
            let mut places = seen.places.iter_mut();
            let place = places.find(|one| one.path == "/w").unwrap();
            let file = place.found.as_mut().unwrap().as_mut().unwrap();
            file.maps = Some(IdMaps {
                users: users.to_owned(),
                groups: "0 2000 10".to_owned(),
            });
        };
        assert_eq!(broken(|seen| maps(seen, "0 1000 10")), [""; 0]);
        shows("mount /w", &|seen| maps(seen, "0 0 10"));
        shows("devices", &|seen| {
            seen.devices = Ok(vec!["b 8:0 r".to_owned()]);
        });
        shows("memory-limit", &|seen| seen.limits.memory = Some(4097));
        shows("swap-limit", &|seen| seen.limits.memory_and_swap = None);
        shows("pids-limit", &|seen| seen.limits.pids = None);
        shows("cpu-limit", &|seen| seen.limits.cpu = Some(11));
        shows("cpu-limit", &|seen| seen.limits.cpu = None);
        shows("cpus", &|seen| seen.limits.cpus = Some("1-2".to_owned()));
        shows("memory-nodes", &|seen| {
            seen.limits.mems = Some("0,3".to_owned())
        });
        for (file, text, name) in [
            ("hugetlb.2MB.max", "max", "hugepageLimits[2MB]"),
            ("rdma.max", "mlx5_0 hca_handle=3", "rdma[mlx5_0].hcaHandles"),
            ("rdma.max", "mlx5_1 hca_handle=2", "rdma[mlx5_0].hcaHandles"),
            (
                "io.max",
                "8:0 rbps=max wbps=512",
                "blockIO.throttleReadBpsDevice[8:0]",
            ),
            (
                "io.max",
                "8:16 rbps=512",
                "blockIO.throttleReadBpsDevice[8:0]",
            ),
            ("io.weight", "default 4951", "blockIO.weight"),
            ("cpu.weight", "100", "cpu.shares"),
            ("memory.low", "1025", "memory.reservation"),
            (
                "memory.oom_control",
                "oom_kill_disable 1",
                "memory.disableOOMKiller",
            ),
            ("memory.high", "max", "unified[memory.high]"),
            ("cpuset.cpus", "0-2", "unified[cpuset.cpus]"),
        ] {
            shows(&format!("limit {name}"), &|seen| {
                seen.cgroup.insert(file.to_owned(), vec![text.to_owned()]);
            });
        }
        shows("sysctl net.ipv4.ip_local_port_range", &|seen| {
            let found = seen.sysctls.values_mut().next().unwrap();
            *found = Ok("1024\t60999".to_owned());
        });
        let all = compared(&spec(), &seen());
        let all: BTreeSet<String> = all.into_iter().map(|one| one.name).collect();
        assert_eq!(shown, all);
    }

    #[test]
    fn what_nobody_asked_for_is_told_wherever_it_is_mounted() {
        for (line, name) in [
            ("60 50 8:1 /srv /x rw - ext4 /dev/sda1 rw", "mount /x"),
            ("60 50 0:70 / /x rw - tmpfs tmpfs rw", "mount /x"),
            ("60 50 0:71 / /x ro - sysfs sysfs ro", "mount /x"),
            ("60 50 0:72 / /x rw - cgroup cgroup rw,devices", "mount /x"),
            (
                "60 51 8:1 / /proc/fs ro - ext4 /dev/sda1 rw",
                "mount /proc/fs",
            ),
            (
                "60 51 0:73 / /proc/fs rw - tmpfs tmpfs rw",
                "mount /proc/fs",
            ),
            (
                "60 50 0:74 / /sys/kernel/debug rw - debugfs debugfs rw",
                "mount /sys/kernel/debug",
            ),
            (
                "60 57 8:1 /etc /dev/pts/x rw - ext4 /dev/sda1 rw",
                "mount /dev/pts/x",
            ),
            ("60 57 8:1 /etc /v/x ro - ext4 /dev/sda1 rw", "mount /v/x"),
        ] {
            assert_eq!(broken(|seen| directory(seen, line)), [name], "{line}");
        }
        // A directory that is empty and stays so shows nothing, nor does a device that all have.
        let mask = "60 51 0:73 / /proc/fs ro - tmpfs tmpfs rw";
        assert_eq!(broken(|seen| mount(seen, mask, libc::S_IFDIR, 40)), [""; 0]);
        let null = "60 50 0:6 /null /dev/null rw - devtmpfs devtmpfs rw";
        assert_eq!(broken(|seen| mount(seen, null, libc::S_IFCHR, 0)), [""; 0]);
        // What is in a path that is read-only is so too.
        let line = "60 55 0:51 /sys/kernel /proc/sys/kernel rw - proc proc rw";
        assert_eq!(
            broken(|seen| directory(seen, line)),
            ["read-only-paths", "mount /proc/sys/kernel"]
        );
    }

    #[test]
    fn what_cannot_be_seen_is_not_known() {
        let unknown = |change: &dyn Fn(&mut Observation)| {
            let (broken, unknown) = broken_and_unknown(change);
            assert_eq!(broken, [""; 0]);
            unknown
        };
        let why = || "too many".to_owned();
        let bound = |topic: Topic| {
            unknown(&move |seen: &mut Observation| drop(seen.unseen.insert(topic, why())))
        };
        assert_eq!(bound(Topic::Descriptors), ["descriptors"]);
        assert_eq!(bound(Topic::Filters), ["seccomp"]);
        assert_eq!(
            bound(Topic::Mounts),
            ["masked-paths", "read-only-paths", "mounts"]
        );
        let hold = |target: &str| {
            let target = target.to_owned();
            unknown(&move |seen: &mut Observation| {
                seen.objects.push(Outside {
                    at: "/proc/7/fd/3".to_owned(),
                    target: target.clone(),
                });
            })
        };
        assert_eq!(hold("net:[4026532999]"), ["descriptors"]);
        assert_eq!(hold("anon_inode:[io_uring]"), [""; 0]);
        let of_threads = bound(Topic::Threads);
        for name in [
            "user",
            "groups",
            "processes",
            "no-new-privileges",
            "rlimits",
            "seccomp",
            "capabilities.bounding",
        ] {
            assert!(
                of_threads.iter().any(|one| one == name),
                "{name}: {of_threads:?}"
            );
        }
        // Nor is anything known of processes that were not found.
        let mut of_processes = bound(Topic::Processes);
        of_processes.retain(|one| one != "descriptors");
        assert_eq!(of_processes, of_threads);
        assert_eq!(unknown(&|seen| seen.seccomp = Err(why())), ["seccomp"]);
        assert_eq!(unknown(&|seen| seen.root_is_top = Err(why())), ["root"]);
        assert_eq!(unknown(&|seen| seen.label = None), ["apparmor"]);
        assert_eq!(unknown(&|seen| seen.limits.cpus = None), ["cpus"]);
        let net = |seen: &mut Observation| {
            seen.namespaces.get_mut("net").unwrap().is_host_known = false;
        };
        assert_eq!(unknown(&net), ["namespace.network"]);
        assert_eq!(
            unknown(&|seen| drop(seen.cgroup.remove("rdma.max"))),
            ["limit rdma[mlx5_0].hcaHandles"]
        );
        for found in [None, Some(Err(why()))] {
            let change = |seen: &mut Observation| {
                seen.sysctls.clear();
                let name = "net.ipv4.ip_local_port_range".to_owned();
                seen.sysctls
                    .extend(found.clone().map(|found| (name, found)));
            };
            assert_eq!(unknown(&change), ["sysctl net.ipv4.ip_local_port_range"]);
        }
        // What is wrong in a namespace that it made for itself is nobody's fault.
        let left = |kind: &'static str, change: &dyn Fn(&mut Observation)| {
            unknown(&|seen| {
                seen.left.insert(kind.to_owned());
                change(seen);
            })
        };
        assert_eq!(
            left("user", &|seen| seen.uid_map = "0 0 1\n".to_owned()),
            ["user-ids", "user", "groups", "group-ids"]
        );
        let of_mounts = left("mnt", &|seen| {
            directory(seen, "60 50 0:70 / /v rw - tmpfs tmpfs rw");
        });
        assert_eq!(
            of_mounts,
            [
                "namespace.mount",
                "masked-paths",
                "read-only-paths",
                "root-read-only",
                "root",
                "root-propagation",
                "mount /proc",
                "mount /v",
                "mount /w",
            ]
        );
        let sysctls = |seen: &mut Observation| {
            let found = seen.sysctls.values_mut().next().unwrap();
            *found = Ok("1\t2".to_owned());
        };
        assert_eq!(
            left("net", &sysctls),
            ["namespace.network", "sysctl net.ipv4.ip_local_port_range"]
        );
        let another = |seen: &mut Observation| {
            seen.strays.push(Stray {
                pid: 8,
                at: "/proc/8/task/8/ns/mnt".to_owned(),
                kind: StrayKind::InAnother,
            });
        };
        assert_eq!(unknown(&another), ["processes"]);
    }

    #[test]
    fn a_namespace_that_was_to_be_joined_is_that_one() {
        let mut spec = spec();
        let path = "/proc/self/ns/net";
        let namespaces = json!([{"type": "network", "path": path}]);
        let namespaces = serde_json::from_value(namespaces).unwrap();
        spec.linux_mut()
            .as_mut()
            .unwrap()
            .set_namespaces(namespaces);
        let holds = |own| {
            let mut seen = seen();
            let net = seen.namespaces.get_mut("net").unwrap();
            (net.own, net.host) = (own, Vec::new());
            let all = compared(&spec, &seen);
            let found = all.iter().find(|one| one.name == "namespace.network");
            found.unwrap().holds
        };
        let ours = std::fs::metadata(path).unwrap().ino();
        assert_eq!(holds(ours), Some(true));
        assert_eq!(holds(ours + 1), Some(false));
    }

    #[test]
    fn a_workload_may_give_up_root() {
        let mut spec = spec();
        let user = serde_json::from_value(json!({"uid": 0, "gid": 0})).unwrap();
        spec.process_mut().as_mut().unwrap().set_user(user);
        let all = compared(&spec, &seen());
        let of_users = all
            .iter()
            .filter(|one| ["user", "groups"].contains(&one.name.as_str()));
        assert!(
            of_users.clone().count() == 2 && of_users.clone().all(|one| one.holds == Some(true))
        );
    }

    #[test]
    fn what_would_be_a_command_to_a_terminal_is_escaped() {
        let found = Fact::new(
            "\u{1b}[31m",
            "a\u{202E}b\u{200B}\u{FEFF}\u{2066}é\n".to_owned(),
        );
        let property = Property::new("n", "a", &found, true).printable();
        assert_eq!(property.found, r"a\u{202e}b\u{200b}\u{feff}\u{2066}é\n");
        assert_eq!(property.at, r"\u{1b}[31m");
    }

    #[test]
    fn all_threads_count() {
        let more = |seen: &mut Observation| {
            seen.threads.push(Thread {
                pid: 8,
                tid: 8,
                status: STATUS.replace("Uid:\t1007", "Uid:\t1000"),
            });
        };
        assert_eq!(broken(more), ["user"]);
    }
}
