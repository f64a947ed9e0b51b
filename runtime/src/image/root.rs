//! A root file system under construction, touched through descriptors alone.
//!
//! The names come from hostile archives, and earlier entries may have put symbolic links anywhere. A parent directory
//! is therefore opened with `openat2(2)` and RESOLVE_IN_ROOT, so that links (a merged /usr needs them followed) end
//! inside; the last component is then made, changed or removed by a `*at` call that does not follow links.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag};
use nix::sys::stat::{FileStat, Mode, SFlag, UtimensatFlags};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags};

/// Directories deeper than this are refused, so that recursion ends.
const MAX_DEPTH: usize = 2048;

/// Owner, permissions, times and extended attributes of an entry.
#[derive(Clone, Debug)]
pub(super) struct Metadata {
    pub uid: u32,
    pub gid: u32,
    /// The low twelve bits of a mode.
    pub permissions: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    /// Name and value.
    pub xattrs: Vec<(CString, Vec<u8>)>,
}

/// The root directory.
pub(super) struct Root(OwnedFd);

/// A directory inside the root.
pub(super) struct Directory(OwnedFd);

/// What a name in a directory is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    Directory,
    Other,
}

/// Takes over a descriptor that a system call has just returned.
pub(super) fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller passes the result of a successful open, which nothing else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl Root {
    /// The root at `path`, a directory of ours.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(Self(owned(nix::fcntl::open(path, flags, Mode::empty())?)))
    }

    /// Opens `path`, resolved as if this were the root of everything.
    fn resolve(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        loop {
            match nix::fcntl::openat2(self.0.as_raw_fd(), path, how) {
                // A rename elsewhere on the system interrupted the walk.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                result => return result.map(owned),
            }
        }
    }

    /// The directory at `path`; an error of kind `NotFound` if it is not there.
    pub(super) fn directory(&self, path: &Path) -> io::Result<Directory> {
        Ok(Directory(
            self.resolve(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?,
        ))
    }

    /// The directory at `path`, made with its parents where missing.
    pub(super) fn make_directories(&self, path: &Path) -> io::Result<Directory> {
        match self.directory(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            result => return result,
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Errno::ENOENT.into());
        };
        let parent = self.make_directories(parent)?;
        match nix::sys::stat::mkdirat(Some(parent.raw()), name, Mode::S_IRWXU) {
            Ok(()) => {
                // Whatever the caller's umask is.
                let directory = parent.child(name)?;
                nix::sys::stat::fchmod(directory.raw(), Mode::from_bits_truncate(0o755))?;
                Ok(directory)
            }
            // A link to nowhere, which the second look reports.
            Err(Errno::EEXIST) => self.directory(path),
            Err(e) => Err(e.into()),
        }
    }

    /// Opens a regular file for reading; none if it is not there.
    pub(super) fn file(&self, path: &Path) -> io::Result<Option<File>> {
        match self.resolve(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY) {
            Ok(fd) => {
                let file = File::from(fd);
                Ok(file.metadata()?.is_file().then_some(file))
            }
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ENXIO) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Directory {
    fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Device and inode: the directory's identity while it exists.
    pub(super) fn identity(&self) -> io::Result<(u64, u64)> {
        let stat = nix::sys::stat::fstat(self.raw())?;
        Ok((stat.st_dev, stat.st_ino))
    }

    fn stat(&self, name: &OsStr) -> nix::Result<FileStat> {
        nix::sys::stat::fstatat(Some(self.raw()), name, AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    /// What `name` is; none if it is not there.
    pub(super) fn kind(&self, name: &OsStr) -> io::Result<Option<Kind>> {
        match self.stat(name) {
            Ok(stat)
                if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR =>
            {
                Ok(Some(Kind::Directory))
            }
            Ok(_) => Ok(Some(Kind::Other)),
            Err(Errno::ENOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// The directory `name` itself, not what a link of that name points to.
    pub(super) fn child(&self, name: &OsStr) -> io::Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(Self(owned(nix::fcntl::openat(
            Some(self.raw()),
            name,
            flags,
            Mode::empty(),
        )?)))
    }

    /// The names in it.
    pub(super) fn names(&self) -> io::Result<Vec<OsString>> {
        // A descriptor of its own: reading moves its position.
        let mut dir = Dir::openat(
            Some(self.raw()),
            ".",
            OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Removes `name`, with what is in it, if it is there.
    pub(super) fn remove(&self, name: &OsStr) -> io::Result<()> {
        self.remove_below(name, MAX_DEPTH)
    }

    fn remove_below(&self, name: &OsStr, depth: usize) -> io::Result<()> {
        match self.kind(name)? {
            None => Ok(()),
            Some(Kind::Other) => self.unlink(name),
            Some(Kind::Directory) => {
                let depth = depth.checked_sub(1).ok_or(Errno::ENAMETOOLONG)?;
                let child = self.child(name)?;
                for inner in child.names()? {
                    child.remove_below(&inner, depth)?;
                }
                self.remove_empty(name)
            }
        }
    }

    /// Removes `name`, which is not a directory.
    pub(super) fn unlink(&self, name: &OsStr) -> io::Result<()> {
        Ok(nix::unistd::unlinkat(
            Some(self.raw()),
            name,
            UnlinkatFlags::NoRemoveDir,
        )?)
    }

    /// Removes the directory `name`, which is empty.
    pub(super) fn remove_empty(&self, name: &OsStr) -> io::Result<()> {
        Ok(nix::unistd::unlinkat(
            Some(self.raw()),
            name,
            UnlinkatFlags::RemoveDir,
        )?)
    }

    /// Makes the directory `name`.
    pub(super) fn make_directory(&self, name: &OsStr) -> io::Result<Self> {
        nix::sys::stat::mkdirat(Some(self.raw()), name, Mode::from_bits_truncate(0o700))?;
        self.child(name)
    }

    /// Makes the file `name`, open for writing.
    pub(super) fn make_file(&self, name: &OsStr) -> io::Result<File> {
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(0o600);
        Ok(File::from(owned(nix::fcntl::openat(
            Some(self.raw()),
            name,
            flags,
            mode,
        )?)))
    }

    /// Makes the symbolic link `name` to `target`.
    pub(super) fn make_symlink(&self, name: &OsStr, target: &OsStr) -> io::Result<()> {
        Ok(nix::unistd::symlinkat(target, Some(self.raw()), name)?)
    }

    /// Makes `name` another name of the file `target` in `directory`.
    pub(super) fn make_hard_link(
        &self,
        name: &OsStr,
        directory: &Self,
        target: &OsStr,
    ) -> io::Result<()> {
        let flags = AtFlags::empty();
        Ok(nix::unistd::linkat(
            Some(directory.raw()),
            target,
            Some(self.raw()),
            name,
            flags,
        )?)
    }

    /// Makes the device or pipe `name`.
    pub(super) fn make_node(
        &self,
        name: &OsStr,
        kind: SFlag,
        device: (u32, u32),
    ) -> io::Result<()> {
        let device = nix::sys::stat::makedev(u64::from(device.0), u64::from(device.1));
        let mode = Mode::from_bits_truncate(0o600);
        Ok(nix::sys::stat::mknodat(
            Some(self.raw()),
            name,
            kind,
            mode,
            device,
        )?)
    }

    /// Gives the directory itself its metadata; the time is set apart, when nothing more is made in it.
    pub(super) fn apply(&self, metadata: &Metadata, skipped: &mut u64) -> io::Result<()> {
        apply_to_open(self.as_fd(), metadata, skipped)
    }

    /// Sets the directory's own time.
    pub(super) fn set_mtime(&self, mtime: i64) -> io::Result<()> {
        let time = TimeSpec::new(mtime, 0);
        Ok(nix::sys::stat::futimens(self.raw(), &time, &time)?)
    }

    /// Gives `name`, which is no directory and no regular file, its metadata. A link has no permissions.
    pub(super) fn apply_to(
        &self,
        name: &OsStr,
        metadata: &Metadata,
        is_link: bool,
        skipped: &mut u64,
    ) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(metadata.uid), Gid::from_raw(metadata.gid));
        nix::unistd::fchownat(
            Some(self.raw()),
            name,
            Some(uid),
            Some(gid),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )?;
        if !is_link {
            // The node was made a moment ago in a directory that only we write to, and it is no link.
            let mode = Mode::from_bits_truncate(metadata.permissions);
            nix::sys::stat::fchmodat(
                Some(self.raw()),
                name,
                mode,
                nix::sys::stat::FchmodatFlags::FollowSymlink,
            )?;
        }
        let mut path = format!("/proc/self/fd/{}/", self.raw()).into_bytes();
        path.extend_from_slice(name.as_bytes());
        let path = CString::new(path)?;
        set_xattrs(&metadata.xattrs, skipped, |name, value| {
            // SAFETY: both strings end with a zero, and the length is that of the value.
            unsafe {
                libc::lsetxattr(
                    path.as_ptr(),
                    name.as_ptr(),
                    value.as_ptr().cast(),
                    value.len(),
                    0,
                )
            }
        })?;
        let time = TimeSpec::new(metadata.mtime, 0);
        let flag = UtimensatFlags::NoFollowSymlink;
        Ok(nix::sys::stat::utimensat(
            Some(self.raw()),
            name,
            &time,
            &time,
            flag,
        )?)
    }
}

/// Gives a file its metadata and its time.
pub(super) fn apply_to_file(file: &File, metadata: &Metadata, skipped: &mut u64) -> io::Result<()> {
    apply_to_open(file.as_fd(), metadata, skipped)?;
    let time = TimeSpec::new(metadata.mtime, 0);
    Ok(nix::sys::stat::futimens(file.as_raw_fd(), &time, &time)?)
}

/// Owner first: a change of owner takes away set-user-ID and capabilities.
fn apply_to_open(fd: BorrowedFd<'_>, metadata: &Metadata, skipped: &mut u64) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(metadata.uid), Gid::from_raw(metadata.gid));
    nix::unistd::fchown(fd.as_raw_fd(), Some(uid), Some(gid))?;
    nix::sys::stat::fchmod(
        fd.as_raw_fd(),
        Mode::from_bits_truncate(metadata.permissions),
    )?;
    set_xattrs(&metadata.xattrs, skipped, |name, value| {
        // SAFETY: the descriptor is open, the name ends with a zero, and the length is that of the value.
        unsafe {
            libc::fsetxattr(
                fd.as_raw_fd(),
                name.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                0,
            )
        }
    })
}

/// Sets the attributes; one that the file system cannot hold is counted, except capabilities, which programs need.
fn set_xattrs(
    xattrs: &[(CString, Vec<u8>)],
    skipped: &mut u64,
    set: impl Fn(&CString, &[u8]) -> libc::c_int,
) -> io::Result<()> {
    for (name, value) in xattrs {
        match Errno::result(set(name, value)) {
            Ok(_) => {}
            Err(Errno::ENOTSUP | Errno::EPERM) if name.as_bytes() != b"security.capability" => {
                *skipped += 1
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
