//! The program: its result, streams, environment, user and rights.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixListener;

use engine::{Error, Stdio, console};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use serde_json::json;

use crate::Test;
use crate::fixture::{Container, open_files, pipe, wait};

pub const TESTS: &[Test] = &[
    ("exit_code_is_the_programs", exit_code_is_the_programs),
    ("death_by_signal_is_seen", death_by_signal_is_seen),
    ("streams_are_apart", streams_are_apart),
    ("input_reaches_the_program", input_reaches_the_program),
    ("environment_is_exact", environment_is_exact),
    ("home_comes_from_passwd", home_comes_from_passwd),
    ("cwd_is_entered_and_made", cwd_is_entered_and_made),
    ("user_and_groups_are_set", user_and_groups_are_set),
    ("capabilities_are_exact", capabilities_are_exact),
    (
        "ambient_capabilities_reach_a_user",
        ambient_capabilities_reach_a_user,
    ),
    ("rlimits_are_set", rlimits_are_set),
    ("umask_is_set", umask_is_set),
    ("oom_score_is_set", oom_score_is_set),
    ("no_new_privileges_is_set", no_new_privileges_is_set),
    ("seccomp_denies", seccomp_denies),
    ("seccomp_asks_who_listens", seccomp_asks_who_listens),
    (
        "seccomp_without_no_new_privileges",
        seccomp_without_no_new_privileges,
    ),
    ("seccomp_masked_arguments", seccomp_masked_arguments),
    ("no_descriptor_leaks_in", no_descriptor_leaks_in),
    ("signals_are_default", signals_are_default),
    (
        "a_missing_program_fails_create",
        a_missing_program_fails_create,
    ),
    (
        "a_program_that_is_not_executable_fails_create",
        a_program_that_is_not_executable_fails_create,
    ),
    (
        "a_capability_we_lack_is_named",
        a_capability_we_lack_is_named,
    ),
    ("terminal_by_console_socket", terminal_by_console_socket),
];

fn exit_code_is_the_programs() {
    for code in [0, 1, 42, 255] {
        assert_eq!(Container::shell(&format!("exit {code}")).run().code, code);
    }
}

fn death_by_signal_is_seen() {
    // The first process of a pid namespace has no default signal action from inside; its child has.
    let mut container = Container::new(&["sleep", "100"]);
    let created = container.create().unwrap();
    container.engine.start().unwrap();
    nix::sys::signal::kill(created.pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(container.finish().code, 137);
}

fn streams_are_apart() {
    let outcome = Container::shell("echo out; echo err >&2").run();
    assert_eq!(
        (outcome.stdout.as_str(), outcome.stderr.as_str()),
        ("out\n", "err\n")
    );
}

fn input_reaches_the_program() {
    let (read, write) = pipe();
    let mut container = Container::shell("wc -c");
    container.create_with_input(read).unwrap();
    container.engine.start().unwrap();
    let mut write = File::from(write);
    write.write_all(&[b'x'; 50_000]).unwrap();
    drop(write);
    assert_eq!(container.finish().stdout.trim(), "50000");
}

fn environment_is_exact() {
    // SAFETY: this process has one thread.
    unsafe { std::env::set_var("OF_THE_HOST", "1") };
    let mut container = Container::new(&["env"]);
    container.config["process"]["env"] = json!(["PATH=/bin", "B=2=3", "A=1", "HOME=/h", "EMPTY="]);
    assert_eq!(
        container.output(),
        "PATH=/bin\nB=2=3\nA=1\nHOME=/h\nEMPTY=\n"
    );
}

fn home_comes_from_passwd() {
    let mut container = Container::shell("echo $HOME");
    container.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    assert_eq!(container.output(), "/home\n");
    let mut container = Container::shell("echo $HOME");
    container.config["process"]["user"] = json!({"uid": 77, "gid": 77});
    assert_eq!(container.output(), "/\n");
}

fn cwd_is_entered_and_made() {
    let mut container = Container::new(&["pwd"]);
    container.config["process"]["cwd"] = json!("/made/for/it");
    assert_eq!(container.output(), "/made/for/it\n");
    let mut container = Container::new(&["pwd"]);
    container.config["process"]["cwd"] = json!("/etc/passwd");
    let error = container.create().unwrap_err().to_string();
    assert!(error.contains("process.cwd \"/etc/passwd\""), "{error}");
    container.assert_gone();
}

fn user_and_groups_are_set() {
    let mut container = Container::new(&["id"]);
    container.config["process"]["user"] =
        json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 77]});
    let text = container.output();
    assert!(
        text.contains("uid=1000(user) gid=1001 groups=5,77"),
        "{text}"
    );
    let text = Container::new(&["id"]).output();
    assert_eq!(text.trim_end(), "uid=0(root) gid=0");
}

fn status(container: &mut Container, field: &str) -> String {
    container.config["process"]["args"] =
        json!(["grep", format!("^{field}:"), "/proc/self/status"]);
    let text = container.output();
    text.split_whitespace().nth(1).unwrap().to_owned()
}

