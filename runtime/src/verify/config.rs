//! What a bundle's configuration asks for, as a posture.
//!
//! The bundle is hostile: paths in it are looked at (whether they are the host's namespaces or sockets, where symbolic
//! links lead), never opened.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Capabilities, Hook, IOPriorityClass, Linux, LinuxCapabilities, LinuxDeviceType, LinuxIdMapping,
    LinuxNamespaceType, LinuxResources, LinuxSchedulerPolicy, LinuxSeccomp, LinuxSeccompFilterFlag,
    Mount as SpecMount, Process, Spec,
};

use super::filter::Filter;
use super::paths::resolve;
use super::posture::{Devices, Fact, IdRange, Mount, Node, Posture, Profile, Sharing};

/// The kinds of namespaces other than `user`.
pub(super) const NAMESPACES: [(&str, LinuxNamespaceType, &str); 7] = [
    ("pid", LinuxNamespaceType::Pid, "pid"),
    ("network", LinuxNamespaceType::Network, "net"),
    ("mount", LinuxNamespaceType::Mount, "mnt"),
    ("ipc", LinuxNamespaceType::Ipc, "ipc"),
    ("uts", LinuxNamespaceType::Uts, "uts"),
    ("cgroup", LinuxNamespaceType::Cgroup, "cgroup"),
    ("time", LinuxNamespaceType::Time, "time"),
];

/// The posture of a configuration in the bundle `directory`. `seccomp` is its compiled profile.
pub fn posture(directory: &Path, spec: &Spec, seccomp: Vec<Filter>) -> Posture {
    let nothing = Linux::default();
    let linux = spec.linux().as_ref().unwrap_or(&nothing);
    let process = spec.process().as_ref();
    let resources = linux.resources().as_ref();
    let text = |value: Option<&String>| value.filter(|text| !text.is_empty()).cloned();
    let propagation = linux.rootfs_propagation().as_deref().unwrap_or_default();
    Posture {
        namespaces: namespaces(linux),
        user_ids: user_ids(linux),
        group_ids: ranges("linux.gidMappings", linux.gid_mappings().as_ref()),
        uid: Fact::new(
            "process.user.uid",
            process.map_or(0, |process| process.user().uid()),
        ),
        gids: process.map(gids).unwrap_or_default(),
        capabilities: process
            .and_then(|process| process.capabilities().as_ref())
            .map(capabilities)
            .unwrap_or_default(),
        no_new_privileges: Fact::new(
            "process.noNewPrivileges",
            process.and_then(|process| process.no_new_privileges()) == Some(true),
        ),
        seccomp: Fact::new("linux.seccomp", Some(seccomp)),
        profile: linux.seccomp().as_ref().map(profile),
        apparmor: Fact::new(
            "process.apparmorProfile",
            text(process.and_then(|process| process.apparmor_profile().as_ref())),
        ),
        selinux: Fact::new(
            "process.selinuxLabel",
            text(process.and_then(|process| process.selinux_label().as_ref())),
        ),
        sysctls: sysctls(linux),
        masked: Fact::new("linux.maskedPaths", paths(linux.masked_paths().as_ref())),
        read_only: Fact::new(
            "linux.readonlyPaths",
            paths(linux.readonly_paths().as_ref()),
        ),
        mounts: spec
            .mounts()
            .iter()
            .flatten()
            .enumerate()
            .map(|(index, one)| Fact::new(format!("mounts[{index}]"), mount(directory, one)))
            .collect(),
        cgroups_below: cgroups_below(directory, spec),
        bundle: Some(resolve(directory)),
        root: Fact::new(
            "root.path",
            spec.root()
                .as_ref()
                .map(|root| resolve(&directory.join(root.path()))),
        ),
        root_is_read_only: Fact::new(
            "root.readonly",
            spec.root().as_ref().and_then(|root| root.readonly()) == Some(true),
        ),
        root_is_shared: Fact::new(
            "linux.rootfsPropagation",
            matches!(propagation, "shared" | "rshared"),
        ),
        devices: devices(resources),
        nodes: nodes(linux),
        interfaces: interfaces(linux),
        memory_limit: unified(resources, "memory.max", bytes)
            .unwrap_or_else(|| {
                let given = resources.and_then(|all| all.memory().as_ref()?.limit());
                Fact::new("linux.resources.memory.limit", limit(given))
            })
            .below(MEMORY_END),
        pids_limit: unified(resources, "pids.max", |text| text.parse().ok())
            .unwrap_or_else(|| {
                let given = resources.and_then(|all| Some(all.pids().as_ref()?.limit()));
                Fact::new("linux.resources.pids.limit", limit(given))
            })
            .below(PIDS_END),
        has_cpu_limit: unified(resources, "cpu.max", |text| {
            text.split_whitespace().next()?.parse::<u64>().ok()
        })
        .map_or_else(
            || {
                let given = resources.and_then(|all| all.cpu().as_ref()?.quota());
                Fact::new("linux.resources.cpu.quota", limit(given).is_some())
            },
            |fact| Fact::new(fact.at, fact.value.is_some()),
        ),
        real_time: real_time(process, resources),
        oom_score: Fact::new(
            "process.oomScoreAdj",
            process
                .and_then(|process| process.oom_score_adj())
                .unwrap_or(0),
        ),
        has_no_oom_killer: Fact::new(
            "linux.resources.memory.disableOOMKiller",
            resources.and_then(|all| all.memory().as_ref()?.disable_oom_killer()) == Some(true),
        ),
        speculates: speculates(linux),
        hooks: hooks(spec),
        outside: process.map(descriptors).unwrap_or_default(),
    }
}

