//! `tmpcopyup`: a tmpfs that begins with what its mount point has.
//!
//! Both sides are walked by descriptor and no link is followed, so that an image cannot have anything else copied. The
//! tmpfs is not attached yet, so nobody sees it half filled.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid};

/// Deeper ones are refused: each level holds two descriptors.
const DEPTH: usize = 64;

/// Copies what is in one directory into another, with owners, modes, times, links and device nodes.
pub(crate) fn copy_directory(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    copy(from.as_fd(), to.as_fd(), DEPTH)
}

fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    if depth == 0 {
        return Err(io::Error::other("tmpcopyup: the directory is too deep"));
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(stat.st_mode);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                rustix::fs::mkdirat(to, name, Mode::RWXU)?;
                let deeper_from = open(from, name, OFlags::DIRECTORY)?;
                let deeper_to = open(to, name, OFlags::DIRECTORY)?;
                copy(deeper_from.as_fd(), deeper_to.as_fd(), depth - 1)?;
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(target.as_c_str(), to, name)?;
            }
            FileType::RegularFile => {
                let mut source = File::from(open(from, name, OFlags::NONBLOCK)?);
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let made = rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR)?;
                io::copy(&mut source, &mut File::from(made))?;
            }
            kind => rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev)?,
        }
        keep_owner(to, name, &stat)?;
    }
    Ok(())
}

fn open(directory: BorrowedFd<'_>, name: &std::ffi::CStr, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(directory, name, flags, Mode::empty())?)
}

/// Gives a copy the owner, the mode and the times of its original. A change of owner clears set-user-id bits, so the
/// mode comes after.
fn keep_owner(to: BorrowedFd<'_>, name: &std::ffi::CStr, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if !FileType::from_raw_mode(stat.st_mode).is_symlink() {
        let mode = Mode::from_raw_mode(stat.st_mode);
        rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
    }
    let time = |seconds: i64, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds as _,
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    Ok(rustix::fs::utimensat(
        to,
        name,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_directory_is_copied_with_all_that_is_in_it() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("a/file"), "content").unwrap();
        fs::set_permissions(from.join("a/file"), PermissionsExt::from_mode(0o640)).unwrap();
        fs::set_permissions(from.join("a"), PermissionsExt::from_mode(0o1777)).unwrap();
        symlink("/etc/passwd", from.join("link")).unwrap();
        copy_directory(fs::File::open(&from).unwrap(), fs::File::open(&to).unwrap()).unwrap();
        assert_eq!(fs::read_to_string(to.join("a/file")).unwrap(), "content");
        let mode = |path: &str| fs::metadata(to.join(path)).unwrap().mode() & 0o7777;
        assert_eq!((mode("a/file"), mode("a")), (0o640, 0o1777));
        assert!(to.join("a/b").is_dir());
        let link = fs::read_link(to.join("link")).unwrap();
        assert_eq!(link, std::path::Path::new("/etc/passwd"));
        let times = |base: &std::path::Path| fs::metadata(base.join("a/file")).unwrap().mtime();
        assert_eq!(times(&from), times(&to));
    }
}
