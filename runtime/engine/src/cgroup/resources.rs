//! Writes `linux.resources` of config.json (runtime-spec, "Control groups") to the files of the kernel.
//!
//! A value that the system cannot honour is an error that names its field; nothing is left out silently.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use super::{Cgroup, Error, Result, devices, read, write};

/// Where limits are written: the directories of the controllers, found once.
struct Target<'a> {
    cgroup: &'a Cgroup,
}

impl Target<'_> {
    /// The directory of a controller and whether it is of version 2.
    fn directory(&self, controller: &'static str, field: &str) -> Result<(PathBuf, bool)> {
        let missing = || Error::NoController {
            field: format!("linux.resources.{field}"),
            controller,
        };
        if let Some(directory) = self.cgroup.v1(controller) {
            return Ok((directory, false));
        }
        let directory = self.cgroup.unified().ok_or_else(missing)?;
        // Version 2 calls the block controller io; a controller that is not enabled has no files.
        let name = if controller == "blkio" {
            "io"
        } else {
            controller
        };
        let enabled = read(&directory.join("cgroup.controllers"))?;
        if !enabled.split_whitespace().any(|one| one == name) {
            return Err(missing());
        }
        Ok((directory, true))
    }
}

pub(super) fn apply(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    let target = Target { cgroup };
    if let Some(rules) = resources.devices() {
        devices::apply(cgroup, rules)?;
    }
    if let Some(cpu) = resources.cpu() {
        apply_cpu(&target, cpu)?;
    }
    if let Some(memory) = resources.memory() {
        apply_memory(&target, memory)?;
    }
    if let Some(pids) = resources.pids() {
        let (directory, _) = target.directory("pids", "pids")?;
        let limit = match pids.limit() {
            limit if limit > 0 => limit.to_string(),
            _ => "max".to_owned(),
        };
        write(&directory.join("pids.max"), &limit)?;
    }
    if let Some(block) = resources.block_io() {
        apply_block(&target, block)?;
    }
    for (index, huge) in resources.hugepage_limits().iter().flatten().enumerate() {
        let field = format!("hugepageLimits[{index}]");
        let (directory, unified) = target.directory("hugetlb", &field)?;
        let limit = huge.limit();
        let size = huge.page_size();
        if size.contains('/') {
            return Err(Error::Unsupported {
                field: format!("linux.resources.{field}.pageSize"),
                reason: "it must be a size as in \"2MB\"",
            });
        }
        let files: &[&str] = if unified {
            &["max", "rsvd.max"]
        } else {
            &["limit_in_bytes"]
        };
        for (position, file) in files.iter().enumerate() {
            let path = directory.join(format!("hugetlb.{size}.{file}"));
            // The limit on reservations is newer than the other (Linux 5.7).
            if position == 0 || path.exists() {
                write(&path, &limit.to_string())?;
            }
        }
    }
    if let Some(network) = resources.network() {
        if let Some(class) = network.class_id() {
            let (directory, unified) = target.directory("net_cls", "network.classID")?;
            v1_only(unified, "network.classID")?;
            write(&directory.join("net_cls.classid"), &class.to_string())?;
        }
        for priority in network.priorities().iter().flatten() {
            let (directory, unified) = target.directory("net_prio", "network.priorities")?;
            v1_only(unified, "network.priorities")?;
            write(
                &directory.join("net_prio.ifpriomap"),
                &format!("{} {}", priority.name(), priority.priority()),
            )?;
        }
    }
    for (device, limits) in resources.rdma().iter().flatten() {
        let (directory, _) = target.directory("rdma", "rdma")?;
        let mut line = device.clone();
        if let Some(handles) = limits.hca_handles() {
            line.push_str(&format!(" hca_handle={handles}"));
        }
        if let Some(objects) = limits.hca_objects() {
            line.push_str(&format!(" hca_object={objects}"));
        }
        write(&directory.join("rdma.max"), &line)?;
    }
    if let Some(unified) = resources.unified().as_ref().filter(|map| !map.is_empty()) {
        apply_unified(cgroup, unified)?;
    }
    Ok(())
}

