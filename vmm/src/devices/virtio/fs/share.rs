//! A directory of the host as the guest may see it: the policy in front of the pass-through.
//!
//! Names and flags are the guest's. A name is one component of a path and never `.` or `..`; a
//! symbolic link is a text that only the guest resolves; nothing but regular files and directories
//! is ever opened. What the guest's own kernel decides (permissions, locks) is left to it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString};
use std::fmt;
use std::fs::{File, OpenOptions as FileOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FsOptions, OpenOptions, ROOT_ID, SetattrValid, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader,
    ZeroCopyWriter,
};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use thiserror::Error;

use super::held::{HeldError, HeldFile, HeldNode, HeldTree, Numbers, path_of};
use super::numbering::Numbering;
use super::{credentials, handles};
use crate::devices::virtio::worker::STACK_SIZE;

/// For how long the guest may believe what it knows of a share that only it changes.
const PRIVATE_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
/// For how long it may believe what it knows of a directory of another share, so that not each name on the way to a file
/// is asked for twice: until the tick of its clock that follows the next one, which with our kernel is 20 ms at most.
const DIRECTORY_TIMEOUT: Duration = Duration::from_millis(1);
/// The longest extended attribute, and list of them, that Linux has.
const MAX_XATTR: u32 = 64 << 10;
/// The lists of permissions that a guest's kernel obeys.
const ACCESS_LISTS: [&CStr; 2] = [c"system.posix_acl_access", c"system.posix_acl_default"];
/// Where a reader of a directory goes on behind its `.` and its `..`, which the server leaves out. No file system has
/// such places: the highest is the end of those of ext4, the others of which are far below.
const BEHIND_SELF: u64 = i64::MAX as u64 - 2;
const BEHIND_PARENT: u64 = i64::MAX as u64 - 1;
/// The bytes of a directory that the server reads at least at a time: room for its `.`, its `..` and the longest name.
const SMALLEST_LISTING: u32 = 4096;
/// The most directories below the root of a share that may be mounts of their own.
const MAX_MOUNTS: usize = 1024;

/// How the guest may cache a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Only this guest changes the share: it may keep names, attributes and data.
    Always,
    /// The host may change the share as well: the guest asks for names and attributes each time,
    /// and drops data when the attributes say that the file has changed. Mapped files work.
    None,
}

/// Whether the guest may change a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It may.
    ReadWrite,
    /// Each attempt fails with EROFS, whatever the guest mounts it as.
    ReadOnly,
}

/// A directory to be shared.
#[derive(Debug, Clone)]
pub struct Share {
    /// The directory. Mounts below it are part of the share.
    pub root: PathBuf,
    /// How the guest may cache it.
    pub cache: Cache,
    /// Whether the guest may change it.
    pub access: Access,
}

