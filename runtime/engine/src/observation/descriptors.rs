//! What a process holds open outside its own mounts: the way out of CVE-2024-21626.
//!
//! What is outside is told by the identity of its mount, which the kernel gives; a name is the container's to choose.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use nix::unistd::Pid;

use super::places::identity_of;
use super::processes::numbers;
use super::{Namespace, Outside, host_mounts, read};

/// How many descriptors are looked at.
const LIMIT: usize = 100_000;

/// How many of those that are outside are told.
const FOUND_LIMIT: usize = 256;

/// How the links of files begin that are in no mount of anybody: memory that is shared by a descriptor or a mapping.
const OF_NO_MOUNT: [&str; 5] = [
    "/memfd:",
    "/dmabuf:",
    "/SYSV",
    "/dev/zero (deleted)",
    "/anon_hugepage",
];

/// What threads share (kcmp(2)).
const KCMP_FILES: libc::c_int = 2;
const KCMP_FS: libc::c_int = 3;

/// What the looking has found so far.
struct Search {
    /// The mounts of the container.
    mounts: BTreeSet<u64>,
    host_mounts: BTreeSet<u64>,
    /// The container's processes, its namespaces, and those of the host.
    processes: Vec<i32>,
    namespaces: BTreeMap<String, Namespace>,
    looked_at: usize,
    found: Vec<Outside>,
}

/// Descriptors, working directories and roots that are in none of a container's mounts, namespaces of the host, and
/// processes that are not its own. `Err`: why not all was looked at.
pub(super) fn outside(
    processes: &[Pid],
    mounts: &str,
    namespaces: &BTreeMap<String, Namespace>,
) -> (Vec<Outside>, Result<(), String>) {
    let mut search = Search {
        mounts: mount_ids(mounts),
        host_mounts: mount_ids(&host_mounts().unwrap_or_default()),
        processes: processes.iter().map(|pid| pid.as_raw()).collect(),
        namespaces: namespaces.clone(),
        looked_at: 0,
        found: Vec::new(),
    };
    let all = processes.iter().try_for_each(|pid| search.process(*pid));
    (search.found, all)
}

fn mount_ids(mounts: &str) -> BTreeSet<u64> {
    let lines = mounts.lines();
    lines
        .filter_map(|line| line.split(' ').next()?.parse().ok())
        .collect()
}

impl Search {
    fn process(&mut self, pid: Pid) -> Result<(), String> {
        let directory = format!("/proc/{pid}");
        let more = self.mounts_of_its_own(&directory);
        let streams = ["0", "1", "2"].map(|number| key(&format!("{directory}/fd/{number}")));
        let streams: Vec<_> = streams.into_iter().flatten().collect();
        for tid in numbers(&format!("{directory}/task")) {
            let is_first = tid == pid.as_raw();
            let task = format!("{directory}/task/{tid}");
            // The first thread of a process may have ended, and has nothing any more then.
            let own = if is_first { &directory } else { &task };
            let is_other = |kind| is_first || !is_shared(pid.as_raw(), tid, kind);
            if is_other(KCMP_FS) {
                for link in ["cwd", "root"] {
                    self.place(format!("{own}/{link}"), &more)?;
                }
            }
            if is_other(KCMP_FILES) {
                self.descriptors(own, &streams, &more)?;
            }
        }
        Ok(())
    }

    /// The mounts of a process that has others than its container, and not the host's.
    fn mounts_of_its_own(&self, directory: &str) -> BTreeSet<u64> {
        use std::os::unix::fs::MetadataExt;
        let id = fs::metadata(format!("{directory}/ns/mnt")).map(|file| file.ino());
        let known = self.namespaces.get("mnt");
        let is_other = |id: u64| known.is_some_and(|one| one.own != id && !one.host.contains(&id));
        if !id.is_ok_and(is_other) {
            return BTreeSet::new();
        }
        read(&format!("{directory}/mountinfo"))
            .map_or_else(|_| BTreeSet::new(), |text| mount_ids(&text))
    }

