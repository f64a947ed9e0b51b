//! The host's side of a workload's terminal.
//!
//! The workload has a terminal of its own in the guest. On the host there is a second pair, in raw mode, so that each
//! byte is edited once, by the guest. Its master goes to whoever asked for the terminal; we hold the other side and
//! see the master's changes of size by `SIGWINCH`, as any program on a terminal does.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::ttyname;
use oci_spec::runtime::Process;
use protocol::message::ConsoleSize;

nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, Winsize);
nix::ioctl_write_int_bad!(take_terminal, libc::TIOCSCTTY);

/// Our side of a terminal whose master somebody else has.
#[derive(Debug)]
pub struct HostTerminal {
    device: OwnedFd,
    path: PathBuf,
}

impl HostTerminal {
    /// Makes a terminal with the size that `process` asks for, makes it this process's controlling terminal, and
    /// sends its master to `console_socket`. The process must lead a session that has no terminal.
    ///
    /// # Errors
    /// The kernel's, or the socket's.
    pub fn open(process: &Process, console_socket: &Path) -> io::Result<Self> {
        let size = process.console_size().map(|size| Winsize {
            ws_row: u16::try_from(size.height()).unwrap_or(u16::MAX),
            ws_col: u16::try_from(size.width()).unwrap_or(u16::MAX),
            ws_xpixel: 0,
            ws_ypixel: 0,
        });
        let OpenptyResult { master, slave } = openpty(size.as_ref(), None)?;
        let path = ttyname(slave.as_fd())?;
        let mut attributes = tcgetattr(&slave)?;
        cfmakeraw(&mut attributes);
        tcsetattr(&slave, SetArg::TCSANOW, &attributes)?;
        // SAFETY: the descriptor is a terminal's; the argument 0 asks not to steal it from another session.
        unsafe { take_terminal(slave.as_raw_fd(), 0) }?;
        send(console_socket, &path, master)?;
        Ok(Self {
            device: slave,
            path,
        })
    }

    /// The terminal itself.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Its name under `/dev/pts`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size now, if it has one.
    pub fn size(&self) -> Option<ConsoleSize> {
        size_of(self.device())
    }
}

/// The size of a terminal, if it has one.
pub fn size_of(terminal: BorrowedFd<'_>) -> Option<ConsoleSize> {
    let mut size = Winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the pointer is to a whole winsize, which the call fills.
    unsafe { window_size(terminal.as_raw_fd(), &raw mut size) }.ok()?;
    (size.ws_row > 0 || size.ws_col > 0).then(|| ConsoleSize {
        columns: size.ws_col.into(),
        rows: size.ws_row.into(),
    })
}

/// Sends a terminal's master, as runc does: one descriptor, with the terminal's name as the text.
fn send(socket: &Path, name: &Path, master: OwnedFd) -> io::Result<()> {
    let stream = UnixStream::connect(socket)?;
    let text = name.as_os_str().as_encoded_bytes();
    engine::send_with_files(&stream, text, &[master.as_raw_fd()])
}
