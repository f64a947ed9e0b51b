//! `rt verify`: a bundle's weaknesses before it runs, and what the kernel says of a container that does.
//!
//! That each check can fail is shown by breaking what it looks at while the container runs.

use std::fs::{self, Permissions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use integration::fault::FaultRun;
use integration::snapshot::Snapshot;
use integration::{
    Bundle, Claim, Fixture, Model, Outcome, ensure, ensure_eq, eventually, finish, wait_with_limit,
};
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    (
        "a_bundle_is_verified_before_it_runs",
        a_bundle_is_verified_before_it_runs,
    ),
    (
        "what_cannot_be_verified_is_an_error",
        what_cannot_be_verified_is_an_error,
    ),
    (
        "a_confined_container_has_what_it_asked_for",
        a_confined_container_has_what_it_asked_for,
    ),
    (
        "what_changed_while_it_runs_is_found",
        what_changed_while_it_runs_is_found,
    ),
    (
        "the_kernel_tells_of_every_weakness",
        the_kernel_tells_of_every_weakness,
    ),
    (
        "no_attack_gets_out_of_a_confined_container",
        no_attack_gets_out_of_a_confined_container,
    ),
    (
        "interrupted_attacks_leave_nothing",
        interrupted_attacks_leave_nothing,
    ),
    (
        "what_a_privileged_container_reaches_is_told",
        what_a_privileged_container_reaches_is_told,
    ),
    (
        "what_a_container_shares_with_the_host_is_reached",
        what_a_container_shares_with_the_host_is_reached,
    ),
];

pub const CONTAINER_CLAIMS: &[Entry] = &[
    ("a_leaked_descriptor_is_found", a_leaked_descriptor_is_found),
    (
        "a_leaked_object_of_the_kernel_is_found",
        a_leaked_object_of_the_kernel_is_found,
    ),
    (
        "a_program_from_outside_is_found",
        a_program_from_outside_is_found,
    ),
    (
        "a_setting_that_is_not_in_force_is_found",
        a_setting_that_is_not_in_force_is_found,
    ),
    (
        "another_map_of_a_mount_is_found",
        another_map_of_a_mount_is_found,
    ),
    (
        "who_makes_users_of_its_own_is_not_known",
        who_makes_users_of_its_own_is_not_known,
    ),
    (
        "who_leaves_its_mounts_is_not_known",
        who_leaves_its_mounts_is_not_known,
    ),
    (
        "what_is_mounted_over_or_beside_is_found",
        what_is_mounted_over_or_beside_is_found,
    ),
    (
        "a_process_that_came_in_is_found",
        a_process_that_came_in_is_found,
    ),
    (
        "containers_of_other_runtimes_are_told_truly",
        containers_of_other_runtimes_are_told_truly,
    ),
    ("a_page_is_shown_by_a_browser", a_page_is_shown_by_a_browser),
];

pub const MICROVM_CLAIMS: &[Entry] = &[(
    "what_a_vmms_jail_lacks_is_found",
    what_a_vmms_jail_lacks_is_found,
)];

type Answer<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Calls `rt verify`, and gives its report and exit code.
fn verify(fixture: &Fixture, arguments: &[&str]) -> Answer<(Value, i32)> {
    let call = fixture.call(&[&["verify", "--format", "json"], arguments].concat())?;
    let report =
        serde_json::from_str(&call.stdout).map_err(|error| format!("{error}: {}", call.stderr))?;
    Ok((report, call.code()))
}

/// The rules that are broken at a severity, without those named twice.
fn rules<'a>(report: &'a Value, severity: &str) -> Vec<&'a str> {
    let findings = report["findings"].as_array().into_iter().flatten();
    let of_severity = findings.filter(|one| one["severity"] == severity);
    let mut rules: Vec<&str> = of_severity.filter_map(|one| one["rule"].as_str()).collect();
    rules.dedup();
    rules
}

/// The names of the properties that do not hold.
fn broken(report: &Value) -> Vec<&str> {
    let properties = report["properties"].as_array().into_iter().flatten();
    let broken = properties.filter(|one| one["holds"] == false);
    broken.filter_map(|one| one["name"].as_str()).collect()
}

/// A bundle that gives up nothing that the strictest policy asks for but a user namespace.
fn confined(fixture: &Fixture) -> Answer<Bundle> {
    let mut bundle = fixture.bundle()?;
    let none = json!([]);
    bundle.spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    bundle.spec["process"]["capabilities"] =
        json!({"bounding": none, "effective": none, "permitted": none});
    bundle.spec["linux"]["resources"] = json!({
        "devices": [{"allow": false, "access": "rwm"}],
        "memory": {"limit": 64 << 20},
        "pids": {"limit": 32},
        "cpu": {"quota": 50_000, "period": 100_000}
    });
    bundle.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["reboot", "swapon", "bpf"], "action": "SCMP_ACT_ERRNO"},
            {"names": ["personality"], "action": "SCMP_ACT_ERRNO",
             "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}
        ]
    });
    let volume = fixture.dir().join("volume");
    fs::create_dir_all(&volume)?;
    bundle.bind(&volume, "/volume", &["ro", "nosuid", "nodev"]);
    bundle.script("while true; do sleep 1000; done");
    Ok(bundle)
}

