//! A configuration against the runtime specification: what the text itself has wrong.
//!
//! The text is hostile; it is bounded by whoever read it.

use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType, LinuxSeccomp, Process, Spec};
use serde_json::Value;

use super::config::{
    NAMESPACES, capability_names, hook_lists, is_bind, is_of_kind, process_namespace, sysctl_names,
};
use super::paths::resolve;
use super::rules::Weakness;

/// Properties of the specification that our parser does not know, and that are no slip of whoever wrote them: those of
/// other platforms are not read, and `vm` is read apart.
const KNOWN: [&str; 6] = [
    "windows",
    "solaris",
    "zos",
    "freebsd",
    "vm",
    "linux.memoryPolicy",
];

/// Properties that no version of the specification knows.
pub fn unknown_properties(config: &Value) -> Vec<Weakness> {
    let mut unknown = Vec::new();
    let mut note = |path: serde_ignored::Path<'_>| {
        let at = place(&path);
        let mut known = KNOWN.into_iter().filter_map(|known| at.strip_prefix(known));
        if !known.any(|rest| rest.is_empty() || rest.starts_with('.')) {
            unknown.push(Weakness::new(at, "the specification has no such property"));
        }
    };
    // What does not fit at all is told by whoever loads it.
    let _: Result<Spec, _> = serde_ignored::deserialize(config, &mut note);
    unknown
}

/// A path as `mounts[0].options`.
fn place(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    let below = |parent: &Path<'_>, name: &str| match place(parent) {
        parent if parent.is_empty() => name.to_owned(),
        parent => format!("{parent}.{name}"),
    };
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", place(parent)),
        Path::Map { parent, key } => below(parent, key),
        Path::Some { parent }
        | Path::NewtypeStruct { parent }
        | Path::NewtypeVariant { parent } => place(parent),
    }
}

/// Values that have the right type and still cannot be, in `spec` as it was read from `config`.
pub fn contradictions(config: &Value, spec: &Spec) -> Vec<Weakness> {
    let mut found = Vec::new();
    if let Ok(read) = serde_json::to_value(spec) {
        shapes("", config, &read, &mut found);
    }
    nul(spec, &mut found);
    if config.pointer("/root/path").and_then(Value::as_str) == Some("") {
        found.push(Weakness::new("root.path", "it is empty"));
    }
    if spec
        .annotations()
        .as_ref()
        .is_some_and(|all| all.contains_key(""))
    {
        found.push(Weakness::new("annotations", "a key is empty"));
    }
    if let Some(process) = spec.process() {
        capabilities(process, &mut found);
        environment(process, &mut found);
        rlimits(process, &mut found);
    }
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        if !mount.destination().is_absolute() {
            let at = format!("mounts[{index}].destination");
            found.push(Weakness::new(at, "it must be an absolute path"));
        }
        // In `spec` it counts from the bundle already.
        let source = &config["mounts"][index]["source"];
        if is_bind(mount) && source.as_str().unwrap_or_default().is_empty() {
            let at = format!("mounts[{index}].source");
            found.push(Weakness::new(at, "a bind mount needs one"));
        }
    }
    if let Some(linux) = spec.linux() {
        of_linux(linux, &mut found);
        devices(config, &mut found);
    }
    for (kind, hooks) in hook_lists(spec) {
        for (index, hook) in hooks.iter().enumerate() {
            let at = format!("hooks.{kind}[{index}]");
            if !hook.path().is_absolute() {
                let at = format!("{at}.path");
                found.push(Weakness::new(at, "it must be an absolute path"));
            }
            if hook.timeout().is_some_and(|seconds| seconds <= 0) {
                let at = format!("{at}.timeout");
                found.push(Weakness::new(at, "it must be greater than 0"));
            }
        }
    }
    found
}