/// 0 and below are no limit to Go's clients.
fn limit(value: Option<i64>) -> Option<u64> {
    value
        .and_then(|value| u64::try_from(value).ok())
        .filter(|value| *value > 0)
}

/// From here on a memory limit is none: no machine has so many bytes.
const MEMORY_END: u64 = 1 << 60;
/// From here on a limit of processes is none: the kernel has no more ids (proc_sys_kernel(5), "pid_max").
const PIDS_END: u64 = (4 << 20) + 1;

/// What `linux.resources.unified` sets a file of the cgroup to, which overrides the other properties; `max` is no limit.
fn unified(
    resources: Option<&LinuxResources>,
    file: &str,
    parse: impl Fn(&str) -> Option<u64>,
) -> Option<Fact<Option<u64>>> {
    let text = resources?.unified().as_ref()?.get(file)?;
    let at = format!("linux.resources.unified[{file:?}]");
    Some(Fact::new(at, parse(text.trim())))
}

/// A number of bytes as the kernel reads it, with a suffix.
pub(super) fn bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|one: char| one.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// What lets a process go before all others.
fn real_time(process: Option<&Process>, resources: Option<&LinuxResources>) -> Vec<Fact<String>> {
    let scheduler = process.and_then(|process| process.scheduler().as_ref());
    let policy = scheduler.and_then(|scheduler| match scheduler.policy() {
        LinuxSchedulerPolicy::SchedFifo => Some("SCHED_FIFO"),
        LinuxSchedulerPolicy::SchedRr => Some("SCHED_RR"),
        LinuxSchedulerPolicy::SchedDeadline => Some("SCHED_DEADLINE"),
        _ => None,
    });
    let policy = policy.map(|policy| {
        let what = format!("the scheduling policy is {policy}");
        Fact::new("process.scheduler.policy", what)
    });
    let priority = process.and_then(|process| process.io_priority().as_ref());
    let class = priority
        .filter(|priority| priority.class() == IOPriorityClass::IoprioClassRt)
        .map(|_| {
            let what = "the class of I/O is IOPRIO_CLASS_RT";
            Fact::new("process.ioPriority.class", what.to_owned())
        });
    let runtime = resources.and_then(|all| all.cpu().as_ref()?.realtime_runtime());
    let runtime = runtime.filter(|runtime| *runtime > 0).map(|runtime| {
        let what = format!("{runtime} microseconds of each period are for real-time processes");
        Fact::new("linux.resources.cpu.realtimeRuntime", what)
    });
    [policy, class, runtime].into_iter().flatten().collect()
}

fn paths(list: Option<&Vec<String>>) -> Vec<PathBuf> {
    list.into_iter().flatten().map(PathBuf::from).collect()
}

