//! What was asked for against what the kernel says: a property for each promise that a configuration makes.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use serde::Serialize;

use super::filter::{self, Call, Filter};
use super::posture::{Devices, Fact, IdRange, Mount, Posture, Sharing};
use super::printable;
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

/// System call numbers beyond the greatest in use.
const NUMBERS: u32 = 1024;

/// The bit in the number of a call of the x32 kind.
const X32: u32 = 0x4000_0000;

/// Compares a configuration's posture with the kernel's.
pub fn compare(spec: &Spec, asked: &Posture, found: &Posture) -> Vec<Property> {
    let mut all = Vec::new();
    for (kind, asked) in &asked.namespaces {
        let Some(found) = found.namespaces.get(kind) else {
            continue;
        };
        let name = |sharing: &Sharing| match sharing {
            Sharing::Own => "its own",
            Sharing::Host => "the host's",
        };
        let holds = asked.value == Sharing::Host || found.value == Sharing::Own;
        let found = Fact::new(&found.at, name(&found.value).to_owned());
        all.push(Property::new(
            format!("namespace.{kind}"),
            name(&asked.value),
            &found,
            holds,
        ));
    }
    all.push(user_ids(asked, found));
    let uid = |uid: u32| {
        if uid == u32::MAX {
            "none".to_owned()
        } else {
            uid.to_string()
        }
    };
    all.push(Property::new(
        "user",
        uid(asked.uid.value),
        &Fact::new(&found.uid.at, uid(found.uid.value)),
        // A workload may give up root, and not become it.
        asked.uid.value == 0 || found.uid.value != 0,
    ));
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
    all.push(seccomp(spec, asked, found));
    all.push(paths(
        "masked-paths",
        &asked.masked.value,
        &found.masked,
        |_| false,
    ));
    all.push(paths(
        "read-only-paths",
        &asked.read_only.value,
        &found.read_only,
        |path| {
            found.masked.value.iter().any(|one| path.starts_with(one))
                || found
                    .mount_of(path)
                    .is_some_and(|mount| mount.value.is_read_only)
        },
    ));
    let root = &found.root_is_read_only;
    all.push(Property::new(
        "root-read-only",
        asked.root_is_read_only.value.to_string(),
        &Fact::new(&root.at, root.value.to_string()),
        root.value || !asked.root_is_read_only.value,
    ));
    mounts(asked, found, &mut all);
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
    let cpu = &found.has_cpu_limit;
    let text = |is_limited: bool| if is_limited { "limited" } else { "not limited" };
    all.push(Property::new(
        "cpu-limit",
        text(asked.has_cpu_limit.value),
        &Fact::new(&cpu.at, text(cpu.value).to_owned()),
        cpu.value || !asked.has_cpu_limit.value,
    ));
    all
}

fn user_ids(asked: &Posture, found: &Posture) -> Property {
    let text = |ranges: &Option<Vec<_>>| match ranges {
        None => "the host's".to_owned(),
        Some(ranges) => {
            let ranges = ranges.iter();
            let ranges = ranges.map(|Fact { value: one, .. }: &Fact<IdRange>| {
                format!(
                    "{}+{} are {} on the host",
                    one.inside, one.size, one.outside
                )
            });
            ranges.collect::<Vec<_>>().join(", ")
        }
    };
    let (asked, found) = (&asked.user_ids, &found.user_ids);
    let holds = match (&asked.value, &found.value) {
        (None, _) => true,
        (Some(_), None) => false,
        // Of a namespace that is joined only that it is another was known.
        (Some(asked), Some(found)) => {
            asked.is_empty() || {
                let sorted = |ranges: &Vec<Fact<IdRange>>| {
                    let ranges = ranges.iter().map(|range| range.value);
                    let mut ranges: Vec<IdRange> = ranges.collect();
                    ranges.sort_by_key(|range| range.inside);
                    ranges
                };
                sorted(asked) == sorted(found)
            }
        }
    };
    let found = Fact::new(&found.at, text(&found.value));
    Property::new("user-ids", text(&asked.value), &found, holds)
}