fn of_linux(linux: &Linux, found: &mut Vec<Weakness>) {
    namespaces(linux, found);
    absolute("linux.maskedPaths", linux.masked_paths().as_ref(), found);
    absolute(
        "linux.readonlyPaths",
        linux.readonly_paths().as_ref(),
        found,
    );
    overlaps("linux.uidMappings", linux.uid_mappings().as_ref(), found);
    overlaps("linux.gidMappings", linux.gid_mappings().as_ref(), found);
    if !has_namespace(linux, LinuxNamespaceType::User) {
        for (at, maps) in [
            ("linux.uidMappings", linux.uid_mappings()),
            ("linux.gidMappings", linux.gid_mappings()),
        ] {
            if maps.as_ref().is_some_and(|maps| !maps.is_empty()) {
                let what = "they need a namespace of type \"user\"";
                found.push(Weakness::new(at, what));
            }
        }
    }
    sysctls(linux, found);
    if let Some(profile) = linux.seccomp() {
        seccomp(profile, found);
    }
    let has_offsets = linux
        .time_offsets()
        .as_ref()
        .is_some_and(|all| !all.is_empty());
    if has_offsets && !has_namespace(linux, LinuxNamespaceType::Time) {
        let what = "they need a namespace of type \"time\"";
        found.push(Weakness::new("linux.timeOffsets", what));
    }
    let propagation = linux.rootfs_propagation().as_deref().unwrap_or_default();
    let kind = propagation.strip_prefix('r').unwrap_or(propagation);
    if !["", "shared", "slave", "private", "unbindable"].contains(&kind) || propagation == "r" {
        let what = format!("{propagation:?} is not one of shared, slave, private, unbindable");
        found.push(Weakness::new("linux.rootfsPropagation", what));
    }
    if let Some(path) = linux.cgroups_path() {
        let is_above = path.components().any(|part| part == Component::ParentDir);
        if is_above || path == Path::new("/") {
            let what = "it must be a cgroup of its own, without ..";
            found.push(Weakness::new("linux.cgroupsPath", what));
        }
    }
}

/// Lists where there must be objects: our parser takes the values in their order.
fn shapes(at: &str, config: &Value, read: &Value, found: &mut Vec<Weakness>) {
    match (config, read) {
        (Value::Array(_), Value::Object(_)) => {
            found.push(Weakness::new(at, "it must be an object, and is a list"));
        }
        (Value::Array(given), Value::Array(read)) => {
            for (index, (given, read)) in given.iter().zip(read).enumerate() {
                if !read.is_string() && !read.is_number() {
                    shapes(&format!("{at}[{index}]"), given, read, found);
                }
            }
        }
        (Value::Object(given), Value::Object(read)) => {
            for (key, read) in read {
                if let Some(given) = given.get(key) {
                    let dot = if at.is_empty() { "" } else { "." };
                    shapes(&format!("{at}{dot}{key}"), given, read, found);
                }
            }
        }
        _ => {}
    }
}

/// The kernel takes a string up to its first NUL. Of the environment another function tells.
fn nul(spec: &Spec, found: &mut Vec<Weakness>) {
    let mut check = |at: String, text: &[u8]| {
        if text.contains(&0) {
            found.push(Weakness::new(at, "it contains NUL"));
        }
    };
    let hostname = spec.hostname().iter().map(|name| ("hostname", name));
    for (at, name) in hostname.chain(spec.domainname().iter().map(|name| ("domainname", name))) {
        check(at.to_owned(), name.as_bytes());
    }
    if let Some(process) = spec.process() {
        check("process.cwd".to_owned(), bytes(process.cwd()));
        for (index, argument) in process.args().iter().flatten().enumerate() {
            check(format!("process.args[{index}]"), argument.as_bytes());
        }
    }
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        let at = |field: &str| format!("mounts[{index}].{field}");
        check(at("destination"), bytes(mount.destination()));
        if let Some(source) = mount.source() {
            check(at("source"), bytes(source));
        }
        check(
            at("type"),
            mount.typ().as_deref().unwrap_or_default().as_bytes(),
        );
        for (option, text) in mount.options().iter().flatten().enumerate() {
            check(at(&format!("options[{option}]")), text.as_bytes());
        }
    }
    let Some(linux) = spec.linux() else {
        return;
    };
    for (index, namespace) in linux.namespaces().iter().flatten().enumerate() {
        if let Some(path) = namespace.path() {
            check(format!("linux.namespaces[{index}].path"), bytes(path));
        }
    }
    for (at, paths) in [
        ("linux.maskedPaths", linux.masked_paths()),
        ("linux.readonlyPaths", linux.readonly_paths()),
    ] {
        for (index, path) in paths.iter().flatten().enumerate() {
            check(format!("{at}[{index}]"), path.as_bytes());
        }
    }
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

