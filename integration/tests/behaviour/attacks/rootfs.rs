//! Roots that lie, and volumes whose other users change them while a container starts.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use integration::{Bundle, Claim, Fixture, Model, Outcome, ensure, ensure_eq};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde_json::json;

use super::Outside;
use crate::Entry;
use crate::lifecycle::console_socket;

pub const CLAIMS: &[Entry] = &[
    (
        "a_mount_point_swapped_for_a_link_leads_nowhere_else",
        a_mount_point_swapped_for_a_link_leads_nowhere_else,
    ),
    (
        "mount_points_are_made_inside_the_root",
        mount_points_are_made_inside_the_root,
    ),
    ("proc_is_no_link_of_the_image", proc_is_no_link_of_the_image),
    (
        "kernel_parameters_are_not_written_elsewhere",
        kernel_parameters_are_not_written_elsewhere,
    ),
    (
        "a_false_null_device_masks_nothing",
        a_false_null_device_masks_nothing,
    ),
    (
        "the_console_is_not_mounted_through_a_link",
        the_console_is_not_mounted_through_a_link,
    ),
    (
        "devices_are_not_made_through_a_link",
        devices_are_not_made_through_a_link,
    ),
    (
        "nothing_of_ours_is_read_or_written_in_the_root",
        nothing_of_ours_is_read_or_written_in_the_root,
    ),
    (
        "delete_follows_no_link_of_the_container",
        delete_follows_no_link_of_the_container,
    ),
];

/// It either fails with a reason of ours, or runs as if there were no attack.
fn refused_or(outcome: Outcome, expected: &str) -> Claim {
    if outcome.status.success() {
        ensure_eq!(outcome.stdout, expected, "stdout");
        return Ok(());
    }
    ensure!(
        outcome.stderr.starts_with("rt: "),
        "it failed, but not at our hands: {outcome:?}"
    );
    Ok(())
}

fn without_mount(bundle: &mut Bundle, destination: &str) {
    if let Some(mounts) = bundle.spec["mounts"].as_array_mut() {
        let below = format!("{destination}/");
        mounts.retain(|mount| {
            let at = mount["destination"].as_str().unwrap_or_default();
            at != destination && !at.starts_with(&below)
        });
    }
}

/// Swaps two names as fast as it can while `run` runs.
fn while_swapping(dir: &Path, names: [&str; 2], run: impl FnOnce() -> Claim) -> Claim {
    let stop = AtomicBool::new(false);
    let [one, other] = names.map(|name| dir.join(name));
    thread::scope(|scope| {
        let swaps = scope.spawn(|| {
            let mut swaps = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let swapped = renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE);
                swaps += u64::from(swapped.is_ok());
            }
            swaps
        });
        let result = run();
        stop.store(true, Ordering::Relaxed);
        let swaps = swaps.join().unwrap_or(0);
        result?;
        ensure!(swaps > 100, "only {swaps} swaps: the attack was not tried");
        Ok(())
    })
}

/// CVE-2021-30465, crun's 2019-18837: the destination of a mount in a volume is a directory when it is looked at and a
/// link when it is mounted on.
fn a_mount_point_swapped_for_a_link_leads_nowhere_else(fixture: &Fixture) -> Claim {
    let outside = Outside::new(fixture)?;
    let shared = fixture.dir().join("shared");
    let inner = fixture.dir().join("inner");
    fs::create_dir_all(shared.join("dir"))?;
    fs::create_dir(&inner)?;
    fs::write(inner.join("mark"), "inner")?;
    // As far up as it goes, and down to the target: right from a path of the host as well as from the root's.
    symlink(outside.path(), shared.join("link"))?;
    let mut bundle = fixture.bundle()?;
    bundle.bind(&shared, "/shared", &[]);
    bundle.bind(&inner, "/shared/dir/sub", &[]);
    bundle.mount(json!({"destination": "/shared/dir/tmp", "type": "tmpfs", "source": "tmpfs"}));
    bundle.script("awk '{print $5}' /proc/self/mountinfo | grep ^/shared; true");
    let rounds = if fixture.model() == Model::Microvm {
        4
    } else {
        60
    };
    while_swapping(&shared, ["dir", "link"], || {
        for _ in 0..rounds {
            let outcome = fixture.run(&bundle)?;
            if !outcome.status.success() {
                refused_or(outcome, "")?;
            }
            outside.is_untouched()?;
        }
        Ok(())
    })?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let own = outside.path().to_string_lossy().into_owned();
    ensure!(!mounts.contains(&own), "a mount outside of the root");
    Ok(())
}

