//! Checks a configuration against what the engine can honour.
//!
//! The bundle's author is not trusted: nothing is dropped silently, and what is refused is named by its JSON path.

use std::path::Path;

use libcontainer::validator::Validator;
use oci_spec::runtime::{
    Linux, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, Mount, Process, Spec,
};

use crate::error::Error;
use crate::hooks;
use crate::net_devices::NetDevices;
use crate::rootfs::{Options, root_propagation};

/// Checks that the engine can honour a configuration.
///
/// # Errors
/// The first part that it cannot, as [`Error::Unsupported`] with its JSON path.
pub fn validate(spec: &Spec) -> Result<(), Error> {
    if !spec.version().starts_with("1.") {
        return Err(Error::unsupported(
            "ociVersion",
            format!(
                "{:?} is not a version 1 of the runtime specification",
                spec.version()
            ),
        ));
    }
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| Error::unsupported("root", "it is missing"))?;
    if !root.path().is_absolute() {
        return Err(Error::unsupported(
            "root.path",
            "it must have been made absolute",
        ));
    }
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| Error::unsupported("process", "it is missing"))?;
    validate_process(process)?;
    if let Some(linux) = spec.linux() {
        validate_linux(linux)?;
    }
    if namespace(spec, LinuxNamespaceType::Mount).is_none() {
        return Err(Error::unsupported(
            "linux.namespaces",
            "there must be one of type \"mount\"; the container's mounts would land on the host",
        ));
    }
    NetDevices::of_spec(spec).validate()?;
    root_propagation(spec)?;
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        validate_mount(index, mount)?;
    }
    for (kind, hooks) in hooks_of(spec) {
        hooks::validate(kind, hooks)?;
    }
    Validator::validate_spec(spec)
        .map_err(|error| Error::unsupported("config.json", error.to_string()))
}

/// Checks a process, of the configuration or of an exec.
pub(crate) fn validate_process(process: &Process) -> Result<(), Error> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::unsupported("process.args", "it must name a program"));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::unsupported(
            "process.cwd",
            format!("{:?} is not an absolute path", process.cwd()),
        ));
    }
    let strings = process
        .args()
        .iter()
        .flatten()
        .chain(process.env().iter().flatten());
    if strings.into_iter().any(|one| one.contains('\0')) {
        return Err(Error::unsupported(
            "process",
            "args and env must not contain NUL",
        ));
    }
    if process.user().umask().is_some_and(|umask| umask > 0o777) {
        return Err(Error::unsupported(
            "process.user.umask",
            "it is greater than 0777",
        ));
    }
    if process
        .selinux_label()
        .as_ref()
        .is_some_and(|label| !label.is_empty())
    {
        return Err(Error::unsupported(
            "process.selinuxLabel",
            "SELinux is not supported yet; leave the label out",
        ));
    }
    let mut seen = Vec::new();
    for (index, limit) in process.rlimits().iter().flatten().enumerate() {
        if seen.contains(&limit.typ()) {
            return Err(Error::unsupported(
                format!("process.rlimits[{index}]"),
                format!("{} is given twice", limit.typ()),
            ));
        }
        if limit.soft() > limit.hard() {
            return Err(Error::unsupported(
                format!("process.rlimits[{index}].soft"),
                "it is greater than the hard limit",
            ));
        }
        seen.push(limit.typ());
    }
    if let Some(profile) = apparmor_profile(process) {
        let enabled = libcontainer::apparmor::is_enabled().unwrap_or(false);
        if !enabled {
            return Err(Error::unsupported(
                "process.apparmorProfile",
                format!("AppArmor is not enabled on this system, so {profile:?} cannot be applied"),
            ));
        }
    }
    Ok(())
}

fn validate_linux(linux: &Linux) -> Result<(), Error> {
    if linux.intel_rdt().is_some() {
        return Err(Error::unsupported(
            "linux.intelRdt",
            "it is not supported yet",
        ));
    }
    if linux
        .mount_label()
        .as_ref()
        .is_some_and(|label| !label.is_empty())
    {
        return Err(Error::unsupported(
            "linux.mountLabel",
            "SELinux is not supported yet; leave the label out",
        ));
    }
    if let Some(personality) = linux.personality()
        && personality
            .flags()
            .as_ref()
            .is_some_and(|flags| !flags.is_empty())
    {
        return Err(Error::unsupported(
            "linux.personality.flags",
            "they are not supported",
        ));
    }
    let mut seen: Vec<LinuxNamespaceType> = Vec::new();
    for (index, namespace) in linux.namespaces().iter().flatten().enumerate() {
        if seen.contains(&namespace.typ()) {
            return Err(Error::unsupported(
                format!("linux.namespaces[{index}]"),
                format!("{} is given twice", namespace.typ()),
            ));
        }
        if path_of(namespace).is_some_and(|path| !path.is_absolute()) {
            return Err(Error::unsupported(
                format!("linux.namespaces[{index}].path"),
                "it must be absolute",
            ));
        }
        seen.push(namespace.typ());
    }
    let of = |kind| {
        linux
            .namespaces()
            .iter()
            .flatten()
            .find(|one| one.typ() == kind)
    };
    if let Some(user) = of(LinuxNamespaceType::User) {
        let joined = path_of(user).is_some();
        let mapped =
            |map: &Option<Vec<_>>| map.as_ref().is_some_and(|map: &Vec<_>| !map.is_empty());
        let complete = mapped(linux.uid_mappings()) && mapped(linux.gid_mappings());
        if !joined && !complete {
            return Err(Error::unsupported(
                "linux.uidMappings",
                "a new user namespace needs uidMappings and gidMappings",
            ));
        }
    }
    for (index, device) in linux.devices().iter().flatten().enumerate() {
        let field = |name: &str| format!("linux.devices[{index}].{name}");
        let inside = device.path().strip_prefix("/dev").is_ok_and(|rest| {
            rest.components().next().is_some()
                && rest
                    .components()
                    .all(|one| matches!(one, std::path::Component::Normal(_)))
        });
        if !inside {
            return Err(Error::unsupported(
                field("path"),
                format!("{:?} is not a path below /dev", device.path()),
            ));
        }
        if device.typ() == LinuxDeviceType::A {
            return Err(Error::unsupported(field("type"), "it must be c, u, b or p"));
        }
    }
    Ok(())
}

