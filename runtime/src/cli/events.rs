//! `rt events`: a container's use and its kills for want of memory, a JSON object a line, in runc's form.

use std::collections::BTreeMap;
use std::io::Write;
use std::str::FromStr;
use std::time::Duration;

use engine::cgroup::{self, BlockCount, MemoryUse, Pressure, Throttling};
use serde::Serialize;

use super::{CliError, Context, parse_id};
use crate::isolation::Stats;
use crate::lifecycle::Event;

/// Print what a container uses and its out-of-memory events, until it ends
#[derive(Debug, clap::Args)]
pub(super) struct EventsArgs {
    /// Time from one print to the next, as in 500ms or 1m30s
    #[arg(long, value_name = "DURATION", default_value = "5s")]
    interval: Interval,
    /// Print the use once and return
    #[arg(long)]
    stats: bool,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

impl EventsArgs {
    pub(super) fn run(self, context: &Context<'_>) -> Result<(), CliError> {
        let id = parse_id(&self.id)?;
        let mut out = std::io::stdout();
        let mut print = |event: &Event| -> Result<(), CliError> {
            let (kind, data) = match event {
                Event::Stats(stats) => ("stats", Some(Data::of(stats))),
                Event::Oom => ("oom", None),
            };
            let line = Line {
                kind,
                id: &self.id,
                data,
            };
            let mut text = serde_json::to_vec(&line)?;
            text.push(b'\n');
            out.write_all(&text)?;
            Ok(out.flush()?)
        };
        if self.stats {
            return print(&Event::Stats(Box::new(context.lifecycle.stats(&id)?)));
        }
        for event in context.lifecycle.events(&id, self.interval.0)? {
            print(&event?)?;
        }
        Ok(())
    }
}

/// A time as Go programs write it: numbers with units, and no more than that.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Interval(Duration);

impl FromStr for Interval {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let invalid =
            || format!("{text:?} is no duration: use a number and a unit, as 500ms or 5s");
        let mut seconds = 0.0;
        let mut rest = text;
        while !rest.is_empty() {
            let digits = rest
                .find(|c: char| !c.is_ascii_digit() && c != '.')
                .ok_or_else(invalid)?;
            let (number, behind) = rest.split_at(digits);
            let end = behind
                .find(|c: char| c.is_ascii_digit() || c == '.')
                .unwrap_or(behind.len());
            let (unit, behind) = behind.split_at(end);
            let unit = match unit {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return Err(invalid()),
            };
            seconds += number.parse::<f64>().map_err(|_| invalid())? * unit;
            rest = behind;
        }
        let duration = Duration::try_from_secs_f64(seconds).map_err(|_| invalid())?;
        if duration.is_zero() {
            return Err(format!("{text:?} must be more than nothing"));
        }
        Ok(Self(duration))
    }
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Data<'a>>,
}

/// runc leaves most zeros out, and clients know.
fn is_zero(value: &u64) -> bool {
    *value == 0
}

#[derive(Serialize)]
struct Data<'a> {
    cpu: Cpu<'a>,
    cpuset: Cpuset<'a>,
    memory: Memory<'a>,
    pids: Pids,
    blkio: Blkio<'a>,
    hugetlb: BTreeMap<&'a str, Hugetlb>,
    intel_rdt: IntelRdt,
    /// runc lists the interfaces that it made, and it makes none.
    network_interfaces: Option<()>,
    /// What a machine costs the host, in the same form; ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    machine: Option<Machine<'a>>,
}

#[derive(Serialize)]
struct Machine<'a> {
    cpu: Cpu<'a>,
    memory: Memory<'a>,
    pids: Pids,
    blkio: Blkio<'a>,
}

#[derive(Serialize)]
struct Cpu<'a> {
    usage: CpuUsage<'a>,
    throttling: CpuThrottling,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<&'a Pressure>,
}

#[derive(Serialize)]
struct CpuUsage<'a> {
    #[serde(skip_serializing_if = "is_zero")]
    total: u64,
    #[serde(skip_serializing_if = "<[u64]>::is_empty")]
    percpu: &'a [u64],
    #[serde(skip_serializing_if = "<[u64]>::is_empty")]
    percpu_kernel: &'a [u64],
    #[serde(skip_serializing_if = "<[u64]>::is_empty")]
    percpu_user: &'a [u64],
    kernel: u64,
    user: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CpuThrottling {
    #[serde(skip_serializing_if = "is_zero")]
    periods: u64,
    #[serde(skip_serializing_if = "is_zero")]
    throttled_periods: u64,
    #[serde(skip_serializing_if = "is_zero")]
    throttled_time: u64,
}

