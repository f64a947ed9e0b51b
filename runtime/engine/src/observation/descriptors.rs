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

/// The descriptors, working directories and roots of `processes` that are in none of `mounts`, the text of mountinfo.
///
/// The standard streams are the caller's to choose, and with them their copies.
pub(super) fn outside(processes: &[Pid], mounts: &str) -> Vec<Outside> {
    let ids: BTreeSet<&str> = mounts
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
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
            if mount_id(&info).is_some_and(|id| !ids.contains(id)) {
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