/// Every call that the filter in force lets through must be one that the profile lets through.
fn seccomp(spec: &Spec, asked: &Posture, found: &Posture) -> Property {
    let text = |filters: &[Filter]| match filters.len() {
        0 => "no filter".to_owned(),
        1 => "a filter".to_owned(),
        count => format!("{count} filters"),
    };
    let wanted = asked.seccomp.value.as_deref().unwrap_or_default();
    let Some(filters) = found.seccomp.value.as_deref() else {
        return Property {
            name: "seccomp".to_owned(),
            model: None,
            asked: text(wanted),
            found: "filters that cannot be read".to_owned(),
            holds: wanted.is_empty().then_some(true),
            at: found.seccomp.at.clone(),
        };
    };
    let mut beyond = Vec::new();
    if !wanted.is_empty() {
        let cases = argument_cases(spec);
        for (architecture, kind, bit) in [
            (engine::AUDIT_ARCH_X86_64, "64-bit", 0),
            (engine::AUDIT_ARCH_X86_64, "x32", X32),
            (engine::AUDIT_ARCH_I386, "32-bit", 0),
        ] {
            for number in 0..NUMBERS {
                let is_beyond = cases.iter().any(|arguments| {
                    let mut call = Call::new(architecture, number | bit);
                    call.arguments = *arguments;
                    filter::answer(filters, &call).lets_through()
                        && !filter::answer(wanted, &call).lets_through()
                });
                if is_beyond {
                    beyond.push(format!("{number} ({kind})"));
                }
            }
        }
    }
    let mut said = text(filters);
    if !beyond.is_empty() {
        said.push_str(" that lets more calls through: ");
        said.push_str(&beyond.join(", "));
    }
    let found = Fact::new(&found.seccomp.at, said);
    Property::new("seccomp", text(wanted), &found, beyond.is_empty())
}

/// Arguments for which a profile may answer differently: none, all bits, and what it names, with its neighbours.
fn argument_cases(spec: &Spec) -> Vec<[u64; 6]> {
    let mut cases = vec![[0; 6], [u64::MAX; 6]];
    let profile = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.seccomp().as_ref());
    let rules = profile.and_then(|profile| profile.syscalls().as_ref());
    for argument in rules
        .into_iter()
        .flatten()
        .flat_map(|rule| rule.args().iter().flatten())
    {
        let value = argument.value();
        for value in [value, value.wrapping_add(1), value.wrapping_sub(1)] {
            let mut case = [0; 6];
            if let Some(place) = case.get_mut(argument.index()) {
                *place = value;
            }
            if !cases.contains(&case) {
                cases.push(case);
            }
        }
    }
    cases
}

fn paths(
    name: &str,
    asked: &[PathBuf],
    found: &Fact<Vec<PathBuf>>,
    holds_anyway: impl Fn(&Path) -> bool,
) -> Property {
    let is_missing = |path: &&PathBuf| {
        !found.value.iter().any(|one| path.starts_with(one)) && !holds_anyway(path)
    };
    let missing: Vec<String> = asked
        .iter()
        .filter(is_missing)
        .map(|path| path.display().to_string())
        .collect();
    let holds = missing.is_empty();
    let said = if holds {
        "all of them".to_owned()
    } else {
        format!("all but {}", missing.join(", "))
    };
    let count = match asked.len() {
        1 => "1 path".to_owned(),
        count => format!("{count} paths"),
    };
    Property::new(name, count, &Fact::new(&found.at, said), holds)
}

fn flags(mount: &Mount) -> String {
    let flags = [
        (mount.is_read_only, "ro"),
        (mount.is_nosuid, "nosuid"),
        (mount.is_nodev, "nodev"),
    ];
    let set: Vec<&str> = flags
        .into_iter()
        .filter_map(|(is_set, name)| is_set.then_some(name))
        .collect();
    if set.is_empty() {
        "mounted".to_owned()
    } else {
        format!("mounted {}", set.join(","))
    }
}

