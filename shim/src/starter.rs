//! Ends a server of which nobody knows.
//!
//! containerd learns of a server by what `start` prints, and has its first container made then. If `start` is killed
//! before it has printed, or containerd before it has asked for anything or while it has the last container deleted,
//! nobody will ever tell the server to end. So it holds a pipe, on which `start` says when it is done and who started it; a
//! pipe that ends without says the other.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::unistd::getppid;
use runtime::process::ProcessId;

use crate::error::Failure;
use crate::service::Service;

/// How long the end of containerd is waited for at a time.
const A_DAY: Duration = Duration::from_secs(24 * 3600);

/// The end of `start`: dropped without [`Starter::finish`], it has the server end.
pub struct Starter {
    pipe: PipeWriter,
    /// containerd, if this process can see it.
    containerd: Option<ProcessId>,
}

impl Starter {
    /// Where `start` says that it is done, and where the server hears it.
    pub fn new() -> io::Result<(Self, PipeReader)> {
        let containerd = ProcessId::of(getppid().as_raw()).ok();
        let (reader, pipe) = io::pipe()?;
        Ok((Self { pipe, containerd }, reader))
    }

    /// containerd knows the server's address.
    pub fn finish(mut self) -> Result<(), Failure> {
        let said = serde_json::to_vec(&self.containerd).unwrap_or_default();
        self.pipe
            .write_all(&said)
            .map_err(Failure::io("tell the server that it is known"))
    }
}

/// Waits in a thread for who started this server, and for the end of containerd that had it started.
pub fn watch(mut pipe: File, service: Arc<Service>) -> Result<(), Failure> {
    thread::Builder::new()
        .name("starter".to_owned())
        .spawn(move || {
            let mut said = Vec::new();
            let _ = pipe.read_to_end(&mut said);
            if said.is_empty() {
                return service.forgotten();
            }
            let containerd: Option<ProcessId> = serde_json::from_slice(&said).unwrap_or_default();
            let Some(containerd) = containerd else {
                return;
            };
            if let Ok(Some(process)) = containerd.open() {
                while matches!(process.wait_exit(A_DAY), Ok(false)) {}
            }
            service.forgotten();
        })
        .map(drop)
        .map_err(Failure::io("start a thread"))
}
