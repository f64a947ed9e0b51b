//! What only a virtual machine has: its size, and a kernel of its own.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use integration::fault::FaultRun;
use integration::{Claim, Fixture, ensure, ensure_eq, eventually};
use serde_json::json;

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    ("vm_section_sets_the_size", vm_section_sets_the_size),
    (
        "a_distributions_kernel_is_imported_and_runs",
        a_distributions_kernel_is_imported_and_runs,
    ),
    ("the_vmm_process_is_jailed", the_vmm_process_is_jailed),
    (
        "memory_that_a_workload_freed_goes_back_to_the_host",
        memory_that_a_workload_freed_goes_back_to_the_host,
    ),
    (
        "labels_of_the_hosts_security_modules_stay_there",
        labels_of_the_hosts_security_modules_stay_there,
    ),
    (
        "a_thread_that_a_guest_has_taken_over_gets_nowhere",
        a_thread_that_a_guest_has_taken_over_gets_nowhere,
    ),
];

/// The capabilities of the file server, as capability.h numbers them: CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER,
/// FSETID, SETGID, SETUID, MKNOD, SETFCAP.
const FILE_SERVER: [u32; 9] = [0, 1, 2, 3, 4, 6, 7, 27, 31];

fn vm_section_sets_the_size(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["vm"] = json!({"hwConfig": {"vcpus": 2, "memory": 256 << 20}});
    bundle.script("nproc; awk '/MemTotal/ {print $2}' /proc/meminfo");
    let outcome = fixture.run(&bundle)?.success()?;
    let mut lines = outcome.stdout.lines();
    ensure_eq!(lines.next(), Some("2"), "processors");
    let kib: u64 = lines.next().unwrap_or_default().parse()?;
    ensure!((150_000..262_144).contains(&kib), "{kib} KiB of memory");
    Ok(())
}

fn a_distributions_kernel_is_imported_and_runs(fixture: &Fixture) -> Claim {
    // The one that runs here: where tests run, it is installed with its modules.
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let release = release.trim();
    let kernel = format!("/boot/vmlinuz-{release}");
    let guests = fixture.dir().join("guests");
    let config = fixture.dir().join("config.toml");
    fs::write(&config, format!("[microvm]\nguests = {guests:?}\n"))?;
    let rt = || {
        let mut command = fixture.rt(&["--config"]);
        command.arg(&config);
        command
    };
    let imported = rt()
        .args(["guest", "import", "--kernel", &kernel])
        .output()?;
    ensure!(imported.status.success(), "import: {imported:?}");
    let listed = rt().args(["guest", "list"]).output()?;
    ensure!(
        String::from_utf8_lossy(&listed.stdout).contains(release),
        "list: {listed:?}"
    );

    // The root and the volume need its file system modules, the agent its sockets.
    let volume = fixture.dir().join("volume");
    fs::create_dir(&volume)?;
    let mut bundle = fixture.bundle()?;
    bundle.bind(&volume, "/volume", &[]);
    bundle.script("uname -r; echo written > /volume/file; cat; exit 7");
    bundle.save()?;
    let mut run = rt();
    run.args(["run", "--bundle"])
        .arg(bundle.dir())
        .arg(fixture.id("stock"));
    let outcome = fixture.complete(run, b"input".to_vec())?;
    ensure_eq!(outcome.code(), 7, "exit code; {:?}", outcome.stderr);
    ensure_eq!(outcome.stdout, format!("{release}\ninput"), "stdout");
    ensure_eq!(
        fs::read_to_string(volume.join("file"))?,
        "written\n",
        "the volume's file"
    );
    Ok(())
}

/// The line of a `status` file of the kernel that begins with a word.
fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_default().trim().to_owned()
}

