//! The workload's file system: its root, volumes, tmpfs, what is hidden.

use std::fs;

use integration::{Claim, Fixture, ensure, ensure_eq};
use serde_json::json;

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    (
        "writes_to_the_root_reach_the_bundle",
        writes_to_the_root_reach_the_bundle,
    ),
    (
        "read_only_root_refuses_writes",
        read_only_root_refuses_writes,
    ),
    ("volume_is_shared_both_ways", volume_is_shared_both_ways),
    (
        "volume_changes_are_seen_while_running",
        volume_changes_are_seen_while_running,
    ),
    (
        "read_only_volume_refuses_writes",
        read_only_volume_refuses_writes,
    ),
    ("single_file_is_mounted", single_file_is_mounted),
    (
        "nested_volumes_keep_their_order",
        nested_volumes_keep_their_order,
    ),
    ("tmpfs_has_its_size_and_mode", tmpfs_has_its_size_and_mode),
    ("masked_paths_are_empty", masked_paths_are_empty),
    (
        "read_only_paths_refuse_writes",
        read_only_paths_refuse_writes,
    ),
    (
        "default_devices_are_there_and_work",
        default_devices_are_there_and_work,
    ),
    ("ownership_and_modes_are_kept", ownership_and_modes_are_kept),
    (
        "symlinks_stay_inside_the_root",
        symlinks_stay_inside_the_root,
    ),
    ("files_behave_like_files", files_behave_like_files),
    (
        "directories_list_what_they_have",
        directories_list_what_they_have,
    ),
    (
        "tmpfs_on_a_new_directory_is_for_all_users",
        tmpfs_on_a_new_directory_is_for_all_users,
    ),
    (
        "file_is_mounted_where_a_link_leads",
        file_is_mounted_where_a_link_leads,
    ),
];

fn writes_to_the_root_reach_the_bundle(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("echo written > /root/file");
    fixture.run(&bundle)?.success()?;
    ensure_eq!(
        fs::read_to_string(bundle.in_rootfs("root/file"))?,
        "written\n",
        "the file on the host"
    );
    Ok(())
}

fn read_only_root_refuses_writes(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["root"]["readonly"] = json!(true);
    bundle.script("touch /root/file");
    let outcome = fixture.run(&bundle)?;
    ensure!(outcome.code() != 0, "the write succeeded");
    ensure!(
        outcome.stderr.contains("Read-only file system"),
        "reason: {:?}",
        outcome.stderr
    );
    ensure!(
        !bundle.in_rootfs("root/file").exists(),
        "the file exists on the host"
    );
    Ok(())
}

fn volume_is_shared_both_ways(fixture: &Fixture) -> Claim {
    let volume = fixture.dir().join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("from-host"), "hello from the host\n")?;
    let mut bundle = fixture.bundle()?;
    bundle.bind(&volume, "/data/volume", &["rw"]);
    bundle.script("cat /data/volume/from-host; echo hello from inside > /data/volume/from-inside");
    let outcome = fixture.run(&bundle)?.success()?;
    ensure_eq!(
        outcome.stdout,
        "hello from the host\n",
        "the host's file seen inside"
    );
    ensure_eq!(
        fs::read_to_string(volume.join("from-inside"))?,
        "hello from inside\n",
        "the other way"
    );
    Ok(())
}

fn volume_changes_are_seen_while_running(fixture: &Fixture) -> Claim {
    let volume = fixture.dir().join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("value"), "old\n")?;
    let mut bundle = fixture.bundle()?;
    bundle.bind(&volume, "/data", &["rw"]);
    bundle.script("trap 'exit 0' TERM; while true; do sleep 1; done");
    let id = fixture.id("shared");
    fixture.start_detached(&bundle, &id)?;
    let read = |path: &str| -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
        Ok(fixture
            .call(&["exec", &id, "/bin/cat", path])?
            .success()?
            .stdout)
    };
    ensure_eq!(read("/data/value")?, "old\n", "the first read");
    fs::write(volume.join("value"), "a new and longer value\n")?;
    fs::write(volume.join("another"), "new file\n")?;
    ensure_eq!(
        read("/data/value")?,
        "a new and longer value\n",
        "the read after the host's write"
    );
    ensure_eq!(
        read("/data/another")?,
        "new file\n",
        "the file that the host added"
    );
    fixture
        .call(&[
            "exec",
            &id,
            "/bin/sh",
            "-c",
            "echo inside > /data/value; rm /data/another",
        ])?
        .success()?;
    ensure_eq!(
        fs::read_to_string(volume.join("value"))?,
        "inside\n",
        "the workload's write on the host"
    );
    ensure!(
        !volume.join("another").exists(),
        "the removed file is still on the host"
    );
    Ok(())
}