/// Why a directory cannot be shared.
#[derive(Debug, Error)]
pub enum ShareError {
    /// The directory cannot be opened.
    #[error("opening the directory {} to share it with the guest", path.display())]
    Open {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The server cannot work on the directory.
    #[error("sharing {} with the guest (it needs /proc, and CAP_SETPCAP where it is root)", path.display())]
    Serve {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A server, and the numbers of the files that it keeps.
type Served = (PassthroughFs<()>, BTreeSet<u64>);

/// An opened [`Share`].
pub(super) struct SharedTree {
    inner: PassthroughFs<()>,
    cache: Cache,
    access: Access,
    /// `inner` goes by the path of this descriptor.
    root: File,
    /// Files that are never forgotten (see [`pin_mounts`]).
    pinned: RwLock<BTreeSet<u64>>,
    /// The files that the guest knows, by their numbers.
    known: Mutex<BTreeMap<u64, Known>>,
    /// The files and directories that it has open.
    open: Mutex<BTreeMap<u64, OpenFile>>,
    /// What the driver can do, once it has said so.
    options: OnceLock<FsOptions>,
    /// The guest's numbers, where it knew the share before this server was there. All others here are the server's.
    numbers: OnceLock<Numbers>,
    /// The inode numbers that the guest sees.
    numbering: Numbering,
}

/// A file that the guest knows.
#[derive(Debug, Clone)]
struct Known {
    /// Where it was last seen.
    parent: u64,
    name: CString,
    /// How often the guest was told of it and has not forgotten it.
    lookups: u64,
    /// How often the server counts it.
    references: u64,
}

/// A file that the guest has open.
#[derive(Debug, Clone, Copy)]
struct OpenFile {
    inode: u64,
    flags: u32,
    is_directory: bool,
}

impl fmt::Debug for SharedTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedTree")
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

impl SharedTree {
    /// Opens the directory of `share`.
    pub(super) fn open(share: Share) -> Result<Self, ShareError> {
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        let root = FileOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(&share.root);
        let root = root.map_err(|source| ShareError::Open {
            path: share.root.clone(),
            source,
        })?;
        let path = share.root.clone();
        // The server changes the umask of the thread that makes it: of none that lives on.
        let opened = thread::scope(|scope| {
            let maker = thread::Builder::new().stack_size(STACK_SIZE);
            let maker = maker.spawn_scoped(scope, || {
                credentials::prepare_thread()?;
                Self::serve(&root, &share)
            })?;
            maker
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the server panicked")))
        });
        let (inner, pinned) = opened.map_err(|source| ShareError::Serve { path, source })?;
        let own = root.metadata().map_err(|source| ShareError::Open {
            path: share.root.clone(),
            source,
        })?;
        Ok(Self {
            inner,
            cache: share.cache,
            access: share.access,
            root,
            pinned: RwLock::new(pinned),
            known: Mutex::default(),
            open: Mutex::default(),
            options: OnceLock::new(),
            numbers: OnceLock::new(),
            numbering: Numbering::new(own.dev()),
        })
    }

    fn serve(root: &File, share: &Share) -> io::Result<Served> {
        // With handles a known file costs no descriptor; not every file system has them, or such
        // that last, and opening one needs CAP_DAC_READ_SEARCH.
        let refused = match handles::unreliable(root) {
            Ok(None) => match Self::serve_with(root, share, true) {
                Ok(served) => return Ok(served),
                Err(error) => error.to_string(),
            },
            Ok(Some(kind)) => format!("those of {kind} may not last"),
            Err(error) => error.to_string(),
        };
        tracing::info!(
            refused,
            path = %share.root.display(),
            "no file handles: each file that the guest knows keeps a descriptor open"
        );
        Self::serve_with(root, share, false)
    }

    fn serve_with(root: &File, share: &Share, handles: bool) -> io::Result<Served> {
        let (cache_policy, timeout, directory_timeout) = match share.cache {
            Cache::Always => (CachePolicy::Always, PRIVATE_TIMEOUT, PRIVATE_TIMEOUT),
            // "Never" would forbid shared mappings. With "auto", no timeouts and AUTO_INVAL_DATA
            // the guest revalidates on each open and each read instead.
            Cache::None => (CachePolicy::Auto, Duration::ZERO, DIRECTORY_TIMEOUT),
        };
        let inner = PassthroughFs::new(Config {
            root_dir: format!("/proc/self/fd/{}/.", root.as_raw_fd()),
            // The root is there from the start; names are checked here.
            do_import: false,
            cache_policy,
            attr_timeout: timeout,
            entry_timeout: timeout,
            dir_attr_timeout: Some(directory_timeout),
            dir_entry_timeout: Some(directory_timeout),
            inode_file_handles: handles,
            xattr: true,
            killpriv_v2: true,
            writeback: false,
            // A handle does not keep a file that has been unlinked: only an open descriptor
            // does. And without opendir a directory has no place to read on from.
            no_open: false,
            no_opendir: false,
            // Numbers are used again while the guest still knows the old file by them. The price:
            // the server keeps a note of some 200 bytes of each file the guest ever knew.
            use_host_ino: false,
            allow_direct_io: false,
            ..Config::default()
        })?;
        inner.import()?;
        inner.getattr(&Context::default(), ROOT_ID, None)?;
        let pinned = pin_mounts(&inner, root)?;
        Ok((inner, pinned))
    }

    /// Forgets all that the guest knows. The server's own way to do so lets go of the mounts, too, each of which then
    /// costs another descriptor for good: as often as a guest likes.
    pub(super) fn clear(&self) {
        for (handle, file) in std::mem::take(&mut *self.open_files()) {
            // One that the guest closes meanwhile.
            let _ = self
                .inner
                .releasedir(&Context::default(), file.inode, 0, handle);
        }
        let pinned = match pin_mounts(&self.inner, &self.root) {
            Ok(pinned) => pinned,
            Err(error) => {
                tracing::error!(%error, "sharing a directory again");
                return;
            }
        };
        let known = std::mem::take(&mut *self.known());
        let mut forgotten: BTreeSet<u64> = known.into_keys().collect();
        let mut before = self.pinned.write().unwrap_or_else(PoisonError::into_inner);
        forgotten.append(&mut before);
        let forgotten = forgotten.difference(&pinned);
        let forgotten = forgotten.map(|&inode| (inode, u64::MAX)).collect();
        self.inner.batch_forget(&Context::default(), forgotten);
        *before = pinned;
    }

    /// What the guest knows, while no request is served. It is found by name, since that is what outlives the server;
    /// what is not found and not open is left out: the guest then looks for it again.
    pub(super) fn held(&self) -> Result<HeldTree, HeldError> {
        let known = self.known().clone();
        let mut tree = HeldTree {
            options: self.options.get().map(|options| options.bits()),
            ..HeldTree::default()
        };
        let mut found = BTreeMap::from([(ROOT_ID, true)]);
        for &inode in known.keys() {
            // Upwards to what is settled, then down again: a guest may have made a path of any depth.
            let mut chain = Vec::new();
            let mut at = inode;
            while !found.contains_key(&at) {
                // For what leads to itself.
                found.insert(at, false);
                chain.push(at);
                at = known.get(&at).map_or(at, |known| known.parent);
            }
            for &inode in chain.iter().rev() {
                if let Some(known) = known.get(&inode)
                    && found.get(&known.parent) == Some(&true)
                    && let Some(kind) = self.kind_at(known, inode)
                {
                    tree.nodes.push(HeldNode {
                        number: self.node_for_guest(inode),
                        parent: self.node_for_guest(known.parent),
                        name: known.name.as_bytes().to_vec(),
                        kind,
                        lookups: known.lookups,
                    });
                    found.insert(inode, true);
                }
            }
        }
        for (&handle, file) in self.open_files().iter() {
            let path = || {
                path_of(file.inode, |inode| {
                    let known = known.get(&inode)?;
                    Some((known.parent, known.name.as_bytes().to_vec()))
                })
            };
            if found.get(&file.inode) != Some(&true) {
                return Err(HeldError::Unnamed { path: path() });
            }
            let look = |source| HeldError::Look {
                path: path(),
                source,
            };
            let attributes = self.inner.getattr(&Context::default(), file.inode, None);
            let (attributes, _) = attributes.map_err(look)?;
            tree.open.push(HeldFile {
                number: self.file_for_guest(handle),
                node: self.node_for_guest(file.inode),
                flags: file.flags,
                is_directory: file.is_directory,
                inode: attributes.st_ino,
                length: length_of(&attributes),
            });
        }
        Ok(tree)
    }

    /// The type of what is where a file was last seen, if that is still the file.
    fn kind_at(&self, known: &Known, inode: u64) -> Option<u32> {
        let context = Context::default();
        let entry = self
            .inner
            .lookup(&context, known.parent, &known.name)
            .ok()?;
        self.inner.forget(&context, entry.inode, 1);
        (entry.inode == inode).then_some(entry.attr.st_mode & libc::S_IFMT)
    }

    /// Goes on in the place of a server of the same directory. Before the first request.
    pub(super) fn take_over(&self, held: &HeldTree) -> Result<(), HeldError> {
        held.check()?;
        let context = Context::default();
        if let Some(options) = held.options {
            let init = self.init(FsOptions::from_bits_truncate(options));
            init.map_err(|_| HeldError::Contradiction)?;
        }
        let mut nodes = BTreeMap::from([(ROOT_ID, ROOT_ID)]);
        for node in &held.nodes {
            let name = CString::new(node.name.as_slice());
            let name = name.ok().filter(|name| check_name(name).is_ok());
            let name = name.ok_or(HeldError::Contradiction)?;
            // What is in a directory that has gone is gone as well.
            let Some(&parent) = nodes.get(&node.parent) else {
                continue;
            };
            let Ok(entry) = self.inner.lookup(&context, parent, &name) else {
                continue;
            };
            if entry.attr.st_mode & libc::S_IFMT != node.kind || node.number == ROOT_ID {
                self.inner.forget(&context, entry.inode, 1);
                continue;
            }
            nodes.insert(node.number, entry.inode);
            let mut known = self.known();
            let known = known.entry(entry.inode).or_insert_with(|| Known {
                parent,
                name,
                lookups: 0,
                references: 0,
            });
            known.lookups = known.lookups.saturating_add(node.lookups);
            known.references += 1;
        }
        let mut files = BTreeMap::new();
        for file in &held.open {
            let path = || held.path(file.node);
            let Some(&inode) = nodes.get(&file.node) else {
                return Err(HeldError::Gone { path: path() });
            };
            files.insert(file.number, self.open_again(file, inode, path)?);
        }
        self.numbers
            .set(Numbers::new(nodes, files, held))
            .map_err(|_| HeldError::Contradiction)
    }

    /// Opens a file that the guest has open; the number of the open file.
    fn open_again(
        &self,
        file: &HeldFile,
        inode: u64,
        path: impl Fn() -> PathBuf,
    ) -> Result<u64, HeldError> {
        let context = Context::default();
        let failed = |source| HeldError::Open {
            path: path(),
            source,
        };
        let attributes = self.inner.getattr(&context, inode, None);
        let (attributes, _) = attributes.map_err(failed)?;
        let is_directory = attributes.st_mode & libc::S_IFMT == libc::S_IFDIR;
        let is_it = is_directory || attributes.st_ino == file.inode;
        if is_directory != file.is_directory || !is_it || length_of(&attributes) != file.length {
            return Err(HeldError::Changed { path: path() });
        }
        let flags = file_flags(file.flags) & !(libc::O_TRUNC as u32);
        let opened = match is_directory {
            true => self.inner.opendir(&context, inode, libc::O_RDONLY as u32),
            false if wants_to_write(flags) && self.access == Access::ReadOnly => {
                Err(io::Error::from_raw_os_error(libc::EROFS))
            }
            false => {
                let opened = self.inner.open(&context, inode, flags, 0);
                opened.map(|(handle, options, _)| (handle, options))
            }
        };
        let (handle, _) = opened.map_err(failed)?;
        self.opened(inode, flags, is_directory, handle);
        // There is none without opening only, and this server opens.
        handle.ok_or(HeldError::Contradiction)
    }

    fn open_files(&self) -> MutexGuard<'_, BTreeMap<u64, OpenFile>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened(&self, inode: u64, flags: u32, is_directory: bool, handle: Option<u64>) {
        if let Some(handle) = handle {
            let file = OpenFile {
                inode,
                flags: flags & !((libc::O_TRUNC | libc::O_EXCL) as u32),
                is_directory,
            };
            self.open_files().insert(handle, file);
        }
    }

    /// The server's number of a file.
    fn node(&self, number: u64) -> io::Result<u64> {
        match self.numbers.get() {
            None => Ok(number),
            // The guest's kernel looks for it again, by its name.
            Some(numbers) => numbers
                .node(number)
                .ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE)),
        }
    }

