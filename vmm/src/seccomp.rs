//! What each kind of thread may ask of the host's kernel once guest code can run.
//!
//! The premise is a guest that has taken over a device: it then has the thread, its memory and its
//! open descriptors, and nothing more. No thread may start a program or a thread, open a network
//! socket or make memory executable. The tables below are the whole policy; they were found by
//! running guests with [`Policy::Log`] and reading what the kernel's audit log says.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Write};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};
use syscalls::Sysno;
use thiserror::Error;
use vmm_sys_util::signal::register_signal_handler;

use crate::capabilities;

/// What happens at a system call that a thread's table does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// The call is not carried out and the process ends: by SIGSYS, or as [`report_violations`] has it.
    #[default]
    Enforce,
    /// The call is carried out and the kernel's audit log says so: for finding what is missing.
    Log,
    /// No filter is installed.
    Off,
}

/// A kind of thread of the VMM process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// Runs a vCPU.
    Vcpu,
    /// Carries data between a disk and the guest's memory.
    Block,
    /// Serves a shared directory.
    Fs,
    /// Carries the packets of a network device.
    Net,
    /// Serves the guest's sockets.
    Vsock,
    /// Carries a stream between two descriptors.
    Relay,
    /// The caller's own: starts, waits, relays bytes, ends. It is the caller that applies it.
    Main,
}

/// Why a thread could not be confined.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// The kernel does not take the thread's capabilities away.
    #[error("taking the capabilities of the {thread:?} thread away")]
    Capabilities {
        /// Whose capabilities.
        thread: Thread,
        /// What the kernel said.
        #[source]
        source: caps::errors::CapsError,
    },
    /// The table does not make a filter; a fault of the table.
    #[error("compiling the seccomp filter of the {thread:?} thread")]
    Compile {
        /// Whose filter.
        thread: Thread,
        /// What is wrong.
        #[source]
        source: seccompiler::BackendError,
    },
    /// The kernel refuses the filter.
    #[error("installing the seccomp filter of the {thread:?} thread (CONFIG_SECCOMP_FILTER)")]
    Install {
        /// Whose filter.
        thread: Thread,
        /// What the kernel said.
        #[source]
        source: seccompiler::Error,
    },
}

/// A condition on an argument of a system call.
#[derive(Debug, Clone, Copy)]
enum When {
    Always,
    /// The argument with this index is this value (its low 32 bits).
    Is(u8, u32),
    /// The argument with this index is another value (in its low 32 bits).
    IsNot(u8, u32),
    /// The argument with this index has none of these bits (in its low 32 bits).
    Without(u8, u32),
}

use When::{Always, Is, IsNot, Without};

type Table = &'static [(i64, When)];

const PROT_EXEC: u32 = libc::PROT_EXEC as u32;
const AF_UNIX: u32 = libc::AF_UNIX as u32;
const SIGSYS: u32 = libc::SIGSYS as u32;
/// Requests of the kernel's `uapi/linux/kvm.h`.
const KVM_IRQFD: u32 = 0x4020_ae76;
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
const KVM_RUN: u32 = 0xae80;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
const KVM_GET_CLOCK: u32 = 0x8030_ae7c;
/// What a vCPU is: KVM_GET_MP_STATE, _SREGS, _XSAVE, _XCRS, _DEBUGREGS, _LAPIC, _MSRS, _VCPU_EVENTS and _TSC_KHZ.
const KVM_GET_STATE: [u32; 9] = [
    0x8004_ae98,
    0x8138_ae83,
    0x9000_aea4,
    0x8188_aea6,
    0x8080_aea1,
    0x8400_ae8e,
    0xc008_ae88,
    0x8040_ae9f,
    0xaea3,
];

