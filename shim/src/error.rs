//! Why something was not done, in the terms that containerd tells apart.

use std::fmt;
use std::io;

use containerd_shim_protos::ttrpc;
use serde::{Deserialize, Serialize};

/// What kind of failure it is: containerd retries, forgives or reports by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// There is no such container or process, or no more.
    NotFound,
    /// The id is taken.
    Exists,
    /// The container or process is not in the state that it takes.
    State,
    /// The request is wrong.
    Invalid,
    /// We do not do that.
    Unsupported,
    /// Everything else.
    Other,
}

/// A failure and its reason, in one line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    pub kind: Kind,
    pub reason: String,
}

impl Failure {
    pub fn new(kind: Kind, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Self { kind, reason }
    }

    /// There is no container, or no process in it, that has the id.
    pub fn not_found(id: &str) -> Self {
        Self::new(Kind::NotFound, format!("{id}: not found"))
    }

    /// What the kernel said when we tried to do what `action` says.
    pub fn io(action: impl fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::new(Kind::Other, format!("cannot {action}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl From<runtime::lifecycle::Error> for Failure {
    fn from(error: runtime::lifecycle::Error) -> Self {
        use runtime::isolation::IsolationError;
        use runtime::lifecycle::Error;
        use runtime::state::StateError;
        let kind = match &error {
            Error::State(StateError::NotFound { .. }) => Kind::NotFound,
            Error::State(StateError::Exists { .. }) => Kind::Exists,
            Error::Isolation(IsolationError::NotRunning) => Kind::NotFound,
            Error::Isolation(IsolationError::Unsupported { .. }) => Kind::Unsupported,
            Error::Status { .. } | Error::NotStopped { .. } => Kind::State,
            _ => Kind::Other,
        };
        Self::new(kind, runtime::error_chain(&error))
    }
}

impl From<engine::Error> for Failure {
    fn from(error: engine::Error) -> Self {
        Self::new(Kind::Other, engine::error_chain(&error))
    }
}

impl From<Failure> for ttrpc::Error {
    fn from(failure: Failure) -> Self {
        let code = match failure.kind {
            Kind::NotFound => ttrpc::Code::NOT_FOUND,
            Kind::Exists => ttrpc::Code::ALREADY_EXISTS,
            Kind::State => ttrpc::Code::FAILED_PRECONDITION,
            Kind::Invalid => ttrpc::Code::INVALID_ARGUMENT,
            Kind::Unsupported => ttrpc::Code::UNIMPLEMENTED,
            Kind::Other => ttrpc::Code::UNKNOWN,
        };
        Self::RpcStatus(ttrpc::get_status(code, failure.reason))
    }
}