fn validate_mount(index: usize, mount: &Mount) -> Result<(), Error> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    if is_bind(mount) {
        let Some(source) = mount.source() else {
            return Err(Error::unsupported(
                field("source"),
                "a bind mount needs one",
            ));
        };
        if !source.is_absolute() {
            return Err(Error::unsupported(
                field("source"),
                format!("{source:?} must have been made absolute"),
            ));
        }
    }
    Options::parse(index, mount).map(|_| ())
}

pub(crate) fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount
            .options()
            .iter()
            .flatten()
            .any(|option| option == "bind" || option == "rbind")
}

/// The hooks of a configuration, by kind.
pub(crate) fn hooks_of(spec: &Spec) -> Vec<(hooks::Kind, &[oci_spec::runtime::Hook])> {
    let Some(all) = spec.hooks() else {
        return Vec::new();
    };
    let prestart = all.prestart();
    [
        (hooks::Kind::Prestart, prestart),
        (hooks::Kind::CreateRuntime, all.create_runtime()),
        (hooks::Kind::CreateContainer, all.create_container()),
        (hooks::Kind::StartContainer, all.start_container()),
        (hooks::Kind::Poststart, all.poststart()),
        (hooks::Kind::Poststop, all.poststop()),
    ]
    .into_iter()
    .filter_map(|(kind, hooks)| Some((kind, hooks.as_deref()?)))
    .collect()
}

pub(crate) fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
    spec.linux()
        .as_ref()?
        .namespaces()
        .iter()
        .flatten()
        .find(|namespace| namespace.typ() == kind)
}

/// Whether the container's first process begins its pid namespace, so that all in it end with it.
pub fn begins_pid_namespace(spec: &Spec) -> bool {
    namespace(spec, LinuxNamespaceType::Pid).is_some_and(|one| path_of(one).is_none())
}

/// An empty path is what Go clients write for none.
pub(crate) fn path_of(namespace: &LinuxNamespace) -> Option<&Path> {
    namespace
        .path()
        .as_deref()
        .filter(|path| !path.as_os_str().is_empty())
}

pub(crate) fn apparmor_profile(process: &Process) -> Option<&str> {
    process
        .apparmor_profile()
        .as_deref()
        .filter(|profile| !profile.is_empty() && *profile != "unconfined")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(edit: impl FnOnce(&mut serde_json::Value)) -> Spec {
        let mut value = serde_json::json!({
            "ociVersion": "1.2.0",
            "root": {"path": "/r"},
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
            "mounts": [],
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
        });
        edit(&mut value);
        serde_json::from_value(value).unwrap()
    }

    fn refused(edit: impl FnOnce(&mut serde_json::Value)) -> String {
        validate(&spec(edit)).unwrap_err().to_string()
    }

    #[test]
    fn a_plain_configuration_is_accepted() {
        validate(&spec(|_| {})).unwrap();
    }

    #[test]
    fn what_cannot_be_honoured_is_named_by_its_path() {
        let mount = serde_json::json!({"destination": "/x", "source": "/y", "options": ["bind", "remount"]});
        let text = refused(|value| value["mounts"] = serde_json::json!([mount]));
        assert!(text.starts_with("mounts[0].options"), "{text}");
        let text = refused(|value| {
            value["linux"]["rootfsPropagation"] = "sideways".into();
        });
        assert!(text.starts_with("linux.rootfsPropagation"), "{text}");
        let text = refused(|value| value["process"]["cwd"] = "relative".into());
        assert!(text.starts_with("process.cwd"), "{text}");
        let text = refused(|value| value["process"]["args"] = serde_json::json!([]));
        assert!(text.starts_with("process.args"), "{text}");
        let text = refused(|value| value["linux"]["namespaces"] = serde_json::json!([]));
        assert!(text.starts_with("linux.namespaces"), "{text}");
        let text = refused(|value| value["ociVersion"] = "2.0.0".into());
        assert!(text.starts_with("ociVersion"), "{text}");
        let text = refused(|value| {
            value["linux"]["devices"] =
                serde_json::json!([{"path": "/dev/../etc/x", "type": "c", "major": 1, "minor": 3}]);
        });
        assert!(text.starts_with("linux.devices[0].path"), "{text}");
    }
}
