//! More processes in a running container.

use std::fs;

use engine::{Cgroup, Error, ExecRequest, Stdio};
use oci_spec::runtime::Process;
use serde_json::{Value, json};

use crate::Test;
use crate::fixture::{Container, exists, open_files};

pub const TESTS: &[Test] = &[
    ("exec_runs_inside", exec_runs_inside),
    (
        "exec_has_its_own_user_rights_and_environment",
        exec_has_its_own_user_rights_and_environment,
    ),
    (
        "exec_is_in_the_containers_cgroup",
        exec_is_in_the_containers_cgroup,
    ),
    (
        "exec_has_the_containers_seccomp",
        exec_has_the_containers_seccomp,
    ),
    ("exec_joins_a_user_namespace", exec_joins_a_user_namespace),
    (
        "exec_has_the_containers_time_and_personality",
        exec_has_the_containers_time_and_personality,
    ),
    (
        "exec_of_a_missing_program_fails",
        exec_of_a_missing_program_fails,
    ),
    (
        "exec_into_a_dead_container_fails",
        exec_into_a_dead_container_fails,
    ),
    (
        "exec_into_a_paused_container_fails",
        exec_into_a_paused_container_fails,
    ),
    ("exec_with_a_terminal", exec_with_a_terminal),
    ("exec_runs_in_a_cgroup_below", exec_runs_in_a_cgroup_below),
];

fn process(edit: impl FnOnce(&mut Value)) -> Process {
    let mut value = json!({"user": {"uid": 0, "gid": 0}, "args": ["true"], "env": ["PATH=/bin"],
        "cwd": "/"});
    edit(&mut value);
    serde_json::from_value(value).unwrap()
}

fn exec_runs_inside() {
    let mut container = Container::sleeping(|_| {});
    let before = open_files();
    let script = "hostname; for n in pid net ipc uts mnt cgroup; do \
        [ $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) ] || echo $n; done; \
        ls /proc/self/fd | wc -l; echo err >&2; exit 7";
    let outcome = container.exec_shell(script, |process| {
        // To look at process 1 takes as many rights as it has.
        process["capabilities"]["effective"]
            .as_array_mut()
            .unwrap()
            .push(json!("CAP_KILL"));
    });
    assert_eq!(outcome.code, 7);
    assert_eq!(outcome.stdout, "inside\n4\n");
    assert_eq!(outcome.stderr, "err\n");
    assert_eq!(open_files(), before);
    let own = fs::read_link("/proc/self/ns/pid").unwrap();
    assert_eq!(
        fs::read_link("/proc/self/ns/pid_for_children").unwrap(),
        own
    );
    container.kill_and_delete();
}

fn exec_has_its_own_user_rights_and_environment() {
    let mut container = Container::sleeping(|_| {});
    let outcome = container.exec_shell(
        "id; env | sort | tr '\\n' ' '; pwd; grep -E '^(CapEff|NoNewPrivs):' /proc/self/status; ulimit -n",
        |process| {
            process["user"] = json!({"uid": 1000, "gid": 5, "additionalGids": [6]});
            process["env"] = json!(["PATH=/bin", "K=v"]);
            process["cwd"] = json!("/tmp");
            process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 99}]);
        },
    );
    assert!(
        outcome
            .stdout
            .starts_with("uid=1000(user) gid=5 groups=6\n"),
        "{outcome:?}"
    );
    assert!(
        outcome.stdout.contains("HOME=/home K=v PATH=/bin PWD=/tmp"),
        "{outcome:?}"
    );
    assert!(
        outcome
            .stdout
            .contains("/tmp\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\n99\n"),
        "{outcome:?}"
    );
    container.kill_and_delete();
}

fn exec_is_in_the_containers_cgroup() {
    let container = Container::sleeping(|_| {});
    let (created, _out, _err) = container
        .exec(&process(|one| one["args"] = json!(["sleep", "1000"])))
        .unwrap();
    assert!(container.cgroup.pids().unwrap().contains(&created.pid));
    let text = fs::read_to_string(format!("/proc/{}/cgroup", created.pid)).unwrap();
    let path = container.cgroup.path().to_str().unwrap();
    let inside = text.lines().filter(|line| line.ends_with(path)).count();
    let hierarchies = container.cgroup.layout().hierarchies().len();
    assert_eq!(inside, hierarchies, "{text}");
    container.engine.delete(&container.cgroup).unwrap();
    container.assert_gone();
}

fn exec_has_the_containers_seccomp() {
    for no_new_privileges in [true, false] {
        let mut container = Container::sleeping(|container| {
            container.config["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
            });
            container.config["process"]["noNewPrivileges"] = json!(no_new_privileges);
        });
        let outcome = container.exec_shell("mkdir /tmp/x", |_| {});
        assert!(
            outcome.stderr.contains("Operation not permitted"),
            "{outcome:?}"
        );
        container.kill_and_delete();
    }
}

