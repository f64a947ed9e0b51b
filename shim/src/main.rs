//! `containerd-shim-rt-v2`: what containerd starts for a pod, and asks for everything that happens in it.
//!
//! One process a pod serves containerd's task service, in the versions 2 and 3, and its sandbox service on one socket.
//! It links the runtime as a library: an operation is a call, not a command. Since the engine clones its caller, which must have one thread,
//! operations run in processes that a single-threaded one forks (`worker`); everything else runs in the threads of the
//! server. docs/architecture.md has the picture.
//!
//! containerd is trusted as root is: it started us, and the socket is root's alone. What it hands on from others, the
//! bundle's configuration and the container's output, is not.

mod bootstrap;
mod cleanup;
mod daemon;
mod error;
mod events;
mod flags;
mod messages;
mod metrics;
mod options;
mod pause;
mod pod;
mod process;
mod protocol;
mod reaper;
mod sandbox;
mod service;
mod starter;
mod stdio;
mod tasks;
mod worker;

use std::env;
use std::ffi::OsString;
use std::process::ExitCode;

use dlmalloc::GlobalDlmalloc;
use error::Failure;
use flags::{Action, Flags};
use runtime::isolation::microvm;

#[global_allocator]
static ALLOCATOR: GlobalDlmalloc = GlobalDlmalloc;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().collect();
    if microvm::is_vmm(&arguments) {
        return ExitCode::from(microvm::main(arguments));
    }
    if pause::is_pause(&arguments) {
        return pause::main();
    }
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // The server has no standard error, but a log.
            tracing::error!("{failure}");
            eprintln!("containerd-shim-rt-v2: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Vec<OsString>) -> Result<(), Failure> {
    let flags = Flags::parse(arguments)?;
    match flags.action {
        Action::Start => bootstrap::start(&flags),
        Action::Delete => cleanup::delete(&flags),
        Action::Serve => daemon::serve(&flags),
        Action::Version => {
            println!(
                "containerd-shim-rt-v2:\n  Version:  {}",
                env!("CARGO_PKG_VERSION")
            );
            Ok(())
        }
        Action::Info => bootstrap::info(),
    }
}
