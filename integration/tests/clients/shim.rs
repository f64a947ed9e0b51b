//! Our own shim under containerd: beside what holds for containerd's, what a shim is asked for that no binary is, and
//! what becomes of containers when one of the two daemons is killed.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
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
use serde_json::{Value, json};

use crate::containerd::{Containerd, LIMIT, Runtime, SOCKET, pids_of, start_with};
use crate::process::Process;
use crate::{BOTH, CONTAINER, Entry, Reason, Start, is_lab};

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
        "a_server_that_is_killed_makes_no_container",
        BOTH,
        a_server_that_is_killed_makes_no_container,
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

/// How many processes are executed when nobody says it, and how many at once.
const EXECS: usize = 1000;
const AT_ONCE: usize = 16;

/// The rate that a host must reach when it is told how many there are to be.
const EXECS_A_SECOND: f64 = 100.0;

/// How much the server's own memory may grow meanwhile, in KiB.
const GROWTH: u64 = 2048;

/// The pid of the shim's server: not that of its worker, which is its child.
fn server(id: &str) -> Result<i32, Reason> {
    let pids = shims(id)?;
    let is_server =
        |pid: &i32| Process::of(*pid).is_some_and(|process| !pids.contains(&process.parent));
    let server = pids.iter().copied().find(is_server);
    Ok(server.ok_or("there is no server")?)
}

/// The descriptors of a process, and its own memory in KiB.
fn use_of(pid: i32) -> Result<(usize, u64), Reason> {
    let process = Path::new("/proc").join(pid.to_string());
    let descriptors = fs::read_dir(process.join("fd"))?.count();
    let status = fs::read_to_string(process.join("status"))?;
    let mut lines = status
        .lines()
        .filter_map(|line| line.strip_prefix("RssAnon:"));
    let memory = lines.next().and_then(|rest| rest.split_whitespace().next());
    Ok((descriptors, memory.ok_or("no memory")?.parse()?))
}

fn no_exit_is_lost(containerd: &Containerd) -> Claim {
    let asked_for = env::var("RT_EXECS")
        .ok()
        .map(|count| count.parse())
        .transpose()?;
    // Its server is told from that of the same claim beside this one.
    let id = &format!("storm-{}", containerd.world().cgroup());
    run_detached(containerd, id, &[], FOR_EVER)?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/exec_storm.py");
    let storm = |count: usize| -> Result<f64, Reason> {
        let mut command = containerd.world().command("/usr/bin/python3");
        // Without a cache of bytecode in the sources.
        command.arg("-B").arg(&script);
        command.args([SOCKET, containerd.world().cgroup(), id]);
        command.args([count.to_string(), AT_ONCE.to_string()]);
        // As long as it takes: each call has a limit.
        let told = command.stderr(Stdio::inherit()).output()?;
        let told: Value = serde_json::from_slice(&told.stdout)?;
        ensure_eq!(told["failed"], 0, "failures: {}", told["failures"]);
        Ok(told["seconds"].as_f64().ok_or("no time")?)
    };
    let server = server(id)?;
    // By then it has its threads.
    storm(AT_ONCE * 8)?;
    let (descriptors, memory) = use_of(server)?;
    let count = asked_for.unwrap_or(EXECS);
    let seconds = storm(count)?;
    eventually(LIMIT, || {
        ensure_eq!(use_of(server)?.0, descriptors, "descriptors of the server");
        Ok(())
    })?;
    let grown = use_of(server)?.1.saturating_sub(memory);
    ensure!(
        grown <= GROWTH,
        "the server grew by {grown} KiB, from {memory}"
    );
    if asked_for.is_some() {
        let rate = count as f64 / seconds;
        println!(
            "{count} execs in {seconds:.1} s, {rate:.0} a second; the server grew by {grown} KiB, from {memory}"
        );
        ensure!(rate >= EXECS_A_SECOND || is_lab(), "{rate:.0} a second");
    }
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

/// A container whose creation stands still.
struct Held {
    /// `ctr run`, which waits for it.
    run: Child,
    config: PathBuf,
    /// What lets it go on when something is written to it.
    go_on: PathBuf,
    /// Its bundle, as this process reaches it.
    bundle: PathBuf,
}

/// Begins to make a container, and waits until that stands at a hook.
fn hold(containerd: &Containerd, id: &str) -> Result<Held, Reason> {
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
    let run = containerd.run_configured(id, &config).spawn()?;
    eventually(LIMIT, || {
        ensure!(reached.exists(), "the hook does not run");
        Ok(())
    })?;
    let bundle = containerd.world().path(&bundle_of(containerd, id));
    ensure!(bundle.exists(), "there is no {}", bundle.display());
    Ok(Held {
        run,
        config,
        go_on,
        bundle,
    })
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
    let mut held = hold(containerd, id)?;
    for pid in pids_of(&["ctr", "run", &held.config.to_string_lossy()])? {
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    }
    wait_with_limit(&mut held.run, LIMIT)?;
    eventually(LIMIT, || {
        let made = &held.bundle;
        ensure!(!made.exists(), "containerd still has {}", made.display());
        Ok(())
    })?;
    fs::write(&held.go_on, "")?;
    ends(id)?;

    let id = "running";
    run_detached(containerd, id, &[], FOR_EVER)?;
    let mut delete = containerd.delete_by_shim(id, &bundle_of(containerd, id));
    finish(&mut delete, None)?.success()?;
    ends(id)
}

/// What a killed server was doing is over, and containerd's `delete` need not wait for it.
fn a_server_that_is_killed_makes_no_container(containerd: &Containerd) -> Claim {
    let id = "half-made";
    let mut held = hold(containerd, id)?;
    kill(Pid::from_raw(server(id)?), Signal::SIGKILL)?;
    wait_with_limit(&mut held.run, LIMIT)?;
    // containerd waits for `delete` for some seconds, and has the bundle no more when that has succeeded.
    eventually(LIMIT, || {
        ensure_eq!(shims(id)?.len(), 0, "processes of the shim");
        ensure!(
            !held.bundle.exists(),
            "containerd still has {}",
            held.bundle.display()
        );
        containerd.nothing_left_of(id)
    })?;
    // Hooks are not ours.
    fs::write(&held.go_on, "")?;
    let _ = containerd.told(&["containers", "delete", id]);
    Ok(())
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