fn v1_only(unified: bool, field: &str) -> Result<()> {
    if unified {
        return Err(Error::Unsupported {
            field: format!("linux.resources.{field}"),
            reason: "cgroup version 2 has no such limit",
        });
    }
    Ok(())
}

/// The weight of version 2 (1 to 10000) for CPU shares of version 1 (2 to 262144).
///
/// It maps the least, the default (1024 to 100) and the greatest onto each other:
/// log10(weight) = (l² + 125 l) / 612 - 7/34, with l = log2(shares).
#[must_use]
pub fn cpu_weight(shares: u64) -> u64 {
    match shares {
        0 => 0,
        1 | 2 => 1,
        262_144.. => 10_000,
        _ => {
            let l = (shares as f64).log2();
            let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
            (10f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
        }
    }
}

fn apply_cpu(target: &Target<'_>, cpu: &LinuxCpu) -> Result<()> {
    if cpu.cpus().as_ref().is_some_and(|value| !value.is_empty())
        || cpu.mems().as_ref().is_some_and(|value| !value.is_empty())
    {
        let (directory, _) = target.directory("cpuset", "cpu.cpus")?;
        for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
                write(&directory.join(file), value)?;
            }
        }
    }
    let wanted = cpu.shares().is_some()
        || cpu.quota().is_some()
        || cpu.period().is_some()
        || cpu.burst().is_some()
        || cpu.idle().is_some()
        || cpu.realtime_period().is_some()
        || cpu.realtime_runtime().is_some();
    if !wanted {
        return Ok(());
    }
    let (directory, unified) = target.directory("cpu", "cpu")?;
    let shares = cpu.shares().filter(|shares| *shares != 0);
    if unified {
        if cpu.realtime_period().is_some_and(|value| value != 0)
            || cpu.realtime_runtime().is_some_and(|value| value != 0)
        {
            v1_only(true, "cpu.realtimeRuntime")?;
        }
        if let Some(idle) = cpu.idle() {
            write(&directory.join("cpu.idle"), &idle.to_string())?;
        }
        if let Some(shares) = shares {
            write(
                &directory.join("cpu.weight"),
                &cpu_weight(shares).to_string(),
            )?;
        }
        if cpu.quota().is_some() || cpu.period().is_some() {
            let quota = match cpu.quota() {
                Some(quota) if quota > 0 => quota.to_string(),
                _ => "max".to_owned(),
            };
            let period = cpu
                .period()
                .filter(|period| *period != 0)
                .unwrap_or(100_000);
            write(&directory.join("cpu.max"), &format!("{quota} {period}"))?;
        }
        if let Some(burst) = cpu.burst() {
            write(&directory.join("cpu.max.burst"), &burst.to_string())?;
        }
        return Ok(());
    }
    let put = |file: &str, value: String| write(&directory.join(file), &value);
    if let Some(idle) = cpu.idle() {
        put("cpu.idle", idle.to_string())?;
    }
    if let Some(shares) = shares {
        put("cpu.shares", shares.to_string())?;
    }
    if let Some(period) = cpu.period().filter(|value| *value != 0) {
        // A running container's old quota may not fit the new period: then the quota goes first.
        if put("cpu.cfs_period_us", period.to_string()).is_err() {
            if let Some(quota) = cpu.quota() {
                put("cpu.cfs_quota_us", quota.to_string())?;
            }
            put("cpu.cfs_period_us", period.to_string())?;
        }
    }
    if let Some(quota) = cpu.quota().filter(|value| *value != 0) {
        put("cpu.cfs_quota_us", quota.to_string())?;
    }
    if let Some(burst) = cpu.burst() {
        put("cpu.cfs_burst_us", burst.to_string())?;
    }
    if let Some(period) = cpu.realtime_period().filter(|value| *value != 0) {
        put("cpu.rt_period_us", period.to_string())?;
    }
    if let Some(runtime) = cpu.realtime_runtime().filter(|value| *value != 0) {
        put("cpu.rt_runtime_us", runtime.to_string())?;
    }
    Ok(())
}

