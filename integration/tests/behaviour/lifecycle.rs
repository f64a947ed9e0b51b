//! create, start, state, kill, delete, list, ps: each step and what it refuses.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use integration::{Bundle, Claim, Fixture, Model, copy_program, ensure, ensure_eq, finish};
use serde_json::{Value, json};

use crate::Entry;
use crate::exec::pid_of_received;

pub const CLAIMS: &[Entry] = &[
    ("state_is_told_at_each_step", state_is_told_at_each_step),
    ("workload_waits_for_start", workload_waits_for_start),
    (
        "the_bundle_can_choose_its_model",
        the_bundle_can_choose_its_model,
    ),
    ("kill_sends_any_signal", kill_sends_any_signal),
    (
        "running_container_is_not_deleted_without_force",
        running_container_is_not_deleted_without_force,
    ),
    ("start_is_refused_twice", start_is_refused_twice),
    ("create_sends_a_pidfd", create_sends_a_pidfd),
    (
        "stopped_container_is_not_killed",
        stopped_container_is_not_killed,
    ),
    ("duplicate_id_is_refused", duplicate_id_is_refused),
    ("pid_file_names_the_process", pid_file_names_the_process),
    ("list_shows_the_container", list_shows_the_container),
    ("ps_shows_the_workload", ps_shows_the_workload),
    ("options_may_follow_the_id", options_may_follow_the_id),
    (
        "bundle_alone_runs_with_a_made_up_id",
        bundle_alone_runs_with_a_made_up_id,
    ),
    (
        "killed_process_is_seen_as_stopped",
        killed_process_is_seen_as_stopped,
    ),
    (
        "pause_freezes_and_resume_goes_on",
        pause_freezes_and_resume_goes_on,
    ),
    (
        "spec_makes_a_bundle_that_loads",
        spec_makes_a_bundle_that_loads,
    ),
    (
        "features_is_json_with_the_spec_versions",
        features_is_json_with_the_spec_versions,
    ),
    (
        "killing_ends_all_processes_also_without_a_pid_namespace",
        killing_ends_all_processes_also_without_a_pid_namespace,
    ),
    (
        "container_that_waits_for_its_start_ends_when_asked",
        container_that_waits_for_its_start_ends_when_asked,
    ),
];

/// Creates a container whose stdio goes to the log file of its id.
pub fn create(fixture: &Fixture, bundle: &Bundle, id: &str) -> Claim {
    bundle.save()?;
    let log = fs::File::create(fixture.dir().join(format!("{id}.log")))?;
    let mut command = fixture.rt(&["create", "--bundle"]);
    let status = command
        .arg(bundle.dir())
        .arg(id)
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()?;
    ensure!(status.success(), "create: {status}: {}", fixture.log_of(id));
    Ok(())
}

const WAIT_FOR_TERM: &str = "trap 'echo bye; exit 5' TERM; echo up; while true; do sleep 1; done";