fn read_only_volume_refuses_writes(fixture: &Fixture) -> Claim {
    let volume = fixture.dir().join("volume");
    fs::create_dir(&volume)?;
    let mut bundle = fixture.bundle()?;
    bundle.bind(&volume, "/data", &["ro"]);
    bundle.script("touch /data/file");
    let outcome = fixture.run(&bundle)?;
    ensure!(
        outcome.stderr.contains("Read-only file system"),
        "reason: {:?}",
        outcome.stderr
    );
    ensure_eq!(fs::read_dir(&volume)?.count(), 0, "files in the volume");
    Ok(())
}

fn single_file_is_mounted(fixture: &Fixture) -> Claim {
    let file = fixture.dir().join("resolv.conf");
    fs::write(&file, "nameserver 192.0.2.1\n")?;
    let mut bundle = fixture.bundle()?;
    bundle.bind(&file, "/etc/resolv.conf", &["rw"]);
    bundle.script("cat /etc/resolv.conf; echo changed > /etc/resolv.conf");
    let outcome = fixture.run(&bundle)?.success()?;
    ensure_eq!(outcome.stdout, "nameserver 192.0.2.1\n", "content inside");
    ensure_eq!(
        fs::read_to_string(&file)?,
        "changed\n",
        "content on the host"
    );
    Ok(())
}

fn nested_volumes_keep_their_order(fixture: &Fixture) -> Claim {
    let (outer, inner) = (fixture.dir().join("outer"), fixture.dir().join("inner"));
    fs::create_dir_all(outer.join("below"))?;
    fs::create_dir(&inner)?;
    fs::write(outer.join("below/file"), "outer\n")?;
    fs::write(inner.join("file"), "inner\n")?;
    let mut bundle = fixture.bundle()?;
    bundle
        .bind(&outer, "/data", &["rw"])
        .bind(&inner, "/data/below", &["ro"]);
    bundle.args(&["/bin/cat", "/data/below/file"]);
    ensure_eq!(
        fixture.run(&bundle)?.success()?.stdout,
        "inner\n",
        "the file of the later mount"
    );
    Ok(())
}

fn tmpfs_has_its_size_and_mode(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.mount(
        json!({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs",
        "options": ["nosuid", "nodev", "size=1m", "mode=1750"]}),
    );
    bundle.script(
        "stat -c %a /scratch; df -k /scratch | tail -n 1 | awk '{print $2}'; \
         dd if=/dev/zero of=/scratch/file bs=64k count=32 2>/dev/null || echo full",
    );
    ensure_eq!(
        fixture.run(&bundle)?.success()?.stdout,
        "1750\n1024\nfull\n",
        "mode, KiB, write of 2 MiB"
    );
    Ok(())
}

fn masked_paths_are_empty(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    fs::write(bundle.in_rootfs("etc/secret"), "secret")?;
    fs::create_dir(bundle.in_rootfs("etc/private"))?;
    fs::write(bundle.in_rootfs("etc/private/key"), "secret")?;
    bundle.spec["linux"]["maskedPaths"] = json!([
        "/etc/secret",
        "/etc/private",
        "/proc/interrupts",
        "/no/such/path"
    ]);
    bundle.script("wc -c < /etc/secret; ls /etc/private | wc -l; wc -c < /proc/interrupts");
    ensure_eq!(
        fixture.run(&bundle)?.success()?.stdout,
        "0\n0\n0\n",
        "sizes"
    );
    Ok(())
}

fn read_only_paths_refuse_writes(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["readonlyPaths"] = json!(["/proc/sys", "/etc"]);
    bundle.script("touch /etc/file; echo 1 > /proc/sys/vm/drop_caches");
    let outcome = fixture.run(&bundle)?;
    let refused = outcome.stderr.matches("Read-only file system").count();
    ensure_eq!(refused, 2, "refused writes; stderr {:?}", outcome.stderr);
    Ok(())
}

fn default_devices_are_there_and_work(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script(
        "for name in null zero full random urandom tty; do stat -c '%F %t:%T %n' /dev/$name; done; \
         echo gone > /dev/null; head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c; \
         readlink /dev/fd; readlink /dev/stdout; ls -d /dev/pts/ptmx /dev/shm /dev/mqueue",
    );
    let expected = "character special file 1:3 /dev/null\ncharacter special file 1:5 /dev/zero\n\
        character special file 1:7 /dev/full\ncharacter special file 1:8 /dev/random\n\
        character special file 1:9 /dev/urandom\ncharacter special file 5:0 /dev/tty\n4\n4\n\
        /proc/self/fd\n/proc/self/fd/1\n/dev/mqueue\n/dev/pts/ptmx\n/dev/shm\n";
    ensure_eq!(fixture.run(&bundle)?.success()?.stdout, expected, "devices");
    Ok(())
}

