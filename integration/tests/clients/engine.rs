//! What podman and docker have in common: one command line, and the claims about it.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use integration::{Claim, Outcome, Output, Pseudoterminal, World, ensure, ensure_eq, finish};
use serde_json::Value;

use crate::{BOTH, CONTAINER, Entry, IMAGE, Reason, Start};

/// How long the text of a workload may take to arrive.
const LIMIT: Duration = Duration::from_secs(120);

/// Says "up", says "hup" on SIGHUP and "bye" on SIGTERM, which ends it with code 5.
pub const SERVICE: &str = "trap 'echo hup' HUP; trap 'echo bye; exit 5' TERM; echo up; \
    while :; do sleep 0.1; done";

pub const CLAIMS: &[Entry<Engine>] = &[
    Entry::essential(
        "runs_with_stdio_and_exit_code",
        runs_with_stdio_and_exit_code,
    ),
    Entry::essential(
        "executes_in_a_running_container",
        executes_in_a_running_container,
    ),
    Entry::essential(
        "service_lives_through_its_life",
        service_lives_through_its_life,
    ),
    Entry::further("terminal_is_the_callers", BOTH, terminal_is_the_callers),
    Entry::further(
        "volumes_limits_and_user_are_applied",
        BOTH,
        volumes_limits_and_user_are_applied,
    ),
    Entry::further(
        "read_only_root_takes_a_tmpfs",
        BOTH,
        read_only_root_takes_a_tmpfs,
    ),
    Entry::further(
        "programs_that_cannot_run_have_their_codes",
        BOTH,
        programs_that_cannot_run_have_their_codes,
    ),
    Entry::further("restart_runs_it_anew", BOTH, restart_runs_it_anew),
    Entry::further("top_shows_the_workload", CONTAINER, top_shows_the_workload),
    Entry::essential("published_port_answers", published_port_answers),
];

