//! Who a container's processes are, where they are and how much they may take, against what was asked for.
//!
//! Ids are the kernel's, as this process's user namespace has them.

use std::collections::BTreeSet;

use engine::observation::{Observation, Stray, StrayKind, Thread, Topic};
use oci_spec::runtime::{PosixRlimitType, Process};

use super::conformance::{Comparison, Property, id_map};
use super::live;
use super::objects::{self, Maker};
use super::posture::{Fact, IdRange};

/// How many things are told by name.
const TOLD: usize = 8;

fn bounded(mut property: Property, seen: &Observation, topic: Topic) -> Property {
    property.bound(seen, topic);
    property
}

/// The properties of the processes.
pub(super) fn properties(one: &Comparison<'_>) -> Vec<Property> {
    let process = one.spec.process().as_ref();
    let linux = one.spec.linux().as_ref();
    let mut all = vec![user(one), descriptors(one), places(one)];
    if let Some(process) = process {
        all.push(groups(one, process));
        all.extend(rlimits(one.seen, process));
        all.extend(process.oom_score_adj().map(|asked| {
            let found = one.seen.oom_score;
            let at = &one.found.oom_score.at;
            let found_text = Fact::new(at, found.to_string());
            Property::new("oom-score", asked.to_string(), &found_text, found >= asked)
        }));
    }
    // The host's labels, processors and nodes of memory mean nothing in a guest, which is given none of them.
    if !one.is_in_guest {
        all.extend(labels(one));
        all.extend(cpusets(one));
    }
    let ranges = one.asked.group_ids.iter().map(|range| range.value);
    let ranges: Vec<IdRange> = ranges.collect();
    if !ranges.is_empty() {
        let found = live::id_ranges(one.seen, &one.seen.gid_map);
        let at = format!("/proc/{}/gid_map", one.seen.pid);
        all.push(id_map("group-ids", Some(ranges), found, &at));
    }
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let memory = resources.and_then(|all| all.memory().as_ref());
    let swap = memory
        .and_then(|memory| memory.swap())
        .filter(|swap| *swap > 0);
    all.extend(swap.map(|asked| {
        let found = one.seen.limits.memory_and_swap;
        let holds =
            found.is_some_and(|found| u64::try_from(asked).is_ok_and(|asked| found <= asked));
        let said = found.map_or("none".to_owned(), |found| found.to_string());
        let found = Fact::new("the cgroup's limit of memory and swap space", said);
        Property::new("swap-limit", asked.to_string(), &found, holds)
    }));
    all
}

fn cpusets(one: &Comparison<'_>) -> Vec<Property> {
    let mut all = Vec::new();
    let linux = one.spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let cpu = resources.and_then(|all| all.cpu().as_ref());
    let sets = cpu.map(|cpu| {
        [
            ("cpus", cpu.cpus(), &one.seen.limits.cpus),
            ("memory-nodes", cpu.mems(), &one.seen.limits.mems),
        ]
    });
    for (name, asked, found) in sets.into_iter().flatten() {
        let Some(asked) = asked.as_deref().filter(|asked| !asked.is_empty()) else {
            continue;
        };
        let holds = found
            .as_deref()
            .map(|found| list(found).is_subset(&list(asked)));
        let said = found.clone().unwrap_or_else(|| "not told".to_owned());
        let found = Fact::new("the cgroup's cpuset", said);
        all.push(Property {
            holds,
            ..Property::new(name, asked, &found, true)
        });
    }
    all
}

/// cpuset(7), list format.
pub(super) fn list(text: &str) -> BTreeSet<u32> {
    let ranges = text.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.trim().parse().ok()?..=last.trim().parse::<u32>().ok()?.min(1 << 16))
    });
    ranges.flatten().collect()
}

fn first(seen: &Observation) -> Option<&Thread> {
    seen.threads.iter().find(|thread| thread.tid == seen.pid)
}

/// The ids in a line of a thread's status, as the container has them: those of nobody in it have a mark.
fn ids(seen: &Observation, map: &str, thread: &Thread, name: &str) -> BTreeSet<String> {
    let ranges = live::id_ranges(seen, map);
    let text = live::status(thread, name).unwrap_or_default();
    let inside = |outside: &str| match &ranges {
        None => outside.to_owned(),
        Some(ranges) => outside
            .parse()
            .ok()
            .and_then(|id| live::inside(ranges, id))
            .map_or_else(|| format!("{outside} of the host"), |id| id.to_string()),
    };
    text.split_whitespace().map(inside).collect()
}

fn joined<'a>(list: impl IntoIterator<Item = &'a String>) -> String {
    let list: Vec<&str> = list.into_iter().map(String::as_str).collect();
    if list.is_empty() {
        "none".to_owned()
    } else {
        list.join(" ")
    }
}

