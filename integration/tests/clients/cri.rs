//! The Kubernetes Container Runtime Interface of containerd, as a kubelet calls it, with our shim behind the runtime
//! handler.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use integration::{
    Claim, Model, Outcome, Output, World, ensure, ensure_eq, eventually, finish, write_image,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::containerd::{LIMIT, SOCKET, configuration, daemon_of, pids_of};
use crate::{BOTH, CONTAINER, Entry, IMAGE, Reason, Start};

/// The image of a sandbox: it only waits.
const PAUSE: &str = "localhost/rt-pause:latest";

/// The states of a container.
pub const RUNNING: i64 = 1;
pub const EXITED: i64 = 2;

/// The state of a sandbox that runs.
pub const READY: i64 = 0;

/// The namespaces of the node, and of the pod.
const POD: i64 = 0;
const NODE: i64 = 2;

pub const CLAIMS: &[Entry<Cri>] = &[
    Entry::essential("a_pod_lives_through_its_life", a_pod_lives_through_its_life),
    Entry::essential("a_pods_containers_share", a_pods_containers_share),
    Entry::essential("a_pod_has_a_network", a_pod_has_a_network),
    Entry::essential("a_container_is_out_of_memory", a_container_is_out_of_memory),
    Entry::essential(
        "a_container_that_cannot_be_is_explained",
        a_container_that_cannot_be_is_explained,
    ),
    Entry::further("streams_are_followed", BOTH, streams_are_followed),
    Entry::further("a_port_is_forwarded", CONTAINER, a_port_is_forwarded),
];

/// What holds where containerd makes the sandbox. Where the shim does, containerd 2.1 itself panics at such a pod.
pub const NODE_CLAIMS: &[Entry<Cri>] = &[Entry::further(
    "a_pod_on_the_nodes_network",
    CONTAINER,
    a_pod_on_the_nodes_network,
)];

/// The networks of pods, as an administrator sets them up: a bridge, and ports of the node that lead to a pod.
fn network(data: &Path) -> Value {
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "rt-cni0",
                "isGateway": true,
                "ipam": {
                    "type": "host-local",
                    "subnet": "10.97.0.0/24",
                    "routes": [{"dst": "0.0.0.0/0"}],
                    "dataDir": data,
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

/// Who makes a pod's sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sandboxer {
    /// containerd, from an image.
    Containerd,
    /// Our shim.
    Shim,
}

/// The daemon with its CRI service.
pub struct Cri {
    start: Start,
    sandboxer: Sandboxer,
    client: PathBuf,
    config: PathBuf,
    daemon: Mutex<Option<Output>>,
}

/// Starts the containerd that is installed.
pub fn start(start: Start) -> Result<Cri, Reason> {
    start_with(start, Sandboxer::Containerd)
}

/// Starts containerd 2.
pub fn start_second(mut start: Start) -> Result<Cri, Reason> {
    start.world.prefer_programs_in(&second());
    start_with(start, Sandboxer::Containerd)
}

/// Starts containerd 2, with our shim to make the sandboxes.
pub fn start_without_image(mut start: Start) -> Result<Cri, Reason> {
    start.world.prefer_programs_in(&second());
    start_with(start, Sandboxer::Shim)
}

/// Where `integration/fetch-containerd` puts containerd 2.
fn second() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/containerd-2/usr/bin")
}

/// Why there are no claims about containerd 2, if so.
pub fn reason_not_to_run_second() -> Option<String> {
    let is_there = second().join("containerd").exists();
    (!is_there).then(|| "integration/fetch-containerd has not fetched it".to_owned())
}

fn start_with(start: Start, sandboxer: Sandboxer) -> Result<Cri, Reason> {
    let world = &start.world;
    let handlers = world.dir().join("conf.d");
    let networks = world.dir().join("networks");
    fs::create_dir(&networks)?;
    let pods = network(&world.dir().join("addresses"));
    fs::write(networks.join("pods.conflist"), pods.to_string())?;
    let imports = format!("imports = [\"{}/*.toml\"]\n", handlers.display());
    let settings = format!(
        "{imports}\
         disabled_plugins = [\"io.containerd.internal.v1.opt\"]\n\
         [plugins.\"io.containerd.grpc.v1.cri\"]\n\
         restrict_oom_score_adj = true\n\
         disable_hugetlb_controller = true\n\
         sandbox_image = \"{PAUSE}\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\n\
         bin_dir = \"/usr/lib/cni\"\n\
         conf_dir = \"{}\"\n",
        networks.display()
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
    if sandboxer == Sandboxer::Shim {
        install.args(["--sandboxer", "shim"]);
    }
    finish(&mut install, None)?.success()?;
    let daemon = daemon_of(world, &config)?;
    let mut images = vec![start.image.clone()];
    if sandboxer == Sandboxer::Containerd {
        let pause = world.dir().join("pause.tar");
        write_image(&pause, PAUSE, &["/bin/sleep", "1000000"], world.dir())?;
        images.push(pause);
    }
    for image in images {
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
        sandboxer,
        client,
        config,
        daemon: Mutex::new(Some(daemon)),
    })
}

