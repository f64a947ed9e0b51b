//! What `linux.resources` asks for beside memory, processes and processor time, against the files of the cgroup; and the
//! kernel parameters of the container's namespaces.
//!
//! A limit holds where the cgroup or one above it has it. Versions 1 and 2 have other files, of which those that are there
//! are asked; one for which there is none is not known.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxNetwork, LinuxResources};

use super::config::bytes;
use super::conformance::{Comparison, Property};
use super::live;
use super::posture::Fact;
use super::processes::list;

/// The parameter whose values are ids of groups, as its reader's user namespace has them.
const PING_GROUPS: &str = "net.ipv4.ping_group_range";

/// How what is found may differ from what was asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bound {
    /// It is no more.
    AtMost,
    /// It is the same.
    Same,
}

/// Something that was asked for.
struct Asked {
    /// Its place below `linux.resources`.
    field: String,
    bound: Bound,
    /// The files that may have it, each with the value in it.
    files: Vec<(String, Value)>,
    /// As it is told.
    said: String,
}

/// What a file is to say.
enum Value {
    /// One number; `max` and -1 are none.
    Number(u64),
    /// The number in the line that begins with a word.
    OfLine(String, u64),
    /// The number after `key=` in the line that begins with a word.
    OfKey(String, &'static str, u64),
    /// The words of each of these lines, among others.
    Text(String),
    /// These numbers (cpuset(7), list format).
    List(String),
}

impl Asked {
    fn new(field: impl Into<String>, value: u64) -> Self {
        Self {
            field: field.into(),
            bound: Bound::AtMost,
            files: Vec::new(),
            said: value.to_string(),
        }
    }

    fn same(self) -> Self {
        Self {
            bound: Bound::Same,
            ..self
        }
    }

