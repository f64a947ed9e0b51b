//! The seccomp filters that are in force, read back from the kernel (ptrace(2), `PTRACE_SECCOMP_GET_FILTER`).

use std::collections::BTreeSet;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{Instruction, Thread, ThreadFilters};

const PTRACE_SECCOMP_GET_FILTER: libc::c_long = 0x420c;

/// The longest program that the kernel takes (`BPF_MAXINSNS`).
const LENGTH_LIMIT: usize = 4096;

/// How many filters are read; the kernel's bound is on their length together.
const COUNT_LIMIT: usize = 64;

/// How long a thread may take to stop: one that waits for a child of vfork(2) does not before that child lets it.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long the threads of a container may take together.
const PATIENCE_FOR_ALL: Duration = Duration::from_secs(4);

/// How many threads of a container are asked.
const THREAD_LIMIT: usize = 1024;

/// How many of their answers are told that differ.
const ANSWER_LIMIT: usize = 16;

/// The filters of a thread, or why they cannot be read.
pub(super) type Filters = Result<Vec<Vec<Instruction>>, String>;

/// The filters of a thread; `status` is its file of that name. `Err`: why they cannot be read.
pub(super) fn read(thread: Pid, status: &str) -> Filters {
    as_tracer(|| read_until(thread, status, Instant::now() + PATIENCE))
}

/// Runs `work` in a thread of its own: what does not stop in time cannot be let go, other than by the end of its tracer.
fn as_tracer<T: Send>(work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    thread::scope(|scope| {
        let tracer = thread::Builder::new().spawn_scoped(scope, work);
        let tracer = tracer.map_err(|error| format!("no thread can be made: {error}"))?;
        let ended = tracer.join();
        ended.unwrap_or_else(|_| Err("it could not be looked at".to_owned()))
    })
}

/// What the filters of `threads` are that differ from `first`; a thread of each kind. `Err`: not all could be asked.
pub(super) fn that_differ<'a>(
    first: &Filters,
    threads: impl Iterator<Item = &'a Thread> + Send,
) -> (Vec<ThreadFilters>, Result<(), String>) {
    let mut differ = Vec::new();
    let all = as_tracer(|| {
        let end = Instant::now() + PATIENCE_FOR_ALL;
        let mut known = BTreeSet::new();
        for (asked, thread) in threads.enumerate() {
            if asked == THREAD_LIMIT {
                return Err(format!("more than {THREAD_LIMIT} threads"));
            }
            let tid = Pid::from_raw(thread.tid);
            let until = end.min(Instant::now() + PATIENCE);
            let filters = read_until(tid, &thread.status, until);
            let has_ended = || !std::path::Path::new(&format!("/proc/{tid}")).exists();
            if filters == *first || (filters.is_err() && has_ended()) {
                continue;
            }
            if !known.insert(filters.clone()) {
                continue;
            }
            if differ.len() == ANSWER_LIMIT {
                return Err(format!("more than {ANSWER_LIMIT} kinds of filters"));
            }
            differ.push(ThreadFilters {
                pid: thread.pid,
                tid: thread.tid,
                filters,
            });
            if Instant::now() > end {
                return Err("the threads take too long to stop".to_owned());
            }
        }
        Ok(())
    });
    (differ, all)
}

fn read_until(thread: Pid, status: &str, end: Instant) -> Filters {
    // 0: none, 1: the strict mode, 2: filters.
    let mode = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp:"));
    if mode.map(str::trim) == Some("0") {
        return Ok(Vec::new());
    }
    let _held = Held::new(thread, end)
        .map_err(|error| format!("it cannot be held to be looked at: {error}"))?;
    let mut filters = Vec::new();
    while filters.len() < COUNT_LIMIT {
        match filter(thread, filters.len()) {
            Ok(program) => filters.push(program),
            Err(Errno::ENOENT) => return Ok(filters),
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
    Err(format!("there are more than {COUNT_LIMIT}"))
}

/// A thread that is held, and goes on when this is dropped.
struct Held(Pid);

impl Held {
    fn new(thread: Pid, end: Instant) -> io::Result<Self> {
        ptrace::seize(thread, ptrace::Options::empty())?;
        let held = Self(thread);
        ptrace::interrupt(thread)?;
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD | WaitPidFlag::WNOHANG;
        // SIGCHLD is whosever this process is: the kernel has no other event for it.
        let mut pause = Duration::from_micros(50);
        loop {
            match waitpid(thread, Some(flags)) {
                Err(Errno::EINTR) => {}
                Ok(WaitStatus::StillAlive) if Instant::now() < end => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(10));
                }
                Ok(WaitStatus::StillAlive) => {
                    let seconds = PATIENCE.as_secs();
                    let text = format!("it did not stop within {seconds} s");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
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
        // It is gone, otherwise, or did not stop: then it is let go when its tracer ends.
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
        libc::syscall(
            libc::SYS_ptrace,
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

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::unistd::{ForkResult, fork};

    use super::*;

    /// How its process ends when nobody has harmed it.
    const CODE: i32 = 7;

    /// A process with a filter waits, as for a child of vfork(2), and does not stop for a tracer meanwhile.
    fn wait_for_a_child() -> ! {
        let allow = [libc::sock_filter {
            code: 6,
            jt: 0,
            jf: 0,
            k: libc::SECCOMP_RET_ALLOW,
        }];
        let program = libc::sock_fprog {
            len: 1,
            filter: allow.as_ptr().cast_mut(),
        };
        // SAFETY: these are system calls, of which the first gets a program that is alive.
        unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            );
            let flags = libc::CLONE_VFORK | libc::SIGCHLD;
            if libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) == 0 {
                libc::sleep(4);
            }
            libc::_exit(CODE)
        }
    }

    #[test]
    fn who_does_not_stop_is_let_go() {
        // SAFETY: the child makes system calls alone.
        let child = match unsafe { fork() }.unwrap() {
            ForkResult::Child => wait_for_a_child(),
            ForkResult::Parent { child } => child,
        };
        let status = || fs::read_to_string(format!("/proc/{child}/status")).unwrap();
        while !status().contains("State:\tD") {
            std::thread::sleep(Duration::from_millis(1));
        }
        let error = read(child, &status()).unwrap_err();
        assert!(error.ends_with("it did not stop within 2 s"), "{error}");
        assert_eq!(
            waitpid(child, None).unwrap(),
            WaitStatus::Exited(child, CODE)
        );
    }
}
