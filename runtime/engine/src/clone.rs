//! Makes a process straight into its cgroup and namespaces with clone3(2).
//!
//! The caller must have one thread only: the child goes on with a copy of it, as after fork(2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

/// Kernel ABI: `struct clone_args`, version 2 (with `cgroup`), see clone(2).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A process made by [`clone`], held by a descriptor so that its number cannot be taken over.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
}

impl Child {
    /// Kills the process and takes its status, so that no zombie is left.
    pub(crate) fn kill_and_reap(&self) {
        let _ = send_signal(&self.pidfd, libc::SIGKILL);
        let _ = waitid(Id::Pid(self.pid), WaitPidFlag::WEXITED);
    }

    /// Waits for the process to end.
    pub(crate) fn wait(&self) -> io::Result<WaitStatus> {
        loop {
            match waitid(Id::Pid(self.pid), WaitPidFlag::WEXITED) {
                Err(nix::errno::Errno::EINTR) => {}
                other => return Ok(other?),
            }
        }
    }
}

/// Clones this process with the namespace flags given; `None` is the child's answer.
///
/// With `CLONE_PARENT` the child is our parent's and ends for it as we do. With a cgroup the child is born in it (cgroup v2 and the unified hierarchy of the hybrid layout).
pub(crate) fn clone(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Option<Child>> {
    let mut pidfd: libc::c_int = -1;
    let mut args = CloneArgs {
        flags: flags | libc::CLONE_PIDFD as u64,
        pidfd: &raw mut pidfd as u64,
        exit_signal: match flags & libc::CLONE_PARENT as u64 {
            0 => libc::SIGCHLD as u64,
            _ => 0,
        },
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: the structure is the kernel's, of the size given; without CLONE_VM the child has its own memory,
    // so it may go on with this stack. The caller has no other thread, so no lock stays held in the child.
    let answer = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match answer {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => {
            // SAFETY: the kernel has just made this descriptor for us alone.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Some(Child {
                pid: Pid::from_raw(pid as libc::pid_t),
                pidfd,
            }))
        }
    }
}

/// Opens a descriptor of a process, pidfd_open(2). It has close-on-exec set.
pub(crate) fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// Sends a signal through a descriptor of a process.
pub(crate) fn send_signal(pidfd: &OwnedFd, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open and the signal information may be null.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Ends the process at once when dropped: a child that unwinds must never run its parent's code.
pub(crate) struct ExitGuard;

impl Drop for ExitGuard {
    fn drop(&mut self) {
        exit_now(255);
    }
}

/// Leaves the process without running destructors or handlers that belong to the parent.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: always sound; nothing of this process is used afterwards.
    unsafe { libc::_exit(code) }
}
