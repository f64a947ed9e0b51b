//! What the program sees: its root, mounts, devices, names and namespaces.

use std::fs;

use serde_json::json;

use crate::Test;
use crate::fixture::{Container, exists};

pub const TESTS: &[Test] = &[
    ("root_can_be_read_only", root_can_be_read_only),
    ("bind_mounts_work_both_ways", bind_mounts_work_both_ways),
    ("bind_mounts_can_be_read_only", bind_mounts_can_be_read_only),
    ("a_file_can_be_bound", a_file_can_be_bound),
    ("tmpfs_has_its_options", tmpfs_has_its_options),
    ("a_mount_needs_no_source", a_mount_needs_no_source),
    (
        "a_tmpfs_can_begin_with_what_is_there",
        a_tmpfs_can_begin_with_what_is_there,
    ),
    ("attributes_can_be_recursive", attributes_can_be_recursive),
    (
        "a_bind_mount_can_be_id_mapped",
        a_bind_mount_can_be_id_mapped,
    ),
    (
        "a_wrong_option_says_what_the_kernel_said",
        a_wrong_option_says_what_the_kernel_said,
    ),
    (
        "an_overlay_takes_joined_options",
        an_overlay_takes_joined_options,
    ),
    ("mount_propagation_is_set", mount_propagation_is_set),
    (
        "paths_are_masked_and_read_only",
        paths_are_masked_and_read_only,
    ),
    ("sysctl_is_set", sysctl_is_set),
    (
        "hostname_and_namespaces_are_its_own",
        hostname_and_namespaces_are_its_own,
    ),
    ("a_namespace_can_be_joined", a_namespace_can_be_joined),
    (
        "a_user_namespace_can_be_joined",
        a_user_namespace_can_be_joined,
    ),
    ("loopback_is_up", loopback_is_up),
    ("a_network_device_moves_in", a_network_device_moves_in),
    ("time_offsets_are_set", time_offsets_are_set),
    ("a_user_namespace_maps_ids", a_user_namespace_maps_ids),
    (
        "default_devices_work_and_others_do_not_open",
        default_devices_work_and_others_do_not_open,
    ),
    ("a_device_can_be_added", a_device_can_be_added),
    (
        "a_root_without_dev_mount_can_be_used_twice",
        a_root_without_dev_mount_can_be_used_twice,
    ),
    (
        "a_root_whose_dev_is_a_link_is_refused",
        a_root_whose_dev_is_a_link_is_refused,
    ),
    ("a_mount_that_fails_says_why", a_mount_that_fails_says_why),
    ("cgroup_mounts_are_read_only", cgroup_mounts_are_read_only),
];

fn root_can_be_read_only() {
    let mut container = Container::shell("echo x > /file");
    container.config["root"]["readonly"] = json!(true);
    let outcome = container.run();
    assert_eq!(outcome.code, 1);
    assert!(
        outcome.stderr.contains("Read-only file system"),
        "{outcome:?}"
    );
    assert!(!container.root().join("file").exists());
}

fn bind_mounts_work_both_ways() {
    let mut container = Container::shell("cat /data/in; echo out > /data/out");
    let volume = container.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("in"), "in\n").unwrap();
    container.mount(
        json!({"destination": "/data", "type": "bind", "source": volume,
        "options": ["rbind", "rw"]}),
    );
    assert_eq!(container.output(), "in\n");
    assert_eq!(fs::read_to_string(volume.join("out")).unwrap(), "out\n");
}

fn bind_mounts_can_be_read_only() {
    let mut container = Container::shell("echo x > /data/x");
    let volume = container.path("volume");
    fs::create_dir(&volume).unwrap();
    container.mount(json!({"destination": "/data", "source": volume, "options": ["bind", "ro"]}));
    let outcome = container.run();
    assert!(
        outcome.stderr.contains("Read-only file system"),
        "{outcome:?}"
    );
}

