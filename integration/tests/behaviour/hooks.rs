//! The six hooks: when they run, where, and what they are told.

use std::fs;

use integration::snapshot::state_directories;
use integration::{Claim, Fixture, ensure, ensure_eq};
use serde_json::{Value, json};

use crate::Entry;
use crate::lifecycle::create;

pub const CLAIMS: &[Entry] = &[
    (
        "host_hooks_run_in_order_and_are_told_the_state",
        host_hooks_run_in_order_and_are_told_the_state,
    ),
    (
        "create_container_hook_runs_before_the_root_is_entered",
        create_container_hook_runs_before_the_root_is_entered,
    ),
    (
        "start_container_hook_runs_inside_before_the_workload",
        start_container_hook_runs_inside_before_the_workload,
    ),
    (
        "failing_hook_before_start_fails_create",
        failing_hook_before_start_fails_create,
    ),
    (
        "hook_that_takes_too_long_is_killed",
        hook_that_takes_too_long_is_killed,
    ),
    (
        "host_hooks_run_in_the_bundles_directory",
        host_hooks_run_in_the_bundles_directory,
    ),
    (
        "start_container_hook_has_the_workloads_filter",
        start_container_hook_has_the_workloads_filter,
    ),
];

/// A hook that runs a script in the host's static busybox.
fn hook(script: &str) -> Value {
    json!({"path": "/bin/busybox", "args": ["busybox", "sh", "-c", script], "env": ["PATH=/bin:/usr/bin", "HOOK=1"]})
}

fn host_hooks_run_in_order_and_are_told_the_state(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    let log = fixture.dir().join("hooks.log");
    let told = |name: &str| {
        let log = log.display();
        json!([hook(&format!(
            "read -r state; echo \"{name} $HOOK $state\" >> {log}"
        ))])
    };
    bundle.spec["hooks"] = json!({
        "prestart": told("prestart"),
        "createRuntime": told("createRuntime"),
        "poststart": told("poststart"),
        "poststop": told("poststop"),
    });
    bundle.spec["annotations"] = json!({"org.example.key": "value"});
    fixture.run(&bundle)?.success()?;
    let text = fs::read_to_string(&log)?;
    let mut seen = Vec::new();
    for line in text.lines() {
        let mut words = line.splitn(3, ' ');
        let name = words.next().unwrap_or_default();
        ensure_eq!(words.next(), Some("1"), "the environment of {name}");
        let state: Value = serde_json::from_str(words.next().unwrap_or_default())?;
        let status = state["status"].as_str().unwrap_or_default().to_owned();
        seen.push((name.to_owned(), status));
        ensure_eq!(state["id"], json!(fixture.id("run")), "id told to {name}");
        ensure_eq!(
            state["bundle"],
            json!(bundle.dir()),
            "bundle told to {name}"
        );
        ensure_eq!(
            state["annotations"]["org.example.key"],
            "value",
            "annotation told to {name}"
        );
        if name == "prestart" || name == "createRuntime" {
            ensure!(
                state["pid"].as_i64().is_some_and(|pid| pid > 1),
                "{name} is told no pid: {state}"
            );
        }
    }
    let names: Vec<_> = seen.iter().map(|(name, _)| name.as_str()).collect();
    ensure_eq!(
        names,
        ["prestart", "createRuntime", "poststart", "poststop"],
        "order"
    );
    let told: Vec<_> = seen.iter().map(|(_, status)| status.as_str()).collect();
    ensure_eq!(
        [told[0], told[1], told[3]],
        ["creating", "creating", "stopped"],
        "statuses"
    );
    Ok(())
}

