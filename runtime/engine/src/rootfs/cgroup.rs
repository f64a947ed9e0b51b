//! The container's view of its cgroup: each hierarchy's directory of the container, nothing above it.
//!
//! The directories are bound from the host's hierarchies. In a cgroup namespace of its own a container sees the same as
//! with a mount of the file system; without one it still sees no other cgroup than its own.

use std::io;
use std::path::Path;

use rustix::fs::Mode;

use super::inside::Root;
use super::options::{Attributes, Data};
use super::tree::Tree;
use crate::cgroup::Cgroup;

/// Attributes that the host's own mounts have too.
const SAFE: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// Mounts it; with `unified` only the version 2 hierarchy.
pub(super) fn mount(
    root: &Root,
    destination: &Path,
    cgroup: &Cgroup,
    unified: bool,
    attributes: Attributes,
) -> io::Result<()> {
    let layout = cgroup.layout();
    let legacy = layout.hierarchies().iter().any(|one| !one.is_unified());
    let target = root.make_directory(destination)?;
    // Who has no cgroup sees none: an empty directory.
    if !cgroup.is_none() && (unified || !legacy) {
        let Some(directory) = cgroup.unified() else {
            return Err(io::Error::other(
                "this system has no cgroup version 2 hierarchy",
            ));
        };
        return bind(&directory, attributes)?.attach(&target);
    }
    let mode = [Data::Value("mode".into(), "755".into())];
    let writable = Attributes {
        set: SAFE,
        clear: 0,
    };
    let tree = Tree::of_file_system("tmpfs", Some(Path::new("tmpfs")), &mode, writable)?;
    tree.attach(&target)?;
    for (hierarchy, directory) in layout.hierarchies().iter().zip(cgroup.directories()) {
        let Some(name) = hierarchy.mount.file_name() else {
            continue;
        };
        rustix::fs::mkdirat(&tree, name, Mode::from(0o755))?;
        let place = rustix::fs::openat(
            &tree,
            name,
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        bind(&directory, attributes)?.attach(place)?;
        // Where several controllers share a hierarchy each is found by its own name too.
        for controller in hierarchy.controllers.iter().flatten() {
            if !controller.contains('=') && name != controller.as_str() {
                rustix::fs::symlinkat(name, &tree, controller.as_str())?;
            }
        }
    }
    let finished = Attributes {
        set: attributes.set & libc::MOUNT_ATTR_RDONLY,
        clear: 0,
    };
    tree.set(finished, false)
}

fn bind(directory: &Path, attributes: Attributes) -> io::Result<Tree> {
    let tree = Tree::of_path(directory, false)?;
    tree.set_propagation(nix::mount::MsFlags::MS_PRIVATE)?;
    let wanted = Attributes {
        set: attributes.set | SAFE,
        clear: attributes.clear & !SAFE,
    };
    tree.set(wanted, false)?;
    Ok(tree)
}
