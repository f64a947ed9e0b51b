//! `rt update`: other limits for a container that lives.

use integration::{Claim, Fixture, ensure, ensure_eq};
use serde_json::{Value, json};

use crate::Entry;
use crate::microvm_failures::any_kernel;

pub const CLAIMS: &[Entry] = &[
    ("update_sets_limits_by_flags", update_sets_limits_by_flags),
    (
        "update_sets_limits_by_json_from_stdin",
        update_sets_limits_by_json_from_stdin,
    ),
    (
        "update_of_a_quota_keeps_its_period",
        update_of_a_quota_keeps_its_period,
    ),
    ("update_refuses_what_is_wrong", update_refuses_what_is_wrong),
    ("update_gives_the_memory", update_gives_the_memory),
];

pub const MICROVM_CLAIMS: &[Entry] = &[
    (
        "update_to_memory_that_a_guest_cannot_take_is_refused",
        update_to_memory_that_a_guest_cannot_take_is_refused,
    ),
    (
        "updated_memory_goes_before_a_checkpoint",
        updated_memory_goes_before_a_checkpoint,
    ),
];

type Answer<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn running(fixture: &Fixture) -> Answer<String> {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["resources"]["cpu"] = json!({"quota": 60_000, "period": 50_000});
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("update");
    fixture.start_detached(&bundle, &id)?;
    Ok(id)
}

fn used(fixture: &Fixture, id: &str) -> Answer<Value> {
    let events = fixture.call(&["events", "--stats", id])?.success()?;
    let event: Value = serde_json::from_str(&events.stdout)?;
    Ok(event["data"].clone())
}

fn update_sets_limits_by_flags(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    let flags = ["--memory", "64M", "--pids-limit", "123"];
    fixture
        .call(&[&["update", &id], &flags[..]].concat())?
        .success()?;
    let data = used(fixture, &id)?;
    ensure_eq!(data["memory"]["usage"]["limit"], 64 << 20, "memory limit");
    ensure_eq!(data["pids"]["limit"], 123, "limit of processes");
    // What is not given stays.
    fixture
        .call(&["update", "--pids-limit", "-1", &id])?
        .success()?;
    let data = used(fixture, &id)?;
    ensure_eq!(data["memory"]["usage"]["limit"], 64 << 20, "memory limit");
    ensure!(data["pids"].get("limit").is_none(), "{}", data["pids"]);
    fixture
        .call(&["update", &id, "--memory", "-1"])?
        .success()?;
    let limit = used(fixture, &id)?["memory"]["usage"]["limit"].as_u64();
    ensure!(limit > Some(1 << 50), "memory limit: {limit:?}");
    Ok(())
}

fn update_sets_limits_by_json_from_stdin(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    // As a client in Go writes it: 0 for what does not change.
    let resources = json!({"memory": {"limit": 96 << 20, "swap": 0}, "cpu": {"shares": 0}, "pids": {"limit": 99}});
    fixture
        .call_with_input(
            &["update", "--resources", "-", &id],
            resources.to_string().into_bytes(),
        )?
        .success()?;
    let data = used(fixture, &id)?;
    ensure_eq!(data["memory"]["usage"]["limit"], 96 << 20, "memory limit");
    ensure_eq!(data["pids"]["limit"], 99, "limit of processes");
    Ok(())
}

fn update_of_a_quota_keeps_its_period(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    fixture
        .call(&["update", "--cpu-quota", "30000", &id])?
        .success()?;
    let script = "cd /sys/fs/cgroup; cat cpu.max 2>/dev/null || cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us";
    let shown = fixture
        .call(&["exec", &id, "/bin/sh", "-c", script])?
        .success()?;
    let words: Vec<&str> = shown.stdout.split_whitespace().collect();
    ensure_eq!(words, ["30000", "50000"], "quota and period");
    Ok(())
}

