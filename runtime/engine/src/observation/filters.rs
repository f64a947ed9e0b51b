//! The seccomp filters that are in force, read back from the kernel (ptrace(2), `PTRACE_SECCOMP_GET_FILTER`).

use std::io;

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::Instruction;

const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;

/// The longest program that the kernel takes (`BPF_MAXINSNS`).
const LENGTH_LIMIT: usize = 4096;

/// How many filters are read; the kernel's bound is on their length together.
const COUNT_LIMIT: usize = 64;

/// The filters of a thread; `status` is its file of that name. `Err`: why they cannot be read.
pub(super) fn read(thread: Pid, status: &str) -> Result<Vec<Vec<Instruction>>, String> {
    // 0: none, 1: the strict mode, 2: filters.
    let mode = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp:"));
    if mode.map(str::trim) == Some("0") {
        return Ok(Vec::new());
    }
    let _held =
        Held::new(thread).map_err(|error| format!("it cannot be held to be looked at: {error}"))?;
    let mut filters = Vec::new();
    while filters.len() < COUNT_LIMIT {
        match filter(thread, filters.len()) {
            Ok(program) => filters.push(program),
            Err(Errno::ENOENT) => break,
            // A kernel without CONFIG_CHECKPOINT_RESTORE knows no such request.
            Err(Errno::EIO | Errno::EINVAL) => {
                return Err("this kernel does not tell a filter".to_owned());
            }
            Err(Errno::EACCES) => {
                return Err("who has a filter, or is not root, is not told of others".to_owned());
            }
            Err(error) => return Err(format!("the kernel does not tell them: {error}")),
        }
    }
    Ok(filters)
}

/// A thread that is held, and goes on when this is dropped.
struct Held(Pid);

impl Held {
    fn new(thread: Pid) -> io::Result<Self> {
        ptrace::seize(thread, ptrace::Options::empty())?;
        let held = Self(thread);
        ptrace::interrupt(thread)?;
        loop {
            match waitpid(thread, Some(WaitPidFlag::__WALL)) {
                Err(Errno::EINTR) => {}
                Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(_) => {
                    return Err(io::Error::other("it has ended"));
                }
                // A signal that comes just now is delivered.
                Ok(WaitStatus::Stopped(_, signal)) => ptrace::cont(thread, Some(signal))?,
                Ok(_) => return Ok(held),
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // It is gone, otherwise.
        let _ = ptrace::detach(self.0, None);
    }
}

fn filter(thread: Pid, index: usize) -> Result<Vec<Instruction>, Errno> {
    let mut program = vec![
        libc::sock_filter {
            code: 0,
            jt: 0,
            jf: 0,
            k: 0,
        };
        LENGTH_LIMIT
    ];
    // SAFETY: the kernel writes at most `BPF_MAXINSNS` instructions, for which there is room.
    let count = unsafe {
        libc::ptrace(
            PTRACE_SECCOMP_GET_FILTER,
            thread.as_raw(),
            index,
            program.as_mut_ptr(),
        )
    };
    let count = Errno::result(count)?;
    program.truncate(usize::try_from(count).unwrap_or_default());
    let program = program.into_iter();
    Ok(program
        .map(|one| Instruction(one.code, one.jt, one.jf, one.k))
        .collect())
}
