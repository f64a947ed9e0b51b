//! Applying one layer's archive to the root file system (OCI image specification, layer.md).

use std::collections::HashSet;
use std::ffi::{CString, OsStr, OsString};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use nix::sys::stat::SFlag;
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use tar::EntryType;

use super::Error;
use super::budget::Budget;
use super::digest::Verified;
use super::layout::Layer;
use super::root::{self, Directory, Kind, Metadata, Root};
use super::source::Source;

/// A name that begins so hides another one of the layers below.
const WHITEOUT: &[u8] = b".wh.";
/// The name that hides all that the layers below have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names that begin so are of no meaning outside of the storage driver that made them.
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// PAX records of this prefix are extended attributes.
const XATTR: &[u8] = b"SCHILY.xattr.";
/// Whiteouts go no deeper.
const MAX_DEPTH: usize = 2048;
const COPY_BUFFER: usize = 128 << 10;

/// What all layers together may still take, and what they left out.
pub(super) struct Limits {
    /// Bytes of content.
    pub bytes: u64,
    /// Bytes allowed at first, for the message.
    pub bytes_allowed: u64,
    /// Entries.
    pub entries: u64,
    /// Attributes that were not set.
    pub skipped_xattrs: u64,
}

/// Unpacks `layer`, the `number`th, onto `root`, and checks that it was what its digests say.
pub(super) fn apply(
    source: &Source,
    layer: &Layer,
    number: usize,
    root: &Root,
    limits: &mut Limits,
) -> Result<(), Error> {
    let name = || layer.name.display().to_string();
    let (blob, _) = source
        .file(&layer.name)?
        .ok_or_else(|| Error::Missing { name: name() })?;
    let read_error = |source| Error::Layer {
        layer: number,
        source,
    };

    let mut blob = Verified::new(blob, layer.blob.clone());
    {
        let decompressed =
            decompress(BufReader::with_capacity(COPY_BUFFER, &mut blob)).map_err(read_error)?;
        let (mut archive, allowance) =
            Budget::new(Verified::new(decompressed, Some(layer.diff_id.clone())));
        allowance.metadata();
        let mut unpacking = Unpacking {
            root,
            number,
            limits,
            made: HashSet::new(),
            directory_times: Vec::new(),
            buffer: vec![0; COPY_BUFFER],
        };
        let mut tar = tar::Archive::new(&mut archive);
        let mut entries = tar.entries().map_err(read_error)?;
        loop {
            allowance.metadata();
            let Some(entry) = entries.next() else { break };
            let mut entry = entry.map_err(read_error)?;
            allowance.content();
            unpacking.entry(&mut entry)?;
            // What of the content was not used must not count as the next entry's names.
            unpacking.drain(&mut entry)?;
        }
        allowance.content();
        unpacking.drain(&mut archive)?;
        unpacking.finish()?;
        archive.into_inner().verify()?;
    }
    // A compressor may leave padding that the decompressor has no need of.
    io::copy(&mut blob, &mut io::sink()).map_err(read_error)?;
    blob.verify()
}

/// Undoes the compression that the content itself shows: media types are often wrong.
fn decompress<'a>(mut blob: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match blob.fill_buf()? {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(blob)),
        // A frame, or one to be skipped, with which some builders begin.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            Box::new(Zstd::new(blob))
        }
        [b'B', b'Z', b'h', ..] | [0xfd, b'7', b'z', b'X', b'Z', ..] => {
            let text = "it is compressed with bzip2 or xz, which images do not use; gzip and zstd are read";
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        _ => Box::new(blob),
    })
}

/// Zstandard frames, one behind the other, as parallel compressors and lazy-pulling formats write them.
struct Zstd<R> {
    source: R,
    decoder: FrameDecoder,
    in_frame: bool,
}

impl<R: BufRead> Zstd<R> {
    fn new(source: R) -> Self {
        Self {
            source,
            decoder: FrameDecoder::new(),
            in_frame: false,
        }
    }

    /// Begins the next frame; false at the end of the source.
    fn next_frame(&mut self) -> io::Result<bool> {
        use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.reset(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    if io::copy(&mut self.source.by_ref().take(length), &mut io::sink())? != length
                    {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(e) => return Err(io::Error::new(io::ErrorKind::InvalidData, e)),
            }
        }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            if self.in_frame {
                if self.decoder.can_collect() > 0 {
                    return self.decoder.read(buf);
                }
                if self.decoder.is_finished() {
                    self.in_frame = false;
                    continue;
                }
                let strategy = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder
                    .decode_blocks(&mut self.source, strategy)
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            } else if self.next_frame()? {
                self.in_frame = true;
            } else {
                return Ok(0);
            }
        }
    }
}

