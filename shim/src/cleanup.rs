//! `delete`: removes what a server left of a container that is gone, or that containerd takes for gone.
//!
//! A client that is killed or loses patience while its container is made has containerd drop the connection to the server
//! and execute this, and ask neither to delete the container nor to end. So a server that lives is told, and
//! does what is to be done: what it is making just now would have us wait for longer than containerd does.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};
use runtime::id::ContainerId;
use runtime::lifecycle::Lifecycle;

use crate::bootstrap::{give_up, remove_socket};
use crate::error::{Failure, Kind};
use crate::events::timestamp;
use crate::flags::Flags;
use crate::options::Options;
use crate::pod::{Files, SANDBOX_ID};
use crate::worker::lifecycle;

/// The state root's parent, where the options do not say another.
const ROOT: &str = "/run/containerd/rt";

/// The options that a container was made with, in its bundle.
const OPTIONS_FILE: &str = "rt-options.json";

/// The root file system, where the client had us mount it.
pub fn rootfs(bundle: &Path) -> PathBuf {
    bundle.join("rootfs")
}

/// The state root of a namespace.
pub fn state_root(options: &Options, namespace: &str) -> PathBuf {
    let parent = options.root.as_deref().unwrap_or(Path::new(ROOT));
    parent.join(namespace)
}

/// Writes the options down for [`delete`].
pub fn save_options(bundle: &Path, options: &Options) -> Result<(), Failure> {
    let path = bundle.join(OPTIONS_FILE);
    let text = serde_json::to_vec(options)
        .map_err(|error| Failure::new(Kind::Other, error.to_string()))?;
    fs::write(&path, text).map_err(Failure::io(format_args!("write {}", path.display())))
}

/// The options that were written down; the defaults if nothing was made yet.
pub fn saved_options(bundle: &Path) -> Options {
    match fs::read(bundle.join(OPTIONS_FILE)) {
        Ok(text) => serde_json::from_slice(&text).unwrap_or_default(),
        Err(_) => Options::default(),
    }
}

/// Ends and removes the container, and prints how it ended, as a protobuf.
pub fn delete(flags: &Flags) -> Result<(), Failure> {
    let bundle = if flags.bundle.as_os_str().is_empty() {
        env::current_dir().map_err(Failure::io("find the working directory"))?
    } else {
        flags.bundle.clone()
    };
    let options = saved_options(&bundle);
    let lifecycle = lifecycle(&state_root(&options, &flags.namespace), &options)?;
    let id: ContainerId = flags
        .id
        .parse()
        .map_err(|error| Failure::new(Kind::Invalid, format!("-id: {error}")))?;
    let pid = lifecycle.state(&id).map_or(0, |state| state.pid);
    let is_removed = give_up(&bundle, &flags.id);
    if !is_removed {
        lifecycle.delete(&id, true)?;
    }
    engine::unmount_on_host(&rootfs(&bundle))?;
    let pod = Files::of(&bundle);
    if !is_removed && pod.exist() {
        delete_members(&lifecycle, &id)?;
        pod.remove()?;
    }
    remove_socket(&bundle);
    let response = DeleteResponse {
        pid: pid.unsigned_abs(),
        // Nobody knows any more; that of a process that was killed.
        exit_status: 128 + 9,
        exited_at: MessageField::some(timestamp(runtime::clock::now())),
        ..Default::default()
    };
    response
        .write_to_writer(&mut io::stdout())
        .map_err(|error| Failure::new(Kind::Other, error.to_string()))
}

/// Ends and removes the containers of a pod whose sandbox the sandbox service made: containerd asks for the sandbox alone.
fn delete_members(lifecycle: &Lifecycle, sandbox: &ContainerId) -> Result<(), Failure> {
    for container in lifecycle.list()? {
        let pod = container.annotations.get(SANDBOX_ID);
        if pod.is_some_and(|pod| pod == sandbox.as_str()) {
            lifecycle.delete(&container.id, true)?;
            engine::unmount_on_host(&rootfs(&container.bundle))?;
        }
    }
    Ok(())
}
