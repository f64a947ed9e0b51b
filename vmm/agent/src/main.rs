//! The program: PID 1 of the guest.
//!
//! Nobody can help a guest whose PID 1 fails, so it then says why in the kernel's log, whose emergencies reach
//! the console of every VM, and resets the VM, which the host sees at once.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use agent::{Agent, boot};
use dlmalloc::GlobalDlmalloc;

#[global_allocator]
static ALLOCATOR: GlobalDlmalloc = GlobalDlmalloc;

/// The agent's own files in the guest: the engine's records and console sockets.
const DIRECTORY: &str = "/run/rt-agent";

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("rt-agent is PID 1 of a microVM; rt starts it, not people");
        return ExitCode::FAILURE;
    }
    std::panic::set_hook(Box::new(|panic| fatal(&panic.to_string())));
    match run() {
        Ok(()) => boot::end_vm(false),
        Err(error) => {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(cause) = source {
                text.push_str(": ");
                text.push_str(&cause.to_string());
                source = cause.source();
            }
            fatal(&text)
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    boot::set_up_root()?;
    std::fs::create_dir(DIRECTORY)?;
    let ports = boot::listen_on_vsock()?;
    let agent = Agent::new(ports.rpc, ports.stdio, PathBuf::from(DIRECTORY))?;
    let _host = boot::say_hello()?;
    agent.run()?;
    nix::unistd::sync();
    Ok(())
}

fn fatal(text: &str) -> ! {
    boot::print_emergency(&format!("rt-agent: fatal: {text}"));
    boot::end_vm(true)
}
