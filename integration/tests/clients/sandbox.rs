//! Pods whose sandbox our shim makes itself (`sandboxer = "shim"` of containerd 2), without an image.

use std::fs;

use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest,
    SandboxStatusRequest, WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_sync::SandboxClient;
use containerd_shim_protos::ttrpc::{self, Client, Code};
use containerd_shim_protos::types::mount::Mount;
use integration::{Claim, ensure, ensure_eq, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::containerd::{LIMIT, pids_of};
use crate::cri::{Cri, READY, state_of};
use crate::{BOTH, Entry};

pub const CLAIMS: &[Entry<Cri>] = &[
    Entry::essential(
        "a_pods_containers_have_its_files",
        a_pods_containers_have_its_files,
    ),
    Entry::further("the_service_answers", BOTH, the_service_answers),
    Entry::further("a_pod_outlives_containerd", BOTH, a_pod_outlives_containerd),
    Entry::further(
        "a_sandbox_that_ends_is_not_ready",
        BOTH,
        a_sandbox_that_ends_is_not_ready,
    ),
    Entry::further(
        "a_killed_shim_leaves_nothing",
        BOTH,
        a_killed_shim_leaves_nothing,
    ),
];

const NOT_READY: i64 = 1;

fn a_pods_containers_have_its_files(cri: &Cri) -> Claim {
    let pod = cri.pod("files")?;
    let wait = "while :; do sleep 0.1; done";
    let one = pod.run("one", wait, &json!({}))?;
    let two = pod.run("two", wait, &json!({}))?;
    let script = "cat /etc/hostname; hostname; cat /etc/resolv.conf; grep -c localhost /etc/hosts > /dev/null; echo $?;
        echo shared > /dev/shm/file; cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
    let shown = pod.exec(&one, script)?;
    let expected = "files\nfiles\nsearch svc.test\nnameserver 10.97.0.53\n0\n0\n";
    ensure_eq!(shown["stdout"], expected, "files of the pod");
    let shown = pod.exec(&two, "cat /dev/shm/file")?;
    ensure_eq!(shown["stdout"], "shared\n", "shared memory");
    pod.remove()
}

fn the_service_answers(cri: &Cri) -> Claim {
    let pod = cri.pod("asked")?;
    let bundle = "/run/containerd-state/io.containerd.sandbox.controller.v1.shim/k8s.io";
    let address = cri.world().path(&format!("{bundle}/{}/address", pod.id));
    let address = fs::read_to_string(address)?;
    let socket = address.strip_prefix("unix://").ok_or("no path socket")?;
    let socket = cri.world().path(socket);
    let client = SandboxClient::new(Client::connect(&format!("unix://{}", socket.display()))?);
    let limit = || ttrpc::context::with_duration(LIMIT);
    let code = |error: ttrpc::Error| match error {
        ttrpc::Error::RpcStatus(status) => status.code.enum_value().ok(),
        _ => None,
    };

    let platform = client.platform(limit(), &PlatformRequest::new())?.platform;
    ensure_eq!(platform.os, "linux", "platform");
    let mut status = SandboxStatusRequest::new();
    status.sandbox_id = pod.id.clone();
    let status = client.sandbox_status(limit(), &status)?;
    ensure_eq!(status.state, "SANDBOX_READY", "state");
    ensure!(status.pid > 0 && status.created_at.is_some(), "{status:?}");
    let mut metrics = SandboxMetricsRequest::new();
    metrics.sandbox_id = pod.id.clone();
    let metrics = client.sandbox_metrics(limit(), &metrics)?.metrics;
    let kind = &metrics.data.type_url;
    ensure!(kind.starts_with("io.containerd.cgroups.v"), "type {kind:?}");
    ensure!(!metrics.data.value.is_empty(), "no metrics");

    let mut ping = PingRequest::new();
    ping.sandbox_id = pod.id.clone();
    client.ping_sandbox(limit(), &ping)?;
    ping.sandbox_id = "another".to_owned();
    let refused = client.ping_sandbox(limit(), &ping).err().and_then(code);
    ensure_eq!(refused, Some(Code::NOT_FOUND), "ping of another");
    let mut wait = WaitSandboxRequest::new();
    wait.sandbox_id = "another".to_owned();
    let refused = client.wait_sandbox(limit(), &wait).err().and_then(code);
    ensure_eq!(refused, Some(Code::NOT_FOUND), "wait for another");

    // What cannot be made leaves the sandbox that is there as it is.
    let mut create = CreateSandboxRequest::new();
    create.sandbox_id = "another".to_owned();
    create.bundle_path = "/run".to_owned();
    let refused = client.create_sandbox(limit(), &create).err().and_then(code);
    ensure_eq!(refused, Some(Code::ALREADY_EXISTS), "a second sandbox");
    create.rootfs = vec![Mount::new()];
    let refused = client.create_sandbox(limit(), &create).err().and_then(code);
    ensure_eq!(refused, Some(Code::UNIMPLEMENTED), "a sandbox of an image");
    let id = pod.run("main", "exit 6", &json!({}))?;
    ensure_eq!(pod.wait_for_end(&id)?["exit_code"], 6, "exit code");
    pod.remove()
}

fn a_pod_outlives_containerd(cri: &Cri) -> Claim {
    let cri = cri.another("cri-2-restart")?;
    let pod = cri.pod("outlives")?;
    let id = pod.run("main", "while :; do sleep 0.1; done", &json!({}))?;
    cri.restart()?;
    let status = cri.call("PodSandboxStatus", &json!({"pod_sandbox_id": pod.id}))?;
    ensure_eq!(state_of(&status), READY, "state: {status}");
    let executed = pod.exec(&id, "echo here")?;
    ensure_eq!(executed["stdout"], "here\n", "exec");
    let other = pod.run("other", "exit 3", &json!({}))?;
    ensure_eq!(pod.wait_for_end(&other)?["exit_code"], 3, "exit code");
    pod.remove()
}

fn a_sandbox_that_ends_is_not_ready(cri: &Cri) -> Claim {
    let pod = cri.pod("ends")?;
    let id = pod.run("main", "while :; do sleep 0.1; done", &json!({}))?;
    kill(pod.sandbox_process()?, Signal::SIGKILL)?;
    eventually(LIMIT, || {
        let status = cri.call("PodSandboxStatus", &json!({"pod_sandbox_id": pod.id}))?;
        ensure_eq!(state_of(&status), NOT_READY, "state: {status}");
        Ok(())
    })?;
    // Its pid namespace, or its machine, has ended with it.
    ensure_eq!(pod.wait_for_end(&id)?["exit_code"], 137, "exit code");
    pod.remove()
}

fn a_killed_shim_leaves_nothing(cri: &Cri) -> Claim {
    let pod = cri.pod("killed")?;
    let id = pod.run("main", "while :; do sleep 0.1; done", &json!({}))?;
    for shim in pids_of(&["-id", &pod.id, "serve"])? {
        kill(Pid::from_raw(shim), Signal::SIGKILL)?;
    }
    eventually(LIMIT, || {
        let status = cri.call("PodSandboxStatus", &json!({"pod_sandbox_id": pod.id}))?;
        ensure_eq!(state_of(&status), NOT_READY, "state: {status}");
        Ok(())
    })?;
    // containerd learns it of its own lost connection, and only then lets the container be removed.
    pod.wait_for_end(&id)?;
    let state = id
        .as_str()
        .map(|id| format!("/run/containerd/rt/k8s.io/{id}"));
    let state = cri.world().path(&state.unwrap_or_default());
    ensure!(!fs::exists(&state)?, "{} is left", state.display());
    pod.remove()
}