fn a_bundle_is_verified_before_it_runs(fixture: &Fixture) -> Claim {
    let mut bundle = confined(fixture)?;
    bundle.save()?;
    let dir = bundle.dir().to_string_lossy().into_owned();
    let (report, code) = verify(fixture, &[&dir])?;
    ensure_eq!(
        (rules(&report, "error"), code),
        (vec![], 0),
        "a sound bundle; {report}"
    );
    ensure!(report["holds"] == true, "{report}");
    bundle.spec["process"]["capabilities"]["bounding"] = json!(["CAP_SYS_ADMIN"]);
    bundle.without_namespace("network").save()?;
    let (report, code) = verify(fixture, &[&dir])?;
    ensure_eq!(
        (rules(&report, "error"), code),
        (vec!["host-namespaces", "capabilities"], 1),
        "a bundle with two weaknesses; {report}"
    );
    ensure_eq!(
        report["findings"][1]["at"],
        "process.capabilities.bounding",
        "the place"
    );
    // The administrator may see it otherwise.
    let policy = fixture.dir().join("own.toml");
    fs::write(
        &policy,
        "extends = \"baseline\"\n[rules.host-namespaces]\nseverity = \"off\"\n\
         [rules.capabilities]\nallow = [\"CAP_SYS_ADMIN\"]\n",
    )?;
    let (report, code) = verify(fixture, &[&dir, "--policy", &policy.to_string_lossy()])?;
    ensure_eq!(
        (rules(&report, "error"), code),
        (vec![], 0),
        "under another policy; {report}"
    );
    Ok(())
}

fn what_cannot_be_verified_is_an_error(fixture: &Fixture) -> Claim {
    for (arguments, reason) in [
        (
            ["verify", "--live", "no-such"],
            "container does not exist: no-such",
        ),
        (
            ["verify", "--pid", "2147483647"],
            "look at process 2147483647: ",
        ),
        (
            ["verify", "--policy", "loose"],
            "policy \"loose\": give baseline, ",
        ),
    ] {
        let outcome = fixture.call(&arguments)?;
        ensure_eq!(
            (outcome.code(), outcome.stdout.as_str()),
            (2, ""),
            "{arguments:?}"
        );
        ensure!(
            outcome.stderr.contains(reason),
            "{arguments:?}: {}",
            outcome.stderr
        );
    }
    Ok(())
}

fn a_confined_container_has_what_it_asked_for(fixture: &Fixture) -> Claim {
    let bundle = confined(fixture)?;
    let id = fixture.id("confined");
    fixture.start_detached(&bundle, &id)?;
    let (report, code) = verify(fixture, &["--live", &id])?;
    ensure_eq!(
        (broken(&report), rules(&report, "error"), code),
        (vec![], vec![], 0),
        "{report}"
    );
    let properties = report["properties"].as_array().ok_or("no properties")?;
    let unseen: Vec<&Value> = properties
        .iter()
        .filter(|one| one["holds"].is_null())
        .collect();
    ensure!(unseen.is_empty(), "not seen: {unseen:?}");
    let is_told = |name: &str| properties.iter().any(|one| one["name"] == name);
    for name in [
        "namespace.pid",
        "seccomp",
        "capabilities.bounding",
        "devices",
        "mount /volume",
        "pids-limit",
    ] {
        ensure!(
            is_told(name),
            "{name} is not among the properties: {report}"
        );
    }
    // A machine has a second wall, and that is looked at too.
    let machine = [
        "kernel",
        "jail.seccomp",
        "jail.capabilities",
        "jail.directories",
        "jail.shares",
    ];
    for name in machine {
        ensure_eq!(
            is_told(name),
            fixture.model() == Model::Microvm,
            "whether {name} is told; {report}"
        );
    }
    Ok(())
}