fn a_file_can_be_bound() {
    let mut container = Container::new(&["cat", "/new/deep/file"]);
    let file = container.path("file");
    fs::write(&file, "content").unwrap();
    container.mount(json!({"destination": "/new/deep/file", "source": file, "options": ["bind"]}));
    assert_eq!(container.output(), "content");
}

fn tmpfs_has_its_options() {
    let mut container = Container::shell("grep ' /t ' /proc/mounts; stat -c %a /t");
    container.mount(
        json!({"destination": "/t", "type": "tmpfs", "source": "tmpfs",
        "options": ["nosuid", "nodev", "noexec", "mode=1770", "size=1m"]}),
    );
    let text = container.output();
    for wanted in ["nosuid", "nodev", "noexec", "size=1024k", "1770\n"] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
}

fn a_mount_needs_no_source() {
    let mut container = Container::shell("grep -c ' /t ' /proc/mounts");
    container.mount(json!({"destination": "/t", "type": "tmpfs"}));
    assert_eq!(container.output(), "1\n");
}

fn a_tmpfs_can_begin_with_what_is_there() {
    let mut container = Container::shell("cat /data/file; rm /data/file; stat -c %a /data");
    let data = container.root().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), "content\n").unwrap();
    container.mount(
        json!({"destination": "/data", "type": "tmpfs", "source": "tmpfs",
        "options": ["tmpcopyup"]}),
    );
    assert_eq!(container.output(), "content\n755\n");
    assert!(data.join("file").exists());
}

fn attributes_can_be_recursive() {
    let mut container = Container::shell("touch /data/a /data/below/b; true");
    let elsewhere = tempfile::tempdir().unwrap();
    let volume = elsewhere.path();
    fs::create_dir_all(volume.join("below")).unwrap();
    let below = volume.join("below");
    nix::mount::mount(
        Some("tmpfs"),
        &below,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    for (options, top, lower) in [
        (json!(["rbind", "ro"]), false, true),
        (json!(["rbind", "rro"]), false, false),
    ] {
        let mount = json!({"destination": "/data", "source": volume, "options": options});
        container.mount(mount);
        let outcome = container.run();
        let said = outcome.stderr.matches("Read-only file system").count();
        assert_eq!(said, if lower { 1 } else { 2 }, "{options}: {outcome:?}");
        assert_eq!(volume.join("a").exists(), top, "{options}");
        assert_eq!(below.join("b").exists(), lower, "{options}");
        let _ = fs::remove_file(below.join("b"));
        container.config["mounts"].as_array_mut().unwrap().pop();
    }
    nix::mount::umount2(&below, nix::mount::MntFlags::MNT_DETACH).unwrap();
}

fn a_bind_mount_can_be_id_mapped() {
    let mut container = Container::shell("stat -c %u:%g /data/file; touch /data/new");
    let volume = container.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "").unwrap();
    std::os::unix::fs::chown(volume.join("file"), Some(1000), Some(1001)).unwrap();
    let map = json!([{"containerID": 0, "hostID": 0, "size": 1},
        {"containerID": 1000, "hostID": 5000, "size": 10}]);
    container.mount(
        json!({"destination": "/data", "type": "bind", "source": volume,
        "options": ["bind"], "uidMappings": map, "gidMappings": map}),
    );
    if let Err(error) = container.create() {
        let error = engine::error_chain(&error);
        let system = nix::sys::statfs::statfs(&volume).unwrap();
        let always = system.filesystem_type() == nix::sys::statfs::EXT4_SUPER_MAGIC;
        assert!(!always && error.contains("cannot id-map"), "{error}");
        println!("skipped: {error}");
        return;
    }
    container.engine.start().unwrap();
    assert_eq!(container.finish().stdout, "5000:5001\n");
    let made = fs::metadata(volume.join("new")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), 0);
}

fn a_wrong_option_says_what_the_kernel_said() {
    let mut container = Container::new(&["true"]);
    container.mount(json!({"destination": "/t", "type": "tmpfs", "options": ["size=much"]}));
    let error = engine::error_chain(&container.create().unwrap_err());
    assert!(error.contains("Bad value for 'size'"), "{error}");
    container.assert_gone();
}