    fn node_for_guest(&self, own: u64) -> u64 {
        let numbers = self.numbers.get();
        numbers.map_or(own, |numbers| numbers.node_for_guest(own))
    }

    /// The server's number of an open file.
    fn file(&self, number: u64) -> io::Result<u64> {
        match self.numbers.get() {
            None => Ok(number),
            Some(numbers) => numbers
                .file(number)
                .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    fn file_for_guest(&self, own: u64) -> u64 {
        let numbers = self.numbers.get();
        numbers.map_or(own, |numbers| numbers.file_for_guest(own))
    }

    /// The guest forgets a file as often as it says: by more than it was told of it, too. The server does when nothing
    /// is left; the number of references to give up then.
    fn forgets(&self, inode: u64, count: u64) -> Option<(u64, u64)> {
        let mut all = self.known();
        let known = all.get_mut(&inode)?;
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups > 0 {
            return None;
        }
        let references = known.references;
        all.remove(&inode);
        let pinned = self.pinned.read().unwrap_or_else(PoisonError::into_inner);
        (!pinned.contains(&inode)).then_some((inode, references))
    }

    /// Notes a file that the guest is told of, and gives it the number that the guest knows.
    fn told(&self, parent: u64, name: &CStr, mut entry: Entry) -> Entry {
        let mut all = self.known();
        let known = all.entry(entry.inode).or_insert_with(|| Known {
            parent,
            name: name.to_owned(),
            lookups: 0,
            references: 0,
        });
        known.lookups = known.lookups.saturating_add(1);
        known.references = known.references.saturating_add(1);
        if known.parent != parent || known.name.as_c_str() != name {
            (known.parent, known.name) = (parent, name.to_owned());
        }
        entry.inode = self.node_for_guest(entry.inode);
        self.numbering.apply(&mut entry.attr);
        entry
    }

    /// Takes back that the guest was told of a file, as the server has.
    fn untold(&self, inode: u64) {
        let mut all = self.known();
        if let Some(known) = all.get_mut(&inode) {
            known.lookups = known.lookups.saturating_sub(1);
            known.references = known.references.saturating_sub(1);
            if known.lookups == 0 {
                all.remove(&inode);
            }
        }
    }

    /// Notes where a file is now that the guest has moved there.
    fn moved(&self, parent: u64, name: &CStr) {
        let context = Context::default();
        let Ok(entry) = self.inner.lookup(&context, parent, name) else {
            return;
        };
        if let Some(known) = self.known().get_mut(&entry.inode) {
            (known.parent, known.name) = (parent, name.to_owned());
        }
        self.inner.forget(&context, entry.inode, 1);
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<u64, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The attributes of a file of the server as the guest sees them.
    fn attributes(
        &self,
        ctx: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        let (mut attributes, valid) = self.inner.getattr(ctx, inode, handle)?;
        self.numbering.apply(&mut attributes);
        Ok((attributes, valid))
    }

    /// Reads a directory, with what the server leaves out: the directory itself and the one above.
    fn read_directory(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry, Option<Entry>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let left_out: &[(&[u8], u64)] = &[(b".", BEHIND_SELF), (b"..", BEHIND_PARENT)];
        let left_out = match offset {
            0 => left_out,
            BEHIND_SELF => &left_out[1..],
            _ => &[],
        };
        for &(name, offset) in left_out {
            let directory = match name {
                b"." => inode,
                _ => self
                    .known()
                    .get(&inode)
                    .map_or(ROOT_ID, |known| known.parent),
            };
            let entry = DirEntry {
                ino: self.attributes(ctx, directory, None)?.0.st_ino,
                offset,
                type_: libc::DT_DIR.into(),
                name,
            };
            if add(entry, None)? == 0 {
                return Ok(());
            }
        }
        let offset = match offset {
            BEHIND_SELF | BEHIND_PARENT => 0,
            offset => offset,
        };
        let add = &mut |name: DirEntry<'_>, entry| add(name, Some(entry));
        // What the server leaves out takes room in its buffer, and one that had nothing else would look like the end. How
        // much the guest is told is for `add` to say.
        let size = size.max(SMALLEST_LISTING);
        self.inner
            .readdirplus(ctx, inode, handle, size, offset, add)
    }

    fn check_writable(&self) -> io::Result<()> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(io::Error::from_raw_os_error(libc::EROFS)),
        }
    }

    fn check_change(&self, name: &CStr) -> io::Result<()> {
        self.check_writable()?;
        check_name(name)
    }
}

/// Looks up the directories in the share's root, which are not to be forgotten: the server's descriptor of a
/// mount lives as long as it knows a file on it, and making another costs one for good. Says their numbers.
fn pin_mounts(inner: &PassthroughFs<()>, root: &File) -> io::Result<BTreeSet<u64>> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
    let mut pinned = BTreeSet::new();
    for entry in Path::new(&path).read_dir()?.take(MAX_MOUNTS) {
        let name = CString::new(entry?.file_name().as_bytes())?;
        // One that has gone meanwhile, or cannot be looked up, is no mount to keep.
        let Ok(entry) = inner.lookup(&Context::default(), ROOT_ID, &name) else {
            continue;
        };
        if entry.attr.st_mode & libc::S_IFMT == libc::S_IFDIR {
            pinned.insert(entry.inode);
        } else {
            inner.forget(&Context::default(), entry.inode, 1);
        }
    }
    Ok(pinned)
}

