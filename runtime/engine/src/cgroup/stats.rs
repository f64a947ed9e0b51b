//! What a cgroup has used, in the same terms for versions 1 and 2.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Cgroup, Error, Result};

/// What a cgroup has used since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Processor time.
    pub cpu: Cpu,
    /// Memory.
    pub memory: Memory,
    /// Processes and threads.
    pub pids: Pids,
}

/// Processor time of a cgroup, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// All of it.
    pub total: u64,
    /// In user mode.
    pub user: u64,
    /// In the kernel.
    pub system: u64,
    /// What `linux.resources.cpu.quota` held back.
    pub throttling: Throttling,
}

/// How often a quota held the cgroup back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Throttling {
    /// Periods in which the cgroup ran.
    pub periods: u64,
    /// Periods in which it was held back.
    pub throttled_periods: u64,
    /// For how long, in nanoseconds.
    pub throttled_time: u64,
}

/// Memory of a cgroup, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// In use now.
    pub usage: u64,
    /// The most that was in use, where the kernel keeps it.
    pub peak: Option<u64>,
    /// The limit; `None` is no limit.
    pub limit: Option<u64>,
    /// Swap in use now.
    pub swap: u64,
    /// How often the limit was reached.
    pub failures: u64,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
    /// The kernel's own breakdown (`memory.stat`).
    pub stat: BTreeMap<String, u64>,
}

/// Processes and threads of a cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pids {
    /// There are now.
    pub current: u64,
    /// The limit; `None` is no limit.
    pub limit: Option<u64>,
}

/// A file of `name value` lines.
fn table(path: &Path) -> BTreeMap<String, u64> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

/// A file of one number; `None` if the controller is not there or the value is `max`.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Version 1 shows "no limit" as the largest number of pages.
fn limit_v1(path: &Path) -> Option<u64> {
    number(path).filter(|value| *value < (i64::MAX as u64 & !0xffff))
}

fn read_cpu_v1(cgroup: &Cgroup) -> Cpu {
    let mut cpu = Cpu::default();
    if let Some(directory) = cgroup.v1("cpuacct") {
        cpu.total = number(&directory.join("cpuacct.usage")).unwrap_or_default();
        cpu.user = number(&directory.join("cpuacct.usage_user")).unwrap_or_default();
        cpu.system = number(&directory.join("cpuacct.usage_sys")).unwrap_or_default();
    }
    if let Some(directory) = cgroup.v1("cpu") {
        let stat = table(&directory.join("cpu.stat"));
        let of = |name: &str| stat.get(name).copied().unwrap_or_default();
        cpu.throttling = Throttling {
            periods: of("nr_periods"),
            throttled_periods: of("nr_throttled"),
            throttled_time: of("throttled_time"),
        };
    }
    cpu
}

fn read_cpu_v2(directory: &Path) -> Cpu {
    let stat = table(&directory.join("cpu.stat"));
    let of = |name: &str| stat.get(name).copied().unwrap_or_default();
    Cpu {
        total: of("usage_usec").saturating_mul(1000),
        user: of("user_usec").saturating_mul(1000),
        system: of("system_usec").saturating_mul(1000),
        throttling: Throttling {
            periods: of("nr_periods"),
            throttled_periods: of("nr_throttled"),
            throttled_time: of("throttled_usec").saturating_mul(1000),
        },
    }
}

fn read_memory_v1(directory: &Path) -> Memory {
    let usage = number(&directory.join("memory.usage_in_bytes")).unwrap_or_default();
    let with_swap = number(&directory.join("memory.memsw.usage_in_bytes")).unwrap_or(usage);
    Memory {
        usage,
        peak: number(&directory.join("memory.max_usage_in_bytes")),
        limit: limit_v1(&directory.join("memory.limit_in_bytes")),
        swap: with_swap.saturating_sub(usage),
        failures: number(&directory.join("memory.failcnt")).unwrap_or_default(),
        oom_kills: oom_kills_in(&directory.join("memory.oom_control")),
        stat: table(&directory.join("memory.stat")),
    }
}

fn read_memory_v2(directory: &Path) -> Memory {
    let events = table(&directory.join("memory.events"));
    Memory {
        usage: number(&directory.join("memory.current")).unwrap_or_default(),
        peak: number(&directory.join("memory.peak")),
        limit: number(&directory.join("memory.max")),
        swap: number(&directory.join("memory.swap.current")).unwrap_or_default(),
        failures: events.get("max").copied().unwrap_or_default(),
        oom_kills: events.get("oom_kill").copied().unwrap_or_default(),
        stat: table(&directory.join("memory.stat")),
    }
}

fn oom_kills_in(path: &Path) -> u64 {
    table(path).get("oom_kill").copied().unwrap_or_default()
}

pub(super) fn oom_kills(cgroup: &Cgroup) -> Result<u64> {
    let path = match (cgroup.v1("memory"), cgroup.unified()) {
        (Some(directory), _) => directory.join("memory.oom_control"),
        (None, Some(directory)) => directory.join("memory.events"),
        (None, None) => return Ok(0),
    };
    match super::read(&path) {
        Ok(_) => Ok(oom_kills_in(&path)),
        // Without the controller nothing can have been killed by it.
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

pub(super) fn read(cgroup: &Cgroup) -> Result<Stats> {
    let mut stats = Stats::default();
    let unified = cgroup.unified();
    let v1 = cgroup
        .layout
        .hierarchies()
        .iter()
        .any(|one| !one.is_unified());
    if v1 {
        stats.cpu = read_cpu_v1(cgroup);
    } else if let Some(directory) = &unified {
        stats.cpu = read_cpu_v2(directory);
    }
    if let Some(directory) = cgroup.v1("memory") {
        stats.memory = read_memory_v1(&directory);
    } else if let Some(directory) = &unified {
        stats.memory = read_memory_v2(directory);
    }
    if let Some(directory) = cgroup.v1("pids").or(unified) {
        stats.pids = Pids {
            current: number(&directory.join("pids.current")).unwrap_or_default(),
            limit: number(&directory.join("pids.max")),
        };
    }
    Ok(stats)
}
