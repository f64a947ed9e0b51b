//! A directory of the host as the guest may see it: the policy in front of the pass-through.
//!
//! Names and flags are the guest's. A name is one component of a path and never `.` or `..`; a
//! symbolic link is a text that only the guest resolves; nothing but regular files and directories
//! is ever opened. What the guest's own kernel decides (permissions, locks) is left to it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions as FileOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
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

use super::{credentials, handles};
use crate::devices::virtio::worker::STACK_SIZE;

/// For how long the guest may believe what it knows of a share that only it changes.
const PRIVATE_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest extended attribute, and list of them, that Linux has.
const MAX_XATTR: u32 = 64 << 10;
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
    /// The numbers of the files that the guest was told of since it began.
    known: Mutex<BTreeSet<u64>>,
    /// The open files and directories, and the number of the file of each.
    open: Mutex<BTreeMap<u64, u64>>,
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
        Ok(Self {
            inner,
            cache: share.cache,
            access: share.access,
            root,
            pinned: RwLock::new(pinned),
            known: Mutex::default(),
            open: Mutex::default(),
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
        let (cache_policy, timeout) = match share.cache {
            Cache::Always => (CachePolicy::Always, PRIVATE_TIMEOUT),
            // "Never" would forbid shared mappings. With "auto", no timeouts and AUTO_INVAL_DATA
            // the guest revalidates on each open and each read instead.
            Cache::None => (CachePolicy::Auto, Duration::ZERO),
        };
        let inner = PassthroughFs::new(Config {
            root_dir: format!("/proc/self/fd/{}/.", root.as_raw_fd()),
            // The root is there from the start; names are checked here.
            do_import: false,
            cache_policy,
            attr_timeout: timeout,
            entry_timeout: timeout,
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
        for (handle, inode) in std::mem::take(&mut *self.open_files()) {
            // One that the guest closes meanwhile.
            let _ = self.inner.releasedir(&Context::default(), inode, 0, handle);
        }
        let pinned = match pin_mounts(&self.inner, &self.root) {
            Ok(pinned) => pinned,
            Err(error) => {
                tracing::error!(%error, "sharing a directory again");
                return;
            }
        };
        let mut forgotten = std::mem::take(&mut *self.known());
        let mut before = self.pinned.write().unwrap_or_else(PoisonError::into_inner);
        forgotten.append(&mut before);
        let forgotten = forgotten.difference(&pinned);
        let forgotten = forgotten.map(|&inode| (inode, u64::MAX)).collect();
        self.inner.batch_forget(&Context::default(), forgotten);
        *before = pinned;
    }

    fn open_files(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened(&self, inode: u64, handle: Option<u64>) {
        if let Some(handle) = handle {
            self.open_files().insert(handle, inode);
        }
    }

    /// Whether the guest may forget a file: by more than it was told of it, too.
    fn may_forget(&self, inode: u64) -> bool {
        let pinned = self.pinned.read().unwrap_or_else(PoisonError::into_inner);
        !pinned.contains(&inode)
    }

    /// Notes the number of a file that the guest is told of.
    fn told(&self, entry: Entry) -> Entry {
        self.known().insert(entry.inode);
        entry
    }

    fn known(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut options = self.inner.init(capable & FsOptions::HANDLE_KILLPRIV_V2)?;
        options |= FsOptions::ASYNC_READ
            | FsOptions::ASYNC_DIO
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::PARALLEL_DIROPS;
        options |= match self.cache {
            Cache::Always => FsOptions::CACHE_SYMLINKS,
            Cache::None => FsOptions::AUTO_INVAL_DATA,
        };
        Ok(options)
    }

    fn destroy(&self) {
        self.clear();
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        Ok(self.told(self.inner.lookup(ctx, parent, name)?))
    }

    fn forget(&self, ctx: &Context, inode: u64, count: u64) {
        if self.may_forget(inode) {
            self.inner.forget(ctx, inode, count);
        }
    }

    fn batch_forget(&self, ctx: &Context, mut requests: Vec<(u64, u64)>) {
        requests.retain(|&(inode, _)| self.may_forget(inode));
        self.inner.batch_forget(ctx, requests);
    }

    fn getattr(
        &self,
        ctx: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        self.inner.getattr(ctx, inode, handle)
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
        self.inner.setattr(ctx, inode, attr, handle, valid)
    }

    fn readlink(&self, ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inode)
    }

    fn symlink(
        &self,
        ctx: &Context,
        linkname: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.check_change(name)?;
        Ok(self.told(self.inner.symlink(ctx, linkname, parent, name)?))
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
        let entry = self.inner.mknod(ctx, parent, name, mode, rdev, umask)?;
        Ok(self.told(entry))
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
        Ok(self.told(self.inner.mkdir(ctx, parent, name, mode, umask)?))
    }

    fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.check_change(name)?;
        self.inner.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.check_change(name)?;
        self.inner.rmdir(ctx, parent, name)
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
        self.inner
            .rename(ctx, olddir, oldname, newdir, newname, flags)
    }

    fn link(&self, ctx: &Context, inode: u64, newparent: u64, newname: &CStr) -> io::Result<Entry> {
        self.check_change(newname)?;
        Ok(self.told(self.inner.link(ctx, inode, newparent, newname)?))
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
        let opened = self.inner.open(ctx, inode, file_flags(flags), fuse_flags)?;
        self.opened(inode, opened.0);
        Ok(opened)
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
        let created = self.inner.create(ctx, parent, name, args)?;
        self.opened(created.0.inode, created.1);
        self.told(created.0);
        Ok(created)
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
        self.inner.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
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
        self.inner
            .fallocate(ctx, inode, handle, mode, offset, length)
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
        self.inner
            .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)?;
        self.open_files().remove(&handle);
        Ok(())
    }

    fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        self.inner.statfs(ctx, inode)
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
        self.inner.setxattr(ctx, inode, name, value, flags)
    }

    fn getxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        // The server makes a buffer of that size.
        self.inner.getxattr(ctx, inode, name, size.min(MAX_XATTR))
    }

    fn listxattr(&self, ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.inner.listxattr(ctx, inode, size.min(MAX_XATTR))
    }

    fn removexattr(&self, ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.check_writable()?;
        self.inner.removexattr(ctx, inode, name)
    }

    fn opendir(
        &self,
        ctx: &Context,
        inode: u64,
        _flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let opened = self.inner.opendir(ctx, inode, libc::O_RDONLY as u32)?;
        self.opened(inode, opened.0);
        Ok(opened)
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
        self.inner
            .readdir(ctx, inode, handle, size, offset, add_entry)
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
        let add = &mut |name: DirEntry<'_>, entry| add_entry(name, self.told(entry));
        self.inner
            .readdirplus(ctx, inode, handle, size, offset, add)
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.inner.releasedir(ctx, inode, flags, handle)?;
        self.open_files().remove(&handle);
        Ok(())
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        if mask & libc::W_OK as u32 != 0 {
            self.check_writable()?;
        }
        self.inner.access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }
}