/// A container engine with docker's command line.
pub struct Engine {
    start: Start,
    command_line: Vec<OsString>,
    environment: Vec<(&'static str, PathBuf)>,
    /// The daemons, where there are some.
    _daemons: Vec<Output>,
}

impl Engine {
    pub fn new(
        start: Start,
        command_line: &[OsString],
        environment: &[(&'static str, PathBuf)],
        daemons: Vec<Output>,
    ) -> Self {
        Self {
            start,
            command_line: command_line.to_vec(),
            environment: environment.to_vec(),
            _daemons: daemons,
        }
    }

    pub fn world(&self) -> &World {
        &self.start.world
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.world().command(&self.command_line[0]);
        command
            .args(&self.command_line[1..])
            .args(args)
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    fn call(&self, args: &[&str]) -> Result<Outcome, Reason> {
        Ok(finish(&mut self.command(args), None)?)
    }

    /// What a command that succeeds writes.
    pub fn told(&self, args: &[&str]) -> Result<String, Reason> {
        let outcome = self.call(args)?.success();
        let outcome = outcome.map_err(|reason| format!("{args:?}: {reason}"))?;
        Ok(outcome.stdout.trim().to_owned())
    }

    fn run_command(&self, options: &[&str], command: &[&str]) -> Command {
        let mut run = self.command(&["run", "--cgroup-parent"]);
        run.arg(format!("/{}", self.world().cgroup()));
        if !options.contains(&"--publish") {
            run.args(["--network", "none"]);
        }
        run.args(options).arg(IMAGE).args(command);
        run
    }

    pub fn run(&self, options: &[&str], command: &[&str]) -> Result<Outcome, Reason> {
        Ok(finish(&mut self.run_command(options, command), None)?)
    }

    /// What a script in a container writes that succeeds.
    pub fn run_told(&self, options: &[&str], script: &str) -> Result<String, Reason> {
        let outcome = self.run(options, &["sh", "-c", script])?.success();
        let outcome = outcome.map_err(|reason| format!("{script:?}: {reason}"))?;
        Ok(outcome.stdout.trim().to_owned())
    }

    /// Starts a container in the background and waits until it has written "up".
    pub fn service(&self, name: &str, options: &[&str], script: &str) -> Claim {
        let detached = [&["--detach", "--name", name], options].concat();
        self.run_told(&detached, script)?;
        self.wait_for_log(name, "up")
    }

    fn wait_for_log(&self, name: &str, text: &str) -> Claim {
        let log = Output::of(&mut self.command(&["logs", "--follow", name]))?;
        Ok(log.wait_for(text, LIMIT)?)
    }

    /// A field of what `inspect` tells of a container.
    pub fn inspect(&self, name: &str, pointer: &str) -> Result<Value, Reason> {
        let all: Value = serde_json::from_str(&self.told(&["inspect", name])?)?;
        Ok(all[0].pointer(pointer).cloned().unwrap_or_default())
    }

    /// Removes a container and looks for what it left behind.
    pub fn remove(&self, name: &str) -> Claim {
        let id = self.inspect(name, "/Id")?;
        let id = id.as_str().unwrap_or_default();
        ensure!(id.len() == 64, "no id in inspect: {id:?}");
        self.told(&["rm", "--force", name])?;
        let left: Vec<_> = self
            .world()
            .cgroups()
            .into_iter()
            .filter(|cgroup| cgroup.to_string_lossy().contains(id))
            .collect();
        ensure!(left.is_empty(), "cgroups are left: {left:?}");
        let mounts = fs::read_to_string(self.world().path("/proc/1/mountinfo"))?;
        ensure!(!mounts.contains(id), "mounts are left: {mounts}");
        let found = finish(
            self.world()
                .command("find")
                .args(["/run", "-path", &format!("*/{id}/state.json")]),
            None,
        )?;
        // Its exit code tells of files that other claims removed while it looked.
        ensure_eq!(found.stdout, "", "state that is left");
        Ok(())
    }
}

fn runs_with_stdio_and_exit_code(engine: &Engine) -> Claim {
    let script = "read line; echo \"out $line\"; echo err >&2; exit 7";
    let mut run = engine.run_command(&["--rm", "--interactive"], &["sh", "-c", script]);
    let outcome = finish(&mut run, Some(b"in\n".to_vec()))?;
    outcome.expect("run", "out in\n", "err\n", 7)
}

fn executes_in_a_running_container(engine: &Engine) -> Claim {
    engine.service("executes", &[], SERVICE)?;
    let script = "cat; echo err >&2; exit 3";
    let mut exec = engine.command(&["exec", "--interactive", "executes", "sh", "-c", script]);
    let outcome = finish(&mut exec, Some(b"in\n".to_vec()))?;
    outcome.expect("run", "in\n", "err\n", 3)?;
    let options = [
        "exec",
        "--user",
        "user",
        "--env",
        "NAME=value",
        "--workdir",
        "/tmp",
    ];
    let script = "id -u; echo $NAME; pwd";
    let shown = engine.told(&[&options[..], &["executes", "sh", "-c", script]].concat())?;
    ensure_eq!(
        shown,
        "1000\nvalue\n/tmp",
        "user, environment and directory"
    );
    let missing = engine.call(&["exec", "executes", "nothing-like-it"])?;
    let said = missing.stdout.clone() + &missing.stderr;
    ensure!(
        said.contains("executable file not found"),
        "without a program: {said}"
    );
    // Podman says 127; docker says 126 with any runtime, and 127 since version 23.
    ensure!(
        matches!(missing.code(), 126 | 127),
        "exit code {}",
        missing.code()
    );
    engine.remove("executes")
}

fn service_lives_through_its_life(engine: &Engine) -> Claim {
    let name = "service";
    engine.service(name, &[], SERVICE)?;
    ensure_eq!(engine.inspect(name, "/State/Status")?, "running", "status");
    ensure!(
        engine.inspect(name, "/State/Pid")?.as_u64() > Some(0),
        "no pid"
    );
    let pids = engine.told(&["stats", "--no-stream", "--format", "{{.PIDs}}", name])?;
    ensure!(
        pids.parse::<u32>().is_ok_and(|pids| pids > 0),
        "stats shows {pids:?} processes"
    );

    engine.told(&["pause", name])?;
    ensure_eq!(
        engine.inspect(name, "/State/Status")?,
        "paused",
        "status after pause"
    );
    engine.told(&["unpause", name])?;
    ensure_eq!(
        engine.inspect(name, "/State/Status")?,
        "running",
        "status after unpause"
    );

    engine.told(&["kill", "--signal", "HUP", name])?;
    engine.wait_for_log(name, "hup")?;
    engine.told(&["stop", "--time", "60", name])?;
    ensure_eq!(
        engine.inspect(name, "/State/Status")?,
        "exited",
        "status after stop"
    );
    ensure_eq!(
        engine.inspect(name, "/State/ExitCode")?,
        5,
        "code after stop"
    );
    ensure_eq!(engine.told(&["logs", name])?, "up\nhup\nbye", "log");

    engine.told(&["start", name])?;
    engine.told(&["kill", name])?;
    ensure_eq!(engine.told(&["wait", name])?, "137", "code after SIGKILL");
    engine.remove(name)
}

fn terminal_is_the_callers(engine: &Engine) -> Claim {
    let (mut screen, terminal) = Pseudoterminal::open(33, 101)?;
    // The size may be told when the workload runs already.
    let script = "until stty size 2>/dev/null | grep '33 101'; do sleep 0.1; done; \
        read line; echo \"got $line\"; exit 4";
    let options = ["--rm", "--interactive", "--tty"];
    let mut child = engine
        .run_command(&options, &["sh", "-c", script])
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal)
        .spawn()?;
    let shown = screen.read_until("33 101", LIMIT);
    ensure!(shown.contains("33 101"), "size: {shown:?}");
    screen.type_text("typed\r")?;
    let shown = screen.read_until("got typed", LIMIT);
    ensure!(shown.contains("got typed"), "echo: {shown:?}");
    let status = integration::wait_with_limit(&mut child, LIMIT)?;
    ensure_eq!(status.code(), Some(4), "exit code");
    Ok(())
}

fn volumes_limits_and_user_are_applied(engine: &Engine) -> Claim {
    let volume = engine.world().dir().join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("given"), "given\n")?;
    let read_write = format!("--volume={}:/rw", volume.display());
    let read_only = format!("--volume={}:/ro:ro", volume.display());
    // As root a file can be written that the user named below could not write.
    let options = [
        "--rm",
        "--memory=64m",
        "--pids-limit=40",
        &read_write,
        &read_only,
    ];
    let script = "cat /ro/given; echo made > /rw/made; touch /ro/no || echo refused; \
        cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes memory.max pids/pids.max pids.max; true";
    let shown = engine.run_told(&options, script)?;
    ensure_eq!(shown, "given\nrefused\n67108864\n40", "volume and limits");
    ensure_eq!(
        fs::read_to_string(volume.join("made"))?,
        "made\n",
        "file on the volume"
    );
    let shown = engine.run_told(
        &["--rm", "--user=1000:1000", "--hostname=named"],
        "id -u; hostname",
    )?;
    ensure_eq!(shown, "1000\nnamed", "user and host name");
    Ok(())
}

fn read_only_root_takes_a_tmpfs(engine: &Engine) -> Claim {
    let options = ["--rm", "--read-only", "--tmpfs=/mnt:size=1m"];
    let script = "touch /no 2>/dev/null || echo refused; echo kept > /mnt/file; cat /mnt/file; \
        df -k /mnt | awk 'END { print $2 }'";
    let shown = engine.run_told(&options, script)?;
    ensure_eq!(shown, "refused\nkept\n1024", "what it could write");
    Ok(())
}

fn programs_that_cannot_run_have_their_codes(engine: &Engine) -> Claim {
    let missing = engine.run(&["--rm"], &["nothing-like-it"])?;
    ensure_eq!(missing.code(), 127, "no program: {}", missing.stderr);
    for name in ["/etc/passwd", "/etc"] {
        let denied = engine.run(&["--rm"], &[name])?;
        ensure_eq!(denied.code(), 126, "not a program: {}", denied.stderr);
        let said = denied.stderr.to_lowercase();
        ensure!(said.contains("permission denied"), "{name}: {said}");
    }
    Ok(())
}

fn restart_runs_it_anew(engine: &Engine) -> Claim {
    engine.service("restarts", &[], SERVICE)?;
    let before = engine.inspect("restarts", "/State/Pid")?;
    engine.told(&["restart", "--time", "60", "restarts"])?;
    engine.wait_for_log("restarts", "up\nbye\nup")?;
    ensure!(
        engine.inspect("restarts", "/State/Pid")? != before,
        "the same process"
    );
    engine.remove("restarts")
}

fn top_shows_the_workload(engine: &Engine) -> Claim {
    engine.service("top", &[], "echo up; exec sleep 98765")?;
    let shown = engine.told(&["top", "top"])?;
    ensure_eq!(
        shown.matches("sleep 98765").count(),
        1,
        "lines of it in {shown:?}"
    );
    engine.remove("top")
}

fn published_port_answers(engine: &Engine) -> Claim {
    let script = "mkdir /tmp/web; echo served > /tmp/web/index.html; \
        httpd -p 80 -h /tmp/web && echo up && exec sleep 98765";
    engine.service("web", &["--publish", "18080:80"], script)?;
    let mut fetch = engine.world().command("busybox");
    let page = finish(
        fetch.args(["wget", "-q", "-O", "-", "http://127.0.0.1:18080/"]),
        None,
    )?;
    ensure_eq!(page.success()?.stdout, "served\n", "page");
    engine.remove("web")
}
