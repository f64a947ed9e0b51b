//! Where an image's files come from: a directory, or a tar archive read in place.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag};

use super::Error;
use super::budget::Budget;
use super::root::owned;

/// An archive with more members is refused: an image has a few for each layer.
const MAX_MEMBERS: usize = 100_000;
/// Links of one archive member to another are followed this often.
const MAX_LINKS: usize = 8;

/// The files of an image.
pub(super) enum Source {
    /// Of a directory, which may be under another's control: nothing outside of it is opened.
    Directory(File),
    /// Of an archive.
    Archive {
        file: File,
        members: HashMap<PathBuf, Member>,
    },
}

/// A member of an archive.
pub(super) enum Member {
    File {
        offset: u64,
        size: u64,
    },
    /// `docker save` of older versions links a layer to its like.
    Link(PathBuf),
}

/// A part of a file, read by position: several can be read side by side.
pub(super) struct Section {
    file: File,
    offset: u64,
    left: u64,
}

impl Read for Section {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = usize::try_from(self.left).map_or(buf.len(), |left| left.min(buf.len()));
        let read = self.file.read_at(&mut buf[..len], self.offset)?;
        self.offset += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

impl Source {
    /// Opens the image at `path`.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io("open image", path))?;
        let kind = file
            .metadata()
            .map_err(Error::io("read image", path))?
            .file_type();
        if kind.is_dir() {
            return Ok(Self::Directory(file));
        }
        let not = |what: String| Error::NotAnImage {
            path: path.to_owned(),
            what,
        };
        if !kind.is_file() {
            return Err(not("it is neither a directory nor a file".into()));
        }
        let mut magic = [0; 4];
        let len = (&file)
            .read(&mut magic)
            .map_err(Error::io("read image", path))?;
        match &magic[..len] {
            [0x1f, 0x8b, ..] => {
                return Err(not(
                    "the archive is compressed; uncompress it first (gzip -d)".into(),
                ));
            }
            [0x28, 0xb5, 0x2f, 0xfd] => {
                return Err(not(
                    "the archive is compressed; uncompress it first (zstd -d)".into(),
                ));
            }
            _ => {}
        }
        (&file).rewind().map_err(Error::io("read image", path))?;
        let members = index(&file).map_err(|e| not(format!("it is not a tar archive ({e})")))?;
        Ok(Self::Archive { file, members })
    }

    /// Opens the image's file `name`, and tells its size; none if it is not there.
    pub(super) fn file(&self, name: &Path) -> Result<Option<(Section, u64)>, Error> {
        match self {
            Self::Directory(dir) => {
                let how = OpenHow::new()
                    .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
                    .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
                let file = match nix::fcntl::openat2(dir.as_raw_fd(), name, how) {
                    Ok(fd) => File::from(owned(fd)),
                    Err(nix::errno::Errno::ENOENT) => return Ok(None),
                    Err(e) => return Err(Error::io("open", name)(e.into())),
                };
                let metadata = file.metadata().map_err(Error::io("read", name))?;
                if !metadata.is_file() {
                    return Err(Error::Invalid {
                        name: name.display().to_string(),
                        what: "is not a file".into(),
                    });
                }
                Ok(Some((
                    Section {
                        file,
                        offset: 0,
                        left: metadata.len(),
                    },
                    metadata.len(),
                )))
            }
            Self::Archive { file, members } => {
                let mut name = name.to_owned();
                for _ in 0..MAX_LINKS {
                    match members.get(&name) {
                        None => return Ok(None),
                        Some(Member::File { offset, size }) => {
                            let file = file.try_clone().map_err(Error::io("open", &name))?;
                            return Ok(Some((
                                Section {
                                    file,
                                    offset: *offset,
                                    left: *size,
                                },
                                *size,
                            )));
                        }
                        Some(Member::Link(target)) => {
                            let Some(target) =
                                normal(&name.parent().unwrap_or(Path::new("")).join(target))
                            else {
                                return Ok(None);
                            };
                            name = target;
                        }
                    }
                }
                Ok(None)
            }
        }
    }

    /// Reads the whole of a small file.
    pub(super) fn document(&self, name: &Path, limit: u64) -> Result<Option<Vec<u8>>, Error> {
        let Some((file, size)) = self.file(name)? else {
            return Ok(None);
        };
        if size > limit {
            let what = format!("has {size} bytes, more than such a document can have");
            return Err(Error::Invalid {
                name: name.display().to_string(),
                what,
            });
        }
        let mut content = Vec::new();
        file.take(limit)
            .read_to_end(&mut content)
            .map_err(Error::io("read", name))?;
        Ok(Some(content))
    }
}

/// Notes where each member of the archive lies.
fn index(file: &File) -> io::Result<HashMap<PathBuf, Member>> {
    let mut members = HashMap::new();
    let (reader, allowance) = Budget::new(file);
    allowance.metadata();
    let mut archive = tar::Archive::new(reader);
    // With `Seek` the content of a member is passed over, not read; what is left are names and attributes.
    for entry in archive.entries_with_seek()? {
        allowance.metadata();
        let entry = entry?;
        if members.len() >= MAX_MEMBERS {
            return Err(io::Error::other("it has too many members"));
        }
        let Some(name) = normal(&entry.path()?) else {
            continue;
        };
        let member = match entry.header().entry_type() {
            tar::EntryType::Regular | tar::EntryType::Continuous => Member::File {
                offset: entry.raw_file_position(),
                size: entry.size(),
            },
            tar::EntryType::Symlink | tar::EntryType::Link => match entry.link_name()? {
                Some(target) if entry.header().entry_type() == tar::EntryType::Symlink => {
                    Member::Link(target.into_owned())
                }
                // A hard link's target is counted from the archive's root.
                Some(target) => Member::Link(Path::new("/").join(target)),
                None => continue,
            },
            _ => continue,
        };
        members.insert(name, member);
    }
    Ok(members)
}

/// The path without `.` and `..`, counted from the archive's root; none if it leaves that.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir if !normal.pop() => return None,
            Component::RootDir => normal.clear(),
            _ => {}
        }
    }
    Some(normal)
}
