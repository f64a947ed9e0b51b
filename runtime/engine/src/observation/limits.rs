//! The limits and device rules of a process's cgroups, as they are in force.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use oci_spec::runtime::Spec;

use super::{Limits, read};
use crate::cgroup::{Layout, allowed_devices, memory_bound};

/// How many cgroups below one are looked into.
const DIRECTORY_LIMIT: usize = 4096;

/// The files of limits that have a name of their own, of both versions.
const FILES: [&str; 22] = [
    "blkio.bfq.weight",
    "blkio.throttle.read_bps_device",
    "blkio.throttle.read_iops_device",
    "blkio.throttle.write_bps_device",
    "blkio.throttle.write_iops_device",
    "blkio.weight",
    "cpu.cfs_burst_us",
    "cpu.idle",
    "cpu.max.burst",
    "cpu.rt_runtime_us",
    "cpu.shares",
    "cpu.weight",
    "io.bfq.weight",
    "io.max",
    "io.weight",
    "memory.kmem.tcp.limit_in_bytes",
    "memory.low",
    "memory.oom_control",
    "memory.soft_limit_in_bytes",
    "net_cls.classid",
    "net_prio.ifpriomap",
    "rdma.max",
];

/// How many files of limits are read.
const FILE_LIMIT: usize = 256;

/// The directories of a process's cgroups.
pub(super) struct Cgroups {
    /// Controllers, none for version 2; the hierarchy's mount; the cgroup.
    all: Vec<(Vec<String>, PathBuf, PathBuf)>,
}

impl Cgroups {
    /// Those in the text of /proc/pid/cgroup.
    pub(super) fn of(text: &str) -> Self {
        let layout = Layout::of_system()
            .map(|layout| layout.hierarchies())
            .unwrap_or_default();
        let find = |line: &str| {
            // cgroups(7): `number:controllers:path`.
            let (_, rest) = line.split_once(':')?;
            let (names, path) = rest.split_once(':')?;
            let names: Vec<String> = names
                .split(',')
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
                .collect();
            let hierarchy = layout.iter().find(|one| match names.first() {
                None => one.is_unified(),
                Some(name) => one.has(name),
            })?;
            let path = Path::new(path.trim_start_matches('/'));
            let is_below = path
                .components()
                .all(|one| matches!(one, std::path::Component::Normal(_)));
            is_below.then(|| (names, hierarchy.mount.clone(), hierarchy.mount.join(path)))
        };
        Self {
            all: text.lines().filter_map(find).collect(),
        }
    }

    fn v1(&self, controller: &str) -> Option<(&Path, &Path)> {
        let found = self
            .all
            .iter()
            .find(|(names, ..)| names.iter().any(|name| name == controller));
        found.map(|(_, mount, cgroup)| (mount.as_path(), cgroup.as_path()))
    }

    fn v2(&self) -> Option<(&Path, &Path)> {
        let found = self.all.iter().find(|(names, ..)| names.is_empty());
        found.map(|(_, mount, cgroup)| (mount.as_path(), cgroup.as_path()))
    }

    /// Whether the freezer of version 1 holds the process: a tracer would wait until it is thawed.
    pub(super) fn are_frozen_by_v1(&self) -> bool {
        let state = self
            .v1("freezer")
            .map(|(_, cgroup)| fs::read_to_string(cgroup.join("freezer.state")));
        state.is_some_and(|state| state.is_ok_and(|state| state.trim() != "THAWED"))
    }

    pub(super) fn limits(&self) -> Limits {
        Limits {
            memory: self.least("memory", "memory.limit_in_bytes", "memory.max", |text| {
                memory_bound(text.parse().ok()?)
            }),
            pids: self.least("pids", "pids.max", "pids.max", |text| text.parse().ok()),
            cpu: self.processors(),
            memory_and_swap: self.memory_and_swap(),
            cpus: self.cpuset("cpus"),
            mems: self.cpuset("mems"),
        }
    }

