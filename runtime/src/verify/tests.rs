//! Every rule is shown to find what it is for: a sound configuration is broken in one place.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::conformance::Property;
use super::policy::{Policy, Severity};
use super::posture::Fact;
use super::report::Format;
use super::{Report, bundle, rules};

/// What docker and containerd make of an image, in short.
fn sound() -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_NET_BIND_SERVICE",
        "CAP_NET_RAW",
        "CAP_SETFCAP",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SETUID",
        "CAP_SYS_CHROOT",
        "CAP_AUDIT_WRITE"
    ]);
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "cwd": "/",
            "env": ["PATH=/bin"],
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities}
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/docker/containers/c/hosts",
             "options": ["rbind", "rprivate"]},
            {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "rslave"]}
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network", "path": "/run/netns/none-such"}
            ],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [{"names": ["read", "write", "exit_group", "clone"], "action": "SCMP_ACT_ALLOW"}]
            },
            "maskedPaths": [
                "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware"
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            "resources": {
                "devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}
                ],
                "memory": {"limit": 1_000_000_000},
                "pids": {"limit": 100},
                "cpu": {"quota": 10_000, "period": 100_000}
            }
        }
    })
}

fn verify(policy: &str, config: &Value) -> Report {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("rootfs")).unwrap();
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    bundle(directory.path(), &Policy::load(policy).unwrap()).unwrap()
}

/// The rules, places and findings of a sound configuration after a change, without those that it had before.
fn found(policy: &str, change: impl Fn(&mut Value)) -> Vec<(&'static str, String, String)> {
    let list = |report: Report| {
        let findings = report.findings.into_iter();
        findings
            .map(|one| (one.rule, one.at, one.what))
            .collect::<Vec<_>>()
    };
    let before = list(verify(policy, &sound()));
    let mut config = sound();
    change(&mut config);
    let mut after = list(verify(policy, &config));
    after.retain(|one| !before.contains(one));
    after
}