fn an_overlay_takes_joined_options() {
    let mut container = Container::shell("cat /merged/a && echo new > /merged/b");
    for name in ["lower", "upper", "work"] {
        fs::create_dir(container.path(name)).unwrap();
    }
    fs::write(container.path("lower").join("a"), "lower\n").unwrap();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        container.path("lower").display(),
        container.path("upper").display(),
        container.path("work").display()
    );
    container.mount(
        json!({"destination": "/merged", "type": "overlay", "source": "overlay",
        "options": [options]}),
    );
    assert_eq!(container.output(), "lower\n");
    assert!(container.path("upper").join("b").exists());
}

fn mount_propagation_is_set() {
    let mut container = Container::shell("grep ' /data ' /proc/self/mountinfo");
    let volume = container.path("volume");
    fs::create_dir(&volume).unwrap();
    container.mount(json!({"destination": "/data", "source": volume,
        "options": ["rbind", "rshared"]}));
    container.config["linux"]["rootfsPropagation"] = json!("rslave");
    let text = container.output();
    assert!(text.contains("shared:"), "{text}");
    container.config["mounts"]
        .as_array_mut()
        .unwrap()
        .last_mut()
        .unwrap()["options"] = json!(["rbind", "rprivate"]);
    for root in ["rprivate", "private", "slave"] {
        container.config["linux"]["rootfsPropagation"] = json!(root);
        let text = container.output();
        assert!(
            !text.contains("shared:") && !text.contains("master:"),
            "{text}"
        );
    }
}

fn paths_are_masked_and_read_only() {
    let mut container = Container::shell(
        "cat /proc/keys; ls /etc/secret; wc -c < /etc/file; echo 1 > /proc/sys/kernel/printk",
    );
    fs::create_dir(container.root().join("etc/secret")).unwrap();
    fs::write(container.root().join("etc/secret/x"), "x").unwrap();
    fs::write(container.root().join("etc/file"), "secret").unwrap();
    container.config["linux"]["maskedPaths"] =
        json!(["/proc/keys", "/etc/secret", "/etc/file", "/no/such"]);
    container.config["linux"]["readonlyPaths"] = json!(["/proc/sys", "/no/such"]);
    let outcome = container.run();
    assert_eq!(outcome.stdout, "0\n");
    assert!(
        outcome.stderr.contains("Read-only file system"),
        "{outcome:?}"
    );
}

fn sysctl_is_set() {
    let mut container = Container::new(&["cat", "/proc/sys/kernel/msgmax"]);
    container.config["linux"]["sysctl"] = json!({"kernel.msgmax": "12345"});
    assert_eq!(container.output(), "12345\n");
    container.config["linux"]["sysctl"] = json!({"kernel.panic": "1"});
    assert!(container.create().is_err(), "a setting of the host");
    container.assert_gone();
}

fn hostname_and_namespaces_are_its_own() {
    let script = "hostname; echo $$; for n in pid net ipc uts mnt cgroup; do readlink /proc/self/ns/$n; done";
    let text = Container::shell(script).output();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("inside"));
    assert_eq!(lines.next(), Some("1"));
    for (name, inside) in ["pid", "net", "ipc", "uts", "mnt", "cgroup"]
        .iter()
        .zip(lines)
    {
        let outside = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        assert_ne!(outside.to_str().unwrap(), inside, "{name}");
    }
}

fn a_namespace_can_be_joined() {
    let mut first = Container::sleeping(|_| {});
    let pid = first.created.unwrap().pid;
    let mut second = Container::shell("hostname; readlink /proc/self/ns/net; echo $$");
    second.id.push('b');
    second.cgroup =
        engine::Cgroup::new(&engine::Cgroup::path_for(None, &second.id).unwrap()).unwrap();
    second.config.as_object_mut().unwrap().remove("hostname");
    for (index, name) in [(0, "pid"), (1, "net"), (3, "uts")] {
        second.config["linux"]["namespaces"][index]["path"] =
            json!(format!("/proc/{pid}/ns/{name}"));
    }
    let text = second.output();
    let network = fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "inside");
    assert_eq!(lines[1], network.to_str().unwrap());
    assert_ne!(lines[2], "1");
    // The engine's own next child is at home again.
    let own = fs::read_link("/proc/self/ns/pid").unwrap();
    assert_eq!(
        fs::read_link("/proc/self/ns/pid_for_children").unwrap(),
        own
    );
    first.kill_and_delete();
}

