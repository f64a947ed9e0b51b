//! The root file system of a container: mounts, devices, masks, and the change of root.
//!
//! Done by the container's first process in its new namespaces, before it gives up its rights, by descriptors and with
//! the mount API of Linux 5.12. The image, and whoever shares a volume with it, is hostile: nothing below the root is
//! resolved by a path that could lead out of it. Until the root is changed the host's /proc is at hand, and only that
//! one is used.

mod cgroup;
mod copy_up;
mod devices;
mod host;
mod id_map;
mod inside;
mod masks;
mod mounts;
mod options;
mod terminal;
mod tree;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Component, Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};
use oci_spec::runtime::Spec;
use rustix::fs::OFlags;

pub use host::{mount_on_host, unmount_on_host};
pub use options::KNOWN as KNOWN_MOUNT_OPTIONS;

pub(crate) use options::{Attributes, Data, Options};
pub(crate) use tree::Tree;

use crate::cgroup::Cgroup;
use crate::error::{Context, Error};

use inside::Root;
use mounts::{Dev, PlannedMount};
use options::propagation;

/// What is to be done, parsed and opened by the runtime before the container's first process exists.
pub(crate) struct RootfsPlan<'a> {
    spec: &'a Spec,
    path: PathBuf,
    cgroup: &'a Cgroup,
    mounts: Vec<PlannedMount>,
    /// `linux.rootfsPropagation`.
    propagation: Option<MsFlags>,
    no_pivot: bool,
}

impl<'a> RootfsPlan<'a> {
    pub(crate) fn new(spec: &'a Spec, cgroup: &'a Cgroup, no_pivot: bool) -> Result<Self, Error> {
        let path = spec
            .root()
            .as_ref()
            .map(|root| root.path().clone())
            .unwrap_or_default();
        if !path.is_dir() {
            return Err(Error::unsupported(
                "root.path",
                format!("{} is not a directory", path.display()),
            ));
        }
        let mut mounts = Vec::new();
        // Who may not mount here may do so in the container's user namespace, as its root.
        let privileged = caps::has_cap(
            None,
            caps::CapSet::Effective,
            caps::Capability::CAP_SYS_ADMIN,
        )
        .unwrap_or(false);
        let propagation = root_propagation(spec)?;
        for (index, mount) in spec.mounts().iter().flatten().enumerate() {
            let mut planned = PlannedMount::new(index, mount, spec)?;
            if privileged {
                planned.open_source(inherited(propagation))?;
            }
            mounts.push(planned);
        }
        Ok(Self {
            spec,
            path,
            cgroup,
            mounts,
            propagation,
            no_pivot,
        })
    }

    /// Makes the root with all its mounts and devices, and the terminal if `console` is a socket to send it to.
    pub(crate) fn prepare(self, console: Option<RawFd>) -> Result<Prepared<'a>, Error> {
        rustix::process::umask(rustix::fs::Mode::empty());
        detach_from_host(&self.path, self.propagation)?;
        let what = || format!("cannot mount the root file system {}", self.path.display());
        let tree = Tree::of_path(&self.path, true).context(what)?;
        tree.attach_at(&self.path).context(what)?;
        let root = Root::new(tree.into_root());

        let dev = Dev::of(&self.mounts);
        for mount in self.mounts {
            mount.mount(&root, self.cgroup, inherited(self.propagation))?;
        }
        if !dev.is_bound {
            let devices = self
                .spec
                .linux()
                .as_ref()
                .and_then(|linux| linux.devices().as_ref());
            devices::fill(&root, devices.map_or(&[], Vec::as_slice))?;
        }
        let terminal = match console {
            None => None,
            Some(socket) => {
                let terminal = terminal::make(&root, socket)?;
                terminal::bind_console(&root, terminal.as_fd())?;
                Some(terminal)
            }
        };
        Ok(Prepared {
            spec: self.spec,
            root,
            dev,
            terminal,
            no_pivot: self.no_pivot,
            propagation: self.propagation,
        })
    }
}

/// A root that is complete but for what hides parts of it, and not yet this process's.
pub(crate) struct Prepared<'a> {
    spec: &'a Spec,
    root: Root,
    dev: Dev,
    terminal: Option<OwnedFd>,
    no_pivot: bool,
    propagation: Option<MsFlags>,
}

impl Prepared<'_> {
    /// Hides what is to be hidden and makes the root this process's.
    pub(crate) fn enter(self) -> Result<(), Error> {
        let linux = self.spec.linux().as_ref();
        if let Some(settings) = linux.and_then(|linux| linux.sysctl().as_ref()) {
            for (name, value) in settings {
                set_sysctl(name, value)?;
            }
        }
        if self.dev.read_only {
            let dev = devices::open_dev(&self.root)?;
            Tree::from_attached(dev)
                .set(Attributes::READ_ONLY, false)
                .context(|| "cannot make /dev read-only".to_owned())?;
        }
        if let Some(paths) = linux.and_then(|linux| linux.readonly_paths().as_ref()) {
            masks::make_read_only(&self.root, paths)?;
        }
        if let Some(paths) = linux.and_then(|linux| linux.masked_paths().as_ref()) {
            masks::mask(&self.root, paths)?;
        }
        match self.terminal {
            Some(terminal) => terminal::take(terminal)?,
            None => mounts::reopen_null(&self.root)?,
        }
        let context = || "cannot change to the container's root".to_owned();
        match self.no_pivot {
            false => pivot(&self.root).context(context)?,
            true => move_root(&self.root).context(context)?,
        }
        let late = MsFlags::MS_SHARED | MsFlags::MS_UNBINDABLE;
        if let Some(flags) = self.propagation.filter(|flags| flags.intersects(late)) {
            tree::set_propagation_at(rustix::fs::CWD, c"/", flags)
                .context(|| "cannot set linux.rootfsPropagation".to_owned())?;
        }
        if self.spec.root().as_ref().and_then(|root| root.readonly()) == Some(true) {
            Tree::from_attached(self.root.into_directory())
                .set(Attributes::READ_ONLY, false)
                .context(|| {
                    "cannot make the root file system read-only (root.readonly)".to_owned()
                })?;
        }
        Ok(())
    }
}

