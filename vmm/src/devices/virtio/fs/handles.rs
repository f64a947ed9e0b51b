//! Whether files may be known by their handles: only where a handle outlives the kernel's caches.
//!
//! A FUSE file system (virtio-fs, fuse-overlayfs, sshfs) makes handles of numbers that its server
//! gives out anew once the kernel has forgotten a file: the same handle then opens another file,
//! or none. FAT has the like. A descriptor lasts everywhere, because it keeps the file known.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

/// File systems whose handles name one file for good, or that have no handles: the server keeps a
/// descriptor of each file that has none. (An overlay has them with `nfs_export` only.)
const LASTING: &[&str] = &[
    "bcachefs", "btrfs", "cgroup", "cgroup2", "devpts", "devtmpfs", "erofs", "ext2", "ext3",
    "ext4", "f2fs", "mqueue", "overlay", "proc", "squashfs", "sysfs", "tmpfs", "xfs", "zfs",
];

/// The type of a file system at or below the directory `root` whose handles may not last.
///
/// # Errors
/// /proc cannot be read, or does not know the mount of `root`.
pub(super) fn unreliable(root: &File) -> io::Result<Option<String>> {
    let descriptor = root.as_raw_fd();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}"))?;
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    let mount = mount.ok_or(io::ErrorKind::InvalidData)?.trim();
    let path = fs::read_link(format!("/proc/self/fd/{descriptor}"))?;
    let mounts = fs::read("/proc/self/mountinfo")?;
    find_unreliable(
        &String::from_utf8_lossy(&mounts),
        mount,
        &path.to_string_lossy(),
    )
}

/// [`unreliable`] by the text of `proc_pid_mountinfo(5)`, the id of the root's mount and its path.
fn find_unreliable(mounts: &str, mount: &str, path: &str) -> io::Result<Option<String>> {
    let below = format!("{}/", escaped(path.trim_end_matches('/')));
    let mut known = false;
    for line in mounts.lines() {
        let mut fields = line.split(' ');
        let is_root = fields.next() == Some(mount);
        let is_below = fields.nth(3).is_some_and(|at| at.starts_with(&below));
        known |= is_root;
        if !is_root && !is_below {
            continue;
        }
        // The number of optional fields before the dash varies.
        let kind = fields.skip_while(|&field| field != "-").nth(1);
        let kind = kind.ok_or(io::ErrorKind::InvalidData)?;
        if !LASTING.contains(&kind) {
            return Ok(Some(kind.to_owned()));
        }
    }
    if known {
        Ok(None)
    } else {
        Err(io::ErrorKind::NotFound.into())
    }
}

/// A path as mountinfo writes it.
fn escaped(path: &str) -> String {
    let mut text = String::with_capacity(path.len());
    for character in path.chars() {
        match character {
            ' ' => text.push_str("\\040"),
            '\t' => text.push_str("\\011"),
            '\n' => text.push_str("\\012"),
            '\\' => text.push_str("\\134"),
            _ => text.push(character),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 21 0:40 / /srv/a\\040b rw master:2 propagate_from:3 - tmpfs rt rw
31 30 0:41 /c /srv/a\\040b/rootfs/c rw - fuse.fuse-overlayfs fuse-overlayfs rw
32 21 0:42 / /srv/image rw - virtiofs host rw
33 21 0:43 / /srv/plain rw shared:4 - tmpfs t rw
34 33 0:44 / /srv/plain/proc rw - proc proc rw
35 33 0:45 / /srv/plain/stick rw - vfat /dev/sdb1 rw
";

    fn find(mount: &str, path: &str) -> Option<String> {
        find_unreliable(MOUNTS, mount, path).unwrap()
    }

    #[test]
    fn handles_are_not_believed_where_a_server_numbers_the_files() {
        assert_eq!(find("32", "/srv/image/x").as_deref(), Some("virtiofs"));
        // The share is a tmpfs; what is bound below it counts.
        let below = find("30", "/srv/a b");
        assert_eq!(below.as_deref(), Some("fuse.fuse-overlayfs"));
        assert_eq!(find("33", "/srv/plain").as_deref(), Some("vfat"));
    }

    #[test]
    fn handles_are_believed_where_they_last() {
        assert_eq!(find("21", "/home"), None);
        assert_eq!(find("34", "/srv/plain/proc"), None);
        // A neighbour by its name is not below.
        assert_eq!(find("21", "/srv/im"), None);
        // Only what the root's path covers counts: the whole machine here.
        assert_eq!(find("21", "/").as_deref(), Some("fuse.fuse-overlayfs"));
    }

    #[test]
    fn an_unknown_mount_is_no_reason_to_believe() {
        assert!(find_unreliable(MOUNTS, "99", "/home").is_err());
        assert!(find_unreliable("21 1 8:1 / / rw", "21", "/home").is_err());
    }

    #[test]
    fn the_kernel_knows_the_mount_of_an_open_directory() {
        let root = File::open("/proc").unwrap();
        assert!(unreliable(&root).is_ok());
    }
}
