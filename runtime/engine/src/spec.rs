//! Checks a configuration against what the engine can honour, and adapts it to what libcontainer expects.
//!
//! The bundle's author is not trusted: nothing is dropped silently, and what is refused is named by its JSON path.

use std::path::{Path, PathBuf};

use libcontainer::validator::Validator;
use nix::mount::MsFlags;
use oci_spec::runtime::{
    Hooks, Linux, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, Mount, Process, Spec, User,
};

use crate::error::Error;
use crate::hooks;

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
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|map| !map.is_empty())
    {
        return Err(Error::unsupported(
            "linux.netDevices",
            "it is not supported yet",
        ));
    }
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
    if let Some(seccomp) = linux.seccomp()
        && seccomp.listener_path().is_some()
    {
        return Err(Error::unsupported(
            "linux.seccomp.listenerPath",
            "SCMP_ACT_NOTIFY is not supported yet",
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
    propagation_of_root(linux)?;
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
        if joined && of(LinuxNamespaceType::Pid).is_some_and(|pid| path_of(pid).is_none()) {
            return Err(Error::unsupported(
                "linux.namespaces",
                "a new pid namespace together with an existing user namespace is not supported yet",
            ));
        }
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
    let idmapped = mount
        .uid_mappings()
        .as_ref()
        .is_some_and(|map| !map.is_empty())
        || mount
            .gid_mappings()
            .as_ref()
            .is_some_and(|map| !map.is_empty());
    if idmapped {
        return Err(Error::unsupported(
            field("uidMappings"),
            "id-mapped mounts are not supported yet",
        ));
    }
    for option in mount.options().iter().flatten() {
        if matches!(option.as_str(), "idmap" | "ridmap") {
            return Err(Error::unsupported(
                field("options"),
                format!("id-mapped mounts ({option}) are not supported yet"),
            ));
        }
        if matches!(
            option.as_str(),
            "remount" | "tmpcopyup" | "mand" | "dirsync" | "sync"
        ) {
            return Err(Error::unsupported(
                field("options"),
                format!("{option:?} is not supported yet"),
            ));
        }
    }
    let bind = is_bind(mount);
    if bind && mount.source().is_none() {
        return Err(Error::unsupported(
            field("source"),
            "a bind mount needs one",
        ));
    }
    if bind
        && let Some(source) = mount.source()
        && !source.is_absolute()
    {
        return Err(Error::unsupported(
            field("source"),
            format!("{source:?} must have been made absolute"),
        ));
    }
    Ok(())
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

/// libcontainer makes propagation changes recursive itself and does not know the names that say so.
fn propagation_of_root(linux: &Linux) -> Result<Option<String>, Error> {
    let Some(given) = linux
        .rootfs_propagation()
        .as_deref()
        .filter(|one| !one.is_empty())
    else {
        return Ok(None);
    };
    let name = match given {
        "private" | "rprivate" => "private",
        "slave" | "rslave" => "slave",
        "shared" | "rshared" => "shared",
        "unbindable" | "runbindable" => "unbindable",
        _ => {
            return Err(Error::unsupported(
                "linux.rootfsPropagation",
                format!("{given:?} is not one of shared, slave, private, unbindable"),
            ));
        }
    };
    Ok(Some(name.to_owned()))
}

/// What remains to be done to a mount once the container's root is in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountFinish {
    pub(crate) destination: PathBuf,
    /// To be made read-only, with all below it.
    pub(crate) read_only: bool,
    /// To be given this propagation.
    pub(crate) propagation: Option<MsFlags>,
}

/// A configuration as libcontainer gets it.
pub(crate) struct Adapted {
    pub(crate) spec: Spec,
    pub(crate) mounts: Vec<MountFinish>,
}

/// Adapts a validated configuration.
///
/// What the engine does itself is taken out: hooks, limits, seccomp, the change of user, and the working directory.
/// libcontainer then leaves the container's first process as root with all its rights, for the engine to finish.
pub(crate) fn adapt(spec: &Spec) -> Result<Adapted, Error> {
    let mut adapted = spec.clone();
    let mut finish = Vec::new();
    if let Some(mounts) = adapted.mounts_mut() {
        for mount in mounts {
            finish.extend(adapt_mount(mount));
        }
    }
    let in_between = hooks_of(spec).iter().any(|(kind, hooks)| {
        matches!(
            kind,
            hooks::Kind::Prestart | hooks::Kind::CreateRuntime | hooks::Kind::CreateContainer
        ) && !hooks.is_empty()
    });
    // Only with this section does the first process stop for the hooks.
    adapted.set_hooks(in_between.then(Hooks::default));

    let mut linux = match adapted.linux().clone() {
        Some(linux) => linux,
        None => return Err(Error::unsupported("linux", "it is missing")),
    };
    let propagation = propagation_of_root(&linux)?;
    linux
        .set_rootfs_propagation(propagation)
        .set_resources(None)
        .set_seccomp(None)
        .set_net_devices(None);
    if let Some(namespaces) = linux.namespaces_mut() {
        for namespace in namespaces {
            if path_of(namespace).is_none() {
                namespace.set_path(None);
            }
        }
    }
    adapted.set_linux(Some(linux));

    if let Some(process) = adapted.process().clone() {
        adapted.set_process(Some(adapt_process(process)));
    }
    Ok(Adapted {
        spec: adapted,
        mounts: finish,
    })
}

fn adapt_process(mut process: Process) -> Process {
    let mut user = User::default();
    user.set_umask(process.user().umask());
    let profile = apparmor_profile(&process).map(str::to_owned);
    // With HOME there libcontainer does not ask the name service for it, which in a static binary would load
    // libraries of the container's file system into this process.
    process
        .set_user(user)
        .set_cwd(PathBuf::from("/"))
        .set_env(Some(vec!["HOME=/".to_owned()]))
        .set_capabilities(None)
        .set_rlimits(None)
        .set_no_new_privileges(None)
        .set_oom_score_adj(None)
        .set_selinux_label(None)
        .set_apparmor_profile(profile);
    process
}

fn adapt_mount(mount: &mut Mount) -> Option<MountFinish> {
    if !mount.destination().is_absolute() {
        let absolute = Path::new("/").join(mount.destination());
        mount.set_destination(absolute);
    }
    if mount.source().is_none() {
        let source = mount.typ().clone().unwrap_or_else(|| "none".to_owned());
        mount.set_source(Some(PathBuf::from(source)));
    }
    let mut read_only = false;
    let mut propagation = None;
    let mut options = Vec::new();
    for option in mount.options().iter().flatten() {
        match propagation_flag(option) {
            Some(flag) => propagation = Some(flag),
            None => {
                read_only |= option == "ro";
                // Data for the file system may come joined by commas; the kernel wants one at a time.
                if is_bind(mount) || option.contains('"') {
                    options.push(option.clone());
                } else {
                    options.extend(option.split(',').map(str::to_owned));
                }
            }
        }
    }
    // libcontainer mounts these two writable whatever is asked: it has still to put things there.
    let late = (mount.destination() == Path::new("/dev") && !is_bind(mount))
        || mount.typ().as_deref() == Some("cgroup");
    let finish = MountFinish {
        destination: mount.destination().clone(),
        read_only: read_only && late,
        propagation,
    };
    mount.set_options(Some(options));
    (finish.read_only || finish.propagation.is_some()).then_some(finish)
}

fn propagation_flag(option: &str) -> Option<MsFlags> {
    let flag = match option {
        "private" => MsFlags::MS_PRIVATE,
        "rprivate" => MsFlags::MS_PRIVATE | MsFlags::MS_REC,
        "slave" => MsFlags::MS_SLAVE,
        "rslave" => MsFlags::MS_SLAVE | MsFlags::MS_REC,
        "shared" => MsFlags::MS_SHARED,
        "rshared" => MsFlags::MS_SHARED | MsFlags::MS_REC,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        "runbindable" => MsFlags::MS_UNBINDABLE | MsFlags::MS_REC,
        _ => return None,
    };
    Some(flag)
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
        let mount = serde_json::json!({"destination": "/x", "source": "/y", "options": ["bind"],
            "uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}]});
        let text = refused(|value| value["mounts"] = serde_json::json!([mount]));
        assert!(text.starts_with("mounts[0].uidMappings"), "{text}");
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

    #[test]
    fn mounts_are_completed() {
        let spec = spec(|value| {
            value["mounts"] = serde_json::json!([
                {"destination": "proc", "type": "proc"},
                {"destination": "/o", "type": "overlay", "source": "overlay",
                 "options": ["lowerdir=/a:/b,upperdir=/c,workdir=/d", "ro"]},
                {"destination": "/b", "source": "/s", "options": ["rbind", "rprivate", "ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            ]);
        });
        let adapted = adapt(&spec).unwrap();
        let mounts = adapted.spec.mounts().as_ref().unwrap();
        assert_eq!(mounts[0].destination(), Path::new("/proc"));
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("proc")));
        assert_eq!(
            mounts[1].options().as_ref().unwrap(),
            &["lowerdir=/a:/b", "upperdir=/c", "workdir=/d", "ro"]
        );
        assert_eq!(mounts[2].options().as_ref().unwrap(), &["rbind", "ro"]);
        assert_eq!(
            adapted.mounts,
            [
                MountFinish {
                    destination: "/b".into(),
                    read_only: false,
                    propagation: Some(MsFlags::MS_PRIVATE | MsFlags::MS_REC),
                },
                MountFinish {
                    destination: "/sys/fs/cgroup".into(),
                    read_only: true,
                    propagation: None,
                },
            ]
        );
    }

    #[test]
    fn the_adapted_process_is_left_to_the_engine() {
        let spec = spec(|value| {
            value["process"]["user"] = serde_json::json!({"uid": 7, "gid": 8, "umask": 63});
            value["process"]["noNewPrivileges"] = true.into();
            value["process"]["cwd"] = "/work".into();
        });
        let adapted = adapt(&spec).unwrap();
        let process = adapted.spec.process().as_ref().unwrap();
        assert_eq!(process.user().uid(), 0);
        assert_eq!(process.user().umask(), Some(63));
        assert_eq!(process.no_new_privileges(), None);
        assert_eq!(process.cwd(), Path::new("/"));
        assert!(adapted.spec.hooks().is_none());
    }
}