fn capabilities_are_exact() {
    let mut container = Container::new(&[]);
    // CHOWN 0, KILL 5, SETUID 7, NET_BIND_SERVICE 10.
    for field in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status(&mut container, field), "00000000000004a1", "{field}");
    }
    for field in ["CapInh", "CapAmb"] {
        assert_eq!(status(&mut container, field), "0000000000000000", "{field}");
    }
}

fn ambient_capabilities_reach_a_user() {
    let mut container = Container::new(&[]);
    let set = json!(["CAP_NET_BIND_SERVICE"]);
    container.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    container.config["process"]["capabilities"] = json!({
        "bounding": set, "effective": set, "permitted": set, "inheritable": set, "ambient": set
    });
    assert_eq!(status(&mut container, "CapEff"), "0000000000000400");
    container.config["process"]["capabilities"]["inheritable"] = json!([]);
    assert_eq!(status(&mut container, "CapAmb"), "0000000000000000");
}

fn rlimits_are_set() {
    let mut container = Container::shell("ulimit -n; ulimit -Hn; ulimit -c");
    container.config["process"]["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "soft": 123, "hard": 456},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
    ]);
    assert_eq!(container.output(), "123\n456\n0\n");
}

fn umask_is_set() {
    let mut container = Container::shell("umask");
    container.config["process"]["user"]["umask"] = json!(0o027);
    assert_eq!(container.output(), "0027\n");
}

fn oom_score_is_set() {
    let mut container = Container::new(&["cat", "/proc/self/oom_score_adj"]);
    container.config["process"]["oomScoreAdj"] = json!(321);
    assert_eq!(container.output(), "321\n");
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    assert_ne!(own, "321\n", "the caller's own score must stay");
}

fn no_new_privileges_is_set() {
    let mut container = Container::new(&[]);
    assert_eq!(status(&mut container, "NoNewPrivs"), "1");
    container.config["process"]["noNewPrivileges"] = json!(false);
    assert_eq!(status(&mut container, "NoNewPrivs"), "0");
}

fn profile() -> serde_json::Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
    })
}

fn seccomp_denies() {
    let mut container = Container::shell("mkdir /tmp/x; echo $?; grep Seccomp: /proc/self/status");
    container.config["linux"]["seccomp"] = profile();
    let outcome = container.run();
    assert!(
        outcome.stderr.contains("Operation not permitted"),
        "{outcome:?}"
    );
    assert_eq!(outcome.stdout, "1\nSeccomp:\t2\n");
}

fn seccomp_without_no_new_privileges() {
    for value in [json!(false), serde_json::Value::Null] {
        let mut container = Container::shell("mkdir /tmp/x");
        container.config["linux"]["seccomp"] = profile();
        container.config["process"]["noNewPrivileges"] = value;
        container.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        container.config["process"]["capabilities"] = json!({});
        let outcome = container.run();
        assert!(
            outcome.stderr.contains("Operation not permitted"),
            "{outcome:?}"
        );
    }
}

fn seccomp_masked_arguments() {
    // As in clients' default profiles: clone is allowed only without namespace flags.
    let mut container = Container::shell("true | true; unshare -u true 2>&1; echo $?");
    container.config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["clone", "unshare"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13,
             "args": [{"index": 0, "value": 0x0400_0000u32, "valueTwo": 0x0400_0000u32,
                       "op": "SCMP_CMP_MASKED_EQ"}]},
        ],
    });
    let text = container.output();
    assert!(text.contains("Permission denied"), "{text}");
    assert!(text.ends_with("1\n"), "{text}");
}

fn no_descriptor_leaks_in() {
    // A descriptor without close-on-exec, as a careless caller has.
    let file = File::open("/etc/hostname").unwrap();
    let leaked = nix::unistd::dup(std::os::fd::AsRawFd::as_raw_fd(&file)).unwrap();
    assert!(leaked > 2);
    let before = open_files();
    let mut container = Container::shell("ls /proc/self/fd");
    let text = container.output();
    // 0, 1, 2 and the one that ls reads the directory by.
    assert_eq!(
        text.split_whitespace().collect::<Vec<_>>(),
        ["0", "1", "2", "3"]
    );
    assert_eq!(open_files(), before, "the caller's own descriptors");
}

fn signals_are_default() {
    // SAFETY: ignoring a signal is always sound; this process has one thread.
    unsafe { libc::signal(libc::SIGTERM, libc::SIG_IGN) };
    let mut blocked = nix::sys::signal::SigSet::empty();
    blocked.add(nix::sys::signal::Signal::SIGCHLD);
    blocked.thread_block().unwrap();
    let mut container = Container::new(&["grep", "-E", "^Sig(Blk|Ign):", "/proc/self/status"]);
    let text = container.output();
    assert_eq!(
        text,
        "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n"
    );
}

