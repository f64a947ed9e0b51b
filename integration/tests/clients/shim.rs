//! Our own shim under containerd: beside what holds for containerd's, what a shim is asked for that no binary is, and
//! what becomes of containers when one of the two daemons is killed.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use containerd_shim_protos::api::{Empty, StateRequest, StateResponse, Status, UpdateTaskRequest};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::{self, Client};
use integration::{
    Bundle, Claim, Output, binary_under_test, ensure, ensure_eq, eventually, finish,
    wait_with_limit,
};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::containerd::{Containerd, LIMIT, Runtime, pids_of, start_with};
use crate::{BOTH, CONTAINER, Entry, Reason, Start};

pub const CLAIMS: &[Entry<Containerd>] = &[
    Entry::further("events_are_in_order", BOTH, events_are_in_order),
    Entry::further(
        "a_kill_for_want_of_memory_is_told",
        BOTH,
        a_kill_for_want_of_memory_is_told,
    ),
    Entry::further("no_exit_is_lost", BOTH, no_exit_is_lost),
    Entry::further("one_shim_serves_a_pod", BOTH, one_shim_serves_a_pod),
    Entry::further("output_goes_to_a_file", BOTH, output_goes_to_a_file),
    Entry::further("output_goes_to_a_logger", BOTH, output_goes_to_a_logger),
    Entry::further(
        "standard_input_ends_when_it_is_closed",
        BOTH,
        standard_input_ends_when_it_is_closed,
    ),
    Entry::further(
        "both_versions_of_the_service_answer",
        BOTH,
        both_versions_of_the_service_answer,
    ),
    Entry::further(
        "limits_change_while_it_runs",
        BOTH,
        limits_change_while_it_runs,
    ),
    Entry::further(
        "a_container_outlives_containerd",
        BOTH,
        a_container_outlives_containerd,
    ),
    Entry::further(
        "a_killed_shim_leaves_nothing",
        BOTH,
        a_killed_shim_leaves_nothing,
    ),
    Entry::further(
        "a_container_that_is_given_up_is_removed",
        BOTH,
        a_container_that_is_given_up_is_removed,
    ),
    Entry::further(
        "a_server_that_nobody_knows_ends",
        CONTAINER,
        a_server_that_nobody_knows_ends,
    ),
];

pub fn start(start: Start) -> Result<Containerd, Reason> {
    start_with(start, Runtime::Shim)
}

const FOR_EVER: &[&str] = &["sh", "-c", "while :; do sleep 0.1; done"];

fn run_detached(containerd: &Containerd, id: &str, options: &[&str], command: &[&str]) -> Claim {
    let options = [&["--detach"], options].concat();
    finish(&mut containerd.run_command(id, &options, command), None)?.success()?;
    Ok(())
}

fn remove(containerd: &Containerd, id: &str) -> Claim {
    containerd.told(&["tasks", "delete", "--force", id])?;
    containerd.told(&["containers", "delete", id])?;
    containerd.nothing_left_of(id)
}

/// The processes of the shim that was started for a container: the server, and its worker.
fn shims(id: &str) -> Result<Vec<i32>, Reason> {
    pids_of(&["-id", id, "serve"])
}

/// What containerd tells while containers come and go.
fn listen(containerd: &Containerd) -> Result<Output, Reason> {
    let events = Output::of(&mut containerd.command(&["events"]))?;
    // It does not say when it begins to listen.
    eventually(LIMIT, || {
        containerd.run("heard", &[], &["true"])?.success()?;
        Ok(events.wait_for("/tasks/delete", Duration::from_millis(100))?)
    })?;
    Ok(events)
}

/// The topics of what was told of a container's task are these.
fn told_of(events: &Output, id: &str, topics: &[&str]) -> Claim {
    let id = format!("\"{id}\"");
    eventually(LIMIT, || {
        let text = events.text();
        let lines = text.lines().filter(|line| line.contains(&id));
        let told = lines.filter_map(|line| {
            let mut words = line.split_whitespace();
            words.find(|word| word.starts_with("/tasks/"))
        });
        let told: Vec<&str> = told.collect();
        ensure_eq!(told, topics, "events: {text}");
        Ok(())
    })
}

fn events_are_in_order(containerd: &Containerd) -> Claim {
    let events = listen(containerd)?;
    containerd.run("ordered", &[], &["true"])?.success()?;
    let topics = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exit",
        "/tasks/delete",
    ];
    told_of(&events, "ordered", &topics)
}

