//! The entries of `mounts`: sources opened on the host, file systems made, and each put in its place inside the root.
//!
//! Sources are the caller's paths and are opened by the runtime before the container's first process exists, where it has
//! the right to; that process may be of a user namespace that cannot reach them. Destinations are the image's and are
//! resolved inside the root only, to a descriptor that the mount is attached to.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::MsFlags;
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Mount, Spec};
use rustix::fs::{AtFlags, OFlags};

use super::copy_up::copy_directory;
use super::id_map;
use super::inside::{Root, normalize};
use super::options::{Attributes, Bind, Data, IdMap, Options};
use super::tree::Tree;
use crate::cgroup::Cgroup;
use crate::error::{Context, Error};
use crate::spec::{namespace, path_of};

/// fsconfig(2) takes strings up to this length only; mount(2) has a page for all.
pub(super) const LONGEST_VALUE: usize = 255;

/// One entry of `mounts`, parsed.
pub(crate) struct PlannedMount {
    /// As in the configuration.
    destination: PathBuf,
    source: Option<PathBuf>,
    kind: String,
    options: Options,
    id_map: Option<OwnedFd>,
    /// What is to be bound, if it is open already.
    tree: Option<Tree>,
}

impl PlannedMount {
    /// Parses `mounts[index]`, and makes its id map.
    pub(crate) fn new(index: usize, mount: &Mount, spec: &Spec) -> Result<Self, Error> {
        let options = Options::parse(index, mount)?;
        if normalize(mount.destination()) == Path::new(".") {
            return Err(Error::unsupported(
                format!("mounts[{index}].destination"),
                "nothing can be mounted on the root itself; see root.path",
            ));
        }
        let id_map = match options.id_map {
            IdMap::No => None,
            _ => Some(
                match (id_mappings(mount, spec), joined_user_namespace(spec)) {
                    (Some((uids, gids)), _) => id_map::user_namespace(uids, gids)?,
                    (None, Some(path)) => {
                        let opened = std::fs::File::open(path);
                        let context =
                            || format!("cannot open the user namespace {}", path.display());
                        opened.context(context)?.into()
                    }
                    (None, None) => {
                        return Err(Error::unsupported(
                            format!("mounts[{index}].uidMappings"),
                            "an id-mapped mount needs mappings, its own or those of the container's user namespace",
                        ));
                    }
                },
            ),
        };
        Ok(Self {
            destination: mount.destination().clone(),
            source: mount.source().clone(),
            kind: mount.typ().clone().unwrap_or_default(),
            options,
            id_map,
            tree: None,
        })
    }

    fn name(&self) -> String {
        let what = match (&self.source, self.options.bind) {
            (Some(source), Bind::Single | Bind::Recursive) => source.display().to_string(),
            _ => format!("{:?}", self.kind),
        };
        format!("cannot mount {what} on {}", self.destination.display())
    }

    /// Opens the source of a bind mount, which gets the propagation `inherited`.
    pub(crate) fn open_source(&mut self, inherited: MsFlags) -> Result<(), Error> {
        if self.options.bind == Bind::No || self.tree.is_some() {
            return Ok(());
        }
        let source = self.source.clone().unwrap_or_default();
        let open = || -> io::Result<Tree> {
            let tree = Tree::of_path(&source, self.options.bind == Bind::Recursive)?;
            // A clone of a shared mount shares with it: what is mounted in the container would appear on the host.
            if !inherited.contains(MsFlags::MS_SHARED) {
                tree.set_propagation(inherited)?;
            }
            if let Some(user) = &self.id_map {
                tree.set_id_map(user.as_fd(), self.options.id_map == IdMap::Recursive)?;
            }
            Ok(tree)
        };
        self.tree = Some(open().context(|| self.name())?);
        Ok(())
    }