fn exec_has_the_containers_time_and_personality() {
    if !exists("/proc/self/ns/time".as_ref()) {
        println!("skipped: this kernel has no time namespaces");
        return;
    }
    let mut container = Container::sleeping(|container| {
        let linux = &mut container.config["linux"];
        let namespaces = linux["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({"type": "time"}));
        linux["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000}});
        linux["personality"] = json!({"domain": "LINUX32"});
    });
    let outcome = container.exec_shell("cat /proc/uptime /proc/self/personality", |_| {});
    let mut words = outcome.stdout.split_whitespace();
    let uptime: f64 = words.next().unwrap().parse().unwrap();
    assert!(uptime > 1e9, "{outcome:?}");
    assert_eq!(words.next_back(), Some("00000008"), "{outcome:?}");
    container.kill_and_delete();
}

fn exec_joins_a_user_namespace() {
    let mut container = Container::sleeping(|container| {
        container.config["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "user"}));
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        container.config["linux"]["uidMappings"] = map.clone();
        container.config["linux"]["gidMappings"] = map;
        let root = container.root();
        for directory in [
            container.directory.path(),
            &root,
            &root.join("tmp"),
            &root.join("dev"),
        ] {
            std::os::unix::fs::chown(directory, Some(100_000), Some(100_000)).unwrap();
        }
    });
    let outcome = container.exec_shell("id -u; touch /tmp/made; cat /proc/self/uid_map", |_| {});
    let words: Vec<&str> = outcome.stdout.split_whitespace().collect();
    assert_eq!(words, ["0", "0", "100000", "65536"], "{outcome:?}");
    let made = fs::metadata(container.root().join("tmp/made")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), 100_000);
    container.kill_and_delete();
}

fn exec_of_a_missing_program_fails() {
    let mut container = Container::sleeping(|_| {});
    let error = container
        .exec(&process(|one| one["args"] = json!(["no-such"])))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "exec: \"no-such\": executable file not found in $PATH"
    );
    assert_eq!(container.cgroup.pids().unwrap().len(), 1);
    container.kill_and_delete();
}

fn exec_into_a_dead_container_fails() {
    let mut container = Container::new(&["true"]);
    container.create().unwrap();
    container.engine.start().unwrap();
    let created = container.created.unwrap();
    nix::sys::wait::waitid(
        nix::sys::wait::Id::Pid(created.pid),
        nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT,
    )
    .unwrap();
    let error = container.exec(&process(|_| {})).unwrap_err();
    assert!(matches!(error, Error::NotRunning(_)), "{error}");
    container.finish();
}

fn exec_into_a_paused_container_fails() {
    let mut container = Container::sleeping(|_| {});
    container.cgroup.freeze().unwrap();
    let error = container.exec(&process(|_| {})).unwrap_err();
    assert!(matches!(error, Error::Paused), "{error}");
    container.cgroup.thaw().unwrap();
    assert_eq!(container.exec_shell("true", |_| {}).code, 0);
    container.kill_and_delete();
}

fn exec_with_a_terminal() {
    use std::io::Read;
    let mut container = Container::sleeping(|_| {});
    let listener = engine::console::Listener::bind(container.path("console.sock")).unwrap();
    let init = container.created.unwrap();
    let created = container
        .engine
        .exec(ExecRequest {
            init: init.pid,
            init_start: init.start_time,
            process: &process(|one| {
                one["args"] = json!(["tty"]);
                one["terminal"] = json!(true);
            }),
            linux: None,
            state: serde_json::Value::Null,
            cgroup: &container.cgroup,
            sub_cgroup: None,
            stdio: Stdio::Console(listener.path().to_owned()),
            preserve_fds: 0,
            ignore_paused: false,
            no_new_keyring: false,
        })
        .unwrap();
    let mut master = fs::File::from(listener.receive().unwrap());
    // A read may get what was written by then, and the line's end is written apart.
    let mut line = [0u8; b"/dev/pts/0\r\n".len()];
    master.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"/dev/pts/0\r\n");
    assert_eq!(crate::fixture::wait(created.pid), 0);
    container.kill_and_delete();
}

fn exec_runs_in_a_cgroup_below() {
    let mut container = Container::sleeping(|_| {});
    let below = Cgroup::new(&container.cgroup.path().join("below")).unwrap();
    let unified = std::path::Path::new("/sys/fs/cgroup");
    if unified.join("cgroup.controllers").exists() {
        // Without controllers of its own: a cgroup with processes cannot give any and stay a domain.
        let path = below.path().strip_prefix("/").unwrap();
        fs::create_dir(unified.join(path)).unwrap();
    } else {
        below.create().unwrap();
    }
    let init = container.created.unwrap();
    let request = |sub: &'static str| ExecRequest {
        init: init.pid,
        init_start: init.start_time,
        process: Box::leak(Box::new(process(|one| {
            one["args"] = json!(["sleep", "1000"])
        }))),
        linux: None,
        state: serde_json::Value::Null,
        cgroup: Box::leak(Box::new(container.cgroup.clone())),
        sub_cgroup: Some(sub.as_ref()),
        stdio: Stdio::Inherit,
        preserve_fds: 0,
        ignore_paused: false,
        no_new_keyring: false,
    };
    assert!(container.engine.exec(request("../escape")).is_err());
    let created = container.engine.exec(request("below")).unwrap();
    assert_eq!(below.pids().unwrap(), [created.pid]);
    // Until its parent, which is us, has reaped it, the container's first process cannot end.
    nix::sys::signal::kill(created.pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(crate::fixture::wait(created.pid), 137);
    container.kill_and_delete();
}
