//! The life of a pod with one container, as a kubelet has it.

use std::fs;
use std::sync::Mutex;

use integration::{Claim, World, ensure, ensure_eq, eventually};
use serde_json::{Value, json};

use super::{
    Client, EXEC, EXIT_CODE, SERVICE, SETTLED, Told, Victim, ended_codes, exec_told, lock, scaled,
    stopped_codes,
};
use crate::containerd::LIMIT;
use crate::cri::{Cri, EXITED, READY, RUNNING, create_request, state_of};

const RUN_POD: &str = "run the pod";
const CREATE: &str = "create";
const START: &str = "start";
const EXECUTE: &str = "exec";
const STOP: &str = "stop";
const REMOVE: &str = "remove";
const STOP_POD: &str = "stop the pod";
const REMOVE_POD: &str = "remove the pod";

const STEPS: &[&str] = &[
    RUN_POD, CREATE, START, EXECUTE, STOP, REMOVE, STOP_POD, REMOVE_POD,
];

pub struct PodClient {
    cri: Cri,
    life: Mutex<Life>,
}

/// What the client knows of the life that it goes through.
#[derive(Clone, Default)]
struct Life {
    config: Value,
    pod: Value,
    container: Value,
}

impl PodClient {
    pub fn new(cri: Cri) -> Self {
        Self {
            cri,
            life: Mutex::default(),
        }
    }

    fn life(&self) -> Life {
        lock(&self.life).clone()
    }

    fn call(&self, method: &str, request: &Value) -> Result<Value, Told> {
        let outcome = self.cri.try_call(method, request);
        let outcome = outcome.map_err(|error| Told::Wrong(error.to_string()))?;
        if outcome.status.success() {
            return Ok(serde_json::from_str(&outcome.stdout)?);
        }
        let said = outcome.stderr.trim().to_owned();
        Err(match said.contains("DEADLINE_EXCEEDED") {
            true => Told::Wrong(said),
            false => Told::Failure(said),
        })
    }

    fn of_pod(&self, method: &str) -> Result<Value, Told> {
        self.call(method, &json!({"pod_sandbox_id": self.life().pod}))
    }

    fn of_container(&self, method: &str) -> Result<Value, Told> {
        self.call(method, &json!({"container_id": self.life().container}))
    }

    fn run_pod(&self) -> Result<(), Told> {
        let request = self.cri.run_request(&self.life().config);
        let response = self.call("RunPodSandbox", &request)?;
        lock(&self.life).pod = response["pod_sandbox_id"].clone();
        Ok(())
    }

    fn create(&self) -> Result<(), Told> {
        let life = self.life();
        let request = create_request(&life.pod, &life.config, "main", SERVICE);
        let response = self.call("CreateContainer", &request)?;
        lock(&self.life).container = response["container_id"].clone();
        Ok(())
    }

    fn execute(&self, victim: Option<Victim>) -> Result<(), Told> {
        let request = json!({
            "container_id": self.life().container, "cmd": ["sh", "-c", EXEC], "timeout": 60,
        });
        let response = self.call("ExecSync", &request)?;
        // 0 is not written out.
        let code = response["exit_code"].as_i64().unwrap_or_default();
        exec_told(i32::try_from(code)?, victim)
    }

    fn stop(&self, codes: &[i32], victim: Option<Victim>) -> Result<(), Told> {
        let request = json!({"container_id": self.life().container, "timeout": 30});
        self.call("StopContainer", &request)?;
        if victim == Some(Victim::Shim) {
            // The daemon says yes for a shim that is gone, and notes the end when it learns of it.
            self.wait_for_end()?;
        }
        self.has_ended_with(codes)
    }

    fn wait_for_end(&self) -> Result<(), Told> {
        let ended = eventually(scaled(SETTLED), || {
            let status = self.status().map_err(|told| told.text())?;
            ensure!(status["state"] != RUNNING, "it is {status}");
            Ok(())
        });
        ended.map_err(|reason| Told::Wrong(format!("it does not end: {reason}")))
    }

    fn status(&self) -> Result<Value, Told> {
        Ok(self.of_container("ContainerStatus")?["status"].clone())
    }

    fn has_ended_with(&self, codes: &[i32]) -> Result<(), Told> {
        let status = self.status()?;
        let code = status["exit_code"].as_i64().unwrap_or_default();
        if status["state"] == EXITED && codes.contains(&i32::try_from(code)?) {
            return Ok(());
        }
        Err(Told::Wrong(format!("the container is {status}")))
    }

    /// What has been made is as it was, behind a restart of the daemon.
    fn has_stayed(&self, step: &str) -> Result<(), Told> {
        match step {
            CREATE | START => {
                let status = self.of_pod("PodSandboxStatus")?;
                match state_of(&status) {
                    READY => Ok(()),
                    _ => Err(Told::Wrong(format!("the pod is {status}"))),
                }
            }
            EXECUTE => {
                self.execute(None)?;
                self.stop(&[EXIT_CODE], None)?;
                self.of_container("RemoveContainer")?;
                self.of_pod("StopPodSandbox")?;
                self.of_pod("RemovePodSandbox").map(drop)
            }
            STOP => self.stop(&[EXIT_CODE], None),
            _ => Ok(()),
        }
    }

    /// A container whose sandbox, or whose own first process has been killed, has ended.
    fn has_ended(&self, step: &str, victim: Victim) -> Result<(), Told> {
        if ![EXECUTE, STOP].contains(&step) {
            return Ok(());
        }
        self.wait_for_end()?;
        self.has_ended_with(&ended_codes(victim, step == STOP))
    }
}

impl Client for PodClient {
    fn steps(&self) -> &'static [&'static str] {
        STEPS
    }

    fn begin(&self, life: &str) {
        let logs = self.cri.world().dir().join(format!("{life}-logs"));
        // There from an earlier life if that seed is drawn twice.
        let _ = fs::create_dir(&logs);
        *lock(&self.life) = Life {
            config: self.cri.pod_config(life, &logs),
            ..Life::default()
        };
    }

    fn take(&self, step: &str, victim: Option<Victim>) -> Result<(), Told> {
        match step {
            RUN_POD => self.run_pod(),
            CREATE => self.create(),
            START => self.of_container("StartContainer").map(drop),
            EXECUTE => self.execute(victim),
            STOP => self.stop(stopped_codes(victim), victim),
            REMOVE => self.of_container("RemoveContainer").map(drop),
            STOP_POD => self.of_pod("StopPodSandbox").map(drop),
            _ => self.of_pod("RemovePodSandbox").map(drop),
        }
    }

    fn go_on(&self, step: &str, victim: Victim) -> Result<(), Told> {
        match victim {
            Victim::Containerd => self.has_stayed(step),
            _ => self.has_ended(step, victim),
        }
    }

    fn clean_up(&self) -> Claim {
        eventually(LIMIT, || {
            let pods = self.cri.call("ListPodSandbox", &json!({}))?;
            for pod in pods["items"].as_array().into_iter().flatten() {
                let request = json!({"pod_sandbox_id": pod["id"]});
                self.cri.call("StopPodSandbox", &request)?;
                self.cri.call("RemovePodSandbox", &request)?;
            }
            for list in [
                ("ListPodSandbox", "items"),
                ("ListContainers", "containers"),
            ] {
                let (method, field) = list;
                let listed = self.cri.call(method, &json!({}))?;
                ensure_eq!(listed[field], Value::Null, "{method}");
            }
            Ok(())
        })
    }

    fn restart(&self) -> Claim {
        self.cri.restart()
    }

    fn world(&self) -> &World {
        self.cri.world()
    }
}