    fn memory_and_swap(&self) -> Option<u64> {
        let memory = self.least("memory", "memory.limit_in_bytes", "memory.max", |text| {
            memory_bound(text.parse().ok()?)
        });
        let (v1_file, v2_file) = ("memory.memsw.limit_in_bytes", "memory.swap.max");
        let (file, (_, cgroup)) = match self.v1("memory") {
            Some(found) => (v1_file, found),
            None => (v2_file, self.v2()?),
        };
        // A kernel without swap space does not count it. The first line has the names of the columns.
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        if !cgroup.join(file).exists() && swaps.lines().count() < 2 {
            return memory;
        }
        let found = self.least("memory", v1_file, v2_file, |text| {
            memory_bound(text.parse().ok()?)
        })?;
        match self.v1("memory") {
            Some(_) => Some(found),
            None => Some(memory?.saturating_add(found)),
        }
    }

    /// The processors, or nodes of memory, in the kernel's form of a list.
    fn cpuset(&self, of: &str) -> Option<String> {
        let (file, cgroup) = match self.v1("cpuset") {
            Some((_, cgroup)) => (format!("cpuset.{of}"), cgroup),
            None => (format!("cpuset.{of}.effective"), self.v2()?.1),
        };
        let text = fs::read_to_string(cgroup.join(file)).ok()?;
        Some(text.trim().to_owned())
    }

    /// The processes of the cgroup, and of those below it, in one hierarchy; none if that is its root or ours. `Err`: why
    /// there may be more.
    pub(super) fn processes(&self, ours: &Self) -> (Vec<Pid>, Result<(), String>) {
        let is_of_its_own = |(_, mount, cgroup): &&(Vec<String>, PathBuf, PathBuf)| {
            cgroup != mount && ours.all.iter().all(|(_, _, one)| !one.starts_with(cgroup))
        };
        let Some((_, _, cgroup)) = self.all.iter().find(is_of_its_own) else {
            return (Vec::new(), Ok(()));
        };
        processes_below(cgroup, DIRECTORY_LIMIT)
    }

    /// The files that have the limits which `spec` asks for beside those in [`Limits`]: what each says in the cgroup, and
    /// in those above it.
    pub(super) fn files(&self, spec: &Spec) -> BTreeMap<String, Vec<String>> {
        let mut found = BTreeMap::new();
        for name in file_names(spec) {
            let controller = name.split('.').next().unwrap_or_default();
            let Some((mount, cgroup)) = self.v1(controller).or_else(|| self.v2()) else {
                continue;
            };
            let texts: Vec<String> = above(mount, cgroup)
                .filter_map(|directory| read(&directory.join(&name).to_string_lossy()).ok())
                .collect();
            if !texts.is_empty() {
                found.insert(name, texts);
            }
        }
        found
    }

    fn processors(&self) -> Option<u64> {
        let share = |quota: &str, period: &str| {
            let quota: u64 = quota.parse().ok()?;
            let period: u64 = period.parse().ok()?;
            quota.saturating_mul(1000).checked_div(period)
        };
        match self.v1("cpu") {
            Some((mount, cgroup)) => least(mount, cgroup, |directory| {
                let file = |name: &str| fs::read_to_string(directory.join(name)).ok();
                share(
                    file("cpu.cfs_quota_us")?.trim(),
                    file("cpu.cfs_period_us")?.trim(),
                )
            }),
            None => {
                let (mount, cgroup) = self.v2()?;
                least(mount, cgroup, |directory| {
                    let text = fs::read_to_string(directory.join("cpu.max")).ok()?;
                    let (quota, period) = text.trim().split_once(' ')?;
                    share(quota, period)
                })
            }
        }
    }

    fn least(
        &self,
        controller: &str,
        v1_file: &str,
        v2_file: &str,
        parse: impl Fn(&str) -> Option<u64>,
    ) -> Option<u64> {
        let (file, (mount, cgroup)) = match self.v1(controller) {
            Some(found) => (v1_file, found),
            None => (v2_file, self.v2()?),
        };
        least(mount, cgroup, |directory| {
            parse(fs::read_to_string(directory.join(file)).ok()?.trim())
        })
    }

