//! How a machine ends, told once: the first vCPU or device that ends it wins.

use std::fmt;
use std::io;
use std::sync::OnceLock;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why a machine stopped running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmExit {
    /// The guest powered itself off (ACPI S5).
    Shutdown,
    /// The guest asked for a reset. With our command line, a kernel panic ends so too.
    Reset,
    /// A vCPU triple-faulted: the guest's kernel failed before it could handle a fault.
    TripleFault,
    /// The caller stopped the machine.
    Stopped,
    /// KVM could not go on, for example at an instruction that it cannot emulate.
    InternalError {
        /// `KVM_INTERNAL_ERROR_*` of the kernel's API.
        suberror: u32,
        /// The vCPU's instruction pointer, where it could be read.
        rip: Option<u64>,
    },
    /// The processor refused the vCPU's state.
    EntryFailed {
        /// The hardware's reason.
        reason: u64,
    },
    /// KVM_RUN failed.
    RunFailed {
        /// Its errno.
        errno: i32,
    },
    /// KVM_RUN returned for a reason that this VMM never asks for.
    Unexpected {
        /// The reason as text.
        reason: String,
    },
}

impl VmExit {
    /// Whether the guest ended in order, by a power-off.
    pub fn is_shutdown(&self) -> bool {
        matches!(self, Self::Shutdown)
    }
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest reset itself"),
            Self::TripleFault => f.write_str("the guest's kernel triple-faulted"),
            Self::Stopped => f.write_str("the machine was stopped"),
            Self::InternalError { suberror, rip } => {
                let what = match suberror {
                    1 => "cannot emulate an instruction",
                    2 => "met simultaneous exceptions",
                    3 => "met an exit while delivering an event",
                    4 => "met an unexpected exit reason",
                    _ => "failed",
                };
                write!(f, "KVM {what} (internal error {suberror}")?;
                if let Some(rip) = rip {
                    write!(f, " at {rip:#x}")?;
                }
                f.write_str(")")
            }
            Self::EntryFailed { reason } => {
                write!(f, "the processor refused to enter the guest ({reason:#x})")
            }
            Self::RunFailed { errno } => {
                write!(
                    f,
                    "KVM_RUN failed: {}",
                    io::Error::from_raw_os_error(*errno)
                )
            }
            Self::Unexpected { reason } => write!(f, "unexpected exit from KVM: {reason}"),
        }
    }
}

/// Holds the first [`VmExit`] and an event that tells of it.
#[derive(Debug)]
pub(crate) struct ExitLatch {
    exit: OnceLock<VmExit>,
    event: EventFd,
}

impl ExitLatch {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            exit: OnceLock::new(),
            event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    /// Ends the machine with `exit`, unless it has ended already.
    pub fn set(&self, exit: VmExit) {
        if self.exit.set(exit).is_ok() {
            // Cannot fail: the counter of a fresh eventfd takes 2^64 - 2 before a write blocks.
            let _ = self.event.write(1);
        }
    }

    pub fn get(&self) -> Option<&VmExit> {
        self.exit.get()
    }

    /// Readable from the moment on that the machine has ended; nobody needs to read it.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_exit_is_the_one_told() {
        let latch = ExitLatch::new().unwrap();
        assert_eq!(latch.get(), None);
        latch.set(VmExit::Reset);
        latch.set(VmExit::Stopped);
        assert_eq!(latch.get(), Some(&VmExit::Reset));
        assert_eq!(latch.event().read().unwrap(), 1);
    }

    #[test]
    fn an_exit_reads_as_a_sentence() {
        let exit = VmExit::InternalError {
            suberror: 1,
            rip: Some(0x10),
        };
        let text = "KVM cannot emulate an instruction (internal error 1 at 0x10)";
        assert_eq!(exit.to_string(), text);
    }
}