fn what_changed_while_it_runs_is_found(fixture: &Fixture) -> Claim {
    let mut bundle = confined(fixture)?;
    // exec may give rights up to these.
    bundle.spec["process"]["capabilities"]["bounding"] = json!(["CAP_NET_RAW"]);
    let id = fixture.id("changed");
    fixture.start_detached(&bundle, &id)?;
    let (report, _) = verify(fixture, &["--live", &id])?;
    ensure_eq!(broken(&report), Vec::<&str>::new(), "before");
    fixture
        .call(&["update", &id, "--pids-limit", "64"])?
        .success()?;
    let process = fixture.dir().join("process.json");
    let raw = json!(["CAP_NET_RAW"]);
    fs::write(
        &process,
        json!({
            "args": ["/bin/sleep", "1000"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "noNewPrivileges": false,
            "capabilities": {"bounding": raw, "effective": raw, "permitted": raw}
        })
        .to_string(),
    )?;
    let process = process.to_string_lossy().into_owned();
    let mut exec = fixture.rt(&["exec", "--detach", "--process", &process, &id]);
    // A detached process keeps its streams: captured pipes would never end.
    let exec = exec.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    ensure!(exec.success(), "rt exec: {exec}");
    let (report, code) = verify(fixture, &["--live", &id])?;
    let mut found = broken(&report);
    found.sort_unstable();
    ensure_eq!(
        (found, code),
        (
            vec![
                "capabilities.effective",
                "capabilities.permitted",
                "groups",
                "no-new-privileges",
                "rlimits",
                "user"
            ],
            1
        ),
        "{report}"
    );
    // What was asked for in between is what is asked for.
    let properties = report["properties"].as_array().into_iter().flatten();
    let limit = properties
        .into_iter()
        .find(|one| one["name"] == "pids-limit");
    let limit = limit.ok_or("no limit of processes")?;
    ensure_eq!(
        (&limit["asked"], &limit["found"]),
        (&json!("64"), &json!("64")),
        "limit"
    );
    Ok(())
}

fn the_kernel_tells_of_every_weakness(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    let given = json!(["CAP_SYS_ADMIN", "CAP_CHOWN"]);
    bundle.spec["process"]["capabilities"] = json!({
        "bounding": given, "effective": given, "permitted": given, "inheritable": ["CAP_CHOWN"]
    });
    bundle.spec["process"]["noNewPrivileges"] = json!(false);
    bundle.spec["root"]["readonly"] = json!(false);
    bundle.spec["linux"]["maskedPaths"] = json!([]);
    bundle.spec["linux"]["readonlyPaths"] = json!([]);
    bundle.spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    for mount in bundle.spec["mounts"].as_array_mut().into_iter().flatten() {
        if mount["destination"] == "/sys" || mount["destination"] == "/sys/fs/cgroup" {
            mount["options"] = json!(["nosuid", "noexec", "nodev"]);
        }
    }
    let socket = fixture.dir().join("docker.sock");
    fs::write(&socket, "")?;
    bundle.bind(&socket, "/run/docker.sock", &[]);
    bundle.script("while true; do sleep 1000; done");
    let id = fixture.id("weak");
    fixture.start_detached(&bundle, &id)?;
    let (report, code) = verify(fixture, &["--live", &id])?;
    // It has what it asked for, and that is too much.
    ensure_eq!((broken(&report), code), (vec![], 1), "{report}");
    ensure_eq!(
        rules(&report, "error"),
        vec![
            "capabilities",
            "masked-paths",
            "read-only-paths",
            "writable-sysfs",
            "runtime-sockets",
            "devices"
        ],
        "errors; {report}"
    );
    let notes = rules(&report, "note");
    for rule in [
        "user-namespace",
        "root-user",
        "inherited-capabilities",
        "new-privileges",
        "writable-root",
        "pids-limit",
    ] {
        ensure!(notes.contains(&rule), "{rule} is not among {notes:?}");
    }
    Ok(())
}

fn a_leaked_descriptor_is_found(fixture: &Fixture) -> Claim {
    let bundle = confined(fixture)?;
    bundle.save()?;
    let id = fixture.id("leak");
    let mut rt = fixture.rt(&["run", "--detach", "--preserve-fds", "1", "--bundle"]);
    rt.arg(bundle.dir()).arg(&id);
    let mut shell = Command::new("sh");
    // The container keeps its streams: none of ours may be among them.
    shell.args(["-c", "exec \"$@\" 3</etc </dev/null >/dev/null 2>&1", "sh"]);
    shell.arg(rt.get_program()).args(rt.get_args());
    ensure!(shell.status()?.success(), "rt run failed");
    let (report, code) = verify(fixture, &["--live", &id])?;
    ensure_eq!(
        (rules(&report, "error"), code),
        (vec!["open-descriptors"], 1),
        "{report}"
    );
    let finding = &report["findings"][0];
    let at = finding["at"].as_str().unwrap_or_default();
    ensure!(at.ends_with("/fd/3"), "{finding}");
    ensure_eq!(
        finding["what"],
        "/etc is outside the container",
        "what is found"
    );
    Ok(())
}

fn a_leaked_object_of_the_kernel_is_found(fixture: &Fixture) -> Claim {
    let bundle = confined(fixture)?;
    bundle.save()?;
    let (socket, _other) = UnixStream::pair()?;
    let map = bpf_map()?;
    let program = memfd_create(c"rt", MemFdCreateFlag::MFD_CLOEXEC)?;
    let program = fs::File::from(program);
    std::io::copy(
        &mut fs::File::open(fixture.rt(&["state"]).get_program())?,
        &mut &program,
    )?;
    for (name, leaked) in [
        ("socket:[", OwnedFd::from(socket)),
        ("anon_inode:bpf-map", map),
        ("/memfd:rt (deleted)", program.into()),
    ] {
        let id = fixture.id("object");
        let mut rt = fixture.rt(&["run", "--detach", "--preserve-fds", "1", "--bundle"]);
        rt.arg(bundle.dir()).arg(&id).stdin(Stdio::null());
        // The container keeps its streams: none of ours may be among them.
        rt.stdout(Stdio::null()).stderr(Stdio::null());
        let leaked = leaked.as_raw_fd();
        // SAFETY: the child makes system calls alone, which allocate nothing.
        unsafe {
            rt.pre_exec(move || match libc::dup2(leaked, 3) {
                // One that is there already would be closed by execve(2) as before.
                3 if leaked != 3 || libc::fcntl(3, libc::F_SETFD, 0) == 0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        ensure!(rt.status()?.success(), "rt run failed");
        let (report, code) = verify(fixture, &["--live", &id])?;
        ensure_eq!(
            (broken(&report), rules(&report, "error"), code),
            (vec!["descriptors"], vec!["open-descriptors"], 1),
            "{name}: {report}"
        );
        let what = report["findings"][0]["what"].as_str().unwrap_or_default();
        ensure!(what.starts_with(name), "{name}: {report}");
        fixture.call(&["delete", "--force", &id])?.success()?;
    }
    Ok(())
}

/// A map of the kernel's (bpf(2)), which a confined container cannot make.
fn bpf_map() -> Answer<OwnedFd> {
    // `BPF_MAP_TYPE_ARRAY`, the sizes of a key and of a value, and how many there are.
    let attributes: [u32; 4] = [2, 4, 4, 1];
    let (create, size) = (0, size_of_val(&attributes));
    // SAFETY: the kernel reads as many bytes as there are.
    let map = unsafe { libc::syscall(libc::SYS_bpf, create, attributes.as_ptr(), size) };
    let map = i32::try_from(map)?;
    if map < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: the kernel just opened it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(map) })
}

fn a_program_from_outside_is_found(fixture: &Fixture) -> Claim {
    let bundle = confined(fixture)?;
    let id = fixture.id("outside");
    fixture.start_detached(&bundle, &id)?;
    let pid = pid_of(fixture, &id)?;
    let namespace = fs::File::open(format!("/proc/{pid}/ns/mnt"))?;
    // A file that the container does not have, and that has no name in there.
    let path = fixture.dir().join("program");
    fs::copy("/bin/busybox", &path)?;
    let program = fs::File::open(&path)?;
    let mut sleep = Command::new(&path);
    let (inside, executed) = (namespace.as_raw_fd(), program.as_raw_fd());
    // SAFETY: the child makes two system calls, which allocate nothing, with strings and lists that are alive.
    unsafe {
        sleep.stdin(Stdio::null()).pre_exec(move || {
            let arguments = [c"sleep".as_ptr(), c"1000".as_ptr(), std::ptr::null()];
            let environment = [std::ptr::null()];
            if libc::setns(inside, libc::CLONE_NEWNS) == 0 {
                libc::fexecve(executed, arguments.as_ptr(), environment.as_ptr());
            }
            Err(std::io::Error::last_os_error())
        });
    }
    let mut process = sleep.spawn()?;
    let told = verify(fixture, &["--live", &id]);
    process.kill()?;
    process.wait()?;
    let (report, code) = told?;
    ensure_eq!(code, 1, "{report}");
    let findings = report["findings"].as_array().into_iter().flatten();
    let mut places = findings.filter_map(|one| one["at"].as_str());
    let place = format!("/proc/{}/exe", process.id());
    ensure!(places.any(|at| at == place), "{place}: {report}");
    Ok(())
}

fn a_setting_that_is_not_in_force_is_found(fixture: &Fixture) -> Claim {
    let mut bundle = confined(fixture)?;
    let volume = fixture.dir().join("volume");
    bundle.bind(&volume, "/links", &["ro", "nosuid", "nodev", "nosymfollow"]);
    for mount in bundle.spec["mounts"].as_array_mut().into_iter().flatten() {
        if mount["destination"] == "/proc" {
            mount["options"] = json!(["nosuid", "noexec", "nodev", "hidepid=2"]);
        }
    }
    let name = "net.ipv4.ip_local_port_range";
    bundle.spec["linux"]["sysctl"] = json!({name: "20000 30000"});
    let shares = json!({"quota": 50_000, "period": 100_000, "shares": 512});
    bundle.spec["linux"]["resources"]["cpu"] = shares;
    let id = fixture.id("settings");
    fixture.start_detached(&bundle, &id)?;
    let (report, code) = verify(fixture, &["--live", &id])?;
    ensure_eq!((broken(&report), code), (vec![], 0), "before: {report}");
    let pid = pid_of(fixture, &id)?;
    for (namespace, command) in [
        (
            "--mount",
            "mount -o remount,nosuid,noexec,nodev,hidepid=0 /proc",
        ),
        (
            "--mount",
            "mount -o remount,bind,ro,nosuid,nodev none /links",
        ),
        (
            "--net",
            "echo 1024 65000 > /proc/sys/net/ipv4/ip_local_port_range",
        ),
    ] {
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["--target", &pid, "--pid", namespace, "sh", "-c", command]);
        finish(&mut nsenter, None)?.success()?;
    }
    fixture
        .call(&["update", "--cpu-share", "1024", &id])?
        .success()?;
    let (report, code) = verify(fixture, &["--live", &id])?;
    let mut found = broken(&report);
    found.sort_unstable();
    let expected = vec![
        "mount /links",
        "mount /proc",
        "sysctl net.ipv4.ip_local_port_range",
    ];
    ensure_eq!((found, code), (expected, 1), "{report}");
    // What was asked for in between is what is asked for.
    let properties = report["properties"].as_array().into_iter().flatten();
    let mut shares = properties.filter(|one| one["name"] == "limit cpu.shares");
    let shares = shares.next().ok_or("no shares")?;
    ensure_eq!(shares["asked"], "1024", "shares");
    Ok(())
}

fn another_map_of_a_mount_is_found(fixture: &Fixture) -> Claim {
    if kernel_version()? < (6, 15) {
        println!("skipped: Linux tells the maps of a mount since 6.15");
        return Ok(());
    }
    let mut bundle = confined(fixture)?;
    let map = |host: u32| json!([{"containerID": 0, "hostID": host, "size": 10}]);
    bundle.mount(json!({
        "destination": "/mapped", "type": "bind", "source": fixture.dir(), "options": ["bind"],
        "uidMappings": map(100_000), "gidMappings": map(200_000)
    }));
    let id = fixture.id("mapped");
    fixture.start_detached(&bundle, &id)?;
    let (report, code) = verify(fixture, &["--live", &id])?;
    ensure_eq!((broken(&report), code), (vec![], 0), "{report}");
    let pid = pid_of(fixture, &id)?;
    let mounts = bundle.spec["mounts"].as_array_mut().into_iter().flatten();
    for mount in mounts.filter(|mount| mount["destination"] == "/mapped") {
        mount["gidMappings"] = map(0);
    }
    bundle.save()?;
    let dir = bundle.dir().to_string_lossy().into_owned();
    let (report, code) = verify(fixture, &["--pid", &pid, &dir])?;
    ensure_eq!(
        (broken(&report), code),
        (vec!["mount /mapped"], 1),
        "{report}"
    );
    Ok(())
}

/// The kernel's version: the first two numbers of its release.
fn kernel_version() -> Answer<(u32, u32)> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split('.').map(str::parse);
    let mut next = || numbers.next().ok_or("no version");
    Ok((next()??, next()??))
}

