//! What only a virtual machine has: its size, and a kernel of its own.

use std::fs;

use integration::{Claim, Fixture, ensure, ensure_eq};
use serde_json::json;

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    ("vm_section_sets_the_size", vm_section_sets_the_size),
    (
        "a_distributions_kernel_is_imported_and_runs",
        a_distributions_kernel_is_imported_and_runs,
    ),
];

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
