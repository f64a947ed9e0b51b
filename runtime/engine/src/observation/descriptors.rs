//! What a process holds open outside its own mounts: the way out of CVE-2024-21626.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::unistd::Pid;

use super::{Outside, read};

/// How many descriptors are looked at.
const LIMIT: usize = 100_000;

/// How the links of files begin that are in no mount of anybody: memory that is shared by a descriptor or a mapping.
const OF_NO_MOUNT: [&str; 5] = [
    "/memfd:",
    "/dmabuf:",
    "/SYSV",
    "/dev/zero (deleted)",
    "/anon_hugepage",
];

/// The descriptors, working directories and roots of `processes` that are in none of `mounts`, the text of mountinfo;
/// `host_mounts` is the host's.
///
/// The standard streams are the caller's to choose, and with them their copies.
pub(super) fn outside(processes: &[Pid], mounts: &str, host_mounts: &str) -> Vec<Outside> {
    let ids_of = |mounts| -> BTreeSet<&str> {
        str::lines(mounts)
            .filter_map(|line| line.split(' ').next())
            .collect()
    };
    let (ids, host_ids) = (ids_of(mounts), ids_of(host_mounts));
    let is_root = |line: &str| line.split(' ').nth(4) == Some("/");
    let mut found = Vec::new();
    let mut looked_at = 0;
    for pid in processes {
        let directory = format!("/proc/{pid}");
        if !mounts.lines().any(is_root) {
            // Someone who only called chroot(2) gets out by calling it again.
            push(&mut found, format!("{directory}/root"));
        }
        let cwd = format!("{directory}/cwd");
        if let Ok(id) = mount_of(&cwd)
            && !ids.contains(id.as_str())
        {
            push(&mut found, cwd);
        }
        let Ok(entries) = fs::read_dir(format!("{directory}/fd")) else {
            continue;
        };
        let target = |number: &str| fs::read_link(format!("{directory}/fd/{number}")).ok();
        let standard = ["0", "1", "2"].map(target);
        for entry in entries.flatten() {
            looked_at += 1;
            if looked_at > LIMIT {
                return found;
            }
            let number = entry.file_name().to_string_lossy().into_owned();
            let own = target(&number);
            // `pipe:[7]` and the like are in no file system.
            let is_file = own.as_ref().is_some_and(|own| own.is_absolute());
            if !is_file || standard.contains(&own) {
                continue;
            }
            let info = read(&format!("{directory}/fdinfo/{number}")).unwrap_or_default();
            let Some(id) = mount_id(&info) else {
                continue;
            };
            let is_of_no_mount = |name: &std::path::PathBuf| {
                let name = name.to_string_lossy();
                OF_NO_MOUNT.iter().any(|begin| name.starts_with(begin))
            };
            // The name alone says nothing: a file of the host could have it.
            let is_memory = !host_ids.contains(id) && own.as_ref().is_some_and(is_of_no_mount);
            if !ids.contains(id) && !is_memory {
                push(&mut found, format!("{directory}/fd/{number}"));
            }
        }
    }
    found
}

fn push(found: &mut Vec<Outside>, at: String) {
    let target = fs::read_link(&at).unwrap_or_default();
    found.push(Outside {
        at,
        target: target.to_string_lossy().into_owned(),
    });
}

/// The id of the mount that a link of /proc leads to. The link itself is opened, which asks nobody.
fn mount_of(link: &str) -> io::Result<String> {
    let file: File = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(link)?;
    let info = read(&format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let id = mount_id(&info).ok_or(io::ErrorKind::InvalidData)?;
    Ok(id.to_owned())
}

/// proc(5), /proc/pid/fdinfo.
fn mount_id(info: &str) -> Option<&str> {
    info.lines()
        .find_map(|line| line.strip_prefix("mnt_id:"))
        .map(str::trim)
}