fn who_makes_users_of_its_own_is_not_known(fixture: &Fixture) -> Claim {
    let mut bundle = confined(fixture)?;
    bundle.script("exec busybox unshare --user sleep 1000");
    let id = fixture.id("users");
    fixture.start_detached(&bundle, &id)?;
    let pid = pid_of(fixture, &id)?;
    eventually(Duration::from_secs(10), || {
        let own = fs::read_link(format!("/proc/{pid}/ns/user"))?;
        ensure!(own != fs::read_link("/proc/self/ns/user")?, "not yet");
        Ok(())
    })?;
    let (report, code) = verify(fixture, &["--live", &id])?;
    ensure_eq!((broken(&report), code), (vec![], 2), "{report}");
    let properties = report["properties"].as_array().into_iter().flatten();
    let unseen = properties.filter(|one| one["holds"].is_null());
    let mut unseen: Vec<&str> = unseen.filter_map(|one| one["name"].as_str()).collect();
    unseen.sort_unstable();
    ensure_eq!(
        unseen,
        ["groups", "processes", "user", "user-ids"],
        "{report}"
    );
    Ok(())
}

/// A program that calls unshare(2), waits, and executes nothing: an ELF file of one segment.
fn unsharing(flags: i32) -> Vec<u8> {
    let [one, two, three, four] = flags.to_le_bytes();
    let code = [
        0xbf, one, two, three, four, // mov edi, flags
        0xb8, 0x10, 0x01, 0x00, 0x00, // mov eax, 272 (unshare)
        0x0f, 0x05, // syscall
        0xb8, 0x22, 0x00, 0x00, 0x00, // mov eax, 34 (pause)
        0x0f, 0x05, // syscall
    ];
    let (base, headers) = (0x40_0000_u64, 120_u64);
    let size = headers + u64::try_from(code.len()).unwrap_or_default();
    let half = |value: u16| value.to_le_bytes().to_vec();
    let word = |value: u32| value.to_le_bytes().to_vec();
    let long = |value: u64| value.to_le_bytes().to_vec();
    [
        b"\x7fELF\x02\x01\x01".to_vec(),
        vec![0; 9],
        // An executable file for x86-64.
        [half(2), half(62), word(1)].concat(),
        [long(base + headers), long(64), long(0), word(0)].concat(),
        // The sizes and counts of headers.
        [64, 56, 1, 0, 0, 0].map(half).concat(),
        // The segment: loaded from the file's beginning, to be read and executed.
        [word(1), word(5), long(0), long(base), long(base)].concat(),
        [long(size), long(size), long(0x1000)].concat(),
        code.to_vec(),
    ]
    .concat()
}

