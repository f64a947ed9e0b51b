//! The few system calls that `nix` does not cover as this program needs them.
//!
//! `nix` knows no real-time signals: its `waitpid` fails after it has reaped a process that one killed.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{SockFlag, SockaddrStorage, accept4, getpeername};
use protocol::message::Outcome;

/// A child that ended, and how.
pub(crate) struct Reaped {
    pub pid: i32,
    pub outcome: Outcome,
}

/// Takes the next ended child from the kernel; `None` when there is none now.
pub(crate) fn reap() -> Option<Reaped> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is valid for writing.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid <= 0 {
            return None;
        }
        let outcome = if libc::WIFEXITED(status) {
            Outcome::Exited(libc::WEXITSTATUS(status).unsigned_abs())
        } else if libc::WIFSIGNALED(status) {
            Outcome::Signaled(libc::WTERMSIG(status).unsigned_abs())
        } else {
            continue;
        };
        return Some(Reaped { pid, outcome });
    }
}

/// Sends a signal, real-time ones too.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill has no memory effects.
    if unsafe { libc::kill(pid, signal) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Accepts a waiting connection, as a non-blocking descriptor; `None` when there is none.
///
/// A process of a container can reach the agent's vsock ports too, over the machine's own address. It is not the host,
/// and its connection is closed before a byte of it is read.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    loop {
        let fd = match accept4(listener.as_raw_fd(), flags) {
            // SAFETY: the kernel has just made this descriptor, nobody else owns it.
            Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
            Err(Errno::EAGAIN | Errno::ECONNABORTED) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        // One that is gone already has no peer.
        let Ok(peer) = getpeername::<SockaddrStorage>(fd.as_raw_fd()) else {
            continue;
        };
        match peer.as_vsock_addr() {
            Some(peer) if peer.cid() != libc::VMADDR_CID_HOST => {}
            // Of another family it is a test's.
            _ => return Ok(Some(fd)),
        }
    }
}

/// Closes every descriptor from 3 up except `keep`. Only for a child that never runs the destructors of
/// what it inherited.
pub(crate) fn close_all_but(keep: &mut [RawFd]) {
    keep.sort_unstable();
    let mut first = 3;
    let ends = keep.iter().map(|fd| fd.unsigned_abs()).chain([u32::MAX]);
    for end in ends {
        if first < end {
            let last = if end == u32::MAX { end } else { end - 1 };
            // SAFETY: the descriptors belong to the parent's objects, which this process never uses.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
        first = first.max(end.saturating_add(1));
    }
}

/// Gives a child what its programs expect: no blocked signals, and SIGPIPE with its default action.
pub(crate) fn restore_signals() {
    // SAFETY: the set is initialised by sigemptyset, and both calls change only this process's signals.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}