impl Cri {
    pub fn world(&self) -> &World {
        &self.start.world
    }

    /// The same in a world of its own.
    pub fn another(&self, name: &str) -> Result<Self, Reason> {
        let start = self.start.another(name)?;
        match self.sandboxer {
            Sandboxer::Containerd => start_second(start),
            Sandboxer::Shim => start_without_image(start),
        }
    }

    /// Kills the daemon and starts it anew.
    pub fn restart(&self) -> Claim {
        let mut running = self.daemon.lock().map_err(|error| error.to_string())?;
        for pid in pids_of(&["containerd", "--config", &self.config.to_string_lossy()])? {
            kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        }
        *running = None;
        *running = Some(daemon_of(self.world(), &self.config)?);
        Ok(())
    }

    pub fn try_call(&self, method: &str, request: &Value) -> Result<Outcome, Reason> {
        let mut command = self.world().command("/usr/bin/python3");
        // Without a cache of bytecode in the sources.
        command.arg("-B").arg(&self.client).args([SOCKET, method]);
        Ok(finish(
            &mut command,
            Some(request.to_string().into_bytes()),
        )?)
    }

    pub fn call(&self, method: &str, request: &Value) -> Result<Value, Reason> {
        let response = self.try_call(method, request)?.success()?.stdout;
        Ok(serde_json::from_str(&response)?)
    }

    /// Runs a pod.
    pub fn pod(&self, name: &str) -> Result<Pod<'_>, Reason> {
        self.pod_on(name, POD, &json!([]))
    }

    /// The configuration of a pod.
    pub fn pod_config(&self, name: &str, logs: &Path) -> Value {
        self.config_on(name, logs, POD, &json!([]))
    }

    fn config_on(&self, name: &str, logs: &Path, network: i64, ports: &Value) -> Value {
        json!({
            "metadata": {"name": name, "uid": name, "namespace": "default"},
            "hostname": if network == POD { name } else { "" },
            "log_directory": logs,
            "dns_config": {"servers": ["10.97.0.53"], "searches": ["svc.test"]},
            "port_mappings": ports,
            "linux": {
                "cgroup_parent": format!("/{}", self.world().cgroup()),
                "security_context": {"namespace_options": {"network": network, "pid": POD}},
            },
        })
    }

    /// What asks for a pod with this configuration.
    pub fn run_request(&self, config: &Value) -> Value {
        let handler = match self.start.model {
            Model::Container => "rt",
            Model::Microvm => "rt-microvm",
        };
        json!({"config": config, "runtime_handler": handler})
    }

    /// Runs a pod on a network of its own or the node's, with ports of the node that lead to it.
    fn pod_on(&self, name: &str, network: i64, ports: &Value) -> Result<Pod<'_>, Reason> {
        let logs = self.world().dir().join(format!("{name}-logs"));
        fs::create_dir(&logs)?;
        let config = self.config_on(name, &logs, network, ports);
        let request = self.run_request(&config);
        let id = self.call("RunPodSandbox", &request)?["pod_sandbox_id"].clone();
        Ok(Pod {
            cri: self,
            id: id.as_str().unwrap_or_default().to_owned(),
            config,
            logs,
        })
    }
}

/// What asks for a container of a pod that has this configuration.
pub fn create_request(pod: &Value, config: &Value, name: &str, script: &str) -> Value {
    let namespaces = &config["linux"]["security_context"]["namespace_options"];
    json!({
        "pod_sandbox_id": pod,
        "sandbox_config": config,
        "config": {
            "metadata": {"name": name},
            "image": {"image": IMAGE},
            "command": ["/bin/sh", "-c", script],
            "log_path": format!("{name}.log"),
            "linux": {
                "resources": {"memory_limit_in_bytes": 64 << 20, "cpu_shares": 512},
                "security_context": {"namespace_options": namespaces},
            },
        },
    })
}