fn who_leaves_its_mounts_is_not_known(fixture: &Fixture) -> Claim {
    for (flags, rights) in [
        (libc::CLONE_NEWUSER | libc::CLONE_NEWNS, json!([])),
        (libc::CLONE_NEWNS, json!(["CAP_SYS_ADMIN"])),
    ] {
        let mut bundle = confined(fixture)?;
        let program = bundle.in_rootfs("leave");
        fs::write(&program, unsharing(flags))?;
        fs::set_permissions(&program, Permissions::from_mode(0o755))?;
        bundle.spec["process"]["args"] = json!(["/leave"]);
        bundle.spec["process"]["user"] = json!({"uid": 0, "gid": 0});
        bundle.spec["process"]["capabilities"] =
            json!({"bounding": rights, "effective": rights, "permitted": rights});
        let id = fixture.id("leave");
        fixture.start_detached(&bundle, &id)?;
        let pid = pid_of(fixture, &id)?;
        eventually(Duration::from_secs(10), || {
            let call = fs::read_to_string(format!("/proc/{pid}/syscall"))?;
            ensure!(call.starts_with("34 "), "it does not wait yet: {call}");
            Ok(())
        })?;
        let (report, code) = verify(fixture, &["--live", &id, "--policy", "baseline"])?;
        ensure_eq!(broken(&report), [""; 0], "{report}");
        // What it has in its rights is told all the same.
        let is_privileged = rights != json!([]);
        ensure_eq!(code, if is_privileged { 1 } else { 2 }, "{report}");
        let properties = report["properties"].as_array().into_iter().flatten();
        let unseen = properties.filter(|one| one["holds"].is_null());
        let unseen: Vec<&str> = unseen.filter_map(|one| one["name"].as_str()).collect();
        for name in [
            "namespace.mount",
            "descriptors",
            "masked-paths",
            "mount /proc",
        ] {
            ensure!(unseen.contains(&name), "{name}: {report}");
        }
        fixture.call(&["delete", "--force", &id])?.success()?;
    }
    Ok(())
}

/// The pid of a container's first process.
fn pid_of(fixture: &Fixture, id: &str) -> Answer<String> {
    let state: Value = serde_json::from_str(&fixture.call(&["state", id])?.success()?.stdout)?;
    Ok(state["pid"].to_string())
}

fn what_is_mounted_over_or_beside_is_found(fixture: &Fixture) -> Claim {
    let bundle = confined(fixture)?;
    for (mount, expected) in [
        // What is over all masks is of the right type, and has the right flags.
        (
            "mount -t proc -o nosuid,nodev,noexec proc /proc",
            &["masked-paths", "mount /proc", "read-only-paths"][..],
        ),
        ("mount -t tmpfs tmpfs /volume", &["mount /volume"]),
        ("mount -t tmpfs tmpfs /tmp", &["mount /tmp"]),
        ("umount /dev/shm", &["mount /dev/shm"]),
        ("mount -t tmpfs tmpfs /", &["root"]),
    ] {
        let id = fixture.id("mounts");
        fixture.start_detached(&bundle, &id)?;
        let pid = pid_of(fixture, &id)?;
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["--target", &pid, "--mount", "--pid", "sh", "-c", mount]);
        finish(&mut nsenter, None)?.success()?;
        let (report, code) = verify(fixture, &["--live", &id])?;
        let mut found = broken(&report);
        // A root that something is over is told as a place that is outside, too.
        found.retain(|name| *name != "descriptors");
        found.sort_unstable();
        ensure_eq!((found, code), (expected.to_vec(), 1), "{mount}: {report}");
        fixture.call(&["delete", "--force", &id])?.success()?;
    }
    Ok(())
}