fn a_kill_for_want_of_memory_is_told(containerd: &Containerd) -> Claim {
    let events = listen(containerd)?;
    let options = ["--memory-limit=33554432"];
    let outcome = containerd.run("killed", &options, &["tail", "/dev/zero"])?;
    ensure_eq!(outcome.code(), 137, "exit code; {:?}", outcome.stderr);
    let topics = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/oom",
        "/tasks/exit",
        "/tasks/delete",
    ];
    told_of(&events, "killed", &topics)
}

fn no_exit_is_lost(containerd: &Containerd) -> Claim {
    let id = "storm";
    run_detached(containerd, id, &[], FOR_EVER)?;
    let exec = |number: usize| -> Claim {
        let name = format!("e{number}");
        let code = (number % 200).to_string();
        let script = format!("exit {code}");
        let exec = ["tasks", "exec", "--exec-id", &name, id, "sh", "-c", &script];
        let outcome = finish(&mut containerd.command(&exec), None)?;
        ensure_eq!(
            outcome.code().to_string(),
            code,
            "exec {number}: {}",
            outcome.stderr
        );
        Ok(())
    };
    let failures: Vec<String> = thread::scope(|scope| {
        let exec = &exec;
        let threads: Vec<_> = (0..8)
            .map(|thread| {
                scope.spawn(move || {
                    let numbers = (0..25).map(|round| thread * 25 + round);
                    let failed = numbers.filter_map(|number| exec(number).err());
                    failed.map(|reason| reason.to_string()).collect::<Vec<_>>()
                })
            })
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.flat_map(Result::unwrap_or_default).collect()
    });
    ensure!(failures.is_empty(), "{failures:?}");
    remove(containerd, id)
}

fn one_shim_serves_a_pod(containerd: &Containerd) -> Claim {
    let pod = ["--annotation", "dev.rt.group=pod-one"];
    run_detached(containerd, "pod-a", &pod, FOR_EVER)?;
    run_detached(containerd, "pod-b", &pod, FOR_EVER)?;
    eventually(LIMIT, || {
        // The worker has the server's command line, and so have operations that are about to end.
        ensure_eq!(shims("pod-a")?.len(), 2, "processes of the shim");
        Ok(())
    })?;
    ensure_eq!(shims("pod-b")?.len(), 0, "processes of another shim");
    remove(containerd, "pod-a")?;
    let exec = [
        "tasks",
        "exec",
        "--exec-id",
        "e",
        "pod-b",
        "sh",
        "-c",
        "exit 6",
    ];
    let outcome = finish(&mut containerd.command(&exec), None)?;
    ensure_eq!(outcome.code(), 6, "the other container: {}", outcome.stderr);
    remove(containerd, "pod-b")?;
    eventually(LIMIT, || {
        ensure!(
            shims("pod-a")?.is_empty(),
            "the shim goes on without containers"
        );
        Ok(())
    })
}

fn output_goes_to_a_file(containerd: &Containerd) -> Claim {
    let log = containerd.world().dir().join("output log");
    let uri = format!("file://{}", log.display().to_string().replace(' ', "%20"));
    let script = "echo out; echo err >&2; while :; do sleep 0.1; done";
    run_detached(
        containerd,
        "filed",
        &["--log-uri", &uri],
        &["sh", "-c", script],
    )?;
    eventually(LIMIT, || {
        ensure_eq!(fs::read_to_string(&log)?, "out\nerr\n", "log");
        Ok(())
    })?;
    remove(containerd, "filed")
}

