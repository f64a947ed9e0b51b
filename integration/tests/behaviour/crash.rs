//! Whatever is killed at whatever step, the state is true afterwards and `delete --force` leaves nothing.
//!
//! The steps are the fault points of `rt`, found by a first, undisturbed run: a new point is walked without a change
//! here. At each one the process that passes it is killed; where that is not the command itself but a process that it
//! made, the command is killed too, in a run of its own, while that process stands there and then goes on alone.

use std::cell::Cell;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use integration::fault::{FaultRun, Pass, names_in};
use integration::snapshot::{Snapshot, state_directories};
use integration::{Bundle, Claim, Fixture, ensure, ensure_eq, eventually};

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    ("create_is_safe_at_every_step", create_is_safe_at_every_step),
    ("start_is_safe_at_every_step", start_is_safe_at_every_step),
    ("pause_is_safe_at_every_step", pause_is_safe_at_every_step),
    ("resume_is_safe_at_every_step", resume_is_safe_at_every_step),
    ("update_is_safe_at_every_step", update_is_safe_at_every_step),
    ("exec_is_safe_at_every_step", exec_is_safe_at_every_step),
    ("delete_is_safe_at_every_step", delete_is_safe_at_every_step),
    (
        "delete_force_is_safe_at_every_step",
        delete_force_is_safe_at_every_step,
    ),
    ("run_is_safe_at_every_step", run_is_safe_at_every_step),
];

/// Generous, since a microVM may run under software emulation.
const LIMIT: Duration = Duration::from_secs(150);

/// How long what a killed command left may take to come to its end.
const END_LIMIT: Duration = Duration::from_secs(10);

/// What the workload writes when it runs, in its root.
const MARK: &str = "tmp/ran";

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// One container, made again for each step.
struct Walk<'a> {
    fixture: &'a Fixture,
    bundle: Bundle,
    id: String,
    before: Snapshot,
    runs: Cell<u32>,
    lasts: bool,
}

impl<'a> Walk<'a> {
    fn new(fixture: &'a Fixture, script: &str) -> Result<Self, Failure> {
        let mut bundle = fixture.bundle()?;
        bundle.script(&format!("echo > /{MARK}; {script}"));
        bundle.save()?;
        fs::create_dir(fixture.dir().join("pid"))?;
        Ok(Self {
            bundle,
            id: fixture.id("crash"),
            before: Snapshot::take(&fixture.dir().to_string_lossy()),
            runs: Cell::new(0),
            lasts: script == FOR_EVER,
            fixture,
        })
    }

    /// A command whose container keeps no pipe of ours.
    fn rt(&self, args: &[&str]) -> Result<Command, Failure> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.fixture.dir().join("log"))?;
        let mut command = self.fixture.rt(args);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        Ok(command)
    }

    /// `create` or `run` of the container.
    fn make(&self, args: &[&str]) -> Result<Command, Failure> {
        let mut command = self.rt(args)?;
        command
            .arg("--bundle")
            .arg(self.bundle.dir())
            .arg("--pid-file")
            .arg(self.fixture.dir().join("pid/file"))
            .arg(&self.id);
        Ok(command)
    }

    fn must(&self, mut command: Command) -> Claim {
        let status = command.status()?;
        ensure!(status.success(), "{command:?}: {status}: {}", self.log());
        Ok(())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.fixture.dir().join("log")).unwrap_or_default()
    }

    fn mark(&self) -> PathBuf {
        self.bundle.in_rootfs(MARK)
    }

    fn fault_run(&self) -> Result<FaultRun, Failure> {
        let number = self.runs.get();
        self.runs.set(number + 1);
        let dir = self.fixture.dir().join(format!("run-{number}"));
        Ok(FaultRun::new(dir)?)
    }

    /// Walks `command` after `prepare`.
    fn walk(
        &self,
        prepare: impl Fn(&Self) -> Claim,
        command: impl Fn(&Self) -> Result<Command, Failure>,
    ) -> Claim {
        prepare(self)?;
        let passes = self.fault_run()?.record(&mut command(self)?, LIMIT);
        let passes = passes.map_err(|error| format!("{error}: {}", self.log()))?;
        self.clean_up()?;
        if passes.is_empty() {
            println!("skipped: this rt has no fault points: it is built without debug assertions");
            return Ok(());
        }
        for pass in &passes {
            for whole in [false, true] {
                if pass.own && whole {
                    continue;
                }
                prepare(self)
                    .and_then(|()| self.crash(pass, whole, &mut command(self)?))
                    // Who ends with a creator that was killed may be on its way when it is first looked at.
                    .and_then(|()| eventually(END_LIMIT, || self.state_is_true()))
                    .and_then(|()| self.clean_up())
                    .map_err(|reason| {
                        let who = if whole {
                            "the command"
                        } else {
                            "who passes it"
                        };
                        let (name, number) = (&pass.name, pass.number);
                        format!("at {name} {number}, {who} killed: {reason}\n{}", self.log())
                    })?;
            }
        }
        Ok(())
    }

    fn crash(&self, pass: &Pass, whole: bool, command: &mut Command) -> Claim {
        let run = self.fault_run()?;
        if whole {
            run.kill_command_at(pass, command, LIMIT)?;
        } else {
            run.kill_at(pass, command, LIMIT)?;
        }
        Ok(())
    }

    /// The state fits what the processes do, and what it offers works.
    fn state_is_true(&self) -> Claim {
        let outcome = self.fixture.call(&["state", &self.id])?;
        if outcome.code() == 1 && outcome.stderr.contains("does not exist") {
            return Ok(());
        }
        let state: serde_json::Value = serde_json::from_str(&outcome.success()?.stdout)?;
        let pid = state["pid"].as_i64().unwrap_or(0);
        match state["status"].as_str() {
            Some("created") => {
                ensure!(is_alive(pid), "created, but process {pid} is not alive");
                // It may have been told to start just before its teller was killed.
                if !self.fixture.call(&["start", &self.id])?.status.success() {
                    ensure_eq!(self.fixture.status(&self.id)?, "running", "status");
                }
                self.workload_runs()
            }
            Some("running") => {
                ensure!(is_alive(pid), "running, but process {pid} is not alive");
                self.workload_runs()
            }
            Some("paused") => {
                self.must(self.rt(&["resume", &self.id])?)?;
                self.workload_runs()
            }
            // Whoever was made by a creator that is gone ends by itself.
            Some("stopped") => {
                ensure_eq!(pid, 0, "pid of a stopped container");
                Ok(())
            }
            other => Err(format!("status {other:?} of a container that nobody works on").into()),
        }
    }

    /// It writes its mark, and if it is to last, goes on to.
    fn workload_runs(&self) -> Claim {
        if self.lasts {
            let _ = fs::remove_file(self.mark());
        }
        eventually(END_LIMIT, || {
            ensure!(self.mark().exists(), "the workload does not run");
            Ok(())
        })
    }

    /// Removes the container; nothing of it is left then.
    fn clean_up(&self) -> Claim {
        let delete = self.fixture.call(&["delete", "--force", &self.id])?;
        delete
            .success()
            .map_err(|reason| format!("delete --force: {reason}"))?;
        let state = self.fixture.call(&["state", &self.id])?;
        ensure!(
            state.stderr.contains("does not exist"),
            "state after delete --force: {state:?}"
        );
        // Whoever was on its way when the command was killed may take a moment to find that all is gone.
        eventually(END_LIMIT, || self.nothing_left())?;
        let _ = fs::remove_file(self.mark());
        Ok(())
    }

    fn nothing_left(&self) -> Claim {
        let files = state_directories(&self.fixture.state_root());
        ensure!(files.is_empty(), "left in the state root: {files:?}");
        let files = names_in(&self.fixture.dir().join("pid"))?;
        ensure!(
            files.iter().all(|name| name == "file"),
            "left beside the pid file: {files:?}"
        );
        let own = self.fixture.dir().to_string_lossy().into_owned();
        let left = Snapshot::take(&own).added_since(&self.before);
        let left: Vec<_> = left
            .iter()
            .filter(|line| line.contains(&own) || line.contains(&self.id))
            .collect();
        ensure!(left.is_empty(), "left behind: {left:?}");
        Ok(())
    }
}

