//! What of the host's files a container sees, and what it can write.

use std::path::Path;

use super::{
    FORBID, Lists, POD_SECURITY, REQUIRE, RULE, RUNTIME_SPEC, Rule, Weakness, each, is_bare_name,
    weakness_if,
};
use crate::bundle::CONFIG_FILE;
use crate::verify::paths::{Match, Pattern};
use crate::verify::policy::Setting;
use crate::verify::posture::{Fact, Mount, Posture, Sharing};

const MOUNT_NAMESPACES: &str = "https://man7.org/linux/man-pages/man7/mount_namespaces.7.html";

/// Where the host has its cgroup file system.
const CGROUPS: &str = "/sys/fs/cgroup";

/// The type of file system of what a machine is given.
const VIRTIO_FS: &str = "virtiofs";

pub(super) const MASKED_PATHS: Rule = Rule {
    id: "masked-paths",
    why: "these files tell of the host's kernel, memory, keys or devices",
    fix: "list the path in linux.maskedPaths, and mount no second proc or sysfs",
    reference: POD_SECURITY,
    lists: REQUIRE,
    check: requires_paths,
    judge: |posture, setting| {
        let masked = &posture.masked;
        let is_open = |path: &Path| {
            kernel_files(posture, path) && !masked.value.iter().any(|one| path.starts_with(one))
        };
        let mut weaknesses = missing(&masked.at, &setting.require, "can be read", is_open);
        // A second procfs or sysfs has all that is hidden in the first.
        let again = posture.mounts.iter().filter(|mount| {
            let expected = match mount.value.kind.as_str() {
                "proc" => "/proc",
                "sysfs" => "/sys",
                _ => return false,
            };
            mount.value.destination != Path::new(expected)
        });
        weaknesses.extend(again.map(|Fact { at, value }| {
            let destination = value.destination.display();
            Weakness::new(
                at,
                format!("nothing is hidden in the {} at {destination}", value.kind),
            )
        }));
        weaknesses
    },
};

pub(super) const READ_ONLY_PATHS: Rule = Rule {
    id: "read-only-paths",
    why: "who writes to these files changes the host's kernel",
    fix: "list the path in linux.readonlyPaths",
    reference: POD_SECURITY,
    lists: REQUIRE,
    check: requires_paths,
    judge: |posture, setting| {
        let read_only = &posture.read_only;
        let is_hidden = |path: &Path| posture.masked.value.iter().any(|one| path.starts_with(one));
        let is_open = |path: &Path| {
            let mount = posture.mount_of(path);
            kernel_files(posture, path)
                && !is_hidden(path)
                && !mount.is_some_and(|mount| mount.value.is_read_only)
                && !read_only.value.iter().any(|one| path.starts_with(one))
        };
        missing(&read_only.at, &setting.require, "can be written", is_open)
    },
};

fn requires_paths(setting: &Setting) -> Result<(), String> {
    each(&setting.require, "an absolute path", |entry| {
        entry.starts_with('/')
    })
}

/// Whether a path is one of the kernel's in this container, not of the image.
fn kernel_files(posture: &Posture, path: &Path) -> bool {
    ["/proc", "/sys"].into_iter().any(|top| {
        path.starts_with(top)
            && posture
                .mounts
                .iter()
                .any(|mount| mount.value.destination == Path::new(top))
    })
}

fn missing(
    at: &str,
    required: &[String],
    what: &str,
    is_open: impl Fn(&Path) -> bool,
) -> Vec<Weakness> {
    let open: Vec<&str> = required
        .iter()
        .filter(|path| is_open(Path::new(path)))
        .map(String::as_str)
        .collect();
    if open.is_empty() {
        return Vec::new();
    }
    vec![Weakness::new(at, format!("{} {what}", open.join(", ")))]
}

pub(super) const WRITABLE_SYSFS: Rule = Rule {
    id: "writable-sysfs",
    why: "in /sys devices are configured, and programs named that the host's kernel executes",
    fix: "add \"ro\" to the mount's options",
    reference: RUNTIME_SPEC,
    judge: |posture, _| {
        let is_sysfs = |mount: &Mount| {
            mount.kind == "sysfs" || mount.source.as_deref() == Some(Path::new("/sys"))
        };
        writable(posture, is_sysfs, "sysfs")
    },
    ..RULE
};

