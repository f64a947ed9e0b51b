//! What a file system thread may do, and as whom.
//!
//! The server creates files as the guest's user by switching the thread's effective ids. With the
//! kernel's defaults that switch takes the capabilities away, too; then a handle cannot be opened
//! any more and what the guest's user may do by a supplementary group fails. So the thread keeps
//! them: the guest's kernel has checked the permissions, and beyond it the share is the border.

use std::io;

use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;

/// `SECBIT_NO_SETUID_FIXUP` of capabilities(7): ids change, capabilities stay.
const SECBIT_NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;

/// Gives the calling thread its own working directory and umask (0), and keeps its capabilities from
/// following its user id. Wants CAP_SETPCAP where it runs as root.
pub(super) fn prepare_thread() -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS)?;
    // The guest's kernel has applied its own. For this thread alone, now that nothing is shared.
    umask(Mode::empty());
    if !geteuid().is_root() {
        // Files cannot be created as somebody else anyway.
        return Ok(());
    }
    // SAFETY: both calls take and return plain numbers.
    let result = unsafe {
        let bits = libc::prctl(libc::PR_GET_SECUREBITS, 0, 0, 0, 0);
        if bits < 0 {
            return Err(io::Error::last_os_error());
        }
        let bits = bits as libc::c_ulong | SECBIT_NO_SETUID_FIXUP;
        libc::prctl(libc::PR_SET_SECUREBITS, bits, 0, 0, 0)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
