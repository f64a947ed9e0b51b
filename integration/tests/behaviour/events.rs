//! `rt events`: what a container uses, and that the kernel killed for want of memory.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use integration::{Claim, Fixture, Model, ensure, ensure_eq, eventually, wait_with_limit};
use serde_json::{Value, json};

use crate::Entry;
use crate::microvm_failures::any_kernel;

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
    ("a_console_is_the_machines", a_console_is_the_machines),
    ("metrics_tell_what_is_used", metrics_tell_what_is_used),
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

fn a_console_is_the_machines(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    let id = fixture.id("console");
    if fixture.model() == Model::Container {
        bundle.script("while true; do sleep 1000; done");
        fixture.start_detached(&bundle, &id)?;
        let logs = fixture.call(&["logs", "--console", &id])?;
        ensure_eq!(logs.code(), 1, "exit code");
        ensure!(
            logs.stderr.contains("its kernel is the host's"),
            "{}",
            logs.stderr
        );
        return Ok(());
    }
    // A kernel that says what it notices.
    bundle.spec["vm"] = json!({"kernel": {"path": any_kernel()?, "parameters": ["loglevel=6"]}});
    bundle.script("while true; do sleep 1000; done");
    fixture.start_detached(&bundle, &id)?;
    let logs = fixture.call(&["logs", "--console", &id])?.success()?;
    ensure!(
        logs.stdout.contains("Kernel command line: "),
        "{:?}",
        logs.stdout
    );
    ensure!(!logs.stdout.contains('\r'), "{:?}", logs.stdout);
    // What is left of it when it has ended is what one wants to read.
    fixture.call(&["kill", &id, "KILL"])?.success()?;
    fixture.wait_for_end(&id)?;
    let after = fixture.call(&["logs", "--console", &id])?.success()?;
    ensure_eq!(after.stdout, logs.stdout, "after the end");
    Ok(())
}

fn metrics_tell_what_is_used(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["resources"]["pids"] = json!({"limit": 55});
    bundle.script("while true; do sleep 1000; done");
    let id = fixture.id("metrics");
    fixture.start_detached(&bundle, &id)?;
    let model = fixture.model().name();
    let labels = format!("{{id=\"{id}\",isolation=\"{model}\"}}");
    let socket = fixture.dir().join("metrics.sock");
    let mut server = fixture.rt(&["metrics", "--listen"]);
    let mut server = server.arg(format!("unix:{}", socket.display())).spawn()?;
    let asked = eventually(Duration::from_secs(60), || {
        let mut stream = UnixStream::connect(&socket)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: rt\r\n\r\n")?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply)?;
        ensure!(reply.starts_with("HTTP/1.1 200 OK\r\n"), "{reply}");
        for line in [
            format!("rt_containers{{isolation=\"{model}\",status=\"running\"}} 1"),
            format!("rt_container_unreadable{labels} 0"),
            format!("rt_container_processes_limit{labels} 55"),
        ] {
            ensure!(
                reply.lines().any(|one| one == line),
                "{line} is not in {reply}"
            );
        }
        let used = format!("rt_container_memory_usage_bytes{labels} ");
        let used = reply
            .lines()
            .find_map(|line| line.strip_prefix(&used)?.parse::<f64>().ok());
        ensure!(used.is_some_and(|used| used > 0.0), "{reply}");
        let machine = reply.contains(&format!("rt_machine_memory_usage_bytes{labels}"));
        ensure_eq!(
            machine,
            fixture.model() == Model::Microvm,
            "whether there is a machine; {reply}"
        );
        Ok(())
    });
    server.kill()?;
    server.wait()?;
    asked?;
    if fixture.model() == Model::Microvm {
        // A guest that does not answer holds up nobody.
        let vmm = fixture.state(&id)?["pid"].to_string();
        let signal = |name: &str| Command::new("kill").args([name, &vmm]).status();
        signal("-STOP")?;
        let told = fixture.call(&["metrics"]);
        signal("-CONT")?;
        let told = told?.success()?.stdout;
        ensure!(
            told.contains(&format!("rt_container_unreadable{labels} 1\n")),
            "{told}"
        );
    }
    Ok(())
}
