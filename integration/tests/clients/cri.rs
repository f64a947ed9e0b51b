//! The Kubernetes Container Runtime Interface of containerd, as a kubelet calls it, with our shim behind the runtime
//! handler.

use std::fs;
use std::path::{Path, PathBuf};

use integration::{
    Claim, Outcome, Output, World, ensure, ensure_eq, eventually, finish, write_image,
};
use serde_json::{Value, json};

use crate::containerd::{LIMIT, SOCKET, configuration, daemon_of, pids_of};
use crate::{CONTAINER, Entry, IMAGE, Reason, Start};

/// The image of a sandbox: it only waits.
const PAUSE: &str = "localhost/rt-pause:latest";

/// The states of a container.
const RUNNING: i64 = 1;
const EXITED: i64 = 2;

/// The namespaces of the node, and of the pod.
const POD: i64 = 0;
const NODE: i64 = 2;

// A machine has no network yet that a pod could share: docs/parity.md.
pub const CLAIMS: &[Entry<Cri>] = &[
    Entry::further(
        "a_pod_lives_through_its_life",
        CONTAINER,
        a_pod_lives_through_its_life,
    ),
    Entry::further(
        "a_pods_containers_share",
        CONTAINER,
        a_pods_containers_share,
    ),
    Entry::further(
        "a_container_is_out_of_memory",
        CONTAINER,
        a_container_is_out_of_memory,
    ),
    Entry::further(
        "a_container_that_cannot_be_is_explained",
        CONTAINER,
        a_container_that_cannot_be_is_explained,
    ),
];

/// The daemon with its CRI service.
pub struct Cri {
    start: Start,
    client: PathBuf,
    _daemon: Output,
}

pub fn start(start: Start) -> Result<Cri, Reason> {
    let world = &start.world;
    let handlers = world.dir().join("conf.d");
    let imports = format!("imports = [\"{}/*.toml\"]\n", handlers.display());
    let settings = format!(
        "{imports}\
         disabled_plugins = [\"io.containerd.internal.v1.opt\"]\n\
         [plugins.\"io.containerd.grpc.v1.cri\"]\n\
         restrict_oom_score_adj = true\n\
         disable_hugetlb_controller = true\n\
         sandbox_image = \"{PAUSE}\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\n\
         conf_dir = \"/run/no-networks\"\n"
    );
    // As an administrator does it: containerd's configuration, in the form of its version, then the handlers.
    let config = world.dir().join("containerd.toml");
    fs::write(&config, configuration(&settings))?;
    let mut migrate = world.command("containerd");
    migrate
        .arg("--config")
        .arg(&config)
        .args(["config", "migrate"]);
    let migrated = finish(&mut migrate, None)?;
    // Version 1 knows no other form and has no such command.
    if migrated.status.success() && migrated.stdout.contains("version = 3") {
        fs::write(&config, &migrated.stdout)?;
    }
    let mut install = world.command(&start.runtime);
    install
        .args(["install", "containerd", "--config"])
        .arg(&config);
    install.arg("--dir").arg(&handlers);
    finish(&mut install, None)?.success()?;
    let daemon = daemon_of(world, &config)?;
    let pause = world.dir().join("pause.tar");
    write_image(&pause, PAUSE, &["/bin/sleep", "1000000"], world.dir())?;
    for image in [&pause, &start.image] {
        let mut import = world.command("ctr");
        import.args([
            "--address",
            SOCKET,
            "--namespace",
            "k8s.io",
            "images",
            "import",
        ]);
        finish(import.arg(image), None)?.success()?;
    }
    let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/cri_client.py");
    Ok(Cri {
        start,
        client,
        _daemon: daemon,
    })
}

impl Cri {
    fn world(&self) -> &World {
        &self.start.world
    }

    fn try_call(&self, method: &str, request: &Value) -> Result<Outcome, Reason> {
        let mut command = self.world().command("/usr/bin/python3");
        command.arg(&self.client).args([SOCKET, method]);
        Ok(finish(
            &mut command,
            Some(request.to_string().into_bytes()),
        )?)
    }