/// What every thread needs: memory, locks, descriptors that are open, signals, its own end.
const EVERY: Table = &[
    (libc::SYS_brk, Always),
    (libc::SYS_clock_gettime, Always),
    (libc::SYS_close, Always),
    (libc::SYS_exit, Always),
    // A debug build asks so before it closes a descriptor.
    (libc::SYS_fcntl, Is(1, libc::F_GETFD as u32)),
    (libc::SYS_exit_group, Always),
    (libc::SYS_futex, Always),
    (libc::SYS_getpid, Always),
    (libc::SYS_getrandom, Always),
    (libc::SYS_gettid, Always),
    (libc::SYS_madvise, Always),
    (libc::SYS_mmap, Without(2, PROT_EXEC)),
    (libc::SYS_mprotect, Without(2, PROT_EXEC)),
    (libc::SYS_mremap, Always),
    (libc::SYS_munmap, Always),
    // To tell of a violation where nobody reads what is told.
    (libc::SYS_poll, Always),
    (libc::SYS_read, Always),
    (libc::SYS_restart_syscall, Always),
    // What happens at a violation stays as it is.
    (libc::SYS_rt_sigaction, IsNot(0, SIGSYS)),
    (libc::SYS_rt_sigprocmask, Always),
    (libc::SYS_rt_sigreturn, Always),
    (libc::SYS_sched_yield, Always),
    (libc::SYS_sigaltstack, Always),
    // A signal for a thread: our own call, and that of the C library.
    (libc::SYS_tgkill, Always),
    (libc::SYS_tkill, Always),
    (libc::SYS_write, Always),
    (libc::SYS_writev, Always),
];

/// Beside [`EVERY`]: entering the guest, leading its interrupts where it says, and telling what the vCPU is.
const VCPU: Table = &[
    (libc::SYS_ioctl, Is(1, KVM_IRQFD)),
    (libc::SYS_ioctl, Is(1, KVM_SET_GSI_ROUTING)),
    (libc::SYS_ioctl, Is(1, KVM_RUN)),
    (libc::SYS_ioctl, Is(1, KVM_GET_REGS)),
    (libc::SYS_ioctl, Is(1, KVM_GET_STATE[0])),
    (libc::SYS_ioctl, Is(1, KVM_GET_STATE[1])),
    (libc::SYS_ioctl, Is(1, KVM_GET_STATE[2])),
    (libc::SYS_ioctl, Is(1, KVM_GET_STATE[3])),
    (libc::SYS_ioctl, Is(1, KVM_GET_STATE[4])),
    (libc::SYS_ioctl, Is(1, KVM_GET_STATE[5])),
    (libc::SYS_ioctl, Is(1, KVM_GET_STATE[6])),
    (libc::SYS_ioctl, Is(1, KVM_GET_STATE[7])),
    (libc::SYS_ioctl, Is(1, KVM_GET_STATE[8])),
];

/// Beside [`EVERY`]: events, and the disk by a ring that reaches nothing else.
const BLOCK: Table = &[
    (libc::SYS_epoll_ctl, Always),
    (libc::SYS_epoll_pwait, Always),
    (libc::SYS_epoll_wait, Always),
    (libc::SYS_io_uring_enter, Always),
];

/// Beside [`EVERY`]: events, and files by descriptor or by a name below one.
const FS: Table = &[
    // Without CAP_FSETID for one write, so that the kernel drops a set-user-id bit.
    (libc::SYS_capget, Always),
    (libc::SYS_capset, Always),
    (libc::SYS_copy_file_range, Always),
    (libc::SYS_dup, Always),
    (libc::SYS_epoll_ctl, Always),
    (libc::SYS_epoll_pwait, Always),
    (libc::SYS_epoll_wait, Always),
    (libc::SYS_fallocate, Always),
    (libc::SYS_fchmod, Always),
    (libc::SYS_fchmodat, Always),
    (libc::SYS_fchown, Always),
    (libc::SYS_fchownat, Always),
    (libc::SYS_fcntl, Always),
    (libc::SYS_fdatasync, Always),
    (libc::SYS_fgetxattr, Always),
    (libc::SYS_flistxattr, Always),
    (libc::SYS_flock, Always),
    (libc::SYS_fremovexattr, Always),
    (libc::SYS_fsetxattr, Always),
    (libc::SYS_fstat, Always),
    (libc::SYS_fstatfs, Always),
    (libc::SYS_fsync, Always),
    (libc::SYS_ftruncate, Always),
    (libc::SYS_getdents64, Always),
    (libc::SYS_getegid, Always),
    (libc::SYS_geteuid, Always),
    (libc::SYS_getgid, Always),
    (libc::SYS_getuid, Always),
    (libc::SYS_getxattr, Always),
    (libc::SYS_linkat, Always),
    (libc::SYS_listxattr, Always),
    (libc::SYS_lseek, Always),
    (libc::SYS_lstat, Always),
    (libc::SYS_mkdirat, Always),
    (libc::SYS_mknodat, Always),
    (libc::SYS_name_to_handle_at, Always),
    (libc::SYS_newfstatat, Always),
    (libc::SYS_open, Always),
    (libc::SYS_open_by_handle_at, Always),
    (libc::SYS_openat, Always),
    (libc::SYS_openat2, Always),
    (libc::SYS_pread64, Always),
    (libc::SYS_preadv, Always),
    (libc::SYS_preadv2, Always),
    (libc::SYS_pwrite64, Always),
    (libc::SYS_pwritev, Always),
    (libc::SYS_pwritev2, Always),
    (libc::SYS_readlinkat, Always),
    (libc::SYS_readv, Always),
    (libc::SYS_removexattr, Always),
    (libc::SYS_renameat2, Always),
    (libc::SYS_setresgid, Always),
    (libc::SYS_setresuid, Always),
    (libc::SYS_setxattr, Always),
    (libc::SYS_stat, Always),
    (libc::SYS_statfs, Always),
    (libc::SYS_statx, Always),
    (libc::SYS_symlinkat, Always),
    (libc::SYS_umask, Always),
    (libc::SYS_unlinkat, Always),
    (libc::SYS_utimensat, Always),
];

