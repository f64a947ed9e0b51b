//! `--systemd-cgroup`, with a real systemd: it is the init of an outer container, and `rt` runs beside it in there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use integration::{Claim, Fixture, ensure, ensure_eq};
use serde_json::json;

use crate::Entry;

pub const CLAIMS: &[Entry] = &[(
    "systemd_makes_limits_and_ends_the_cgroup",
    systemd_makes_limits_and_ends_the_cgroup,
)];

const SYSTEMD: &str = "/usr/lib/systemd/systemd";

fn reason_to_skip() -> Option<&'static str> {
    if !Path::new(SYSTEMD).exists() {
        return Some("systemd (package systemd) is not installed");
    }
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control");
    let controllers = controllers.unwrap_or_default();
    let all = ["memory", "pids", "cpu"];
    if !all.iter().all(|name| controllers.contains(name)) {
        return Some("a systemd in a container needs cgroup version 2 with cpu, memory and pids");
    }
    None
}

/// The outer container: this machine's /usr, and systemd with one empty target to reach.
fn start_systemd(fixture: &Fixture, id: &str, inner: &Path) -> Claim {
    let mut outer = fixture.bundle()?;
    for name in ["lib", "lib64", "sbin"] {
        symlink(format!("usr/{name}"), outer.in_rootfs(name))?;
    }
    let units = outer.in_rootfs("etc/systemd/system");
    fs::create_dir_all(&units)?;
    fs::write(
        units.join("test.target"),
        "[Unit]\nDefaultDependencies=no\n",
    )?;
    fs::write(outer.in_rootfs("etc/machine-id"), "uninitialized\n")?;
    let rt = fixture.rt::<&str>(&[]).get_program().to_owned();
    outer
        .args(&[SYSTEMD, "--unit=test.target", "--log-target=console"])
        .bind(Path::new("/usr"), "/usr", &["ro"])
        .bind(Path::new(&rt), "/rt", &["ro"])
        .bind(inner, "/bundle", &[])
        .mount(json!({"destination": "/run", "type": "tmpfs", "source": "tmpfs"}))
        .mount(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
    if let Some(mounts) = outer.spec["mounts"].as_array_mut() {
        mounts.retain(|mount| mount["type"] != "cgroup" && mount["destination"] != "/sys");
    }
    outer
        .mount(json!({"destination": "/sys", "type": "sysfs", "source": "sysfs"}))
        .mount(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}));
    let process = &mut outer.spec["process"];
    process["env"] = json!(["PATH=/usr/sbin:/usr/bin:/bin", "container=rt"]);
    process["noNewPrivileges"] = json!(false);
    let all = [
        "AUDIT_WRITE",
        "BPF",
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "MKNOD",
        "NET_ADMIN",
        "NET_BIND_SERVICE",
        "NET_RAW",
        "PERFMON",
        "SETFCAP",
        "SETGID",
        "SETPCAP",
        "SETUID",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_CHROOT",
        "SYS_NICE",
        "SYS_PTRACE",
        "SYS_RESOURCE",
    ]
    .map(|name| format!("CAP_{name}"));
    process["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
    let linux = &mut outer.spec["linux"];
    linux["maskedPaths"] = json!([]);
    linux["readonlyPaths"] = json!([]);
    linux["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
    if let Some(namespaces) = linux["namespaces"].as_array_mut()
        && !namespaces.iter().any(|one| one["type"] == "cgroup")
    {
        namespaces.push(json!({"type": "cgroup"}));
    }
    fixture.start_detached(&outer, id)?;
    let wait = "until test -S /run/systemd/private; do sleep 0.1; done";
    let ready = fixture.call(&["exec", id, "/usr/bin/timeout", "60", "/bin/sh", "-c", wait])?;
    ensure!(
        ready.status.success(),
        "systemd did not come up: {} {}",
        ready.stderr,
        fixture.log_of(id)
    );
    Ok(())
}

fn systemd_makes_limits_and_ends_the_cgroup(fixture: &Fixture) -> Claim {
    if let Some(reason) = reason_to_skip() {
        println!("skipped: {reason}");
        return Ok(());
    }
    let mut inner = fixture.bundle()?;
    inner.args(&["/bin/sleep", "1000"]);
    inner.spec["linux"]["cgroupsPath"] = json!("rt-test.slice:rt:inner");
    inner.spec["linux"]["resources"] = json!({
        "memory": {"limit": 67_108_864},
        "pids": {"limit": 50},
        "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
    });
    inner.save()?;
    let outer = fixture.id("systemd");
    start_systemd(fixture, &outer, inner.dir())?;
    let run = |script: &str| -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
        let outcome = fixture.call(&["exec", &outer, "/bin/sh", "-c", script])?;
        Ok(outcome.success()?.stdout)
    };
    let rt = "/rt --root /run/rt --systemd-cgroup";
    let scope = "/sys/fs/cgroup/rt.slice/rt-test.slice/rt-inner.scope";
    let show = |properties: &str| {
        run(&format!(
            "systemctl show -p {properties} rt-inner.scope | sort"
        ))
    };

    run(&format!(
        "{rt} run --detach --bundle /bundle inner > /tmp/log 2>&1 < /dev/null || {{ cat /tmp/log; exit 1; }}"
    ))?;
    ensure_eq!(
        show("ActiveState,Delegate,MemoryMax,Slice,TasksMax,CPUWeight,CPUQuotaPerSecUSec")?,
        "ActiveState=active\nCPUQuotaPerSecUSec=500ms\nCPUWeight=59\nDelegate=yes\nMemoryMax=67108864\n\
         Slice=rt-test.slice\nTasksMax=50\n",
        "the unit"
    );
    ensure_eq!(
        run(&format!(
            "cat {scope}/memory.max {scope}/pids.max {scope}/cpu.max"
        ))?,
        "67108864\n50\n50000 100000\n",
        "the cgroup"
    );
    // The process that held the scope is gone: only the workload is in it.
    let init = "grep -o '\"pid\": [0-9]*' | grep -o '[0-9]*'";
    ensure_eq!(
        run(&format!("{rt} state inner | {init}"))?,
        run(&format!("cat {scope}/cgroup.procs"))?,
        "the processes of the scope"
    );
    let inside = run(&format!("{rt} exec inner /bin/cat /proc/self/cgroup"))?;
    ensure!(
        inside.ends_with(":/\n") || inside.contains("rt-inner.scope"),
        "exec: {inside}"
    );
    run(&format!(
        "echo '{{\"pids\": {{\"limit\": 60}}}}' | {rt} update --resources - inner"
    ))?;
    ensure_eq!(show("TasksMax")?, "TasksMax=60\n", "after update");
    run("systemctl daemon-reload")?;
    ensure_eq!(
        run(&format!("cat {scope}/pids.max"))?,
        "60\n",
        "after systemd applied what it knows"
    );
    let taken = run(
        "/rt --root /run/other --systemd-cgroup run --detach --bundle /bundle inner 2>&1 < /dev/null || true",
    )?;
    ensure!(taken.contains("rt-inner.scope"), "a unit in use: {taken:?}");
    ensure_eq!(
        show("ActiveState")?,
        "ActiveState=active\n",
        "after another wanted its unit"
    );
    run(&format!("{rt} delete --force inner"))?;
    ensure_eq!(
        show("ActiveState,LoadState")?,
        "ActiveState=inactive\nLoadState=not-found\n",
        "after delete"
    );
    ensure_eq!(
        run(&format!("ls -d {scope} 2>/dev/null || true"))?,
        "",
        "the cgroup"
    );

    let refused = fixture.call(&["exec", &outer, "/bin/sh", "-c", &format!(
        "sed -i s/rt-test.slice:rt:inner/.a.b/ /bundle/config.json; {rt} run --bundle /bundle inner"
    )])?;
    ensure!(
        refused.stderr.contains("slice:prefix:name"),
        "a path of the other driver: {}",
        refused.stderr
    );
    fixture.call(&["delete", "--force", &outer])?.success()?;
    Ok(())
}