/// A change of the configuration, the rule that must find it, the place that it must name, and a part of what it says.
type Planted = (fn(&mut Value), &'static str, &'static str, &'static str);

const PLANTED: &[Planted] = &[
    (
        |c| c["process"]["cwd"] = json!("here"),
        "specification",
        "process.cwd",
        "absolute",
    ),
    (
        |c| c["process"]["args"] = json!(7),
        "specification",
        "process.args",
        "expected a sequence",
    ),
    (
        |c| c["process"]["env"] = json!(["A=1", "B"]),
        "specification",
        "process.env[1]",
        "NAME=value",
    ),
    (
        |c| c["process"]["capabilities"]["effective"] = json!(["CAP_SYS_TIME"]),
        "specification",
        "process.capabilities.effective",
        "CAP_SYS_TIME must be in permitted",
    ),
    (
        |c| push(&mut c["linux"]["namespaces"], json!({"type": "pid"})),
        "specification",
        "linux.namespaces[5]",
        "twice",
    ),
    (
        |c| c["linux"]["sysctl"] = json!({"kernel.panic": "1"}),
        "specification",
        "linux.sysctl[\"kernel.panic\"]",
        "whole host",
    ),
    (
        |c| c["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 8}]),
        "specification",
        "process.rlimits[0].soft",
        "greater",
    ),
    (
        |c| c["process"]["user"] = json!([0, 0]),
        "specification",
        "process.user",
        "must be an object",
    ),
    (
        |c| c["root"] = json!(["rootfs"]),
        "specification",
        "root",
        "must be an object",
    ),
    (
        |c| c["process"]["args"] = json!(["sh", "\0"]),
        "specification",
        "process.args[1]",
        "NUL",
    ),
    (
        |c| push(&mut c["mounts"][5]["options"], json!("n\0")),
        "specification",
        "mounts[5].options[2]",
        "NUL",
    ),
    (
        |c| c["hooks"] = json!({"poststop": [{"path": "/bin/true", "timeout": 0}]}),
        "specification",
        "hooks.poststop[0].timeout",
        "greater than 0",
    ),
    (
        |c| c["annotations"] = json!({"": "x"}),
        "specification",
        "annotations",
        "empty",
    ),
    (
        |c| drop(take(c, "/mounts/5", "source")),
        "specification",
        "mounts[5].source",
        "needs one",
    ),
    (
        |c| c["mounts"][5]["source"] = json!(""),
        "specification",
        "mounts[5].source",
        "needs one",
    ),
    (
        |c| c["linux"]["devices"] = json!([{"path": "/dev/null", "type": "c", "major": 1}]),
        "specification",
        "linux.devices[0].minor",
        "missing",
    ),
    (
        |c| c["linux"]["seccomp"]["syscalls"][0]["names"] = json!([]),
        "specification",
        "linux.seccomp.syscalls[0].names",
        "must name",
    ),
    (
        |c| c["linux"]["seccomp"]["syscalls"][0]["errnoRet"] = json!(1),
        "specification",
        "linux.seccomp.syscalls[0].errnoRet",
        "only",
    ),
    (
        |c| c["linux"]["timeOffsets"] = json!({"monotonic": {"secs": 1, "nanosecs": 0}}),
        "specification",
        "linux.timeOffsets",
        "time",
    ),
    (
        |c| c["linux"]["rootfsPropagation"] = json!("sideways"),
        "specification",
        "linux.rootfsPropagation",
        "not one of",
    ),
    (
        |c| c["linux"]["cgroupsPath"] = json!("/a/../.."),
        "specification",
        "linux.cgroupsPath",
        "without ..",
    ),
    (
        |c| {
            let map = json!({"containerID": 0, "hostID": 7, "size": 1});
            push(&mut c["linux"]["namespaces"], json!({"type": "user"}));
            c["linux"]["uidMappings"] = json!([map, map]);
            c["linux"]["gidMappings"] = json!([map]);
        },
        "specification",
        "linux.uidMappings[1]",
        "overlaps",
    ),
    (
        |c| {
            let map = json!({"containerID": 0, "hostID": 7, "size": 1});
            push(&mut c["linux"]["namespaces"], json!({"type": "user"}));
            c["linux"]["uidMappings"] = json!([map]);
            c["linux"]["gidMappings"] = json!([{"containerID": 1, "hostID": 7, "size": u32::MAX}]);
        },
        "specification",
        "linux.gidMappings[0]",
        "beyond",
    ),
    (
        |c| c["root"]["path"] = json!("nowhere"),
        "not-on-this-host",
        "root.path",
        "No such file",
    ),
    (
        |c| {
            let rules = &mut c["linux"]["seccomp"]["syscalls"];
            for value in 0..10_000 {
                let argument = json!({"index": 0, "value": value, "op": "SCMP_CMP_EQ"});
                push(
                    rules,
                    json!({"names": ["ioctl"], "action": "SCMP_ACT_ALLOW", "args": [argument]}),
                );
            }
        },
        "unsupported",
        "linux.seccomp.syscalls",
        "the kernel takes",
    ),
    (
        |c| c["process"]["noNewPrivilege"] = json!(true),
        "unknown-property",
        "process.noNewPrivilege",
        "no such",
    ),
    (
        |c| c["linux"]["intelRdt"] = json!({"closID": "c"}),
        "unsupported",
        "linux.intelRdt",
        "not supported",
    ),
    (
        |c| remove(&mut c["linux"]["namespaces"], 0),
        "host-namespaces",
        "linux.namespaces",
        "pid",
    ),
    (
        |c| remove(&mut c["linux"]["namespaces"], 4),
        "host-namespaces",
        "linux.namespaces",
        "network",
    ),
    (
        |c| c["linux"]["namespaces"][4]["path"] = json!("/proc/1/ns/net"),
        "host-namespaces",
        "linux.namespaces[4].path",
        "network",
    ),
    (
        |c| c["linux"]["namespaces"][4]["path"] = json!("/var/run/../../proc/1/task/1/ns/net"),
        "host-namespaces",
        "linux.namespaces[4].path",
        "network",
    ),
    (
        |c| {
            c["linux"]["namespaces"][0]["path"] =
                json!("/proc/self/root/proc/1/ns/pid_for_children")
        },
        "host-namespaces",
        "linux.namespaces[0].path",
        "pid",
    ),
    (
        |c| c["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/net"),
        "specification",
        "linux.namespaces[0].path",
        "another type",
    ),
    (
        |c| c["linux"]["namespaces"][1]["path"] = json!("/proc/self/ns/ipc"),
        "host-namespaces",
        "linux.namespaces[1].path",
        "ipc",
    ),
    (
        |c| {
            push(&mut c["linux"]["namespaces"], json!({"type": "user"}));
            c["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 0, "size": 100}]);
            c["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100, "size": 100}]);
        },
        "host-root",
        "linux.uidMappings[0].hostID",
        "user 0 of the container",
    ),
    (
        |c| {
            push(&mut c["linux"]["namespaces"], json!({"type": "user"}));
            let plain = json!({"containerID": 0, "hostID": 100, "size": 100});
            c["linux"]["uidMappings"] = json!([plain]);
            let root = json!({"containerID": 100, "hostID": 0, "size": 1});
            c["linux"]["gidMappings"] = json!([plain, root]);
        },
        "host-root",
        "linux.gidMappings[1].hostID",
        "group 100 of the container",
    ),
    (
        |c| c["process"]["user"]["additionalGids"] = json!([7, 0]),
        "root-group",
        "process.user.additionalGids[1]",
        "root group",
    ),
    (
        |c| {
            push(
                &mut c["process"]["capabilities"]["bounding"],
                json!("CAP_SYS_ADMIN"),
            )
        },
        "capabilities",
        "process.capabilities.bounding",
        "CAP_SYS_ADMIN",
    ),
    (
        |c| c["process"]["capabilities"]["inheritable"] = json!(["CAP_CHOWN"]),
        "inherited-capabilities",
        "process.capabilities.inheritable",
        "CAP_CHOWN",
    ),
    (
        |c| drop(take(c, "/linux", "seccomp")),
        "seccomp",
        "linux.seccomp",
        "no seccomp filter",
    ),
    (
        |c| c["linux"]["seccomp"]["defaultAction"] = json!("SCMP_ACT_ALLOW"),
        "seccomp",
        "linux.seccomp.defaultAction",
        "does not know",
    ),
    (
        |c| c["linux"]["seccomp"]["defaultAction"] = json!("SCMP_ACT_TRACE"),
        "seccomp-calls",
        "linux.seccomp.defaultAction",
        "bpf",
    ),
    (
        |c| {
            push(
                &mut c["linux"]["seccomp"]["syscalls"][0]["names"],
                json!("init_module"),
            )
        },
        "seccomp-calls",
        "linux.seccomp.syscalls[0]",
        "init_module",
    ),
    (
        |c| {
            // Of some arguments alone.
            let only = json!({"names": ["bpf"], "action": "SCMP_ACT_ALLOW",
                              "args": [{"index": 1, "value": 77, "op": "SCMP_CMP_EQ"}]});
            push(&mut c["linux"]["seccomp"]["syscalls"], only);
        },
        "seccomp-calls",
        "linux.seccomp.syscalls[1]",
        "bpf",
    ),
    (
        |c| c["process"]["apparmorProfile"] = json!("unconfined"),
        "apparmor",
        "process.apparmorProfile",
        "unconfined",
    ),
    (
        |c| c["process"]["apparmorProfile"] = json!("localhost/unconfined "),
        "apparmor",
        "process.apparmorProfile",
        "unconfined",
    ),
    (
        |c| c["process"]["selinuxLabel"] = json!("spc_t"),
        "selinux",
        "process.selinuxLabel",
        "not of the form",
    ),
    (
        |c| c["process"]["selinuxLabel"] = json!("staff_u:sysadm_r:container_t:s0:c1,c2"),
        "selinux",
        "process.selinuxLabel",
        "the role is \"sysadm_r\"",
    ),
    (
        |c| c["process"]["selinuxLabel"] = json!("system_u:system_r:spc_t:s0"),
        "selinux",
        "process.selinuxLabel",
        "spc_t",
    ),
    (
        |c| c["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"}),
        "sysctls",
        "linux.sysctl[\"net.ipv4.ip_forward\"]",
        "is set",
    ),
    (
        |c| remove(&mut c["linux"]["maskedPaths"], 1),
        "masked-paths",
        "linux.maskedPaths",
        "/proc/kcore",
    ),
    (
        |c| {
            let second = json!({"destination": "/p", "type": "proc", "source": "proc"});
            push(&mut c["mounts"], second);
        },
        "masked-paths",
        "mounts[6]",
        "/p",
    ),
    (
        |c| drop(take(c, "/linux", "readonlyPaths")),
        "read-only-paths",
        "linux.readonlyPaths",
        "/proc/sys",
    ),
    (
        |c| c["mounts"][2]["options"] = json!(["ro", "rw"]),
        "writable-sysfs",
        "mounts[2]",
        "/sys",
    ),
    (
        |c| drop(take(c, "/mounts/3", "options")),
        "writable-cgroups",
        "mounts[3]",
        "/sys/fs/cgroup",
    ),
    (
        |c| c["mounts"][5]["source"] = json!("/"),
        "host-paths",
        "mounts[5]",
        "/ of the host",
    ),
    (
        |c| c["root"]["path"] = json!("/"),
        "host-paths",
        "root.path",
        "the root file system is / of the host",
    ),
    (
        |c| c["process"]["oomScoreAdj"] = json!(-999),
        "oom-score",
        "process.oomScoreAdj",
        "-999",
    ),
    (
        |c| c["linux"]["resources"]["memory"]["disableOOMKiller"] = json!(true),
        "oom-killer",
        "linux.resources.memory.disableOOMKiller",
        "disabled",
    ),
    (
        |c| c["linux"]["netDevices"] = json!({"eth1": {"name": "eth0"}}),
        "network-interfaces",
        "linux.netDevices[\"eth1\"]",
        "eth1 of the host",
    ),
    (
        |c| {
            c["linux"]["seccomp"]["flags"] =
                json!(["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]);
        },
        "speculation",
        "linux.seccomp.flags[1]",
        "SPEC_ALLOW",
    ),
    (
        |c| c["process"]["cwd"] = json!("/proc/self/fd/7/../.."),
        "open-descriptors",
        "process.cwd",
        "/proc/self/fd/7",
    ),
    (
        |c| c["process"]["args"][0] = json!("/proc/self/exe"),
        "open-descriptors",
        "process.args[0]",
        "/proc/self/exe",
    ),
    (
        |c| c["mounts"][5]["source"] = json!("/etc"),
        "host-paths",
        "mounts[5]",
        "/etc of the host, with /etc/shadow",
    ),
    (
        |c| c["mounts"][5]["source"] = json!("/srv/../etc/hosts"),
        "writable-host-paths",
        "mounts[5]",
        "/etc/hosts of the host can be written",
    ),
    (
        |c| c["mounts"][5]["source"] = json!("/home/alice"),
        "host-paths",
        "mounts[5]",
        "/home/alice of the host, with /home/*/.ssh, can be written",
    ),
    (
        |c| c["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 9}]),
        "specification",
        "linux.uidMappings",
        "need a namespace of type \"user\"",
    ),
    (
        |c| c["mounts"][5]["source"] = json!("/srv/../proc/1"),
        "host-paths",
        "mounts[5]",
        "/proc/1",
    ),
    (
        |c| c["mounts"][5] = json!({"destination": "/d", "type": "ext4", "source": "/dev/sda1"}),
        "host-paths",
        "mounts[5]",
        "/dev/sda1",
    ),
    (
        |c| c["mounts"][5]["source"] = json!("/var/run/docker.sock"),
        "runtime-sockets",
        "mounts[5]",
        "docker.sock",
    ),
    (
        |c| {
            c["mounts"][5] = json!({"destination": "/cg", "type": "bind", "source": "/sys/fs/cgroup",
                                    "options": ["rbind", "ro"]});
        },
        "host-paths",
        "mounts[5]",
        "/sys/fs/cgroup of the host can be read",
    ),
    (
        |c| {
            c["mounts"][5] = json!({"destination": "/ss", "type": "bind", "source": "/sys",
                                    "options": ["rbind", "rro"]});
        },
        "host-paths",
        "mounts[5]",
        "/sys of the host can be read",
    ),
    (
        |c| {
            let sys = json!({"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", "ro"]});
            push(&mut c["mounts"], sys);
        },
        "writable-cgroups",
        "mounts[6]",
        "at /sys/fs/cgroup: \"ro\" is not recursive",
    ),
    (
        |c| c["mounts"][5]["source"] = json!("/var/run/../../run/user/7/podman/x"),
        "host-paths",
        "mounts[5]",
        "/run/user/7/podman/x of the host",
    ),
    (
        |c| c["mounts"][5]["source"] = json!("/srv/alice/.ssh/id_rsa"),
        "host-paths",
        "mounts[5]",
        ".ssh/id_rsa",
    ),
    (
        |c| c["mounts"][5]["source"] = json!("."),
        "host-paths",
        "mounts[5]",
        "with the container's own bundle",
    ),
    (
        |c| {
            c["mounts"][5] = json!({"destination": "/o", "type": "overlay", "source": "overlay",
                                    "options": ["lowerdir=/srv/a\\:b:/etc/ssh,upperdir=/srv/u", "workdir=/srv/w"]});
        },
        "host-paths",
        "mounts[5]",
        "/etc/ssh of the host",
    ),
    (
        |c| {
            c["mounts"][5] = json!({"destination": "/o", "type": "debugfs", "source": "debugfs"});
        },
        "mount-types",
        "mounts[5]",
        "debugfs is mounted at /o",
    ),
    (
        |c| {
            let disk = json!({"path": "/dev/null", "type": "b", "major": 8, "minor": 0});
            let fifo = json!({"path": "/dev/fifo", "type": "p"});
            let sink = json!({"path": "/dev/disk", "type": "c", "major": 1, "minor": 3});
            c["linux"]["devices"] = json!([fifo, sink, disk]);
        },
        "devices",
        "linux.devices[2]",
        "/dev/null is the device b 8:0",
    ),
    (
        |c| push(&mut c["mounts"][5]["options"], json!("rshared")),
        "mount-propagation",
        "mounts[5]",
        "/data",
    ),
    (
        |c| c["linux"]["rootfsPropagation"] = json!("shared"),
        "mount-propagation",
        "linux.rootfsPropagation",
        "reach the host",
    ),
    (
        |c| c["linux"]["resources"]["devices"][0]["allow"] = json!(true),
        "devices",
        "linux.resources.devices[0]",
        "a *:* rwm",
    ),
    (
        |c| {
            let disk = json!({"allow": true, "type": "b", "major": 8, "minor": 0, "access": "r"});
            push(&mut c["linux"]["resources"]["devices"], disk);
        },
        "devices",
        "linux.resources.devices[2]",
        "b 8:0 r",
    ),
    (
        |c| drop(take(c, "/linux/resources", "memory")),
        "memory-limit",
        "linux.resources.memory.limit",
        "memory",
    ),
    (
        |c| c["linux"]["resources"]["pids"]["limit"] = json!(-1),
        "pids-limit",
        "linux.resources.pids.limit",
        "processes",
    ),
    (
        |c| c["linux"]["resources"]["unified"] = json!({"memory.max": "max"}),
        "memory-limit",
        "linux.resources.unified[\"memory.max\"]",
        "memory",
    ),
    (
        |c| c["linux"]["resources"]["memory"]["limit"] = json!(i64::MAX),
        "memory-limit",
        "linux.resources.memory.limit",
        "memory",
    ),
    (
        |c| c["linux"]["resources"]["unified"] = json!({"cpu.max": "max 100000"}),
        "cpu-limit",
        "linux.resources.unified[\"cpu.max\"]",
        "processor",
    ),
    (
        |c| c["process"]["scheduler"] = json!({"policy": "SCHED_FIFO", "priority": 1}),
        "real-time",
        "process.scheduler.policy",
        "SCHED_FIFO",
    ),
    (
        |c| c["linux"]["resources"]["cpu"]["realtimeRuntime"] = json!(1000),
        "real-time",
        "linux.resources.cpu.realtimeRuntime",
        "1000 microseconds",
    ),
    (
        |c| {
            push(
                &mut c["mounts"],
                json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}),
            );
        },
        "mount-flags",
        "mounts[6]",
        "nosuid and nodev",
    ),
    (
        |c| drop(take(c, "/linux/resources", "cpu")),
        "cpu-limit",
        "linux.resources.cpu.quota",
        "processor",
    ),
    (
        |c| c["hooks"] = json!({"prestart": [{"path": "/bin/true"}]}),
        "hooks",
        "hooks.prestart[0]",
        "/bin/true",
    ),
];

/// A change of the configuration that mends what the rule finds in it.
type Mended = (fn(&mut Value), &'static str);

/// What a sound configuration has already: shown by taking it away.
const MENDED: &[Mended] = &[
    (|c| c["root"]["readonly"] = json!(true), "writable-root"),
    (
        |c| c["process"]["noNewPrivileges"] = json!(true),
        "new-privileges",
    ),
    (|c| c["process"]["user"]["uid"] = json!(1000), "root-user"),
    (|c| c["process"]["user"]["gid"] = json!(1000), "root-group"),
    (
        |c| {
            push(&mut c["linux"]["namespaces"], json!({"type": "user"}));
            let map = json!([{"containerID": 0, "hostID": 100_000, "size": 100}]);
            c["linux"]["uidMappings"] = map.clone();
            c["linux"]["gidMappings"] = map;
        },
        "user-namespace",
    ),
    (
        |c| {
            for index in [4, 5] {
                push(&mut c["mounts"][index]["options"], json!("nosuid"));
                push(&mut c["mounts"][index]["options"], json!("nodev"));
            }
        },
        "mount-flags",
    ),
];

/// What docker, podman, containerd and the kubelet mount by themselves, and what users do.
const USUAL: [&str; 29] = [
    "/var/lib/docker/containers/ID/hosts",
    "/var/lib/docker/containers/ID/hostname",
    "/var/lib/docker/containers/ID/resolv.conf",
    "/var/lib/docker/volumes/x/_data",
    "/usr/bin/docker-init",
    "/var/lib/containers/storage/overlay-containers/ID/userdata/shm",
    "/var/lib/containers/storage/overlay-containers/ID/userdata/hosts",
    "/run/containers/storage/overlay-containers/ID/userdata/resolv.conf",
    "/run/containers/storage/overlay-containers/ID/userdata/.containerenv",
    "/run/user/1000/containers/overlay-containers/ID/userdata/hosts",
    "/home/alice/.local/share/containers/storage/overlay-containers/ID/userdata/shm",
    "/var/lib/containers/storage/volumes/x/_data",
    "/var/lib/containers/storage/overlay/ID/merged",
    "/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/ID/hostname",
    "/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/ID/resolv.conf",
    "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/ID/shm",
    "/var/lib/kubelet/pods/UID/etc-hosts",
    "/var/lib/kubelet/pods/UID/volumes/kubernetes.io~empty-dir/cache",
    "/var/lib/kubelet/pods/UID/volume-subpaths/v/app/0",
    "/var/lib/kubelet/pods/UID/containers/c/6c1d",
    "/etc/localtime",
    "/etc/ssl/certs",
    "/srv/data",
    "/home/alice/project",
    "/run/k3s/containerd/io.containerd.grpc.v1.cri/sandboxes/ID/shm",
    "/var/lib/rancher/k3s/agent/containerd/io.containerd.grpc.v1.cri/sandboxes/ID/hostname",
    "/var/lib/rancher/k3s/storage/pvc-1_default_data",
    "/root/.local/share/containers/storage/volumes/x/_data",
    "/usr/bin/nvidia-smi",
];

/// Found in running containers only, by the tests of those.
const OF_THE_KERNEL: [&str; 1] = ["open-descriptors"];

fn push(list: &mut Value, value: Value) {
    list.as_array_mut().unwrap().push(value);
}

fn remove(list: &mut Value, index: usize) {
    list.as_array_mut().unwrap().remove(index);
}

fn take(config: &mut Value, at: &str, key: &str) -> Option<Value> {
    config
        .pointer_mut(at)
        .unwrap()
        .as_object_mut()
        .unwrap()
        .shift_remove(key)
}

#[test]
fn a_sound_configuration_keeps_the_baseline_without_a_warning() {
    let report = verify("baseline", &sound());
    let loud = report
        .findings
        .iter()
        .filter(|one| one.severity > Severity::Note);
    assert_eq!(loud.collect::<Vec<_>>(), Vec::<&super::Finding>::new());
    assert!(report.holds);
}

#[test]
fn each_planted_weakness_is_found_at_its_place_and_nothing_else() {
    for (change, rule, at, what) in PLANTED {
        let found = found("baseline", change);
        let is_meant = |(one, place, said): &(&str, String, String)| {
            one == rule && place == at && said.contains(what)
        };
        assert!(found.iter().any(is_meant), "{rule} at {at}: {found:?}");
        // Some say more than one thing, as a host parameter, but of one place, or of one set of capabilities.
        let about = |place: &str| {
            place
                .split(['.', '['])
                .take(2)
                .collect::<Vec<_>>()
                .join(".")
        };
        let others = found
            .iter()
            .filter(|(_, place, _)| about(place) != about(at));
        assert_eq!(others.count(), 0, "{rule} at {at}: {found:?}");
    }
}

#[test]
fn what_is_mended_is_found_no_more() {
    for (change, rule) in MENDED {
        let count = |config: &Value| {
            let findings = verify("baseline", config).findings;
            findings.iter().filter(|one| one.rule == *rule).count()
        };
        let mut config = sound();
        assert_ne!(count(&config), 0, "{rule}");
        change(&mut config);
        assert_eq!(count(&config), 0, "{rule}");
    }
}

#[test]
fn what_runtimes_and_users_usually_mount_is_no_finding() {
    for source in USUAL {
        let found = found("baseline", |config| {
            config["mounts"][5]["source"] = json!(source);
            let may_be_written = !source.starts_with("/etc") && !source.starts_with("/usr");
            config["mounts"][5]["options"] = if may_be_written {
                json!(["rbind", "rslave"])
            } else {
                json!(["rbind", "rslave", "ro"])
            };
        });
        assert_eq!(found, [], "{source}");
    }
    // As the rootless configurations of runc have it.
    let found = found("baseline", |config| {
        config["mounts"][2] = json!({"destination": "/sys", "type": "bind", "source": "/sys",
                                     "options": ["rbind", "nosuid", "noexec", "nodev", "ro"]});
    });
    assert_eq!(found, []);
}

#[test]
fn a_user_namespace_of_the_host_is_the_hosts_with_maps_too() {
    let found = found("baseline", |config| {
        let user = json!({"type": "user", "path": "/proc/1/ns/user"});
        push(&mut config["linux"]["namespaces"], user);
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 100}]);
        config["linux"]["uidMappings"] = map.clone();
        config["linux"]["gidMappings"] = map;
    });
    let rules: Vec<_> = found
        .iter()
        .map(|(rule, at, _)| (*rule, at.as_str()))
        .collect();
    assert_eq!(rules, [("user-namespace", "linux.namespaces[5].path")]);
}

#[test]
fn every_rule_is_shown_to_find_something() {
    let shown = PLANTED.iter().map(|(_, rule, _, _)| *rule);
    let shown: BTreeSet<&str> = shown
        .chain(MENDED.iter().map(|(_, rule)| *rule))
        .chain(OF_THE_KERNEL)
        .collect();
    let all: BTreeSet<&str> = rules::ALL.iter().map(|rule| rule.id).collect();
    assert_eq!(shown, all);
}

#[test]
fn the_strictest_policy_can_be_kept() {
    let mut config = sound();
    for (change, _) in MENDED {
        change(&mut config);
    }
    for set in ["bounding", "effective", "permitted"] {
        config["process"]["capabilities"][set] = json!([]);
    }
    let masked = &mut config["linux"]["maskedPaths"];
    for path in [
        "/proc/asound",
        "/proc/interrupts",
        "/proc/latency_stats",
        "/proc/sched_debug",
        "/sys/devices/virtual/powercap",
    ] {
        push(masked, json!(path));
    }
    push(
        &mut config["linux"]["namespaces"],
        json!({"type": "cgroup"}),
    );
    let report = verify("rt-strict", &config);
    assert_eq!(report.findings, []);
    assert!(!verify("rt-strict", &sound()).holds);
}

#[test]
fn what_can_not_be_parsed_is_a_finding_and_what_is_not_there_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let policy = Policy::load("baseline").unwrap();
    assert!(bundle(directory.path(), &policy).is_err());
    std::fs::write(directory.path().join("config.json"), "{").unwrap();
    let report = bundle(directory.path(), &policy).unwrap();
    assert_eq!(
        (report.findings[0].rule, report.holds),
        ("specification", false)
    );
    let twice = sound()
        .to_string()
        .replacen("\"cwd\"", "\"cwd\":\"/x\",\"cwd\"", 1);
    std::fs::write(directory.path().join("config.json"), twice).unwrap();
    let places = bundle(directory.path(), &policy).unwrap().findings;
    assert!(
        places
            .iter()
            .any(|one| one.at == "process.cwd" && one.rule == "specification"),
        "{places:?}"
    );
    // No other rule was asked.
    assert_eq!(report.rules, ["specification"]);
}