fn output_goes_to_a_logger(containerd: &Containerd) -> Claim {
    let dir = containerd.world().dir();
    let log = dir.join("logged");
    let logger = dir.join("logger");
    let script = format!(
        "#!/bin/sh\nexec 5>&-\nsed \"s/^/$CONTAINER_ID $1=$2 /\" <&3 >{}\n",
        log.display()
    );
    fs::write(&logger, script)?;
    fs::set_permissions(&logger, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let uri = format!("binary://{}?key=value", logger.display());
    run_detached(
        containerd,
        "logged",
        &["--log-uri", &uri],
        &["echo", "line"],
    )?;
    eventually(LIMIT, || {
        ensure_eq!(fs::read_to_string(&log)?, "logged key=value line\n", "log");
        Ok(())
    })?;
    remove(containerd, "logged")
}

fn standard_input_ends_when_it_is_closed(containerd: &Containerd) -> Claim {
    let id = "closed";
    run_detached(containerd, id, &[], FOR_EVER)?;
    let exec = ["tasks", "exec", "--exec-id", "e", id, "cat"];
    let mut command = containerd.command(&exec);
    let outcome = finish(&mut command, Some(b"all of it".to_vec()))?;
    ensure_eq!(outcome.success()?.stdout, "all of it", "output");
    remove(containerd, id)
}

/// The bundle that containerd has made of a container, as the world has it.
fn bundle_of(containerd: &Containerd, id: &str) -> String {
    let state = "/run/containerd-state/io.containerd.runtime.v2.task";
    format!("{state}/{}/{id}", containerd.world().cgroup())
}

/// The socket of the shim that serves a container, as this process reaches it.
fn socket(containerd: &Containerd, id: &str) -> Result<PathBuf, Reason> {
    let bundle = bundle_of(containerd, id);
    let address = fs::read_to_string(containerd.world().path(&format!("{bundle}/address")))?;
    let socket = address.strip_prefix("unix://").ok_or("no path socket")?;
    Ok(containerd.world().path(socket))
}

/// Calls a method of the shim that serves a container, as another version of containerd would.
fn call<Q: Message, A: Message>(
    containerd: &Containerd,
    id: &str,
    (version, method): (u8, &str),
    request: &Q,
) -> Result<A, Reason> {
    let socket = socket(containerd, id)?;
    let client = Client::connect(&format!("unix://{}", socket.display()))?;
    let response = client.request(ttrpc::Request {
        service: format!("containerd.task.v{version}.Task"),
        method: method.to_owned(),
        payload: request.write_to_bytes()?,
        timeout_nano: i64::try_from(LIMIT.as_nanos())?,
        ..Default::default()
    })?;
    Ok(A::parse_from_bytes(&response.payload)?)
}

fn both_versions_of_the_service_answer(containerd: &Containerd) -> Claim {
    let id = "versions";
    run_detached(containerd, id, &[], FOR_EVER)?;
    for version in [2, 3] {
        let request = StateRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let state: StateResponse = call(containerd, id, (version, "State"), &request)?;
        ensure_eq!(
            state.status.enum_value(),
            Ok(Status::RUNNING),
            "version {version}"
        );
        let request = StateRequest {
            id: "nobody".to_owned(),
            ..Default::default()
        };
        let refused = call::<_, StateResponse>(containerd, id, (version, "State"), &request);
        let refused = refused
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default();
        ensure!(
            refused.contains("NOT_FOUND"),
            "version {version}: {refused}"
        );
    }
    remove(containerd, id)
}

fn limits_change_while_it_runs(containerd: &Containerd) -> Claim {
    let id = "limited";
    run_detached(containerd, id, &["--memory-limit=67108864"], FOR_EVER)?;
    let limit = || containerd.told(&["tasks", "metrics", "--format", "json", id]);
    ensure!(limit()?.contains("67108864"), "metrics: {}", limit()?);
    let request = UpdateTaskRequest {
        id: id.to_owned(),
        resources: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: br#"{"memory":{"limit":50331648}}"#.to_vec(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let _: Empty = call(containerd, id, (2, "Update"), &request)?;
    ensure!(limit()?.contains("50331648"), "metrics: {}", limit()?);
    remove(containerd, id)
}

fn a_container_outlives_containerd(containerd: &Containerd) -> Claim {
    let id = "outlived";
    let containerd = &containerd.another("restarted")?;
    run_detached(containerd, id, &[], FOR_EVER)?;
    containerd.restart()?;
    eventually(LIMIT, || {
        ensure_eq!(containerd.status(id)?, "RUNNING", "status");
        Ok(())
    })?;
    let exec = ["tasks", "exec", "--exec-id", "e", id, "sh", "-c", "exit 9"];
    let outcome = finish(&mut containerd.command(&exec), None)?;
    ensure_eq!(outcome.code(), 9, "exec: {}", outcome.stderr);
    remove(containerd, id)
}

fn a_killed_shim_leaves_nothing(containerd: &Containerd) -> Claim {
    let id = "orphaned";
    let mut attached = containerd.run_command(id, &["--rm"], FOR_EVER).spawn()?;
    eventually(LIMIT, || {
        ensure_eq!(containerd.status(id)?, "RUNNING", "status");
        Ok(())
    })?;
    let socket = socket(containerd, id)?;
    for pid in shims(id)? {
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            // The worker ends with its shim.
            Err(Errno::ESRCH) | Ok(()) => {}
            Err(error) => return Err(error.into()),
        }
    }
    // What containerd says then is its own affair, but it says it.
    wait_with_limit(&mut attached, LIMIT)?;
    eventually(LIMIT, || {
        ensure_eq!(containerd.status(id)?, "none", "status");
        ensure!(!fs::exists(&socket)?, "{} is left", socket.display());
        containerd.nothing_left_of(id)
    })?;
    let _ = containerd.told(&["containers", "delete", id]);
    let outcome = containerd.run(id, &[], &["echo", "again"])?;
    ensure_eq!(outcome.success()?.stdout, "again\n", "output");
    Ok(())
}

/// A client dies while its container is made: containerd takes the server for dead, and never asks it for anything again.
/// Then the same of a container that runs.
fn a_container_that_is_given_up_is_removed(containerd: &Containerd) -> Claim {
    let ends = |id: &str| {
        eventually(LIMIT, || {
            ensure_eq!(shims(id)?.len(), 0, "servers and workers of {id}");
            containerd.nothing_left_of(id)
        })
    };
    let id = "unwanted";
    let dir = containerd.world().dir().join(id);
    fs::create_dir(&dir)?;
    let mut spec = Command::new(binary_under_test()?);
    finish(spec.arg("spec").arg("--bundle").arg(&dir), None)?.success()?;
    let config = dir.join("config.json");
    let mut bundle = Bundle::create(&dir, serde_json::from_slice(&fs::read(&config)?)?)?;
    bundle.args(FOR_EVER);
    bundle.spec["root"]["path"] = json!(dir.join("rootfs"));
    let (reached, go_on) = (dir.join("reached"), dir.join("go-on"));
    finish(Command::new("mkfifo").arg(&go_on), None)?.success()?;
    let hook = format!("> {}; : < {}", reached.display(), go_on.display());
    bundle.spec["hooks"]["createRuntime"] =
        json!([{"path": "/bin/sh", "args": ["sh", "-c", hook]}]);
    bundle.save()?;
    let mut run = containerd.run_configured(id, &config).spawn()?;
    eventually(LIMIT, || {
        ensure!(reached.exists(), "the hook does not run");
        Ok(())
    })?;
    let made = containerd.world().path(&bundle_of(containerd, id));
    ensure!(made.exists(), "there is no {}", made.display());
    for pid in pids_of(&["ctr", "run", &config.to_string_lossy()])? {
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    }
    wait_with_limit(&mut run, LIMIT)?;
    eventually(LIMIT, || {
        ensure!(!made.exists(), "containerd still has {}", made.display());
        Ok(())
    })?;
    fs::write(&go_on, "")?;
    ends(id)?;

    let id = "running";
    run_detached(containerd, id, &[], FOR_EVER)?;
    let mut delete = containerd.delete_by_shim(id, &bundle_of(containerd, id));
    finish(&mut delete, None)?.success()?;
    ends(id)
}

/// `start` cannot tell the address; or its caller, as containerd would be, ends before it has asked for a container.
fn a_server_that_nobody_knows_ends(containerd: &Containerd) -> Claim {
    let ends = |id: &str| {
        eventually(LIMIT, || {
            ensure_eq!(shims(id)?.len(), 0, "servers and workers of {id}");
            Ok(())
        })
    };
    let untold = finish(&mut containerd.start_shim("untold", ">/dev/full")?, None)?;
    ensure!(!untold.status.success(), "{untold:?}");
    ends("untold")?;

    let mut caller = containerd.start_shim("forgotten", "; read line")?;
    let mut caller = caller.stdin(Stdio::piped()).spawn()?;
    eventually(LIMIT, || {
        ensure!(!shims("forgotten")?.is_empty(), "there is no server");
        Ok(())
    })?;
    ensure!(caller.try_wait()?.is_none(), "the caller ends too early");
    ensure!(!shims("forgotten")?.is_empty(), "the server does not wait");
    drop(caller.stdin.take());
    wait_with_limit(&mut caller, LIMIT)?;
    ends("forgotten")
}
