//! The model's commands take the steps that those of `rt` take, in the same order.
//!
//! `rt` tells its own by fault points (`engine::fault`). A point that the model has none of parts steps that are one
//! there; a step without a point is one that leaves nothing behind. In the container model; what is above the isolation
//! models is the same for both.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};

use crate::after;
use crate::model::{Action, Command, Lifecycle, RunState, Step, World};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// All points that the model has.
const POINTS: [Step; 12] = [
    Step::MakeDirectory,
    Step::WriteFirstRecord,
    Step::TakeId,
    Step::MakeCgroup,
    Step::MakeProcess,
    Step::Release,
    Step::OpenPipe,
    Step::Tell,
    Step::KillProcesses,
    Step::RemoveCgroup,
    Step::FreeId,
    Step::RemoveDirectory,
];

/// The points that a command of the model passes, with nobody else there.
fn of_model(before: &World, command: Command) -> Vec<String> {
    let lifecycle = Lifecycle { flaw: None };
    let mut world = before.with(&[command], 0);
    let mut points = Vec::new();
    while let Some(RunState::Before { step, .. }) = world.runs[0].state {
        let Some(next) = lifecycle.after(&world, Action::Go(0)) else {
            break;
        };
        points.extend(step.fault_point().map(str::to_owned));
        world = next;
    }
    points
}

/// A bundle and a state root, and the container that is made of them.
struct Host {
    dir: tempfile::TempDir,
    id: String,
}

impl Host {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let bin = dir.path().join("bundle/rootfs/bin");
        fs::create_dir_all(&bin)?;
        fs::copy("/bin/busybox", bin.join("busybox"))?;
        let config = serde_json::json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "process": {
                "cwd": "/",
                "args": ["/bin/busybox", "sleep", "1000"],
                "user": {"uid": 0, "gid": 0},
            },
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
        });
        fs::write(
            dir.path().join("bundle/config.json"),
            serde_json::to_vec(&config)?,
        )?;
        Ok(Self {
            id: format!("lifecycle-{}", std::process::id()),
            dir,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn rt(&self, arguments: &[&str]) -> Process {
        let mut rt = Process::new(env!("CARGO_BIN_EXE_rt"));
        rt.arg("--root")
            .arg(self.path("root"))
            .args(arguments)
            .current_dir(self.path("bundle"))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        rt
    }

    /// The points, known to the model, that a command itself passes.
    fn points(&self, arguments: &[&str]) -> Result<Vec<String>> {
        let fault = self.path("fault");
        let _ = fs::remove_dir_all(&fault);
        fs::create_dir(&fault)?;
        fs::write(fault.join("passed"), "")?;
        let child = self
            .rt(arguments)
            .arg(&self.id)
            .env("RT_FAULT", &fault)
            .spawn()?;
        let pid = child.id().to_string();
        must_succeed(child)?;
        passed(&fault.join("passed"), &pid)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // What a test that failed has left, and for none of the others anything.
        let _ = self
            .rt(&["delete", "--force"])
            .arg(&self.id)
            .stderr(Stdio::null())
            .status();
    }
}

fn must_succeed(mut child: Child) -> Result<()> {
    let status = child.wait()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("rt: {status}").into()),
    }
}

fn passed(log: &Path, pid: &str) -> Result<Vec<String>> {
    let known: Vec<_> = POINTS.into_iter().filter_map(Step::fault_point).collect();
    let mut points: Vec<String> = Vec::new();
    for line in fs::read_to_string(log)?.lines() {
        let mut words = line.split(' ');
        if words.next() != Some(pid) {
            continue;
        }
        let name = words.next().unwrap_or_default();
        // A cgroup of version 1 is a directory in each hierarchy.
        let again = name == "cgroup.made" && points.last().is_some_and(|last| last == name);
        if known.contains(&name) && !again {
            points.push(name.to_owned());
        }
    }
    Ok(points)
}

fn reason_not_to_run() -> Option<&'static str> {
    if !cfg!(debug_assertions) {
        return Some("this rt has no fault points: it is built without debug assertions");
    }
    if !nix::unistd::geteuid().is_root() {
        return Some("containers need root");
    }
    (!Path::new("/bin/busybox").exists())
        .then_some("/bin/busybox (package busybox-static) is not installed")
}

#[test]
fn rt_takes_the_steps_of_the_model() -> Result<()> {
    if let Some(reason) = reason_not_to_run() {
        println!("skipped: {reason}");
        return Ok(());
    }
    use Command::{Create, Delete, Pause, Resume, Start};
    let host = Host::new()?;
    let commands: [(&[&str], Command); 5] = [
        (&["create"], Create),
        (&["start"], Start),
        (&["pause"], Pause),
        (&["resume"], Resume),
        (&["delete", "--force"], Delete { force: true }),
    ];
    let mut before = Vec::new();
    for (arguments, command) in commands {
        let expected = of_model(&after(&before), command);
        assert_eq!(host.points(arguments)?, expected, "points of {arguments:?}");
        before.push(command);
    }
    Ok(())
}