#[test]
fn a_hostile_text_reaches_no_terminal_and_breaks_no_form() {
    let mut config = sound();
    config["mounts"][5]["source"] = json!("/proc/\u{1b}[2J<&\"\u{7}");
    let report = verify("baseline", &config);
    for format in [
        Format::Text,
        Format::Json,
        Format::Sarif,
        Format::Junit,
        Format::Html,
    ] {
        let text = report.render(format).unwrap();
        assert!(text.contains("u{1b}"), "{format:?}");
        assert!(
            text.chars().all(|one| one == '\n' || !one.is_control()),
            "{format:?}"
        );
    }
    let xml = report.render(Format::Junit).unwrap();
    let html = report.render(Format::Html).unwrap();
    for text in [xml, html] {
        assert!(text.contains("&lt;&amp;") && !text.contains("<&"), "{text}");
    }
}

#[test]
fn the_forms_of_a_report_have_their_fields() {
    let mut config = sound();
    remove(&mut config["linux"]["maskedPaths"], 1);
    let report = verify("baseline", &config);
    let text = report.render(Format::Text).unwrap();
    assert!(text.contains("\nerror: masked-paths\n  why: "), "{text}");
    assert!(
        text.contains("\n  at linux.maskedPaths: /proc/kcore can be read\n"),
        "{text}"
    );
    assert!(
        text.contains("\ndoes not hold: 1 error, 0 warnings, "),
        "{text}"
    );
    let json: Value = serde_json::from_str(&report.render(Format::Json).unwrap()).unwrap();
    assert_eq!(json["findings"][0]["at"], "linux.maskedPaths");
    let sarif: Value = serde_json::from_str(&report.render(Format::Sarif).unwrap()).unwrap();
    let run = &sarif["runs"][0];
    let result = &run["results"][0];
    assert_eq!(result["level"], "error");
    let index = usize::try_from(result["ruleIndex"].as_u64().unwrap()).unwrap();
    assert_eq!(run["tool"]["driver"]["rules"][index]["id"], "masked-paths");
    let region = &result["locations"][0]["physicalLocation"]["region"];
    assert_eq!(region["startLine"], json["findings"][0]["line"]);
    assert_ne!(region["startLine"], Value::Null);
    let junit = report.render(Format::Junit).unwrap();
    assert!(
        junit.contains("failures=\"1\" errors=\"0\" skipped=\"0\""),
        "{junit}"
    );
    assert!(
        junit.contains("error: linux.maskedPaths: /proc/kcore can be read</failure>"),
        "{junit}"
    );
}

#[test]
fn what_was_not_seen_is_no_success_in_any_form() {
    let found = Fact::new("/proc/7/fd", "too many".to_owned());
    let property = Property {
        holds: None,
        ..Property::new("descriptors", "none outside of it", &found, true)
    };
    let mut report = verify("baseline", &sound());
    (report.properties, report.unseen) = (vec![property], 1);
    let sarif: Value = serde_json::from_str(&report.render(Format::Sarif).unwrap()).unwrap();
    let run = &sarif["runs"][0];
    let results = run["results"].as_array().unwrap();
    let result = results.last().unwrap();
    assert_eq!(
        (&result["kind"], &result["level"]),
        (&json!("open"), &json!("none"))
    );
    let index = usize::try_from(result["ruleIndex"].as_u64().unwrap()).unwrap();
    assert_eq!(run["tool"]["driver"]["rules"][index]["id"], "conformance");
    let junit = report.render(Format::Junit).unwrap();
    assert!(
        junit.contains("skipped=\"1\"") && junit.contains("<skipped "),
        "{junit}"
    );
    let text = report.render(Format::Text).unwrap();
    assert!(text.contains("\nnot known: "), "{text}");
}