fn a_missing_program_fails_create() {
    let mut container = Container::new(&["no-such-program"]);
    let error = container.create().unwrap_err();
    assert_eq!(
        error.to_string(),
        "exec: \"no-such-program\": executable file not found in $PATH"
    );
    assert!(matches!(error, Error::CommandNotFound(_)));
    container.assert_gone();
    let mut container = Container::new(&["/no/such"]);
    assert_eq!(container.create().unwrap_err().exit_code(), 127);
}

fn a_program_that_is_not_executable_fails_create() {
    let mut container = Container::new(&["/etc/passwd"]);
    let error = container.create().unwrap_err();
    assert_eq!(
        error.to_string(),
        "exec: \"/etc/passwd\": permission denied"
    );
    assert_eq!(error.exit_code(), 126);
    container.assert_gone();
}

fn a_capability_we_lack_is_named() {
    if caps::has_cap(
        None,
        caps::CapSet::Permitted,
        caps::Capability::CAP_SYS_RESOURCE,
    )
    .unwrap()
    {
        println!("skipped: this host has every capability");
        return;
    }
    let mut container = Container::new(&["true"]);
    container.config["process"]["capabilities"]["permitted"] = json!(["CAP_SYS_RESOURCE"]);
    let error = container.create().unwrap_err().to_string();
    assert!(
        error.contains("CAP_SYS_RESOURCE cannot be given"),
        "{error}"
    );
    container.assert_gone();
}

fn terminal_by_console_socket() {
    let mut container = Container::shell("tty; stty size; ls -l /dev/console | cut -c1; id -u");
    container.config["process"]["terminal"] = json!(true);
    container.config["process"]["consoleSize"] = json!({"height": 33, "width": 77});
    let listener = console::Listener::bind(container.path("console.sock")).unwrap();
    let created = container
        .create_with(Stdio::Console(listener.path().to_owned()))
        .unwrap();
    let mut master = File::from(listener.receive().unwrap());
    container.engine.start().unwrap();
    let mut text = String::new();
    let mut buffer = [0u8; 256];
    // The end of a terminal is EIO.
    while let Ok(count @ 1..) = master.read(&mut buffer) {
        text.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    assert_eq!(wait(created.pid), 0);
    assert_eq!(text, "/dev/pts/0\r\n33 77\r\nc\r\n0\r\n");
    container.engine.delete(&container.cgroup).unwrap();
    container.assert_gone();
}

fn seccomp_asks_who_listens() {
    for no_new_privileges in [false, true] {
        let mut container = Container::shell("mkdir /tmp/made; echo $?");
        let path = container.path("agent.sock");
        let agent = UnixListener::bind(&path).unwrap();
        container.config["process"]["noNewPrivileges"] = no_new_privileges.into();
        container.config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "listenerPath": path,
            "listenerMetadata": "for the agent",
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}],
        });
        let pid = container.create().unwrap().pid;
        let (connection, _) = agent.accept().unwrap();
        let mut text = [0u8; 4096];
        let mut space = nix::cmsg_space!(std::os::fd::RawFd);
        let mut parts = [std::io::IoSliceMut::new(&mut text)];
        let message = recvmsg::<UnixAddr>(
            connection.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::empty(),
        )
        .unwrap();
        let files: Vec<_> = message
            .cmsgs()
            .unwrap()
            .filter_map(|one| match one {
                ControlMessageOwned::ScmRights(files) => Some(files),
                _ => None,
            })
            .flatten()
            .collect();
        let length = message.bytes;
        let told: serde_json::Value = serde_json::from_slice(&text[..length]).unwrap();
        assert_eq!(told["pid"], pid.as_raw());
        assert_eq!(told["fds"], json!(["seccompFd"]));
        assert_eq!(told["metadata"], "for the agent");
        assert_eq!(told["state"]["status"], "creating");
        // SAFETY: the kernel has just put it into this process.
        let listener = unsafe { std::os::fd::OwnedFd::from_raw_fd(files[0]) };
        // It answers what the workload asks: EDOM, which mkdir never says by itself.
        let answer = std::thread::spawn(move || {
            let listener = listener.as_raw_fd();
            let mut request = [0u64; 10];
            let mut reply = [0u64; 3];
            // Kernel ABI: SECCOMP_IOCTL_NOTIF_RECV and _SEND on structures of 80 and 24 bytes.
            // SAFETY: they have the sizes that the numbers of the requests say.
            let received = unsafe {
                libc::ioctl(
                    listener,
                    0xc050_2100_u32 as libc::Ioctl,
                    request.as_mut_ptr(),
                )
            };
            assert_eq!(received, 0);
            reply[0] = request[0];
            reply[2] = u64::from((-libc::EDOM) as u32);
            // SAFETY: as above.
            let sent = unsafe {
                libc::ioctl(listener, 0xc018_2101_u32 as libc::Ioctl, reply.as_mut_ptr())
            };
            assert_eq!(sent, 0);
        });
        container.engine.start().unwrap();
        let outcome = container.finish();
        answer.join().unwrap();
        assert_eq!(outcome.stdout, "1\n", "{outcome:?}");
        assert!(
            outcome.stderr.contains("argument out of domain"),
            "{outcome:?}"
        );
    }
}
