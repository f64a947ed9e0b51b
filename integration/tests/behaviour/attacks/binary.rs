//! The runtime's own binary, which its processes show to those of the container that they enter.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use integration::{Claim, Fixture, Model, copy_program, ensure, ensure_eq};
use serde_json::json;

use super::{program, put_attacker};
use crate::Entry;
use crate::lifecycle::wait_for_log;

pub const CLAIMS: &[Entry] = &[(
    "the_runtimes_binary_cannot_be_overwritten",
    the_runtimes_binary_cannot_be_overwritten,
)];

/// `rt` and its agent, copied: the attack may succeed.
fn copy_of_rt(fixture: &Fixture) -> std::io::Result<PathBuf> {
    let dir = fixture.dir().join("installed");
    fs::create_dir(&dir)?;
    let beside = fixture.binary().parent().unwrap_or(Path::new("/"));
    copy_program(fixture.binary(), &dir.join("rt"))?;
    copy_program(&beside.join("rt-agent"), &dir.join("rt-agent"))?;
    Ok(dir)
}

/// CVE-2019-5736.
fn the_runtimes_binary_cannot_be_overwritten(fixture: &Fixture) -> Claim {
    let installed = copy_of_rt(fixture)?;
    let fixture = Fixture::new(fixture.model(), &installed.join("rt"))?;
    let mut bundle = fixture.bundle()?;
    put_attacker(&bundle)?;
    // The interpreter of the script is whoever executes it.
    let evil = bundle.in_rootfs("bin/evil");
    fs::write(&evil, "#!/proc/self/exe\n")?;
    fs::set_permissions(&evil, fs::Permissions::from_mode(0o755))?;
    let capabilities = json!(["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"]);
    bundle.spec["process"]["capabilities"] =
        json!({"bounding": capabilities, "effective": capabilities, "permitted": capabilities});
    bundle.args(&[program::PATH, program::OVERWRITE_RUNTIME]);
    let before = ["rt", "rt-agent"].map(|name| fs::read(installed.join(name)));
    let id = fixture.id("attacker");
    fixture.start_detached(&bundle, &id)?;
    wait_for_log(&fixture, &id, "watching")?;
    // Under emulation each round takes seconds.
    let slow = fixture.model() == Model::Microvm || std::env::var_os("RT_LAB").is_some();
    let rounds = if slow { 8 } else { 30 };
    for _ in 0..rounds {
        for program in ["/bin/evil", "/proc/self/exe", "/bin/true"] {
            // What it says does not matter: as a program inside, `rt` finds nothing to do.
            fixture.call(&["exec", &id, program])?;
        }
    }
    if fixture.model() == Model::Container {
        // Another container whose first process they see.
        let state = fixture.call(&["state", &id])?.success()?;
        let state: serde_json::Value = serde_json::from_str(&state.stdout)?;
        let pid = state["pid"].clone();
        let mut second = fixture.bundle()?;
        copy_program(&evil, &second.in_rootfs("bin/evil"))?;
        let namespaces = second.spec["linux"]["namespaces"].as_array_mut();
        for namespace in namespaces.into_iter().flatten() {
            if namespace["type"] == "pid" {
                namespace["path"] = json!(format!("/proc/{pid}/ns/pid"));
            }
        }
        for _ in 0..rounds {
            second.args(&["/bin/evil"]);
            fixture.run(&second)?;
        }
    }
    if fixture.model() == Model::Container {
        // While a process of `rt` lives the kernel says that its binary is busy. Now there is none.
        wait_for_log(&fixture, &id, "refused")?;
    }
    let log = fixture.log_of(&id);
    // In a guest that binary is the agent, which the first process executes for as long as the machine runs: the attacker
    // is told that it is busy, and does not get as far as to be refused.
    let refused = fixture.model() == Model::Microvm || log.contains("refused");
    ensure!(
        log.contains("caught a binary") && refused,
        "the attack was not tried: {log:?}"
    );
    ensure!(!log.contains("OVERWRITTEN"), "the attacker: {log:?}");
    for (name, before) in ["rt", "rt-agent"].iter().zip(before) {
        let now = fs::read(installed.join(name))?;
        ensure!(now == before?, "{name} on the host is another one now");
    }
    ensure_eq!(
        fixture.call(&["exec", &id, "/bin/true"])?.code(),
        0,
        "exit code of exec after the attack"
    );
    Ok(())
}
