//! Pods, as Kubernetes' engines ask for them: containers that share a sandbox's namespaces, and in the microVM model its
//! machine. How such an engine names what belongs together: by annotations, and namespaces by the sandbox's pid.

use std::fs;

use integration::snapshot::Snapshot;
use integration::{Bundle, Claim, Fixture, ensure, ensure_eq};
use serde_json::json;

use crate::Entry;
use crate::leftovers::nothing_left;

pub const CLAIMS: &[Entry] = &[
    (
        "the_containers_of_a_pod_share_its_namespaces",
        the_containers_of_a_pod_share_its_namespaces,
    ),
    (
        "a_container_of_a_pod_lives_a_life_of_its_own",
        a_container_of_a_pod_lives_a_life_of_its_own,
    ),
    (
        "the_end_of_the_sandbox_ends_its_pod",
        the_end_of_the_sandbox_ends_its_pod,
    ),
];

/// Claims about what only a machine can refuse.
pub const MICROVM_CLAIMS: &[Entry] = &[(
    "what_a_pods_machine_cannot_have_is_refused",
    what_a_pods_machine_cannot_have_is_refused,
)];

type Reason = Box<dyn std::error::Error + Send + Sync>;

/// A sandbox that runs.
struct Pod<'a> {
    fixture: &'a Fixture,
    id: String,
    pid: i64,
}

impl<'a> Pod<'a> {
    fn start(fixture: &'a Fixture) -> Result<Self, Reason> {
        let id = fixture.id("sandbox");
        let mut bundle = fixture.bundle()?;
        bundle.spec["hostname"] = json!("the-pod");
        bundle.spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.sandbox-id": id,
        });
        bundle.args(&["/bin/sleep", "100000"]);
        fixture.start_detached(&bundle, &id)?;
        let pid = fixture.state(&id)?["pid"].as_i64().unwrap_or(0);
        Ok(Self { fixture, id, pid })
    }

    /// A container of the pod, to be edited and run.
    fn bundle(&self) -> Result<Bundle, Reason> {
        let mut bundle = self.fixture.bundle()?;
        bundle.spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": self.id,
        });
        let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut();
        for namespace in namespaces.into_iter().flatten() {
            let file = match namespace["type"].as_str() {
                Some("network") => "net",
                Some(kind @ ("ipc" | "uts" | "pid")) => kind,
                _ => continue,
            };
            namespace["path"] = json!(format!("/proc/{}/ns/{file}", self.pid));
        }
        // A hostname of its own needs a namespace of its own.
        if let Some(spec) = bundle.spec.as_object_mut() {
            spec.remove("hostname");
        }
        Ok(bundle)
    }

    fn remove(self, containers: &[&str]) -> Claim {
        for id in containers.iter().copied().chain([self.id.as_str()]) {
            self.fixture.call(&["delete", "--force", id])?.success()?;
        }
        Ok(())
    }
}

fn the_containers_of_a_pod_share_its_namespaces(fixture: &Fixture) -> Claim {
    let pod = Pod::start(fixture)?;
    let [one, two] = ["one", "two"].map(|name| fixture.id(name));
    for id in [&one, &two] {
        let mut bundle = pod.bundle()?;
        bundle.script("while :; do sleep 0.1; done");
        fixture.start_detached(&bundle, id)?;
    }
    let inside = |id: &str, script: &str| -> Result<String, Reason> {
        let outcome = fixture.call(&["exec", id, "/bin/sh", "-c", script])?;
        Ok(outcome.success()?.stdout)
    };
    for kind in ["net", "ipc", "uts", "pid", "mnt"] {
        let script = format!("readlink /proc/self/ns/{kind}");
        let [of_one, of_two] = [inside(&one, &script)?, inside(&two, &script)?];
        ensure!(
            (of_one == of_two) == (kind != "mnt"),
            "the namespaces {kind}: {of_one} and {of_two}"
        );
    }
    for id in [&pod.id, &one, &two] {
        ensure_eq!(inside(id, "hostname")?, "the-pod\n", "hostname in {id}");
    }
    // The sandbox's first process is process 1 of all of them.
    let first = inside(&two, "tr '\\0' ' ' < /proc/1/cmdline")?;
    ensure_eq!(first, "/bin/sleep 100000 ", "process 1");
    for id in [&one, &two] {
        ensure_eq!(fixture.status(id)?, "running", "status of {id}");
    }
    pod.remove(&[&one, &two])
}

