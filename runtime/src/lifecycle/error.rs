//! What the lifecycle answers when it cannot do what it was asked. The first words are runc's, which clients look for.

use std::io;
use std::path::PathBuf;

use crate::id::ContainerId;
use crate::isolation::IsolationError;
use crate::state::StateError;

/// Why an operation was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state could not be read or written, or there is no such container, or there is one already.
    #[error(transparent)]
    State(#[from] StateError),
    /// The isolation model failed.
    #[error(transparent)]
    Isolation(#[from] IsolationError),
    /// The cgroup's path cannot be used.
    #[error("`linux.cgroupsPath`")]
    Cgroup(#[source] engine::cgroup::Error),
    /// systemd did not make, change or end the cgroup.
    #[error(transparent)]
    Scope(#[from] engine::systemd::Error),
    /// A hook failed.
    #[error(transparent)]
    Hook(#[from] engine::hooks::Error),
    /// The container is not in the state that the operation needs.
    #[error("{problem}: {id}")]
    Status {
        /// In runc's words.
        problem: &'static str,
        /// Whose.
        id: ContainerId,
    },
    /// A living container is not deleted without force.
    #[error("cannot delete container {id} that is not stopped: {status}")]
    NotStopped {
        /// The container.
        id: ContainerId,
        /// Its status.
        status: &'static str,
    },
    /// The terminal and the console socket do not fit together.
    #[error("{0}")]
    Terminal(&'static str),
    /// A terminal was not received or could not be used.
    #[error("{operation}")]
    Console {
        /// As a verb.
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The process ended before its pid was recorded, or cannot be waited for.
    #[error("{operation} process {pid}")]
    Process {
        /// As a verb.
        operation: &'static str,
        /// The process.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something could not be encoded.
    #[error("encode {what}")]
    Encode {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A path is not usable.
    #[error("{operation} {}", path.display())]
    Path {
        /// As a verb.
        operation: &'static str,
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The configuration that was saved with the container cannot be read.
    #[error(transparent)]
    Bundle(#[from] crate::bundle::BundleError),
}
