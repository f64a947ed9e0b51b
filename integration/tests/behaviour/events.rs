//! `rt events`: what a container uses, and that the kernel killed for want of memory.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::Duration;

use integration::{Claim, Fixture, Model, ensure, ensure_eq, wait_with_limit};
use serde_json::{Value, json};

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    (
        "events_prints_the_use_once_or_until_the_end",
        events_prints_the_use_once_or_until_the_end,
    ),
    ("events_tells_an_oom_kill", events_tells_an_oom_kill),
    (
        "events_of_a_stopped_container_is_refused",
        events_of_a_stopped_container_is_refused,
    ),
];

fn events_prints_the_use_once_or_until_the_end(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["resources"]["pids"] = json!({"limit": 77});
    bundle.script("n=0; while [ $n -lt 20000 ]; do n=$((n+1)); done; sleep 1000");
    let id = fixture.id("events");
    fixture.start_detached(&bundle, &id)?;
    let once = fixture.call(&["events", "--stats", &id])?.success()?;
    let event: Value = serde_json::from_str(&once.stdout)?;
    ensure_eq!(event["type"], "stats", "type");
    ensure_eq!(event["id"], json!(id), "id");
    let data = &event["data"];
    ensure_eq!(data["pids"]["limit"], 77, "limit of processes");
    ensure!(data["pids"]["current"].as_u64() >= Some(1), "{data}");
    ensure!(data["cpu"]["usage"]["total"].as_u64() > Some(0), "{data}");
    ensure!(
        data["memory"]["usage"]["usage"].as_u64() > Some(0),
        "{data}"
    );
    // The VMM's own cost is no part of the workload's.
    let machine = &data["machine"]["memory"]["usage"]["usage"];
    ensure_eq!(
        machine.is_u64(),
        fixture.model() == Model::Microvm,
        "whether a machine is counted in {data}"
    );

    let mut child = fixture
        .rt(&["events", &id, "--interval", "100ms"])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    let total = |lines: &mut dyn Iterator<Item = std::io::Result<String>>| {
        let line = lines.next().ok_or("no event")??;
        let event: Value = serde_json::from_str(&line)?;
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(
            event["data"]["cpu"]["usage"]["total"].as_u64(),
        )
    };
    let (first, second) = (total(&mut lines)?, total(&mut lines)?);
    ensure!(first.is_some() && second >= first, "{first:?}, {second:?}");
    fixture.call(&["kill", &id, "KILL"])?.success()?;
    end(&mut child)?;
    Ok(())
}

/// The watch ends with the container, and with success.
fn end(child: &mut Child) -> Claim {
    let status = wait_with_limit(child, Duration::from_secs(60))?;
    ensure!(status.success(), "events: {status}");
    Ok(())
}

fn events_tells_an_oom_kill(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["resources"]["memory"] = json!({"limit": 48 << 20, "swap": 48 << 20});
    bundle.script("until [ -e /tmp/go ]; do sleep 0.1; done; x=a; while true; do x=$x$x; done");
    let id = fixture.id("oom");
    fixture.start_detached(&bundle, &id)?;
    let mut child = fixture
        .rt(&["events", "--interval", "100ms", &id])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    // The first use says that the watch is there.
    lines.next().ok_or("no event")??;
    std::fs::write(bundle.in_rootfs("tmp/go"), "")?;
    let rest: Vec<String> = lines.collect::<Result<_, _>>()?;
    end(&mut child)?;
    let event = json!({"type": "oom", "id": id});
    let is_oom = |line: &String| serde_json::from_str::<Value>(line).is_ok_and(|one| one == event);
    ensure!(rest.iter().any(is_oom), "no out-of-memory event: {rest:?}");
    Ok(())
}

fn events_of_a_stopped_container_is_refused(fixture: &Fixture) -> Claim {
    let bundle = fixture.bundle()?;
    let id = fixture.id("stopped-events");
    fixture.start_detached(&bundle, &id)?;
    fixture.wait_for_end(&id)?;
    for args in [&["events", &id][..], &["events", "--stats", &id]] {
        let refused = fixture.call(args)?;
        ensure!(
            refused.code() == 1 && refused.stderr.contains("not running"),
            "{refused:?}"
        );
    }
    Ok(())
}
