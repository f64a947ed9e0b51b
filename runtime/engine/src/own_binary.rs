//! Keeps the runtime's own binary out of the reach of the containers that its processes enter.
//!
//! A process that enters a container shows its executable there: by `/proc/PID/exe`, and by `/proc/self/exe`, which the
//! container's program or its interpreter may be a link to. Who has it open can write to it as soon as nobody executes
//! it any more (CVE-2019-5736). So the runtime executes itself anew, through a read-only mount that is in no namespace:
//! what is opened through it is refused for writing, whatever rights the container has, and no container can change a
//! mount that is not in its own namespace.
//!
//! What is mounted depends on how long the process stays ([`Stay`]). To be refused is not enough for a command: by the time
//! that open(2) finds the mount read-only it has the inode's write access, and for that moment nobody can execute it. A
//! container that tried for ever would have other calls of the runtime fail with ETXTBSY. An overlay has inodes of its own.
//!
//! What is left: the binary can be read, and mapped where it is executed. A container that was given the host's devices
//! or mounts needs no such way.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, FcntlArg, SealFlag, fcntl};
use nix::mount::MsFlags;
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
use nix::sys::statvfs::{FsFlags, fstatvfs};
use rustix::fs::{Mode, OFlags};

use crate::error::{Context, Error};
use crate::rootfs::{Attributes, Data, Tree};

const OWN: &str = "/proc/self/exe";

/// The variable that tells the program that is executed anew where its binary is: from a mount of its own it cannot see.
const PATH: &str = "RT_BINARY";

const READ_ONLY: Attributes = Attributes {
    set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
    clear: 0,
};

/// How long a process stays that enters containers, or whose children do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stay {
    /// It ends before the containers do: it executes a file of an overlay, and no container sees the host's inode.
    Command,
    /// It stays as long as they do: it executes the host's inode, by a read-only mount, so that nobody gets write access
    /// to it, for no moment. By an overlay it would not keep an administrator from overwriting what it executes.
    Server,
}

/// Where this program's binary was when it was executed first; what belongs to it is beside it.
///
/// # Errors
/// The kernel does not tell.
pub fn own_path() -> io::Result<PathBuf> {
    match std::env::var_os(PATH) {
        Some(path) if is_sealed(&File::open(OWN)?) => Ok(path.into()),
        _ => std::env::current_exe(),
    }
}

/// Executes this program anew, with the same arguments and environment, unless that was done already or its binary lies
/// on a read-only mount anyway. To be called before anything is made that an execve(2) would lose.
///
/// # Errors
/// The binary can be neither mounted nor copied, or not executed.
pub fn seal(stay: Stay) -> Result<(), Error> {
    let context = || "cannot put this program's binary out of the container's reach".to_owned();
    let own = File::open(OWN).context(context)?;
    if is_sealed(&own) {
        // Kernels before 6.14 name a process that was executed by descriptor after its number.
        let _ = nix::sys::prctl::set_name(c"rt");
        return Ok(());
    }
    let path = std::env::current_exe().context(context)?;
    let mounted = match stay {
        Stay::Command => overlay(&own, &path),
        Stay::Server => read_only_mount(),
    };
    // Who may not mount, or has no overlays, or lies on a file system that none can be made of.
    let sealed = match mounted {
        Ok(sealed) => sealed,
        Err(_) => sealed_copy(&own).context(context)?,
    };
    let strings = |all: Vec<std::ffi::OsString>| -> Result<Vec<CString>, Error> {
        let strings = all.into_iter().map(|one| CString::new(one.into_vec()));
        strings
            .collect::<Result<_, _>>()
            .map_err(io::Error::from)
            .context(context)
    };
    let args = strings(std::env::args_os().collect())?;
    let others = std::env::vars_os().filter(|(name, _)| name != PATH);
    let variables = others.chain([(PATH.into(), path.into())]);
    let variables = variables.map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        name
    });
    let env = strings(variables.collect())?;
    let flags = AtFlags::AT_EMPTY_PATH;
    let Err(error) = nix::unistd::execveat(Some(sealed.as_raw_fd()), c"", &args, &env, flags);
    Err(error).context(context)
}

fn is_sealed(own: &File) -> bool {
    let read_only = fstatvfs(own).is_ok_and(|one| one.flags().contains(FsFlags::ST_RDONLY));
    read_only
        || fcntl(own.as_raw_fd(), FcntlArg::F_GET_SEALS)
            .is_ok_and(|seals| seals & SealFlag::F_SEAL_WRITE.bits() != 0)
}

/// The file in an overlay of its directory.
fn overlay(own: &File, path: &Path) -> io::Result<OwnedFd> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::NotFound.into());
    };
    let by_name = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let directory = rustix::fs::open(directory, by_name | OFlags::DIRECTORY, Mode::empty())?;
    // By descriptor there is nothing to escape. Without an upper layer there have to be two lower ones, and older kernels
    // want both attached in our namespace: the second is a directory that every host has.
    let layers = format!("/proc/self/fd/{}:/sys", directory.as_raw_fd());
    let data = [
        Data::Value("lowerdir".into(), layers),
        // Inodes keep the numbers that they have.
        Data::Value("xino".into(), "off".into()),
        // Of the file system, which open(2) looks at before it touches the inode.
        Data::Flag("ro".into()),
    ];
    let overlay = Tree::of_file_system("overlay", None, &data, READ_ONLY)?;
    let sealed = rustix::fs::openat(&overlay, name, by_name, Mode::empty())?;
    let identity = |file: BorrowedFd<'_>| {
        rustix::fs::fstat(file)
            .map(|one| (one.st_ino, one.st_size, one.st_mtime, one.st_mtime_nsec))
    };
    // Another program has this name by now, while this one is upgraded.
    if identity(sealed.as_fd())? != identity(own.as_fd())? {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(sealed)
}

/// A mount of the binary alone.
fn read_only_mount() -> io::Result<OwnedFd> {
    let tree = Tree::of_path(Path::new(OWN), false)?;
    tree.set_propagation(MsFlags::MS_PRIVATE)?;
    tree.set(READ_ONLY, false)?;
    Ok(tree.into_root())
}

/// A copy in memory that nobody can change.
fn sealed_copy(mut own: &File) -> io::Result<OwnedFd> {
    let flags = MemFdCreateFlag::MFD_CLOEXEC | MemFdCreateFlag::MFD_ALLOW_SEALING;
    let copy = File::from(memfd_create(c"rt", flags)?);
    io::copy(&mut own, &mut &copy)?;
    let seals = SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_SEAL;
    fcntl(copy.as_raw_fd(), FcntlArg::F_ADD_SEALS(seals))?;
    Ok(copy.into())
}
