//! Docker: a daemon with roots and a socket of its own, beside a containerd that calls the runtime.

use std::fs;
use std::time::Duration;

use integration::{Claim, Output, ensure_eq};

use crate::engine::{Engine, SERVICE};
use crate::{BOTH, CONTAINER, Entry, Reason, Start, containerd};

pub const CLAIMS: &[Entry<Engine>] = &[
    Entry::further("update_changes_the_limits", BOTH, update_changes_the_limits),
    Entry::further("out_of_memory_is_told", CONTAINER, out_of_memory_is_told),
];

const SOCKET: &str = "unix:///run/docker.sock";

/// Starts the daemon and loads the image.
pub fn start(start: Start) -> Result<Engine, Reason> {
    // Not the host's configuration.
    let config = start.world.dir().join("daemon.json");
    fs::write(&config, "{}")?;
    // Docker waits for one of its own no longer than 15 seconds.
    let containerd = containerd::daemon(&start.world)?;
    let mut daemon = start.world.command("dockerd");
    daemon
        .arg("--config-file")
        .arg(&config)
        .args(["--data-root", "/run/docker-data"])
        .args(["--exec-root", "/run/docker-exec"])
        .args(["--containerd", containerd::SOCKET])
        .args(["--host", SOCKET, "--pidfile", "/run/docker.pid"])
        .arg("--add-runtime")
        .arg(format!("rt={}", start.runtime.display()))
        .args(["--default-runtime", "rt"]);
    let daemon = Output::of(&mut daemon)?;
    daemon.wait_for("API listen on", Duration::from_secs(120))?;
    let command_line = ["docker", "--host", SOCKET].map(Into::into);
    let image = start.image.clone();
    let engine = Engine::new(start, &command_line, &[], vec![containerd, daemon]);
    engine.told(&["load", "--input", &image.to_string_lossy()])?;
    Ok(engine)
}

fn update_changes_the_limits(engine: &Engine) -> Claim {
    engine.service("updates", &["--memory=64m", "--memory-swap=64m"], SERVICE)?;
    let limits = ["--memory=80m", "--memory-swap=80m", "--pids-limit=33"];
    engine.told(&[&["update"], &limits[..], &["updates"]].concat())?;
    let script = "cd /sys/fs/cgroup; \
        cat memory/memory.limit_in_bytes memory.max pids/pids.max pids.max 2>/dev/null; true";
    let shown = engine.told(&["exec", "updates", "sh", "-c", script])?;
    ensure_eq!(shown, "83886080\n33", "limits");
    engine.remove("updates")
}

fn out_of_memory_is_told(engine: &Engine) -> Claim {
    let options = ["--name=oom", "--memory=32m", "--memory-swap=32m"];
    let outcome = engine.run(&options, &["tail", "/dev/zero"])?;
    ensure_eq!(outcome.code(), 137, "exit code; stderr: {}", outcome.stderr);
    // The daemon hears of it by an event of its own, which may come after the end.
    let events = Output::of(&mut engine.command(&[
        "events",
        "--since=10m",
        "--filter=container=oom",
        "--filter=event=oom",
    ]))?;
    events.wait_for("container oom", Duration::from_secs(30))?;
    ensure_eq!(
        engine.inspect("oom", "/State/OOMKilled")?,
        true,
        "OOMKilled"
    );
    engine.remove("oom")
}