fn a_process_that_came_in_is_found(fixture: &Fixture) -> Claim {
    let bundle = confined(fixture)?;
    let id = fixture.id("guest");
    fixture.start_detached(&bundle, &id)?;
    let pid = pid_of(fixture, &id)?;
    for namespace in ["--mount", "--pid"] {
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["--target", &pid, namespace, "/bin/sleep", "1000"]);
        // Into a pid namespace comes a child of its own, only.
        let mut process = nsenter.process_group(0).stdin(Stdio::null()).spawn()?;
        // It is there when it runs.
        let is_told = eventually(Duration::from_secs(10), || {
            let (report, code) = verify(fixture, &["--live", &id])?;
            let found = broken(&report);
            ensure!(
                found.contains(&"processes") && code == 1,
                "{namespace}: {report}"
            );
            Ok(())
        });
        killpg(Pid::from_raw(process.id().cast_signed()), Signal::SIGKILL)?;
        process.wait()?;
        is_told?;
    }
    eventually(Duration::from_secs(10), || {
        let (report, code) = verify(fixture, &["--live", &id])?;
        ensure_eq!((broken(&report), code), (vec![], 0), "afterwards: {report}");
        Ok(())
    })
}

/// A container of another runtime, removed when this is dropped.
struct Foreign<'a> {
    runtime: &'a str,
    root: PathBuf,
    id: String,
}

impl Foreign<'_> {
    fn call(&self, arguments: &[&str]) -> std::io::Result<Outcome> {
        let mut command = Command::new(self.runtime);
        finish(command.arg("--root").arg(&self.root).args(arguments), None)
    }

    /// Starts it, and gives its first process's pid; `None`: that runtime does not run here.
    fn start(&self, bundle: &Bundle) -> Answer<Option<String>> {
        bundle.save()?;
        let mut command = Command::new(self.runtime);
        command
            .arg("--root")
            .arg(&self.root)
            .args(["run", "--detach", "--bundle"]);
        let log = self.root.with_extension("log");
        let file = fs::File::create(&log)?;
        command.arg(bundle.dir()).arg(&self.id).stdin(Stdio::null());
        let status = command.stdout(file.try_clone()?).stderr(file).status();
        if !status.as_ref().is_ok_and(|status| status.success()) {
            let log = fs::read_to_string(&log)?;
            println!(
                "skipped: {} runs no container here: {}",
                self.runtime,
                log.trim()
            );
            return Ok(None);
        }
        let state: Value =
            serde_json::from_str(&self.call(&["state", &self.id])?.success()?.stdout)?;
        let pid = state["pid"].to_string();
        // runc returns when its own first process is about to execute the workload.
        eventually(Duration::from_secs(20), || {
            let program = fs::read_link(format!("/proc/{pid}/exe"))?;
            let is_runtime = program.to_string_lossy().contains(self.runtime);
            ensure!(!is_runtime, "{} is still its program", program.display());
            Ok(())
        })?;
        Ok(Some(pid))
    }
}

impl Drop for Foreign<'_> {
    fn drop(&mut self) {
        let _ = self.call(&["delete", "--force", &self.id]);
    }
}

fn containers_of_other_runtimes_are_told_truly(fixture: &Fixture) -> Claim {
    for runtime in ["runc", "crun"] {
        let container = |name: &str| Foreign {
            runtime,
            root: fixture.dir().join(runtime),
            id: fixture.id(&format!("{runtime}-{name}")),
        };
        let sound = container("sound");
        let mut bundle = confined(fixture)?;
        // Older ones refuse a version that they do not know.
        bundle.spec["ociVersion"] = json!("1.0.2");
        let Some(pid) = sound.start(&bundle)? else {
            continue;
        };
        let dir = bundle.dir().to_string_lossy().into_owned();
        let (report, _) = verify(fixture, &["--pid", &pid, &dir])?;
        ensure_eq!(
            (broken(&report), rules(&report, "error")),
            (vec![], vec![]),
            "{runtime}: {report}"
        );
        let weak = container("weak");
        bundle.without_namespace("network").without_namespace("ipc");
        bundle.spec["linux"]["maskedPaths"] = json!([]);
        bundle.spec["process"]["capabilities"]["bounding"] = json!(["CAP_SYS_PTRACE"]);
        if let Some(linux) = bundle.spec["linux"].as_object_mut() {
            linux.remove("seccomp");
        }
        bundle.bind(Path::new("/etc"), "/host", &["ro"]);
        let pid = weak
            .start(&bundle)?
            .ok_or("the second container does not start")?;
        let (report, code) = verify(fixture, &["--pid", &pid])?;
        ensure_eq!(
            (rules(&report, "error"), code),
            (
                vec![
                    "host-namespaces",
                    "capabilities",
                    "masked-paths",
                    "host-paths"
                ],
                1
            ),
            "{runtime}: {report}"
        );
        ensure!(
            rules(&report, "warning").contains(&"seccomp"),
            "{runtime}: {report}"
        );
    }
    Ok(())
}

/// The attacks that got somewhere, or were stopped in a way that `is_meant` knows, without the model's name.
fn attacks(report: &Value, is_meant: impl Fn(&Value) -> bool) -> Vec<&str> {
    let properties = report["properties"].as_array().into_iter().flatten();
    let meant = properties.filter(|one| is_meant(one));
    meant.filter_map(|one| one["name"].as_str()).collect()
}

/// A running `rt verify --attack`, and what there was before it.
struct Attacking {
    rt: Child,
    /// What it makes is below a directory that no other test has.
    place: PathBuf,
    out: PathBuf,
    before: Snapshot,
}

