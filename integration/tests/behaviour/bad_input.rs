//! Bad input: an error that names what is wrong, the exit code of runc, nothing left.

use std::fs;
use std::process::Output;

use integration::snapshot::state_directories;
use integration::{Bundle, Claim, Fixture, ensure, ensure_eq};
use serde_json::json;

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    ("missing_config_is_named", missing_config_is_named),
    ("broken_json_is_located", broken_json_is_located),
    (
        "wrong_type_is_named_by_its_path",
        wrong_type_is_named_by_its_path,
    ),
    ("missing_rootfs_is_named", missing_rootfs_is_named),
    ("unknown_version_is_refused", unknown_version_is_refused),
    (
        "newer_minor_version_is_accepted",
        newer_minor_version_is_accepted,
    ),
    ("bad_ids_are_refused", bad_ids_are_refused),
    (
        "missing_volume_source_is_named",
        missing_volume_source_is_named,
    ),
    (
        "unknown_container_is_an_error_of_each_command",
        unknown_container_is_an_error_of_each_command,
    ),
    (
        "unknown_seccomp_action_is_named",
        unknown_seccomp_action_is_named,
    ),
    (
        "errors_are_written_to_the_log_as_json",
        errors_are_written_to_the_log_as_json,
    ),
];

fn refused(fixture: &Fixture, bundle: &Bundle, id: &str, named: &[&str]) -> Claim {
    let mut command = fixture.rt(&["run", "--bundle"]);
    let output = command.arg(bundle.dir()).arg(id).output()?;
    check_refusal(fixture, &output, named)
}

fn check_refusal(fixture: &Fixture, output: &Output, named: &[&str]) -> Claim {
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure_eq!(
        output.status.code(),
        Some(1),
        "exit code; stderr {stderr:?}"
    );
    for word in named {
        ensure!(stderr.contains(word), "{word:?} is not named: {stderr:?}");
    }
    ensure!(!stderr.contains("panicked"), "a panic: {stderr:?}");
    let left = state_directories(&fixture.state_root());
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

fn missing_config_is_named(fixture: &Fixture) -> Claim {
    let bundle = fixture.bundle()?;
    fs::remove_file(bundle.dir().join("config.json"))?;
    refused(fixture, &bundle, "bad", &["config.json", "not found"])
}

fn broken_json_is_located(fixture: &Fixture) -> Claim {
    let bundle = fixture.bundle()?;
    fs::write(
        bundle.dir().join("config.json"),
        "{\n  \"ociVersion\": \"1.0.2\",\n  \"process\": {,\n}",
    )?;
    refused(fixture, &bundle, "bad", &["config.json", "line 3"])
}

fn wrong_type_is_named_by_its_path(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["args"] = json!("true");
    bundle.save()?;
    refused(fixture, &bundle, "bad", &["config.json", "process.args"])?;
    bundle.args(&["true"]);
    bundle.spec["linux"]["resources"]["pids"] = json!({"limit": "many"});
    bundle.save()?;
    refused(
        fixture,
        &bundle,
        "bad",
        &["config.json", "linux.resources.pids.limit"],
    )
}

fn missing_rootfs_is_named(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["root"]["path"] = json!("no-such-root");
    bundle.save()?;
    refused(fixture, &bundle, "bad", &["no-such-root", "root.path"])
}

fn unknown_version_is_refused(fixture: &Fixture) -> Claim {
    for version in ["2.0.0", "0.9", "nonsense", ""] {
        let mut bundle = fixture.bundle()?;
        bundle.spec["ociVersion"] = json!(version);
        bundle.save()?;
        refused(fixture, &bundle, "bad", &["ociVersion"])?;
    }
    Ok(())
}

fn newer_minor_version_is_accepted(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["ociVersion"] = json!("1.99.0+dev");
    bundle.spec["aFieldOfTheFuture"] = json!({"any": "thing"});
    fixture.run(&bundle)?.success()?;
    Ok(())
}

fn bad_ids_are_refused(fixture: &Fixture) -> Claim {
    let bundle = fixture.bundle()?;
    bundle.save()?;
    let long = "x".repeat(1025);
    for id in [
        "a/b",
        "../up",
        ".",
        "..",
        "with space",
        "new\nline",
        long.as_str(),
        "",
    ] {
        let mut command = fixture.rt(&["run", "--bundle"]);
        let output = command.arg(bundle.dir()).arg("--").arg(id).output()?;
        check_refusal(fixture, &output, &["id"])?;
    }
    Ok(())
}

fn missing_volume_source_is_named(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.bind(&fixture.dir().join("no-such-volume"), "/data", &["rw"]);
    bundle.save()?;
    refused(fixture, &bundle, "bad", &["no-such-volume"])
}

fn unknown_container_is_an_error_of_each_command(fixture: &Fixture) -> Claim {
    for args in [
        &["start", "nobody"][..],
        &["state", "nobody"],
        &["kill", "nobody", "TERM"],
        &["delete", "nobody"],
        &["exec", "nobody", "true"],
        &["ps", "nobody"],
        &["pause", "nobody"],
    ] {
        let outcome = fixture.call(args)?;
        // As runc's: exec keeps its own failures apart from the process's exit codes.
        let expected = if args[0] == "exec" { 255 } else { 1 };
        ensure_eq!(outcome.code(), expected, "exit code of {args:?}");
        ensure!(
            outcome.stderr.contains("nobody"),
            "{args:?}: {:?}",
            outcome.stderr
        );
        ensure!(
            outcome.stderr.contains("does not exist"),
            "{args:?}: {:?}",
            outcome.stderr
        );
    }
    Ok(())
}

fn unknown_seccomp_action_is_named(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_NONSENSE"});
    bundle.save()?;
    refused(fixture, &bundle, "bad", &["linux.seccomp.defaultAction"])
}

fn errors_are_written_to_the_log_as_json(fixture: &Fixture) -> Claim {
    let bundle = fixture.bundle()?;
    fs::remove_file(bundle.dir().join("config.json"))?;
    let log = fixture.dir().join("log.json");
    let mut command = fixture.rt::<&str>(&[]);
    command
        .arg("--log")
        .arg(&log)
        .args(["--log-format", "json", "run", "--bundle"])
        .arg(bundle.dir())
        .arg("bad");
    ensure_eq!(command.output()?.status.code(), Some(1), "exit code");
    let text = fs::read_to_string(&log)?;
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap_or_default())?;
    ensure_eq!(last["level"], "error", "level");
    ensure!(
        last["msg"]
            .as_str()
            .is_some_and(|text| text.contains("config.json")),
        "{last}"
    );
    ensure!(last["time"].is_string(), "{last}");
    Ok(())
}