fn apply_memory(target: &Target<'_>, memory: &LinuxMemory) -> Result<()> {
    // 0 means "not given" as Go clients write it.
    let given = |value: Option<i64>| value.filter(|value| *value != 0);
    let limit = given(memory.limit());
    let swap = given(memory.swap());
    let reservation = given(memory.reservation());
    let kernel = given(memory.kernel());
    if kernel.is_some_and(|value| value > 0) {
        return Err(Error::Unsupported {
            field: "linux.resources.memory.kernel".to_owned(),
            reason: "Linux has had no such limit since 5.16; leave it out",
        });
    }
    let disable_oom_killer = memory.disable_oom_killer().unwrap_or(false);
    let kernel_tcp = given(memory.kernel_tcp());
    if limit.is_none()
        && swap.is_none()
        && reservation.is_none()
        && kernel_tcp.is_none()
        && memory.swappiness().is_none()
        && !disable_oom_killer
    {
        return Ok(());
    }
    let (directory, unified) = target.directory("memory", "memory")?;
    let put = |file: &str, value: String| write(&directory.join(file), &value);
    if let (Some(swap), Some(limit)) = (swap, limit)
        && swap > 0
        && (limit < 0 || swap < limit)
    {
        return Err(Error::Unsupported {
            field: "linux.resources.memory.swap".to_owned(),
            reason: "it is memory plus swap, so it cannot be less than the memory limit",
        });
    }
    if unified {
        if disable_oom_killer {
            v1_only(true, "memory.disableOOMKiller")?;
        }
        if memory.swappiness().is_some() {
            v1_only(true, "memory.swappiness")?;
        }
        if kernel_tcp.is_some_and(|value| value > 0) {
            v1_only(true, "memory.kernelTCP")?;
        }
        let max = |value: i64| match value {
            value if value < 0 => "max".to_owned(),
            value => value.to_string(),
        };
        if let Some(swap) = swap {
            // Version 1 counts memory and swap together, version 2 swap alone.
            let alone = match (swap, limit) {
                (swap, _) if swap < 0 => -1,
                (swap, Some(limit)) if limit > 0 => swap - limit,
                _ => {
                    return Err(Error::Unsupported {
                        field: "linux.resources.memory.swap".to_owned(),
                        reason: "on cgroup version 2 it needs a memory limit beside it",
                    });
                }
            };
            put("memory.swap.max", max(alone))?;
        }
        if let Some(limit) = limit {
            put("memory.max", max(limit))?;
        }
        if let Some(reservation) = reservation {
            put("memory.low", max(reservation))?;
        }
        return Ok(());
    }
    match (limit, swap) {
        (Some(limit), Some(swap)) => {
            // Memory plus swap can never be less than memory: the order depends on what is there now.
            let first = put("memory.limit_in_bytes", limit.to_string());
            put("memory.memsw.limit_in_bytes", swap.to_string())?;
            if first.is_err() {
                put("memory.limit_in_bytes", limit.to_string())?;
            }
        }
        (Some(limit), None) => put("memory.limit_in_bytes", limit.to_string())?,
        (None, Some(swap)) => put("memory.memsw.limit_in_bytes", swap.to_string())?,
        (None, None) => {}
    }
    if let Some(reservation) = reservation {
        put("memory.soft_limit_in_bytes", reservation.to_string())?;
    }
    if let Some(tcp) = kernel_tcp {
        put("memory.kmem.tcp.limit_in_bytes", tcp.to_string())?;
    }
    if let Some(swappiness) = memory.swappiness() {
        put("memory.swappiness", swappiness.to_string())?;
    }
    if disable_oom_killer {
        put("memory.oom_control", "1".to_owned())?;
    }
    Ok(())
}