/// CVE-2024-45310: the destination does not exist, and the way to it leads through a link.
fn mount_points_are_made_inside_the_root(fixture: &Fixture) -> Claim {
    let outside = Outside::new(fixture)?;
    let volume = fixture.dir().join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("mark"), "volume")?;
    for (name, target) in [
        ("absolute", outside.path().to_path_buf()),
        (
            "relative",
            Path::new("../../../../../../../..").join(outside.path().strip_prefix("/")?),
        ),
    ] {
        let mut bundle = fixture.bundle()?;
        symlink(&target, bundle.in_rootfs(name))?;
        bundle.bind(&volume, &format!("/{name}/new/deep"), &[]);
        bundle.bind(&volume.join("mark"), &format!("/{name}/new-file"), &[]);
        bundle.script(&format!("cat /{name}/new/deep/mark"));
        refused_or(fixture.run(&bundle)?, "volume")?;
        outside.is_untouched()?;
    }
    Ok(())
}

/// CVE-2019-19921, 2019-16884, 2023-27561, 2023-28642: what the runtime writes to /proc goes to a directory of the image.
fn proc_is_no_link_of_the_image(fixture: &Fixture) -> Claim {
    for (path, target) in [("proc", "fake"), ("proc", "/fake"), ("sys", "/fake")] {
        let mut bundle = fixture.bundle()?;
        fs::remove_dir(bundle.in_rootfs(path))?;
        fs::create_dir_all(bundle.in_rootfs("fake/self/attr"))?;
        for file in ["self/attr/exec", "self/attr/current"] {
            fs::write(bundle.in_rootfs("fake").join(file), "")?;
        }
        symlink(target, bundle.in_rootfs(path))?;
        bundle.script("stat -f -c %T /proc; ls /proc/self/attr >/dev/null && echo real");
        let outcome = fixture.run(&bundle)?;
        refused_or(outcome, "proc\nreal\n")
            .map_err(|reason| format!("/{path} is a link to {target}: {reason}"))?;
        let written = fs::read(bundle.in_rootfs("fake/self/attr/exec"))?;
        ensure!(written.is_empty(), "a label was written to a file");
    }
    Ok(())
}

/// CVE-2025-52881, youki's 2025-62596: a kernel parameter's file is a link of the attacker's.
fn kernel_parameters_are_not_written_elsewhere(fixture: &Fixture) -> Claim {
    let outside = Outside::new(fixture)?;
    let shared = fixture.dir().join("shared");
    fs::create_dir_all(shared.join("sys/kernel"))?;
    symlink(
        outside.path().join("file"),
        shared.join("sys/kernel/shm_rmid_forced"),
    )?;
    let mut bundle = fixture.bundle()?;
    without_mount(&mut bundle, "/proc");
    fs::remove_dir(bundle.in_rootfs("proc"))?;
    symlink("shared", bundle.in_rootfs("proc"))?;
    bundle.bind(&shared, "/shared", &[]);
    bundle.spec["linux"]["maskedPaths"] = json!([]);
    bundle.spec["linux"]["readonlyPaths"] = json!([]);
    bundle.spec["linux"]["sysctl"] = json!({"kernel.shm_rmid_forced": "1"});
    bundle.args(&["/bin/echo", "ran"]);
    refused_or(fixture.run(&bundle)?, "ran\n")?;
    for name in [
        "../../../tmp/x",
        "kernel/../../self/attr/exec",
        "/etc/passwd",
    ] {
        let mut bundle = fixture.bundle()?;
        bundle.spec["linux"]["sysctl"] = json!({name: "1"});
        let outcome = fixture.run(&bundle)?;
        ensure!(!outcome.status.success(), "sysctl {name:?} was accepted");
    }
    outside.is_untouched()
}

/// CVE-2025-31133, youki's 2025-62161: what masks a path is taken from the image's /dev/null.
fn a_false_null_device_masks_nothing(fixture: &Fixture) -> Claim {
    for link in [false, true] {
        let mut bundle = fixture.bundle()?;
        without_mount(&mut bundle, "/dev");
        fs::write(bundle.in_rootfs("etc/secret"), "secret")?;
        fs::write(bundle.in_rootfs("etc/fake"), "fake")?;
        let null = bundle.in_rootfs("dev/null");
        match link {
            true => symlink("../etc/fake", null)?,
            false => fs::write(null, "fake")?,
        }
        bundle.spec["linux"]["maskedPaths"] = json!(["/etc/secret", "/proc/kcore"]);
        bundle.script("cat /etc/secret; head -c 4 /proc/kcore; echo end");
        refused_or(fixture.run(&bundle)?, "end\n")
            .map_err(|reason| format!("/dev/null is a link: {link}: {reason}"))?;
        ensure_eq!(
            fs::read_to_string(bundle.in_rootfs("etc/fake"))?,
            "fake",
            "what /dev/null led to"
        );
    }
    Ok(())
}

