//! The kernel's queue of transfers between one disk and memory: io_uring(7), cut down before guest code runs.
//!
//! From then on the ring does nothing but read, write, flush and give back room, on the one file that it was made for:
//! who takes over the thread gets no more from it than the disk.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};
use vmm_sys_util::eventfd::EventFd;

/// The file's place among those of the ring.
pub(super) const FILE: types::Fixed = types::Fixed(0);

pub(super) struct Ring(IoUring);

impl Ring {
    /// A ring for up to `depth` transfers at once on `file`; `event` fires when one has ended.
    pub(super) fn new(file: &File, depth: u32, event: &EventFd) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .build(depth)
            .map_err(unavailable)?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_eventfd(event.as_raw_fd())?;
        let operations = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        let mut allowed: Vec<_> = operations.map(Restriction::sqe_op).into();
        allowed.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
        submitter.register_restrictions(&mut allowed)?;
        submitter.register_enable_rings()?;
        Ok(Self(ring))
    }

    /// Puts a transfer into the queue; [`Ring::submit`] has it begin.
    ///
    /// # Errors
    /// There are more than `depth`.
    ///
    /// # Safety
    /// What `entry` points to stays valid until the transfer has ended.
    pub(super) unsafe fn push(&mut self, entry: &Entry) -> io::Result<()> {
        // SAFETY: the caller's promise.
        let pushed = unsafe { self.0.submission().push(entry) };
        pushed.map_err(io::Error::other)
    }

    /// Begins what was put into the queue and waits until `count` transfers have ended.
    pub(super) fn submit(&mut self, count: usize) -> io::Result<()> {
        loop {
            match self.0.submit_and_wait(count) {
                Ok(_) if self.0.submission().is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// A transfer that has ended: what it was pushed with for `user_data`, and what the kernel says.
    pub(super) fn ended(&mut self) -> Option<(u64, i32)> {
        let entry = self.0.completion().next()?;
        Some((entry.user_data(), entry.result()))
    }
}

/// Says what to do where the host has io_uring switched off.
fn unavailable(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EPERM) => io::Error::new(
            error.kind(),
            format!(
                "io_uring is not to be had ({error}): set the sysctl kernel.io_uring_disabled to 0"
            ),
        ),
        _ => error,
    }
}