/// The state of unpacking one layer.
struct Unpacking<'a> {
    root: &'a Root,
    number: usize,
    limits: &'a mut Limits,
    /// What this layer made, as directory and name: whiteouts spare it, since they speak of the layers below.
    made: HashSet<(u64, u64, OsString)>,
    /// Set at the end, since making a file changes its directory's time.
    directory_times: Vec<(PathBuf, i64)>,
    buffer: Vec<u8>,
}

/// An entry's path, for messages.
struct Named<'a> {
    layer: usize,
    path: &'a [u8],
}

impl Named<'_> {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.path[..self.path.len().min(256)]).into_owned()
    }

    fn refused(&self, what: impl Into<String>) -> Error {
        Error::Entry {
            layer: self.layer,
            entry: self.text(),
            what: what.into(),
        }
    }

    fn io(&self, action: &'static str) -> impl FnOnce(io::Error) -> Error {
        let (layer, entry) = (self.layer, self.text());
        move |source| Error::EntryIo {
            layer,
            entry,
            action,
            source,
        }
    }
}

impl Unpacking<'_> {
    fn entry(&mut self, entry: &mut tar::Entry<'_, impl Read>) -> Result<(), Error> {
        let bytes = entry.path_bytes().into_owned();
        let named = Named {
            layer: self.number,
            path: &bytes,
        };
        let Some(left) = self.limits.entries.checked_sub(1) else {
            return Err(named.refused("is one entry too many; no image has so many files"));
        };
        self.limits.entries = left;

        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::XGlobalHeader) {
            return Ok(());
        }
        let path = inside(&bytes).map_err(|what| named.refused(what))?;
        let metadata = metadata(entry, self.limits).map_err(|what| named.refused(what))?;
        let Some(name) = path.file_name() else {
            return self.root_directory(kind, &metadata, &named);
        };
        let parent_path = path.parent().unwrap_or(Path::new(""));
        if name.as_bytes().starts_with(WHITEOUT) {
            return self.whiteout(parent_path, name, &named);
        }

        let parent = self
            .root
            .make_directories(parent_path)
            .map_err(named.io("make the parent directory"))?;
        let existing = parent
            .kind(name)
            .map_err(named.io("look at what is there"))?;
        if kind == EntryType::Directory && existing == Some(Kind::Directory) {
            let directory = parent.child(name).map_err(named.io("open the directory"))?;
            self.note(&parent, name, &named)?;
            return self.directory(&directory, &path, &metadata, &named);
        }
        if kind != EntryType::Link && existing.is_some() {
            parent
                .remove(name)
                .map_err(named.io("replace what is there"))?;
        }
        self.note(&parent, name, &named)?;
        match kind {
            EntryType::Directory => {
                let directory = parent
                    .make_directory(name)
                    .map_err(named.io("make the directory"))?;
                self.directory(&directory, &path, &metadata, &named)
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let mut file = parent.make_file(name).map_err(named.io("make the file"))?;
                self.content(entry, &mut file, &named)?;
                root::apply_to_file(&file, &metadata, &mut self.limits.skipped_xattrs)
                    .map_err(named.io("set owner, permissions, attributes and time"))
            }
            EntryType::Symlink => {
                let target = link_target(entry, &named)?;
                parent
                    .make_symlink(name, &target)
                    .map_err(named.io("make the symbolic link"))?;
                self.node(&parent, name, &metadata, true, &named)
            }
            EntryType::Link => self.hard_link(&parent, name, &link_target(entry, &named)?, &named),
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                let device = if kind == EntryType::Fifo {
                    (0, 0)
                } else {
                    device(entry.header(), &named)?
                };
                let kind = match kind {
                    EntryType::Char => SFlag::S_IFCHR,
                    EntryType::Block => SFlag::S_IFBLK,
                    _ => SFlag::S_IFIFO,
                };
                parent
                    .make_node(name, kind, device)
                    .map_err(named.io("make the device or pipe"))?;
                self.node(&parent, name, &metadata, false, &named)
            }
            other => Err(named.refused(format!(
                "has type {:?}, which a layer cannot hold",
                char::from(other.as_byte())
            ))),
        }
    }

    fn root_directory(
        &mut self,
        kind: EntryType,
        metadata: &Metadata,
        named: &Named<'_>,
    ) -> Result<(), Error> {
        if kind != EntryType::Directory {
            return Err(named.refused("names the root, but is not a directory"));
        }
        let directory = self
            .root
            .directory(Path::new(""))
            .map_err(named.io("open the directory"))?;
        self.directory(&directory, Path::new(""), metadata, named)
    }

    fn directory(
        &mut self,
        directory: &Directory,
        path: &Path,
        metadata: &Metadata,
        named: &Named<'_>,
    ) -> Result<(), Error> {
        directory
            .apply(metadata, &mut self.limits.skipped_xattrs)
            .map_err(named.io("set owner, permissions and attributes"))?;
        self.directory_times.push((path.to_owned(), metadata.mtime));
        Ok(())
    }

    fn node(
        &mut self,
        parent: &Directory,
        name: &OsStr,
        metadata: &Metadata,
        is_link: bool,
        named: &Named<'_>,
    ) -> Result<(), Error> {
        parent
            .apply_to(name, metadata, is_link, &mut self.limits.skipped_xattrs)
            .map_err(named.io("set owner, permissions, attributes and time"))
    }

    fn hard_link(
        &mut self,
        parent: &Directory,
        name: &OsStr,
        target: &OsStr,
        named: &Named<'_>,
    ) -> Result<(), Error> {
        let target = inside(target.as_bytes())
            .map_err(|what| named.refused(format!("links to what {what}")))?;
        let Some(target_name) = target.file_name() else {
            return Err(named.refused("links to the root"));
        };
        let target_parent = target.parent().unwrap_or(Path::new(""));
        let target_parent = self
            .root
            .directory(target_parent)
            .map_err(named.io("open the link's target"))?;
        let same_place = target_parent
            .identity()
            .map_err(named.io("look at the link's target"))?
            == parent
                .identity()
                .map_err(named.io("look at the parent directory"))?;
        if same_place && target_name == name {
            return Err(named.refused("links to itself"));
        }
        match target_parent
            .kind(target_name)
            .map_err(named.io("look at the link's target"))?
        {
            Some(Kind::Other) => {}
            Some(Kind::Directory) => return Err(named.refused("is a hard link to a directory")),
            None => return Err(named.refused("is a hard link to what is not there")),
        }
        parent
            .remove(name)
            .map_err(named.io("replace what is there"))?;
        parent
            .make_hard_link(name, &target_parent, target_name)
            .map_err(named.io("make the hard link"))
    }

    fn content(
        &mut self,
        entry: &mut impl Read,
        file: &mut impl io::Write,
        named: &Named<'_>,
    ) -> Result<(), Error> {
        loop {
            let len = match entry.read(&mut self.buffer) {
                Ok(0) => return Ok(()),
                Ok(len) => len,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    return Err(Error::Layer {
                        layer: self.number,
                        source,
                    });
                }
            };
            self.charge(len as u64)?;
            file.write_all(&self.buffer[..len])
                .map_err(named.io("write the file"))?;
        }
    }

    /// Reads the rest of `reader`, which nobody needs but the digest.
    fn drain(&mut self, reader: &mut impl Read) -> Result<(), Error> {
        loop {
            match reader.read(&mut self.buffer) {
                Ok(0) => return Ok(()),
                Ok(len) => self.charge(len as u64)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(Error::Layer {
                        layer: self.number,
                        source,
                    });
                }
            }
        }
    }

    fn charge(&mut self, bytes: u64) -> Result<(), Error> {
        self.limits.bytes =
            self.limits
                .bytes
                .checked_sub(bytes)
                .ok_or_else(|| Error::TooLarge {
                    layer: self.number,
                    limit: format!("{} MiB", self.limits.bytes_allowed >> 20),
                })?;
        Ok(())
    }

    fn note(&mut self, parent: &Directory, name: &OsStr, named: &Named<'_>) -> Result<(), Error> {
        let (device, inode) = parent
            .identity()
            .map_err(named.io("look at the parent directory"))?;
        self.made.insert((device, inode, name.to_owned()));
        Ok(())
    }

    fn whiteout(&mut self, parent: &Path, name: &OsStr, named: &Named<'_>) -> Result<(), Error> {
        let opaque = name.as_bytes() == OPAQUE;
        if !opaque && name.as_bytes().starts_with(WHITEOUT_META) {
            return Ok(());
        }
        let hidden = OsStr::from_bytes(&name.as_bytes()[WHITEOUT.len()..]);
        if !opaque && (hidden.is_empty() || hidden == "." || hidden == "..") {
            return Err(named.refused("hides no name"));
        }
        let parent = match self.root.directory(parent) {
            Ok(parent) => parent,
            // Nothing is there to hide.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(());
            }
            Err(e) => return Err(named.io("open the parent directory")(e)),
        };
        let result = if opaque {
            self.hide_all(&parent, MAX_DEPTH)
        } else {
            self.hide(&parent, hidden, MAX_DEPTH)
        };
        result.map_err(named.io("remove what it hides"))
    }

    /// Removes from `parent` all that lower layers put there.
    fn hide_all(&self, parent: &Directory, depth: usize) -> io::Result<()> {
        for name in parent.names()? {
            self.hide(parent, &name, depth)?;
        }
        Ok(())
    }

    /// Removes `name` as far as lower layers put it there.
    fn hide(&self, parent: &Directory, name: &OsStr, depth: usize) -> io::Result<()> {
        let depth = depth
            .checked_sub(1)
            .ok_or(nix::errno::Errno::ENAMETOOLONG)?;
        let Some(kind) = parent.kind(name)? else {
            return Ok(());
        };
        let (device, inode) = parent.identity()?;
        let ours = self.made.contains(&(device, inode, name.to_owned()));
        match kind {
            Kind::Directory => {
                self.hide_all(&parent.child(name)?, depth)?;
                match parent.remove_empty(name) {
                    // It holds something of this layer, and so stays.
                    Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
                    _ if ours => Ok(()),
                    result => result,
                }
            }
            Kind::Other if ours => Ok(()),
            Kind::Other => parent.unlink(name),
        }
    }

    /// Sets the directories' times, deepest last entry first; one that has gone since is passed over.
    fn finish(&mut self) -> Result<(), Error> {
        for (path, mtime) in std::mem::take(&mut self.directory_times).into_iter().rev() {
            let directory = match self.root.directory(&path) {
                Ok(directory) => directory,
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                    ) =>
                {
                    continue;
                }
                Err(e) => {
                    let named = Named {
                        layer: self.number,
                        path: path.as_os_str().as_bytes(),
                    };
                    return Err(named.io("open the directory")(e));
                }
            };
            let named = Named {
                layer: self.number,
                path: path.as_os_str().as_bytes(),
            };
            directory
                .set_mtime(mtime)
                .map_err(named.io("set the directory's time"))?;
        }
        Ok(())
    }
}

