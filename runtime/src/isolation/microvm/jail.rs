//! The VMM process's jail: what a guest that has taken the process over can still name.
//!
//! Its root is the file system in memory in which the shares are built, and nothing else is mounted in its mount
//! namespace but what is shared and a `/proc` without the kernel's own files, in which it sees itself alone. It holds no
//! descriptor of a directory outside. The root itself is read-only, so that neither the guest nor who took the process
//! over can lead the host elsewhere when it adds or removes what is shared. What its threads may ask of the kernel is
//! the `vmm` crate's part.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use engine::fault;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::prctl;
use nix::unistd::{chdir, pivot_root};

/// A step into the jail that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {} for the VMM process", path.display())]
pub struct JailError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn failed<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> JailError {
    let path = path.to_owned();
    move |source| JailError {
        action,
        path,
        source: source.into(),
    }
}

/// Makes `root`, a mount of the caller's own mount namespace, the root of all threads of this process, and lets go of
/// everything else. Its memory is from then on nobody's to read who has no CAP_SYS_PTRACE.
///
/// # Errors
/// The kernel's, with the path. The process must then end.
pub fn enter(root: &Path) -> Result<(), JailError> {
    let proc = root.join("proc");
    fs::create_dir(&proc).map_err(failed("create", &proc))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // With them no file of the kernel is there (core_pattern, sysrq-trigger), nor a process that could be traced.
    let options = Some("subset=pid,hidepid=ptraceable");
    mount(Some("proc"), &proc, Some("proc"), flags, options).map_err(failed("mount", &proc))?;
    chdir(root).map_err(failed("enter", root))?;
    // The old root comes to lie upon the new one, and is taken away.
    pivot_root(".", ".").map_err(failed("change the root to", root))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("leave the old root for", root))?;
    chdir("/").map_err(failed("enter", Path::new("/")))?;
    // The guest is served directories of this file system: it is to change nothing but what is mounted below.
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    let none = None::<&str>;
    if !fault::is_left_out("jail.write-protected") {
        mount(none, "/", none, flags, none).map_err(failed("write-protect", Path::new("/")))?;
    }
    // Another machine's process is the same user and has no fewer privileges.
    prctl::set_dumpable(false).map_err(failed("guard the memory of", root))
}