/// The first process is who was asked for. A workload may give up root, and not become it.
fn user(one: &Comparison<'_>) -> Property {
    let (asked, least) = (one.asked.uid.value, &one.found.uid);
    let own = first(one.seen).map(|thread| ids(one.seen, &one.seen.uid_map, thread, "Uid"));
    let is_other = own
        .as_ref()
        .is_some_and(|own| own.iter().any(|id| *id != asked.to_string()));
    let said = match own.filter(|_| is_other) {
        Some(own) => joined(&own),
        None if least.value == u32::MAX => "none".to_owned(),
        None => least.value.to_string(),
    };
    let holds = asked == 0 || (least.value != 0 && !is_other);
    let property = Property::new(
        "user",
        asked.to_string(),
        &Fact::new(&least.at, said),
        holds,
    );
    bounded(property, one.seen, Topic::Threads)
}

/// While the first process is who was asked for, it has no other groups. Nobody gains that of root.
fn groups(one: &Comparison<'_>, process: &Process) -> Property {
    let user = process.user();
    let mut asked: BTreeSet<String> = BTreeSet::from([user.gid().to_string()]);
    let more = user.additional_gids().iter().flatten();
    asked.extend(more.map(ToString::to_string));
    let of = |thread: &Thread| {
        let mut groups = ids(one.seen, &one.seen.gid_map, thread, "Gid");
        groups.extend(ids(one.seen, &one.seen.gid_map, thread, "Groups"));
        groups
    };
    let mut beyond = BTreeSet::new();
    if let Some(thread) = first(one.seen) {
        let is_user = |id: &String| *id == user.uid().to_string();
        let own = ids(one.seen, &one.seen.uid_map, thread, "Uid");
        if own.iter().all(is_user) {
            beyond.extend(of(thread).difference(&asked).cloned());
            let mut primary = ids(one.seen, &one.seen.gid_map, thread, "Gid");
            primary.remove(&user.gid().to_string());
            beyond.extend(primary.into_iter().map(|id| format!("{id} as its own")));
        }
    }
    let has_root = one
        .seen
        .threads
        .iter()
        .any(|thread| of(thread).contains("0"));
    if has_root && user.uid() != 0 && !asked.contains("0") {
        beyond.insert("0".to_owned());
    }
    let said = if beyond.is_empty() {
        "no others".to_owned()
    } else {
        format!("also {}", joined(&beyond))
    };
    let at = format!("/proc/{}/status: Gid, Groups", one.seen.pid);
    let property = Property::new(
        "groups",
        joined(&asked),
        &Fact::new(at, said),
        beyond.is_empty(),
    );
    bounded(property, one.seen, Topic::Threads)
}

/// What processes hold outside of the container.
fn descriptors(one: &Comparison<'_>) -> Property {
    let outside = one.found.outside.iter();
    let mut held: Vec<String> = outside
        .map(|fact| format!("{} is {}", fact.at, fact.value))
        .collect();
    let count = held.len();
    held.truncate(TOLD);
    let of = |maker: Maker| {
        let all = objects::of(one.seen, one.found).filter(move |(_, whose)| *whose == maker);
        let all = all
            .take(TOLD)
            .map(|(one, _)| format!("{} is {}", one.at, one.target));
        all.collect::<Vec<_>>().join(", ")
    };
    let (own, unseen) = (of(Maker::Itself), of(Maker::Unseen));
    let (said, holds) = if count > 0 {
        (format!("{count}: {}", held.join(", ")), Some(false))
    } else if !unseen.is_empty() {
        (format!("{unseen}, in which nothing was looked at"), None)
    } else if !own.is_empty() {
        (format!("none; it may have made itself: {own}"), Some(true))
    } else {
        ("none".to_owned(), Some(true))
    };
    let at = format!("/proc/{}/fd, map_files", one.seen.pid);
    let property = Property {
        holds,
        ..Property::new(
            "descriptors",
            "none outside of it",
            &Fact::new(at, said),
            true,
        )
    };
    bounded(property, one.seen, Topic::Descriptors)
}

/// Every thread is where the first process is, and nobody else is there.
fn places(one: &Comparison<'_>) -> Property {
    let strays = &one.seen.strays;
    let is_broken = strays.iter().any(|one| one.kind != StrayKind::InAnother);
    let text = |stray: &Stray| {
        let what = match stray.kind {
            StrayKind::InTheHosts => "the host's",
            StrayKind::InAnother => "another, in which nothing was looked at",
            StrayKind::Outside => "not the container's",
        };
        format!("{} is {what}", stray.at)
    };
    let told: Vec<String> = strays.iter().take(TOLD).map(text).collect();
    let (said, holds) = match (strays.len(), is_broken) {
        (0, _) => ("all of them".to_owned(), Some(true)),
        (_, true) => (told.join(", "), Some(false)),
        (_, false) => (told.join(", "), None),
    };
    let at = format!("/proc/{}/ns, /proc/{}/cgroup", one.seen.pid, one.seen.pid);
    let asked = "in its namespaces and cgroup";
    let property = Property {
        holds,
        ..Property::new("processes", asked, &Fact::new(at, said), true)
    };
    let property = bounded(property, one.seen, Topic::Processes);
    bounded(property, one.seen, Topic::Threads)
}

