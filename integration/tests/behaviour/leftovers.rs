//! Nothing is left behind: not by two hundred containers (under emulation fifty, or twenty microVMs), not by a failed
//! one.

use integration::snapshot::{Snapshot, state_directories};
use integration::{Claim, Fixture, Model, ensure, ensure_eq};
use serde_json::json;

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    (
        "many_containers_leave_nothing",
        many_containers_leave_nothing,
    ),
    ("failed_create_leaves_nothing", failed_create_leaves_nothing),
    (
        "killed_container_leaves_nothing",
        killed_container_leaves_nothing,
    ),
];

fn marker(fixture: &Fixture) -> String {
    fixture.state_root().to_string_lossy().into_owned()
}

/// Nothing is left that carries the fixture's mark; other tests may run at the same time.
pub fn nothing_left(fixture: &Fixture, before: &Snapshot) -> Claim {
    let mark = fixture.id("");
    let left = Snapshot::take(&marker(fixture)).added_since(before);
    let own: Vec<_> = left
        .iter()
        .filter(|line| line.contains(mark.trim_start_matches('-')) || line.starts_with("process"))
        .collect();
    ensure!(own.is_empty(), "left behind: {own:?}");
    let state = state_directories(&fixture.state_root());
    ensure!(state.is_empty(), "left in the state root: {state:?}");
    Ok(())
}

fn many_containers_leave_nothing(fixture: &Fixture) -> Claim {
    let before = Snapshot::take(&marker(fixture));
    let mut bundle = fixture.bundle()?;
    bundle.spec["linux"]["resources"]["pids"] = json!({"limit": 64});
    bundle.script("exit 11");
    bundle.save()?;
    // Under emulation a machine takes seconds.
    let is_emulated = std::env::var_os("RT_LAB").is_some();
    let count = match fixture.model() {
        Model::Microvm if is_emulated => 20,
        Model::Container if is_emulated => 50,
        _ => 200,
    };
    for number in 0..count {
        let outcome = fixture.run(&bundle)?;
        ensure_eq!(
            outcome.code(),
            11,
            "exit code of number {number}; {:?}",
            outcome.stderr
        );
    }
    nothing_left(fixture, &before)
}

fn failed_create_leaves_nothing(fixture: &Fixture) -> Claim {
    let before = Snapshot::take(&marker(fixture));
    let mut bundle = fixture.bundle()?;
    bundle.args(&["/no/such/program"]);
    ensure!(
        fixture.run(&bundle)?.code() != 0,
        "a missing program was run"
    );
    bundle.args(&["/bin/true"]);
    bundle.mount(json!({"destination": "/x", "type": "nonsensefs", "source": "x"}));
    ensure!(
        fixture.run(&bundle)?.code() != 0,
        "an unknown file system was mounted"
    );
    nothing_left(fixture, &before)
}

fn killed_container_leaves_nothing(fixture: &Fixture) -> Claim {
    let before = Snapshot::take(&marker(fixture));
    let mut bundle = fixture.bundle()?;
    bundle.script("sleep 1000 & sleep 1000 & while true; do sleep 1; done");
    let id = fixture.id("killed");
    fixture.start_detached(&bundle, &id)?;
    fixture.call(&["kill", &id, "KILL"])?.success()?;
    fixture.wait_for_end(&id)?;
    fixture.call(&["delete", &id])?.success()?;
    nothing_left(fixture, &before)
}