/// As the host's kernel tells it, with nothing asked of the VMM.
fn the_vmm_process_is_jailed(fixture: &Fixture) -> Claim {
    let volume = fixture.dir().join("volume");
    fs::create_dir(&volume)?;
    let mut bundle = fixture.bundle()?;
    bundle.bind(&volume, "/volume", &[]);
    bundle.args(&["/bin/sleep", "1000"]);
    let id = fixture.id("jailed");
    fixture.start_detached(&bundle, &id)?;
    let pid = fixture.state(&id)?["pid"].as_i64().unwrap_or(0);
    let proc = Path::new("/proc").join(pid.to_string());

    // It sees what is shared and itself.
    let mut seen = Vec::new();
    for entry in fs::read_dir(proc.join("root"))? {
        seen.push(entry?.file_name());
    }
    seen.sort();
    ensure_eq!(
        seen,
        ["proc", "rootfs", "volumes"],
        "the root of the VMM process"
    );
    let mounts = fs::read_to_string(proc.join("mountinfo"))?;
    let mut places: Vec<&str> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .collect();
    places.sort_unstable();
    let root = format!("/rootfs/{id}");
    ensure_eq!(
        places,
        ["/", "/proc", &root, &format!("/volumes/{id}/0")],
        "what is mounted in its namespace"
    );
    let options = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(4);
        (words.next() == Some("/")).then(|| words.next()).flatten()
    });
    ensure!(
        options.is_some_and(|options| options.starts_with("ro")),
        "its root can be written to: {mounts}"
    );
    // What it sees of other processes, which we may trace and it may not, only its kernel could tell.
    ensure!(
        !proc.join("root/proc/sys").exists() && mounts.contains("hidepid=ptraceable,subset=pid"),
        "its /proc has more than itself: {mounts}"
    );

    // No descriptor leads out: what is a directory is one of those, or the root itself.
    let identity = |path: &Path| -> std::io::Result<(u64, u64)> {
        let metadata = fs::metadata(path)?;
        Ok((metadata.dev(), metadata.ino()))
    };
    let own_root = identity(&proc.join("root"))?;
    for entry in fs::read_dir(proc.join("fd"))? {
        let entry = entry?.path();
        let target = fs::read_link(&entry)?;
        let is_inside = identity(&entry).is_ok_and(|identity| identity == own_root)
            || ["/rootfs", "/volumes", "/proc"]
                .iter()
                .any(|inside| target.starts_with(inside))
            || target.starts_with(format!("/{pid}"));
        ensure!(
            is_inside || !fs::metadata(&entry).is_ok_and(|metadata| metadata.is_dir()),
            "a directory is open: {}",
            target.display()
        );
    }

    let file_server = FILE_SERVER
        .iter()
        .fold(0_u64, |set, number| set | 1 << number);
    let mut threads = 0;
    for entry in fs::read_dir(proc.join("task"))? {
        let entry = entry?.path();
        let name = fs::read_to_string(entry.join("comm"))?;
        let status = fs::read_to_string(entry.join("status"))?;
        let expected = if name.starts_with("fs") {
            file_server
        } else {
            0
        };
        for set in ["CapPrm:", "CapEff:"] {
            let capabilities = u64::from_str_radix(&field(&status, set), 16)?;
            ensure_eq!(capabilities, expected, "{set} of the thread {name}");
        }
        ensure_eq!(
            field(&status, "Seccomp:"),
            "2",
            "seccomp mode of the thread {name}"
        );
        ensure_eq!(
            field(&status, "NoNewPrivs:"),
            "1",
            "no new privileges of {name}"
        );
        threads += 1;
    }
    ensure!(threads > 4, "{threads} threads");
    Ok(())
}

