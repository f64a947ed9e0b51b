//! The life of a container of `ctr`, with our shim.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use integration::{Claim, Outcome, World, ensure, eventually, finish};

use super::{
    Client, EXEC, SERVICE, SETTLED, Told, Victim, ended_codes, exec_told, lock, scaled,
    stopped_codes,
};
use crate::containerd::{Containerd, LIMIT, Runtime, start_with};
use crate::{Reason, Start};

const CREATE: &str = "create";
const EXECUTE: &str = "exec";
const STOP: &str = "stop";
const REMOVE: &str = "remove";

pub struct Ctr {
    containerd: Containerd,
    id: Mutex<String>,
    execs: AtomicU32,
}

pub fn start(start: Start) -> Result<Ctr, Reason> {
    Ok(Ctr {
        containerd: start_with(start, Runtime::Shim)?,
        id: Mutex::default(),
        execs: AtomicU32::new(0),
    })
}

/// Who a command failed for: `ctr` itself says so, or else the code is that of a process.
fn refusal(outcome: &Outcome) -> Option<Told> {
    let said = outcome.stderr.trim();
    said.contains("ctr: ")
        .then(|| Told::Failure(said.to_owned()))
}

impl Ctr {
    fn id(&self) -> String {
        lock(&self.id).clone()
    }

    fn call(&self, args: &[&str]) -> Result<Outcome, Told> {
        // It ends, or hangs.
        finish(&mut self.containerd.command(args), None)
            .map_err(|error| Told::Wrong(error.to_string()))
    }

    fn told(&self, args: &[&str]) -> Result<(), Told> {
        let outcome = self.call(args)?;
        match outcome.status.success() {
            true => Ok(()),
            false => Err(Told::Failure(outcome.stderr.trim().to_owned())),
        }
    }

    fn create(&self) -> Result<(), Told> {
        let command = ["sh", "-c", SERVICE];
        let mut run = self
            .containerd
            .run_command(&self.id(), &["--detach"], &command);
        let outcome = finish(&mut run, None).map_err(|error| Told::Wrong(error.to_string()))?;
        outcome.success().map(drop).map_err(Told::from)
    }

    fn execute(&self, victim: Option<Victim>) -> Result<(), Told> {
        let name = format!("e{}", self.execs.fetch_add(1, Ordering::Relaxed));
        let id = self.id();
        let exec = ["tasks", "exec", "--exec-id", &name, &id, "sh", "-c", EXEC];
        let outcome = self.call(&exec)?;
        let told = exec_told(outcome.code(), victim);
        told.map_err(|told| refusal(&outcome).unwrap_or(told))
    }

    fn stop(&self) -> Result<(), Told> {
        let id = self.id();
        self.told(&["tasks", "kill", "--signal", "TERM", &id])?;
        self.wait_for_end()
    }

    fn wait_for_end(&self) -> Result<(), Told> {
        let ended = eventually(scaled(SETTLED), || {
            let status = self.containerd.status(&self.id())?;
            ensure!(status != "RUNNING" && status != "CREATED", "it is {status}");
            Ok(())
        });
        ended.map_err(|reason| Told::Wrong(format!("it does not end: {reason}")))
    }

    /// Removes the task; its exit code is one of these.
    fn remove_task(&self, codes: &[i32]) -> Result<(), Told> {
        let outcome = self.call(&["tasks", "delete", &self.id()])?;
        if !outcome.status.success() {
            return Err(Told::Failure(outcome.stderr.trim().to_owned()));
        }
        // `ctr` logs it, in quotes, unless it is 0.
        let told = outcome.stderr.split_once("non-zero exit code ");
        let code = told.map_or("0", |(_, code)| code.trim().trim_end_matches('"'));
        match codes.contains(&code.parse()?) {
            true => Ok(()),
            false => Err(Told::Wrong(format!("the container's exit code is {code}"))),
        }
    }

    fn remove(&self, victim: Option<Victim>) -> Result<(), Told> {
        self.remove_task(stopped_codes(victim))?;
        self.told(&["containers", "delete", &self.id()])
    }

    fn is_known(&self) -> Result<bool, Reason> {
        let containers = self.containerd.told(&["containers", "list", "--quiet"])?;
        let is_listed = containers.lines().any(|line| line == self.id());
        Ok(is_listed || self.containerd.status(&self.id())? != "none")
    }
}

impl Client for Ctr {
    fn steps(&self) -> &'static [&'static str] {
        &[CREATE, EXECUTE, STOP, REMOVE]
    }

    fn begin(&self, life: &str) {
        *lock(&self.id) = life.to_owned();
    }

    fn take(&self, step: &str, victim: Option<Victim>) -> Result<(), Told> {
        match step {
            CREATE => self.create(),
            EXECUTE => self.execute(victim),
            STOP => self.stop(),
            _ => self.remove(victim),
        }
    }

    fn go_on(&self, step: &str, victim: Victim) -> Result<(), Told> {
        let status = self.containerd.status(&self.id())?;
        match (victim, step) {
            (Victim::Containerd, EXECUTE) => {
                self.execute(None)?;
                self.stop()?;
                self.remove(None)
            }
            (Victim::Containerd, STOP) => {
                if status == "RUNNING" {
                    // It may be ending just now.
                    let _ = self.told(&["tasks", "kill", "--signal", "TERM", &self.id()]);
                }
                self.wait_for_end()?;
                self.remove(None)
            }
            (Victim::Containerd, _) => Ok(()),
            _ => {
                self.wait_for_end()?;
                if self.containerd.status(&self.id())? == "none" {
                    return Ok(());
                }
                let codes = ended_codes(victim, [STOP, REMOVE].contains(&step));
                match self.remove_task(&codes) {
                    // Then what is left is removed by force.
                    Err(Told::Failure(_)) if victim == Victim::Shim => Ok(()),
                    removed => removed,
                }
            }
        }
    }

    fn clean_up(&self) -> Claim {
        eventually(LIMIT, || {
            let id = self.id();
            if self.containerd.status(&id)? != "none" {
                finish(
                    &mut self
                        .containerd
                        .command(&["tasks", "delete", "--force", &id]),
                    None,
                )?;
            }
            let removed = finish(
                &mut self.containerd.command(&["containers", "delete", &id]),
                None,
            )?;
            ensure!(
                !self.is_known()?,
                "containerd still knows of it: {}",
                removed.stderr
            );
            Ok(())
        })
    }

    fn restart(&self) -> Claim {
        self.containerd.restart()
    }

    fn world(&self) -> &World {
        self.containerd.world()
    }
}