/// Our parser has 0 for a number that is missing.
fn devices(config: &Value, found: &mut Vec<Weakness>) {
    let devices = config.pointer("/linux/devices").and_then(Value::as_array);
    for (index, device) in devices.into_iter().flatten().enumerate() {
        let is_fifo = device["type"] == "p";
        for field in ["major", "minor"] {
            if device.is_object() && !is_fifo && device[field].is_null() {
                let at = format!("linux.devices[{index}].{field}");
                found.push(Weakness::new(at, "it is missing"));
            }
        }
    }
}

fn seccomp(profile: &LinuxSeccomp, found: &mut Vec<Weakness>) {
    use oci_spec::runtime::LinuxSeccompAction as Action;
    let has_no_use = |action: Action, value: Option<u32>| {
        value.is_some() && !matches!(action, Action::ScmpActErrno | Action::ScmpActTrace)
    };
    let what = "only SCMP_ACT_ERRNO and SCMP_ACT_TRACE have one";
    if has_no_use(profile.default_action(), profile.default_errno_ret()) {
        found.push(Weakness::new("linux.seccomp.defaultErrnoRet", what));
    }
    for (index, rule) in profile.syscalls().iter().flatten().enumerate() {
        let at = |field: &str| format!("linux.seccomp.syscalls[{index}].{field}");
        if rule.names().is_empty() {
            found.push(Weakness::new(at("names"), "it must name a system call"));
        }
        if has_no_use(rule.action(), rule.errno_ret()) {
            found.push(Weakness::new(at("errnoRet"), what));
        }
    }
}

/// The kernel's own conditions (capabilities(7), "Thread capability sets"). An ambient capability that is not inheritable
/// has no effect, and stands in the configurations that runc and crun write.
fn capabilities(process: &Process, found: &mut Vec<Weakness>) {
    let Some(sets) = process.capabilities() else {
        return;
    };
    let effective = capability_names(sets.effective());
    let permitted = capability_names(sets.permitted());
    let ambient = capability_names(sets.ambient());
    for (name, set, of, whole) in [
        ("effective", &effective, "permitted", &permitted),
        ("ambient", &ambient, "permitted", &permitted),
    ] {
        let beyond: Vec<&str> = set.difference(whole).map(String::as_str).collect();
        if !beyond.is_empty() {
            let what = format!("{} must be in {of} too", beyond.join(", "));
            found.push(Weakness::new(format!("process.capabilities.{name}"), what));
        }
    }
}

fn environment(process: &Process, found: &mut Vec<Weakness>) {
    for (index, entry) in process.env().iter().flatten().enumerate() {
        let at = || format!("process.env[{index}]");
        match entry.split_once('=') {
            None => found.push(Weakness::new(at(), "it is not of the form NAME=value")),
            Some(("", _)) => found.push(Weakness::new(at(), "the name is missing")),
            Some(_) if entry.contains('\0') => {
                found.push(Weakness::new(at(), "it contains NUL"));
            }
            Some(_) => {}
        }
    }
}

fn rlimits(process: &Process, found: &mut Vec<Weakness>) {
    let mut seen = Vec::new();
    for (index, limit) in process.rlimits().iter().flatten().enumerate() {
        let at = format!("process.rlimits[{index}]");
        if limit.soft() > limit.hard() {
            found.push(Weakness::new(
                format!("{at}.soft"),
                "it is greater than the hard limit",
            ));
        }
        if seen.contains(&limit.typ()) {
            found.push(Weakness::new(at, format!("{} is given twice", limit.typ())));
        }
        seen.push(limit.typ());
    }
}

