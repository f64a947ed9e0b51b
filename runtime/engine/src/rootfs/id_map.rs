//! User namespaces that exist only to hold the id maps of a mount.
//!
//! The kernel takes the maps of an id-mapped mount as a user namespace. One is made by a process that does nothing and
//! is gone before the container's first process is born.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use oci_spec::runtime::LinuxIdMapping;

use crate::clone::{ExitGuard, clone};
use crate::error::{Context, Error};
use crate::namespaces::map_lines;

/// Makes a user namespace with these maps and opens it.
pub(crate) fn user_namespace(
    uids: &[LinuxIdMapping],
    gids: &[LinuxIdMapping],
) -> Result<OwnedFd, Error> {
    let context = || "cannot make a user namespace for an id-mapped mount".to_owned();
    let child = clone(libc::CLONE_NEWUSER as u64, None).context(context)?;
    let Some(child) = child else {
        let _guard = ExitGuard;
        // It waits until it is killed, at the latest by its parent's end.
        let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
        loop {
            nix::unistd::pause();
        }
    };
    let open = || -> io::Result<OwnedFd> {
        fs::write(format!("/proc/{}/gid_map", child.pid), map_lines(gids))?;
        fs::write(format!("/proc/{}/uid_map", child.pid), map_lines(uids))?;
        Ok(fs::File::open(format!("/proc/{}/ns/user", child.pid))?.into())
    };
    let opened = open();
    child.kill_and_reap();
    opened.context(context)
}