    /// Mounts it inside the root.
    pub(crate) fn mount(
        mut self,
        root: &Root,
        cgroup: &Cgroup,
        inherited: MsFlags,
    ) -> Result<(), Error> {
        self.open_source(inherited)?;
        let mounted = match self.kind.as_str() {
            _ if self.tree.is_some() => self.mount_bound(root),
            "cgroup" | "cgroup2" => super::cgroup::mount(
                root,
                &self.destination,
                cgroup,
                self.kind == "cgroup2",
                self.options.attributes,
            ),
            _ => self.mount_file_system(root),
        };
        mounted.context(|| self.name())
    }

    fn mount_bound(&self, root: &Root) -> io::Result<()> {
        let Some(tree) = &self.tree else {
            return Ok(());
        };
        let target = match tree.is_directory()? {
            true => root.make_directory(&self.destination)?,
            false => root.make_file(&self.destination)?,
        };
        tree.set(self.options.attributes, false)?;
        self.attach(tree, &target)
    }

    fn mount_file_system(&self, root: &Root) -> io::Result<()> {
        // These must lie where they are said to, without any link: much of a container's confinement does.
        let plain = matches!(self.kind.as_str(), "proc" | "sysfs") || self.is_dev();
        let mut data = self.options.data.clone();
        // A tmpfs has the mode of the directory that it covers, if that was not made for it.
        let takes_mode = self.kind == "tmpfs"
            && !has(&data, "mode")
            && root
                .open(&normalize(&self.destination), OFlags::PATH)
                .is_ok();
        let target = match plain {
            true => self.plain_directory(root)?,
            false => root.make_directory(&self.destination)?,
        };
        if takes_mode {
            let mode = rustix::fs::fstat(&target)?.st_mode & 0o7777;
            data.push(Data::Value("mode".into(), format!("{mode:o}")));
        }
        let too_long =
            |one: &Data| matches!(one, Data::Value(_, value) if value.len() > LONGEST_VALUE);
        if data.iter().any(too_long) {
            return self.mount_long(root, &data, target);
        }
        if self.options.is_read_only() && !is_virtual(&self.kind) {
            // Of a file system on a device it is also said to the file system, which then does not write to it at all.
            data.push(Data::Flag("ro".into()));
        }
        let source = self.source.as_deref().unwrap_or(Path::new(&self.kind));
        // Written to until it is complete: see `finish`.
        let attributes = match self.is_finished_later() || self.options.copy_up {
            true => Attributes {
                set: self.options.attributes.set & !libc::MOUNT_ATTR_RDONLY,
                clear: 0,
            },
            false => self.options.attributes,
        };
        let tree = Tree::of_file_system(&self.kind, Some(source), &data, attributes)?;
        if self.options.copy_up {
            let from = root.open(&self.destination, OFlags::RDONLY | OFlags::DIRECTORY)?;
            copy_directory(from, &tree)?;
            if !self.is_finished_later() {
                tree.set(self.options.attributes, false)?;
            }
        }
        self.attach(&tree, &target)
    }

    fn plain_directory(&self, root: &Root) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        match root.open_without_links(&normalize(&self.destination), flags) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                root.make_directory(&self.destination)
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR)) => {
                Err(io::Error::other(
                    "the root file system has no directory there, but a link or a file",
                ))
            }
            other => other,
        }
    }

    fn attach(&self, tree: &Tree, target: &OwnedFd) -> io::Result<()> {
        tree.set(self.options.recursive, true)?;
        tree.attach(target)?;
        match self.options.propagation {
            Some(flags) => tree.set_propagation(flags),
            None => Ok(()),
        }
    }

    /// With mount(2), for arguments that are too long for the mount API.
    fn mount_long(&self, root: &Root, data: &[Data], target: OwnedFd) -> io::Result<()> {
        // The runtime's own /proc, since the root is not changed yet.
        let path = format!("/proc/self/fd/{}", target.as_raw_fd());
        let source = self.source.as_deref().unwrap_or(Path::new(&self.kind));
        nix::mount::mount(
            Some(source),
            path.as_str(),
            Some(self.kind.as_str()),
            MsFlags::empty(),
            Some(join(data).as_str()),
        )?;
        let mounted = root.open(&self.destination, OFlags::PATH)?;
        let tree = Tree::from_attached(mounted);
        tree.set(self.options.attributes, false)?;
        tree.set(self.options.recursive, true)?;
        self.options
            .propagation
            .map_or(Ok(()), |flags| tree.set_propagation(flags))
    }

    /// Whether it stays writable until /dev is filled.
    fn is_finished_later(&self) -> bool {
        self.is_dev() && self.options.is_read_only()
    }

    fn is_dev(&self) -> bool {
        self.options.bind == Bind::No && normalize(&self.destination) == Path::new("dev")
    }
}

