//! Paths of the container that are hidden or made read-only: `linux.maskedPaths` and `linux.readonlyPaths`.
//!
//! The paths are resolved inside the root; what hides them is the host's null device and file systems of our own, never
//! something that the image has put there.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::inside::Root;
use super::options::{Attributes, Data};
use super::tree::Tree;
use crate::error::{Context, Error};

/// Hides each path that is there: a directory by an empty one, anything else by the null device.
pub(crate) fn mask(root: &Root, paths: &[String]) -> Result<(), Error> {
    // All directories are hidden by one empty file system.
    let mut empty: Option<Tree> = None;
    for path in paths {
        let context = || format!("cannot mask {path:?} (linux.maskedPaths)");
        let Some(target) = existing(root, path).context(context)? else {
            continue;
        };
        let kind = rustix::fs::fstat(&target).context(context)?.st_mode;
        if !rustix::fs::FileType::from_raw_mode(kind).is_dir() {
            Tree::of_path(Path::new("/dev/null"), false)
                .and_then(|null| null.attach(&target))
                .context(context)?;
            continue;
        }
        let cover = match &empty {
            None => empty_file_system(),
            // Once the first one is attached it can be mounted again.
            Some(first) => Tree::of_file(first, false),
        };
        let cover = cover.context(context)?;
        cover.attach(&target).context(context)?;
        empty.get_or_insert(cover);
    }
    Ok(())
}

fn empty_file_system() -> io::Result<Tree> {
    let data = [
        Data::Value("nr_blocks".into(), "1".into()),
        Data::Value("nr_inodes".into(), "1".into()),
    ];
    let attributes = Attributes {
        set: libc::MOUNT_ATTR_RDONLY
            | libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_NOEXEC,
        clear: 0,
    };
    Tree::of_file_system("tmpfs", Some(Path::new("tmpfs")), &data, attributes)
}

/// Makes each path that is there read-only, with all mounts below it.
pub(crate) fn make_read_only(root: &Root, paths: &[String]) -> Result<(), Error> {
    for path in paths {
        let context = || format!("cannot make {path:?} read-only (linux.readonlyPaths)");
        let Some(target) = existing(root, path).context(context)? else {
            continue;
        };
        let tree = Tree::of_file(&target, true).context(context)?;
        tree.set(Attributes::READ_ONLY, true).context(context)?;
        tree.attach(&target).context(context)?;
    }
    Ok(())
}

fn existing(root: &Root, path: &str) -> io::Result<Option<std::os::fd::OwnedFd>> {
    match root.open(&PathBuf::from(path), OFlags::PATH) {
        Ok(target) => Ok(Some(target)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
