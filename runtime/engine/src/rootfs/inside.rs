//! Paths inside a container's root, resolved so that none leads out of it.
//!
//! The image and, through shared volumes, other processes decide what lies there, also while we look: each step is taken
//! from a descriptor, and the kernel resolves links as if the root were `/` (openat2(2), `RESOLVE_IN_ROOT`).

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// How often a resolution is tried again that renames by another process disturb (the kernel then says EAGAIN).
const TRIES: usize = 64;

/// How many links a path may lead through, as with the kernel.
const MOST_LINKS: usize = 40;

/// A directory that stands for `/`.
pub(crate) struct Root {
    directory: OwnedFd,
}

/// A place in the root: its directory, which is there, and its name in it.
pub(crate) struct Place {
    pub(crate) directory: OwnedFd,
    pub(crate) name: PathBuf,
}

impl Root {
    pub(crate) fn new(directory: OwnedFd) -> Self {
        Self { directory }
    }

    pub(crate) fn into_directory(self) -> OwnedFd {
        self.directory
    }

    /// Opens what is at a path, following links inside the root.
    pub(crate) fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        self.resolve(path, flags, ResolveFlags::empty())
    }

    /// Opens what is at a path that must have no link in it.
    pub(crate) fn open_without_links(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        self.resolve(path, flags, ResolveFlags::NO_SYMLINKS)
    }

    fn resolve(&self, path: &Path, flags: OFlags, more: ResolveFlags) -> io::Result<OwnedFd> {
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | more;
        let mut left = TRIES;
        loop {
            let flags = flags | OFlags::CLOEXEC;
            match rustix::fs::openat2(&self.directory, path, flags, Mode::empty(), how) {
                Err(Errno::AGAIN) if left > 0 => left -= 1,
                other => return Ok(other?),
            }
        }
    }

    /// Opens a directory, which is made if it is missing, with those above it.
    pub(crate) fn make_directory(&self, path: &Path) -> io::Result<OwnedFd> {
        let path = normalize(path);
        match self.open(&path, OFlags::PATH | OFlags::DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let path = self.follow(&path)?;
        let mut directory = self.directory.try_clone()?;
        let mut so_far = PathBuf::new();
        for name in path.iter() {
            so_far.push(name);
            directory = match self.open(&so_far, OFlags::PATH | OFlags::DIRECTORY) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    make_and_open(directory.as_fd(), Path::new(name))?
                }
                other => other?,
            };
        }
        Ok(directory)
    }

    /// The place of a path whose directory is made if it is missing.
    pub(crate) fn place(&self, path: &Path) -> io::Result<Place> {
        let path = normalize(path);
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Errno::ISDIR.into());
        };
        Ok(Place {
            directory: self.make_directory(parent)?,
            name: name.into(),
        })
    }

    /// Opens a file to mount on, which is made empty if it is missing.
    pub(crate) fn make_file(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.open(&normalize(path), OFlags::PATH) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        self.place(&self.follow(&normalize(path))?)?.make_file()
    }

    /// Where a path leads that need not exist: without a link as far as it does. An image may have `/etc/resolv.conf` as a
    /// link to what only a running system makes; what is mounted on it is to be where the link leads, in the root.
    fn follow(&self, path: &Path) -> io::Result<PathBuf> {
        let mut left: Vec<OsString> = path.iter().rev().map(OsString::from).collect();
        let mut links = 0;
        let mut found = PathBuf::new();
        while let Some(name) = left.pop() {
            match name.as_bytes() {
                b"." => continue,
                b".." => {
                    found.pop();
                    continue;
                }
                b"/" => {
                    found.clear();
                    continue;
                }
                _ => found.push(&name),
            }
            let flags = OFlags::PATH | OFlags::NOFOLLOW;
            let Ok(opened) = self.open_without_links(&found, flags) else {
                // Nothing is there, nor below it.
                continue;
            };
            let stat = rustix::fs::fstat(&opened)?;
            if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_symlink() {
                links += 1;
                if links > MOST_LINKS {
                    return Err(Errno::LOOP.into());
                }
                let target = rustix::fs::readlinkat(&opened, "", Vec::new())?;
                let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                left.extend(target.iter().rev().map(OsString::from));
                found.pop();
            }
        }
        Ok(normalize(&found))
    }
}

