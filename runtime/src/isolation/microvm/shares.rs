//! The trees that the guest sees: one with the container's root, one with its volumes.
//!
//! They are built of bind mounts in a mount namespace of the VMM process's own, so that they vanish with it, however
//! it ends. What the guest must not write is mounted read-only here too: the host does not rely on the guest's engine.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::guest_spec::Volume;

/// A step of building the trees that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct ShareError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The trees' places, as this process sees them.
#[derive(Debug)]
pub struct Shares {
    /// One directory, named by the container's id: its root.
    pub rootfs: PathBuf,
    /// One file or directory a volume, named by its number; none without volumes.
    pub volumes: Option<PathBuf>,
}

/// Leaves the mount namespace for one of our own and builds the trees in it, on a file system in memory at `at`.
///
/// # Errors
/// The kernel's, with the path. The process must then end.
pub fn build(
    at: &Path,
    id: &str,
    rootfs: &Path,
    read_only: bool,
    volumes: &[Volume],
) -> Result<Shares, ShareError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source: nix::Error| ShareError {
            action,
            path,
            source: source.into(),
        }
    };
    let make = |path: &Path| {
        fs::create_dir(path).map_err(|source| ShareError {
            action: "create",
            path: path.to_owned(),
            source,
        })
    };
    unshare(CloneFlags::CLONE_NEWNS)
        .map_err(failed("leave the mount namespace of", Path::new("/")))?;
    // Mounts that the host makes later below a volume are still seen; ours do not reach the host.
    let propagation = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, propagation, None::<&str>)
        .map_err(failed("change the propagation of", Path::new("/")))?;
    make(at)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("rt"), at, Some("tmpfs"), flags, Some("mode=0700"))
        .map_err(failed("mount a tmpfs at", at))?;

    let roots = at.join("rootfs");
    make(&roots)?;
    let target = roots.join(id);
    make(&target)?;
    bind(rootfs, &target, true, read_only)?;
    if volumes.is_empty() {
        return Ok(Shares {
            rootfs: roots,
            volumes: None,
        });
    }
    let dir = at.join("volumes");
    make(&dir)?;
    for (index, volume) in volumes.iter().enumerate() {
        let target = dir.join(index.to_string());
        let metadata = fs::metadata(&volume.source).map_err(|source| ShareError {
            action: "read",
            path: volume.source.clone(),
            source,
        })?;
        if metadata.is_dir() {
            make(&target)?;
        } else {
            File::create(&target).map_err(|source| ShareError {
                action: "create",
                path: target.clone(),
                source,
            })?;
        }
        bind(&volume.source, &target, volume.recursive, volume.read_only)?;
    }
    Ok(Shares {
        rootfs: roots,
        volumes: Some(dir),
    })
}

fn bind(source: &Path, target: &Path, recursive: bool, read_only: bool) -> Result<(), ShareError> {
    let failed = |action| {
        move |error: nix::Error| ShareError {
            action,
            path: source.to_owned(),
            source: error.into(),
        }
    };
    let flags = if recursive {
        MsFlags::MS_BIND | MsFlags::MS_REC
    } else {
        MsFlags::MS_BIND
    };
    mount(Some(source), target, None::<&str>, flags, None::<&str>).map_err(failed("share"))?;
    if read_only {
        set_read_only(target, recursive).map_err(|error| ShareError {
            action: "share read-only",
            path: source.to_owned(),
            source: error,
        })?;
    }
    Ok(())
}

/// Makes a mount, and with `recursive` all below it, read-only: `mount_setattr(2)`.
fn set_read_only(target: &Path, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = if recursive { libc::AT_RECURSIVE } else { 0 };
    let dir = open_path(target)?;
    // SAFETY: the path is the empty string with its terminator, the attributes are a whole structure of the size given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            dir.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn open_path(path: &Path) -> io::Result<OwnedFd> {
    use nix::fcntl::{OFlag, open};
    let fd = open(
        path,
        OFlag::O_PATH | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Removes the mount point of [`build`] after the VMM process has ended. It is no error when it is not there.
///
/// # Errors
/// The kernel's.
pub fn remove_mount_point(at: &Path) -> io::Result<()> {
    // A process that was killed between its first steps may have left the mount in no namespace but ours.
    let _ = umount2(at, MntFlags::MNT_DETACH);
    match fs::remove_dir(at) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