fn a_user_namespace_can_be_joined() {
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let mapped = |container: &mut Container| {
        container.config["linux"]["uidMappings"] = map.clone();
        container.config["linux"]["gidMappings"] = map.clone();
        let root = container.root();
        for directory in [container.directory.path(), &root, &root.join("dev")] {
            std::os::unix::fs::chown(directory, Some(100_000), Some(100_000)).unwrap();
        }
    };
    let mut first = Container::sleeping(|container| {
        mapped(container);
        let namespaces = container.config["linux"]["namespaces"].as_array_mut();
        namespaces.unwrap().push(json!({"type": "user"}));
    });
    let pid = first.created.unwrap().pid;
    // As a pod's further containers do: the user and network namespaces of the first, a pid namespace of its own.
    let mut second =
        Container::shell("id -u; echo $$; cat /proc/self/uid_map; mount -t tmpfs x /mnt");
    mapped(&mut second);
    second.id.push('b');
    second.cgroup =
        engine::Cgroup::new(&engine::Cgroup::path_for(None, &second.id).unwrap()).unwrap();
    second.config["linux"]["namespaces"][1]["path"] = json!(format!("/proc/{pid}/ns/net"));
    let namespaces = second.config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user", "path": format!("/proc/{pid}/ns/user")}));
    let outcome = second.run();
    let words: Vec<&str> = outcome.stdout.split_whitespace().collect();
    assert_eq!(words, ["0", "1", "0", "100000", "65536"], "{outcome:?}");
    first.kill_and_delete();
}

fn loopback_is_up() {
    let text = Container::new(&["ip", "link", "show", "lo"]).output();
    assert!(text.contains("LOOPBACK,UP"), "{text}");
}

fn a_network_device_moves_in() {
    let ip = |arguments: &str| {
        let done = std::process::Command::new("ip")
            .args(arguments.split(' '))
            .output();
        done.is_ok_and(|output| output.status.success())
    };
    let name = format!("rt{}", std::process::id());
    if !ip(&format!("link add {name} type veth peer name {name}p")) {
        println!("skipped: no ip(8) here, or it cannot make a pair of virtual devices");
        return;
    }
    assert!(ip(&format!("addr add 192.0.2.7/24 dev {name}")));
    let mut container = Container::shell("ip -o addr show dev eth7; ip -o link show dev eth7");
    container.config["linux"]["netDevices"] = json!({ name.as_str(): {"name": "eth7"} });
    let text = container.output();
    assert!(text.contains("192.0.2.7/24"), "{text}");
    assert!(text.contains(",UP"), "{text}");
    assert!(
        !exists(format!("/sys/class/net/{name}").as_ref()),
        "it stayed on the host"
    );
    container.config["linux"]["netDevices"] = json!({ "rt-no-such": {} });
    let error = engine::error_chain(&container.create().unwrap_err());
    assert!(error.contains("linux.netDevices.rt-no-such"), "{error}");
    container.assert_gone();
}

