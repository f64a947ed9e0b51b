//! `rt update`: other limits for a container that lives.

use integration::{Claim, Fixture, Model, ensure, ensure_eq};
use serde_json::{Value, json};

use crate::Entry;

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
    (
        "update_gives_the_memory_or_refuses",
        update_gives_the_memory_or_refuses,
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

/// A machine has the memory that it was made with, and says so rather than set a limit that is none.
fn update_gives_the_memory_or_refuses(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    let updated = fixture.call(&["update", "--memory", "4G", &id])?;
    match fixture.model() {
        Model::Container => drop(updated.success()?),
        Model::Microvm => ensure!(
            updated.code() == 1 && updated.stderr.contains("gets no more while it runs"),
            "{updated:?}"
        ),
    }
    let limit = used(fixture, &id)?["memory"]["usage"]["limit"].as_u64();
    let is_set = limit == Some(4 << 30);
    ensure_eq!(is_set, fixture.model() == Model::Container, "limit is set");
    Ok(())
}