/// The path below the root: no leading slash, no `.`; `..` is refused, no honest builder writes it.
fn inside(path: &[u8]) -> Result<PathBuf, &'static str> {
    if path.contains(&0) {
        return Err("has a zero byte in its name");
    }
    let mut inside = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(path)).components() {
        match component {
            Component::Normal(name) => inside.push(name),
            Component::ParentDir => return Err("has '..' in its path"),
            _ => {}
        }
    }
    Ok(inside)
}

fn link_target(entry: &tar::Entry<'_, impl Read>, named: &Named<'_>) -> Result<OsString, Error> {
    match entry.link_name_bytes() {
        Some(target) if !target.is_empty() && !target.contains(&0) => {
            Ok(OsString::from_vec(target.into_owned()))
        }
        _ => Err(named.refused("is a link without a target")),
    }
}

fn device(header: &tar::Header, named: &Named<'_>) -> Result<(u32, u32), Error> {
    let number = |value: io::Result<Option<u32>>| value.ok().flatten();
    match (number(header.device_major()), number(header.device_minor())) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => Err(named.refused("is a device without a number")),
    }
}

fn metadata(
    entry: &mut tar::Entry<'_, impl Read>,
    limits: &mut Limits,
) -> Result<Metadata, &'static str> {
    let header = entry.header();
    // The largest number means "unchanged" to chown(2).
    let id = |value: io::Result<u64>| {
        value
            .ok()
            .and_then(|id| u32::try_from(id).ok())
            .filter(|&id| id != u32::MAX)
    };
    let uid = id(header.uid()).ok_or("has an owner that cannot be")?;
    let gid = id(header.gid()).ok_or("has a group that cannot be")?;
    let permissions = header
        .mode()
        .map_err(|_| "has permissions that cannot be read")?
        & 0o7777;
    let mut mtime = header
        .mtime()
        .ok()
        .and_then(|mtime| i64::try_from(mtime).ok())
        .unwrap_or(0);
    let mut xattrs = Vec::new();
    let extensions = entry
        .pax_extensions()
        .map_err(|_| "has attributes that cannot be read")?;
    for extension in extensions.into_iter().flatten() {
        let extension = extension.map_err(|_| "has attributes that cannot be read")?;
        let (key, value) = (extension.key_bytes(), extension.value_bytes());
        if key == b"mtime" {
            let seconds = value
                .split(|&b| b == b'.')
                .next()
                .and_then(|text| std::str::from_utf8(text).ok());
            mtime = seconds
                .and_then(|text| text.parse().ok())
                .ok_or("has a time that cannot be read")?;
        } else if let Some(name) = key.strip_prefix(XATTR) {
            if is_portable(name) {
                let name = CString::new(name)
                    .map_err(|_| "has an attribute with a zero byte in its name")?;
                xattrs.push((name, value.to_owned()));
            } else {
                limits.skipped_xattrs += 1;
            }
        }
    }
    Ok(Metadata {
        uid,
        gid,
        permissions,
        mtime,
        xattrs,
    })
}

/// Attributes that mean the same on every host. Labels are the host's policy to give, and those of overlayfs would
/// change what a mount over the root file system shows.
fn is_portable(name: &[u8]) -> bool {
    match name.strip_prefix(b"user.") {
        Some(rest) => !rest.is_empty() && !rest.starts_with(b"overlay."),
        None => matches!(
            name,
            b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default"
        ),
    }
}
