//! What a cgroup has used, in the same terms for versions 1 and 2.
//!
//! The files are the kernel's. One that is not there belongs to a controller that is not there: its figures stay at
//! nothing, so that half a cgroup still has the other half's statistics.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Cgroup, Error, Result};

/// What a cgroup has used since it was made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Processor time.
    pub cpu: Cpu,
    /// The processors and memory nodes it may use; version 1 alone.
    pub cpuset: Option<Cpuset>,
    /// Memory.
    pub memory: Memory,
    /// Processes and threads.
    pub pids: Pids,
    /// Input and output of block devices.
    pub block: Block,
    /// Huge pages, by size as in `2MB`.
    pub huge_pages: BTreeMap<String, HugePages>,
}

/// Processor time of a cgroup, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// All of it.
    pub total: u64,
    /// In user mode.
    pub user: u64,
    /// In the kernel.
    pub system: u64,
    /// All of it, by processor; version 1 alone, as the two below.
    pub total_by_cpu: Vec<u64>,
    /// In user mode, by processor.
    pub user_by_cpu: Vec<u64>,
    /// In the kernel, by processor.
    pub system_by_cpu: Vec<u64>,
    /// What `linux.resources.cpu.quota` held back.
    pub throttling: Throttling,
    /// How long its tasks waited for a processor.
    pub pressure: Option<Pressure>,
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

/// The cpuset controller's settings of version 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpuset {
    /// Processors.
    pub cpus: Vec<u16>,
    /// Memory nodes.
    pub mems: Vec<u16>,
    /// The numbers in its other files, by name without `cpuset.`
    pub settings: BTreeMap<String, i64>,
}

/// A limit of memory in bytes, if it is one: version 1 writes none as the largest number of pages.
#[must_use]
pub fn memory_bound(limit: u64) -> Option<u64> {
    (limit < 1 << 62).then_some(limit)
}

/// Use of one kind of memory, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryUse {
    /// In use now.
    pub usage: u64,
    /// The most that was in use, where the kernel keeps it.
    pub peak: Option<u64>,
    /// The limit; `None` is no limit.
    pub limit: Option<u64>,
    /// How often the limit was reached.
    pub failures: u64,
}

/// Memory of a cgroup.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// All but swap.
    #[serde(flatten)]
    pub main: MemoryUse,
    /// With swap; `None` where swap is not counted.
    pub with_swap: Option<MemoryUse>,
    /// The kernel's part; version 1 alone.
    pub kernel: Option<MemoryUse>,
    /// The TCP buffers' part; version 1 alone.
    pub kernel_tcp: Option<MemoryUse>,
    /// Swap in use now, in bytes.
    pub swap: u64,
    /// Cached files, in bytes.
    pub cache: u64,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
    /// The kernel's own breakdown (`memory.stat`).
    pub stat: BTreeMap<String, u64>,
    /// How long its tasks waited for memory.
    pub pressure: Option<Pressure>,
}

/// Processes and threads of a cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pids {
    /// There are now.
    pub current: u64,
    /// The limit; `None` is no limit.
    pub limit: Option<u64>,
}

/// Input and output of block devices.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Block {
    /// Bytes.
    pub bytes: Vec<BlockCount>,
    /// Requests.
    pub requests: Vec<BlockCount>,
    /// How long its tasks waited for devices.
    pub pressure: Option<Pressure>,
}

/// A figure of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockCount {
    /// The device's major number.
    pub major: u64,
    /// The device's minor number.
    pub minor: u64,
    /// `Read`, `Write`, and with version 1 also `Sync`, `Async`, `Discard` and `Total`.
    pub operation: String,
    /// The figure.
    pub value: u64,
}

/// Huge pages of one size, in bytes; those reserved count where the kernel counts them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugePages {
    /// In use now.
    pub usage: u64,
    /// The most that was in use, where the kernel keeps it.
    pub peak: Option<u64>,
    /// How often the limit was reached.
    pub failures: u64,
}

/// Pressure stall information: how long tasks waited for a resource. Version 2 alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pressure {
    /// At least one task waited.
    pub some: Stall,
    /// Every task waited.
    pub full: Stall,
}

/// Parts of the time, in percent, and its sum.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stall {
    /// Of the last 10 seconds.
    pub avg10: f64,
    /// Of the last minute.
    pub avg60: f64,
    /// Of the last 5 minutes.
    pub avg300: f64,
    /// The sum, in microseconds.
    pub total: u64,
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

/// A file of numbers in one line.
fn numbers(path: &Path) -> Vec<u64> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_ascii_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect()
}

/// Version 1 shows "no limit" as the largest number of pages.
fn limit_v1(path: &Path) -> Option<u64> {
    number(path).filter(|value| *value < (i64::MAX as u64 & !0xffff))
}

