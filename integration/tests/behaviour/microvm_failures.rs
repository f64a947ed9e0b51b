//! What can go wrong only with a virtual machine: each is an error of `rt run`
//! that names the cause, and nothing stays behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use integration::snapshot::state_directories;
use integration::{Claim, Fixture, ensure, ensure_eq};
use serde_json::{Value, json};

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    (
        "missing_kernel_names_both_remedies",
        missing_kernel_names_both_remedies,
    ),
    ("truncated_kernel_is_named", truncated_kernel_is_named),
    (
        "kernel_that_is_no_kernel_is_named",
        kernel_that_is_no_kernel_is_named,
    ),
    (
        "kernel_that_panics_is_explained",
        kernel_that_panics_is_explained,
    ),
    (
        "a_panic_after_the_boot_is_explained",
        a_panic_after_the_boot_is_explained,
    ),
    ("silent_agent_is_explained", silent_agent_is_explained),
    ("no_kvm_says_what_to_do", no_kvm_says_what_to_do),
];

fn refused(fixture: &Fixture, vm: Value, named: &[&str]) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["vm"] = vm;
    let outcome = fixture.run(&bundle)?;
    ensure_eq!(outcome.code(), 1, "exit code; {:?}", outcome.stderr);
    for word in named {
        ensure!(
            outcome.stderr.contains(word),
            "{word:?} is not named: {:?}",
            outcome.stderr
        );
    }
    nothing_is_left(fixture)
}

pub fn nothing_is_left(fixture: &Fixture) -> Claim {
    let left = state_directories(&fixture.state_root());
    ensure!(left.is_empty(), "left in the state root: {left:?}");
    Ok(())
}

fn missing_kernel_names_both_remedies(fixture: &Fixture) -> Claim {
    let bundle = fixture.bundle()?;
    bundle.save()?;
    let empty = fixture.dir().join("no-guests");
    fs::create_dir(&empty)?;
    let mut command = fixture.rt(&["run", "--bundle"]);
    let output = command
        .arg(bundle.dir())
        .arg("no-kernel")
        .env("RT_GUEST_DIR", &empty)
        .output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure_eq!(output.status.code(), Some(1), "exit code; {stderr:?}");
    ensure!(
        stderr.contains("make guest") && stderr.contains("rt guest import"),
        "remedies: {stderr:?}"
    );
    Ok(())
}

/// The kernel of a guest that is installed.
pub fn any_kernel() -> Result<PathBuf, Box<dyn std::error::Error + Send + Sync>> {
    let root = std::env::var("RT_GUEST_DIR").unwrap_or_else(|_| "/var/lib/rt/guests".to_owned());
    for entry in fs::read_dir(Path::new(&root))?.flatten() {
        let kernel = entry.path().join("vmlinux");
        if kernel.exists() {
            return Ok(kernel);
        }
    }
    Err(format!("no kernel in {root}").into())
}

fn truncated_kernel_is_named(fixture: &Fixture) -> Claim {
    let whole = fs::read(any_kernel()?)?;
    let path = fixture.dir().join("truncated-vmlinux");
    fs::write(&path, &whole[..whole.len() / 2])?;
    refused(
        fixture,
        json!({"kernel": {"path": path}}),
        &["truncated-vmlinux"],
    )
}

fn kernel_that_is_no_kernel_is_named(fixture: &Fixture) -> Claim {
    refused(
        fixture,
        json!({"kernel": {"path": "/bin/busybox"}}),
        &["/bin/busybox"],
    )?;
    refused(
        fixture,
        json!({"kernel": {"path": "/etc/passwd"}}),
        &["/etc/passwd"],
    )?;
    refused(
        fixture,
        json!({"kernel": {"path": "/no/such/kernel"}}),
        &["/no/such/kernel", "vm.kernel.path"],
    )
}

fn kernel_that_panics_is_explained(fixture: &Fixture) -> Claim {
    // A kernel whose init does not exist panics with a message that names it.
    let vm = json!({"kernel": {"path": any_kernel()?, "parameters": ["rdinit=/no-such-init", "init=/no-such-init"]}});
    refused(fixture, vm, &["panic"])
}

fn a_panic_after_the_boot_is_explained(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["readonlyPaths"] = json!([]);
    bundle.spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20}});
    // The kernel is to panic when a cgroup is out of memory too; then one is.
    bundle.script("echo 2 > /proc/sys/vm/panic_on_oom && head -c 64000000 /dev/zero | tail");
    let outcome = fixture.run(&bundle)?;
    ensure_eq!(outcome.code(), 137, "exit code; {:?}", outcome.stderr);
    for words in ["reset itself", "Kernel panic", "panic_on_oom"] {
        ensure!(
            outcome.stderr.contains(words),
            "no {words:?} in {:?}",
            outcome.stderr
        );
    }
    nothing_is_left(fixture)
}

fn silent_agent_is_explained(fixture: &Fixture) -> Claim {
    // As the guest's first process it becomes an init that starts no agent.
    let config = fixture.dir().join("config.toml");
    fs::write(
        &config,
        "[microvm]\nagent = \"/bin/busybox\"\nboot_limit_seconds = 10\n",
    )?;
    let bundle = fixture.bundle()?;
    bundle.save()?;
    let output = fixture
        .rt(&["--config"])
        .arg(&config)
        .args(["run", "--bundle"])
        .arg(bundle.dir())
        .arg(fixture.id("silent"))
        .output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure_eq!(output.status.code(), Some(1), "exit code; {stderr:?}");
    ensure!(
        stderr.contains("agent did not answer within 10 s") && stderr.contains("vmlinux"),
        "stderr: {stderr:?}"
    );
    nothing_is_left(fixture)
}

fn no_kvm_says_what_to_do(fixture: &Fixture) -> Claim {
    let bundle = fixture.bundle()?;
    bundle.save()?;
    // In a mount namespace of its own whose /dev has no KVM.
    let script = "mount -t tmpfs dev /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9 && exec \"$@\"";
    let rt = fixture.rt(&["run", "--bundle"]);
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(rt.get_program())
        .args(rt.get_args())
        .arg(bundle.dir())
        .arg(fixture.id("no-kvm"))
        .output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure_eq!(output.status.code(), Some(1), "exit code; {stderr:?}");
    for word in ["/dev/kvm", "kvm_amd"] {
        ensure!(stderr.contains(word), "{word:?} is not named: {stderr:?}");
    }
    nothing_is_left(fixture)
}