    fn call(&self, method: &str, request: &Value) -> Result<Value, Reason> {
        let response = self.try_call(method, request)?.success()?.stdout;
        Ok(serde_json::from_str(&response)?)
    }

    /// Runs a pod on the node's network.
    fn pod(&self, name: &str) -> Result<Pod<'_>, Reason> {
        let logs = self.world().dir().join(format!("{name}-logs"));
        fs::create_dir(&logs)?;
        let config = json!({
            "metadata": {"name": name, "uid": name, "namespace": "default"},
            "log_directory": logs,
            "linux": {
                "cgroup_parent": format!("/{}", self.world().cgroup()),
                "security_context": {"namespace_options": {"network": NODE, "pid": POD}},
            },
        });
        let request = json!({"config": config, "runtime_handler": "rt"});
        let id = self.call("RunPodSandbox", &request)?["pod_sandbox_id"].clone();
        Ok(Pod {
            cri: self,
            id: id.as_str().unwrap_or_default().to_owned(),
            config,
            logs,
        })
    }
}

/// A pod that runs.
struct Pod<'a> {
    cri: &'a Cri,
    id: String,
    config: Value,
    logs: PathBuf,
}

impl Pod<'_> {
    fn create(&self, name: &str, script: &str, extra: &Value) -> Result<Value, Reason> {
        let mut config = json!({
            "metadata": {"name": name},
            "image": {"image": IMAGE},
            "command": ["/bin/sh", "-c", script],
            "log_path": format!("{name}.log"),
            "linux": {
                "resources": {"memory_limit_in_bytes": 64 << 20, "cpu_shares": 512},
                "security_context": {"namespace_options": {"network": NODE, "pid": POD}},
            },
        });
        if let (Some(config), Some(extra)) = (config.as_object_mut(), extra.as_object()) {
            config.extend(extra.clone());
        }
        let request = json!({
            "pod_sandbox_id": self.id, "config": config, "sandbox_config": self.config,
        });
        let created = self.cri.call("CreateContainer", &request)?;
        Ok(created["container_id"].clone())
    }

    fn run(&self, name: &str, script: &str, extra: &Value) -> Result<Value, Reason> {
        let id = self.create(name, script, extra)?;
        self.cri
            .call("StartContainer", &json!({"container_id": id}))?;
        Ok(id)
    }

    fn exec(&self, id: &Value, script: &str) -> Result<Value, Reason> {
        let command = ["sh", "-c", script];
        let request = json!({"container_id": id, "cmd": command, "timeout": 60});
        self.cri.call("ExecSync", &request)
    }

    fn status(&self, id: &Value) -> Result<Value, Reason> {
        let status = self
            .cri
            .call("ContainerStatus", &json!({"container_id": id}))?;
        Ok(status["status"].clone())
    }

    /// Waits for the end of a container; returns its status.
    fn wait_for_end(&self, id: &Value) -> Result<Value, Reason> {
        eventually(LIMIT, || {
            ensure_eq!(self.status(id)?["state"], EXITED, "state");
            Ok(())
        })?;
        self.status(id)
    }

    /// Ends the pod with all that is in it; nothing is left.
    fn remove(self) -> Claim {
        let request = json!({"pod_sandbox_id": self.id});
        self.cri.call("StopPodSandbox", &request)?;
        self.cri.call("RemovePodSandbox", &request)?;
        let left: Vec<_> = self.cri.world().cgroups().into_iter().collect();
        let left: Vec<_> = left
            .iter()
            .filter(|path| path.ends_with(&self.id))
            .collect();
        ensure!(left.is_empty(), "cgroups are left: {left:?}");
        let shims = pids_of(&["-id", &self.id, "serve"])?;
        ensure!(shims.len() < 3, "shims are left: {shims:?}");
        let mounts = fs::read_to_string(self.cri.world().path("/proc/1/mountinfo"))?;
        ensure!(!mounts.contains(&self.id), "mounts are left: {mounts}");
        Ok(())
    }
}

