//! Containerd: a daemon with roots and a socket of its own, driven by `ctr`. Its own
//! shim calls our binary in runc's place; the same claims hold for our shim.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use integration::{
    Claim, Outcome, Output, Pseudoterminal, World, ensure, ensure_eq, finish, wait_with_limit,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{BOTH, CONTAINER, Entry, IMAGE, Reason, Start};

pub const LIMIT: Duration = Duration::from_secs(120);

pub const SOCKET: &str = "/run/containerd.sock";

pub const CLAIMS: &[Entry<Containerd>] = &[
    Entry::essential(
        "runs_with_stdio_and_exit_code",
        runs_with_stdio_and_exit_code,
    ),
    Entry::essential("task_lives_through_its_life", task_lives_through_its_life),
    Entry::essential("terminal_is_the_callers", terminal_is_the_callers),
    Entry::further(
        "mounts_are_read_only_or_not",
        BOTH,
        mounts_are_read_only_or_not,
    ),
    Entry::further("memory_is_limited", BOTH, memory_is_limited),
    Entry::further(
        "program_that_is_not_there_is_named",
        BOTH,
        program_that_is_not_there_is_named,
    ),
    Entry::further("processes_are_listed", CONTAINER, processes_are_listed),
];

/// Whom containerd has make its containers.
#[derive(Clone, Copy)]
pub enum Runtime {
    /// Its own shim, which calls a binary.
    Binary,
    /// Our shim.
    Shim,
}

/// The daemon, and how its client is called.
pub struct Containerd {
    start: Start,
    runtime: Runtime,
    daemon: Mutex<Option<Output>>,
}

/// Starts the daemon and imports the image.
pub fn start(start: Start) -> Result<Containerd, Reason> {
    start_with(start, Runtime::Binary)
}

/// Starts the daemon and imports the image.
pub fn start_with(start: Start, runtime: Runtime) -> Result<Containerd, Reason> {
    let daemon = daemon(&start.world)?;
    let image = start.image.clone();
    let containerd = Containerd {
        start,
        runtime,
        daemon: Mutex::new(Some(daemon)),
    };
    containerd.told(&["images", "import", &image.to_string_lossy()])?;
    Ok(containerd)
}

/// Starts a daemon in the world that listens on [`SOCKET`].
pub fn daemon(world: &World) -> Result<Output, Reason> {
    daemon_with(
        world,
        "disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n",
    )
}

/// The same with more in its configuration.
pub fn daemon_with(world: &World, settings: &str) -> Result<Output, Reason> {
    let config = world.dir().join("containerd.toml");
    fs::write(&config, configuration(settings))?;
    daemon_of(world, &config)
}

/// A daemon's configuration with these settings, in the form of containerd 1.
pub fn configuration(settings: &str) -> String {
    format!(
        "version = 2\n\
         root = \"/run/containerd-root\"\n\
         state = \"/run/containerd-state\"\n\
         {settings}\
         [grpc]\n\
         address = \"{SOCKET}\"\n"
    )
}

/// Starts a daemon with this configuration.
pub fn daemon_of(world: &World, config: &Path) -> Result<Output, Reason> {
    let mut command = world.command("containerd");
    let daemon = Output::of(command.arg("--config").arg(config))?;
    daemon.wait_for("successfully booted", LIMIT)?;
    Ok(daemon)
}

impl Containerd {
    /// A shell that calls our shim's `start` in a new bundle, as containerd does, and then does more.
    pub fn start_shim(&self, id: &str, more: &str) -> Result<Command, Reason> {
        let world = &self.start.world;
        let bundle = world.dir().join(id);
        fs::create_dir(&bundle)?;
        fs::write(bundle.join("config.json"), "{}")?;
        let script = format!(
            "cd {} && {} -namespace tests -address {SOCKET} -id {id} start {more}",
            bundle.display(),
            self.start.shim.display(),
        );
        let mut shell = world.command("sh");
        shell.args(["-c", &script]);
        Ok(shell)
    }

    /// Our shim's `delete`, as containerd executes it for a container whose server it has lost.
    pub fn delete_by_shim(&self, id: &str, bundle: &str) -> Command {
        let mut shim = self.world().command(&self.start.shim);
        let namespace = self.world().cgroup();
        shim.args(["-namespace", namespace, "-address", SOCKET])
            .args(["-id", id, "-bundle", bundle, "delete"]);
        shim
    }

    pub fn world(&self) -> &World {
        &self.start.world
    }