/// A script for a createContainer hook that leaves a file in the root named by the bundle it is told.
///
/// With the shell's own words alone: where the hook runs there may be no other program.
const LEAVE_A_FILE: &str = r#"read -r state; bundle=${state#*\"bundle\":\"}; bundle=${bundle%%\"*}; text=;
    while read -r line || test -n "$line"; do text=$text$line; done < "$bundle/config.json";
    root=${text#*\"root\":}; root=${root#*\"path\":}; root=${root#*\"}; root=${root%%\"*};
    case $root in /*) ;; *) root=$bundle/$root ;; esac; echo "created" > "$root/made-by-hook""#;

fn create_container_hook_runs_before_the_root_is_entered(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["hooks"] = json!({"createContainer": [hook(LEAVE_A_FILE)]});
    bundle.args(&["/bin/cat", "/made-by-hook"]);
    ensure_eq!(
        fixture.run(&bundle)?.success()?.stdout,
        "created\n",
        "the file that the hook made"
    );
    Ok(())
}

fn start_container_hook_runs_inside_before_the_workload(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["hooks"] = json!({"startContainer": [
        {"path": "/bin/sh", "args": ["sh", "-c", "hostname > /tmp/made-by-hook"]}
    ]});
    bundle.spec["hostname"] = json!("inside");
    bundle.args(&["/bin/cat", "/tmp/made-by-hook"]);
    let id = fixture.id("start-hook");
    create(fixture, &bundle, &id)?;
    ensure!(
        !bundle.in_rootfs("tmp/made-by-hook").exists(),
        "the hook ran before start"
    );
    fixture.call(&["start", &id])?.success()?;
    fixture.wait_for_end(&id)?;
    ensure_eq!(
        fs::read_to_string(bundle.in_rootfs("tmp/made-by-hook"))?,
        "inside\n",
        "what the hook wrote"
    );
    Ok(())
}

fn failing_hook_before_start_fails_create(fixture: &Fixture) -> Claim {
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let mut bundle = fixture.bundle()?;
        bundle.spec["hooks"] = json!({kind: [hook("exit 9")]});
        bundle.args(&["/bin/echo", "ran"]);
        let outcome = fixture.run(&bundle)?;
        ensure!(
            outcome.code() != 0 && !outcome.stdout.contains("ran"),
            "{kind}: the workload ran"
        );
        ensure!(
            outcome.stderr.contains('9'),
            "{kind}: the exit code is not named: {:?}",
            outcome.stderr
        );
        let left = state_directories(&fixture.state_root());
        ensure!(left.is_empty(), "left after a failing {kind}: {left:?}");
    }
    Ok(())
}

fn hook_that_takes_too_long_is_killed(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    let mut slow = hook("exec sleep 1000");
    slow["timeout"] = json!(1);
    bundle.spec["hooks"] = json!({"createRuntime": [slow]});
    let outcome = fixture.run(&bundle)?;
    ensure!(outcome.code() != 0, "the hook's timeout was not noticed");
    ensure!(
        outcome.stderr.to_lowercase().contains("time"),
        "reason: {:?}",
        outcome.stderr
    );
    Ok(())
}

fn host_hooks_run_in_the_bundles_directory(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    let kinds = ["prestart", "createRuntime", "poststart", "poststop"];
    for kind in kinds {
        bundle.spec["hooks"][kind] = json!([hook(&format!("busybox touch made-by-{kind}"))]);
    }
    fixture.run(&bundle)?.success()?;
    for kind in kinds {
        let made = bundle.dir().join(format!("made-by-{kind}"));
        ensure!(made.exists(), "{kind} ran somewhere else");
    }
    Ok(())
}

fn start_container_hook_has_the_workloads_filter(fixture: &Fixture) -> Claim {
    for no_new_privileges in [true, false] {
        let mut bundle = fixture.bundle()?;
        bundle.spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        bundle.spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
        });
        bundle.spec["hooks"] = json!({"startContainer": [
            {"path": "/bin/mkdir", "args": ["mkdir", "/tmp/made-by-hook"]}
        ]});
        bundle.args(&["/bin/echo", "ran"]);
        let outcome = fixture.run(&bundle)?;
        let what = format!("noNewPrivileges {no_new_privileges}: {outcome:?}");
        ensure!(
            outcome.code() != 0 && !outcome.stdout.contains("ran"),
            "{what}"
        );
        let reason = "error running startContainer hook #0";
        ensure!(outcome.stderr.contains(reason), "{what}");
    }
    Ok(())
}
