//! What can go wrong in the engine, told apart by who can do something about it.

use std::io;
use std::path::PathBuf;

/// An operation of the engine failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration asks for something that the engine cannot honour.
    #[error("{path}: {reason}")]
    Unsupported {
        /// Where in config.json (`linux.seccomp.listenerPath`).
        path: String,
        /// What is wrong with it and, where there is one, the way out.
        reason: String,
    },
    /// The program of the container cannot be found in it. Users expect exit code 127.
    #[error("{0}")]
    CommandNotFound(String),
    /// The program of the container is there but cannot be executed. Users expect exit code 126.
    #[error("{0}")]
    CommandNotExecutable(String),
    /// The container's own set-up failed, inside it, before its program ran.
    #[error("cannot set up the container: {0}")]
    Setup(String),
    /// A hook that ran inside the container's namespaces failed.
    #[error("{0}")]
    Hooks(String),
    /// The container's init process is gone.
    #[error("the container's init process {0} is not running")]
    NotRunning(i32),
    /// The container is frozen; its processes could not run.
    #[error("the container is paused; resume it first or ignore the pause explicitly")]
    Paused,
    /// A system call or a file operation failed.
    #[error("{operation}")]
    System {
        /// What was tried, with its object.
        operation: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A cgroup operation failed.
    #[error(transparent)]
    Cgroup(#[from] crate::cgroup::Error),
    /// A hook failed.
    #[error(transparent)]
    Hook(#[from] crate::hooks::Error),
    /// The console socket could not be used.
    #[error("cannot use the console socket {path}")]
    ConsoleSocket {
        /// Path of the socket.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// The exit code that shells and container clients give to this failure of a program to start.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::CommandNotFound(_) => 127,
            Self::CommandNotExecutable(_) => 126,
            _ => 1,
        }
    }

    pub(crate) fn unsupported(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported {
            path: path.into(),
            reason: reason.into(),
        }
    }
}

/// Names the operation of a failed system call.
pub(crate) trait Context<T> {
    fn context(self, operation: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, operation: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::System {
            operation: operation(),
            source: source.into(),
        })
    }
}
