//! Block devices of the host in the workload's hands.
//!
//! Each is a loop device over a file, so that the host sees what was written.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;

use integration::{Bundle, Claim, Fixture, ensure, ensure_eq};
use serde_json::{Value, json};

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    (
        "a_block_device_is_read_and_written",
        a_block_device_is_read_and_written,
    ),
    (
        "a_block_device_is_used_as_its_rules_allow",
        a_block_device_is_used_as_its_rules_allow,
    ),
    (
        "a_protected_block_device_is_not_written",
        a_protected_block_device_is_not_written,
    ),
    (
        "a_file_system_on_a_block_device_is_mounted",
        a_file_system_on_a_block_device_is_mounted,
    ),
    (
        "a_block_device_that_the_host_has_not_is_only_a_node",
        a_block_device_that_the_host_has_not_is_only_a_node,
    ),
];

const SIZE: u64 = 8 << 20;

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// A loop device; it is given back when this is dropped.
struct Loop {
    node: PathBuf,
    file: PathBuf,
}

impl Loop {
    /// Over a file of [`SIZE`] bytes; none where there are no loop devices.
    fn new(fixture: &Fixture, name: &str, options: &[&str]) -> Outcome<Option<Self>> {
        let file = fixture.dir().join(name);
        if !file.exists() {
            File::create(&file)?.set_len(SIZE)?;
        }
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show"]).args(options).arg(&file);
        let output = losetup.output()?;
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr);
            println!("skipped: no loop device: {}", reason.trim());
            return Ok(None);
        }
        let node = PathBuf::from(String::from_utf8(output.stdout)?.trim());
        Ok(Some(Self { node, file }))
    }

    fn numbers(&self) -> Outcome<(u32, u32)> {
        let device = self.node.metadata()?.rdev();
        Ok((libc::major(device), libc::minor(device)))
    }

    /// What lies on it from `offset` on.
    fn content(&self, offset: u64) -> Outcome<String> {
        let mut text = [0; 8];
        File::open(&self.file)?.read_exact_at(&mut text, offset)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn write(&self, text: &[u8; 8]) -> Claim {
        let node = File::options().write(true).open(&self.node)?;
        node.write_all_at(text, 0)?;
        Ok(node.sync_all()?)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("-d").arg(&self.node).status();
        if !detached.is_ok_and(|status| status.success()) {
            println!("{} stays", self.node.display());
        }
    }
}

/// Gives the workload a node of the device with these numbers, and rules that deny all others.
fn give(bundle: &mut Bundle, path: &str, (major, minor): (u32, u32), rules: Value) {
    bundle.spec["linux"]["devices"] = json!([
        {"path": path, "type": "b", "major": major, "minor": minor, "fileMode": 0o640, "uid": 0, "gid": 6},
    ]);
    let mut all = vec![json!({"allow": false, "access": "rwm"})];
    all.extend(rules.as_array().into_iter().flatten().cloned());
    bundle.spec["linux"]["resources"]["devices"] = json!(all);
}

fn rule((major, minor): (u32, u32), access: &str) -> Value {
    json!([{"allow": true, "type": "b", "major": major, "minor": minor, "access": access}])
}

fn a_block_device_is_read_and_written(fixture: &Fixture) -> Claim {
    let Some(disk) = Loop::new(fixture, "disk", &[])? else {
        return Ok(());
    };
    disk.write(b"the host")?;
    let mut bundle = fixture.bundle()?;
    let numbers = disk.numbers()?;
    give(&mut bundle, "/dev/data", numbers, rule(numbers, "rw"));
    bundle.script(
        "stat -c '%F %a %g' /dev/data; head -c 8 /dev/data; echo; wc -c < /dev/data
         printf workload | dd of=/dev/data bs=8 seek=131072 conv=notrunc,fsync 2>/dev/null && echo written",
    );
    fixture.run(&bundle)?.expect(
        "the device",
        &format!("block special file 640 6\nthe host\n{SIZE}\nwritten\n"),
        "",
        0,
    )?;
    ensure_eq!(disk.content(8 * 131_072)?, "workload", "on the disk");
    ensure_eq!(disk.content(0)?, "the host", "what nobody wrote to");
    Ok(())
}

