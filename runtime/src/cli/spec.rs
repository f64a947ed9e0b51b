//! `rt spec`: a configuration to begin with.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use serde_json::{Value, json};

use super::CliError;
use crate::bundle::CONFIG_FILE;

/// Write a config.json to begin with
#[derive(Debug, clap::Args)]
pub(super) struct SpecArgs {
    /// Directory to write it to [default: the current one]
    #[arg(short, long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// With a user namespace for the calling user
    #[arg(long)]
    rootless: bool,
}

impl SpecArgs {
    pub(super) fn run(self) -> Result<(), CliError> {
        let path = self
            .bundle
            .as_deref()
            .unwrap_or(Path::new("."))
            .join(CONFIG_FILE);
        let mut text = serde_json::to_vec_pretty(&configuration(self.rootless))?;
        text.push(b'\n');
        let written = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&path)
            .and_then(|mut file| file.write_all(&text));
        written.map_err(|source| CliError::File {
            operation: "write",
            path,
            source,
        })
    }
}

/// The same as a typed value, for bundles made from images.
pub(super) fn base() -> Result<Spec, CliError> {
    Ok(serde_json::from_value(configuration(false))?)
}

/// A shell with few rights, its own namespaces and a read-only root.
pub(super) fn configuration(rootless: bool) -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    let mut namespaces = vec!["pid", "network", "ipc", "uts", "mount", "cgroup"];
    let mut sys = json!({
        "destination": "/sys", "type": "sysfs", "source": "sysfs",
        "options": ["nosuid", "noexec", "nodev", "ro"]
    });
    if rootless {
        // Who does not own the network namespace's user namespace may not mount a sysfs of it.
        namespaces.retain(|name| *name != "network");
        namespaces.push("user");
        sys = json!({"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "nosuid", "noexec", "nodev", "ro"]});
    }
    let namespaces: Vec<Value> = namespaces
        .into_iter()
        .map(|name| json!({ "type": name }))
        .collect();
    // Who makes a user namespace alone can give no terminal to the group tty.
    let devpts = if rootless {
        json!([
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620"
        ])
    } else {
        json!([
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            "gid=5"
        ])
    };
    let mut configuration = json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": true,
            "user": { "uid": 0, "gid": 0 },
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "rt",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            {
                "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]
            },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": devpts },
            {
                "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]
            },
            {
                "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                "options": ["nosuid", "noexec", "nodev"]
            },
            sys,
            {
                "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]
            }
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": namespaces,
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    });
    if rootless
        && let Some(linux) = configuration
            .get_mut("linux")
            .and_then(Value::as_object_mut)
    {
        let mapping = |id: u32| json!([{ "containerID": 0, "hostID": id, "size": 1 }]);
        linux.insert(
            "uidMappings".into(),
            mapping(nix::unistd::geteuid().as_raw()),
        );
        linux.insert(
            "gidMappings".into(),
            mapping(nix::unistd::getegid().as_raw()),
        );
        linux.remove("resources");
    }
    configuration
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bundle;

    #[test]
    fn what_we_write_we_can_run_and_we_overwrite_nothing() {
        for rootless in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("rootfs")).unwrap();
            let args = || SpecArgs {
                bundle: Some(dir.path().to_owned()),
                rootless,
            };
            args().run().unwrap();
            let bundle = Bundle::load(dir.path()).unwrap();
            engine::validate(bundle.spec()).unwrap();
            assert!(args().run().is_err());
        }
        assert!(base().is_ok());
    }
}
