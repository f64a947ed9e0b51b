//! The trees that the guest sees: one with the containers' roots, one with their volumes.
//!
//! They are built of bind mounts in a mount namespace of the VMM process's own, so that they vanish with it, however
//! it ends; a further container of a pod has its own put there later. What the guest must not write is mounted read-only
//! here too: the host does not rely on the guest's engine.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, mkdirat, openat, unlinkat};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::guest_spec::Volume;
use super::report;

/// A step of building the trees that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct ShareError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The directory of the containers' roots, each named by its container's id, below the trees' root.
const ROOTS: &str = "rootfs";

/// The directory with one directory for each container, named by its id, that has a file or directory for each of its
/// volumes, named by its number.
const VOLUMES: &str = "volumes";

/// The trees' places.
#[derive(Debug)]
pub struct Shares {
    /// The containers' roots.
    pub rootfs: PathBuf,
    /// Their volumes.
    pub volumes: PathBuf,
}

impl Shares {
    /// As the VMM process sees them when their file system has become its root.
    pub fn in_jail() -> Self {
        let root = Path::new("/");
        Self {
            rootfs: root.join(ROOTS),
            volumes: root.join(VOLUMES),
        }
    }
}

/// What a container has in the trees.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a> {
    /// The container's id.
    pub id: &'a str,
    /// Its root on the host.
    pub rootfs: &'a Path,
    /// Whether the guest may not write to it.
    pub read_only: bool,
    /// What else it sees of the host.
    pub volumes: &'a [Volume],
}

/// A mount of something of the host that is nowhere yet.
#[derive(Debug)]
struct Tree {
    mount: OwnedFd,
    is_dir: bool,
    source: PathBuf,
}

fn failed<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> ShareError {
    let path = path.to_owned();
    move |source| ShareError {
        action,
        path,
        source: source.into(),
    }
}

/// Leaves the mount namespace for one of our own and builds the trees in it, on a file system in memory at `at`, with
/// one container's content. That file system is to become the root.
///
/// # Errors
/// The kernel's, with the path. The process must then end.
pub fn build(at: &Path, content: &Content<'_>) -> Result<(), ShareError> {
    unshare(CloneFlags::CLONE_NEWNS)
        .map_err(failed("leave the mount namespace of", Path::new("/")))?;
    // Mounts that the host makes later below a volume are still seen; ours do not reach the host.
    let propagation = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, propagation, None::<&str>)
        .map_err(failed("change the propagation of", Path::new("/")))?;
    fs::create_dir(at).map_err(failed("create", at))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("rt"), at, Some("tmpfs"), flags, Some("mode=0700"))
        .map_err(failed("mount a tmpfs at", at))?;
    let root = openat(CWD, at, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed("open", at))?;
    for directory in [ROOTS, VOLUMES] {
        make(&root, Path::new(directory))?;
    }
    put(&root, at, content.id, &take(content)?)
}

/// Adds a container's content to the trees of the VMM process behind a descriptor, whose root they are below.
///
/// # Errors
/// The kernel's, with the path; then [`remove`] takes away what is there.
pub fn add(vmm: BorrowedFd<'_>, content: &Content<'_>) -> Result<(), ShareError> {
    // Here, for here is what the paths mean.
    let trees = take(content)?;
    in_namespace_of(vmm, || {
        put(&writable_root()?, Path::new("/"), content.id, &trees)
    })
}