pub(super) const WRITABLE_CGROUPS: Rule = Rule {
    id: "writable-cgroups",
    why: "who writes there can lift the container's limits, and with version 1 name a program that the host executes",
    fix: "add \"ro\" to the mount's options, or give a cgroup namespace where the host has version 2 with nsdelegate",
    reference: "https://docs.kernel.org/admin-guide/cgroup-v1/cgroups.html",
    judge: |posture, _| {
        let cgroups = posture.namespaces.get("cgroup");
        let has_own = cgroups.is_some_and(|fact| fact.value == Sharing::Own);
        let is_cgroup = |mount: &Mount| {
            let source = mount.source.as_deref();
            let is_one = matches!(mount.kind.as_str(), "cgroup" | "cgroup2")
                || source.is_some_and(|source| source.starts_with(CGROUPS));
            is_one && !(has_own && mount.is_delegated)
        };
        let what = "the cgroup file system";
        let mut weaknesses = writable(posture, is_cgroup, what);
        weaknesses.extend(posture.cgroups_below.iter().map(|Fact { at, value }| {
            let place = value.display();
            Weakness::new(
                at,
                format!("{what} can be written at {place}: \"ro\" is not recursive, \"rro\" is"),
            )
        }));
        weaknesses
    },
    ..RULE
};

fn writable(posture: &Posture, is_meant: impl Fn(&Mount) -> bool, what: &str) -> Vec<Weakness> {
    let mounts = posture.mounts.iter();
    mounts
        .filter(|mount| is_meant(&mount.value) && !mount.value.is_read_only)
        .map(|Fact { at, value }| {
            let destination = value.destination.display();
            Weakness::new(at, format!("{what} can be written at {destination}"))
        })
        .collect()
}

pub(super) const HOST_PATHS: Rule = Rule {
    id: "host-paths",
    why: "through it the container reads the host's secrets, or changes what the host executes",
    fix: "mount a directory that is the container's own",
    reference: POD_SECURITY,
    lists: Lists {
        allow: true,
        forbid: true,
        require: false,
    },
    check: |setting| {
        patterns(&setting.forbid)
            .and(patterns(&setting.allow))
            .map(drop)
    },
    judge: |posture, setting| {
        let (forbid, allow) = (patterns(&setting.forbid), patterns(&setting.allow));
        // They were checked when the policy was loaded.
        let (forbid, allow) = (forbid.unwrap_or_default(), allow.unwrap_or_default());
        let mut weaknesses = Vec::new();
        // A bundle may lie anywhere, but not its root where the host's own things are.
        if let Some(root) = posture.root.value.as_deref()
            && forbid
                .iter()
                .any(|one| one.meets(root) == Some(Match::Below) || one.is(root))
        {
            let what = format!("the root file system is {} of the host", root.display());
            weaknesses.push(Weakness::new(&posture.root.at, what));
        }
        for Fact { at, value: mount } in &posture.mounts {
            for source in mount.sources() {
                let is_allowed = allow
                    .iter()
                    .any(|one| one.meets(source) == Some(Match::Named))
                    || is_in_its_place(mount, source);
                let reach = (!is_allowed)
                    .then(|| reach(posture, &forbid, source))
                    .flatten();
                let Some(part) = reach else {
                    continue;
                };
                let how = if mount.is_read_only {
                    "read"
                } else {
                    "written"
                };
                let source = source.display();
                weaknesses.push(Weakness::new(
                    at,
                    format!("{source} of the host{part} can be {how}"),
                ));
            }
        }
        weaknesses
    },
};

pub(super) const WRITABLE_HOST_PATHS: Rule = Rule {
    id: "writable-host-paths",
    why: "the container changes what the host's programs are, or are configured by",
    fix: "add \"ro\" to the mount's options, or mount a file that is the container's own",
    reference: POD_SECURITY,
    lists: FORBID,
    check: |setting| patterns(&setting.forbid).map(drop),
    judge: |posture, setting| {
        let forbid = patterns(&setting.forbid).unwrap_or_default();
        let is_forbidden = |path: &Path| {
            forbid
                .iter()
                .any(|one| one.meets(path) == Some(Match::Named))
        };
        let mounts = posture
            .mounts
            .iter()
            .filter(|mount| !mount.value.is_read_only);
        mounts
            .filter_map(|Fact { at, value }| {
                let source = value.source.as_deref().filter(|path| is_forbidden(path))?;
                let what = format!("{} of the host can be written", source.display());
                Some(Weakness::new(at, what))
            })
            .collect()
    },
};

fn patterns(texts: &[String]) -> Result<Vec<Pattern>, String> {
    texts.iter().map(|text| Pattern::parse(text)).collect()
}

/// Whether a source is sysfs or a cgroup at the path that it has on the host: there what is below is masked, and other
/// rules look at it.
fn is_in_its_place(mount: &Mount, source: &Path) -> bool {
    mount.destination == source && (source == Path::new("/sys") || source.starts_with(CGROUPS))
}

/// Whether something forbidden is reached through `source`; of a directory that is given for what lies in it, that is
/// told.
fn reach(posture: &Posture, forbid: &[Pattern], source: &Path) -> Option<String> {
    let met = forbid
        .iter()
        .find_map(|one| Some((one, one.meets(source)?)));
    match met {
        Some((_, Match::Named)) => return Some(String::new()),
        Some((one, Match::Below)) => return Some(format!(", with {one},")),
        None => {}
    }
    // Whoever writes there chooses what the runtime does, and which programs it executes on the host.
    let bundle = posture.bundle.as_deref()?;
    let is_bundle = bundle.starts_with(source) || source == bundle.join(CONFIG_FILE);
    is_bundle.then(|| ", with the container's own bundle,".to_owned())
}

