//! `rt checkpoint` and `rt restore`: a container's processes as images, and back.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use integration::{Claim, Fixture, Model, ensure, ensure_eq};

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    (
        "a_restored_container_goes_on_where_it_was",
        a_restored_container_goes_on_where_it_was,
    ),
    (
        "a_failed_checkpoint_leaves_the_container_running",
        a_failed_checkpoint_leaves_the_container_running,
    ),
];

/// Why criu cannot work here, found by trying: its own check knows the kernel less well.
fn reason_not_to_run(dir: &Path) -> Option<String> {
    let images = dir.join("trial");
    fs::create_dir(&images).ok()?;
    let mut child = Command::new("setsid")
        .args(["sleep", "1000"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let dumped = Command::new("criu")
        .args(["dump", "--shell-job", "--log-file", "log", "--tree"])
        .arg(child.id().to_string())
        .arg("--images-dir")
        .arg(&images)
        .output();
    let _ = child.kill();
    let _ = child.wait();
    match dumped {
        Err(error) => Some(format!("criu cannot be executed: {error}")),
        Ok(output) if !output.status.success() => {
            let log = fs::read_to_string(images.join("log")).unwrap_or_default();
            let reason = log.lines().find(|line| line.contains("Error"));
            Some(format!(
                "criu cannot write down a process on this kernel: {}",
                reason.unwrap_or("it does not say why")
            ))
        }
        Ok(_) => None,
    }
}

/// A container that counts in a file, with no stream that leads out of it.
fn counting(
    fixture: &Fixture,
    id: &str,
) -> Result<integration::Bundle, Box<dyn std::error::Error + Send + Sync>> {
    let mut bundle = fixture.bundle()?;
    // Written down and restored rule by rule, an own network takes long.
    if let Some(namespaces) = bundle.spec["linux"]["namespaces"].as_array_mut() {
        namespaces.retain(|namespace| namespace["type"] != "network");
    }
    bundle.script(
        "echo start >> /tmp/starts; n=0; while true; do n=$((n+1)); echo $n > /tmp/new; mv /tmp/new /tmp/n; sleep 0.1; done",
    );
    bundle.save()?;
    let mut run = fixture.rt(&["run", "--detach", "--bundle"]);
    run.arg(bundle.dir()).arg(id);
    let status = run.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "run: {status}");
    Ok(bundle)
}

/// The count, when it is more than `known`.
fn count_above(
    bundle: &integration::Bundle,
    known: u64,
) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
    // A file has no event to wait for.
    for _ in 0..600 {
        let text = fs::read_to_string(bundle.in_rootfs("tmp/n")).unwrap_or_default();
        match text.trim().parse() {
            Ok(count) if count > known => return Ok(count),
            _ => sleep(Duration::from_millis(50)),
        }
    }
    Err(format!("the container does not count on from {known}").into())
}

fn a_restored_container_goes_on_where_it_was(fixture: &Fixture) -> Claim {
    let id = fixture.id("checkpoint");
    let images = fixture.dir().join("images");
    let images = images.to_str().ok_or("a path that is not UTF-8")?;
    if fixture.model() == Model::Microvm {
        let mut bundle = fixture.bundle()?;
        bundle.script("while true; do sleep 1; done");
        fixture.start_detached(&bundle, &id)?;
        let refused = fixture.call(&["checkpoint", "--image-path", images, &id])?;
        ensure!(
            refused.code() == 1 && refused.stderr.contains("microvm model cannot checkpoint"),
            "{refused:?}"
        );
        ensure_eq!(fixture.status(&id)?, "running", "status");
        return Ok(());
    }
    if let Some(reason) = reason_not_to_run(fixture.dir()) {
        println!("skipped: {reason}");
        return Ok(());
    }
    let bundle = counting(fixture, &id)?;
    let before = count_above(&bundle, 3)?;
    fixture
        .call(&["checkpoint", &id, "--image-path", images, "--leave-running"])?
        .success()?;
    ensure_eq!(fixture.status(&id)?, "running", "status");
    let running = count_above(&bundle, before)?;

    let last = fixture.dir().join("last");
    let last = last.to_str().ok_or("a path that is not UTF-8")?;
    fixture
        .call(&["checkpoint", "--image-path", last, &id])?
        .success()?;
    ensure_eq!(
        fixture.call(&["state", &id])?.code(),
        1,
        "exit code of state after the checkpoint"
    );
    let stopped = count_above(&bundle, running)?;

    let pid_file = fixture.dir().join("pid");
    let mut restore = fixture.rt(&["restore", "--detach", "--image-path", last, "--bundle"]);
    restore.arg(bundle.dir()).arg("--pid-file").arg(&pid_file);
    let output = fixture.complete(
        {
            restore.arg(&id);
            restore
        },
        Vec::new(),
    )?;
    output.success()?;
    let state = fixture.state(&id)?;
    ensure_eq!(state["status"], "running", "status after the restore");
    let pid: i64 = fs::read_to_string(&pid_file)?.parse()?;
    ensure_eq!(state["pid"].as_i64(), Some(pid), "pid after the restore");
    count_above(&bundle, stopped)?;
    let starts = fs::read_to_string(bundle.in_rootfs("tmp/starts"))?;
    ensure_eq!(starts, "start\n", "what the program wrote when it began");
    let shown = fixture.call(&["exec", &id, "/bin/sh", "-c", "echo $$ > /dev/null; echo in"])?;
    ensure_eq!(shown.success()?.stdout, "in\n", "output of exec");
    fixture.call(&["kill", &id, "KILL"])?.success()?;
    fixture.wait_for_end(&id)?;
    fixture.call(&["delete", &id])?.success()?;
    Ok(())
}

fn a_failed_checkpoint_leaves_the_container_running(fixture: &Fixture) -> Claim {
    let id = fixture.id("no-checkpoint");
    let mut bundle = fixture.bundle()?;
    bundle.script("while true; do sleep 1; done");
    fixture.start_detached(&bundle, &id)?;
    // The images' directory cannot be made.
    let refused = fixture.call(&["checkpoint", "--image-path", "/proc/images", &id])?;
    ensure!(refused.code() == 1, "{refused:?}");
    ensure_eq!(fixture.status(&id)?, "running", "status");
    let mut restore = fixture.rt(&["restore", "--image-path", "/nonexistent", "--bundle"]);
    let id = fixture.id("no-restore");
    restore.arg(bundle.dir()).arg(&id);
    let refused = fixture.complete(restore, Vec::new())?;
    ensure!(refused.code() == 1, "{refused:?}");
    ensure_eq!(
        fixture.call(&["state", &id])?.code(),
        1,
        "exit code of state"
    );
    Ok(())
}
