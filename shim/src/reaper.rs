//! Reaps every child of this process: the containers' processes, whose parents were processes of operations, and
//! whatever else becomes an orphan below us.

use std::sync::Arc;
use std::thread;

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};

use crate::error::Failure;
use crate::process::Exit;
use crate::tasks::Tasks;

/// Reaps in a thread for the rest of this process's life.
pub fn start(tasks: Arc<Tasks>) -> Result<(), Failure> {
    thread::Builder::new()
        .name("reaper".to_owned())
        .spawn(move || reap(&tasks))
        .map(drop)
        .map_err(Failure::io("start a thread"))
}

fn reap(tasks: &Tasks) {
    loop {
        let (pid, status) = match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, code),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
            Ok(_) | Err(Errno::EINTR) => continue,
            // The worker is our child as long as we serve: whoever asks it for something is told that it is gone.
            Err(_) => return,
        };
        let exit = Exit {
            status: status.unsigned_abs(),
            time: runtime::clock::now(),
        };
        tasks.reaped(pid.as_raw(), exit);
    }
}