fn apply_block(target: &Target<'_>, block: &LinuxBlockIo) -> Result<()> {
    let throttles: [(&str, &str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("read_bps", "rbps", block.throttle_read_bps_device()),
        ("write_bps", "wbps", block.throttle_write_bps_device()),
        ("read_iops", "riops", block.throttle_read_iops_device()),
        ("write_iops", "wiops", block.throttle_write_iops_device()),
    ];
    let weights = block.weight_device().iter().flatten();
    let wanted = block.weight().is_some_and(|value| value != 0)
        || block.leaf_weight().is_some_and(|value| value != 0)
        || weights.clone().next().is_some()
        || throttles
            .iter()
            .any(|(_, _, devices)| devices.iter().flatten().next().is_some());
    if !wanted {
        return Ok(());
    }
    let (directory, unified) = target.directory("blkio", "blockIO")?;
    let leaf = block.leaf_weight().is_some_and(|value| value != 0)
        || weights
            .clone()
            .any(|one| one.leaf_weight().is_some_and(|value| value != 0));
    if leaf {
        return Err(Error::Unsupported {
            field: "linux.resources.blockIO.leafWeight".to_owned(),
            reason: "Linux has had no such weight since 5.0; leave it out",
        });
    }
    if let Some(weight) = block.weight().filter(|value| *value != 0) {
        write_weight(&directory, unified, None, u64::from(weight))?;
    }
    for device in weights {
        if let Some(weight) = device.weight() {
            let name = format!("{}:{}", device.major(), device.minor());
            write_weight(&directory, unified, Some(&name), u64::from(weight))?;
        }
    }
    for (v1, v2, devices) in throttles {
        for device in devices.iter().flatten() {
            let name = format!("{}:{}", device.major(), device.minor());
            if unified {
                let rate = match device.rate() {
                    0 => "max".to_owned(),
                    rate => rate.to_string(),
                };
                write(&directory.join("io.max"), &format!("{name} {v2}={rate}"))?;
            } else {
                write(
                    &directory.join(format!("blkio.throttle.{v1}_device")),
                    &format!("{name} {}", device.rate()),
                )?;
            }
        }
    }
    Ok(())
}

/// The weight files depend on the I/O scheduler: BFQ has its own, and version 2 a general one beside it.
fn write_weight(directory: &Path, unified: bool, device: Option<&str>, weight: u64) -> Result<()> {
    let line = |weight: u64| match device {
        Some(device) => format!("{device} {weight}"),
        None => weight.to_string(),
    };
    if !unified {
        let names = match device {
            None => ["blkio.bfq.weight", "blkio.weight"],
            Some(_) => ["blkio.bfq.weight_device", "blkio.weight_device"],
        };
        let name = names
            .into_iter()
            .find(|name| directory.join(name).exists())
            .ok_or(Error::Unsupported {
                field: "linux.resources.blockIO.weight".to_owned(),
                reason: "no I/O scheduler of this system has weights",
            })?;
        return write(&directory.join(name), &line(weight));
    }
    let bfq = directory.join("io.bfq.weight");
    if bfq.exists() {
        return write(&bfq, &line(weight));
    }
    // From 10..1000 of version 1 to 1..10000 of version 2.
    let converted = 1 + weight.saturating_sub(10) * 9999 / 990;
    let line = match device {
        Some(device) => format!("{device} {converted}"),
        None => format!("default {converted}"),
    };
    write(&directory.join("io.weight"), &line)
}

fn apply_unified(
    cgroup: &Cgroup,
    values: &std::collections::HashMap<String, String>,
) -> Result<()> {
    let Some(directory) = cgroup.unified() else {
        return Err(Error::Unsupported {
            field: "linux.resources.unified".to_owned(),
            reason: "this system has no cgroup version 2 hierarchy",
        });
    };
    let mut names: Vec<_> = values.iter().collect();
    names.sort();
    for (name, value) in names {
        let field = || format!("linux.resources.unified[{name:?}]");
        if name.contains('/') || name.starts_with("cgroup.") || !name.contains('.') {
            return Err(Error::Unsupported {
                field: field(),
                reason: "it must name the file of a controller, such as memory.high",
            });
        }
        let path = directory.join(name);
        if !path.exists() {
            return Err(Error::Unsupported {
                field: field(),
                reason: "there is no such file; the controller is not available here",
            });
        }
        for line in value.lines() {
            write(&path, line)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_map_to_weights_at_both_ends_and_in_the_middle() {
        assert_eq!(cpu_weight(2), 1);
        assert_eq!(cpu_weight(1024), 100);
        assert_eq!(cpu_weight(262_144), 10_000);
        assert_eq!(cpu_weight(u64::MAX), 10_000);
        assert!(cpu_weight(512) < 100 && cpu_weight(2048) > 100);
    }
}