/// What must be known of the mounts when they are all made.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Dev {
    /// /dev is a bind mount: it is the host's and not to be filled.
    pub(crate) is_bound: bool,
    /// It becomes read-only when it is filled.
    pub(crate) read_only: bool,
}

impl Dev {
    pub(crate) fn of(mounts: &[PlannedMount]) -> Self {
        Self {
            is_bound: mounts.iter().any(|one| {
                one.options.bind != Bind::No && normalize(&one.destination) == Path::new("dev")
            }),
            read_only: mounts.iter().any(PlannedMount::is_finished_later),
        }
    }
}

/// As mount(2) takes it.
pub(super) fn join(data: &[Data]) -> String {
    let words: Vec<String> = data
        .iter()
        .map(|one| match one {
            Data::Flag(key) => key.clone(),
            Data::Value(key, value) => format!("{key}={value}"),
        })
        .collect();
    words.join(",")
}

fn has(data: &[Data], key: &str) -> bool {
    data.iter()
        .any(|one| matches!(one, Data::Value(name, _) if name == key))
}

/// File systems that have no device below them and may be mounted several times.
fn is_virtual(kind: &str) -> bool {
    matches!(
        kind,
        "proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue" | "ramfs"
    )
}

fn id_mappings<'a>(
    mount: &'a Mount,
    spec: &'a Spec,
) -> Option<(&'a [LinuxIdMapping], &'a [LinuxIdMapping])> {
    fn given(map: &Option<Vec<LinuxIdMapping>>) -> Option<&[LinuxIdMapping]> {
        map.as_deref().filter(|map| !map.is_empty())
    }
    let own = given(mount.uid_mappings()).zip(given(mount.gid_mappings()));
    own.or_else(|| {
        let linux = spec.linux().as_ref()?;
        given(linux.uid_mappings()).zip(given(linux.gid_mappings()))
    })
}

/// The user namespace of another container's that this one joins, whose mappings are then this one's.
fn joined_user_namespace(spec: &Spec) -> Option<&Path> {
    namespace(spec, LinuxNamespaceType::User).and_then(path_of)
}

/// Points standard streams that are the host's null device to the container's, if it has one.
pub(crate) fn reopen_null(root: &Root) -> Result<(), Error> {
    let null = rustix::fs::makedev(1, 3);
    let is_null = |stat: &rustix::fs::Stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device() && stat.st_rdev == null
    };
    let mut own = None;
    for target in 0..3 {
        // SAFETY: the descriptor is only looked at; should it not be open, the call says so.
        let stream = unsafe { std::os::fd::BorrowedFd::borrow_raw(target) };
        if !rustix::fs::fstat(stream).is_ok_and(|stat| is_null(&stat)) {
            continue;
        }
        if own.is_none() {
            let there = rustix::fs::statat(root, "dev/null", AtFlags::SYMLINK_NOFOLLOW);
            if !there.is_ok_and(|stat| is_null(&stat)) {
                return Ok(());
            }
            let flags = OFlags::RDWR | OFlags::NOCTTY;
            let Ok(file) = root.open_without_links(Path::new("dev/null"), flags) else {
                return Ok(());
            };
            if !is_null(
                &rustix::fs::fstat(&file).context(|| "cannot look at /dev/null".to_owned())?,
            ) {
                return Ok(());
            }
            own = Some(file);
        }
        if let Some(file) = &own {
            nix::unistd::dup2(file.as_raw_fd(), target)
                .context(|| "cannot use /dev/null for a standard stream".to_owned())?;
        }
    }
    Ok(())
}