/// The state of a sandbox; the first of them is not written out.
pub fn state_of(status: &Value) -> i64 {
    status["status"]["state"].as_i64().unwrap_or(READY)
}

/// A pod that runs.
pub struct Pod<'a> {
    cri: &'a Cri,
    pub id: String,
    config: Value,
    logs: PathBuf,
}

impl Pod<'_> {
    fn create(&self, name: &str, script: &str, extra: &Value) -> Result<Value, Reason> {
        let pod = self.id.as_str().into();
        let mut request = create_request(&pod, &self.config, name, script);
        let config = request["config"].as_object_mut();
        if let (Some(config), Some(extra)) = (config, extra.as_object()) {
            config.extend(extra.clone());
        }
        let created = self.cri.call("CreateContainer", &request)?;
        Ok(created["container_id"].clone())
    }

    pub fn run(&self, name: &str, script: &str, extra: &Value) -> Result<Value, Reason> {
        let id = self.create(name, script, extra)?;
        self.cri
            .call("StartContainer", &json!({"container_id": id}))?;
        Ok(id)
    }

    pub fn exec(&self, id: &Value, script: &str) -> Result<Value, Reason> {
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
    pub fn wait_for_end(&self, id: &Value) -> Result<Value, Reason> {
        eventually(LIMIT, || {
            ensure_eq!(self.status(id)?["state"], EXITED, "state");
            Ok(())
        })?;
        self.status(id)
    }

    /// Ends the pod with all that is in it; nothing is left.
    pub fn remove(self) -> Claim {
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
        let state = format!("/run/containerd/rt/k8s.io/{}", self.id);
        ensure!(
            !fs::exists(self.cri.world().path(&state))?,
            "{state} is left"
        );
        Ok(())
    }

    /// The process that stands for the sandbox.
    pub fn sandbox_process(&self) -> Result<Pid, Reason> {
        let cgroups = self.cri.world().cgroups();
        let mut own = cgroups.iter().filter(|path| path.ends_with(&self.id));
        let pid = own.find_map(|path| {
            let pids = fs::read_to_string(path.join("cgroup.procs")).ok()?;
            pids.lines().next()?.parse().ok()
        });
        Ok(Pid::from_raw(
            pid.ok_or("no process in the sandbox's cgroup")?,
        ))
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
    let waits = match cri.sandboxer {
        Sandboxer::Containerd => "/bin/sleep 1000000 ",
        Sandboxer::Shim => "/pause ",
    };
    ensure_eq!(first["stdout"], waits, "process 1");
    let namespace = |id: &Value, kind: &str| -> Result<String, Reason> {
        let link = pod.exec(id, &format!("readlink /proc/self/ns/{kind}"))?;
        Ok(link["stdout"].as_str().unwrap_or_default().to_owned())
    };
    for kind in ["pid", "ipc", "net", "uts"] {
        ensure_eq!(namespace(&one, kind)?, namespace(&two, kind)?, "{kind}");
    }
    ensure!(
        namespace(&one, "mnt")? != namespace(&two, "mnt")?,
        "one mount namespace"
    );
    // One server with its worker for the sandbox and both containers. In a machine each of these has a process of the
    // worker that stands for it.
    let stand_ins = if cri.start.model == Model::Microvm {
        2
    } else {
        0
    };
    ensure_eq!(
        pids_of(&["-id", &pod.id, "serve"])?.len(),
        2 + stand_ins,
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

fn a_pod_has_a_network(cri: &Cri) -> Claim {
    let ports = json!([{"container_port": 80, "host_port": 18090}]);
    let pod = cri.pod_on("web", POD, &ports)?;
    let status = cri.call("PodSandboxStatus", &json!({"pod_sandbox_id": pod.id}))?;
    let address = status["status"]["network"]["ip"]
        .as_str()
        .unwrap_or_default();
    ensure!(address.starts_with("10.97.0."), "address: {status}");
    let script =
        "mkdir /tmp/web; echo served > /tmp/web/index.html; exec httpd -f -p 80 -h /tmp/web";
    pod.run("server", script, &json!({}))?;
    let fetch = |url: &str| -> Claim {
        let mut fetch = cri.world().command("busybox");
        let page = finish(fetch.args(["wget", "-q", "-O", "-", url]), None)?;
        ensure_eq!(page.success()?.stdout, "served\n", "{url}");
        Ok(())
    };
    eventually(LIMIT, || fetch(&format!("http://{address}/")))?;
    let node = "10.97.0.1";
    fetch(&format!("http://{node}:18090/"))?;
    // The pod's containers share it, and reach what is outside.
    let other = pod.run("client", "while :; do sleep 0.1; done", &json!({}))?;
    let script = r"printf 'GET / HTTP/1.0\r\n\r\n' | nc 127.0.0.1 80 | tail -n 1;
        ping -q -c 1 -w 20 10.97.0.1 > /dev/null; echo $?";
    let own = pod.exec(&other, script)?;
    ensure_eq!(own["stdout"], "served\n0\n", "from inside");
    pod.remove()
}

/// A machine would take the network away from the node: docs/parity.md.
fn a_pod_on_the_nodes_network(cri: &Cri) -> Claim {
    let pod = cri.pod_on("node", NODE, &json!([]))?;
    let id = pod.run("main", "while :; do sleep 0.1; done", &json!({}))?;
    let inside = pod.exec(&id, "readlink /proc/self/ns/net")?;
    let node = fs::read_link(cri.world().path("/proc/1/ns/net"))?;
    let inside = inside["stdout"]
        .as_str()
        .unwrap_or_default()
        .trim()
        .to_owned();
    ensure_eq!(inside, node.to_string_lossy(), "network namespace");
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

fn streams_are_followed(cri: &Cri) -> Claim {
    let pod = cri.pod("streams")?;
    let script = "read line; echo \"got $line\"; echo err >&2; exit 4";
    let id = pod.run("main", script, &json!({"stdin": true, "stdin_once": true}))?;
    let exec = |command: &str, more: Value| -> Result<Value, Reason> {
        let command = ["sh", "-c", command];
        let mut request =
            json!({"container_id": id, "cmd": command, "stdin": true, "stdout": true});
        if let (Some(request), Some(more)) = (request.as_object_mut(), more.as_object()) {
            request.extend(more.clone());
        }
        cri.call("Exec", &request)
    };
    let script = "read line; echo \"out $line\"; echo err >&2; exit 3";
    let came = exec(script, json!({"stderr": true, "input": "in\n"}))?;
    ensure_eq!(came["stdout"], "out in\n", "stdout of exec");
    ensure_eq!(came["stderr"], "err\n", "stderr of exec");
    let status: Value = serde_json::from_str(came["error"].as_str().unwrap_or_default())?;
    let cause = &status["details"]["causes"][0];
    ensure_eq!(cause["message"], "3", "exit code of exec: {status}");

    // The size may be told when it runs already.
    let script = "until stty size | grep '33 101'; do sleep 0.1; done";
    let size = json!({"Width": 101, "Height": 33});
    let came = exec(script, json!({"tty": true, "size": size}))?;
    let shown = came["stdout"].as_str().unwrap_or_default();
    ensure!(shown.ends_with("33 101\r\n"), "size: {came}");

    let request = json!({
        "container_id": id, "stdin": true, "stdout": true, "stderr": true, "input": "typed\n",
    });
    let came = cri.call("Attach", &request)?;
    ensure_eq!(came["stdout"], "got typed\n", "stdout of attach");
    ensure_eq!(came["stderr"], "err\n", "stderr of attach");
    ensure_eq!(pod.wait_for_end(&id)?["exit_code"], 4, "exit code");
    pod.remove()
}

/// containerd connects to the pod's loopback interface on the host, which a machine has not: docs/parity.md.
fn a_port_is_forwarded(cri: &Cri) -> Claim {
    let pod = cri.pod("forwarded")?;
    let script =
        "mkdir /tmp/web; echo served > /tmp/web/index.html; exec httpd -f -p 80 -h /tmp/web";
    pod.run("server", script, &json!({}))?;
    let request = json!({
        "pod_sandbox_id": pod.id, "port": [80], "input": "GET / HTTP/1.0\r\n\r\n", "until": "served\n",
    });
    eventually(LIMIT, || {
        let came = cri.call("PortForward", &request)?;
        let page = came["stdin"].as_str().unwrap_or_default();
        ensure!(page.ends_with("served\n"), "page: {came}");
        Ok(())
    })?;
    pod.remove()
}