fn memory_that_a_workload_freed_goes_back_to_the_host(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.args(&["/bin/sleep", "1000"]);
    let id = fixture.id("freed");
    fixture.start_detached(&bundle, &id)?;
    let vmm = fixture.state(&id)?["pid"].as_i64().unwrap_or(0);
    let mib = |name: &str| -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
        let status = fs::read_to_string(format!("/proc/{vmm}/status"))?;
        let kib = field(&status, name);
        Ok(kib.trim_end_matches(" kB").parse::<u64>()? >> 10)
    };
    let before = mib("VmRSS:")?;
    // One buffer of that size, written once.
    let take = ["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"];
    let mut exec = fixture.rt(&["exec", &id]);
    exec.args(take);
    fixture.complete(exec, Vec::new())?.success()?;
    let most = mib("VmHWM:")?;
    ensure!(most >= before + 70, "{before} MiB, and {most} MiB at most");
    // The guest's kernel gathers what is free for two seconds.
    eventually(Duration::from_secs(60), || {
        let after = mib("VmRSS:")?;
        ensure!(
            after < before + 16,
            "{before} MiB before, {after} MiB after"
        );
        Ok(())
    })
}

/// As docker names a profile for a container and for each process of exec.
fn labels_of_the_hosts_security_modules_stay_there(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["apparmorProfile"] = json!("docker-default");
    bundle.spec["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0");
    bundle.args(&["/bin/sleep", "1000"]);
    let id = fixture.id("labels");
    fixture.start_detached(&bundle, &id)?;
    let mut exec = fixture.rt(&["exec", &id]);
    exec.args(["echo", "inside"]);
    let outcome = fixture.complete(exec, Vec::new())?.success()?;
    ensure_eq!(outcome.stdout, "inside\n", "stdout");
    Ok(())
}

/// Hostile code in the place of a device thread and of a vCPU, in a process that is in its jail.
fn a_thread_that_a_guest_has_taken_over_gets_nowhere(fixture: &Fixture) -> Claim {
    const KILLED: [(&str, &str); 6] = [
        ("socket", "socket"),
        ("ptrace", "ptrace"),
        ("read-memory", "process_vm_readv"),
        ("exec", "execve"),
        ("mount", "mount"),
        ("kill", "kill"),
    ];
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
    bundle.args(&["/bin/true"]);
    bundle.save()?;
    let said = |thread: &str,
                attempt: &str|
     -> Result<Option<String>, Box<dyn std::error::Error + Send + Sync>> {
        let id = fixture.id(&format!("{thread}-{attempt}"));
        let faults = FaultRun::new(fixture.dir().join(&id))?;
        let mut rt = fixture.rt(&["run", "--bundle"]);
        rt.arg(bundle.dir()).arg(&id);
        faults.intrude(thread, attempt, &mut rt)?;
        let outcome = fixture.complete(rt, Vec::new())?;
        if !faults.was_heard()? {
            return Ok(None);
        }
        ensure!(outcome.code() != 0, "{thread} {attempt}: the container ran");
        Ok(Some(outcome.stderr))
    };
    for thread in ["Fs", "Vsock", "Vcpu"] {
        // The file server may open files, of those that are there for it.
        let open = match thread {
            "Fs" => "intruder: open: No such file or directory",
            _ => "system call that it may not make (open",
        };
        let killed = |call| {
            format!("{thread} thread asked for a system call that it may not make ({call}, ")
        };
        // All of it in the thread that may do most.
        let count = if thread == "Fs" { KILLED.len() } else { 1 };
        let expected = KILLED[..count]
            .iter()
            .map(|(attempt, call)| (*attempt, killed(call)));
        let expected = expected.chain([("open", open.to_owned())]);
        for (attempt, expected) in expected {
            let Some(said) = said(thread, attempt)? else {
                println!("skipped: a release build lets no intruder in");
                return Ok(());
            };
            ensure!(said.contains(&expected), "{thread} {attempt}: {said}");
        }
        // It is ended by the kernel, before it has more than its cgroup may have.
        let said = said(thread, "memory")?.unwrap_or_default();
        ensure!(!said.contains("intruder:"), "{thread} has 2 GiB: {said}");
    }
    Ok(())
}