    fn file(mut self, name: impl Into<String>, value: Value) -> Self {
        self.files.push((name.into(), value));
        self
    }
}

/// The properties of limits and parameters.
pub(super) fn properties(one: &Comparison<'_>) -> Vec<Property> {
    let Some(linux) = one.spec.linux() else {
        return Vec::new();
    };
    let asked = linux.resources().as_ref().map(|all| asked(all, one));
    let limits = asked.into_iter().flatten().map(|asked| limit(one, &asked));
    let mut parameters: Vec<(&String, &String)> = linux.sysctl().iter().flatten().collect();
    parameters.sort_unstable();
    let parameters = parameters
        .into_iter()
        .map(|(name, asked)| parameter(one, name, asked));
    limits.chain(parameters).collect()
}

fn asked(resources: &LinuxResources, one: &Comparison<'_>) -> Vec<Asked> {
    let mut all = Vec::new();
    all.extend(resources.cpu().iter().flat_map(of_cpu));
    let is_version_1 = one.seen.cgroup.contains_key("memory.oom_control");
    let memory = resources.memory().iter();
    all.extend(memory.flat_map(|memory| of_memory(memory, is_version_1)));
    for huge in resources.hugepage_limits().iter().flatten() {
        let (size, limit) = (huge.page_size(), huge.limit());
        if let Ok(limit) = u64::try_from(limit) {
            all.push(
                Asked::new(format!("hugepageLimits[{size}]"), limit)
                    .file(format!("hugetlb.{size}.max"), Value::Number(limit))
                    .file(
                        format!("hugetlb.{size}.limit_in_bytes"),
                        Value::Number(limit),
                    ),
            );
        }
    }
    // Disks and adapters are the host's: in a guest there are none of them.
    if !one.is_in_guest {
        all.extend(resources.block_io().iter().flat_map(of_disks));
        all.extend(resources.network().iter().flat_map(of_network));
        for (device, limits) in resources.rdma().iter().flatten() {
            let handles = ("hcaHandles", "hca_handle", limits.hca_handles());
            let objects = ("hcaObjects", "hca_object", limits.hca_objects());
            for (field, key, limit) in [handles, objects] {
                all.extend(limit.map(|limit| {
                    let value = Value::OfKey(device.clone(), key, limit.into());
                    Asked::new(format!("rdma[{device}].{field}"), limit.into())
                        .file("rdma.max", value)
                }));
            }
        }
    }
    let unified = resources.unified().iter().flatten();
    all.extend(unified.filter_map(|(name, value)| of_file(name, value.trim())));
    all.sort_by(|one, other| one.field.cmp(&other.field));
    all
}

/// A file of version 2 that is named itself.
fn of_file(name: &str, text: &str) -> Option<Asked> {
    if text == "max" {
        return None;
    }
    let (value, bound) = match bytes(text) {
        // A switch.
        Some(number) if number <= 1 => (Value::Number(number), Bound::Same),
        Some(number) => (Value::Number(number), Bound::AtMost),
        None if name.starts_with("cpuset.") => (Value::List(text.to_owned()), Bound::Same),
        None => (Value::Text(text.to_owned()), Bound::Same),
    };
    Some(Asked {
        field: format!("unified[{name}]"),
        bound,
        files: vec![(name.to_owned(), value)],
        said: text.to_owned(),
    })
}

fn of_cpu(cpu: &LinuxCpu) -> Vec<Asked> {
    let mut all = Vec::new();
    all.extend(cpu.shares().filter(|shares| *shares > 1).map(|shares| {
        Asked::new("cpu.shares", shares)
            .file("cpu.shares", Value::Number(shares))
            .file("cpu.weight", Value::Number(greatest_weight(shares)))
    }));
    all.extend(cpu.idle().filter(|idle| *idle == 1).map(|_| {
        Asked::new("cpu.idle", 1)
            .same()
            .file("cpu.idle", Value::Number(1))
    }));
    all.extend(cpu.burst().filter(|burst| *burst > 0).map(|burst| {
        Asked::new("cpu.burst", burst)
            .file("cpu.max.burst", Value::Number(burst))
            .file("cpu.cfs_burst_us", Value::Number(burst))
    }));
    let real_time = cpu.realtime_runtime();
    let real_time = real_time.and_then(|runtime| u64::try_from(runtime).ok());
    all.extend(real_time.filter(|runtime| *runtime > 0).map(|runtime| {
        Asked::new("cpu.realtimeRuntime", runtime).file("cpu.rt_runtime_us", Value::Number(runtime))
    }));
    all
}

/// Runtimes make weights of version 2 of shares in two ways: in a line from end to end, and through the defaults.
fn greatest_weight(shares: u64) -> u64 {
    let line = 1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142;
    line.max(engine::cgroup::cpu_weight(shares))
}

fn of_memory(memory: &LinuxMemory, is_version_1: bool) -> Vec<Asked> {
    let given = |value: Option<i64>| {
        let value = value.and_then(|value| u64::try_from(value).ok());
        value.filter(|value| *value > 0)
    };
    let mut all = Vec::new();
    all.extend(given(memory.reservation()).map(|bytes| {
        Asked::new("memory.reservation", bytes)
            .file("memory.low", Value::Number(bytes))
            .file("memory.soft_limit_in_bytes", Value::Number(bytes))
    }));
    all.extend(given(memory.kernel_tcp()).map(|bytes| {
        Asked::new("memory.kernelTCP", bytes)
            .file("memory.kmem.tcp.limit_in_bytes", Value::Number(bytes))
    }));
    // Version 2 has no such switch: its killer cannot be disabled.
    let killer = memory.disable_oom_killer();
    all.extend(killer.filter(|_| is_version_1).map(|disabled| {
        let value = Value::OfLine("oom_kill_disable".to_owned(), disabled.into());
        Asked::new("memory.disableOOMKiller", disabled.into()).file("memory.oom_control", value)
    }));
    all
}

fn of_disks(block: &LinuxBlockIo) -> Vec<Asked> {
    let mut all = Vec::new();
    let weight = block.weight().filter(|weight| *weight > 0).map(u64::from);
    all.extend(weight.map(|weight| {
        let word = || "default".to_owned();
        let asked = Asked::new("blockIO.weight", weight)
            .file("blkio.bfq.weight", Value::Number(weight))
            .file("blkio.weight", Value::Number(weight))
            .file("io.bfq.weight", Value::OfLine(word(), weight));
        match engine::cgroup::io_weight(weight) {
            Some(weight) => asked.file("io.weight", Value::OfLine(word(), weight)),
            None => asked,
        }
    }));
    for engine::cgroup::Throttle {
        field,
        v1,
        v2,
        devices,
    } in engine::cgroup::throttles(block)
    {
        for device in devices.iter().filter(|device| device.rate() > 0) {
            let number = format!("{}:{}", device.major(), device.minor());
            let rate = device.rate();
            all.push(
                Asked::new(format!("blockIO.{field}[{number}]"), rate)
                    .file("io.max", Value::OfKey(number.clone(), v2, rate))
                    .file(
                        format!("blkio.throttle.{v1}_device"),
                        Value::OfLine(number, rate),
                    ),
            );
        }
    }
    all
}

fn of_network(network: &LinuxNetwork) -> Vec<Asked> {
    let class = network.class_id().map(u64::from);
    let class = class.map(|class| {
        Asked::new("network.classID", class)
            .same()
            .file("net_cls.classid", Value::Number(class))
    });
    let priorities = network.priorities().iter().flatten().map(|one| {
        let priority = u64::from(one.priority());
        let value = Value::OfLine(one.name().clone(), priority);
        Asked::new(format!("network.priorities[{}]", one.name()), priority)
            .file("net_prio.ifpriomap", value)
    });
    class.into_iter().chain(priorities).collect()
}

/// A number of the kernel; `max` is greater than all.
fn number(text: &str) -> Option<u64> {
    match text.split_whitespace().next()? {
        "max" | "-1" => Some(u64::MAX),
        text => text.parse().ok(),
    }
}

/// What a file says of a value.
fn found(text: &str, value: &Value) -> Option<u64> {
    let mut lines = text.lines();
    let mut rest = |word: &str| lines.find_map(|line| line.strip_prefix(word)?.strip_prefix(' '));
    match value {
        Value::Number(_) => number(text.strip_prefix("default ").unwrap_or(text)),
        // Without a line for it there is no limit.
        Value::OfLine(word, _) => rest(word).map_or(Some(u64::MAX), number),
        Value::OfKey(word, key, _) => rest(word).map_or(Some(u64::MAX), |rest| {
            let mut pairs = rest.split(' ').filter_map(|pair| pair.split_once('='));
            pairs
                .find_map(|(name, value)| (name == *key).then_some(value))
                .map_or(Some(u64::MAX), number)
        }),
        Value::Text(_) | Value::List(_) => None,
    }
}

/// Whether each line of a text is in a file, by its words; a line of a file may have more of them.
fn has_lines(text: &str, asked: &str) -> bool {
    let words =
        |line: &str| -> Vec<String> { line.split_whitespace().map(str::to_owned).collect() };
    asked.lines().all(|line| {
        let asked = words(line);
        let mut lines = text.lines().map(words);
        lines.any(|found| {
            found.first() == asked.first() && asked.iter().all(|word| found.contains(word))
        })
    })
}

fn limit(one: &Comparison<'_>, asked: &Asked) -> Property {
    let files = asked.files.iter();
    let mut there =
        files.filter_map(|(name, value)| Some((name, value, one.seen.cgroup.get(name)?)));
    let name = format!("limit {}", asked.field);
    let Some((file, value, texts)) = there.next() else {
        let found = Fact::new("the cgroup", "no file that tells it".to_owned());
        return Property {
            holds: None,
            ..Property::new(name, &asked.said, &found, true)
        };
    };
    let own = texts.first().map_or("", |text| text.trim());
    let (said, holds) = match value {
        Value::Text(text) => (own.to_owned(), has_lines(own, text)),
        Value::List(text) => (own.to_owned(), list(own).is_subset(&list(text))),
        Value::Number(limit) | Value::OfLine(_, limit) | Value::OfKey(_, _, limit) => {
            let mut values = texts.iter().filter_map(|text| found(text, value));
            // What is shared out or switched is so in the cgroup itself.
            let is_own = asked.bound == Bound::Same || is_share(file);
            let found = if is_own { values.next() } else { values.min() };
            let said = match found {
                None => "not told".to_owned(),
                Some(u64::MAX) => "none".to_owned(),
                Some(number) => number.to_string(),
            };
            let holds = found.is_some_and(|found| match asked.bound {
                Bound::AtMost => found <= *limit,
                Bound::Same => found == *limit,
            });
            (said, holds)
        }
    };
    let found = Fact::new(format!("the cgroup's {file}"), said);
    Property::new(name, &asked.said, &found, holds)
}

/// Whether a file has a share of what the cgroup above has.
fn is_share(file: &str) -> bool {
    file.ends_with("weight") || file == "cpu.shares" || file == "memory.oom_control"
}

fn parameter(one: &Comparison<'_>, name: &str, asked: &str) -> Property {
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let groups = live::id_ranges(one.seen, &one.seen.gid_map).filter(|_| name == PING_GROUPS);
    let inside = |text: String| match &groups {
        None => text,
        Some(ranges) => {
            let ids = text.split(' ').map(|id| {
                let known = id.parse().ok().and_then(|id| live::inside(ranges, id));
                known.map_or_else(|| id.to_owned(), |id| id.to_string())
            });
            ids.collect::<Vec<_>>().join(" ")
        }
    };
    let (said, holds) = match one.seen.sysctls.get(name) {
        Some(Ok(found)) => {
            let found = inside(words(found));
            let holds = found == words(asked);
            (found, Some(holds))
        }
        Some(Err(why)) => (why.clone(), None),
        None => ("it was not looked at".to_owned(), None),
    };
    let at = format!("/proc/sys/{}", name.replace('.', "/"));
    Property {
        holds,
        ..Property::new(
            format!("sysctl {name}"),
            words(asked),
            &Fact::new(at, said),
            true,
        )
    }
}