fn namespaces(linux: &Linux) -> BTreeMap<&'static str, Fact<Sharing>> {
    let listed: Vec<_> = linux.namespaces().iter().flatten().collect();
    let kinds = NAMESPACES.into_iter();
    let fact = |(name, kind, file): (&'static str, LinuxNamespaceType, &str)| {
        let found = listed.iter().position(|one| one.typ() == kind);
        let fact = match found {
            None => Fact::new("linux.namespaces", Sharing::Host),
            Some(index) => {
                let path = listed[index].path().as_deref();
                let is_host = path
                    .filter(|path| !path.as_os_str().is_empty())
                    .is_some_and(|path| is_of_the_host(path, file));
                let sharing = if is_host { Sharing::Host } else { Sharing::Own };
                let suffix = if is_host { ".path" } else { "" };
                Fact::new(format!("linux.namespaces[{index}]{suffix}"), sharing)
            }
        };
        (name, fact)
    };
    kinds.map(fact).collect()
}

/// The process and the name of the file, if a resolved path is that of a namespace of a process.
pub(super) fn process_namespace(path: &Path) -> Option<(&str, &str)> {
    let mut parts = path.strip_prefix("/proc").ok()?.to_str()?.split('/');
    let process = parts.next()?;
    let mut next = parts.next()?;
    if next == "task" {
        parts.next()?;
        next = parts.next()?;
    }
    let file = parts.next().filter(|_| next == "ns")?;
    parts.next().is_none().then_some((process, file))
}

/// Whether a file in a process's `ns` is a namespace of the kind that has the file `file`.
pub(super) fn is_of_kind(name: &str, file: &str) -> bool {
    name.strip_suffix("_for_children").unwrap_or(name) == file
}

/// Whether a namespace's path is the namespace of the host's first process, or ours. One that is not there yet is made
/// by somebody for the container.
fn is_of_the_host(path: &Path, file: &str) -> bool {
    use std::os::unix::fs::MetadataExt;
    let path = resolve(path);
    let own = std::process::id().to_string();
    let hosts = ["1", "self", "thread-self", &own];
    // Without the right to look at the first process its namespaces are known by their names alone.
    if let Some((process, name)) = process_namespace(&path)
        && hosts.contains(&process)
    {
        return is_of_kind(name, file);
    }
    let id = |path: &Path| {
        let file = std::fs::metadata(path).ok()?;
        Some((file.dev(), file.ino()))
    };
    let found = id(&path);
    let mut hosts = ["1", "self"].into_iter();
    found.is_some()
        && hosts.any(|process| found == id(Path::new(&format!("/proc/{process}/ns/{file}"))))
}

fn user_ids(linux: &Linux) -> Fact<Option<Vec<Fact<IdRange>>>> {
    let user = linux
        .namespaces()
        .iter()
        .flatten()
        .position(|one| one.typ() == LinuxNamespaceType::User);
    let Some(index) = user else {
        return Fact::new("linux.namespaces", None);
    };
    let path = linux.namespaces().as_ref().and_then(|all| {
        let path = all[index].path().as_deref();
        path.filter(|path| !path.as_os_str().is_empty())
    });
    let at = format!("linux.namespaces[{index}].path");
    // Maps have no effect on a namespace that is joined.
    if path.is_some_and(|path| is_of_the_host(path, "user")) {
        return Fact::new(at, None);
    }
    let ranges = ranges("linux.uidMappings", linux.uid_mappings().as_ref());
    if !ranges.is_empty() {
        return Fact::new("linux.uidMappings", Some(ranges));
    }
    // Whose ids these are is known when it is joined.
    Fact::new(at, Some(Vec::new()))
}

/// The maps of users or of groups, each at the id that it has on the host.
fn ranges(at: &str, maps: Option<&Vec<LinuxIdMapping>>) -> Vec<Fact<IdRange>> {
    let maps = maps.into_iter().flatten().enumerate();
    let range = |(index, map): (usize, &LinuxIdMapping)| {
        let range = IdRange {
            inside: map.container_id(),
            outside: map.host_id(),
            size: map.size(),
        };
        Fact::new(format!("{at}[{index}].hostID"), range)
    };
    maps.map(range).collect()
}

/// Where a process is to begin in what the runtime has open (CVE-2024-21626), or with the runtime's own program
/// (CVE-2019-5736).
fn descriptors(process: &Process) -> Vec<Fact<String>> {
    let program = process.args().iter().flatten().next();
    let program = program.map(|program| ("process.args[0]", Path::new(program)));
    let places = [("process.cwd", process.cwd().as_path())]
        .into_iter()
        .chain(program);
    let is_held = |path: &Path| {
        let mut parts = path
            .components()
            .skip(1)
            .filter_map(|part| part.as_os_str().to_str());
        parts.next() == Some("proc")
            && parts.any(|part| ["cwd", "exe", "fd", "map_files", "root"].contains(&part))
    };
    let held = places.filter(|(_, path)| path.is_absolute() && is_held(path));
    held.map(|(at, path)| Fact::new(at, path.display().to_string()))
        .collect()
}