    /// The same with a daemon of its own.
    pub fn another(&self, name: &str) -> Result<Self, Reason> {
        start_with(self.start.another(name)?, self.runtime)
    }

    /// Kills the daemon and starts it anew.
    pub fn restart(&self) -> Result<(), Reason> {
        let mut running = self.daemon.lock().map_err(|error| error.to_string())?;
        let config = self.world().dir().join("containerd.toml");
        for pid in pids_of(&["containerd", "--config", &config.to_string_lossy()])? {
            kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        }
        *running = None;
        *running = Some(daemon(self.world())?);
        Ok(())
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.world().command("ctr");
        // The namespace is also the cgroup that its containers are in.
        command
            .args(["--address", SOCKET, "--namespace", self.world().cgroup()])
            .args(args);
        command
    }

    pub fn told(&self, args: &[&str]) -> Result<String, Reason> {
        let outcome = finish(&mut self.command(args), None)?.success();
        let outcome = outcome.map_err(|reason| format!("{args:?}: {reason}"))?;
        Ok(outcome.stdout.trim().to_owned())
    }

    pub fn run_command(&self, id: &str, options: &[&str], command: &[&str]) -> Command {
        let mut run = self.run_by_runtime();
        run.args(options).args([IMAGE, id]).args(command);
        run
    }

    /// Runs a container with a configuration of its own, and no image.
    pub fn run_configured(&self, id: &str, config: &Path) -> Command {
        let mut run = self.run_by_runtime();
        run.arg("--config").arg(config).arg(id);
        run
    }

    fn run_by_runtime(&self) -> Command {
        let mut run = self.command(&["run"]);
        match self.runtime {
            Runtime::Binary => run.arg("--runc-binary").arg(&self.start.runtime),
            Runtime::Shim => run.arg("--runtime").arg(&self.start.shim),
        };
        run
    }

    pub fn run(&self, id: &str, options: &[&str], command: &[&str]) -> Result<Outcome, Reason> {
        let all = [&["--rm"], options].concat();
        Ok(finish(&mut self.run_command(id, &all, command), None)?)
    }

    pub fn status(&self, id: &str) -> Result<String, Reason> {
        let table = self.told(&["tasks", "list"])?;
        let row = table
            .lines()
            .find(|line| line.split_whitespace().next() == Some(id));
        let status = row.and_then(|row| row.split_whitespace().nth(2));
        Ok(status.unwrap_or("none").to_owned())
    }

    /// Looks for what a container that was removed left behind.
    pub fn nothing_left_of(&self, id: &str) -> Claim {
        let cgroups = self.world().cgroups();
        let left: Vec<_> = cgroups
            .iter()
            .filter(|cgroup| cgroup.ends_with(id))
            .collect();
        ensure!(left.is_empty(), "cgroups are left: {left:?}");
        let root = match self.runtime {
            Runtime::Binary => "runc",
            Runtime::Shim => "rt",
        };
        let state = format!("/run/containerd/{root}/{}/{id}", self.world().cgroup());
        ensure!(!fs::exists(self.world().path(&state))?, "{state} is left");
        let mounts = fs::read_to_string(self.world().path("/proc/1/mountinfo"))?;
        let bundle = format!("/{id}/rootfs");
        ensure!(!mounts.contains(&bundle), "mounts are left: {mounts}");
        Ok(())
    }
}

/// The pids, as this process sees them, of the processes whose command lines have all these words.
pub fn pids_of(words: &[&str]) -> Result<Vec<i32>, Reason> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        if words.iter().all(|word| line.contains(&word.as_bytes())) {
            pids.push(pid);
        }
    }
    Ok(pids)
}

fn runs_with_stdio_and_exit_code(containerd: &Containerd) -> Claim {
    // The end of its stdin may reach ctr before there is a task to tell: the workload reads a line, not to the end.
    let script = "read line; echo \"out $line\"; echo err >&2; exit 7";
    let mut run = containerd.run_command("stdio", &["--rm"], &["sh", "-c", script]);
    let outcome = finish(&mut run, Some(b"in\n".to_vec()))?;
    outcome.expect("run", "out in\n", "err\n", 7)?;
    containerd.nothing_left_of("stdio")
}