/// A name in a directory. The parent of a directory is the guest's own business.
fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(()),
    }
}

/// The length of a file by which a change of it is noticed. Only a regular file's means something.
fn length_of(attributes: &stat64) -> u64 {
    match attributes.st_mode & libc::S_IFMT {
        libc::S_IFREG => attributes.st_size.unsigned_abs(),
        _ => 0,
    }
}

/// The flags of an open file that mean something here. O_DIRECT is not among them: it wants the
/// guest's buffers to be aligned as the host's file system likes.
fn file_flags(flags: u32) -> u32 {
    let known = libc::O_ACCMODE
        | libc::O_APPEND
        | libc::O_TRUNC
        | libc::O_SYNC
        | libc::O_DSYNC
        | libc::O_NOATIME
        | libc::O_LARGEFILE;
    flags & known as u32
}

fn wants_to_write(flags: u32) -> bool {
    flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32 || flags & libc::O_TRUNC as u32 != 0
}

impl FileSystem for SharedTree {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // A driver that begins anew is the same one, or can do the same.
        let _ = self.options.set(capable);
        let mut options = self.inner.init(capable & FsOptions::HANDLE_KILLPRIV_V2)?;
        options |= FsOptions::ASYNC_READ
            | FsOptions::ASYNC_DIO
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::BIG_WRITES
            | FsOptions::DONT_MASK
            | FsOptions::MAX_PAGES
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::POSIX_ACL;
        // Attributes come with a listing where the guest may keep them: always, since they cost the server nothing more.
        options.remove(FsOptions::DO_READDIRPLUS | FsOptions::READDIRPLUS_AUTO);
        options |= match self.cache {
            Cache::Always => FsOptions::CACHE_SYMLINKS | FsOptions::DO_READDIRPLUS,
            Cache::None => FsOptions::AUTO_INVAL_DATA,
        };
        Ok(options)
    }

    fn destroy(&self) {
        self.clear();
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        let parent = self.node(parent)?;
        Ok(self.told(parent, name, self.inner.lookup(ctx, parent, name)?))
    }

    fn forget(&self, ctx: &Context, inode: u64, count: u64) {
        self.batch_forget(ctx, vec![(inode, count)]);
    }

    fn batch_forget(&self, ctx: &Context, requests: Vec<(u64, u64)>) {
        let forgotten = requests.into_iter().filter_map(|(inode, count)| {
            // One that was not found again is forgotten already.
            self.forgets(self.node(inode).ok()?, count)
        });
        self.inner.batch_forget(ctx, forgotten.collect());
    }

    fn getattr(
        &self,
        ctx: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        let handle = handle.map(|handle| self.file(handle)).transpose()?;
        self.attributes(ctx, self.node(inode)?, handle)
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.check_writable()?;
        let handle = handle.map(|handle| self.file(handle)).transpose()?;
        let inode = self.node(inode)?;
        let (mut attributes, valid) = self.inner.setattr(ctx, inode, attr, handle, valid)?;
        self.numbering.apply(&mut attributes);
        Ok((attributes, valid))
    }

    fn readlink(&self, ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, self.node(inode)?)
    }

    fn symlink(
        &self,
        ctx: &Context,
        linkname: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.check_change(name)?;
        let parent = self.node(parent)?;
        let entry = self.inner.symlink(ctx, linkname, parent, name)?;
        Ok(self.told(parent, name, entry))
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.check_change(name)?;
        let parent = self.node(parent)?;
        let make = || self.inner.mknod(ctx, parent, name, mode, rdev, 0);
        let entry = credentials::with_umask(umask, make)?;
        Ok(self.told(parent, name, entry))
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.check_change(name)?;
        let parent = self.node(parent)?;
        let make = || self.inner.mkdir(ctx, parent, name, mode, 0);
        let entry = credentials::with_umask(umask, make)?;
        Ok(self.told(parent, name, entry))
    }

    fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.check_change(name)?;
        self.inner.unlink(ctx, self.node(parent)?, name)
    }

    fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.check_change(name)?;
        self.inner.rmdir(ctx, self.node(parent)?, name)
    }

    fn rename(
        &self,
        ctx: &Context,
        olddir: u64,
        oldname: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.check_change(oldname)?;
        check_name(newname)?;
        let (olddir, newdir) = (self.node(olddir)?, self.node(newdir)?);
        self.inner
            .rename(ctx, olddir, oldname, newdir, newname, flags)?;
        self.moved(newdir, newname);
        if flags & libc::RENAME_EXCHANGE != 0 {
            self.moved(olddir, oldname);
        }
        Ok(())
    }

    fn link(&self, ctx: &Context, inode: u64, newparent: u64, newname: &CStr) -> io::Result<Entry> {
        self.check_change(newname)?;
        let newparent = self.node(newparent)?;
        let inode = self.node(inode)?;
        let entry = self.inner.link(ctx, inode, newparent, newname)?;
        Ok(self.told(newparent, newname, entry))
    }

    fn open(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        if wants_to_write(flags) {
            self.check_writable()?;
        }
        let (inode, flags) = (self.node(inode)?, file_flags(flags));
        let (handle, options, passthrough) = self.inner.open(ctx, inode, flags, fuse_flags)?;
        self.opened(inode, flags, false, handle);
        let handle = handle.map(|handle| self.file_for_guest(handle));
        Ok((handle, options, passthrough))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mut args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        self.check_change(name)?;
        let exclusive = args.flags & libc::O_EXCL as u32;
        args.flags = file_flags(args.flags) | exclusive | libc::O_CLOEXEC as u32;
        let parent = self.node(parent)?;
        let umask = std::mem::take(&mut args.umask);
        let make = || self.inner.create(ctx, parent, name, args);
        let (entry, handle, options, passthrough) = credentials::with_umask(umask, make)?;
        self.opened(entry.inode, file_flags(args.flags), false, handle);
        let entry = self.told(parent, name, entry);
        let handle = handle.map(|handle| self.file_for_guest(handle));
        Ok((entry, handle, options, passthrough))
    }

    fn read(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let (inode, handle) = (self.node(inode)?, self.file(handle)?);
        let flags = file_flags(flags);
        self.inner
            .read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.check_writable()?;
        let (inode, handle) = (self.node(inode)?, self.file(handle)?);
        let flags = file_flags(flags);
        self.inner.write(
            ctx,
            inode,
            handle,
            r,
            size,
            offset,
            lock_owner,
            delayed_write,
            flags,
            fuse_flags,
        )
    }

    fn flush(&self, ctx: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        let (inode, handle) = (self.node(inode)?, self.file(handle)?);
        self.inner.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let (inode, handle) = (self.node(inode)?, self.file(handle)?);
        self.inner.fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.check_writable()?;
        let (inode, handle) = (self.node(inode)?, self.file(handle)?);
        credentials::as_user(ctx.uid, || {
            self.inner
                .fallocate(ctx, inode, handle, mode, offset, length)
        })
    }

    fn release(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let (inode, handle) = (self.node(inode)?, self.file(handle)?);
        self.inner
            .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)?;
        self.open_files().remove(&handle);
        Ok(())
    }

    fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        self.inner.statfs(ctx, self.node(inode)?)
    }

    fn setxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.check_writable()?;
        self.inner
            .setxattr(ctx, self.node(inode)?, name, value, flags)
    }

    fn getxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        // The server makes a buffer of that size.
        let size = size.min(MAX_XATTR);
        let found = self.inner.getxattr(ctx, self.node(inode)?, name, size);
        match found {
            // A file system without lists: the guest's kernel would take the error for a refusal.
            Err(error)
                if error.raw_os_error() == Some(libc::EOPNOTSUPP)
                    && ACCESS_LISTS.contains(&name) =>
            {
                Err(io::Error::from_raw_os_error(libc::ENODATA))
            }
            found => found,
        }
    }

    fn listxattr(&self, ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.inner
            .listxattr(ctx, self.node(inode)?, size.min(MAX_XATTR))
    }

    fn removexattr(&self, ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.check_writable()?;
        self.inner.removexattr(ctx, self.node(inode)?, name)
    }

    fn opendir(
        &self,
        ctx: &Context,
        inode: u64,
        _flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let inode = self.node(inode)?;
        let (handle, options) = self.inner.opendir(ctx, inode, libc::O_RDONLY as u32)?;
        self.opened(inode, 0, true, handle);
        let handle = handle.map(|handle| self.file_for_guest(handle));
        Ok((handle, options))
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (inode, handle) = (self.node(inode)?, self.file(handle)?);
        let add = &mut |mut name: DirEntry<'_>, entry: Option<Entry>| {
            let Some(mut entry) = entry else {
                return add_entry(name);
            };
            let own = entry.inode;
            self.numbering.apply(&mut entry.attr);
            name.ino = entry.attr.st_ino;
            let added = add_entry(name);
            // The guest is told the name alone; of what does not fit the server takes it back.
            if !matches!(added, Ok(0)) {
                self.inner.forget(ctx, own, 1);
            }
            added
        };
        self.read_directory(ctx, inode, handle, size, offset, add)
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (inode, handle) = (self.node(inode)?, self.file(handle)?);
        let add = &mut |mut name: DirEntry<'_>, entry: Option<Entry>| {
            let Some(entry) = entry else {
                // With the number 0 nothing is told but the name.
                return add_entry(name, Entry::default());
            };
            // The kernel's names have no NUL.
            let text = CString::new(name.name)?;
            let own = entry.inode;
            let entry = self.told(inode, &text, entry);
            name.ino = entry.attr.st_ino;
            let added = add_entry(name, entry);
            if let Ok(0) = added {
                // It did not fit; the server has taken it back.
                self.untold(own);
            }
            added
        };
        self.read_directory(ctx, inode, handle, size, offset, add)
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let (inode, handle) = (self.node(inode)?, self.file(handle)?);
        self.inner.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        let (inode, handle) = (self.node(inode)?, self.file(handle)?);
        self.inner.releasedir(ctx, inode, flags, handle)?;
        self.open_files().remove(&handle);
        Ok(())
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        if mask & libc::W_OK as u32 != 0 {
            self.check_writable()?;
        }
        self.inner.access(ctx, self.node(inode)?, mask)
    }

    fn lseek(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let (inode, handle) = (self.node(inode)?, self.file(handle)?);
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }
}