/// The numbers of a list such as `0-2,7`.
fn parse_list(text: &str) -> Vec<u16> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same for `full`.
fn parse_pressure(text: &str) -> Option<Pressure> {
    let stall = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let of = |key: &str| {
            line.split_ascii_whitespace()
                .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        };
        Some(Stall {
            avg10: of("avg10")?.parse().ok()?,
            avg60: of("avg60")?.parse().ok()?,
            avg300: of("avg300")?.parse().ok()?,
            total: of("total")?.parse().ok()?,
        })
    };
    Some(Pressure {
        some: stall("some ")?,
        // Older kernels have no such line for the processors.
        full: stall("full ").unwrap_or_default(),
    })
}

fn pressure(path: &Path) -> Option<Pressure> {
    // EOPNOTSUPP where pressure is not counted.
    parse_pressure(&fs::read_to_string(path).ok()?)
}

fn read_cpu_v1(cgroup: &Cgroup) -> Cpu {
    let mut cpu = Cpu::default();
    if let Some(directory) = cgroup.v1("cpuacct") {
        cpu.total = number(&directory.join("cpuacct.usage")).unwrap_or_default();
        cpu.user = number(&directory.join("cpuacct.usage_user")).unwrap_or_default();
        cpu.system = number(&directory.join("cpuacct.usage_sys")).unwrap_or_default();
        cpu.total_by_cpu = numbers(&directory.join("cpuacct.usage_percpu"));
        cpu.user_by_cpu = numbers(&directory.join("cpuacct.usage_percpu_user"));
        cpu.system_by_cpu = numbers(&directory.join("cpuacct.usage_percpu_sys"));
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
        pressure: pressure(&directory.join("cpu.pressure")),
        ..Cpu::default()
    }
}

fn read_cpuset(directory: &Path) -> Cpuset {
    let list =
        |file: &str| parse_list(&fs::read_to_string(directory.join(file)).unwrap_or_default());
    let setting = |name: &str| {
        let text = fs::read_to_string(directory.join(format!("cpuset.{name}"))).ok()?;
        Some((name.to_owned(), text.trim().parse().ok()?))
    };
    Cpuset {
        cpus: list("cpuset.cpus"),
        mems: list("cpuset.mems"),
        settings: [
            "cpu_exclusive",
            "mem_hardwall",
            "mem_exclusive",
            "memory_migrate",
            "memory_spread_page",
            "memory_spread_slab",
            "memory_pressure",
            "sched_load_balance",
            "sched_relax_domain_level",
        ]
        .into_iter()
        .filter_map(setting)
        .collect(),
    }
}

fn read_memory_v1(directory: &Path) -> Memory {
    let read = |prefix: &str| {
        let path = |file: &str| directory.join(format!("{prefix}.{file}"));
        Some(MemoryUse {
            usage: number(&path("usage_in_bytes"))?,
            peak: number(&path("max_usage_in_bytes")),
            limit: limit_v1(&path("limit_in_bytes")),
            failures: number(&path("failcnt")).unwrap_or_default(),
        })
    };
    let stat = table(&directory.join("memory.stat"));
    let of = |name: &str| stat.get(name).copied().unwrap_or_default();
    Memory {
        main: read("memory").unwrap_or_default(),
        with_swap: read("memory.memsw"),
        kernel: read("memory.kmem"),
        kernel_tcp: read("memory.kmem.tcp"),
        swap: of("total_swap"),
        cache: of("cache"),
        oom_kills: oom_kills_in(&directory.join("memory.oom_control")),
        pressure: None,
        stat,
    }
}

fn read_memory_v2(directory: &Path) -> Memory {
    let events = table(&directory.join("memory.events"));
    let event = |name: &str| events.get(name).copied().unwrap_or_default();
    let main = MemoryUse {
        usage: number(&directory.join("memory.current")).unwrap_or_default(),
        peak: number(&directory.join("memory.peak")),
        limit: number(&directory.join("memory.max")),
        failures: event("max"),
    };
    let swap = number(&directory.join("memory.swap.current"));
    let swap_limit = number(&directory.join("memory.swap.max"));
    let stat = table(&directory.join("memory.stat"));
    Memory {
        // What version 1 counts together.
        with_swap: swap.map(|swap| MemoryUse {
            usage: main.usage.saturating_add(swap),
            peak: None,
            limit: main
                .limit
                .zip(swap_limit)
                .map(|(memory, swap)| memory.saturating_add(swap)),
            failures: 0,
        }),
        kernel: None,
        kernel_tcp: None,
        swap: swap.unwrap_or_default(),
        cache: stat.get("file").copied().unwrap_or_default(),
        oom_kills: event("oom_kill"),
        pressure: pressure(&directory.join("memory.pressure")),
        main,
        stat,
    }
}

/// `8:0 Read 4096`, and a sum in the end that has no device.
fn parse_block_v1(text: &str) -> Vec<BlockCount> {
    let entry = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        Some(BlockCount {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            operation: words.next()?.to_owned(),
            value: words.next()?.parse().ok()?,
        })
    };
    text.lines().filter_map(entry).collect()
}

