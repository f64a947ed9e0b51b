//! What a container has used, in the form that containerd's clients read.

use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use engine::cgroup::{BlockCount, Layout, MemoryUse, Pressure, Stall, Stats};

use crate::events::any;

/// The metrics of version 1 where the container's cgroup is of version 1, else those of version 2: a machine's kernel
/// counts as version 2 does, whatever the host has.
pub fn of(stats: &runtime::isolation::Stats) -> Any {
    let is_v1 = stats.machine.is_none()
        && Layout::of_system().is_ok_and(|layout| layout.v1("memory").is_some());
    if is_v1 {
        any(&v1(&stats.workload))
    } else {
        any(&v2(&stats.workload))
    }
}

/// What version 1 shows where there is no limit: the most that it can count, in full pages.
const NO_LIMIT_V1: u64 = i64::MAX as u64 & !0xfff;

/// What version 2 is shown with where it says `max`.
fn limit(limit: Option<u64>) -> u64 {
    limit.unwrap_or(u64::MAX)
}

fn v1(stats: &Stats) -> v1::Metrics {
    let of = |name: &str| stats.memory.stat.get(name).copied().unwrap_or_default();
    let memory = |used: &MemoryUse| v1::MemoryEntry {
        limit: used.limit.unwrap_or(NO_LIMIT_V1),
        usage: used.usage,
        max: used.peak.unwrap_or_default(),
        failcnt: used.failures,
        ..Default::default()
    };
    let optional = |used: &Option<MemoryUse>| match used {
        Some(used) => MessageField::some(memory(used)),
        None => MessageField::none(),
    };
    let block = |counts: &[BlockCount]| {
        let entry = |count: &BlockCount| v1::BlkIOEntry {
            op: count.operation.clone(),
            major: count.major,
            minor: count.minor,
            value: count.value,
            ..Default::default()
        };
        counts.iter().map(entry).collect()
    };
    let cpu = &stats.cpu;
    v1::Metrics {
        hugetlb: stats
            .huge_pages
            .iter()
            .map(|(size, pages)| v1::HugetlbStat {
                usage: pages.usage,
                max: pages.peak.unwrap_or_default(),
                failcnt: pages.failures,
                pagesize: size.clone(),
                ..Default::default()
            })
            .collect(),
        pids: MessageField::some(v1::PidsStat {
            current: stats.pids.current,
            // Here no limit is 0, as containerd's own shim has it.
            limit: stats.pids.limit.unwrap_or_default(),
            ..Default::default()
        }),
        cpu: MessageField::some(v1::CPUStat {
            usage: MessageField::some(v1::CPUUsage {
                total: cpu.total,
                kernel: cpu.system,
                user: cpu.user,
                per_cpu: cpu.total_by_cpu.clone(),
                ..Default::default()
            }),
            throttling: MessageField::some(v1::Throttle {
                periods: cpu.throttling.periods,
                throttled_periods: cpu.throttling.throttled_periods,
                throttled_time: cpu.throttling.throttled_time,
                ..Default::default()
            }),
            ..Default::default()
        }),
        memory: MessageField::some(v1::MemoryStat {
            cache: of("cache"),
            rss: of("rss"),
            rss_huge: of("rss_huge"),
            mapped_file: of("mapped_file"),
            dirty: of("dirty"),
            writeback: of("writeback"),
            pg_pg_in: of("pgpgin"),
            pg_pg_out: of("pgpgout"),
            pg_fault: of("pgfault"),
            pg_maj_fault: of("pgmajfault"),
            inactive_anon: of("inactive_anon"),
            active_anon: of("active_anon"),
            inactive_file: of("inactive_file"),
            active_file: of("active_file"),
            unevictable: of("unevictable"),
            hierarchical_memory_limit: of("hierarchical_memory_limit"),
            hierarchical_swap_limit: of("hierarchical_memsw_limit"),
            total_cache: of("total_cache"),
            total_rss: of("total_rss"),
            total_rss_huge: of("total_rss_huge"),
            total_mapped_file: of("total_mapped_file"),
            total_dirty: of("total_dirty"),
            total_writeback: of("total_writeback"),
            total_pg_pg_in: of("total_pgpgin"),
            total_pg_pg_out: of("total_pgpgout"),
            total_pg_fault: of("total_pgfault"),
            total_pg_maj_fault: of("total_pgmajfault"),
            total_inactive_anon: of("total_inactive_anon"),
            total_active_anon: of("total_active_anon"),
            total_inactive_file: of("total_inactive_file"),
            total_active_file: of("total_active_file"),
            total_unevictable: of("total_unevictable"),
            usage: MessageField::some(memory(&stats.memory.main)),
            swap: optional(&stats.memory.with_swap),
            kernel: optional(&stats.memory.kernel),
            kernel_tcp: optional(&stats.memory.kernel_tcp),
            ..Default::default()
        }),
        blkio: MessageField::some(v1::BlkIOStat {
            io_service_bytes_recursive: block(&stats.block.bytes),
            io_serviced_recursive: block(&stats.block.requests),
            ..Default::default()
        }),
        memory_oom_control: MessageField::some(v1::MemoryOomControl {
            oom_kill: stats.memory.oom_kills,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn v2(stats: &Stats) -> v2::Metrics {
    let of = |name: &str| stats.memory.stat.get(name).copied().unwrap_or_default();
    let cpu = &stats.cpu;
    let memory = &stats.memory;
    let micros = |nanos: u64| nanos / 1000;
    let swap_limit = memory.with_swap.as_ref().and_then(|both| {
        let (both, main) = both.limit.zip(memory.main.limit)?;
        both.checked_sub(main)
    });
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: stats.pids.current,
            limit: limit(stats.pids.limit),
            ..Default::default()
        }),
        cpu: MessageField::some(v2::CPUStat {
            usage_usec: micros(cpu.total),
            user_usec: micros(cpu.user),
            system_usec: micros(cpu.system),
            nr_periods: cpu.throttling.periods,
            nr_throttled: cpu.throttling.throttled_periods,
            throttled_usec: micros(cpu.throttling.throttled_time),
            psi: pressure(cpu.pressure.as_ref()),
            ..Default::default()
        }),
        memory: MessageField::some(v2::MemoryStat {
            anon: of("anon"),
            file: of("file"),
            kernel_stack: of("kernel_stack"),
            slab: of("slab"),
            sock: of("sock"),
            shmem: of("shmem"),
            file_mapped: of("file_mapped"),
            file_dirty: of("file_dirty"),
            file_writeback: of("file_writeback"),
            anon_thp: of("anon_thp"),
            inactive_anon: of("inactive_anon"),
            active_anon: of("active_anon"),
            inactive_file: of("inactive_file"),
            active_file: of("active_file"),
            unevictable: of("unevictable"),
            slab_reclaimable: of("slab_reclaimable"),
            slab_unreclaimable: of("slab_unreclaimable"),
            pgfault: of("pgfault"),
            pgmajfault: of("pgmajfault"),
            workingset_refault: of("workingset_refault"),
            workingset_activate: of("workingset_activate"),
            workingset_nodereclaim: of("workingset_nodereclaim"),
            pgrefill: of("pgrefill"),
            pgscan: of("pgscan"),
            pgsteal: of("pgsteal"),
            pgactivate: of("pgactivate"),
            pgdeactivate: of("pgdeactivate"),
            pglazyfree: of("pglazyfree"),
            pglazyfreed: of("pglazyfreed"),
            thp_fault_alloc: of("thp_fault_alloc"),
            thp_collapse_alloc: of("thp_collapse_alloc"),
            usage: memory.main.usage,
            usage_limit: limit(memory.main.limit),
            swap_usage: memory.swap,
            swap_limit: limit(swap_limit),
            max_usage: memory.main.peak.unwrap_or_default(),
            psi: pressure(memory.pressure.as_ref()),
            ..Default::default()
        }),
        io: MessageField::some(v2::IOStat {
            usage: io(stats),
            psi: pressure(stats.block.pressure.as_ref()),
            ..Default::default()
        }),
        hugetlb: stats
            .huge_pages
            .iter()
            .map(|(size, pages)| v2::HugeTlbStat {
                current: pages.usage,
                failcnt: pages.failures,
                pagesize: size.clone(),
                ..Default::default()
            })
            .collect(),
        memory_events: MessageField::some(v2::MemoryEvents {
            max: memory.main.failures,
            oom_kill: memory.oom_kills,
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A device a line.
fn io(stats: &Stats) -> Vec<v2::IOEntry> {
    let mut devices = std::collections::BTreeMap::<(u64, u64), v2::IOEntry>::new();
    let bytes = stats.block.bytes.iter().map(|count| (count, true));
    let requests = stats.block.requests.iter().map(|count| (count, false));
    for (count, is_bytes) in bytes.chain(requests) {
        let entry = devices.entry((count.major, count.minor)).or_default();
        (entry.major, entry.minor) = (count.major, count.minor);
        match (count.operation.as_str(), is_bytes) {
            ("Read", true) => entry.rbytes = count.value,
            ("Write", true) => entry.wbytes = count.value,
            ("Read", false) => entry.rios = count.value,
            ("Write", false) => entry.wios = count.value,
            _ => {}
        }
    }
    devices.into_values().collect()
}

fn pressure(pressure: Option<&Pressure>) -> MessageField<v2::PSIStats> {
    let stall = |stall: &Stall| {
        MessageField::some(v2::PSIData {
            avg10: stall.avg10,
            avg60: stall.avg60,
            avg300: stall.avg300,
            total: stall.total,
            ..Default::default()
        })
    };
    match pressure {
        Some(pressure) => MessageField::some(v2::PSIStats {
            some: stall(&pressure.some),
            full: stall(&pressure.full),
            ..Default::default()
        }),
        None => MessageField::none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_devices_figures_come_together() {
        let count = |operation: &str, value| BlockCount {
            major: 8,
            minor: 1,
            operation: operation.to_owned(),
            value,
        };
        let mut stats = Stats::default();
        stats.block.bytes = vec![count("Read", 4096), count("Write", 512)];
        stats.block.requests = vec![count("Read", 1)];
        let entries = io(&stats);
        assert_eq!(entries.len(), 1);
        assert_eq!(
            (entries[0].rbytes, entries[0].wbytes, entries[0].rios),
            (4096, 512, 1)
        );
    }

    #[test]
    fn the_type_names_are_containerds() {
        assert_eq!(
            any(&v1(&Stats::default())).type_url,
            "io.containerd.cgroups.v1.Metrics"
        );
        assert_eq!(
            any(&v2(&Stats::default())).type_url,
            "io.containerd.cgroups.v2.Metrics"
        );
    }
}
