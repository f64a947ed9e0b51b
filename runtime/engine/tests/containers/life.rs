//! Create, start, hooks, limits, kill and delete; what is left behind.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use engine::{Cgroup, Engine, processes};
use serde_json::json;

use crate::Test;
use crate::fixture::{Container, open_files, wait};

pub const TESTS: &[Test] = &[
    ("the_program_waits_for_start", the_program_waits_for_start),
    ("start_happens_once", start_happens_once),
    ("all_hooks_run_in_order", all_hooks_run_in_order),
    ("a_failing_hook_fails_create", a_failing_hook_fails_create),
    (
        "a_failing_start_hook_stops_the_container",
        a_failing_start_hook_stops_the_container,
    ),
    ("limits_reach_the_kernel", limits_reach_the_kernel),
    (
        "a_limit_that_cannot_be_is_named",
        a_limit_that_cannot_be_is_named,
    ),
    ("delete_kills_what_runs", delete_kills_what_runs),
    (
        "delete_kills_without_a_pid_namespace",
        delete_kills_without_a_pid_namespace,
    ),
    ("delete_is_idempotent", delete_is_idempotent),
    (
        "a_cgroup_in_use_is_refused_and_left_alone",
        a_cgroup_in_use_is_refused_and_left_alone,
    ),
    (
        "a_frozen_cgroup_is_refused_and_left_alone",
        a_frozen_cgroup_is_refused_and_left_alone,
    ),
    ("freeze_and_thaw", freeze_and_thaw),
    (
        "a_frozen_container_can_be_deleted",
        a_frozen_container_can_be_deleted,
    ),
    ("processes_and_stats_are_read", processes_and_stats_are_read),
    ("an_oom_kill_is_counted", an_oom_kill_is_counted),
    (
        "fifty_containers_leave_nothing",
        fifty_containers_leave_nothing,
    ),
    (
        "a_process_can_be_put_into_a_cgroup",
        a_process_can_be_put_into_a_cgroup,
    ),
];

fn the_program_waits_for_start() {
    let mut container = Container::shell("echo ran > /tmp/ran");
    container.create().unwrap();
    assert!(!container.root().join("tmp/ran").exists());
    container.engine.start().unwrap();
    container.finish();
    assert!(container.root().join("tmp/ran").exists());
}

fn start_happens_once() {
    let mut container = Container::sleeping(|_| {});
    let error = container.engine.start().unwrap_err().to_string();
    assert!(error.contains("does not wait"), "{error}");
    container.kill_and_delete();
}

fn all_hooks_run_in_order() {
    let mut container = Container::shell("cat /tmp/log; echo program");
    let log = container.root().join("tmp/log");
    let host = |name: &str| {
        json!([{"path": "/bin/sh", "args": ["sh", "-c",
            format!("echo {name} $(cat | grep -o '\"status\":\"[a-z]*\"') $(readlink /proc/self/ns/uts) $X >> {}", log.display())],
            "env": ["X=env", "PATH=/bin:/usr/bin"]}])
    };
    container.config["hooks"] = json!({
        "prestart": host("prestart"),
        "createRuntime": host("createRuntime"),
        "createContainer": host("createContainer"),
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c",
            "echo startContainer $(grep -o '\"status\":\"[a-z]*\"') $(readlink /proc/self/ns/uts) $X >> /tmp/log"],
            "env": ["X=env", "PATH=/bin"]}],
        "poststart": [{"path": "/bin/false"}],
    });
    let text = container.output();
    let own = fs::read_link("/proc/self/ns/uts").unwrap();
    let own = own.to_str().unwrap();
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(' ').collect()).collect();
    let names: Vec<&str> = lines.iter().map(|line| line[0]).collect();
    assert_eq!(
        names,
        [
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "program"
        ]
    );
    for line in &lines[..2] {
        assert_eq!(line[1..], ["\"status\":\"creating\"", own, "env"]);
    }
    assert_eq!(lines[2][1], "\"status\":\"creating\"");
    assert_eq!(lines[3][1], "\"status\":\"created\"");
    assert!(lines[2][2] != own && lines[2][2] == lines[3][2], "{text}");
}

fn a_failing_hook_fails_create() {
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let mut container = Container::new(&["true"]);
        container.config["hooks"] =
            json!({kind: [{"path": "/bin/sh", "args": ["sh", "-c", "exit 3"]}]});
        let error = container.create().unwrap_err().to_string();
        assert_eq!(
            error,
            format!("error running {kind} hook #0: /bin/sh: exit status: 3")
        );
        container.assert_gone();
    }
}