#[derive(Serialize)]
struct Cpuset<'a> {
    #[serde(skip_serializing_if = "<[u16]>::is_empty")]
    cpus: &'a [u16],
    #[serde(skip_serializing_if = "<[u16]>::is_empty")]
    mems: &'a [u16],
    cpu_exclusive: i64,
    mem_hardwall: i64,
    mem_exclusive: i64,
    memory_migrate: i64,
    memory_spread_page: i64,
    memory_spread_slab: i64,
    memory_pressure: i64,
    sched_load_balance: i64,
    sched_relax_domain_level: i64,
}

#[derive(Serialize)]
struct Memory<'a> {
    #[serde(skip_serializing_if = "is_zero")]
    cache: u64,
    usage: MemoryEntry,
    swap: MemoryEntry,
    kernel: MemoryEntry,
    #[serde(rename = "kernelTCP")]
    kernel_tcp: MemoryEntry,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    raw: &'a BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<&'a Pressure>,
}

#[derive(Default, Serialize)]
struct MemoryEntry {
    limit: u64,
    #[serde(skip_serializing_if = "is_zero")]
    usage: u64,
    #[serde(skip_serializing_if = "is_zero")]
    max: u64,
    failcnt: u64,
}

#[derive(Serialize)]
struct Pids {
    #[serde(skip_serializing_if = "is_zero")]
    current: u64,
    #[serde(skip_serializing_if = "is_zero")]
    limit: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Blkio<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_service_bytes_recursive: Vec<BlkioEntry<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_serviced_recursive: Vec<BlkioEntry<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<&'a Pressure>,
}

#[derive(Serialize)]
struct BlkioEntry<'a> {
    #[serde(skip_serializing_if = "is_zero")]
    major: u64,
    #[serde(skip_serializing_if = "is_zero")]
    minor: u64,
    op: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    value: u64,
}

#[derive(Serialize)]
struct Hugetlb {
    #[serde(skip_serializing_if = "is_zero")]
    usage: u64,
    #[serde(skip_serializing_if = "is_zero")]
    max: u64,
    failcnt: u64,
}

/// Cache and memory bandwidth allocation, which we do not do.
#[derive(Serialize)]
struct IntelRdt {}

impl<'a> Data<'a> {
    fn of(stats: &'a Stats) -> Self {
        let Stats { workload, machine } = stats;
        let hugetlb = workload.huge_pages.iter().map(|(size, pages)| {
            let entry = Hugetlb {
                usage: pages.usage,
                max: pages.peak.unwrap_or_default(),
                failcnt: pages.failures,
            };
            (size.as_str(), entry)
        });
        Self {
            cpu: Cpu::of(&workload.cpu),
            cpuset: Cpuset::of(workload.cpuset.as_ref()),
            memory: Memory::of(&workload.memory),
            pids: Pids::of(&workload.pids),
            blkio: Blkio::of(&workload.block),
            hugetlb: hugetlb.collect(),
            intel_rdt: IntelRdt {},
            network_interfaces: None,
            machine: machine.as_ref().map(|machine| Machine {
                cpu: Cpu::of(&machine.cpu),
                memory: Memory::of(&machine.memory),
                pids: Pids::of(&machine.pids),
                blkio: Blkio::of(&machine.block),
            }),
        }
    }
}

impl<'a> Cpu<'a> {
    fn of(cpu: &'a cgroup::Cpu) -> Self {
        let Throttling {
            periods,
            throttled_periods,
            throttled_time,
        } = cpu.throttling;
        Self {
            usage: CpuUsage {
                total: cpu.total,
                percpu: &cpu.total_by_cpu,
                percpu_kernel: &cpu.system_by_cpu,
                percpu_user: &cpu.user_by_cpu,
                kernel: cpu.system,
                user: cpu.user,
            },
            throttling: CpuThrottling {
                periods,
                throttled_periods,
                throttled_time,
            },
            psi: cpu.pressure.as_ref(),
        }
    }
}