/// Waits until a text is in the log of [`Fixture::start_detached`] or [`create`].
pub fn wait_for_log(fixture: &Fixture, id: &str, text: &str) -> Claim {
    // The log is a file, which has no event of its own to wait for.
    for _ in 0..600 {
        if fixture.log_of(id).contains(text) {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    Err(format!("{text:?} is not in the log: {:?}", fixture.log_of(id)).into())
}

fn state_is_told_at_each_step(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["annotations"] = json!({"org.example.key": "value"});
    bundle.script(WAIT_FOR_TERM);
    let id = fixture.id("steps");
    create(fixture, &bundle, &id)?;
    let state = fixture.state(&id)?;
    ensure_eq!(state["status"], "created", "status after create");
    ensure_eq!(state["id"], json!(id), "id");
    ensure_eq!(state["bundle"], json!(bundle.dir()), "bundle");
    ensure_eq!(
        state["annotations"]["org.example.key"],
        "value",
        "annotation"
    );
    ensure!(
        state["ociVersion"]
            .as_str()
            .is_some_and(|version| version.starts_with("1.")),
        "{state}"
    );
    let pid = state["pid"].as_i64().unwrap_or(0);
    ensure!(fs::exists(format!("/proc/{pid}"))?, "no process {pid}");
    fixture.call(&["start", &id])?.success()?;
    ensure_eq!(fixture.status(&id)?, "running", "status after start");
    ensure_eq!(
        fixture.state(&id)?["pid"].as_i64(),
        Some(pid),
        "pid after start"
    );
    wait_for_log(fixture, &id, "up")?;
    fixture.call(&["kill", &id, "TERM"])?.success()?;
    wait_for_log(fixture, &id, "bye")?;
    fixture.wait_for_end(&id)?;
    let state = fixture.state(&id)?;
    ensure_eq!(state["status"], "stopped", "status after the end");
    ensure_eq!(state["pid"].as_i64().unwrap_or(0), 0, "pid after the end");
    fixture.call(&["delete", &id])?.success()?;
    let gone = fixture.call(&["state", &id])?;
    ensure_eq!(gone.code(), 1, "exit code of state after delete");
    ensure!(
        gone.stderr.contains("does not exist"),
        "reason: {:?}",
        gone.stderr
    );
    Ok(())
}

fn the_bundle_can_choose_its_model(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["annotations"]["dev.rt.isolation"] = json!(fixture.model().name());
    bundle.args(&["/bin/uname", "-r"]);
    bundle.save()?;
    // Nothing on the command line says it.
    let mut run = Command::new(fixture.binary());
    run.arg("--root").arg(fixture.state_root());
    run.args(["run", "--bundle"])
        .arg(bundle.dir())
        .arg(fixture.id("chosen"));
    let kernel = finish(&mut run, None)?.success()?.stdout;
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure_eq!(
        kernel == host,
        fixture.model() == Model::Container,
        "kernel {kernel}"
    );
    Ok(())
}

fn workload_waits_for_start(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("echo started > /tmp/started");
    let id = fixture.id("waits");
    create(fixture, &bundle, &id)?;
    ensure!(
        !bundle.in_rootfs("tmp/started").exists(),
        "the workload ran before start"
    );
    fixture.call(&["start", &id])?.success()?;
    fixture.wait_for_end(&id)?;
    ensure!(
        bundle.in_rootfs("tmp/started").exists(),
        "the workload did not run"
    );
    Ok(())
}

fn kill_sends_any_signal(fixture: &Fixture) -> Claim {
    for signal in ["SIGUSR1", "usr1", "10"] {
        let mut bundle = fixture.bundle()?;
        bundle.script("trap 'echo got; exit 0' USR1; echo up; while true; do sleep 1; done");
        let id = fixture.id(&format!("kill-{}", signal.to_lowercase()));
        fixture.start_detached(&bundle, &id)?;
        wait_for_log(fixture, &id, "up")?;
        fixture.call(&["kill", &id, signal])?.success()?;
        fixture.wait_for_end(&id)?;
        wait_for_log(fixture, &id, "got")?;
    }
    let mut bundle = fixture.bundle()?;
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("kill-kill");
    fixture.start_detached(&bundle, &id)?;
    let wrong = fixture.call(&["kill", &id, "SIGNONSENSE"])?;
    ensure!(
        wrong.code() != 0 && wrong.stderr.contains("SIGNONSENSE"),
        "{:?}",
        wrong.stderr
    );
    fixture.call(&["kill", &id, "KILL"])?.success()?;
    fixture.wait_for_end(&id)
}

fn running_container_is_not_deleted_without_force(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("force");
    fixture.start_detached(&bundle, &id)?;
    let refused = fixture.call(&["delete", &id])?;
    ensure_eq!(refused.code(), 1, "exit code of delete");
    ensure!(
        refused.stderr.contains("running"),
        "reason: {:?}",
        refused.stderr
    );
    ensure_eq!(fixture.status(&id)?, "running", "status after the refusal");
    fixture.call(&["delete", "--force", &id])?.success()?;
    ensure_eq!(
        fixture.call(&["state", &id])?.code(),
        1,
        "exit code of state"
    );
    fixture.call(&["delete", "--force", &id])?.success()?;
    Ok(())
}

fn start_is_refused_twice(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("twice");
    fixture.start_detached(&bundle, &id)?;
    let refused = fixture.call(&["start", &id])?;
    ensure!(
        refused.code() == 1 && refused.stderr.contains("running"),
        "{refused:?}"
    );
    Ok(())
}

fn stopped_container_is_not_killed(fixture: &Fixture) -> Claim {
    let bundle = fixture.bundle()?;
    let id = fixture.id("stopped");
    fixture.start_detached(&bundle, &id)?;
    fixture.wait_for_end(&id)?;
    let refused = fixture.call(&["kill", &id, "TERM"])?;
    ensure!(
        refused.code() == 1 && refused.stderr.contains("not running"),
        "{refused:?}"
    );
    Ok(())
}

fn duplicate_id_is_refused(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("duplicate");
    fixture.start_detached(&bundle, &id)?;
    let mut command = fixture.rt(&["run", "--bundle"]);
    let output = command
        .arg(bundle.dir())
        .arg(&id)
        .stderr(Stdio::piped())
        .output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure_eq!(output.status.code(), Some(1), "exit code");
    ensure!(
        stderr.contains(&id) && stderr.contains("exist"),
        "reason: {stderr:?}"
    );
    ensure_eq!(
        fixture.status(&id)?,
        "running",
        "status of the first container"
    );
    Ok(())
}

fn pid_file_names_the_process(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("while true; do sleep 1; done");
    bundle.save()?;
    let (id, file) = (fixture.id("pid-file"), fixture.dir().join("pid"));
    let mut command = fixture.rt(&["run", "--detach", "--pid-file"]);
    let status = command
        .arg(&file)
        .arg("--bundle")
        .arg(bundle.dir())
        .arg(&id)
        .stdout(Stdio::null())
        .status()?;
    ensure!(status.success(), "run: {status}");
    let pid: i64 = fs::read_to_string(&file)?.parse()?;
    ensure_eq!(
        fixture.state(&id)?["pid"].as_i64(),
        Some(pid),
        "pid in state"
    );
    Ok(())
}

fn list_shows_the_container(fixture: &Fixture) -> Claim {
    ensure_eq!(
        fixture.call(&["list", "--quiet"])?.success()?.stdout,
        "",
        "the list without containers"
    );
    let mut bundle = fixture.bundle()?;
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("list");
    fixture.start_detached(&bundle, &id)?;
    ensure_eq!(
        fixture.call(&["list", "-q"])?.success()?.stdout,
        format!("{id}\n"),
        "the quiet list"
    );
    let table = fixture.call(&["list"])?.success()?.stdout;
    ensure!(
        table.starts_with("ID") && table.contains(&id) && table.contains("running"),
        "table: {table}"
    );
    let list: Value = serde_json::from_str(
        &fixture
            .call(&["list", "--format", "json"])?
            .success()?
            .stdout,
    )?;
    ensure_eq!(list[0]["id"], json!(id), "id in the JSON list");
    ensure_eq!(list[0]["status"], "running", "status in the JSON list");
    Ok(())
}

fn ps_shows_the_workload(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("echo up; while true; do sleep 12345; done");
    let id = fixture.id("ps");
    fixture.start_detached(&bundle, &id)?;
    wait_for_log(fixture, &id, "up")?;
    let table = fixture.call(&["ps", &id])?.success()?.stdout;
    ensure!(
        table.starts_with("UID") && table.contains("sleep 12345") && table.contains("\nroot "),
        "table: {table}"
    );
    let pids = listed_pids(fixture, &id)?;
    ensure!(pids.len() >= 2, "pids: {pids:?}");
    Ok(())
}

fn create_sends_a_pidfd(fixture: &Fixture) -> Claim {
    let bundle = fixture.bundle()?;
    bundle.save()?;
    let id = fixture.id("pidfd");
    let socket = fixture.dir().join("pidfd.sock");
    let listener = UnixListener::bind(&socket)?;
    let mut command = fixture.rt(&["create", "--pidfd-socket"]);
    command.arg(&socket).arg("--bundle").arg(bundle.dir());
    let status = command.arg(&id).stdout(Stdio::null()).status()?;
    ensure!(status.success(), "create: {status}");
    let pid = fixture.state(&id)?["pid"].to_string();
    let received = pid_of_received(&listener)?;
    ensure_eq!(received, pid, "the process of the descriptor");
    Ok(())
}

fn listed_pids(
    fixture: &Fixture,
    id: &str,
) -> Result<Vec<i32>, Box<dyn std::error::Error + Send + Sync>> {
    let listed = fixture.call(&["ps", "--format", "json", id])?.success()?;
    Ok(serde_json::from_str(&listed.stdout)?)
}

fn options_may_follow_the_id(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("options");
    fixture.start_detached(&bundle, &id)?;
    let outcome = fixture.call(&["delete", &id, "--force"])?;
    ensure_eq!(outcome.code(), 0, "exit code; {:?}", outcome.stderr);
    Ok(())
}

fn bundle_alone_runs_with_a_made_up_id(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.args(&["/bin/echo", "hello"]);
    bundle.save()?;
    let mut command = fixture.rt(&["run"]);
    let output = command.arg(bundle.dir()).output()?;
    ensure_eq!(
        String::from_utf8_lossy(&output.stdout),
        "hello\n",
        "stdout; {output:?}"
    );
    Ok(())
}

fn killed_process_is_seen_as_stopped(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("while true; do sleep 1; done");
    let id = fixture.id("murdered");
    fixture.start_detached(&bundle, &id)?;
    let pid = i32::try_from(fixture.state(&id)?["pid"].as_i64().unwrap_or(0))?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    fixture.wait_for_end(&id)?;
    ensure_eq!(fixture.status(&id)?, "stopped", "status");
    fixture.call(&["delete", &id])?.success()?;
    Ok(())
}

fn pause_freezes_and_resume_goes_on(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("n=0; while true; do n=$((n+1)); echo $n; sleep 0.05; done");
    let id = fixture.id("pause");
    fixture.start_detached(&bundle, &id)?;
    wait_for_log(fixture, &id, "3")?;
    fixture.call(&["pause", &id])?.success()?;
    ensure_eq!(fixture.status(&id)?, "paused", "status after pause");
    // What was on its way when the freeze began may still arrive.
    std::thread::sleep(std::time::Duration::from_millis(300));
    let frozen = fixture.log_of(&id);
    std::thread::sleep(std::time::Duration::from_millis(700));
    ensure_eq!(fixture.log_of(&id), frozen, "the log while paused");
    fixture.call(&["resume", &id])?.success()?;
    ensure_eq!(fixture.status(&id)?, "running", "status after resume");
    let next = frozen.lines().count() + 3;
    wait_for_log(fixture, &id, &format!("\n{next}\n"))
}

fn spec_makes_a_bundle_that_loads(fixture: &Fixture) -> Claim {
    let dir = fixture.dir().join("fresh");
    fs::create_dir_all(dir.join("rootfs/bin"))?;
    copy_program(Path::new("/bin/busybox"), &dir.join("rootfs/bin/sh"))?;
    fixture.rt(&["spec", "--bundle"]).arg(&dir).status()?;
    let again = fixture.rt(&["spec", "--bundle"]).arg(&dir).output()?;
    ensure!(!again.status.success(), "spec overwrote a config.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(dir.join("config.json"))?)?;
    ensure_eq!(spec["process"]["args"], json!(["sh"]), "default command");
    spec["process"]["terminal"] = json!(false);
    fs::write(dir.join("config.json"), spec.to_string())?;
    let mut command = fixture.rt(&["run", "--bundle"]);
    command
        .arg(&dir)
        .arg(fixture.id("spec"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(b"echo from the shell\n")?;
    }
    let output = child.wait_with_output()?;
    ensure_eq!(
        String::from_utf8_lossy(&output.stdout),
        "from the shell\n",
        "stdout"
    );
    Ok(())
}

fn features_is_json_with_the_spec_versions(fixture: &Fixture) -> Claim {
    let features: Value = serde_json::from_str(&fixture.call(&["features"])?.success()?.stdout)?;
    ensure!(
        features["ociVersionMin"].is_string() && features["ociVersionMax"].is_string(),
        "{features}"
    );
    ensure!(
        features["linux"]["namespaces"]
            .as_array()
            .is_some_and(|list| list.len() >= 6),
        "{features}"
    );
    Ok(())
}

/// Listens where a client such as conmon waits for the terminal.
pub fn console_socket(fixture: &Fixture) -> std::io::Result<(std::path::PathBuf, UnixListener)> {
    let path = fixture.dir().join("console.sock");
    let listener = UnixListener::bind(&path)?;
    Ok((path, listener))
}

fn killing_ends_all_processes_also_without_a_pid_namespace(fixture: &Fixture) -> Claim {
    // A machine ends with the first process.
    let cases: &[bool] = match fixture.model() {
        Model::Container => &[false, true],
        Model::Microvm => &[false],
    };
    for &first_is_gone in cases {
        let mut bundle = fixture.bundle()?;
        bundle
            .without_namespace("pid")
            .script("sleep 1000 & sleep 1000 & echo up; read -r line < /wait");
        nix::unistd::mkfifo(&bundle.in_rootfs("wait"), nix::sys::stat::Mode::S_IRWXU)?;
        let id = fixture.id(if first_is_gone { "left" } else { "kill-all" });
        fixture.start_detached(&bundle, &id)?;
        wait_for_log(fixture, &id, "up")?;
        let pids = listed_pids(fixture, &id)?;
        ensure!(pids.len() > 2, "processes: {pids:?}");
        if first_is_gone {
            fs::write(bundle.in_rootfs("wait"), "go\n")?;
            fixture.wait_for_end(&id)?;
            let left = listed_pids(fixture, &id)?;
            ensure_eq!(left.len(), 2, "processes that outlived the first one");
        }
        fixture.call(&["kill", &id, "KILL"])?.success()?;
        fixture.wait_for_end(&id)?;
        ensure_eq!(listed_pids(fixture, &id)?.len(), 0, "processes at the end");
        if fixture.model() == Model::Container {
            for pid in pids {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                // One that nobody has reaped yet has ended too.
                let left = !stat.is_empty() && !stat.contains(") Z ");
                ensure!(!left, "process {pid} is left: {stat}");
            }
        }
        fixture.call(&["delete", &id])?.success()?;
    }
    Ok(())
}

fn container_that_waits_for_its_start_ends_when_asked(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.args(&["/bin/true"]);
    let id = fixture.id("term");
    create(fixture, &bundle, &id)?;
    fixture.call(&["kill", &id, "TERM"])?.success()?;
    fixture.wait_for_end(&id)?;
    fixture.call(&["delete", &id])?.success()?;
    Ok(())
}