pub(super) const RUNTIME_SOCKETS: Rule = Rule {
    id: "runtime-sockets",
    why: "whoever may speak to a container runtime is root on its host",
    fix: "do not mount the socket",
    reference: POD_SECURITY,
    lists: FORBID,
    check: |setting| {
        each(
            &setting.forbid,
            "the name of a socket without a directory",
            is_bare_name,
        )
    },
    judge: |posture, setting| {
        let mut weaknesses = Vec::new();
        for Fact { at, value: mount } in &posture.mounts {
            for source in mount.sources() {
                let name = source.file_name().unwrap_or_default();
                if setting.forbid.iter().any(|one| name == one.as_str()) {
                    let what = format!("the socket {} of the host is given", source.display());
                    weaknesses.push(Weakness::new(at, what));
                }
            }
        }
        weaknesses
    },
};

pub(super) const MOUNT_TYPES: Rule = Rule {
    id: "mount-types",
    why: "such a file system is the kernel's own: whoever reads or writes it reaches the whole host, or its devices",
    fix: "remove the mount",
    reference: RUNTIME_SPEC,
    lists: FORBID,
    check: |setting| each(&setting.forbid, "a type of file system", is_bare_name),
    judge: |posture, setting| {
        let mounts = posture.mounts.iter();
        // A bind mount of a single file of one, as of /dev/null, is judged by its path.
        let forbidden = mounts
            .filter(|Fact { value, .. }| value.is_whole && setting.forbid.contains(&value.kind));
        forbidden
            .map(|Fact { at, value }| {
                let destination = value.destination.display();
                Weakness::new(at, format!("{} is mounted at {destination}", value.kind))
            })
            .collect()
    },
};

pub(super) const MOUNT_PROPAGATION: Rule = Rule {
    id: "mount-propagation",
    why: "what the container mounts there appears on the host",
    fix: "use rslave or rprivate",
    reference: MOUNT_NAMESPACES,
    judge: |posture, _| {
        let root = &posture.root_is_shared;
        let root = root
            .value
            .then(|| Weakness::new(&root.at, "mounts in the root file system reach the host"));
        let mounts = posture.mounts.iter().filter(|mount| mount.value.is_shared);
        let mounts = mounts.map(|Fact { at, value }| {
            let destination = value.destination.display();
            Weakness::new(at, format!("mounts below {destination} reach the host"))
        });
        root.into_iter().chain(mounts).collect()
    },
    ..RULE
};

pub(super) const MOUNT_FLAGS: Rule = Rule {
    id: "mount-flags",
    why: "set-user-id programs and device nodes in a volume have effect, whoever put them there",
    fix: "add \"nosuid\" and \"nodev\" to the mount's options",
    reference: "https://man7.org/linux/man-pages/man8/mount.8.html",
    judge: |posture, _| {
        // A machine is given the directories of its container's volumes; the flags are those of the mounts in it.
        let is_in_a_machine = posture
            .mounts
            .iter()
            .any(|mount| mount.value.kind == VIRTIO_FS);
        // The runtime makes the nodes in /dev; and what nobody can write, nobody puts a program in.
        let is_scratch = |mount: &Mount| {
            mount.kind == "tmpfs" && !mount.is_read_only && mount.destination != Path::new("/dev")
        };
        let volumes = posture.mounts.iter().filter(|Fact { value, .. }| {
            let is_volume = if is_in_a_machine {
                value.kind == VIRTIO_FS
            } else {
                value.source.is_some()
            };
            is_volume || is_scratch(value)
        });
        volumes
            .filter_map(|Fact { at, value }| {
                let missing: Vec<&str> = [("nosuid", value.is_nosuid), ("nodev", value.is_nodev)]
                    .into_iter()
                    .filter_map(|(name, is_set)| (!is_set).then_some(name))
                    .collect();
                let destination = value.destination.display();
                (!missing.is_empty()).then(|| {
                    Weakness::new(
                        at,
                        format!("{destination} is without {}", missing.join(" and ")),
                    )
                })
            })
            .collect()
    },
    ..RULE
};

pub(super) const WRITABLE_ROOT: Rule = Rule {
    id: "writable-root",
    why: "whoever gets hold of the workload can change its programs",
    fix: "set root.readonly to true, and mount a tmpfs where the workload writes",
    reference: "https://github.com/opencontainers/runtime-spec/blob/main/config.md#root",
    judge: |posture, _| {
        let fact = &posture.root_is_read_only;
        weakness_if(!fact.value, &fact.at, "the root file system can be written")
    },
    ..RULE
};