impl Place {
    /// Opens the place itself as a file, made empty if it is missing; a link there is not followed but an error.
    pub(crate) fn make_file(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.directory, &self.name, flags, Mode::from(0o755)) {
            Ok(_) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let file = self.open()?;
        let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
        match kind {
            rustix::fs::FileType::Symlink => Err(Errno::LOOP.into()),
            rustix::fs::FileType::Directory => Err(Errno::ISDIR.into()),
            _ => Ok(file),
        }
    }

    /// Opens what is there, be it a link.
    pub(crate) fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&self.directory, &self.name, flags, Mode::empty());
        Ok(opened?)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

fn make_and_open(parent: BorrowedFd<'_>, name: &Path) -> io::Result<OwnedFd> {
    match rustix::fs::mkdirat(parent, name, Mode::from(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    // A link that is there by now is another process's doing.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// A path below the root, without `.` and `..`, which are taken as in a path that has no links.
pub(crate) fn normalize(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => {
                normal.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if normal.as_os_str().is_empty() {
        normal.push(".");
    }
    normal
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("root")).unwrap();
        fs::create_dir(directory.path().join("outside")).unwrap();
        let opened = fs::File::open(directory.path().join("root")).unwrap();
        (directory, Root::new(opened.into()))
    }

    #[test]
    fn no_path_leads_out_of_the_root() {
        let (directory, root) = root();
        let inside = directory.path().join("root");
        let outside = directory.path().join("outside");
        symlink(&outside, inside.join("absolute")).unwrap();
        symlink("../outside", inside.join("relative")).unwrap();
        symlink("/", inside.join("top")).unwrap();
        for path in ["absolute/new", "relative/new"] {
            root.make_directory(Path::new(path)).unwrap();
        }
        let below = outside.strip_prefix("/").unwrap();
        assert!(inside.join(below).join("new").is_dir());
        assert!(inside.join("outside/new").is_dir());
        root.make_directory(Path::new("/top/../../new/deep"))
            .unwrap();
        root.make_directory(Path::new("/top/other")).unwrap();
        root.make_file(Path::new("/new/file")).unwrap();
        assert!(inside.join("new/deep").is_dir());
        assert!(inside.join("other").is_dir());
        assert!(inside.join("new/file").is_file());
        assert_eq!(fs::read_dir(outside).unwrap().count(), 0);
    }

    #[test]
    fn a_file_is_made_where_a_link_leads() {
        let (directory, root) = root();
        let inside = directory.path().join("root");
        symlink("../deep/./target", inside.join("link")).unwrap();
        symlink("/link", inside.join("other")).unwrap();
        symlink("loop", inside.join("loop")).unwrap();
        assert!(root.make_file(Path::new("loop")).is_err());
        root.make_file(Path::new("other")).unwrap();
        assert!(inside.join("deep/target").is_file());
        root.make_file(Path::new("link")).unwrap();
        assert!(root.place(Path::new("link")).unwrap().make_file().is_err());
        assert!(root.place(Path::new("/")).is_err());
        let no_links = root.open_without_links(Path::new("link"), OFlags::PATH);
        assert!(no_links.is_err());
    }

    #[test]
    fn paths_are_normalized_below_the_root() {
        for (given, normal) in [
            ("/a/./b/", "a/b"),
            ("../../a", "a"),
            ("/a/../../b", "b"),
            ("/", "."),
        ] {
            assert_eq!(normalize(Path::new(given)), Path::new(normal));
        }
    }
}
