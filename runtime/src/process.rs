//! Host processes that cannot be mistaken for others: a pid with its start time, and pidfds.
//!
//! A pid alone may name another process tomorrow. What is read from procfs is the kernel's, but the process' name in
//! it is the workload's, so the parser does not trust it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::signal::Signal;

/// A process, told apart from later ones with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The pid on the host.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
}

impl ProcessId {
    /// The process that has `pid` now.
    ///
    /// # Errors
    /// There is none.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = Stat::read(pid)?;
        Ok(Self {
            pid,
            start_time: stat.start_time,
        })
    }

    /// Whether it runs: a zombie does not.
    pub fn is_alive(self) -> bool {
        Stat::read(self.pid).is_ok_and(|stat| stat.start_time == self.start_time && !stat.is_dead())
    }

    /// A descriptor of the process; `None` if it has ended and been reaped.
    ///
    /// # Errors
    /// The kernel gives none for another reason.
    pub fn open(self) -> io::Result<Option<PidFd>> {
        match PidFd::open(self.pid) {
            // Opened first and compared then: the descriptor cannot change its process.
            Ok(fd) => Ok(Stat::read(self.pid)
                .is_ok_and(|stat| stat.start_time == self.start_time)
                .then_some(fd)),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A process by descriptor.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// The process that has `pid` now.
    ///
    /// # Errors
    /// There is none.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sends the descriptor to who listens at a Unix socket, with a word that says what the process is.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn send(&self, socket: &Path, what: &str) -> io::Result<()> {
        let stream = engine::with_short_path(socket, |short| UnixStream::connect(short))?;
        engine::send_with_files(&stream, what.as_bytes(), &[self.0.as_raw_fd()])
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The process has been reaped, or may not be signalled.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a null siginfo is allowed; the descriptor is open.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal.number(),
                none,
                0,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Waits until the process has ended (a zombie has), at most `limit`. Says whether it has.
    ///
    /// # Errors
    /// `poll(2)` failed.
    pub fn wait_exit(&self, limit: Duration) -> io::Result<bool> {
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        loop {
            match poll(
                &mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)],
                timeout,
            ) {
                Ok(ready) => return Ok(ready > 0),
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What we need of `/proc/PID/stat`.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: char,
    start_time: u64,
}

impl Stat {
    fn read(pid: i32) -> io::Result<Self> {
        let text = std::fs::read(format!("/proc/{pid}/stat"))?;
        Self::parse(&text)
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has an unknown form")))
    }

    /// The second field, the command's name, is in parentheses and may hold anything, so counting begins behind the
    /// last `)`.
    fn parse(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
        let mut fields = rest.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let start_time = fields.nth(18)?.parse().ok()?;
        Some(Self { state, start_time })
    }

    fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_process_cannot_forge_its_state() {
        let text = b"17 (a) Z 1 (x)) S 1 17 17 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 98765 1 1";
        assert_eq!(
            Stat::parse(text),
            Some(Stat {
                state: 'S',
                start_time: 98765
            })
        );
        assert_eq!(Stat::parse(b"17 (a) S 1"), None);
        assert_eq!(Stat::parse(b""), None);
    }

    #[test]
    fn we_are_alive_and_an_earlier_holder_of_our_pid_is_not() {
        let me = ProcessId::of(std::process::id().cast_signed()).unwrap();
        assert!(me.is_alive());
        assert!(me.open().unwrap().is_some());
        let earlier = ProcessId {
            start_time: me.start_time - 1,
            ..me
        };
        assert!(!earlier.is_alive());
        assert!(earlier.open().unwrap().is_none());
    }

    #[test]
    fn a_zombie_has_ended() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let process = ProcessId::of(child.id().cast_signed()).unwrap();
        let fd = process.open().unwrap().unwrap();
        assert!(fd.wait_exit(Duration::from_secs(10)).unwrap());
        assert!(!process.is_alive());
        child.wait().unwrap();
        assert!(process.open().unwrap().is_none());
    }
}
