//! What a container could leave behind on the machine: processes, mounts,
//! cgroups and network devices, listed so that two moments can be compared.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The machine's state that containers must give back.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot {
    mounts: BTreeSet<String>,
    cgroups: BTreeSet<String>,
    processes: BTreeSet<String>,
    devices: BTreeSet<String>,
}

impl Snapshot {
    /// Looks at the machine. Processes are those whose command line names `rt`
    /// or a state directory (`marker`); others may come and go as they like.
    pub fn take(marker: &str) -> Self {
        let mut cgroups = BTreeSet::new();
        collect_cgroups(Path::new("/sys/fs/cgroup"), &mut cgroups, 0);
        Self {
            mounts: lines("/proc/self/mountinfo", |line| {
                line.split(' ').nth(4).unwrap_or_default().to_owned()
            }),
            cgroups,
            processes: processes(marker),
            devices: fs::read_dir("/sys/class/net")
                .map(|entries| {
                    entries
                        .filter_map(|entry| {
                            Some(entry.ok()?.file_name().to_string_lossy().into_owned())
                        })
                        .collect()
                })
                .unwrap_or_default(),
        }
    }

    /// What `self` has that `before` had not, a line each.
    pub fn added_since(&self, before: &Self) -> Vec<String> {
        let pairs = [
            ("mount", &self.mounts, &before.mounts),
            ("cgroup", &self.cgroups, &before.cgroups),
            ("process", &self.processes, &before.processes),
            ("network device", &self.devices, &before.devices),
        ];
        pairs
            .into_iter()
            .flat_map(|(kind, now, then)| {
                now.difference(then)
                    .map(move |item| format!("{kind} {item}"))
            })
            .collect()
    }
}

fn lines(path: &str, pick: impl Fn(&str) -> String) -> BTreeSet<String> {
    fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(pick)
        .collect()
}

fn collect_cgroups(dir: &Path, found: &mut BTreeSet<String>, depth: usize) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        if depth < 6 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.insert(entry.path().to_string_lossy().into_owned());
            collect_cgroups(&entry.path(), found, depth + 1);
        }
    }
}

/// What is in a state root: directories of containers, and of those that are being made or removed. The place that the
/// latter pass through, `~pending`, stays, empty.
pub fn state_directories(root: &Path) -> Vec<PathBuf> {
    let entries = |directory: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    };
    let pending = root.join("~pending");
    let mut found = entries(root);
    // What all containers share.
    found.retain(|path| *path != pending && !path.ends_with("~seccomp"));
    found.extend(entries(&pending));
    found
}

fn processes(marker: &str) -> BTreeSet<String> {
    let own = std::process::id().to_string();
    let Ok(entries) = fs::read_dir("/proc") else {
        return BTreeSet::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_string_lossy().into_owned();
            if pid == own || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
                return None;
            }
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            command.contains(marker).then(|| format!("{pid} {command}"))
        })
        .collect()
}