fn time_offsets_are_set() {
    let mut container = Container::new(&["cat", "/proc/uptime"]);
    if !exists("/proc/self/ns/time".as_ref()) {
        println!("skipped: this kernel has no time namespaces");
        return;
    }
    container.config["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "time"}));
    container.config["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000}});
    let text = container.output();
    let uptime: f64 = text.split(' ').next().unwrap().parse().unwrap();
    assert!(uptime > 1e9, "{text}");
    let own = fs::read_to_string("/proc/uptime").unwrap();
    assert!(own.split(' ').next().unwrap().parse::<f64>().unwrap() < 1e9);
}

fn a_user_namespace_maps_ids() {
    let mut container = Container::shell("id -u; cat /proc/self/uid_map; touch /tmp/f");
    container.config["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "user"}));
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    container.config["linux"]["uidMappings"] = map.clone();
    container.config["linux"]["gidMappings"] = map;
    // The mapped root must be able to reach and change the root file system.
    let root = container.root();
    for directory in [
        container.directory.path(),
        &root,
        &root.join("tmp"),
        &root.join("dev"),
    ] {
        std::os::unix::fs::chown(directory, Some(100_000), Some(100_000)).unwrap();
    }
    let text = container.output();
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(words, ["0", "0", "100000", "65536"]);
    let made = fs::metadata(root.join("tmp/f")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), 100_000);
}

fn default_devices_work_and_others_do_not_open() {
    let mut container = Container::shell(
        "echo x > /dev/null && head -c 4 /dev/zero | wc -c; mknod /dev/mem2 c 1 1; cat /dev/mem2",
    );
    let capabilities = json!(["CAP_MKNOD", "CAP_SYS_RAWIO"]);
    for set in ["bounding", "effective", "permitted"] {
        container.config["process"]["capabilities"][set] = capabilities.clone();
    }
    let outcome = container.run();
    assert_eq!(outcome.stdout, "4\n");
    assert!(
        outcome
            .stderr
            .contains("/dev/mem2': Operation not permitted")
            || outcome.stderr.contains("Operation not permitted"),
        "{outcome:?}"
    );
}

fn a_device_can_be_added() {
    let mut container =
        Container::shell("stat -c '%t:%T %a %u' /dev/mine && head -c 1 /dev/mine | wc -c");
    container.config["linux"]["devices"] = json!([
        {"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 0}
    ]);
    let capabilities = json!(["CAP_DAC_OVERRIDE"]);
    for set in ["bounding", "effective", "permitted"] {
        container.config["process"]["capabilities"][set] = capabilities.clone();
    }
    assert_eq!(container.output(), "1:5 640 7\n1\n");
}

fn a_root_without_dev_mount_can_be_used_twice() {
    let mut container = Container::new(&["true"]);
    container.config["mounts"] =
        json!([{"destination": "/proc", "type": "proc", "source": "proc"}]);
    container.output();
    container.output();
}

fn a_root_whose_dev_is_a_link_is_refused() {
    let mut container = Container::new(&["true"]);
    let outside = container.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::remove_dir(container.root().join("dev")).unwrap();
    std::os::unix::fs::symlink(&outside, container.root().join("dev")).unwrap();
    let error = engine::error_chain(&container.create().unwrap_err());
    assert!(
        error.contains("on /dev: the root file system has no directory there"),
        "{error}"
    );
    assert_eq!(fs::read_dir(outside).unwrap().count(), 0);
    container.assert_gone();
}

fn a_mount_that_fails_says_why() {
    let mut container = Container::new(&["true"]);
    container.mount(json!({"destination": "/x", "source": "/no/such/source", "options": ["bind"]}));
    let error = engine::error_chain(&container.create().unwrap_err());
    assert!(
        error.contains("/no/such/source") && error.contains("No such file"),
        "{error}"
    );
    container.assert_gone();
}

fn cgroup_mounts_are_read_only() {
    let mut container = Container::shell(
        "find /sys/fs/cgroup -name cgroup.procs | head -n 1 | grep -q . || exit 9; \
         for f in $(find /sys/fs/cgroup -name cgroup.procs); do echo $$ > $f && exit 8; done; \
         cat /proc/self/cgroup",
    );
    container.mount(
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}),
    );
    let text = container.output();
    // In its own cgroup namespace a container is at the root of each hierarchy that it was put in.
    for line in text.lines().filter(|line| !line.starts_with("0:")) {
        assert!(line.ends_with(":/"), "{text}");
    }
}
