//! `rt exec`: further processes in a running container.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::process::Stdio;

use integration::{Claim, Fixture, ensure, ensure_eq};
use serde_json::json;

use crate::Entry;
use crate::terminal::receive_descriptor;

pub const CLAIMS: &[Entry] = &[
    ("exec_returns_the_exit_code", exec_returns_the_exit_code),
    ("exec_has_its_own_stdio", exec_has_its_own_stdio),
    (
        "exec_takes_environment_directory_and_user",
        exec_takes_environment_directory_and_user,
    ),
    ("exec_takes_a_process_file", exec_takes_a_process_file),
    ("exec_is_inside_the_container", exec_is_inside_the_container),
    (
        "exec_death_by_signal_is_128_plus_n",
        exec_death_by_signal_is_128_plus_n,
    ),
    (
        "exec_detached_writes_its_pid_file",
        exec_detached_writes_its_pid_file,
    ),
    (
        "exec_of_a_missing_program_is_an_error",
        exec_of_a_missing_program_is_an_error,
    ),
    (
        "exec_in_a_stopped_container_is_refused",
        exec_in_a_stopped_container_is_refused,
    ),
    ("many_execs_at_once", many_execs_at_once),
    (
        "exec_environment_wins_over_the_bundles",
        exec_environment_wins_over_the_bundles,
    ),
    ("exec_sends_a_pidfd", exec_sends_a_pidfd),
];

type Running = Result<String, Box<dyn std::error::Error + Send + Sync>>;

fn running(fixture: &Fixture) -> Running {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["env"] = json!(["PATH=/bin", "FROM=bundle"]);
    bundle.spec["hostname"] = json!("exec-host");
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("exec");
    fixture.start_detached(&bundle, &id)?;
    Ok(id)
}

fn exec_returns_the_exit_code(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    for code in [0, 3, 255] {
        let outcome = fixture.call(&["exec", &id, "/bin/sh", "-c", &format!("exit {code}")])?;
        ensure_eq!(
            outcome.status.code(),
            Some(code),
            "exit code; {:?}",
            outcome.stderr
        );
    }
    Ok(())
}

fn exec_has_its_own_stdio(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    let outcome = fixture.call_with_input(
        &["exec", &id, "/bin/sh", "-c", "cat; echo err >&2"],
        b"input".to_vec(),
    )?;
    ensure_eq!(outcome.stdout, "input", "stdout");
    ensure_eq!(outcome.stderr, "err\n", "stderr");
    let input: Vec<u8> = (0..3_u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let outcome = fixture
        .call_with_input(&["exec", &id, "/bin/cat"], input.clone())?
        .success()?;
    ensure!(
        outcome.raw_stdout == input,
        "{} bytes came back, not those sent",
        outcome.raw_stdout.len()
    );
    Ok(())
}

fn exec_takes_environment_directory_and_user(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    let script = "echo $FROM $EXTRA; pwd; id -u; id -g; id -G";
    let args = [
        "exec",
        "--env",
        "EXTRA=here",
        "--cwd",
        "/var",
        "--user",
        "1000:1001",
        "--additional-gids",
        "7",
        &id,
        "/bin/sh",
        "-c",
        script,
    ];
    let outcome = fixture.call(&args)?.success()?;
    ensure_eq!(
        outcome.stdout,
        "bundle here\n/var\n1000\n1001\n1001 7\n",
        "environment, directory, user"
    );
    Ok(())
}

fn exec_takes_a_process_file(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    let file = fixture.dir().join("process.json");
    let process = json!({
        "terminal": false, "cwd": "/tmp", "user": {"uid": 1000, "gid": 1000},
        "env": ["PATH=/bin", "ONLY=this"], "args": ["sh", "-c", "echo $ONLY $FROM; pwd; id -u; grep ^CapEff /proc/self/status; cat /proc/self/oom_score_adj"],
        "oomScoreAdj": 321,
    });
    fs::write(&file, process.to_string())?;
    let mut command = fixture.rt(&["exec", "--process"]);
    let output = command.arg(&file).arg(&id).output()?;
    let expected = "this\n/tmp\n1000\nCapEff:\t0000000000000000\n321\n";
    ensure_eq!(
        String::from_utf8_lossy(&output.stdout),
        expected,
        "output; {output:?}"
    );
    Ok(())
}

fn exec_is_inside_the_container(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    let script = "hostname; for process in 1 self; do for kind in mnt pid net ipc uts; do \
                  readlink /proc/$process/ns/$kind; done; done; \
                  for process in 1 self; do grep ^Seccomp: /proc/$process/status | cut -f2; done";
    let outcome = fixture
        .call(&["exec", &id, "/bin/sh", "-c", script])?
        .success()?;
    let lines: Vec<_> = outcome.stdout.lines().collect();
    ensure_eq!(lines.len(), 13, "lines: {lines:?}");
    ensure_eq!(lines[0], "exec-host", "hostname");
    ensure_eq!(lines[1..6], lines[6..11], "namespaces of exec and of init");
    ensure_eq!(lines[11], lines[12], "seccomp mode of exec and of init");
    Ok(())
}

fn exec_death_by_signal_is_128_plus_n(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    let outcome = fixture.call(&["exec", &id, "/bin/sh", "-c", "kill -9 $$"])?;
    ensure_eq!(
        outcome.status.code(),
        Some(137),
        "exit code; {:?}",
        outcome.stderr
    );
    Ok(())
}

fn exec_detached_writes_its_pid_file(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    let file = fixture.dir().join("exec.pid");
    let mut command = fixture.rt(&["exec", "--detach", "--pid-file"]);
    command
        .arg(&file)
        .args([&id, "/bin/sh", "-c", "echo ran > /tmp/ran; exec sleep 1000"]);
    let status = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    ensure!(status.success(), "exec --detach: {status}");
    let pid: i32 = fs::read_to_string(&file)?.parse()?;
    ensure!(fs::exists(format!("/proc/{pid}"))?, "no process {pid}");
    let seen = fixture.call(&[
        "exec",
        &id,
        "/bin/sh",
        "-c",
        "until test -s /tmp/ran; do sleep 0.1; done; cat /tmp/ran",
    ])?;
    ensure_eq!(
        seen.success()?.stdout,
        "ran\n",
        "what the detached process wrote"
    );
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGTERM,
    )?;
    let script = "until ! ps | grep -q '[s]leep 1000'; do sleep 0.1; done";
    fixture
        .call(&["exec", &id, "/bin/sh", "-c", script])?
        .success()?;
    Ok(())
}