fn gids(process: &Process) -> Vec<Fact<u32>> {
    let user = process.user();
    let others = user.additional_gids().iter().flatten().enumerate();
    let others =
        others.map(|(index, gid)| Fact::new(format!("process.user.additionalGids[{index}]"), *gid));
    [Fact::new("process.user.gid", user.gid())]
        .into_iter()
        .chain(others)
        .collect()
}

/// What the rules of a profile may let through; whoever decides in their place counts as letting it through.
fn profile(given: &LinuxSeccomp) -> Profile {
    use oci_spec::runtime::LinuxSeccompAction as Action;
    let rules = given.syscalls().iter().flatten().enumerate();
    let rules = rules.filter(|(_, rule)| {
        matches!(
            rule.action(),
            Action::ScmpActAllow
                | Action::ScmpActLog
                | Action::ScmpActNotify
                | Action::ScmpActTrace
        )
    });
    Profile {
        default: "linux.seccomp.defaultAction".to_owned(),
        rules: rules
            .map(|(index, rule)| {
                let names = rule.names().iter().cloned().collect();
                Fact::new(format!("linux.seccomp.syscalls[{index}]"), names)
            })
            .collect(),
    }
}

/// `SECCOMP_FILTER_FLAG_SPEC_ALLOW` leaves a mitigation out that a filter brings otherwise.
fn speculates(linux: &Linux) -> Fact<bool> {
    let flags = linux.seccomp().as_ref();
    let mut flags = flags
        .and_then(|profile| profile.flags().as_ref())
        .into_iter()
        .flatten();
    let place = flags.position(|flag| *flag == LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow);
    let at = match place {
        Some(index) => format!("linux.seccomp.flags[{index}]"),
        None => "linux.seccomp.flags".to_owned(),
    };
    Fact::new(at, place.is_some())
}

fn capabilities(given: &LinuxCapabilities) -> BTreeMap<&'static str, Fact<BTreeSet<String>>> {
    let sets = [
        ("bounding", given.bounding()),
        ("effective", given.effective()),
        ("permitted", given.permitted()),
        ("inheritable", given.inheritable()),
        ("ambient", given.ambient()),
    ];
    sets.into_iter()
        .map(|(set, given)| {
            let at = format!("process.capabilities.{set}");
            (set, Fact::new(at, capability_names(given)))
        })
        .collect()
}

/// A set of capabilities as the kernel's header spells them.
pub(super) fn capability_names(set: &Option<Capabilities>) -> BTreeSet<String> {
    let set = set.iter().flatten();
    set.map(|one| format!("CAP_{one}")).collect()
}

/// The names of the kernel parameters, as they are written, in their order.
pub(super) fn sysctl_names(linux: &Linux) -> Vec<&str> {
    let mut names: Vec<&str> = linux
        .sysctl()
        .iter()
        .flatten()
        .map(|(name, _)| name.as_str())
        .collect();
    names.sort_unstable();
    names
}

fn sysctls(linux: &Linux) -> Vec<Fact<String>> {
    let fact = |name: &str| {
        // Slashes and dots stand for each other in the name of a parameter.
        Fact::new(format!("linux.sysctl[{name:?}]"), name.replace('/', "."))
    };
    sysctl_names(linux).into_iter().map(fact).collect()
}

/// Whether a mount shows a path of the host.
pub(super) fn is_bind(given: &SpecMount) -> bool {
    let mut options = given.options().iter().flatten();
    given.typ().as_deref() == Some("bind") || options.any(|one| one == "bind" || one == "rbind")
}

/// Whether the last of a mount's options that turn something on or off turns it on.
pub(super) fn is_set(given: &SpecMount, on: &[&str], off: &[&str]) -> bool {
    let options = given.options().iter().flatten().rev();
    let mut options = options.map(String::as_str);
    let last = options.find(|one| on.contains(one) || off.contains(one));
    last.is_some_and(|one| on.contains(&one))
}