/// Hard limits are the walls: a process sets its soft ones below them as it likes, so these are told, no more.
fn rlimits(seen: &Observation, process: &Process) -> Option<Property> {
    let asked = process.rlimits().as_ref().filter(|list| !list.is_empty())?;
    let (mut beyond, mut softer) = (Vec::new(), Vec::new());
    let others = seen.other_rlimits.iter();
    let others = others.map(|(pid, text)| (format!(" of process {pid}"), text));
    for (whose, text) in [(String::new(), &seen.rlimits)].into_iter().chain(others) {
        for one in asked {
            let name = rlimit_name(one.typ());
            let (soft, hard) = rlimit(text, name);
            let is_kept = soft.is_some_and(|soft| soft <= one.hard())
                && hard.is_some_and(|hard| hard <= one.hard());
            let number = |limit: Option<u64>| match limit {
                Some(u64::MAX) => "unlimited".to_owned(),
                Some(limit) => limit.to_string(),
                None => "not told".to_owned(),
            };
            if !is_kept {
                let (found, asked) = (number(hard), number(Some(one.hard())));
                beyond.push(format!("{name}{whose}: {found}, not {asked}"));
            } else if soft.is_some_and(|soft| soft > one.soft()) && whose.is_empty() {
                softer.push(format!("{name}: {}", number(soft)));
            }
        }
    }
    let holds = beyond.is_empty();
    beyond.truncate(TOLD);
    let said = match (holds, softer.is_empty()) {
        (false, _) => beyond.join(", "),
        (true, true) => "no higher".to_owned(),
        (true, false) => format!("no higher; soft ones were raised: {}", softer.join(", ")),
    };
    let found = Fact::new(format!("/proc/{}/limits", seen.pid), said);
    let count = match asked.len() {
        1 => "1 limit".to_owned(),
        count => format!("{count} limits"),
    };
    let property = Property::new("rlimits", count, &found, holds);
    Some(bounded(property, seen, Topic::Threads))
}

/// The soft and the hard limit (proc(5), /proc/pid/limits): `Max open files   1024   4096   files`.
fn rlimit(text: &str, name: &str) -> (Option<u64>, Option<u64>) {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let mut found = line.unwrap_or_default().split_whitespace();
    let mut next = || match found.next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    };
    (next(), next())
}

fn rlimit_name(kind: PosixRlimitType) -> &'static str {
    match kind {
        PosixRlimitType::RlimitCpu => "Max cpu time",
        PosixRlimitType::RlimitFsize => "Max file size",
        PosixRlimitType::RlimitData => "Max data size",
        PosixRlimitType::RlimitStack => "Max stack size",
        PosixRlimitType::RlimitCore => "Max core file size",
        PosixRlimitType::RlimitRss => "Max resident set",
        PosixRlimitType::RlimitNproc => "Max processes",
        PosixRlimitType::RlimitNofile => "Max open files",
        PosixRlimitType::RlimitMemlock => "Max locked memory",
        PosixRlimitType::RlimitAs => "Max address space",
        PosixRlimitType::RlimitLocks => "Max file locks",
        PosixRlimitType::RlimitSigpending => "Max pending signals",
        PosixRlimitType::RlimitMsgqueue => "Max msgqueue size",
        PosixRlimitType::RlimitNice => "Max nice priority",
        PosixRlimitType::RlimitRtprio => "Max realtime priority",
        PosixRlimitType::RlimitRttime => "Max realtime timeout",
    }
}

/// The profiles of security modules: of one that is not there nothing is known.
fn labels(one: &Comparison<'_>) -> Vec<Property> {
    let label = one.seen.label.as_deref();
    let (apparmor, selinux) = (&one.asked.apparmor, &one.asked.selinux);
    let apparmor = apparmor.value.as_ref().filter(|name| *name != "unconfined");
    // `docker-default (enforce)`
    let is_profile = |asked: &str, found: &str| {
        found
            .strip_prefix(asked)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(" ("))
    };
    // `system_u:system_r:container_t:s0:c1,c2` is of the other module.
    let of_selinux = label.filter(|label| label.split(':').count() > 3 && !label.ends_with(')'));
    let of_apparmor = label.filter(|_| of_selinux.is_none());
    let apparmor = apparmor.map(|asked| {
        (
            "apparmor",
            asked,
            of_apparmor.map(|found| is_profile(asked, found)),
        )
    });
    let selinux = selinux.value.as_ref();
    let selinux = selinux.map(|asked| ("selinux", asked, of_selinux.map(|found| found == asked)));
    let property = |(name, asked, holds): (&str, &String, Option<bool>)| {
        let said = label.unwrap_or("no security module tells one");
        let at = format!("/proc/{}/attr/current", one.seen.pid);
        Property {
            holds,
            ..Property::new(name, asked, &Fact::new(at, said.to_owned()), true)
        }
    };
    apparmor.into_iter().chain(selinux).map(property).collect()
}