fn a_pod_lives_through_its_life(cri: &Cri) -> Claim {
    let pod = cri.pod("life")?;
    let volume = cri.world().dir().join("life-volume");
    fs::create_dir(&volume)?;
    let mounts = json!({"mounts": [{"container_path": "/data", "host_path": volume}]});
    let script = "echo out; echo err >&2; echo made > /data/made; \
        trap 'exit 5' TERM; while :; do sleep 0.1; done";
    let id = pod.run("main", script, &mounts)?;
    ensure_eq!(pod.status(&id)?["state"], RUNNING, "state");

    let executed = pod.exec(&id, "cat /data/made; echo bad >&2; exit 3")?;
    ensure_eq!(executed["exit_code"], 3, "exit code of exec");
    ensure_eq!(executed["stdout"], "made\n", "stdout of exec");
    ensure_eq!(executed["stderr"], "bad\n", "stderr of exec");

    let stats = cri.call("ContainerStats", &json!({"container_id": id}))?;
    let usage = stats["stats"]["memory"]["usage_bytes"]["value"].as_str();
    let usage: u64 = usage.unwrap_or_default().parse()?;
    ensure!((1..64 << 20).contains(&usage), "memory: {stats}");
    let update = json!({"container_id": id, "linux": {"memory_limit_in_bytes": 48 << 20}});
    cri.call("UpdateContainerResources", &update)?;

    cri.call("StopContainer", &json!({"container_id": id, "timeout": 30}))?;
    let status = pod.status(&id)?;
    ensure_eq!(status["state"], EXITED, "state: {status}");
    ensure_eq!(status["exit_code"], 5, "exit code: {status}");
    let log = fs::read_to_string(pod.logs.join("main.log"))?;
    ensure!(log.contains("stdout F out"), "log: {log}");
    ensure!(log.contains("stderr F err"), "log: {log}");
    cri.call("RemoveContainer", &json!({"container_id": id}))?;
    pod.remove()
}

fn a_pods_containers_share(cri: &Cri) -> Claim {
    let pod = cri.pod("shared")?;
    let wait = "while :; do sleep 0.1; done";
    let one = pod.run("one", wait, &json!({}))?;
    let two = pod.run("two", wait, &json!({}))?;
    // The sandbox's first process is process 1 of all of them.
    let first = pod.exec(&two, "tr '\\0' ' ' < /proc/1/cmdline")?;
    ensure_eq!(first["stdout"], "/bin/sleep 1000000 ", "process 1");
    let namespace = |id: &Value, kind: &str| -> Result<String, Reason> {
        let link = pod.exec(id, &format!("readlink /proc/self/ns/{kind}"))?;
        Ok(link["stdout"].as_str().unwrap_or_default().to_owned())
    };
    for kind in ["pid", "ipc"] {
        ensure_eq!(namespace(&one, kind)?, namespace(&two, kind)?, "{kind}");
    }
    ensure!(
        namespace(&one, "mnt")? != namespace(&two, "mnt")?,
        "one mount namespace"
    );
    // One server with its worker for the sandbox and both containers.
    ensure_eq!(
        pids_of(&["-id", &pod.id, "serve"])?.len(),
        2,
        "processes of the shim"
    );
    for id in [&one, &two] {
        let id = id.as_str().unwrap_or_default();
        ensure!(
            pids_of(&["-id", id, "serve"])?.is_empty(),
            "a shim for {id}"
        );
    }
    pod.remove()
}

fn a_container_is_out_of_memory(cri: &Cri) -> Claim {
    let pod = cri.pod("hungry")?;
    let id = pod.run("main", "tail /dev/zero", &json!({}))?;
    let status = pod.wait_for_end(&id)?;
    ensure_eq!(status["exit_code"], 137, "exit code: {status}");
    ensure_eq!(status["reason"], "OOMKilled", "reason: {status}");
    pod.remove()
}

fn a_container_that_cannot_be_is_explained(cri: &Cri) -> Claim {
    let pod = cri.pod("wrong")?;
    let id = pod.create("main", "true", &json!({"command": ["/no/such/program"]}))?;
    let outcome = cri.try_call("StartContainer", &json!({"container_id": id}))?;
    ensure!(
        outcome
            .stderr
            .contains("exec: \"/no/such/program\": stat /no/such/program"),
        "error: {}",
        outcome.stderr
    );
    pod.remove()
}
