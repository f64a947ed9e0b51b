//! `rt checkpoint` and `rt restore`: a container's processes as images, and back.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use integration::{Claim, Fixture, Model, Pseudoterminal, ensure, ensure_eq, wait_with_limit};

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
    (
        "a_restored_workload_goes_on_by_its_new_streams",
        a_restored_workload_goes_on_by_its_new_streams,
    ),
    (
        "a_restored_workload_has_a_terminal_or_is_refused",
        a_restored_workload_has_a_terminal_or_is_refused,
    ),
    (
        "images_that_do_not_fit_are_refused_by_name",
        images_that_do_not_fit_are_refused_by_name,
    ),
];

/// Why criu, which the container model needs, cannot work here, found by trying: its own check knows the kernel less well.
fn reason_not_to_run(fixture: &Fixture) -> Option<String> {
    if fixture.model() == Model::Microvm {
        return None;
    }
    let images = fixture.dir().join("trial");
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
    if fixture.model() == Model::Container {
        // Written down and restored rule by rule, an own network takes long.
        bundle.without_namespace("network");
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
    if let Some(reason) = reason_not_to_run(fixture) {
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
    restore.arg(&id);
    // A microVM's workload has the streams of who restores it, which would not end.
    restore.stdout(Stdio::null()).stderr(Stdio::null());
    let status = wait_with_limit(&mut restore.spawn()?, Duration::from_secs(120))?;
    ensure!(status.success(), "restore: {status}");
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

fn a_restored_workload_goes_on_by_its_new_streams(fixture: &Fixture) -> Claim {
    if let Some(reason) = reason_not_to_run(fixture) {
        println!("skipped: {reason}");
        return Ok(());
    }
    let id = fixture.id("streams");
    let mut bundle = fixture.bundle()?;
    if fixture.model() == Model::Container {
        bundle.without_namespace("network");
    }
    bundle.script("echo ready; read a; echo \"first $a\"; read a; echo \"then $a\"; exit 3");
    bundle.save()?;
    let mut run = fixture.rt(&["run", "--bundle"]);
    run.arg(bundle.dir()).arg(&id);
    run.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut run = run.spawn()?;
    let mut stdin = run.stdin.take().ok_or("no stdin")?;
    let mut stdout = BufReader::new(run.stdout.take().ok_or("no stdout")?);
    let mut line = String::new();
    stdout.read_line(&mut line)?;
    stdin.write_all(b"one\n")?;
    stdout.read_line(&mut line)?;
    ensure_eq!(line, "ready\nfirst one\n", "output before the checkpoint");
    let images = fixture.dir().join("images");
    let mut checkpoint = fixture.rt(&["checkpoint", "--image-path"]);
    checkpoint.arg(&images).arg(&id);
    fixture.complete(checkpoint, Vec::new())?.success()?;
    let mut rest = String::new();
    stdout.read_to_string(&mut rest)?;
    ensure_eq!(rest, "", "output after the checkpoint");
    let ended = wait_with_limit(&mut run, Duration::from_secs(60))?;
    ensure_eq!(
        ended.code(),
        Some(137),
        "exit code of what was written down"
    );

    let mut restore = fixture.rt(&["restore", "--image-path"]);
    restore
        .arg(&images)
        .arg("--bundle")
        .arg(bundle.dir())
        .arg(&id);
    let restored = fixture.complete(restore, b"two\n".to_vec())?;
    restored.expect("the restored workload", "then two\n", "", 3)
}

fn a_restored_workload_has_a_terminal_or_is_refused(fixture: &Fixture) -> Claim {
    let id = fixture.id("terminal");
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["terminal"] = true.into();
    bundle.script("echo ready; read a; echo \"first $a\"; read a; echo \"then $a\"; exit 3");
    bundle.save()?;
    let images = fixture.dir().join("images");
    let on_terminal = |arguments: &[&str]| -> io::Result<(Pseudoterminal, Child)> {
        let (terminal, other) = Pseudoterminal::open(24, 80)?;
        let mut command = fixture.rt(arguments);
        command.arg("--bundle").arg(bundle.dir()).arg(&id);
        command
            .stdin(other.try_clone()?)
            .stdout(other.try_clone()?)
            .stderr(other);
        Ok((terminal, command.spawn()?))
    };
    let limit = Duration::from_secs(60);
    let (mut terminal, mut run) = on_terminal(&["run"])?;
    terminal.read_until("ready", limit);
    terminal.type_text("one\n")?;
    let shown = terminal.read_until("first one", limit);
    ensure!(shown.contains("first one"), "{shown}");
    let mut checkpoint = fixture.rt(&["checkpoint", "--image-path"]);
    checkpoint.arg(&images).arg(&id);
    let written = fixture.complete(checkpoint, Vec::new())?;
    if fixture.model() == Model::Container {
        ensure!(
            written.code() == 1 && written.stderr.contains("terminal"),
            "{written:?}"
        );
        terminal.type_text("two\n")?;
        let shown = terminal.read_until("then two", limit);
        ensure!(shown.contains("then two"), "{shown}");
        return Ok(());
    }
    written.success()?;
    wait_with_limit(&mut run, limit)?;
    let path = images.to_str().ok_or("a path that is not UTF-8")?;
    let (mut terminal, mut restored) = on_terminal(&["restore", "--image-path", path])?;
    terminal.type_text("two\n")?;
    let shown = terminal.read_until("then two", limit);
    ensure!(
        shown.contains("then two") && !shown.contains("ready"),
        "{shown}"
    );
    let ended = wait_with_limit(&mut restored, limit)?;
    ensure_eq!(ended.code(), Some(3), "exit code of the restored workload");
    Ok(())
}

fn images_that_do_not_fit_are_refused_by_name(fixture: &Fixture) -> Claim {
    if fixture.model() == Model::Container {
        println!("skipped: what criu refuses is criu's");
        return Ok(());
    }
    let id = fixture.id("images");
    let mut bundle = fixture.bundle()?;
    // Opening a pipe waits for its other end: each is a point that the
    // workload and an exec pass together.
    bundle.script(
        "exec 3> /tmp/open; rm /tmp/open; : > /tmp/opened; \
         : < /tmp/close; exec 3>&-; : > /tmp/closed; while true; do sleep 1; done",
    );
    let pipes = ["opened", "close", "closed"].map(|name| bundle.in_rootfs(&format!("tmp/{name}")));
    let made = Command::new("mkfifo").args(&pipes).status()?;
    ensure!(made.success(), "mkfifo: {made}");
    fixture.start_detached(&bundle, &id)?;
    let passes = |points: &str| -> Claim {
        fixture
            .call(&["exec", &id, "/bin/sh", "-c", points])?
            .success()?;
        Ok(())
    };
    passes(": < /tmp/opened")?;
    let images = fixture.dir().join("images");
    let checkpoint = || {
        let mut checkpoint = fixture.rt(&["checkpoint", "--image-path"]);
        checkpoint.arg(&images).arg(&id);
        fixture.complete(checkpoint, Vec::new())
    };
    let refused = checkpoint()?;
    let nameless = "/tmp/open is open in the guest and has no name any more";
    ensure!(
        refused.code() == 1 && refused.stderr.contains(nameless),
        "{refused:?}"
    );
    ensure_eq!(fs::read_dir(&images)?.count(), 0, "files of no checkpoint");
    ensure_eq!(fixture.status(&id)?, "running", "status");
    passes(": > /tmp/close; : < /tmp/closed")?;
    checkpoint()?.success()?;

    let refused = |id: &str, bundle: &integration::Bundle, reason: &str| -> Claim {
        let mut restore = fixture.rt(&["restore", "--detach", "--image-path"]);
        restore.arg(&images).arg("--bundle").arg(bundle.dir());
        restore.arg(id);
        let refused = fixture.complete(restore, Vec::new())?;
        ensure!(
            refused.code() == 1 && refused.stderr.contains(reason),
            "{reason}: {refused:?}"
        );
        let left = fixture.call(&["state", id])?;
        ensure_eq!(
            left.code(),
            1,
            "exit code of state after a restore that failed"
        );
        Ok(())
    };
    let other = fixture.id("other");
    refused(&other, &bundle, "restore it under this id")?;
    fs::set_permissions(&images, fs::Permissions::from_mode(0o777))?;
    refused(&id, &bundle, "could be written by others than root")?;
    fs::set_permissions(&images, fs::Permissions::from_mode(0o700))?;
    let volume = fixture.dir().join("volume");
    fs::create_dir(&volume)?;
    let as_it_was = bundle.spec.clone();
    bundle.bind(&volume, "/mnt/more", &["bind"]).save()?;
    refused(&id, &bundle, "made with another number of volumes")?;
    bundle.spec = as_it_was;
    bundle.save()?;
    for (file, from, to, reason) in [
        (
            "checkpoint.json",
            "\"format\":1",
            "\"format\":9",
            "checkpoint.json has format 9",
        ),
        (
            "checkpoint.json",
            "\"host\":\"",
            "\"host\":\"other ",
            "another kernel or processor",
        ),
        (
            "checkpoint.json",
            "{",
            "",
            "is not the description of a microVM's checkpoint",
        ),
        (
            "machine.json",
            "\"format\":2",
            "\"format\":9",
            "machine.json has format 9",
        ),
        (
            "machine.json",
            "\"clock\"",
            "\"clack\"",
            "is not the state of a machine",
        ),
    ] {
        let path = images.join(file);
        let text = fs::read_to_string(&path)?;
        ensure!(text.contains(from), "{from}: {text}");
        fs::write(&path, text.replacen(from, to, 1))?;
        refused(&id, &bundle, reason)?;
        fs::write(&path, text)?;
    }
    let memory = File::options().write(true).open(images.join("memory"))?;
    memory.set_len(4096)?;
    refused(&id, &bundle, "memory has 4096 bytes in place of")?;
    fs::remove_file(images.join("checkpoint.json"))?;
    refused(&id, &bundle, "checkpoint.json: No such file")
}
