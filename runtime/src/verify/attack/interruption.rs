//! Signals that would end this process while there is something to remove.
//!
//! They are held back and never taken: when all is gone they are let through, and the process ends by them as if it had
//! ended at once.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::process::PidFd;

/// Holds them back until it is dropped. Threads and processes that are made meanwhile inherit that.
pub struct Interruption {
    signals: SignalFd,
    before: SigSet,
}

impl Interruption {
    /// To be called while this process has one thread.
    pub fn hold() -> io::Result<Self> {
        let all = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];
        // One that is ignored, as by nohup(1), would not end this process.
        let ending: SigSet = all.into_iter().filter(|one| !is_ignored(*one)).collect();
        let signals = SignalFd::with_flags(&ending, SfdFlags::SFD_CLOEXEC)?;
        let before = ending.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        Ok(Self { signals, before })
    }

    /// Waits until the process has ended, a signal has come, or the time is over; says whether it was a signal.
    pub fn comes_before_the_end_of(&self, process: &PidFd, limit: Duration) -> io::Result<bool> {
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut files = [
            PollFd::new(process.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        loop {
            match poll(&mut files, timeout) {
                Ok(_) => return Ok(files[1].any().unwrap_or(false)),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn is_ignored(signal: Signal) -> bool {
    // SAFETY: all zeros is such a structure.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action the call only writes the present one.
    let asked =
        unsafe { libc::sigaction(signal as libc::c_int, std::ptr::null(), &raw mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}

impl Drop for Interruption {
    fn drop(&mut self) {
        let _ = self.before.thread_set_mask();
    }
}