fn ownership_and_modes_are_kept(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    let given = json!(["CAP_CHOWN", "CAP_FOWNER", "CAP_FSETID", "CAP_DAC_OVERRIDE"]);
    bundle.spec["process"]["capabilities"] =
        json!({"bounding": given, "effective": given, "permitted": given});
    bundle.script(
        "cd /tmp; touch a; chown 1234:4321 a; chmod 4711 a; mkdir d; chmod 1777 d; ln -s a link; mkfifo f; \
         stat -c '%u %g %a %F' a d link f",
    );
    let outcome = fixture.run(&bundle)?.success()?;
    let expected = "1234 4321 4711 regular empty file\n0 0 1777 directory\n0 0 777 symbolic link\n0 0 644 fifo\n";
    ensure_eq!(outcome.stdout, expected, "seen inside");
    let metadata = fs::metadata(bundle.in_rootfs("tmp/a"))?;
    let found = (
        std::os::unix::fs::MetadataExt::uid(&metadata),
        std::os::unix::fs::MetadataExt::gid(&metadata),
        std::os::unix::fs::MetadataExt::mode(&metadata) & 0o7777,
    );
    ensure_eq!(found, (1234, 4321, 0o4711), "seen on the host");
    Ok(())
}

fn symlinks_stay_inside_the_root(fixture: &Fixture) -> Claim {
    let outside = fixture.dir().join("outside");
    fs::create_dir(&outside)?;
    fs::write(outside.join("secret"), "the host's\n")?;
    let mut bundle = fixture.bundle()?;
    std::os::unix::fs::symlink(&outside, bundle.in_rootfs("link"))?;
    std::os::unix::fs::symlink("../../../../../../../../etc", bundle.in_rootfs("up"))?;
    bundle.script("cat /link/secret; cat /up/passwd | head -n 1");
    let outcome = fixture.run(&bundle)?;
    ensure_eq!(
        outcome.stdout,
        "root:x:0:0:root:/root:/bin/sh\n",
        "what the links lead to"
    );
    ensure!(
        outcome.stderr.contains("No such file"),
        "stderr: {:?}",
        outcome.stderr
    );
    Ok(())
}

fn files_behave_like_files(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script(
        "cd /tmp && echo one > a && echo two >> a && mv a b && ln b c && rm b && cat c && \
         mkdir d && (rmdir d/missing 2>/dev/null || echo no) && mkdir d/e && (rmdir d 2>/dev/null || echo full) && \
         exec 5<> c && rm c && cat <&5 && dd if=/dev/zero of=sparse bs=1 count=1 seek=1048575 2>/dev/null && \
         stat -c %s sparse && mkdir f && busybox cp /bin/busybox f/echo && \
         md5sum < f/echo > x && md5sum < /bin/busybox > y && busybox cmp x y && echo same && /tmp/f/echo runs",
    );
    let outcome = fixture.run(&bundle)?.success()?;
    ensure_eq!(
        outcome.stdout,
        "one\ntwo\nno\nfull\none\ntwo\n1048576\nsame\nruns\n",
        "output"
    );
    Ok(())
}

/// A listing has the directory itself and the one above, and of each entry the number that its file has.
fn directories_list_what_they_have(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script(
        "mkdir -p /tmp/d/e && cd /tmp/d && busybox ls -ai | while read number name; do \
         echo $name; [ $number = $(stat -c %i $name) ] || echo not $number; done",
    );
    ensure_eq!(
        fixture.run(&bundle)?.success()?.stdout,
        ".\n..\ne\n",
        "names"
    );
    Ok(())
}

fn tmpfs_on_a_new_directory_is_for_all_users(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.mount(json!({"destination": "/new/one", "type": "tmpfs", "source": "tmpfs"}));
    bundle.args(&["/bin/stat", "-c", "%a", "/new/one"]);
    ensure_eq!(fixture.run(&bundle)?.success()?.stdout, "1777\n", "mode");
    Ok(())
}

fn file_is_mounted_where_a_link_leads(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    // As in an image of a system that makes the file when it runs.
    std::os::unix::fs::symlink(
        "../run/later/resolv.conf",
        bundle.in_rootfs("etc/resolv.conf"),
    )?;
    let file = fixture.dir().join("resolv.conf");
    fs::write(&file, "nameserver 192.0.2.1\n")?;
    bundle.bind(&file, "/etc/resolv.conf", &["ro"]);
    bundle.script("cat /etc/resolv.conf; cmp /etc/resolv.conf /run/later/resolv.conf");
    ensure_eq!(
        fixture.run(&bundle)?.success()?.stdout,
        "nameserver 192.0.2.1\n",
        "the file"
    );
    Ok(())
}