impl Attacking {
    fn begin(fixture: &Fixture) -> Answer<Self> {
        let place = fixture.dir().join("attacks");
        fs::create_dir(&place)?;
        let before = Snapshot::take(&place.to_string_lossy());
        let out = fixture.dir().join("report.json");
        let mut rt = fixture.rt(&["verify", "--format", "json", "--attack"]);
        rt.env("TMPDIR", &place).stdout(fs::File::create(&out)?);
        Ok(Self {
            rt: rt.spawn()?,
            place,
            out,
            before,
        })
    }

    fn wait(&mut self) -> Answer<ExitStatus> {
        Ok(wait_with_limit(&mut self.rt, Duration::from_secs(150))?)
    }

    /// Whether nothing of it is left. Other tests make cgroups meanwhile.
    fn left_nothing(&self) -> Claim {
        let mark = self.place.to_string_lossy();
        let own = format!("rt-attack-{}", self.rt.id());
        let mut left = Snapshot::take(&mark).added_since(&self.before);
        left.retain(|line| line.contains(&*mark) || line.contains(&own));
        ensure!(left.is_empty(), "left behind: {left:?}");
        ensure_eq!(fs::read_dir(&self.place)?.count(), 0, "files left behind");
        Ok(())
    }
}

/// Whether an attack reached something of the host.
fn is_out(property: &Value) -> bool {
    let found = property["found"].as_str();
    found.is_some_and(|found| found.starts_with("GOT OUT"))
}

fn no_attack_gets_out_of_a_confined_container(fixture: &Fixture) -> Claim {
    let mut attacking = Attacking::begin(fixture)?;
    let code = attacking.wait()?.code();
    let report: Value = serde_json::from_slice(&fs::read(&attacking.out)?)?;
    ensure_eq!((broken(&report), code), (vec![], Some(0)), "{report}");
    let stopped = attacks(&report, |one| one["holds"] == true);
    for attack in [
        "host-file",
        "host-process",
        "abstract-socket",
        "host-key",
        "core-pattern",
        "bpf",
        "leaked-descriptor",
        "host-descriptor",
        "passed-descriptor",
        "volume-link",
        "volume-rename",
        "fork-bomb",
        "thread-bomb",
        "descriptor-bomb",
        "terminal-bomb",
        "inode-bomb",
        "disk-bomb",
    ] {
        ensure!(
            stopped.contains(&attack),
            "{attack} is not among {stopped:?}: {report}"
        );
    }
    let model = fixture.model().name();
    let properties = report["properties"].as_array().into_iter().flatten();
    let of_others = properties.filter(|one| one["model"] != model);
    ensure_eq!(of_others.count(), 0, "attacks in other models; {report}");
    attacking.left_nothing()
}

fn interrupted_attacks_leave_nothing(fixture: &Fixture) -> Claim {
    let mut attacking = Attacking::begin(fixture)?;
    // The attacker has said something when it is in the middle of its attempts.
    eventually(Duration::from_secs(120), || {
        let directories = fs::read_dir(&attacking.place)?;
        let has_said = directories.flatten().any(|directory| {
            fs::metadata(directory.path().join("out")).is_ok_and(|file| file.len() > 0)
        });
        ensure!(has_said, "no attempt was made");
        Ok(())
    })?;
    let pid = Pid::from_raw(attacking.rt.id().cast_signed());
    // SIGINT is ignored by what a shell runs in the background.
    kill(pid, Signal::SIGTERM)?;
    let status = attacking.wait()?;
    ensure_eq!(
        status.signal(),
        Some(libc::SIGTERM),
        "how it ended: {status}"
    );
    ensure_eq!(fs::read_to_string(&attacking.out)?, "", "report");
    attacking.left_nothing()
}

/// Whether this process has CAP_SYS_RESOURCE.
fn may_lift_limits() -> Answer<bool> {
    let status = fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = u64::from_str_radix(effective.ok_or("no capabilities")?.trim(), 16)?;
    Ok(effective >> 24 & 1 == 1)
}

fn what_a_privileged_container_reaches_is_told(fixture: &Fixture) -> Claim {
    if fixture.model() == Model::Microvm && std::env::var_os("RT_LAB").is_some() {
        println!(
            "skipped: an emulated machine does not always survive a guest that takes all it can"
        );
        return Ok(());
    }
    let mut bundle = fixture.bundle()?;
    let mut given = json!([
        "CAP_BPF",
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_DAC_READ_SEARCH",
        "CAP_MKNOD",
        "CAP_PERFMON",
        "CAP_SYS_ADMIN",
        "CAP_SYS_PTRACE",
        "CAP_SYS_TIME"
    ]);
    if fixture.model() == Model::Microvm {
        // So much that what fills memory comes to its bound: a guest that has none left takes long to notice.
        bundle.spec["vm"] = json!({"hwConfig": {"memory": 512 << 20}});
    }
    // Who runs the tests may not have it to give; a guest does.
    let lifts_limits = fixture.model() == Model::Microvm || may_lift_limits()?;
    if let Some(given) = given.as_array_mut().filter(|_| lifts_limits) {
        given.push(json!("CAP_SYS_RESOURCE"));
    }
    bundle.spec["process"]["capabilities"] =
        json!({"bounding": given, "effective": given, "permitted": given});
    bundle.spec["linux"]["maskedPaths"] = json!([]);
    bundle.spec["linux"]["readonlyPaths"] = json!([]);
    bundle.spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    for mount in bundle.spec["mounts"].as_array_mut().into_iter().flatten() {
        if mount["destination"] == "/sys/fs/cgroup" {
            mount["options"] = json!(["nosuid"]);
        }
    }
    bundle.save()?;
    let dir = bundle.dir().to_string_lossy().into_owned();
    let (report, code) = verify(fixture, &["--attack", &dir])?;
    let mut known = vec![
        "core-pattern",
        "own-limits",
        "second-proc",
        "bpf",
        "fork-bomb",
        "thread-bomb",
        "terminal-bomb",
    ];
    known.extend(lifts_limits.then_some("descriptor-bomb"));
    let reached = match fixture.model() {
        Model::Container => attacks(&report, |one| one["holds"] == false),
        // The same attempts succeed there, and reach the guest's kernel.
        Model::Microvm => {
            // Its root may be written to, and no quota bounds that.
            let disk = vec!["inode-bomb", "disk-bomb"];
            ensure_eq!((broken(&report), code), (disk, 1), "{report}");
            attacks(&report, |one| {
                one["found"]
                    .as_str()
                    .is_some_and(|found| found.contains("by the machine"))
            })
        }
    };
    for attack in known {
        ensure!(
            reached.contains(&attack),
            "{attack} is not among {reached:?}: {report}"
        );
    }
    if fixture.model() == Model::Container {
        ensure_eq!(code, 1, "exit code");
        // What is shared with the host is reached, too.
        bundle
            .without_namespace("pid")
            .without_namespace("network")
            .save()?;
        let (report, _) = verify(fixture, &["--attack", &dir])?;
        let reached = attacks(&report, is_out);
        for attack in [
            "host-file",
            "host-process",
            "host-ptrace",
            "host-descriptor",
            "passed-descriptor",
            "abstract-socket",
            "host-loopback",
        ] {
            ensure!(
                reached.contains(&attack),
                "{attack} is not among {reached:?}: {report}"
            );
        }
    }
    Ok(())
}

