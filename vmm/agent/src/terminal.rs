//! What the agent does with a terminal's master.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use protocol::message::ConsoleSize;

/// Makes reads and writes of a descriptor return instead of wait.
pub(crate) fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd.as_raw_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd.as_raw_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Sets a terminal's size by its master.
pub(crate) fn resize(master: &impl AsRawFd, size: ConsoleSize) -> io::Result<()> {
    let characters = |number: u32| {
        u16::try_from(number).map_err(|_| io::Error::other("a terminal's size is below 65536"))
    };
    let size = libc::winsize {
        ws_row: characters(size.rows)?,
        ws_col: characters(size.columns)?,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one `winsize`.
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
