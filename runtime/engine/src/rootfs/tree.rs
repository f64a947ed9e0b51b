//! Mounts that are made and changed by descriptor, before and after they are attached: the mount API of Linux 5.12.
//!
//! Nothing here takes a path of the container; where a mount goes is an open descriptor that the caller has resolved.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags};

use super::options::{Attributes, Data};

/// A mount with what is mounted below it.
#[derive(Debug)]
pub(crate) struct Tree(OwnedFd);

impl Tree {
    /// A new mount of what a path of the host leads to; with `recursive` of all mounts below it too.
    pub(crate) fn of_path(path: &Path, recursive: bool) -> io::Result<Self> {
        let tree = rustix::mount::open_tree(rustix::fs::CWD, path, clone_flags(recursive))?;
        Ok(Self(tree))
    }

    /// A new mount of what a descriptor refers to.
    pub(crate) fn of_file(file: impl AsFd, recursive: bool) -> io::Result<Self> {
        let flags = clone_flags(recursive) | OpenTreeFlags::AT_EMPTY_PATH;
        Ok(Self(rustix::mount::open_tree(file, c"", flags)?))
    }

    /// A new file system with a mount that has these attributes.
    pub(crate) fn of_file_system(
        kind: &str,
        source: Option<&Path>,
        data: &[Data],
        attributes: Attributes,
    ) -> io::Result<Self> {
        let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        let make = || -> rustix::io::Result<OwnedFd> {
            if let Some(source) = source {
                rustix::mount::fsconfig_set_string(&context, "source", source)?;
            }
            for one in data {
                match one {
                    Data::Flag(key) => rustix::mount::fsconfig_set_flag(&context, key.as_str())?,
                    Data::Value(key, value) => {
                        rustix::mount::fsconfig_set_string(&context, key.as_str(), value.as_str())?
                    }
                }
            }
            rustix::mount::fsconfig_create(&context)?;
            rustix::mount::fsmount(
                &context,
                FsMountFlags::FSMOUNT_CLOEXEC,
                MountAttrFlags::from_bits_retain(attributes.set as u32),
            )
        };
        make()
            .map(Self)
            .map_err(|error| explain(&context, error.into()))
    }

    /// A mount that is in place already.
    pub(crate) fn from_attached(root: OwnedFd) -> Self {
        Self(root)
    }

    /// Changes attributes; with `recursive` of all mounts below it too.
    pub(crate) fn set(&self, attributes: Attributes, recursive: bool) -> io::Result<()> {
        if attributes.is_empty() {
            return Ok(());
        }
        let change = libc::mount_attr {
            attr_set: attributes.set,
            attr_clr: attributes.clear,
            propagation: 0,
            userns_fd: 0,
        };
        set_attributes(self.0.as_fd(), c"", change, recursive)
    }

    /// Shifts the owners of its files by the maps of a user namespace.
    pub(crate) fn set_id_map(&self, user: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
        let change = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: u64::try_from(user.as_raw_fd()).unwrap_or(u64::MAX),
        };
        set_attributes(self.0.as_fd(), c"", change, recursive).map_err(|error| {
            match error.raw_os_error() {
                // mount_setattr(2): a file system that does not allow it. All else that it says this for cannot be here.
                Some(libc::EINVAL) => io::Error::new(
                    error.kind(),
                    "this kernel cannot id-map a mount of the source's file system; \
                     give it from another (ext4, xfs, btrfs), or no mappings",
                ),
                _ => error,
            }
        })
    }

    /// Changes propagation, given as mount(2) flags: `MS_SLAVE`, perhaps with `MS_REC`.
    pub(crate) fn set_propagation(&self, flags: nix::mount::MsFlags) -> io::Result<()> {
        set_propagation_at(self.0.as_fd(), c"", flags)
    }

    /// Puts it on top of what a descriptor refers to.
    pub(crate) fn attach(&self, target: impl AsFd) -> io::Result<()> {
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        Ok(rustix::mount::move_mount(&self.0, c"", target, c"", flags)?)
    }

    /// Puts it on top of what a path of the host leads to.
    pub(crate) fn attach_at(&self, path: &Path) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(rustix::mount::move_mount(
            &self.0,
            c"",
            rustix::fs::CWD,
            path,
            flags,
        )?)
    }

    /// Whether its root is a directory.
    pub(crate) fn is_directory(&self) -> io::Result<bool> {
        let mode = rustix::fs::fstat(&self.0)?.st_mode;
        Ok(rustix::fs::FileType::from_raw_mode(mode).is_dir())
    }

    /// The descriptor of its root.
    pub(crate) fn into_root(self) -> OwnedFd {
        self.0
    }
}

impl AsFd for Tree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn clone_flags(recursive: bool) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match recursive {
        true => flags | OpenTreeFlags::AT_RECURSIVE,
        false => flags,
    }
}

/// Changes the propagation of the mount at a path of the host.
pub(crate) fn set_propagation_at(
    directory: BorrowedFd<'_>,
    path: &CStr,
    flags: nix::mount::MsFlags,
) -> io::Result<()> {
    let recursive = flags.contains(nix::mount::MsFlags::MS_REC);
    let change = libc::mount_attr {
        attr_set: 0,
        attr_clr: 0,
        propagation: (flags & !nix::mount::MsFlags::MS_REC).bits(),
        userns_fd: 0,
    };
    set_attributes(directory, path, change, recursive)
}

/// mount_setattr(2), which no library has yet.
fn set_attributes(
    directory: BorrowedFd<'_>,
    path: &CStr,
    mut change: libc::mount_attr,
    recursive: bool,
) -> io::Result<()> {
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path ends with NUL and the structure has the size given; the kernel only reads them.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory.as_raw_fd(),
            path.as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw mut change,
            size_of::<libc::mount_attr>(),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The kernel's own words about a refused file system, if it left any: lines such as `e tmpfs: Bad value for 'size'`.
fn explain(context: &OwnedFd, error: io::Error) -> io::Error {
    let mut reasons = Vec::new();
    if let Ok(context) = context.try_clone() {
        let mut file = File::from(context);
        let mut line = [0u8; 512];
        // Each read gives one message, and an error when there is none left.
        while let Ok(length) = file.read(&mut line) {
            let text = String::from_utf8_lossy(&line[..length]);
            let text = text.trim();
            if let Some(reason) = text.strip_prefix("e ") {
                reasons.push(reason.to_owned());
            }
            if length == 0 {
                break;
            }
        }
    }
    if reasons.is_empty() {
        return error;
    }
    io::Error::new(error.kind(), format!("{}: {error}", reasons.join("; ")))
}