fn what_a_container_shares_with_the_host_is_reached(fixture: &Fixture) -> Claim {
    let place = fixture.dir().join("attacks");
    fs::create_dir(&place)?;
    let mut bundle = fixture.bundle()?;
    bundle.spec["root"]["readonly"] = json!(false);
    // The directory with the bait, where the host has it.
    bundle.bind(&place, &place.to_string_lossy(), &[]).save()?;
    let mut rt = fixture.rt(&["verify", "--format", "json", "--attack"]);
    let call = finish(rt.arg(bundle.dir()).env("TMPDIR", &place), None)?;
    let report: Value = serde_json::from_str(&call.stdout)?;
    let reached = attacks(&report, is_out);
    // Whatever is open leads to the container's root, where the bait is.
    for attack in [
        "host-file",
        "leaked-descriptor",
        "volume-link",
        "inode-bomb",
        "disk-bomb",
    ] {
        ensure!(
            reached.contains(&attack),
            "{attack} is not among {reached:?}: {report}"
        );
    }
    // A machine shares the files of a directory, and not what listens there.
    ensure_eq!(
        (reached.contains(&"passed-descriptor"), call.code()),
        (fixture.model() == Model::Container, 1),
        "whether a socket is reached, and the exit code; {report}"
    );
    Ok(())
}

fn what_a_vmms_jail_lacks_is_found(fixture: &Fixture) -> Claim {
    let bundle = confined(fixture)?;
    bundle.save()?;
    for (step, lacks) in [
        (
            "vmm.confined",
            &[
                "jail.no-new-privileges",
                "jail.capabilities",
                "jail.seccomp",
            ][..],
        ),
        ("jail.write-protected", &["jail.root-read-only"]),
    ] {
        let id = fixture.id(step);
        let mut rt = fixture.rt(&["run", "--detach", "--bundle"]);
        rt.arg(bundle.dir()).arg(&id);
        // A detached container keeps its streams: captured pipes would never end.
        let log = fs::File::create(fixture.dir().join(format!("{id}.log")))?;
        rt.stdout(log.try_clone()?).stderr(log);
        let faults = FaultRun::new(fixture.dir().join(step))?;
        let can = faults
            .run_without(step, &mut rt, Duration::from_secs(150))
            .map_err(|error| format!("{error}: {}", fixture.log_of(&id)))?;
        if !can {
            println!("skipped: a release build leaves nothing out");
            return Ok(());
        }
        let (report, code) = verify(fixture, &["--live", &id])?;
        ensure_eq!(
            (broken(&report), code),
            (lacks.to_vec(), 1),
            "without {step}: {report}"
        );
        fixture.call(&["delete", "--force", &id])?.success()?;
    }
    Ok(())
}

fn a_page_is_shown_by_a_browser(fixture: &Fixture) -> Claim {
    if std::env::var_os("RT_LAB").is_some() {
        println!("skipped: a browser takes minutes under emulation");
        return Ok(());
    }
    let browsers = ["chromium", "chromium-browser", "google-chrome"];
    let is_there = |browser: &&str| Command::new(browser).arg("--version").output().is_ok();
    let Some(browser) = browsers.into_iter().find(is_there) else {
        println!("skipped: there is no chromium to look at the page with");
        return Ok(());
    };
    let page = fixture.dir().join("page.html");
    let call = fixture
        .call(&["verify", "--attack", "--format", "html"])?
        .success()?;
    fs::write(&page, call.stdout)?;
    let mut browser = Command::new(browser);
    browser.args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]);
    let profile = fixture.dir().join("browser");
    browser.arg(format!("--user-data-dir={}", profile.display()));
    let shown = finish(browser.arg(format!("file://{}", page.display())), None)?
        .success()?
        .stdout;
    // What a browser made of it: every row closed, with a cell for the model.
    let rows = shown.matches("</tr>").count();
    let cells = shown.matches("</td>").count();
    ensure!(
        rows > 20 && cells == 2 * (rows - 1),
        "{rows} rows, {cells} cells: {shown}"
    );
    ensure!(
        shown.contains("<th>container") && shown.contains("0 of "),
        "{shown}"
    );
    Ok(())
}