/// Makes a terminal for one more process, in the container whose root is this process's.
pub(crate) fn own_terminal(console: RawFd) -> Result<(), Error> {
    let root = fs::File::open("/").context(|| "cannot open the root".to_owned())?;
    terminal::take(terminal::make(&Root::new(root.into()), console)?)
}

/// `linux.rootfsPropagation`.
pub(crate) fn root_propagation(spec: &Spec) -> Result<Option<MsFlags>, Error> {
    let linux = spec.linux().as_ref();
    let given = linux.and_then(|linux| linux.rootfs_propagation().as_deref());
    given
        .filter(|name| !name.is_empty())
        .map(|name| {
            propagation(name).ok_or_else(|| {
                Error::unsupported(
                    "linux.rootfsPropagation",
                    format!("{name:?} is not one of shared, slave, private, unbindable"),
                )
            })
        })
        .transpose()
}

/// The propagation of the host's mounts as the container gets them, itself and by bind mounts.
fn inherited(root: Option<MsFlags>) -> MsFlags {
    let root = root.unwrap_or(MsFlags::MS_SLAVE);
    let kind = if root.contains(MsFlags::MS_SHARED) {
        MsFlags::MS_SHARED
    } else if root.contains(MsFlags::MS_SLAVE) {
        MsFlags::MS_SLAVE
    } else {
        // What cannot be bound is so only when all is bound.
        MsFlags::MS_PRIVATE
    };
    kind | MsFlags::MS_REC
}

/// Makes sure that no mount of the container appears on the host, unless that is asked for.
fn detach_from_host(root: &Path, propagation: Option<MsFlags>) -> Result<(), Error> {
    let what = || "cannot separate the container's mounts from the host's".to_owned();
    let flags = inherited(propagation);
    tree::set_propagation_at(rustix::fs::CWD, c"/", flags).context(what)?;
    if !flags.contains(MsFlags::MS_SHARED) {
        return Ok(());
    }
    // The root is about to be mounted on a mount of the host, which must not get to know, and pivot_root wants it so.
    for directory in root.ancestors() {
        let path = std::ffi::CString::new(directory.as_os_str().as_encoded_bytes())
            .map_err(io::Error::other)
            .context(what)?;
        match tree::set_propagation_at(rustix::fs::CWD, &path, MsFlags::MS_PRIVATE) {
            Ok(()) => return Ok(()),
            // No mount point: it is further up.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error).context(what),
        }
    }
    Ok(())
}

/// Puts the root in the place of the old one, which is left without a name and goes with its last user.
fn pivot(root: &Root) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = rustix::fs::open("/", flags, rustix::fs::Mode::empty())?;
    nix::unistd::fchdir(root.as_fd().as_raw_fd())?;
    nix::unistd::pivot_root(".", ".")?;
    // The old root lies on top of the new one now. That its mounts go must not be seen on the host.
    nix::unistd::fchdir(old.as_raw_fd())?;
    tree::set_propagation_at(old.as_fd(), c"", MsFlags::MS_SLAVE | MsFlags::MS_REC)?;
    nix::mount::umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    Ok(())
}

/// The same for a host whose root is an initramfs, which cannot be pivoted: it stays below. Its /proc and /sys go first;
/// from a chroot they would be a way back.
fn move_root(root: &Root) -> io::Result<()> {
    nix::unistd::fchdir(root.as_fd().as_raw_fd())?;
    for path in ["/sys", "/proc"] {
        match nix::mount::umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::errno::Errno::ENOENT) => {}
            Err(_) => Tree::of_file_system("tmpfs", None, &[], Attributes::READ_ONLY)?
                .attach_at(Path::new(path))?,
        }
    }
    Tree::from_attached(root.as_fd().try_clone_to_owned()?).attach_at(Path::new("/"))?;
    nix::unistd::chroot(".")?;
    nix::unistd::chdir("/")?;
    Ok(())
}

/// Sets a kernel parameter of the namespaces that this process is in, through the host's /proc.
fn set_sysctl(name: &str, value: &str) -> Result<(), Error> {
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    let plain = path
        .components()
        .skip(1)
        .all(|one| matches!(one, Component::Normal(_)));
    if !plain || !path.starts_with("/proc/sys") {
        return Err(Error::unsupported(
            format!("linux.sysctl.{name}"),
            "it is no name of a kernel parameter",
        ));
    }
    fs::write(&path, value).context(|| format!("cannot set linux.sysctl.{name} to {value:?}"))
}