fn a_block_device_is_used_as_its_rules_allow(fixture: &Fixture) -> Claim {
    let Some(disk) = Loop::new(fixture, "disk", &[])? else {
        return Ok(());
    };
    disk.write(b"the host")?;
    let numbers = disk.numbers()?;
    let any_minor = json!([{"allow": true, "type": "b", "major": numbers.0, "access": "r"}]);
    let script = "head -c 8 /dev/data && echo; echo x > /dev/data";
    let read_only = (
        "the host\n",
        "/bin/sh: can't create /dev/data: Operation not permitted\n",
    );
    let nothing = (
        "",
        "head: /dev/data: Operation not permitted\n/bin/sh: can't create /dev/data: Operation not permitted\n",
    );
    for (rules, (stdout, stderr)) in [
        (rule(numbers, "r"), read_only),
        (any_minor, read_only),
        (rule((numbers.0, numbers.1 + 1), "rw"), nothing),
        (rule(numbers, "m"), nothing),
    ] {
        let mut bundle = fixture.bundle()?;
        let said = rules.to_string();
        give(&mut bundle, "/dev/data", numbers, rules);
        bundle.script(script);
        fixture.run(&bundle)?.expect(&said, stdout, stderr, 1)?;
    }
    ensure_eq!(disk.content(0)?, "the host", "the disk");
    Ok(())
}

fn a_protected_block_device_is_not_written(fixture: &Fixture) -> Claim {
    let Some(disk) = Loop::new(fixture, "disk", &["--read-only"])? else {
        return Ok(());
    };
    let mut bundle = fixture.bundle()?;
    let numbers = disk.numbers()?;
    give(&mut bundle, "/dev/data", numbers, rule(numbers, "rw"));
    bundle.script(
        "head -c 8 /dev/data | wc -c; printf x | dd of=/dev/data conv=notrunc,fsync 2>/dev/null",
    );
    let outcome = fixture.run(&bundle)?;
    ensure_eq!(outcome.stdout, "8\n", "what was read");
    ensure!(outcome.code() != 0, "it was written: {outcome:?}");
    ensure_eq!(disk.content(0)?, "\0\0\0\0\0\0\0\0", "the disk");
    Ok(())
}

fn a_file_system_on_a_block_device_is_mounted(fixture: &Fixture) -> Claim {
    let image = fixture.dir().join("disk");
    File::create(&image)?.set_len(SIZE)?;
    let mut mkfs = Command::new("mkfs.ext4");
    let made = mkfs
        .args(["-q", "-O", "^has_journal"])
        .arg(&image)
        .output()?;
    ensure!(made.status.success(), "mkfs.ext4: {made:?}");
    let Some(disk) = Loop::new(fixture, "disk", &[])? else {
        return Ok(());
    };
    let run = |script: &str, options: &[&str]| -> Outcome<integration::Outcome> {
        let mut bundle = fixture.bundle()?;
        // The mount is the container's own use of the device.
        bundle.spec["linux"]["resources"]["devices"] = rule(disk.numbers()?, "rw");
        bundle.mount(json!({"destination": "/data", "type": "ext4", "source": disk.node, "options": options}));
        bundle.script(script);
        let outcome = fixture.run(&bundle)?;
        ensure!(
            !fs::exists(bundle.in_rootfs("data/file"))?,
            "the file is in the bundle"
        );
        Ok(outcome)
    };
    run("echo kept > /data/file; stat -f -c %T /data", &[])?.expect(
        "writing",
        "ext2/ext3\n",
        "",
        0,
    )?;
    let read = run("cat /data/file; touch /data/other", &["ro"])?;
    read.expect(
        "reading",
        "kept\n",
        "touch: /data/other: Read-only file system\n",
        1,
    )
}

fn a_block_device_that_the_host_has_not_is_only_a_node(fixture: &Fixture) -> Claim {
    // LOCAL/EXPERIMENTAL USE of the kernel's list of devices.
    let numbers = (240, 77);
    let mut bundle = fixture.bundle()?;
    give(&mut bundle, "/dev/data", numbers, rule(numbers, "rw"));
    bundle.script("head -c 8 /dev/data");
    fixture.run(&bundle)?.expect(
        "the device",
        "",
        "head: /dev/data: No such device or address\n",
        1,
    )
}
