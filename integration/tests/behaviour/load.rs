//! Many containers at once.
//!
//! `RT_LOAD` says how many; `make test-load` asks for 500 of the container model, of a release build. Without it there
//! are as many as a test can wait for.

use std::env;
use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use integration::snapshot::Snapshot;
use integration::{Bundle, Claim, Fixture, Model, ensure, ensure_eq};

use serde_json::Value;

use crate::Entry;
use crate::leftovers::nothing_left;

pub const CLAIMS: &[Entry] = &[("many_containers_live_at_once", many_containers_live_at_once)];

/// How many are started, killed or deleted at the same time.
const AT_ONCE: usize = 16;

fn count(model: Model) -> Result<usize, std::num::ParseIntError> {
    match (env::var("RT_LOAD"), model) {
        (Ok(count), _) => count.parse(),
        (Err(_), Model::Container) => Ok(64),
        (Err(_), Model::Microvm) => Ok(4),
    }
}

/// Calls `rt` for each container, [`AT_ONCE`] at a time.
fn for_each(ids: &[String], call: impl Fn(&str) -> Claim + Sync) -> Claim {
    let next = AtomicUsize::new(0);
    let work = || -> Claim {
        while let Some(id) = ids.get(next.fetch_add(1, Ordering::Relaxed)) {
            call(id).map_err(|reason| format!("{id}: {reason}"))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            worker.join().map_err(|_| "a worker panicked")??;
        }
        Ok(())
    })
}

fn start(fixture: &Fixture, bundle: &Bundle, id: &str) -> Claim {
    let log = File::create(fixture.dir().join(format!("{id}.log")))?;
    let mut command = fixture.rt(&["run", "--detach", "--bundle"]);
    command.arg(bundle.dir()).arg(id);
    command.stdout(log.try_clone()?).stderr(log);
    let status = command.status()?;
    ensure!(status.success(), "{status}: {}", fixture.log_of(id));
    Ok(())
}

fn listed(fixture: &Fixture) -> Result<Vec<Value>, Box<dyn std::error::Error + Send + Sync>> {
    let list = fixture.call(&["list", "--format", "json"])?.success()?;
    let list: Option<Vec<Value>> = serde_json::from_str(&list.stdout)?;
    Ok(list.unwrap_or_default())
}

fn many_containers_live_at_once(fixture: &Fixture) -> Claim {
    let before = Snapshot::take(&fixture.state_root().to_string_lossy());
    let ids: Vec<String> = (0..count(fixture.model())?)
        .map(|number| fixture.id(&format!("load-{number}")))
        .collect();
    let mut bundle = fixture.bundle()?;
    bundle.script("while true; do sleep 1000; done");
    bundle.save()?;
    for_each(&ids, |id| start(fixture, &bundle, id))?;
    let all = listed(fixture)?;
    ensure_eq!(all.len(), ids.len(), "containers in the list");
    let others: Vec<_> = all
        .iter()
        .filter(|one| one["status"] != "running")
        .collect();
    ensure!(others.is_empty(), "not running: {others:?}");
    for_each(&ids, |id| {
        fixture.call(&["kill", id, "KILL"])?.success()?;
        fixture.wait_for_end(id)
    })?;
    let all = listed(fixture)?;
    let others: Vec<_> = all
        .iter()
        .filter(|one| one["status"] != "stopped")
        .collect();
    ensure!(others.is_empty(), "not stopped: {others:?}");
    for_each(&ids, |id| {
        fixture.call(&["delete", id])?.success().map(drop)
    })?;
    ensure_eq!(listed(fixture)?, Vec::<Value>::new(), "list after the end");
    nothing_left(fixture, &before)
}
