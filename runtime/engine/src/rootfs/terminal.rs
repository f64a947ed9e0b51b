//! A process's terminal: made in the container's own devpts, its master sent through the console socket.
//!
//! What lies at /dev/pts/ptmx is the image's until it is known to be the multiplexer of a devpts; the terminal itself is
//! asked of the multiplexer, not opened by a name (TIOCGPTPEER).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::pty::OpenptFlags;

use super::devices::open_dev;
use super::inside::{Place, Root};
use super::tree::Tree;
use crate::error::{Context, Error};
use crate::stdio::send_with_files;

/// Kernel ABI: `DEVPTS_SUPER_MAGIC`.
const DEVPTS_MAGIC: i64 = 0x1cd1;

/// Makes a terminal, sends its master to `socket` and returns the other end.
pub(crate) fn make(root: &Root, socket: RawFd) -> Result<OwnedFd, Error> {
    let context = || {
        "cannot make a terminal (process.terminal): it needs a devpts mounted on /dev/pts"
            .to_owned()
    };
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let master = root
        .open_without_links(Path::new("dev/pts/ptmx"), flags)
        .context(context)?;
    let stat = rustix::fs::fstat(&master).context(context)?;
    let system = rustix::fs::fstatfs(&master).context(context)?;
    if system.f_type != DEVPTS_MAGIC || stat.st_rdev != rustix::fs::makedev(5, 2) {
        return Err(io::Error::other("/dev/pts/ptmx is not its multiplexer")).context(context);
    }
    rustix::pty::unlockpt(&master).context(context)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let terminal = rustix::pty::ioctl_tiocgptpeer(&master, flags).context(context)?;
    let name = rustix::pty::ptsname(&master, Vec::new()).context(context)?;
    send_with_files(&socket, name.as_bytes(), &[master.as_raw_fd()])
        .context(|| "cannot send the terminal through the console socket".to_owned())?;
    Ok(terminal)
}

/// Makes /dev/console another name of a terminal.
pub(crate) fn bind_console(root: &Root, terminal: BorrowedFd<'_>) -> Result<(), Error> {
    let place = Place {
        directory: open_dev(root)?,
        name: "console".into(),
    };
    let bind = || Tree::of_file(terminal, false)?.attach(place.make_file()?);
    bind().context(|| "cannot put the terminal on /dev/console".to_owned())
}

/// Makes a terminal the one of this session, and the standard streams.
pub(crate) fn take(terminal: OwnedFd) -> Result<(), Error> {
    let context = || "cannot take the terminal".to_owned();
    rustix::process::ioctl_tiocsctty(&terminal).context(context)?;
    for target in 0..3 {
        nix::unistd::dup2(terminal.as_raw_fd(), target).context(context)?;
    }
    Ok(())
}