fn update_refuses_what_is_wrong(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    for (flags, reason) in [
        (["--memory", "much"], "much"),
        (["--cpu-quota", "1s"], "1s"),
        (["--l3-cache-schema", "L3:0=f"], "--l3-cache-schema"),
        (["--resources", "/nonexistent"], "/nonexistent"),
        (["--cpuset-cpus", "9999"], "cpuset.cpus"),
    ] {
        let refused = fixture.call(&[&["update", &id], &flags[..]].concat())?;
        ensure!(
            refused.code() == 1 && refused.stderr.contains(reason),
            "{flags:?}: {refused:?}"
        );
    }
    let broken = fixture.call_with_input(&["update", "-r", "-", &id], b"[".to_vec())?;
    ensure!(
        broken.code() == 1 && broken.stderr.contains("linux.resources"),
        "{broken:?}"
    );
    fixture.call(&["kill", &id, "KILL"])?.success()?;
    fixture.wait_for_end(&id)?;
    let stopped = fixture.call(&["update", "--pids-limit", "5", &id])?;
    ensure!(
        stopped.code() == 1 && stopped.stderr.contains("not running"),
        "{stopped:?}"
    );
    Ok(())
}

/// What the limit allows can be used, also where a machine has less when it is made; and less can be had again.
fn update_gives_the_memory(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("update");
    fixture.start_detached(&bundle, &id)?;
    // A process that has so much memory of its own, and touches it.
    let takes = |size: &str| -> Answer<bool> {
        let block = format!("bs={size}");
        let arguments = ["/bin/dd", "if=/dev/zero", "of=/dev/null", "count=1", &block];
        let taken = fixture.call(&[&["exec", &id], &arguments[..]].concat())?;
        Ok(taken.code() == 0)
    };
    let limit = || -> Answer<Value> { Ok(used(fixture, &id)?["memory"]["usage"]["limit"].clone()) };
    ensure!(!takes("200M")?, "64 MiB hold 200");
    for (memory, bytes) in [("256M", 256 << 20), ("700M", 700 << 20)] {
        fixture
            .call(&["update", "--memory", memory, &id])?
            .success()?;
        ensure_eq!(limit()?, bytes, "memory limit");
    }
    ensure!(takes("400M")?, "700 MiB do not hold 400");
    fixture
        .call(&["update", "--memory", "64M", &id])?
        .success()?;
    ensure_eq!(limit()?, 64 << 20, "memory limit");
    ensure!(!takes("200M")?, "64 MiB hold 200 again");
    fixture
        .call(&["update", "--memory", "-1", &id])?
        .success()?;
    ensure!(limit()?.as_u64() > Some(1 << 50), "memory limit");
    Ok(())
}

fn update_to_memory_that_a_guest_cannot_take_is_refused(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    let parameters = ["initcall_blacklist=virtio_mem_driver_init"];
    bundle.spec["vm"] = json!({"kernel": {"path": any_kernel()?, "parameters": parameters}});
    bundle.spec["linux"]["resources"]["memory"] = json!({"limit": 128 << 20});
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("update");
    fixture.start_detached(&bundle, &id)?;
    let events = || -> Answer<[Value; 2]> {
        let data = used(fixture, &id)?;
        let of = |data: &Value| data["memory"]["usage"]["limit"].clone();
        Ok([of(&data), of(&data["machine"])])
    };
    let before = events()?;
    let updated = fixture.call(&["update", "--memory", "256M", &id])?;
    ensure!(
        updated.code() == 1 && updated.stderr.contains("CONFIG_VIRTIO_MEM"),
        "{updated:?}"
    );
    ensure_eq!(events()?, before, "limits of the workload and the machine");
    // What the machine has needs no driver.
    fixture
        .call(&["update", "--memory", "100M", &id])?
        .success()?;
    ensure_eq!(events()?[0], 100 << 20, "memory limit");
    Ok(())
}

/// The images of a checkpoint have the memory that a machine was made with.
fn updated_memory_goes_before_a_checkpoint(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["resources"]["memory"] = json!({"limit": 128 << 20});
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("update");
    fixture.start_detached(&bundle, &id)?;
    let images = fixture.dir().join("images");
    let images = images.to_str().ok_or("a path that is no text")?;
    let checkpoint = || fixture.call(&["checkpoint", "--image-path", images, &id]);
    fixture
        .call(&["update", "--memory", "256M", &id])?
        .success()?;
    let refused = checkpoint()?;
    ensure!(
        refused.code() == 1 && refused.stderr.contains("memory that came"),
        "{refused:?}"
    );
    ensure_eq!(fixture.status(&id)?, "running", "status");
    fixture
        .call(&["update", "--memory", "128M", &id])?
        .success()?;
    checkpoint()?.success()?;
    Ok(())
}