fn a_failing_start_hook_stops_the_container() {
    let mut container = Container::shell("echo ran");
    container.config["hooks"] = json!({"startContainer": [{"path": "/bin/false"}]});
    let outcome = container.run();
    assert_ne!(outcome.code, 0);
    assert_eq!(outcome.stdout, "");
}

fn value(cgroup: &Cgroup, v1: &str, v2: &str) -> Option<String> {
    let layout = cgroup.layout();
    let relative = cgroup.path().strip_prefix("/").unwrap();
    let controller = v1.split('.').next().unwrap();
    let mount = layout.v1(controller).map(|one| (one.mount.clone(), v1));
    let (mount, file) = mount.or_else(|| layout.unified().map(|one| (one.mount.clone(), v2)))?;
    let text = fs::read_to_string(mount.join(relative).join(file)).ok()?;
    Some(text.trim().to_owned())
}

fn limits_reach_the_kernel() {
    let mut container = Container::sleeping(|_| {});
    if value(&container.cgroup, "memory.limit_in_bytes", "memory.max").is_none() {
        println!("skipped: this system offers no memory controller");
        container.kill_and_delete();
        return;
    }
    container.kill_and_delete();
    container.config["linux"]["resources"] = json!({
        "memory": {"limit": 67_108_864, "swap": 134_217_728},
        "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "cpus": "0"},
        "pids": {"limit": 33},
    });
    container.create().unwrap();
    let cgroup = &container.cgroup;
    let of = |v1, v2| value(cgroup, v1, v2).unwrap();
    assert_eq!(of("memory.limit_in_bytes", "memory.max"), "67108864");
    assert_eq!(of("pids.max", "pids.max"), "33");
    assert_eq!(of("cpuset.cpus", "cpuset.cpus"), "0");
    if cgroup.layout().v1("cpu").is_some() {
        assert_eq!(of("cpu.cfs_quota_us", ""), "50000");
        assert_eq!(of("cpu.shares", ""), "1024");
    } else {
        assert_eq!(of("-", "cpu.max"), "50000 100000");
        assert_eq!(of("-", "cpu.weight"), "100");
        assert_eq!(of("-", "memory.swap.max"), "67108864");
    }
    container.kill_and_delete();
}

fn a_limit_that_cannot_be_is_named() {
    let mut container = Container::new(&["true"]);
    container.config["linux"]["resources"] = json!({"memory": {"limit": 1000, "swap": 10}});
    let error = container.create().unwrap_err().to_string();
    assert!(error.starts_with("linux.resources.memory"), "{error}");
    container.assert_gone();
}

fn delete_kills_what_runs() {
    let mut container = Container::shell("sleep 1000 & sleep 1000 & wait");
    container.create().unwrap();
    container.engine.start().unwrap();
    container.kill_and_delete();
}