/// Beside [`EVERY`]: events, and packets from a tap device with what may be left undone in them.
const NET: Table = &[
    (libc::SYS_epoll_ctl, Always),
    (libc::SYS_epoll_pwait, Always),
    (libc::SYS_epoll_wait, Always),
    (libc::SYS_ioctl, Is(1, libc::TUNSETOFFLOAD as u32)),
    (libc::SYS_readv, Always),
];

/// Beside [`EVERY`]: events and Unix sockets that are there or anonymous.
const VSOCK: Table = &[
    (libc::SYS_accept4, Always),
    (libc::SYS_epoll_ctl, Always),
    (libc::SYS_epoll_pwait, Always),
    (libc::SYS_epoll_wait, Always),
    (libc::SYS_fcntl, Always),
    (libc::SYS_getsockopt, Always),
    (libc::SYS_ioctl, Is(1, libc::FIONBIO as u32)),
    (libc::SYS_ioctl, Is(1, libc::FIONREAD as u32)),
    (libc::SYS_readv, Always),
    (libc::SYS_recvfrom, Always),
    (libc::SYS_recvmsg, Always),
    (libc::SYS_sendmsg, Always),
    (libc::SYS_sendto, Always),
    (libc::SYS_shutdown, Always),
    (libc::SYS_socketpair, Is(0, AF_UNIX)),
];

/// Beside [`EVERY`]: telling the other side that a stream has ended.
const RELAY: Table = &[(libc::SYS_shutdown, Always)];

/// Beside [`EVERY`] and [`VSOCK`]: waiting for anything, files by name, terminals, signals, giving the machine
/// memory, and telling its clock.
const MAIN: Table = &[
    (libc::SYS_clock_nanosleep, Always),
    (libc::SYS_connect, Always),
    (libc::SYS_dup, Always),
    (libc::SYS_dup3, Always),
    (libc::SYS_epoll_create1, Always),
    (libc::SYS_eventfd2, Always),
    (libc::SYS_fstat, Always),
    (libc::SYS_fsync, Always),
    (libc::SYS_ftruncate, Always),
    (libc::SYS_getegid, Always),
    (libc::SYS_geteuid, Always),
    (libc::SYS_getgid, Always),
    (libc::SYS_getuid, Always),
    (libc::SYS_ioctl, Is(1, KVM_GET_CLOCK)),
    (libc::SYS_ioctl, Is(1, KVM_SET_USER_MEMORY_REGION)),
    (libc::SYS_ioctl, Is(1, libc::TCGETS as u32)),
    (libc::SYS_ioctl, Is(1, libc::TCSETS as u32)),
    (libc::SYS_ioctl, Is(1, libc::TIOCGWINSZ as u32)),
    (libc::SYS_ioctl, Is(1, libc::TIOCSWINSZ as u32)),
    (libc::SYS_kill, Always),
    (libc::SYS_lseek, Always),
    (libc::SYS_lstat, Always),
    (libc::SYS_newfstatat, Always),
    (libc::SYS_open, Always),
    (libc::SYS_openat, Always),
    (libc::SYS_pipe2, Always),
    (libc::SYS_ppoll, Always),
    (libc::SYS_pread64, Always),
    (libc::SYS_prlimit64, Always),
    (libc::SYS_pwrite64, Always),
    (libc::SYS_prctl, Is(0, libc::PR_SET_PDEATHSIG as u32)),
    (libc::SYS_rt_sigtimedwait, Always),
    (libc::SYS_sched_getaffinity, Always),
    (libc::SYS_setsockopt, Always),
    (libc::SYS_signalfd4, Always),
    (libc::SYS_socket, Is(0, AF_UNIX)),
    (libc::SYS_splice, Always),
    (libc::SYS_stat, Always),
    (libc::SYS_statx, Always),
    (libc::SYS_timerfd_create, Always),
    (libc::SYS_timerfd_settime, Always),
    // The files of Unix sockets go with them.
    (libc::SYS_unlink, Always),
    (libc::SYS_unlinkat, Always),
];