fn is_alive(pid: i64) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Writes [`MARK`] again and again.
const FOR_EVER: &str = "while true; do echo > /tmp/ran; sleep 0.2; done";

fn create_is_safe_at_every_step(fixture: &Fixture) -> Claim {
    Walk::new(fixture, FOR_EVER)?.walk(|_| Ok(()), |walk| walk.make(&["create"]))
}

fn start_is_safe_at_every_step(fixture: &Fixture) -> Claim {
    Walk::new(fixture, FOR_EVER)?.walk(
        |walk| walk.must(walk.make(&["create"])?),
        |walk| walk.rt(&["start", &walk.id]),
    )
}

fn pause_is_safe_at_every_step(fixture: &Fixture) -> Claim {
    Walk::new(fixture, FOR_EVER)?.walk(
        |walk| {
            walk.must(walk.make(&["run", "--detach"])?)?;
            walk.workload_runs()
        },
        |walk| walk.rt(&["pause", &walk.id]),
    )
}

fn resume_is_safe_at_every_step(fixture: &Fixture) -> Claim {
    Walk::new(fixture, FOR_EVER)?.walk(
        |walk| {
            walk.must(walk.make(&["run", "--detach"])?)?;
            walk.must(walk.rt(&["pause", &walk.id])?)
        },
        |walk| walk.rt(&["resume", &walk.id]),
    )
}

/// To more memory than the machine of a microVM is made with.
fn update_is_safe_at_every_step(fixture: &Fixture) -> Claim {
    Walk::new(fixture, FOR_EVER)?.walk(
        |walk| {
            walk.must(walk.make(&["run", "--detach"])?)?;
            walk.workload_runs()
        },
        |walk| walk.rt(&["update", "--memory", "300M", &walk.id]),
    )
}

fn exec_is_safe_at_every_step(fixture: &Fixture) -> Claim {
    Walk::new(fixture, FOR_EVER)?.walk(
        |walk| {
            walk.must(walk.make(&["run", "--detach"])?)?;
            walk.workload_runs()
        },
        |walk| {
            let mut command = walk.rt(&["exec", "--pid-file"])?;
            let file = walk.fixture.dir().join("pid/file");
            command.arg(file).args([&walk.id, "/bin/true"]);
            Ok(command)
        },
    )
}

fn delete_is_safe_at_every_step(fixture: &Fixture) -> Claim {
    Walk::new(fixture, "exit 0")?.walk(
        |walk| {
            walk.must(walk.make(&["run", "--detach"])?)?;
            walk.fixture.wait_for_end(&walk.id)
        },
        |walk| walk.rt(&["delete", &walk.id]),
    )
}

fn delete_force_is_safe_at_every_step(fixture: &Fixture) -> Claim {
    Walk::new(fixture, FOR_EVER)?.walk(
        |walk| {
            walk.must(walk.make(&["run", "--detach"])?)?;
            walk.workload_runs()
        },
        |walk| walk.rt(&["delete", "--force", &walk.id]),
    )
}

fn run_is_safe_at_every_step(fixture: &Fixture) -> Claim {
    Walk::new(fixture, "exit 0")?.walk(|_| Ok(()), |walk| walk.make(&["run"]))
}