fn delete_kills_without_a_pid_namespace() {
    let mut container = Container::shell("sleep 1000 & setsid sleep 1000 & echo started; wait");
    container.config["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .retain(|one| one["type"] != "pid");
    container.create().unwrap();
    container.engine.start().unwrap();
    while container.cgroup.pids().unwrap().len() < 3 {
        std::thread::yield_now();
    }
    container.kill_and_delete();
}

fn delete_is_idempotent() {
    let mut container = Container::sleeping(|_| {});
    container.kill_and_delete();
    container.engine.delete(&container.cgroup).unwrap();
    Engine::new("/no/such/engine")
        .delete(&container.cgroup)
        .unwrap();
}

fn a_cgroup_in_use_is_refused_and_left_alone() {
    let mut first = Container::sleeping(|_| {});
    let mut second = Container::new(&["true"]);
    second.cgroup = first.cgroup.clone();
    let error = second.create().unwrap_err();
    assert!(error.to_string().contains("is not empty"), "{error}");
    second.engine.delete(&second.cgroup).unwrap();
    assert_eq!(first.cgroup.pids().unwrap().len(), 1);
    first.kill_and_delete();
}

fn a_frozen_cgroup_is_refused_and_left_alone() {
    let mut container = Container::new(&["true"]);
    let above = Cgroup::new(container.cgroup.path()).unwrap();
    above.create().unwrap();
    above.freeze().unwrap();
    for path in [above.path().to_owned(), above.path().join("below/it")] {
        container.cgroup = Cgroup::new(&path).unwrap();
        let error = container.create().unwrap_err().to_string();
        assert!(error.contains("frozen"), "{error}");
        container.engine.delete(&container.cgroup).unwrap();
        assert!(above.is_frozen());
    }
    above.thaw().unwrap();
    container.cgroup = above;
    container.create().unwrap();
    container.kill_and_delete();
}

fn freeze_and_thaw() {
    let mut container = Container::shell("while true; do echo x; done > /tmp/grows");
    container.create().unwrap();
    container.engine.start().unwrap();
    let size = |container: &Container| {
        fs::metadata(container.root().join("tmp/grows")).map_or(0, |one| one.len())
    };
    while size(&container) == 0 {
        std::thread::yield_now();
    }
    container.cgroup.freeze().unwrap();
    assert!(container.cgroup.is_frozen());
    let before = size(&container);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(size(&container), before);
    container.cgroup.thaw().unwrap();
    assert!(!container.cgroup.is_frozen());
    let deadline = Instant::now() + Duration::from_secs(10);
    while size(&container) == before {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    container.kill_and_delete();
}

fn a_frozen_container_can_be_deleted() {
    let mut container = Container::sleeping(|_| {});
    container.cgroup.freeze().unwrap();
    container.kill_and_delete();
}

fn processes_and_stats_are_read() {
    let mut container = Container::shell(
        "sleep 1001 & i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo ok; wait",
    );
    container.create().unwrap();
    container.engine.start().unwrap();
    while container.cgroup.pids().unwrap().len() < 2 {
        std::thread::yield_now();
    }
    let list = processes(&container.cgroup).unwrap();
    let init = container.created.unwrap();
    assert!(list.iter().any(|one| one.pid == init.pid.as_raw()
        && one.parent == nix::unistd::getpid().as_raw()));
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let list = processes(&container.cgroup).unwrap();
        if list.iter().any(|one| one.command == "sleep 1001") {
            break;
        }
        assert!(Instant::now() < deadline, "{list:?}");
    }
    let stats = container.cgroup.stats().unwrap();
    if container.cgroup.layout().name() != "v2" {
        assert!(
            stats.cpu.total > 0 && stats.memory.main.usage > 0,
            "{stats:?}"
        );
        assert!(stats.pids.current >= 2, "{stats:?}");
    }
    container.kill_and_delete();
}

fn an_oom_kill_is_counted() {
    let mut container = Container::shell("x=a; while true; do x=$x$x; done");
    container.config["linux"]["resources"] =
        json!({"memory": {"limit": 16_777_216, "swap": 16_777_216}});
    match container.create() {
        Err(error) if error.to_string().contains("is not available here") => {
            println!("skipped: {error}");
            return;
        }
        other => other.unwrap(),
    };
    assert_eq!(container.cgroup.oom_kills().unwrap(), 0);
    let mut watch = container.cgroup.watch_oom().unwrap();
    assert_eq!(watch.kills().unwrap(), 0);
    container.engine.start().unwrap();
    let code = wait(container.created.unwrap().pid);
    assert_eq!(code, 137);
    let (descriptor, flags) = watch.polled().unwrap();
    let event = nix::poll::poll(&mut [nix::poll::PollFd::new(descriptor, flags)], 10_000u16);
    assert_eq!(event.unwrap(), 1);
    assert!(watch.kills().unwrap() >= 1);
    assert!(container.cgroup.oom_kills().unwrap() >= 1);
    container.engine.delete(&container.cgroup).unwrap();
    container.assert_gone();
}

fn fifty_containers_leave_nothing() {
    let mut container = Container::new(&["true"]);
    let before = open_files();
    for _ in 0..50 {
        let outcome = container.run();
        assert_eq!(outcome.code, 0, "{outcome:?}");
    }
    assert_eq!(open_files(), before);
    assert!(
        nix::sys::wait::waitpid(None, None).is_err(),
        "a child is left"
    );
}

fn a_process_can_be_put_into_a_cgroup() {
    let cgroup = Cgroup::new(format!("/rt-engine-add-{}", std::process::id()).as_ref()).unwrap();
    cgroup.create().unwrap();
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    cgroup.add(pid).unwrap();
    assert_eq!(cgroup.pids().unwrap(), [pid]);
    cgroup.remove().unwrap();
    assert!(!cgroup.exists());
    assert!(!child.wait().unwrap().success());
}