fn mounts(asked: &Posture, found: &Posture, all: &mut Vec<Property>) {
    for Fact { value: asked, .. } in &asked.mounts {
        let name = format!("mount {}", asked.destination.display());
        let place = found
            .mounts
            .iter()
            .rev()
            .find(|one| one.value.destination == asked.destination);
        all.push(match place {
            Some(Fact { at, value }) => {
                let holds = (value.is_read_only || !asked.is_read_only)
                    && (value.is_nosuid || !asked.is_nosuid)
                    && (value.is_nodev || !asked.is_nodev);
                Property::new(name, flags(asked), &Fact::new(at, flags(value)), holds)
            }
            // A link of the image may have led it to another place.
            None => Property {
                name,
                model: None,
                asked: flags(asked),
                found: "nothing at this path".to_owned(),
                holds: None,
                at: found.masked.at.clone(),
            },
        });
    }
    let is_asked = |path: &Path| {
        asked
            .mounts
            .iter()
            .any(|one| path.starts_with(&one.value.destination))
    };
    for Fact { at, value } in &found.mounts {
        let Some(source) = value
            .source
            .as_deref()
            .filter(|_| !is_asked(&value.destination))
        else {
            continue;
        };
        let found = Fact::new(
            at,
            format!("{} of the host, {}", source.display(), flags(value)),
        );
        let name = format!("mount {}", value.destination.display());
        all.push(Property::new(name, "none", &found, false));
    }
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
        .filter(|fact| !allowed.iter().any(|one| one.cover(&fact.value)))
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
        holds: (!found.devices.is_empty()).then_some(beyond.is_empty()),
        at: at.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::verify::config;

    fn spec() -> Spec {
        let spec = serde_json::json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs", "readonly": true},
            "process": {"cwd": "/", "user": {"uid": 7, "gid": 7}, "noNewPrivileges": true, "capabilities": {}},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/v", "type": "bind", "source": "/srv", "options": ["bind", "ro"]}
            ],
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"},
                    {"type": "cgroup"}, {"type": "time"}, {"type": "user"}
                ],
                "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
                "seccomp": {
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "syscalls": [{
                        "names": ["personality"], "action": "SCMP_ACT_ERRNO",
                        "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]
                    }]
                },
                "maskedPaths": ["/proc/keys"],
                "readonlyPaths": ["/proc/sys"],
                "resources": {
                    "devices": [{"allow": false, "access": "rwm"}],
                    "memory": {"limit": 4096}, "pids": {"limit": 9}, "cpu": {"quota": 1000}
                }
            }
        });
        serde_json::from_value(spec).unwrap()
    }

    fn posture() -> Posture {
        let spec = spec();
        let profile = spec.linux().as_ref().unwrap().seccomp().as_ref().unwrap();
        let filter = Filter::new(engine::compile_seccomp(profile).unwrap());
        let mut posture = config::posture(Path::new("/b"), &spec, vec![filter]);
        posture.devices = vec![Fact::new("d", "c 1:3 rwm".parse().unwrap())];
        posture
    }

    /// The names of the properties that do not hold when this is what is found.
    fn broken(change: impl Fn(&mut Posture)) -> Vec<String> {
        let mut found = posture();
        change(&mut found);
        let all = compare(&spec(), &posture(), &found);
        let broken = all.into_iter().filter(|one| one.holds != Some(true));
        broken.map(|one| one.name).collect()
    }

    #[test]
    fn each_property_can_break_and_breaks_alone() {
        assert_eq!(broken(|_| ()), [""; 0]);
        let mut shown = BTreeSet::new();
        let mut shows = |name: &str, change: &dyn Fn(&mut Posture)| {
            assert_eq!(broken(change), [name]);
            shown.insert(name.to_owned());
        };
        for kind in ["cgroup", "ipc", "mount", "network", "pid", "time", "uts"] {
            shows(&format!("namespace.{kind}"), &|found| {
                found.namespaces.get_mut(kind).unwrap().value = Sharing::Host;
            });
        }
        for set in [
            "ambient",
            "bounding",
            "effective",
            "inheritable",
            "permitted",
        ] {
            shows(&format!("capabilities.{set}"), &|found| {
                found
                    .capabilities
                    .get_mut(set)
                    .unwrap()
                    .value
                    .insert("CAP_CHOWN".to_owned());
            });
        }
        shows("user-ids", &|found| {
            found.user_ids.value.as_mut().unwrap()[0].value.outside = 0
        });
        shows("user", &|found| found.uid.value = 0);
        shows("no-new-privileges", &|found| {
            found.no_new_privileges.value = false
        });
        shows("seccomp", &|found| found.seccomp.value = Some(Vec::new()));
        shows("masked-paths", &|found| found.masked.value.clear());
        shows("read-only-paths", &|found| found.read_only.value.clear());
        shows("root-read-only", &|found| {
            found.root_is_read_only.value = false
        });
        shows("mount /v", &|found| {
            found.mounts[1].value.is_read_only = false
        });
        shows("mount /proc", &|found| drop(found.mounts.remove(0)));
        shows("devices", &|found| {
            found
                .devices
                .push(Fact::new("d", "b 8:0 r".parse().unwrap()))
        });
        shows("memory-limit", &|found| {
            found.memory_limit.value = Some(4097)
        });
        shows("pids-limit", &|found| found.pids_limit.value = None);
        shows("cpu-limit", &|found| found.has_cpu_limit.value = false);
        let all = compare(&spec(), &posture(), &posture());
        let all: BTreeSet<String> = all.into_iter().map(|one| one.name).collect();
        assert_eq!(shown, all);
        // One that nobody asked for is told beside them.
        let more = |found: &mut Posture| {
            let mut mount = found.mounts[1].clone();
            mount.value.destination = "/w".into();
            found.mounts.push(mount);
        };
        assert_eq!(broken(more), ["mount /w"]);
    }

    #[test]
    fn a_filter_that_differs_for_one_argument_is_found() {
        let mut other = spec();
        let linux = other.linux_mut().as_mut().unwrap();
        let profile = serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{
                "names": ["personality"], "action": "SCMP_ACT_ERRNO",
                "args": [{"index": 0, "value": 9, "op": "SCMP_CMP_EQ"}]
            }]
        });
        let profile = serde_json::from_value(profile).unwrap();
        linux.set_seccomp(Some(profile));
        let profile = linux.seccomp().as_ref().unwrap();
        let filter = Filter::new(engine::compile_seccomp(profile).unwrap());
        let mut found = posture();
        found.seccomp.value = Some(vec![filter]);
        let property = seccomp(&spec(), &posture(), &found);
        assert_eq!(property.holds, Some(false));
        assert!(
            property
                .found
                .ends_with("lets more calls through: 135 (64-bit)"),
            "{}",
            property.found
        );
    }
}
