//! A root file system that a client of the shim describes as mounts, mounted on the host before the container is made.
//!
//! The mounts come from the client (a snapshotter's layers), which is as trusted as our caller; nothing of the image is
//! resolved: the target is the caller's own directory.

use std::io;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags};
use oci_spec::runtime::Mount;
use rustix::fs::{Mode, OFlags};

use super::mounts::{LONGEST_VALUE, join};
use super::options::{Bind, Data, IdMap, Options};
use super::tree::Tree;
use crate::error::{Context, Error};

/// Mounts `mount` on `target`, a directory of the host; its `destination` has no meaning.
///
/// # Errors
/// An option cannot be honoured, or what the kernel said.
pub fn mount_on_host(index: usize, mount: &Mount, target: &Path) -> Result<(), Error> {
    let options = Options::parse(index, mount)?;
    if options.id_map != IdMap::No || options.copy_up {
        return Err(Error::unsupported(
            format!("mounts[{index}].options"),
            "a root file system on the host is neither id-mapped nor filled",
        ));
    }
    let kind = mount.typ().as_deref().unwrap_or_default();
    let source = mount.source().as_deref().unwrap_or(Path::new(kind));
    let context = || {
        let (source, target) = (source.display(), target.display());
        format!("cannot mount the root file system {source} ({kind}) on {target}")
    };
    mount_at(&options, kind, source, target).context(context)
}

fn mount_at(options: &Options, kind: &str, source: &Path, target: &Path) -> io::Result<()> {
    let is_long = |one: &Data| matches!(one, Data::Value(_, value) if value.len() > LONGEST_VALUE);
    let tree = if options.bind != Bind::No {
        let tree = Tree::of_path(source, options.bind == Bind::Recursive)?;
        tree.set_propagation(MsFlags::MS_PRIVATE)?;
        tree.set(options.attributes, false)?;
        tree
    } else if let data = one_layer_each(&options.data)
        && !data.iter().any(is_long)
        && let Ok(tree) = Tree::of_file_system(kind, Some(source), &data, options.attributes)
    {
        tree
    } else {
        // A kernel that does not take layers one by one (before Linux 6.7), or something too long for it: as mount(2)
        // has it, which says what is wrong too.
        let data = join(&options.data);
        let flags = MsFlags::empty();
        nix::mount::mount(Some(source), target, Some(kind), flags, Some(data.as_str()))?;
        let mounted = rustix::fs::open(target, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let tree = Tree::from_attached(mounted);
        tree.set(options.attributes, false)?;
        return finish(&tree, options);
    };
    tree.attach_at(target)?;
    finish(&tree, options)
}

/// What holds for a mount that is in place, and for all below it.
fn finish(tree: &Tree, options: &Options) -> io::Result<()> {
    tree.set(options.recursive, true)?;
    options
        .propagation
        .map_or(Ok(()), |flags| tree.set_propagation(flags))
}

/// An overlay's `lowerdir` can be longer than the mount API takes; its parts rarely are.
fn one_layer_each(data: &[Data]) -> Vec<Data> {
    let split = data.iter().flat_map(|one| match one {
        // A backslash hides a colon that is part of a name.
        Data::Value(key, value) if key == "lowerdir" && !value.contains('\\') => value
            .split(':')
            .map(|layer| Data::Value("lowerdir+".into(), layer.into()))
            .collect(),
        other => vec![other.clone()],
    });
    split.collect()
}

/// Unmounts all that is mounted on `target` itself. That nothing is, or that there is no target, is no error.
///
/// # Errors
/// What the kernel said.
pub fn unmount_on_host(target: &Path) -> Result<(), Error> {
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    loop {
        match nix::mount::umount2(target, flags) {
            Ok(()) => {}
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => return Ok(()),
            Err(errno) => {
                return Err(io::Error::from(errno))
                    .context(|| format!("cannot unmount {}", target.display()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_given_one_by_one() {
        let value = |key: &str, value: &str| Data::Value(key.into(), value.into());
        let data = [value("lowerdir", "/a:/b"), value("upperdir", "/c")];
        assert_eq!(
            one_layer_each(&data),
            [
                value("lowerdir+", "/a"),
                value("lowerdir+", "/b"),
                value("upperdir", "/c")
            ]
        );
        let escaped = [value("lowerdir", "/a\\:b:/c")];
        assert_eq!(one_layer_each(&escaped), escaped);
    }
}