fn mount(directory: &Path, given: &SpecMount) -> Mount {
    let options: Vec<&str> = given
        .options()
        .iter()
        .flatten()
        .map(String::as_str)
        .collect();
    let kind = given.typ().as_deref().unwrap_or_default();
    let is_bind = is_bind(given);
    // A disk is a path of the host too; `proc`, `tmpfs` and their like name nothing.
    let source = given
        .source()
        .as_deref()
        .filter(|source| is_bind || source.is_absolute());
    let is_set = |on: &[&str], off: &[&str]| is_set(given, on, off);
    Mount {
        destination: given.destination().clone(),
        kind: if is_bind { "bind" } else { kind }.to_owned(),
        source: source.map(|source| resolve(&directory.join(source))),
        layers: if kind == "overlay" && !is_bind {
            layers(directory, &options)
        } else {
            Vec::new()
        },
        is_whole: !is_bind,
        is_read_only: is_set(&["ro", "rro"], &["rw", "rrw"]),
        is_nosuid: is_set(&["nosuid", "rnosuid"], &["suid", "rsuid"]),
        is_nodev: is_set(&["nodev", "rnodev"], &["dev", "rdev"]),
        is_shared: is_set(
            &["shared", "rshared"],
            &[
                "private",
                "rprivate",
                "slave",
                "rslave",
                "unbindable",
                "runbindable",
            ],
        ),
        is_delegated: matches!(kind, "cgroup" | "cgroup2") && !is_bind && delegates(),
    }
}

/// Whether this host has cgroups of version 2 alone, and takes a cgroup namespace for a boundary.
fn delegates() -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut fields = mounts.lines().map(|line| line.split(' ').skip(2));
    let kinds = fields
        .by_ref()
        .filter_map(|mut fields| Some((fields.next()?, fields.next()?)));
    let mut cgroups = kinds
        .filter(|(kind, _)| kind.starts_with("cgroup"))
        .peekable();
    cgroups.peek().is_some()
        && cgroups.all(|(kind, options)| {
            kind == "cgroup2" && options.split(',').any(|option| option == "nsdelegate")
        })
}

/// The directories in the options of an overlay (the kernel's overlayfs.rst): a comma, or in a list a colon, that is part
/// of a name has a backslash before it.
fn layers(directory: &Path, options: &[&str]) -> Vec<PathBuf> {
    let options = options.iter().flat_map(|option| split(option, ','));
    let lists = options.filter_map(|option| {
        let (key, value) = option.split_once('=')?;
        match key {
            "lowerdir" => Some(split(value, ':')),
            "upperdir" | "workdir" | "lowerdir+" | "datadir+" => Some(vec![value.to_owned()]),
            _ => None,
        }
    });
    let names = lists.flatten().filter(|name| !name.is_empty());
    names
        .map(|name| resolve(&directory.join(name.replace("\\,", ",").replace("\\:", ":"))))
        .collect()
}

/// The parts of a text between separators that have no backslash before them.
fn split(text: &str, separator: char) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut is_escaped = false;
    for character in text.chars() {
        if character == separator && !is_escaped {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(character);
        }
        is_escaped = character == '\\' && !is_escaped;
    }
    parts
}

/// The cgroup file systems of this host, and the usual one of any other.
fn host_cgroups() -> BTreeSet<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let point = fields.next()?;
        fields.next()?.starts_with("cgroup").then_some(point)
    });
    points
        .chain(["/sys/fs/cgroup"])
        .map(PathBuf::from)
        .collect()
}

/// A recursive bind mount takes along what is mounted below its source, but `ro` is of the first mount alone.
fn cgroups_below(directory: &Path, spec: &Spec) -> Vec<Fact<PathBuf>> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let hosts = host_cgroups();
    let last: HashMap<&Path, usize> = mounts
        .iter()
        .enumerate()
        .map(|(index, one)| (one.destination().as_path(), index))
        .collect();
    let mut found = Vec::new();
    for (index, given) in mounts.iter().enumerate() {
        let has = |name: &str| given.options().iter().flatten().any(|one| one == name);
        let mount = mount(directory, given);
        let Some(source) = mount.source else {
            continue;
        };
        // What can be written as a whole is found without this.
        if !has("rbind") || has("rro") || !mount.is_read_only {
            continue;
        }
        // The first of those that lie in one another, which are sorted, stands for the others.
        let mut told: Option<PathBuf> = None;
        for point in &hosts {
            let Ok(rest) = point.strip_prefix(&source) else {
                continue;
            };
            let place = mount.destination.join(rest);
            let is_later = |path: &Path| last.get(path).is_some_and(|later| *later > index);
            let covers = place.ancestors();
            let mut covers = covers.take_while(|path| path.starts_with(&mount.destination));
            let is_told = told.as_ref().is_some_and(|told| place.starts_with(told));
            if rest != Path::new("") && !is_told && !covers.any(is_later) {
                found.push(Fact::new(format!("mounts[{index}]"), place.clone()));
                told = Some(place);
            }
        }
    }
    found
}