    pub(super) fn devices(&self) -> Result<Vec<String>, String> {
        if let Some((_, cgroup)) = self.v1("devices") {
            let path = cgroup.join("devices.list");
            let text = fs::read_to_string(&path)
                .map_err(|error| format!("read {}: {error}", path.display()))?;
            return Ok(text.lines().map(str::to_owned).collect());
        }
        let Some((_, cgroup)) = self.v2() else {
            return Err("it is in no cgroup that has device rules".to_owned());
        };
        allowed_devices(cgroup).map_err(|error| crate::error_chain(&error))
    }
}

/// The least limit of a cgroup and those above it.
fn least(mount: &Path, cgroup: &Path, limit: impl Fn(&Path) -> Option<u64>) -> Option<u64> {
    above(mount, cgroup).filter_map(limit).min()
}

/// A cgroup and those above it.
fn above<'a>(mount: &'a Path, cgroup: &'a Path) -> impl Iterator<Item = &'a Path> {
    let all = cgroup.ancestors();
    all.take_while(move |directory| directory.starts_with(mount))
}

/// The processes of a cgroup, and of those below it. `Err`: there are more than `limit`.
fn processes_below(cgroup: &Path, limit: usize) -> (Vec<Pid>, Result<(), String>) {
    let mut found = Vec::new();
    let mut left = vec![cgroup.to_owned()];
    let mut known = 1;
    while let Some(directory) = left.pop() {
        let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        let pids = text.lines().filter_map(|line| line.parse().ok());
        found.extend(pids.filter(|pid| *pid > 0).map(Pid::from_raw));
        let below = fs::read_dir(directory).into_iter().flatten().flatten();
        for entry in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if known == limit {
                return (found, Err(format!("more than {limit} cgroups")));
            }
            known += 1;
            left.push(entry.path());
        }
    }
    (found, Ok(()))
}

/// The files of both versions that have what `spec` asks for.
fn file_names(spec: &Spec) -> Vec<String> {
    let linux = spec.linux().as_ref();
    let Some(resources) = linux.and_then(|linux| linux.resources().as_ref()) else {
        return Vec::new();
    };
    let huge = resources.hugepage_limits().iter().flatten();
    let huge = huge.flat_map(|one| {
        let size = one.page_size();
        ["limit_in_bytes", "max"].map(|file| format!("hugetlb.{size}.{file}"))
    });
    let unified = resources.unified().iter().flatten();
    let unified = unified.map(|(name, _)| name.clone());
    let all = FILES.into_iter().map(str::to_owned);
    all.chain(huge)
        .chain(unified)
        .filter(|name| !name.contains('/') && name.contains('.') && !name.starts_with('.'))
        .take(FILE_LIMIT)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_cgroups_than_are_looked_into_are_told() {
        let directory = tempfile::tempdir().unwrap();
        for (name, pid) in [("", "1\n"), ("a", "2\n0\n"), ("a/b", "3\n"), ("c", "4\n")] {
            let cgroup = directory.path().join(name);
            fs::create_dir_all(&cgroup).unwrap();
            fs::write(cgroup.join("cgroup.procs"), pid).unwrap();
        }
        let (mut found, all) = processes_below(directory.path(), 4);
        found.sort_unstable();
        assert_eq!(found, [1, 2, 3, 4].map(Pid::from_raw));
        assert_eq!(all, Ok(()));
        let (_, all) = processes_below(directory.path(), 3);
        assert_eq!(all, Err("more than 3 cgroups".to_owned()));
    }

    #[test]
    fn no_name_of_a_file_leads_out_of_the_cgroup() {
        let spec = serde_json::json!({
            "ociVersion": "1.2.0",
            "linux": {"resources": {
                "unified": {"memory.high": "1", "../x": "1", "..": "1", "a/../../b.c": "1"},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 1}, {"pageSize": "/../../x", "limit": 1}]
            }}
        });
        let names = file_names(&serde_json::from_value(spec).unwrap());
        let others: Vec<&str> = names
            .iter()
            .map(String::as_str)
            .filter(|name| !FILES.contains(name))
            .collect();
        assert_eq!(
            others,
            [
                "hugetlb.2MB.limit_in_bytes",
                "hugetlb.2MB.max",
                "memory.high"
            ]
        );
    }
}
