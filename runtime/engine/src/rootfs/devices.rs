//! What a container finds in /dev: the default nodes and links (runtime-spec, "Default Devices"), and `linux.devices`.
//!
//! Nodes are made in directories that are open; the image decides what lies there before, and a node that is there and
//! not the one asked for is an error.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{AtFlags, Dev, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;

use super::inside::{Place, Root};
use super::tree::Tree;
use crate::error::{Context, Error};

/// A device node.
struct Node {
    path: PathBuf,
    kind: FileType,
    number: Dev,
    mode: Mode,
    uid: u32,
    gid: u32,
}

/// Of the memory devices (major 1) and the terminal (major 5).
const DEFAULTS: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Fills /dev.
pub(crate) fn fill(root: &Root, devices: &[LinuxDevice]) -> Result<(), Error> {
    let dev = open_dev(root)?;
    for (name, major, minor) in DEFAULTS {
        // What the configuration says of the same path is done instead.
        if devices.iter().all(|one| one.path() != Path::new(name)) {
            make(
                root,
                &Node {
                    path: name.into(),
                    kind: FileType::CharacterDevice,
                    number: rustix::fs::makedev(major, minor),
                    mode: Mode::from(0o666),
                    uid: 0,
                    gid: 0,
                },
            )?;
        }
    }
    for device in devices {
        make(root, &node_of(device))?;
    }
    let link = |name: &str, target: &str| {
        match rustix::fs::symlinkat(target, &dev, name) {
            // The image's own choice, which only its own processes follow.
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(error),
        }
        .context(|| format!("cannot link /dev/{name}"))
    };
    for (name, target) in LINKS {
        link(name, target)?;
    }
    if Path::new("/proc/kcore").exists() {
        link("core", "/proc/kcore")?;
    }
    // An image may have the host's multiplexer here, which would make terminals of the host.
    match rustix::fs::unlinkat(&dev, "ptmx", AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT | Errno::ROFS) => {}
        Err(error) => return Err(error).context(|| "cannot replace /dev/ptmx".to_owned()),
    }
    link("ptmx", "pts/ptmx")
}

/// Opens /dev, which must be a directory and no link: everything below lies where it says.
pub(crate) fn open_dev(root: &Root) -> Result<OwnedFd, Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    match root.open_without_links(Path::new("dev"), flags) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            root.make_directory(Path::new("dev"))
        }
        other => other,
    }
    .map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP | libc::ENOTDIR) => {
            Error::unsupported("root.path", "/dev in it is not a directory")
        }
        _ => Error::System {
            operation: "cannot open /dev".to_owned(),
            source: error,
        },
    })
}

fn node_of(device: &LinuxDevice) -> Node {
    let number = |value: i64| u32::try_from(value).unwrap_or_default();
    Node {
        path: device.path().clone(),
        kind: match device.typ() {
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::P => FileType::Fifo,
            _ => FileType::CharacterDevice,
        },
        number: rustix::fs::makedev(number(device.major()), number(device.minor())),
        mode: Mode::from(device.file_mode().unwrap_or(0o666) & 0o7777),
        uid: device.uid().unwrap_or_default(),
        gid: device.gid().unwrap_or_default(),
    }
}

fn make(root: &Root, node: &Node) -> Result<(), Error> {
    let context = || format!("cannot make the device {}", node.path.display());
    let place = root.place(&node.path).context(context)?;
    let Place { directory, name } = &place;
    match rustix::fs::mknodat(directory, name, node.kind, node.mode, node.number) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            let there = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
            if !node.is(&there.context(context)?) {
                return Err(Errno::EXIST).context(|| {
                    format!(
                        "cannot make the device {}: the root file system has something else there",
                        node.path.display()
                    )
                });
            }
        }
        // In a user namespace nodes are not made but borrowed from the host.
        Err(Errno::PERM) => return borrow(&place, node).context(context),
        Err(error) => return Err(error).context(context),
    }
    if (node.uid, node.gid) != (0, 0) {
        let (uid, gid) = (Uid::from_raw(node.uid), Gid::from_raw(node.gid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(directory, name, Some(uid), Some(gid), flags).context(context)?;
    }
    Ok(())
}

impl Node {
    fn is(&self, stat: &Stat) -> bool {
        FileType::from_raw_mode(stat.st_mode) == self.kind
            && (self.kind == FileType::Fifo || stat.st_rdev == self.number)
    }
}

/// Binds the host's node of the same path.
fn borrow(place: &Place, node: &Node) -> io::Result<()> {
    let tree = Tree::of_path(&node.path, false)?;
    if !node.is(&rustix::fs::fstat(&tree)?) {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "in a user namespace only the host's device of the same path can be used, which is another one",
        ));
    }
    tree.attach(place.make_file()?)
}