    fn place(&mut self, link: String, more: &BTreeSet<u64>) -> Result<(), String> {
        match identity_of(&link) {
            Ok(file) if self.is_own(file.stx_mnt_id, more) => Ok(()),
            Ok(_) => {
                self.push(link);
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => Err(error.to_string()),
            // It has ended.
            Err(_) => Ok(()),
        }
    }

    fn is_own(&self, mount: u64, more: &BTreeSet<u64>) -> bool {
        self.mounts.contains(&mount) || more.contains(&mount)
    }

    fn descriptors(
        &mut self,
        directory: &str,
        streams: &[(u64, u64)],
        more: &BTreeSet<u64>,
    ) -> Result<(), String> {
        for number in numbers(&format!("{directory}/fd")) {
            self.looked_at += 1;
            if self.looked_at > LIMIT {
                return Err(format!("more than {LIMIT} descriptors"));
            }
            let at = format!("{directory}/fd/{number}");
            let Ok(target) = fs::read_link(&at) else {
                continue;
            };
            if !target.is_absolute() {
                // `pipe:[7]` and the like are in no file system, and no path has such a name.
                if self.is_of_others(&target, &format!("{directory}/fdinfo/{number}")) {
                    self.push(at);
                }
                continue;
            }
            let file = match identity_of(&at) {
                Ok(file) => file,
                Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {
                    return Err(error.to_string());
                }
                Err(_) => continue,
            };
            if self.is_own(file.stx_mnt_id, more) {
                continue;
            }
            // The standard streams are the caller's to choose, and with them their copies; a directory is no stream.
            let is_directory = u32::from(file.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
            if !is_directory && streams.contains(&(file.stx_mnt_id, file.stx_ino)) {
                continue;
            }
            let name = target.to_string_lossy();
            // The name alone says nothing: a file of the host could have it.
            let is_memory = !self.host_mounts.contains(&file.stx_mnt_id)
                && file.stx_dev_major == 0
                && OF_NO_MOUNT.iter().any(|begin| name.starts_with(begin));
            if !is_memory {
                self.push(at);
            }
        }
        Ok(())
    }

    /// Whether it is a namespace of the host, or a process that is not the container's.
    fn is_of_others(&self, target: &Path, info: &str) -> bool {
        let target = target.to_string_lossy();
        if target == "anon_inode:[pidfd]" {
            let info = read(info).unwrap_or_default();
            let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"));
            let pid = pid.and_then(|pid| pid.trim().parse::<i32>().ok());
            // One that has ended has none.
            return pid.is_some_and(|pid| pid > 0 && !self.processes.contains(&pid));
        }
        // `net:[4026531840]`
        let parts = target
            .strip_suffix(']')
            .and_then(|text| text.split_once(":["));
        parts.is_some_and(|(kind, id)| {
            let known = self.namespaces.get(kind);
            let id = id.parse::<u64>();
            known
                .zip(id.ok())
                .is_some_and(|(known, id)| known.own != id && known.host.contains(&id))
        })
    }

    fn push(&mut self, at: String) {
        if self.found.len() == FOUND_LIMIT {
            return;
        }
        let target = fs::read_link(&at).unwrap_or_default();
        self.found.push(Outside {
            at,
            target: target.to_string_lossy().into_owned(),
        });
    }
}

/// The mount and the inode of what a descriptor leads to.
fn key(at: &str) -> Option<(u64, u64)> {
    let file = identity_of(at).ok()?;
    Some((file.stx_mnt_id, file.stx_ino))
}

/// Whether two threads share their descriptors or their directories; if that is not told, they may not.
fn is_shared(one: i32, other: i32, kind: libc::c_int) -> bool {
    // SAFETY: the call takes numbers alone.
    let answer = unsafe { libc::syscall(libc::SYS_kcmp, one, other, kind, 0, 0) };
    answer == 0
}