fn exec_of_a_missing_program_is_an_error(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    let outcome = fixture.call(&["exec", &id, "no-such-program"])?;
    ensure!(outcome.code() != 0, "a missing program was run");
    ensure!(
        outcome.stderr.contains("no-such-program"),
        "the program is not named: {:?}",
        outcome.stderr
    );
    ensure_eq!(fixture.status(&id)?, "running", "status afterwards");
    Ok(())
}

fn exec_in_a_stopped_container_is_refused(fixture: &Fixture) -> Claim {
    let bundle = fixture.bundle()?;
    let id = fixture.id("stopped");
    fixture.start_detached(&bundle, &id)?;
    fixture.wait_for_end(&id)?;
    let outcome = fixture.call(&["exec", &id, "/bin/true"])?;
    ensure!(
        outcome.code() != 0 && outcome.stderr.contains("not running"),
        "{outcome:?}"
    );
    Ok(())
}

fn many_execs_at_once(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    let mut children = Vec::new();
    for number in 0..12 {
        let script = format!("cat; echo {number}; exit {number}");
        let mut command = fixture.rt(&["exec", &id, "/bin/sh", "-c", &script]);
        children.push(
            command
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()?,
        );
    }
    for (number, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output()?;
        ensure_eq!(
            output.status.code(),
            Some(i32::try_from(number)?),
            "exit code; {output:?}"
        );
        ensure_eq!(
            String::from_utf8_lossy(&output.stdout),
            format!("{number}\n"),
            "stdout"
        );
    }
    Ok(())
}

fn exec_environment_wins_over_the_bundles(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    let args = ["exec", "--env", "FROM=exec", &id, "/bin/env"];
    let outcome = fixture.call(&args)?.success()?;
    let given = outcome.stdout.lines();
    let given: Vec<_> = given.filter(|line| line.starts_with("FROM=")).collect();
    ensure_eq!(given, ["FROM=exec"], "the variable that both give");
    Ok(())
}

fn exec_sends_a_pidfd(fixture: &Fixture) -> Claim {
    let id = running(fixture)?;
    let (socket, file) = (fixture.dir().join("pidfd.sock"), fixture.dir().join("pid"));
    let listener = UnixListener::bind(&socket)?;
    let mut command = fixture.rt(&["exec", "--detach", "--pidfd-socket"]);
    command.arg(&socket).arg("--pid-file").arg(&file);
    let status = command.args([&id, "/bin/sleep", "1000"]).status()?;
    ensure!(status.success(), "exec: {status}");
    let written = fs::read_to_string(&file)?;
    let pid = pid_of_received(&listener)?;
    ensure_eq!(pid, written.trim(), "the process of the descriptor");
    Ok(())
}

/// The pid of the process whose descriptor comes with a message at a socket.
pub fn pid_of_received(
    listener: &UnixListener,
) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
    let pidfd = receive_descriptor(listener)?;
    let about = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let pid = about.lines().find_map(|line| line.strip_prefix("Pid:"));
    Ok(pid.ok_or("a descriptor of no process")?.trim().to_owned())
}
