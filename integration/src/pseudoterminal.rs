//! A pseudoterminal, as a terminal emulator has one: the test holds the master.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{OpenptyResult, Winsize, openpty};

/// The master's side of a pseudoterminal.
pub struct Pseudoterminal {
    master: File,
    seen: Vec<u8>,
}

impl Pseudoterminal {
    /// Opens a pair with the given size and gives the master's side and the terminal.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(rows: u16, columns: u16) -> io::Result<(Self, OwnedFd)> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let OpenptyResult { master, slave } = openpty(&size, None)?;
        Ok((Self::from_master(master), slave))
    }

    /// Takes over a master received from elsewhere.
    pub fn from_master(master: OwnedFd) -> Self {
        Self {
            master: master.into(),
            seen: Vec::new(),
        }
    }

    /// The master itself.
    pub fn master(&self) -> &File {
        &self.master
    }

    /// Types.
    ///
    /// # Errors
    /// The kernel's.
    pub fn type_text(&mut self, text: &str) -> io::Result<()> {
        self.master.write_all(text.as_bytes())
    }

    /// Reads until `text` was shown, the other side hung up, or the time is over; all that was shown so far.
    pub fn read_until(&mut self, text: &str, limit: Duration) -> String {
        let end = Instant::now() + limit;
        let mut buffer = [0; 4096];
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            let left = end.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            match poll(
                &mut fds,
                PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO),
            ) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
            match self.master.read(&mut buffer) {
                // A terminal whose other side is closed reads as EIO.
                Ok(0) | Err(_) => break,
                Ok(read) => self.seen.extend_from_slice(&buffer[..read]),
            }
        }
        String::from_utf8_lossy(&self.seen).into_owned()
    }
}