impl<'a> Cpuset<'a> {
    fn of(cpuset: Option<&'a cgroup::Cpuset>) -> Self {
        let of = |name: &str| {
            let value = cpuset.and_then(|cpuset| cpuset.settings.get(name));
            value.copied().unwrap_or_default()
        };
        Self {
            cpus: cpuset.map_or(&[], |cpuset| &cpuset.cpus),
            mems: cpuset.map_or(&[], |cpuset| &cpuset.mems),
            cpu_exclusive: of("cpu_exclusive"),
            mem_hardwall: of("mem_hardwall"),
            mem_exclusive: of("mem_exclusive"),
            memory_migrate: of("memory_migrate"),
            memory_spread_page: of("memory_spread_page"),
            memory_spread_slab: of("memory_spread_slab"),
            memory_pressure: of("memory_pressure"),
            sched_load_balance: of("sched_load_balance"),
            sched_relax_domain_level: of("sched_relax_domain_level"),
        }
    }
}

impl<'a> Memory<'a> {
    fn of(memory: &'a cgroup::Memory) -> Self {
        Self {
            cache: memory.cache,
            usage: MemoryEntry::of(Some(&memory.main)),
            swap: MemoryEntry::of(memory.with_swap.as_ref()),
            kernel: MemoryEntry::of(memory.kernel.as_ref()),
            kernel_tcp: MemoryEntry::of(memory.kernel_tcp.as_ref()),
            raw: &memory.stat,
            psi: memory.pressure.as_ref(),
        }
    }
}

impl MemoryEntry {
    /// What is not counted has no use and the limit 0; what has no limit has the greatest.
    fn of(memory: Option<&MemoryUse>) -> Self {
        memory.map_or_else(Self::default, |memory| Self {
            limit: memory.limit.unwrap_or(u64::MAX),
            usage: memory.usage,
            max: memory.peak.unwrap_or_default(),
            failcnt: memory.failures,
        })
    }
}

impl Pids {
    fn of(pids: &cgroup::Pids) -> Self {
        Self {
            current: pids.current,
            limit: pids.limit.unwrap_or_default(),
        }
    }
}

impl<'a> Blkio<'a> {
    fn of(block: &'a cgroup::Block) -> Self {
        let entries = |counts: &'a [BlockCount]| {
            let entry = |count: &'a BlockCount| BlkioEntry {
                major: count.major,
                minor: count.minor,
                op: &count.operation,
                value: count.value,
            };
            counts.iter().map(entry).collect()
        };
        Self {
            io_service_bytes_recursive: entries(&block.bytes),
            io_serviced_recursive: entries(&block.requests),
            psi: block.pressure.as_ref(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_a_duration_of_go() {
        let parse = |text: &str| text.parse::<Interval>().map(|interval| interval.0);
        assert_eq!(parse("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(parse("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse("1.5h"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse("100ms"), Ok(Duration::from_millis(100)));
        for text in ["", "5", "s", "0s", "-1s", "1x", "1..2s", "1s 2s", "1e400s"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn nothing_used_has_the_form_that_runc_prints() {
        let stats = Stats {
            workload: cgroup::Stats::default(),
            machine: None,
        };
        let line = Line {
            kind: "stats",
            id: "c1",
            data: Some(Data::of(&stats)),
        };
        let none = r#"{"limit":0,"failcnt":0}"#;
        assert_eq!(
            serde_json::to_string(&line).unwrap(),
            format!(
                concat!(
                    r#"{{"type":"stats","id":"c1","data":{{"#,
                    r#""cpu":{{"usage":{{"kernel":0,"user":0}},"throttling":{{}}}},"#,
                    r#""cpuset":{{"cpu_exclusive":0,"mem_hardwall":0,"mem_exclusive":0,"#,
                    r#""memory_migrate":0,"memory_spread_page":0,"memory_spread_slab":0,"#,
                    r#""memory_pressure":0,"sched_load_balance":0,"sched_relax_domain_level":0}},"#,
                    r#""memory":{{"usage":{{"limit":18446744073709551615,"failcnt":0}},"#,
                    r#""swap":{none},"kernel":{none},"kernelTCP":{none}}},"#,
                    r#""pids":{{}},"blkio":{{}},"hugetlb":{{}},"intel_rdt":{{}},"#,
                    r#""network_interfaces":null}}}}"#
                ),
                none = none
            )
        );
        let oom = Line {
            kind: "oom",
            id: "c1",
            data: None,
        };
        assert_eq!(
            serde_json::to_string(&oom).unwrap(),
            r#"{"type":"oom","id":"c1"}"#
        );
    }
}