fn a_container_of_a_pod_lives_a_life_of_its_own(fixture: &Fixture) -> Claim {
    let before = Snapshot::take(&fixture.state_root().to_string_lossy());
    let pod = Pod::start(fixture)?;
    let volume = fixture.dir().join("volume");
    fs::create_dir(&volume)?;
    let mut bundle = pod.bundle()?;
    bundle.bind(&volume, "/volume", &[]);
    bundle.script("cat > /volume/file; echo out; echo err >&2; exit 7");
    let outcome = fixture.run_with_input(&bundle, b"input".to_vec())?;
    outcome.expect("a container of the pod", "out\n", "err\n", 7)?;
    ensure_eq!(
        fs::read_to_string(volume.join("file"))?,
        "input",
        "the volume's file"
    );

    let id = fixture.id("long");
    let mut bundle = pod.bundle()?;
    bundle.spec["linux"]["resources"]["memory"] = json!({"limit": 48 << 20});
    bundle.script("trap 'exit 9' TERM; while :; do sleep 0.1; done");
    fixture.start_detached(&bundle, &id)?;
    let limit = fixture.call(&["exec", &id, "/bin/cat", "/sys/fs/cgroup/memory.max"])?;
    if limit.code() == 0 {
        ensure_eq!(limit.stdout.trim(), (48 << 20).to_string(), "its own limit");
    }
    let listed = fixture.call(&["ps", "--format", "json", &id])?.success()?;
    ensure!(
        listed.stdout.starts_with('['),
        "processes: {}",
        listed.stdout
    );
    fixture.call(&["kill", &id, "TERM"])?.success()?;
    fixture.wait_for_end(&id)?;
    fixture.call(&["delete", &id])?.success()?;

    // The same name once more, and an end by SIGKILL.
    fixture.start_detached(&bundle, &id)?;
    fixture.call(&["kill", &id, "KILL"])?.success()?;
    fixture.wait_for_end(&id)?;
    ensure_eq!(fixture.status(&id)?, "stopped", "status");
    ensure_eq!(fixture.status(&pod.id)?, "running", "status of the sandbox");
    pod.remove(&[&id])?;
    nothing_left(fixture, &before)
}

fn the_end_of_the_sandbox_ends_its_pod(fixture: &Fixture) -> Claim {
    let before = Snapshot::take(&fixture.state_root().to_string_lossy());
    let pod = Pod::start(fixture)?;
    let id = fixture.id("member");
    let mut bundle = pod.bundle()?;
    bundle.args(&["/bin/sleep", "1000"]);
    fixture.start_detached(&bundle, &id)?;
    fixture.call(&["kill", &pod.id, "KILL"])?.success()?;
    fixture.wait_for_end(&pod.id)?;
    // It was process 1 of the member too.
    fixture.wait_for_end(&id)?;
    ensure_eq!(fixture.status(&id)?, "stopped", "status");
    pod.remove(&[&id])?;
    nothing_left(fixture, &before)
}

fn what_a_pods_machine_cannot_have_is_refused(fixture: &Fixture) -> Claim {
    let pod = Pod::start(fixture)?;
    let refused = |bundle: &Bundle, words: &[&str]| -> Claim {
        let outcome = fixture.run(bundle)?;
        ensure_eq!(outcome.code(), 1, "exit code");
        for word in words {
            ensure!(
                outcome.stderr.contains(word),
                "no {word:?} in {}",
                outcome.stderr
            );
        }
        Ok(())
    };
    let mut bundle = pod.bundle()?;
    bundle.spec["annotations"]["io.kubernetes.cri.sandbox-id"] = json!("no-such-sandbox");
    refused(&bundle, &["no-such-sandbox", "no microVM that runs"])?;
    bundle.spec["annotations"]["io.kubernetes.cri.sandbox-id"] = json!("../../etc");
    refused(
        &bundle,
        &["io.kubernetes.cri.sandbox-id", "no container id"],
    )?;
    let mut bundle = pod.bundle()?;
    let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut();
    for namespace in namespaces.into_iter().flatten() {
        if namespace["type"] == "ipc" {
            namespace["path"] = json!("/proc/1/ns/ipc");
        }
    }
    refused(
        &bundle,
        &["linux.namespaces[", "join a namespace of the host's kernel"],
    )?;
    let mut bundle = pod.bundle()?;
    bundle.spec["vm"] = json!({"hwConfig": {"vcpus": 2}});
    refused(&bundle, &["vm", "the machine is the pod's"])?;
    pod.remove(&[])
}