/// `8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0`; the wanted keys have the unit `bytes` or `ios`.
fn parse_block_v2(text: &str, unit: &str) -> Vec<BlockCount> {
    let mut counts = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let device = words.next().and_then(|device| device.split_once(':'));
        let Some((Ok(major), Ok(minor))) =
            device.map(|(major, minor)| (major.parse(), minor.parse()))
        else {
            continue;
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let operation = match key.strip_suffix(unit) {
                Some("r") => "Read",
                Some("w") => "Write",
                _ => continue,
            };
            if let Ok(value) = value.parse() {
                counts.push(BlockCount {
                    major,
                    minor,
                    operation: operation.to_owned(),
                    value,
                });
            }
        }
    }
    counts
}

fn read_block_v1(directory: &Path) -> Block {
    // The I/O scheduler that has weights counts too, where it is in use.
    let read = |file: &str| {
        ["blkio.bfq", "blkio.throttle"]
            .into_iter()
            .map(|prefix| directory.join(format!("{prefix}.{file}_recursive")))
            .map(|path| parse_block_v1(&fs::read_to_string(path).unwrap_or_default()))
            .find(|counts| !counts.is_empty())
            .unwrap_or_default()
    };
    Block {
        bytes: read("io_service_bytes"),
        requests: read("io_serviced"),
        pressure: None,
    }
}

fn read_block_v2(directory: &Path) -> Block {
    let text = fs::read_to_string(directory.join("io.stat")).unwrap_or_default();
    Block {
        bytes: parse_block_v2(&text, "bytes"),
        requests: parse_block_v2(&text, "ios"),
        pressure: pressure(&directory.join("io.pressure")),
    }
}

fn read_huge_pages(directory: &Path, unified: bool) -> BTreeMap<String, HugePages> {
    let usage = if unified { "current" } else { "usage_in_bytes" };
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let sizes = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(usage)?;
        Some(size.strip_suffix('.')?.to_owned())
    });
    let read = |size: String| {
        // A pool's page is spent when it is reserved (Linux 5.7).
        let reserved = size.strip_suffix(".rsvd")?;
        let path = |file: &str| directory.join(format!("hugetlb.{size}.{file}"));
        let failures = if unified {
            let events = table(&directory.join(format!("hugetlb.{reserved}.events")));
            events.get("max").copied()
        } else {
            number(&path("failcnt"))
        };
        let pages = HugePages {
            usage: number(&path(usage)).unwrap_or_default(),
            peak: number(&path("max_usage_in_bytes")),
            failures: failures.unwrap_or_default(),
        };
        Some((reserved.to_owned(), pages))
    };
    sizes.filter_map(read).collect()
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
    stats.cpuset = cgroup.v1("cpuset").map(|directory| read_cpuset(&directory));
    if let Some(directory) = cgroup.v1("memory") {
        stats.memory = read_memory_v1(&directory);
    } else if let Some(directory) = &unified {
        stats.memory = read_memory_v2(directory);
    }
    if let Some(directory) = cgroup.v1("blkio") {
        stats.block = read_block_v1(&directory);
    } else if let Some(directory) = &unified {
        stats.block = read_block_v2(directory);
    }
    if let Some(directory) = cgroup.v1("hugetlb") {
        stats.huge_pages = read_huge_pages(&directory, false);
    } else if let Some(directory) = &unified {
        stats.huge_pages = read_huge_pages(directory, true);
    }
    if let Some(directory) = cgroup.v1("pids").or(unified) {
        stats.pids = Pids {
            current: number(&directory.join("pids.current")).unwrap_or_default(),
            limit: number(&directory.join("pids.max")),
        };
    }
    Ok(stats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_numbers_and_ranges() {
        assert_eq!(parse_list("0-2,7\n"), [0, 1, 2, 7]);
        assert!(parse_list("\n").is_empty());
        assert_eq!(parse_list("x,3-,5"), [5]);
    }

    #[test]
    fn both_versions_count_block_devices_alike() {
        let v1 = parse_block_v1("8:0 Read 4096\n8:0 Write 512\nTotal 4608\n");
        let v2 = parse_block_v2(
            "8:0 rbytes=4096 wbytes=512 rios=1 wios=2 dbytes=0 dios=0\n253:1 \n",
            "bytes",
        );
        assert_eq!(v1, v2);
        assert_eq!(v1.len(), 2);
        let requests = parse_block_v2("8:0 rios=1 wios=2\n", "ios");
        assert_eq!((requests[0].value, requests[1].value), (1, 2));
    }

    #[test]
    fn pressure_of_processors_may_lack_the_second_line() {
        let text = "some avg10=1.50 avg60=0.20 avg300=0.00 total=77\n";
        let pressure = parse_pressure(text).unwrap();
        assert_eq!((pressure.some.avg10, pressure.some.total), (1.5, 77));
        assert_eq!(pressure.full, Stall::default());
        assert_eq!(parse_pressure(""), None);
    }

    #[test]
    fn huge_pages_are_those_reserved() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        put("hugetlb.2MB.current", "0\n");
        put("hugetlb.2MB.rsvd.current", "4194304\n");
        put("hugetlb.2MB.events", "max 3\n");
        let pages = read_huge_pages(dir.path(), true);
        assert_eq!(pages.len(), 1);
        assert_eq!((pages["2MB"].usage, pages["2MB"].failures), (4_194_304, 3));
    }
}
