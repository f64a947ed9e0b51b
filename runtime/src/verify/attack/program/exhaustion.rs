//! Attempts to take more than a share: processes, memory.

use std::fs::{self, File};
use std::io::Write;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};

use super::{Failed, Got, MEMORY, PROCESSES, Told};

pub(super) fn fork_bomb(_: &Told) -> Result<Got, Failed> {
    let mut children = Vec::new();
    let mut result = Ok(Got::Kernel("processes without a limit were made"));
    for _ in 0..PROCESSES {
        // SAFETY: this process has one thread.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => loop {
                nix::unistd::pause();
            },
            Ok(ForkResult::Parent { child }) => children.push(child),
            Err(error) => {
                result = Err(error.into());
                break;
            }
        }
    }
    for child in children {
        let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
        let _ = waitpid(child, None);
    }
    result
}

pub(super) fn memory_bomb(_: &Told) -> Result<Got, Failed> {
    // Each page has to be there: one that was never written is none.
    let mut pages: Vec<Vec<u8>> = Vec::new();
    let mut filled = 0;
    while filled < MEMORY {
        let piece = 1 << 20;
        let mut page = Vec::new();
        page.try_reserve_exact(piece)
            .map_err(|_| Failed::Errno(Errno::ENOMEM))?;
        page.resize(piece, 1);
        pages.push(page);
        filled += piece as u64;
    }
    // They are in use until here.
    std::hint::black_box(&pages);
    Ok(Got::Kernel("memory without a limit was filled"))
}

pub(super) fn shared_memory(_: &Told) -> Result<Got, Failed> {
    let path = "/dev/shm/rt-attack-memory";
    let mut file = File::create(path)?;
    let piece = vec![1; 1 << 20];
    let mut written = Ok(());
    for _ in 0..(MEMORY >> 20) {
        written = file.write_all(&piece);
        if written.is_err() {
            break;
        }
    }
    let _ = fs::remove_file(path);
    written?;
    Ok(Got::Kernel("a tmpfs without a size was filled"))
}