impl Thread {
    fn tables(self) -> &'static [Table] {
        match self {
            Self::Vcpu => &[EVERY, VCPU],
            Self::Block => &[EVERY, BLOCK],
            Self::Fs => &[EVERY, FS],
            Self::Net => &[EVERY, NET],
            Self::Vsock => &[EVERY, VSOCK],
            Self::Relay => &[EVERY, RELAY],
            Self::Main => &[EVERY, VSOCK, MAIN],
        }
    }
}

fn compile(
    thread: Thread,
    mismatch: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let calls = || thread.tables().iter().copied().flatten();
    for (call, when) in calls() {
        let (argument, operator, value) = match *when {
            Always => continue,
            Is(argument, value) => (argument, SeccompCmpOp::Eq, value.into()),
            IsNot(argument, value) => (argument, SeccompCmpOp::Ne, value.into()),
            Without(argument, bits) => (argument, SeccompCmpOp::MaskedEq(bits.into()), 0),
        };
        let length = SeccompCmpArgLen::Dword;
        let condition = SeccompCondition::new(argument, length, operator, value)?;
        let rule = SeccompRule::new(vec![condition])?;
        rules.entry(*call).or_default().push(rule);
    }
    // A call without any rule is allowed whatever its arguments, also where another table of the
    // thread has conditions for it.
    for (call, _) in calls().filter(|(_, when)| matches!(when, Always)) {
        rules.insert(*call, Vec::new());
    }
    let filter = SeccompFilter::new(rules, mismatch, SeccompAction::Allow, TargetArch::x86_64)?;
    filter.try_into()
}

/// Confines the calling thread to what its kind needs, for good: its capabilities, then its
/// system calls. It also gives up gaining privileges by starting programs (`no_new_privs`).
///
/// # Errors
/// The kernel has no seccomp filters.
pub fn confine(thread: Thread, policy: Policy) -> Result<(), SeccompError> {
    let mismatch = match policy {
        Policy::Off => return Ok(()),
        Policy::Log => SeccompAction::Log,
        Policy::Enforce => SeccompAction::Trap,
    };
    CONFINED.set(Some(thread));
    capabilities::limit(thread).map_err(|source| SeccompError::Capabilities { thread, source })?;
    let program =
        compile(thread, mismatch).map_err(|source| SeccompError::Compile { thread, source })?;
    apply_filter(&program).map_err(|source| SeccompError::Install { thread, source })
}

thread_local! {
    /// What the thread is. Made and dropped without a call, so that a signal handler may ask.
    static CONFINED: Cell<Option<Thread>> = const { Cell::new(None) };
}

/// From now on a violation is told on standard error, with the thread and the system call, before the process ends by
/// SIGKILL. No confined thread can change that; one that is taken over can at best keep itself from going on.
///
/// # Errors
/// The kernel's.
pub fn report_violations() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, on_violation)
        .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))
}

