//! The program of a pod's sandbox: it waits, so that the pod's namespaces stay.
//!
//! It is this binary under another name, alone in its root and without any right. Where the pod's containers share its pid
//! namespace it is process 1 of it, and gets their orphans.

use std::ffi::OsString;
use std::process::ExitCode;

use nix::sys::signal::{SigHandler, SigSet, Signal, signal};

/// What the sandbox executes, and how this binary knows that it is meant.
pub const PROGRAM: &str = "/pause";

/// Whether this process is the one that waits.
pub fn is_pause(arguments: &[OsString]) -> bool {
    arguments.first().is_some_and(|name| name == PROGRAM)
}

/// Waits to be told to end.
pub fn main() -> ExitCode {
    // SAFETY: no handler is installed. Ignored, so that the kernel reaps the orphans.
    let _ = unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) };
    let mut end = SigSet::empty();
    end.add(Signal::SIGTERM);
    end.add(Signal::SIGINT);
    // Blocked, they reach process 1 of a pid namespace too.
    match end.thread_block().and_then(|()| end.wait()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
