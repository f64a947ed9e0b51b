//! Podman: conmon, storage and network of its own, and what only podman offers.

use std::fs;

use integration::{Claim, ensure};

use crate::engine::Engine;
use crate::{CONTAINER, Entry, Reason, Start};

pub const CLAIMS: &[Entry<Engine>] = &[Entry::further(
    "user_namespace_maps_ids",
    CONTAINER,
    user_namespace_maps_ids,
)];

/// Makes podman's configuration and loads the image.
pub fn start(start: Start) -> Result<Engine, Reason> {
    let dir = start.world.dir();
    // The limits are what an unprivileged root may have too; the rest replaces systemd, and the host's storage.
    fs::write(
        dir.join("containers.conf"),
        "[containers]\n\
         default_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
         [engine]\n\
         cgroup_manager = \"cgroupfs\"\n\
         events_logger = \"file\"\n\
         [network]\n\
         network_backend = \"netavark\"\n",
    )?;
    fs::write(
        dir.join("storage.conf"),
        "[storage]\n\
         driver = \"overlay\"\n\
         runroot = \"/run/containers/storage\"\n\
         graphroot = \"/run/podman-graph\"\n",
    )?;
    let environment = [
        ("CONTAINERS_CONF", dir.join("containers.conf")),
        ("CONTAINERS_STORAGE_CONF", dir.join("storage.conf")),
    ];
    let command_line = [
        "podman".into(),
        "--runtime".into(),
        start.runtime.clone().into(),
    ];
    let image = start.image.clone();
    let engine = Engine::new(start, &command_line, &environment, Vec::new());
    engine.told(&["load", "--input", &image.to_string_lossy()])?;
    Ok(engine)
}

fn user_namespace_maps_ids(engine: &Engine) -> Claim {
    let maps = ["--rm", "--uidmap=0:100000:65536", "--gidmap=0:100000:65536"];
    let shown = engine.run_told(
        &maps,
        "cat /proc/self/uid_map; id -u; stat -c %u /bin/busybox",
    )?;
    let words: Vec<_> = shown.split_whitespace().collect();
    ensure!(words == ["0", "100000", "65536", "0", "0"], "{shown}");
    Ok(())
}