/// Allocates nothing and takes no lock.
extern "C" fn on_violation(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the handler was registered with SA_SIGINFO: the kernel gives it the registers of the call.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let number = registers[libc::REG_RAX as usize];
    let name = usize::try_from(number).ok().and_then(Sysno::new);
    let name = name.as_ref().map_or("an unknown one", Sysno::name);
    let mut text = io::Cursor::new([0; 320]);
    let thread = CONFINED.get();
    // It fits.
    let _ = write!(text, "rt: the microVM failed: its VMM process's ");
    let _ = match thread {
        Some(thread) => write!(text, "{thread:?} thread"),
        None => write!(text, "thread"),
    };
    let _ = writeln!(
        text,
        " asked for a system call that it may not make ({name}, {number}): the guest may have taken it over"
    );
    let (length, text) = (text.position() as usize, text.get_ref());
    // SAFETY: poll gets one entry, write that much of a buffer of our own. The last names this thread and ends the process.
    unsafe {
        // A pipe that is full would keep the process from ending.
        let mut stderr = libc::pollfd {
            fd: 2,
            events: libc::POLLOUT,
            revents: 0,
        };
        if libc::poll(&mut stderr, 1, 0) == 1 && stderr.revents == libc::POLLOUT {
            libc::write(2, text.as_ptr().cast(), length);
        }
        libc::syscall(
            libc::SYS_tgkill,
            libc::getpid(),
            libc::gettid(),
            libc::SIGKILL,
        );
    }
}