/// CVE-2025-52565: the terminal is mounted on what /dev/console leads to.
fn the_console_is_not_mounted_through_a_link(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    without_mount(&mut bundle, "/dev");
    bundle.mount(
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
        "options": ["newinstance", "ptmxmode=0666", "mode=0620"]}),
    );
    fs::create_dir(bundle.in_rootfs("dev/pts"))?;
    fs::write(bundle.in_rootfs("etc/target"), "target")?;
    symlink("../etc/target", bundle.in_rootfs("dev/console"))?;
    bundle.spec["process"]["terminal"] = json!(true);
    bundle.script(
        "cat /etc/target > /tmp/seen; grep -c ' /etc/target ' /proc/self/mountinfo >> /tmp/seen",
    );
    bundle.save()?;
    let id = fixture.id("console");
    let (socket, _listener) = console_socket(fixture)?;
    let mut command = fixture.rt(&["create", "--console-socket"]);
    command
        .arg(socket)
        .arg("--bundle")
        .arg(bundle.dir())
        .arg(&id);
    let created = fixture.complete(command, Vec::new())?;
    if !created.status.success() {
        return refused_or(created, "");
    }
    fixture.call(&["start", &id])?.success()?;
    fixture.wait_for_end(&id)?;
    ensure_eq!(
        fs::read_to_string(bundle.in_rootfs("tmp/seen"))?,
        "target0\n",
        "the link's target and the mounts on it"
    );
    Ok(())
}

/// CVE-2026-41579, crun's 2026-47766.
fn devices_are_not_made_through_a_link(fixture: &Fixture) -> Claim {
    let outside = Outside::new(fixture)?;
    for with_tmpfs in [true, false] {
        let mut bundle = fixture.bundle()?;
        fs::remove_dir(bundle.in_rootfs("dev"))?;
        symlink(outside.path(), bundle.in_rootfs("dev"))?;
        if !with_tmpfs {
            without_mount(&mut bundle, "/dev");
        }
        bundle.spec["linux"]["devices"] = json!([
            {"path": "/dev/made", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666, "uid": 0, "gid": 0},
        ]);
        bundle.args(&["/bin/echo", "ran"]);
        refused_or(fixture.run(&bundle)?, "ran\n")?;
        outside.is_untouched()?;
    }
    Ok(())
}

/// crun's CVE-2025-24965: a file of the runtime's is kept where the image has a link.
fn nothing_of_ours_is_read_or_written_in_the_root(fixture: &Fixture) -> Claim {
    let outside = Outside::new(fixture)?;
    let bundle = fixture.bundle()?;
    let baits = [
        ".krun_config.json",
        ".krun_vm.json",
        "config.json",
        "state.json",
        "rt.json",
        ".rt",
        "init",
        "vm",
    ];
    for bait in baits {
        symlink(outside.path().join("file"), bundle.in_rootfs(bait))?;
    }
    let vm = json!({"cpus": 77, "ram_mib": 7, "vcpus": 77, "memory": 7});
    fs::write(bundle.in_rootfs("vm.json"), vm.to_string())?;
    let names = || -> std::io::Result<Vec<String>> {
        let mut names = integration::fault::names_in(&bundle.in_rootfs("/"))?;
        names.sort();
        Ok(names)
    };
    let before = names()?;
    let outcome = fixture.run(&bundle)?;
    ensure_eq!(outcome.code(), 0, "exit code; {:?}", outcome.stderr);
    ensure_eq!(names()?, before, "names in the root");
    outside.is_untouched()
}

/// Kata's: what a container left in place of its mount points is unmounted or removed on the host.
fn delete_follows_no_link_of_the_container(fixture: &Fixture) -> Claim {
    let outside = Outside::new(fixture)?;
    let volume = fixture.dir().join("volume");
    fs::create_dir(&volume)?;
    let mut bundle = fixture.bundle()?;
    bundle.bind(&volume, "/var/volume", &[]);
    // A mount point cannot be renamed; what is above it can.
    bundle.script(&format!(
        "mv /var /moved; ln -s {0} /var; ln -s {0} /volume; ln -s {0} /tmp/link; rm -rf /root; ln -s {0} /root; echo x > /moved/volume/x",
        outside.path().display()
    ));
    let id = fixture.id("links");
    fixture.start_detached(&bundle, &id)?;
    fixture.wait_for_end(&id)?;
    fixture.call(&["delete", &id])?.success()?;
    ensure!(
        fs::symlink_metadata(bundle.in_rootfs("var"))?.is_symlink(),
        "the attack was not tried: {}",
        fixture.log_of(&id)
    );
    ensure_eq!(fs::read_to_string(volume.join("x"))?, "x\n", "volume");
    outside.is_untouched()
}