/// How many pairs of device rules are compared.
const COMPARED_LIMIT: usize = 1 << 24;

/// What the rules allow in the end: one overrides those before it.
fn devices(resources: Option<&LinuxResources>) -> Vec<Fact<Devices>> {
    let mut allowed: Vec<Fact<Devices>> = Vec::new();
    let rules = resources.and_then(|all| all.devices().as_ref());
    let mut compared = 0;
    for (index, rule) in rules.into_iter().flatten().enumerate() {
        let number = |value: Option<i64>| value.and_then(|value| u32::try_from(value).ok());
        let devices = Devices {
            kind: match rule.typ().unwrap_or_default() {
                LinuxDeviceType::B => 'b',
                LinuxDeviceType::C | LinuxDeviceType::U => 'c',
                _ => 'a',
            },
            major: number(rule.major()),
            minor: number(rule.minor()),
            access: rule.access().clone().unwrap_or_else(|| "rwm".to_owned()),
        };
        if rule.allow() {
            allowed.push(Fact::new(
                format!("linux.resources.devices[{index}]"),
                devices,
            ));
            continue;
        }
        // Beyond that a rule takes nothing away: what was allowed once is told.
        compared += allowed.len();
        if compared > COMPARED_LIMIT {
            continue;
        }
        for fact in &mut allowed {
            if devices.cover_numbers(&fact.value) {
                let access = &mut fact.value.access;
                access.retain(|letter| !devices.access.contains(letter));
            }
        }
        allowed.retain(|fact| !fact.value.access.is_empty());
    }
    allowed
}

/// The nodes that a configuration asks for. A FIFO is no device.
fn nodes(linux: &Linux) -> Vec<Fact<Node>> {
    let number = |value: i64| u32::try_from(value).ok();
    let nodes = linux.devices().iter().flatten().enumerate();
    let nodes = nodes.filter_map(|(index, node)| {
        let kind = match node.typ() {
            LinuxDeviceType::B => 'b',
            LinuxDeviceType::C | LinuxDeviceType::U => 'c',
            LinuxDeviceType::P => return None,
            LinuxDeviceType::A => 'a',
        };
        let device = Devices {
            kind,
            major: number(node.major()),
            minor: number(node.minor()),
            access: "rw".to_owned(),
        };
        let path = node.path().clone();
        Some(Fact::new(
            format!("linux.devices[{index}]"),
            Node { path, device },
        ))
    });
    nodes.collect()
}

fn interfaces(linux: &Linux) -> Vec<Fact<String>> {
    let devices = linux.net_devices().iter().flatten();
    let mut names: Vec<&String> = devices.map(|(name, _)| name).collect();
    names.sort_unstable();
    let fact = |name: &String| Fact::new(format!("linux.netDevices[{name:?}]"), name.clone());
    names.into_iter().map(fact).collect()
}

/// The hooks of a configuration, by the specification's names for their kinds.
pub(super) fn hook_lists(spec: &Spec) -> Vec<(&'static str, &[Hook])> {
    let Some(all) = spec.hooks() else {
        return Vec::new();
    };
    let kinds = [
        ("prestart", all.prestart()),
        ("createRuntime", all.create_runtime()),
        ("createContainer", all.create_container()),
        ("startContainer", all.start_container()),
        ("poststart", all.poststart()),
        ("poststop", all.poststop()),
    ];
    let given = kinds.into_iter();
    given
        .map(|(kind, hooks)| (kind, hooks.as_deref().unwrap_or_default()))
        .collect()
}

fn hooks(spec: &Spec) -> Vec<Fact<String>> {
    // The program of a `startContainer` hook is the container's, not the host's.
    let kinds = hook_lists(spec).into_iter();
    let kinds = kinds.filter(|(kind, _)| *kind != "startContainer");
    kinds
        .flat_map(|(kind, hooks)| {
            hooks.iter().enumerate().map(move |(index, hook)| {
                Fact::new(
                    format!("hooks.{kind}[{index}]"),
                    hook.path().display().to_string(),
                )
            })
        })
        .collect()
}