fn namespaces(linux: &Linux, found: &mut Vec<Weakness>) {
    let mut seen = Vec::new();
    for (index, namespace) in linux.namespaces().iter().flatten().enumerate() {
        let at = format!("linux.namespaces[{index}]");
        let path = namespace.path().as_deref().unwrap_or(Path::new(""));
        if !path.as_os_str().is_empty() && !path.is_absolute() {
            found.push(Weakness::new(
                format!("{at}.path"),
                "it must be an absolute path",
            ));
        }
        // The kernel refuses to let a namespace of another type be joined.
        let kinds = NAMESPACES.into_iter();
        let file = kinds
            .chain([("user", LinuxNamespaceType::User, "user")])
            .find_map(|(_, kind, file)| (kind == namespace.typ()).then_some(file));
        let resolved = resolve(path);
        if let Some((file, (_, name))) = file.zip(process_namespace(&resolved))
            && !is_of_kind(name, file)
        {
            let what = format!("{name} is a namespace of another type");
            found.push(Weakness::new(format!("{at}.path"), what));
        }
        if seen.contains(&namespace.typ()) {
            found.push(Weakness::new(
                at,
                format!("{} is given twice", namespace.typ()),
            ));
        }
        seen.push(namespace.typ());
    }
}

fn absolute(at: &str, paths: Option<&Vec<String>>, found: &mut Vec<Weakness>) {
    for (index, path) in paths.into_iter().flatten().enumerate() {
        if !Path::new(path).is_absolute() {
            found.push(Weakness::new(
                format!("{at}[{index}]"),
                format!("{path:?} is not an absolute path"),
            ));
        }
    }
}

/// How many ranges the kernel takes in a map (`UID_GID_MAP_MAX_EXTENTS`).
const MAP_LIMIT: usize = 340;

/// Neither side of a map may name an id twice (user_namespaces(7)).
fn overlaps(at: &str, ranges: Option<&Vec<LinuxIdMapping>>, found: &mut Vec<Weakness>) {
    let ranges = ranges.map(Vec::as_slice).unwrap_or_default();
    if ranges.len() > MAP_LIMIT {
        let what = format!("{} ranges: the kernel takes {MAP_LIMIT}", ranges.len());
        found.push(Weakness::new(at, what));
        return;
    }
    let meet = |one: u32, two: u32, one_size: u32, two_size: u32| {
        let end = |start: u32, size: u32| u64::from(start) + u64::from(size);
        u64::from(one) < end(two, two_size) && u64::from(two) < end(one, one_size)
    };
    for (index, one) in ranges.iter().enumerate() {
        let ends_beyond = |start: u32| start.checked_add(one.size()).is_none();
        if one.size() == 0 || ends_beyond(one.container_id()) || ends_beyond(one.host_id()) {
            let what = "it has no ids, or goes beyond the greatest";
            found.push(Weakness::new(format!("{at}[{index}]"), what));
        }
        let is_met = ranges[..index].iter().any(|two| {
            meet(
                one.container_id(),
                two.container_id(),
                one.size(),
                two.size(),
            ) || meet(one.host_id(), two.host_id(), one.size(), two.size())
        });
        if is_met {
            found.push(Weakness::new(
                format!("{at}[{index}]"),
                "it overlaps one before it",
            ));
        }
    }
}

fn has_namespace(linux: &Linux, kind: LinuxNamespaceType) -> bool {
    let mut namespaces = linux.namespaces().iter().flatten();
    namespaces.any(|one| one.typ() == kind)
}

/// A parameter that belongs to a namespace needs that namespace; the others are the whole host's.
fn sysctls(linux: &Linux, found: &mut Vec<Weakness>) {
    use oci_spec::runtime::LinuxNamespaceType as Kind;
    let has = |kind: Kind| has_namespace(linux, kind);
    for name in sysctl_names(linux) {
        let dotted = name.replace('/', ".");
        let owner = match dotted.as_str() {
            one if one.starts_with("net.") => Some((Kind::Network, "network")),
            one if one.starts_with("fs.mqueue.")
                || one.starts_with("kernel.msg")
                || one.starts_with("kernel.shm")
                || one == "kernel.sem" =>
            {
                Some((Kind::Ipc, "ipc"))
            }
            "kernel.hostname" | "kernel.domainname" => Some((Kind::Uts, "uts")),
            one if one.starts_with("user.") => Some((Kind::User, "user")),
            _ => None,
        };
        let what = match owner {
            None => "it is the whole host's, not the container's".to_owned(),
            Some((kind, _)) if has(kind) => continue,
            Some((_, kind)) => format!("it needs a namespace of type {kind:?}, or sets the host's"),
        };
        found.push(Weakness::new(format!("linux.sysctl[{name:?}]"), what));
    }
}