fn task_lives_through_its_life(containerd: &Containerd) -> Claim {
    let id = "life";
    let script = "trap 'exit 5' TERM; echo up > /tmp/up; while :; do sleep 0.1; done";
    let mut run = containerd.run_command(id, &["--detach"], &["sh", "-c", script]);
    finish(&mut run, None)?.success()?;
    ensure_eq!(containerd.status(id)?, "RUNNING", "status");

    let script = "while [ ! -s /tmp/up ]; do sleep 0.1; done; cat /tmp/up; echo err >&2; exit 3";
    let exec = ["tasks", "exec", "--exec-id", "one", id, "sh", "-c", script];
    let outcome = finish(&mut containerd.command(&exec), None)?;
    outcome.expect("exec", "up\n", "err\n", 3)?;

    containerd.told(&["tasks", "pause", id])?;
    ensure_eq!(containerd.status(id)?, "PAUSED", "status after pause");
    containerd.told(&["tasks", "resume", id])?;
    ensure_eq!(containerd.status(id)?, "RUNNING", "status after resume");
    let metrics = containerd.told(&["tasks", "metrics", id])?;
    ensure!(metrics.contains("pids.current"), "metrics: {metrics}");

    let mut wait = containerd.command(&["tasks", "attach", id]).spawn()?;
    containerd.told(&["tasks", "kill", "--signal", "TERM", id])?;
    ensure_eq!(
        wait_with_limit(&mut wait, LIMIT)?.code(),
        Some(5),
        "exit code"
    );
    containerd.told(&["containers", "delete", id])?;
    containerd.nothing_left_of(id)
}

fn terminal_is_the_callers(containerd: &Containerd) -> Claim {
    let (mut screen, terminal) = Pseudoterminal::open(33, 101)?;
    // The size may be told when the workload runs already.
    let script = "until stty size 2>/dev/null | grep '33 101'; do sleep 0.1; done; \
        read line; echo \"got $line\"; exit 4";
    let mut child = containerd
        .run_command("terminal", &["--rm", "--tty"], &["sh", "-c", script])
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal)
        .spawn()?;
    screen.type_text("typed\r")?;
    let shown = screen.read_until("got typed", LIMIT);
    ensure!(shown.contains("33 101"), "size: {shown:?}");
    ensure!(shown.contains("got typed"), "echo: {shown:?}");
    ensure_eq!(
        wait_with_limit(&mut child, LIMIT)?.code(),
        Some(4),
        "exit code"
    );
    Ok(())
}

fn mounts_are_read_only_or_not(containerd: &Containerd) -> Claim {
    let volume = containerd.world().dir().join("mounted");
    fs::create_dir(&volume)?;
    fs::write(volume.join("given"), "given\n")?;
    let mount = |destination: &str, access: &str| {
        let source = volume.display();
        format!("--mount=type=bind,src={source},dst={destination},options=rbind:{access}")
    };
    let script = "cat /ro/given; echo made > /rw/made; touch /ro/no 2>/dev/null || echo refused";
    let options = [mount("/ro", "ro"), mount("/rw", "rw")];
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let outcome = containerd.run("mounts", &options, &["sh", "-c", script])?;
    ensure_eq!(outcome.success()?.stdout, "given\nrefused\n", "output");
    ensure_eq!(fs::read_to_string(volume.join("made"))?, "made\n", "file");
    Ok(())
}

fn memory_is_limited(containerd: &Containerd) -> Claim {
    let options = ["--memory-limit=33554432"];
    let outcome = containerd.run("memory", &options, &["tail", "/dev/zero"])?;
    ensure_eq!(outcome.code(), 137, "exit code; {:?}", outcome.stderr);
    containerd.nothing_left_of("memory")
}

fn program_that_is_not_there_is_named(containerd: &Containerd) -> Claim {
    let outcome = containerd.run("missing", &[], &["nothing-like-it"])?;
    ensure!(
        outcome
            .stderr
            .contains("exec: \"nothing-like-it\": executable file not found in $PATH"),
        "stderr: {}",
        outcome.stderr
    );
    containerd.nothing_left_of("missing")
}

fn processes_are_listed(containerd: &Containerd) -> Claim {
    let mut run = containerd.run_command("listed", &["--detach"], &["sleep", "98765"]);
    finish(&mut run, None)?.success()?;
    let listed = containerd.told(&["tasks", "ps", "listed"])?;
    let pid = listed
        .lines()
        .nth(1)
        .and_then(|line| line.split_whitespace().next());
    let pid = pid.unwrap_or_default();
    let cgroups = fs::read_to_string(containerd.world().path(&format!("/proc/{pid}/cgroup")))?;
    ensure!(cgroups.contains("/listed"), "{listed} is in {cgroups}");
    containerd.told(&["tasks", "delete", "--force", "listed"])?;
    containerd.told(&["containers", "delete", "listed"])?;
    containerd.nothing_left_of("listed")
}
