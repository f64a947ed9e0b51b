//! Descriptors, rights, users and cgroups that a process of the container was not meant to have.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;

use integration::{Claim, Fixture, Model, ensure, ensure_eq};
use serde_json::json;

use super::Outside;
use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    (
        "no_descriptor_of_the_host_is_a_way_out",
        no_descriptor_of_the_host_is_a_way_out,
    ),
    (
        "a_descriptor_is_no_working_directory_of_exec",
        a_descriptor_is_no_working_directory_of_exec,
    ),
    ("no_capability_is_inheritable", no_capability_is_inheritable),
    ("users_of_exec_are_numbers", users_of_exec_are_numbers),
    ("cgroups_are_not_writable", cgroups_are_not_writable),
    (
        "oversized_requests_are_not_cut_short",
        oversized_requests_are_not_cut_short,
    ),
];

/// A descriptor that a careless caller of `rt` has open, on a directory of the host.
const LEAKED: i32 = 17;

/// CVE-2024-21626: the working directory is a descriptor of the host that the runtime has open.
fn no_descriptor_of_the_host_is_a_way_out(fixture: &Fixture) -> Claim {
    let outside = Outside::new(fixture)?;
    let opened = fs::File::open(outside.path())?;
    let numbers: Vec<i32> = match fixture.model() {
        Model::Container => (3..24).collect(),
        Model::Microvm => vec![3, 6, 7, 8, 9, LEAKED],
    };
    for number in numbers {
        for through_link in [false, true] {
            if through_link && number % 4 != LEAKED % 4 {
                continue;
            }
            let mut bundle = fixture.bundle()?;
            let target = format!("/proc/self/fd/{number}");
            bundle.spec["process"]["cwd"] = match through_link {
                false => json!(target),
                true => json!("/work"),
            };
            if through_link {
                symlink(&target, bundle.in_rootfs("work"))?;
            }
            bundle.script("ls -d . && pwd -P && cat ./file ../../../../../../etc/shadow");
            bundle.save()?;
            let mut command = fixture.rt(&["run", "--bundle"]);
            command.arg(bundle.dir()).arg(fixture.id("cwd"));
            let fd = opened.as_raw_fd();
            // SAFETY: the child only duplicates a descriptor, which is open in both.
            unsafe {
                command.pre_exec(move || match libc::dup2(fd, LEAKED) {
                    LEAKED => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                });
            }
            let outcome = fixture.complete(command, Vec::new())?;
            ensure!(
                !outcome.status.success() && outcome.stdout.is_empty(),
                "in {target}: {outcome:?}"
            );
        }
    }
    // The program has the standard streams and nothing else, whatever the caller left open.
    let mut bundle = fixture.bundle()?;
    bundle.script("for fd in /proc/self/fd/*; do echo ${fd##*/}; done");
    bundle.save()?;
    let mut command = fixture.rt(&["run", "--bundle"]);
    command.arg(bundle.dir()).arg(fixture.id("fds"));
    let fd = opened.as_raw_fd();
    // SAFETY: as above.
    unsafe {
        command.pre_exec(move || match libc::dup2(fd, LEAKED) {
            LEAKED => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let outcome = fixture.complete(command, Vec::new())?.success()?;
    // The shell itself has the directory open that it lists.
    let open: Vec<&str> = outcome.stdout.lines().collect();
    ensure!(
        open.starts_with(&["0", "1", "2"]) && open.len() <= 4 && !open.contains(&"17"),
        "open in the container: {open:?}"
    );
    Ok(())
}

fn a_descriptor_is_no_working_directory_of_exec(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("cwd");
    fixture.start_detached(&bundle, &id)?;
    for number in 3..16 {
        let directory = format!("/proc/self/fd/{number}");
        let outcome = fixture.call(&["exec", "--cwd", &directory, &id, "/bin/ls", "-la", "."])?;
        ensure!(
            !outcome.status.success() && outcome.stdout.is_empty(),
            "in {directory}: {outcome:?}"
        );
    }
    Ok(())
}

/// CVE-2022-29162, crun's 2022-27650.
fn no_capability_is_inheritable(fixture: &Fixture) -> Claim {
    let status = "grep -E '^Cap(Inh|Amb)' /proc/self/status";
    let none = "CapInh:\t0000000000000000\nCapAmb:\t0000000000000000\n";
    let mut bundle = fixture.bundle()?;
    bundle.script(status);
    ensure_eq!(fixture.run(&bundle)?.success()?.stdout, none, "run");
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("capabilities");
    fixture.start_detached(&bundle, &id)?;
    let exec = fixture.call(&["exec", &id, "/bin/sh", "-c", status])?;
    ensure_eq!(exec.success()?.stdout, none, "exec");
    let added = [
        "exec",
        "--cap",
        "CAP_NET_RAW",
        &id,
        "/bin/grep",
        "^CapInh",
        "/proc/self/status",
    ];
    ensure_eq!(
        fixture.call(&added)?.success()?.stdout,
        "CapInh:\t0000000000000000\n",
        "exec --cap"
    );
    Ok(())
}

/// crun's CVE-2026-30892: a user that is no number becomes another one, most of all root.
fn users_of_exec_are_numbers(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("users");
    fixture.start_detached(&bundle, &id)?;
    for user in [
        "",
        " ",
        ":",
        "1000:",
        ":1000",
        "+1000",
        "-1",
        "1000 ",
        " 1000",
        "1000\n",
        "0x3e8",
        "1e3",
        "1000x",
        "x1000",
        "user",
        "root",
        "1000:user",
        "1000:1000:0",
        "4294967296",
        "99999999999",
        "1000:4294967296",
        "٣",
    ] {
        let outcome = fixture.call(&["exec", "--user", user, &id, "/bin/id"])?;
        ensure!(
            !outcome.status.success() && outcome.stdout.is_empty(),
            "--user {user:?}: {outcome:?}"
        );
    }
    let right = fixture.call(&["exec", "--user", "1000:1000", &id, "/bin/id", "-u"])?;
    ensure_eq!(right.success()?.stdout, "1000\n", "user");
    Ok(())
}

/// CVE-2023-25809, with and without a cgroup namespace.
fn cgroups_are_not_writable(fixture: &Fixture) -> Claim {
    for with_namespace in [true, false] {
        let mut bundle = fixture.bundle()?;
        if !with_namespace {
            bundle.without_namespace("cgroup");
        }
        bundle.script(
            "for dir in $(find /sys/fs/cgroup -type d | head -n 200); do \
             mkdir $dir/escaped 2>/dev/null && echo made $dir; \
             for file in release_agent cgroup.procs notify_on_release cgroup.subtree_control; do \
             [ -e $dir/$file ] && echo 1 2>/dev/null > $dir/$file && echo wrote $dir/$file; done; done; \
             umount /sys/fs/cgroup 2>/dev/null && echo unmounted; echo tried",
        );
        let outcome = fixture.run(&bundle)?;
        ensure_eq!(
            outcome.stdout,
            "tried\n",
            "with a namespace: {with_namespace}"
        );
    }
    Ok(())
}

/// CVE-2021-43784: a length that does not fit is cut, and the rest of the request taken for something else.
fn oversized_requests_are_not_cut_short(fixture: &Fixture) -> Claim {
    for length in [5_000, 65_536 + 16, 200_000] {
        let mut bundle = fixture.bundle()?;
        let path = format!("/proc/1/ns/{}ipc", "/".repeat(length));
        let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut();
        for namespace in namespaces.into_iter().flatten() {
            if namespace["type"] == "ipc" {
                namespace["path"] = json!(path);
            }
        }
        bundle.args(&["/bin/echo", "ran"]);
        let outcome = fixture.run(&bundle)?;
        ensure!(
            !outcome.status.success() && outcome.stdout.is_empty(),
            "a path of {length} bytes: {outcome:?}"
        );
    }
    // More lines than the kernel takes, and more than 64 KiB in all.
    let mut bundle = fixture.bundle()?;
    if let Some(namespaces) = bundle.spec["linux"]["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "user"}));
    }
    let lines: Vec<_> = (0..4_000)
        .map(|n| json!({"containerID": n, "hostID": 100_000 + n, "size": 1}))
        .collect();
    bundle.spec["linux"]["uidMappings"] = json!(lines);
    bundle.spec["linux"]["gidMappings"] = json!(lines);
    bundle.args(&["/bin/echo", "ran"]);
    let outcome = fixture.run(&bundle)?;
    ensure!(
        !outcome.status.success() && outcome.stdout.is_empty(),
        "4000 mappings: {outcome:?}"
    );
    Ok(())
}
