//! What a file system thread may do, and as whom.
//!
//! The server creates files as the guest's user by switching the thread's effective ids. With the
//! kernel's defaults that switch takes the capabilities away, too; then a handle cannot be opened
//! any more and what the guest's user may do by a supplementary group fails. So the thread keeps
//! them: the guest's kernel has checked the permissions, and beyond it the share is the border.

use std::io;

use caps::{CapSet, Capability};
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

/// Calls `f` with this umask. A new file in a directory with default access control lists has its mode from these, in
/// any other from the umask: which it is only the host's kernel knows.
pub(super) fn with_umask<T>(mask: u32, f: impl FnOnce() -> T) -> T {
    let before = umask(Mode::from_bits_truncate(mask));
    let result = f();
    umask(before);
    result
}

/// Calls `f` without CAP_FSETID unless the guest's root asks, so that the kernel clears the set-user-id bit of what a user
/// changes.
pub(super) fn as_user<T>(uid: u32, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let held = (None, CapSet::Effective, Capability::CAP_FSETID);
    if uid == 0 || !caps::has_cap(held.0, held.1, held.2).map_err(io::Error::other)? {
        return f();
    }
    caps::drop(held.0, held.1, held.2).map_err(io::Error::other)?;
    let result = f();
    caps::raise(held.0, held.1, held.2).map_err(io::Error::other)?;
    result
}
