//! A configuration against the runtime specification: what the text itself has wrong.
//!
//! The text is hostile; it is bounded by whoever read it.

use std::path::Path;

use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType, Process, Spec};
use serde_json::Value;

use super::config::{
    NAMESPACES, capability_names, hook_lists, is_of_kind, process_namespace, sysctl_names,
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

/// Values that have the right type and still cannot be.
pub fn contradictions(spec: &Spec) -> Vec<Weakness> {
    let mut found = Vec::new();
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
    }
    if let Some(linux) = spec.linux() {
        namespaces(linux, &mut found);
        absolute(
            "linux.maskedPaths",
            linux.masked_paths().as_ref(),
            &mut found,
        );
        absolute(
            "linux.readonlyPaths",
            linux.readonly_paths().as_ref(),
            &mut found,
        );
        overlaps(
            "linux.uidMappings",
            linux.uid_mappings().as_ref(),
            &mut found,
        );
        overlaps(
            "linux.gidMappings",
            linux.gid_mappings().as_ref(),
            &mut found,
        );
        sysctls(linux, &mut found);
    }
    for (kind, hooks) in hook_lists(spec) {
        for (index, hook) in hooks.iter().enumerate() {
            if !hook.path().is_absolute() {
                let at = format!("hooks.{kind}[{index}].path");
                found.push(Weakness::new(at, "it must be an absolute path"));
            }
        }
    }
    found
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

/// Neither side of a map may name an id twice (user_namespaces(7)).
fn overlaps(at: &str, ranges: Option<&Vec<LinuxIdMapping>>, found: &mut Vec<Weakness>) {
    let ranges: Vec<_> = ranges.into_iter().flatten().collect();
    let meet = |one: u32, two: u32, one_size: u32, two_size: u32| {
        let end = |start: u32, size: u32| u64::from(start) + u64::from(size);
        u64::from(one) < end(two, two_size) && u64::from(two) < end(one, one_size)
    };
    for (index, one) in ranges.iter().enumerate() {
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

/// A parameter that belongs to a namespace needs that namespace; the others are the whole host's.
fn sysctls(linux: &Linux, found: &mut Vec<Weakness>) {
    use oci_spec::runtime::LinuxNamespaceType as Kind;
    let has = |kind: Kind| {
        linux
            .namespaces()
            .iter()
            .flatten()
            .any(|one| one.typ() == kind)
    };
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