/// Takes a container's content out of the trees of the VMM process behind a descriptor. What is not there is no error.
///
/// # Errors
/// The kernel's, with the path.
pub fn remove(vmm: BorrowedFd<'_>, id: &str) -> Result<(), ShareError> {
    in_namespace_of(vmm, || {
        let root = writable_root()?;
        let volumes = Path::new(VOLUMES).join(id);
        let names = match fs::read_dir(Path::new("/").join(&volumes)) {
            Ok(entries) => entries.flatten().map(|entry| entry.file_name()).collect(),
            Err(_) => Vec::new(),
        };
        let numbered = names.iter().map(|name| volumes.join(name));
        for path in numbered.chain([Path::new(ROOTS).join(id)]) {
            let place = Path::new("/").join(&path);
            // Not mounted only means that it was not put there in whole.
            let _ = umount2(&place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            let removed = unlinkat(&root, &path, AtFlags::REMOVEDIR)
                .or_else(|_| unlinkat(&root, &path, AtFlags::empty()));
            ignore_missing(removed).map_err(failed("remove", &place))?;
        }
        ignore_missing(unlinkat(&root, &volumes, AtFlags::REMOVEDIR))
            .map_err(failed("remove", &volumes))
    })
}

/// The root of a jail, writable: the VMM process has it read-only, so that whoever takes it over, or its guest, cannot
/// put there what would lead us elsewhere.
fn writable_root() -> Result<OwnedFd, ShareError> {
    let root = Path::new("/");
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let clone = open_tree(CWD, root, flags).map_err(failed("open", root))?;
    let attributes = libc::mount_attr {
        attr_set: 0,
        attr_clr: libc::MOUNT_ATTR_RDONLY,
        propagation: 0,
        userns_fd: 0,
    };
    set_attributes(&clone, &attributes, false).map_err(failed("write to", root))?;
    Ok(clone)
}

fn ignore_missing(result: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match result {
        Err(rustix::io::Errno::NOENT) => Ok(()),
        other => other,
    }
}

/// Runs `f` in a child that is in the mount namespace of a VMM process: one that has left its own cannot go back.
fn in_namespace_of(
    vmm: BorrowedFd<'_>,
    f: impl FnOnce() -> Result<(), ShareError>,
) -> Result<(), ShareError> {
    let (action, path) = ("enter the mount namespace of", Path::new("the VMM process"));
    let (mut report, reporter) =
        report::channel("the process that shares files").map_err(failed(action, path))?;
    // SAFETY: this process has one thread, so the child may do whatever its parent may.
    match unsafe { fork() }.map_err(failed::<nix::Error>(action, path))? {
        ForkResult::Parent { child } => {
            drop(reporter);
            let result = report.wait();
            let _ = waitpid(child, None);
            result.map_err(|failure| failed(action, path)(io::Error::other(failure)))
        }
        ForkResult::Child => {
            let done = setns(vmm, CloneFlags::CLONE_NEWNS)
                .map_err(failed(action, path))
                .and_then(|()| f());
            match done {
                // A parent that is gone does not want to know.
                Ok(()) => drop(reporter.ready()),
                Err(error) => reporter.failed(&error),
            }
            std::process::exit(0)
        }
    }
}

/// The content as mounts that are nowhere yet: first the root, then the volumes.
fn take(content: &Content<'_>) -> Result<Vec<Tree>, ShareError> {
    let root = tree(content.rootfs, true, content.read_only);
    let volumes = content
        .volumes
        .iter()
        .map(|volume| tree(&volume.source, volume.recursive, volume.read_only));
    std::iter::once(root).chain(volumes).collect()
}

fn tree(source: &Path, recursive: bool, read_only: bool) -> Result<Tree, ShareError> {
    let metadata = fs::metadata(source).map_err(failed("read", source))?;
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    let mount = open_tree(CWD, source, flags).map_err(failed("share", source))?;
    let attributes = libc::mount_attr {
        attr_set: if read_only {
            libc::MOUNT_ATTR_RDONLY
        } else {
            0
        },
        attr_clr: 0,
        // As the rest of the namespace: what the host mounts below later is seen, and nothing goes the other way.
        propagation: libc::MS_SLAVE,
        userns_fd: 0,
    };
    set_attributes(&mount, &attributes, recursive).map_err(failed("share", source))?;
    Ok(Tree {
        mount,
        is_dir: metadata.is_dir(),
        source: source.to_owned(),
    })
}

/// Puts a container's root and volumes into the trees whose file system `root` is the root of, and which are at `at`.
fn put(root: &OwnedFd, at: &Path, id: &str, content: &[Tree]) -> Result<(), ShareError> {
    let volumes = Path::new(VOLUMES).join(id);
    make(root, &volumes)?;
    let numbered = (0..content.len()).map(|number| volumes.join(number.to_string()));
    let places = std::iter::once(Path::new(ROOTS).join(id)).chain(numbered);
    for (tree, place) in content.iter().zip(places) {
        match tree.is_dir {
            true => make(root, &place)?,
            false => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                openat(root, &place, flags, Mode::from_raw_mode(0o444))
                    .map_err(failed("create", &place))?;
            }
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&tree.mount, "", CWD, at.join(place), flags)
            .map_err(failed("share", &tree.source))?;
    }
    Ok(())
}

fn make(root: &OwnedFd, path: &Path) -> Result<(), ShareError> {
    // Users of the guest pass through it; on the host nobody but root gets this far.
    mkdirat(root, path, Mode::from_raw_mode(0o755)).map_err(failed("create", path))
}

/// Sets the attributes of a mount, with `recursive` also of all below it: `mount_setattr(2)`.
fn set_attributes(
    mount: &OwnedFd,
    attributes: &libc::mount_attr,
    recursive: bool,
) -> io::Result<()> {
    let flags = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is the empty string with its terminator, the attributes are a whole structure of the size given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Removes the mount point of [`build`] after the VMM process has ended. It is no error when it is not there.
///
/// # Errors
/// The kernel's.
pub fn remove_mount_point(at: &Path) -> io::Result<()> {
    // A process that was killed between its first steps may have left the mount in no namespace but ours.
    let _ = umount2(at, MntFlags::MNT_DETACH);
    match fs::remove_dir(at) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