impl From<SeccompError> for io::Error {
    fn from(error: SeccompError) -> Self {
        Self::other(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `f` in a child with the filter and says how the child ended.
    fn in_child(thread: Thread, f: fn() -> bool) -> Result<i32, i32> {
        let program = compile(thread, SeccompAction::KillProcess).unwrap();
        // SAFETY: the child only makes system calls and leaves by _exit.
        match unsafe { libc::fork() } {
            0 => {
                let code = match apply_filter(&program) {
                    Ok(()) => i32::from(!f()),
                    Err(_) => 99,
                };
                // SAFETY: ends the child without running anything of the parent's.
                unsafe { libc::_exit(code) }
            }
            child => {
                assert!(child > 0);
                let mut status = 0;
                // SAFETY: the child is ours and status is valid for the write.
                assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
                if libc::WIFEXITED(status) {
                    Ok(libc::WEXITSTATUS(status))
                } else {
                    Err(libc::WTERMSIG(status))
                }
            }
        }
    }

    /// Runs the test `name` alone in a process of its own, in which this is `None`; how that ended.
    fn in_own_process(name: &str) -> Option<std::process::Output> {
        const CHILD: &str = "RT_TEST_IN_OWN_PROCESS";
        if std::env::var_os(CHILD).is_some() {
            return None;
        }
        let name = format!("seccomp::tests::{name}");
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--test-threads=1", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        Some(child)
    }

    /// A process of its own has no heaps but the first thread's yet, as a VMM process begins.
    #[test]
    fn much_memory_can_be_given_back() {
        if let Some(child) = in_own_process("much_memory_can_be_given_back") {
            assert!(child.status.success(), "{child:?}");
            return;
        }
        let thread = std::thread::spawn(|| {
            // Each too small to be a mapping of its own.
            let blocks: Vec<_> = (0..100).map(|_| vec![1_u8; 100_000]).collect();
            confine(Thread::Vsock, Policy::Enforce).unwrap();
            drop(blocks);
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_violation_names_the_thread_and_the_call() {
        use std::os::unix::process::ExitStatusExt;
        if let Some(child) = in_own_process("a_violation_names_the_thread_and_the_call") {
            assert_eq!(child.status.signal(), Some(libc::SIGKILL), "{child:?}");
            let said = String::from_utf8_lossy(&child.stderr);
            let expected = "VMM process's Net thread asked for a system call that it may not make (socket, 41)";
            assert!(said.contains(expected), "{said}");
            return;
        }
        report_violations().unwrap();
        let thread = std::thread::spawn(|| {
            confine(Thread::Net, Policy::Enforce).unwrap();
            // SAFETY: makes a socket, if it may.
            unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) }
        });
        panic!("the thread went on: {:?}", thread.join());
    }

    #[test]
    fn what_happens_at_a_violation_cannot_be_changed() {
        for thread in ALL {
            let result = in_child(thread, || {
                // SAFETY: the disposition is one of the kernel's own.
                unsafe { libc::signal(libc::SIGSYS, libc::SIG_IGN) != libc::SIG_ERR }
            });
            assert_eq!(result, Err(libc::SIGSYS), "{thread:?}");
        }
    }

    const ALL: [Thread; 7] = [
        Thread::Vcpu,
        Thread::Block,
        Thread::Fs,
        Thread::Net,
        Thread::Vsock,
        Thread::Relay,
        Thread::Main,
    ];

    #[test]
    fn every_thread_may_do_what_it_needs() {
        for thread in ALL {
            let result = in_child(thread, || {
                // SAFETY: asks for a fresh page that nobody uses.
                let page = unsafe {
                    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                    libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, flags, -1, 0)
                };
                page != libc::MAP_FAILED
            });
            assert_eq!(result, Ok(0), "{thread:?}");
        }
    }

    #[test]
    fn no_thread_may_start_a_program_or_make_memory_executable() {
        let forbidden: [fn() -> bool; 4] = [
            || {
                let path = c"/bin/true".as_ptr();
                // SAFETY: the path is a C string; the arguments may be null on Linux.
                unsafe { libc::syscall(libc::SYS_execve, path, 0, 0) == 0 }
            },
            || {
                // SAFETY: fork by its number; a child would only return from here.
                unsafe { libc::syscall(libc::SYS_fork) >= 0 }
            },
            || {
                // SAFETY: asks for a fresh page that nobody uses.
                let page = unsafe {
                    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                    let protection = libc::PROT_READ | libc::PROT_EXEC;
                    libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0)
                };
                page != libc::MAP_FAILED
            },
            || {
                // SAFETY: makes a socket and lets it go with the process.
                unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) >= 0 }
            },
        ];
        for thread in ALL {
            for (number, call) in forbidden.into_iter().enumerate() {
                let result = in_child(thread, call);
                assert_eq!(result, Err(libc::SIGSYS), "{thread:?} {number}");
            }
        }
    }

    #[test]
    fn no_thread_but_the_first_changes_what_memory_the_guest_has() {
        for thread in ALL {
            let result = in_child(thread, || {
                let request = KVM_SET_USER_MEMORY_REGION as libc::Ioctl;
                // SAFETY: an ioctl on no descriptor.
                unsafe { libc::ioctl(-1, request, 0) == -1 }
            });
            let expected = match thread {
                Thread::Main => Ok(0),
                _ => Err(libc::SIGSYS),
            };
            assert_eq!(result, expected, "{thread:?}");
        }
    }

    /// As the main thread takes a vCPU out of the guest.
    #[test]
    fn a_thread_may_signal_another() {
        let result = in_child(Thread::Main, || {
            // SAFETY: the thread is this one, and signal 0 does nothing to it.
            unsafe { libc::pthread_kill(libc::pthread_self(), 0) == 0 }
        });
        assert_eq!(result, Ok(0));
    }

    #[test]
    fn files_are_opened_and_looked_at_as_the_c_library_does() {
        for thread in [Thread::Main, Thread::Fs] {
            let result = in_child(thread, || {
                let looked = std::fs::metadata("/").and(std::fs::symlink_metadata("/"));
                std::fs::File::open("/").is_ok() && looked.is_ok()
            });
            assert_eq!(result, Ok(0), "{thread:?}");
        }
    }

    #[test]
    fn a_vcpu_may_only_enter_the_guest() {
        let result = in_child(Thread::Vcpu, || {
            // SAFETY: an ioctl on no descriptor.
            unsafe { libc::ioctl(-1, KVM_RUN as libc::Ioctl, 0) == -1 }
        });
        assert_eq!(result, Ok(0));
        // KVM_CREATE_VM.
        let result = in_child(Thread::Vcpu, || {
            // SAFETY: an ioctl on no descriptor.
            unsafe { libc::ioctl(-1, 0xae01, 0) == -1 }
        });
        assert_eq!(result, Err(libc::SIGSYS));
        let result = in_child(Thread::Vcpu, || {
            // SAFETY: the path is a C string.
            unsafe { libc::open(c"/".as_ptr(), libc::O_RDONLY) >= 0 }
        });
        assert_eq!(result, Err(libc::SIGSYS));
    }
}
