//! Writes `linux.resources` of config.json (runtime-spec, "Control groups") to the files of the kernel.
//!
//! A value that the system cannot honour is an error that names its field; nothing is left out silently.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxNetwork, LinuxRdma,
    LinuxResources, LinuxThrottleDevice,
};

use super::{Cgroup, Error, Result, devices, enable_above, read, write};

const V1_ONLY: &str = "cgroup version 2 has no such limit; leave it out";

/// Where limits are written.
struct Target<'a> {
    cgroup: &'a Cgroup,
    /// What the version 2 cgroup has, read once.
    unified: OnceCell<String>,
}

/// The files of one controller in the cgroup.
struct Files {
    directory: PathBuf,
    /// Whether they are version 2's.
    unified: bool,
}

impl Target<'_> {
    /// The files of a controller, for a field below `linux.resources`.
    fn files(&self, controller: &'static str, field: &str) -> Result<Files> {
        let missing = || Error::NoController {
            field: format!("linux.resources.{field}"),
            controller,
        };
        if let Some(directory) = self.cgroup.v1(controller) {
            return Ok(Files {
                directory,
                unified: false,
            });
        }
        let directory = self.cgroup.unified().ok_or_else(missing)?;
        // Version 2 calls the block controller io.
        let name = if controller == "blkio" {
            "io"
        } else {
            controller
        };
        if !self.has(&directory, name)? {
            return Err(missing());
        }
        Ok(Files {
            directory,
            unified: true,
        })
    }

    /// Whether the version 2 cgroup has a controller; one that it could have is given to it.
    fn has(&self, directory: &std::path::Path, name: &str) -> Result<bool> {
        let listed = |text: &str| text.split_whitespace().any(|one| one == name);
        let path = directory.join("cgroup.controllers");
        let known = match self.unified.get() {
            Some(known) => known,
            None => {
                let text = read(&path)?;
                self.unified.get_or_init(|| text)
            }
        };
        if listed(known) {
            return Ok(true);
        }
        if let Some(hierarchy) = self.cgroup.layout.unified() {
            enable_above(&hierarchy.mount, &self.cgroup.path);
        }
        Ok(listed(&read(&path)?))
    }
}

impl Files {
    /// Writes a value; an error names the field below `linux.resources`.
    fn put(&self, field: &str, file: &str, value: &str) -> Result<()> {
        write(&self.directory.join(file), value).map_err(|source| Error::Refused {
            field: format!("linux.resources.{field}"),
            source: Box::new(source),
        })
    }

    fn has(&self, file: &str) -> bool {
        self.directory.join(file).exists()
    }

    /// Refuses a field that version 2 has no file for.
    fn only_v1(&self, field: &str) -> Result<()> {
        match self.unified {
            true => Err(unsupported(field, V1_ONLY)),
            false => Ok(()),
        }
    }
}

fn unsupported(field: &str, reason: &'static str) -> Error {
    Error::Unsupported {
        field: format!("linux.resources.{field}"),
        reason,
    }
}

/// Whether a write failed because the kernel does not have the file.
fn is_missing(error: &Error) -> bool {
    matches!(error, Error::Refused { source, .. }
        if matches!(&**source, Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound))
}

pub(super) fn apply(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    let target = Target {
        cgroup,
        unified: OnceCell::new(),
    };
    if let Some(rules) = resources.devices() {
        devices::apply(cgroup, rules)?;
    }
    if let Some(cpu) = resources.cpu() {
        apply_cpuset(&target, cpu)?;
        apply_cpu(&target, cpu)?;
    }
    if let Some(memory) = resources.memory() {
        apply_memory(&target, memory)?;
    }
    if let Some(pids) = resources.pids() {
        let files = target.files("pids", "pids")?;
        files.put("pids.limit", "pids.max", &pids_max(pids.limit()))?;
    }
    if let Some(block) = resources.block_io() {
        apply_block(&target, block)?;
    }
    for (index, huge) in resources.hugepage_limits().iter().flatten().enumerate() {
        apply_huge_pages(&target, index, huge)?;
    }
    if let Some(network) = resources.network() {
        apply_network(&target, network)?;
    }
    for (device, limits) in resources.rdma().iter().flatten() {
        apply_rdma(&target, device, limits)?;
    }
    if let Some(unified) = resources.unified().as_ref().filter(|map| !map.is_empty()) {
        apply_unified(&target, unified)?;
    }
    Ok(())
}

/// `pids.max` for `pids.limit`: a negative number is no limit (runtime-spec 1.3).
///
/// 0 allows what 1 does, no fork, but would also keep the first process from being born in the cgroup.
fn pids_max(limit: i64) -> String {
    match limit {
        0 => "1".to_owned(),
        limit => number_or_max(limit),
    }
}

fn number_or_max(value: i64) -> String {
    match value {
        value if value < 0 => "max".to_owned(),
        value => value.to_string(),
    }
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

fn apply_cpuset(target: &Target<'_>, cpu: &LinuxCpu) -> Result<()> {
    for (field, file, value) in [
        ("cpu.cpus", "cpuset.cpus", cpu.cpus()),
        ("cpu.mems", "cpuset.mems", cpu.mems()),
    ] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            target.files("cpuset", field)?.put(field, file, value)?;
        }
    }
    Ok(())
}

fn apply_cpu(target: &Target<'_>, cpu: &LinuxCpu) -> Result<()> {
    // 0 means "not given" as Go clients write it, except for what has a meaning of 0.
    let shares = cpu.shares().filter(|value| *value != 0);
    let quota = cpu.quota().filter(|value| *value != 0);
    let period = cpu.period().filter(|value| *value != 0);
    let realtime_period = cpu.realtime_period().filter(|value| *value != 0);
    let realtime_runtime = cpu.realtime_runtime().filter(|value| *value != 0);
    let (burst, idle) = (cpu.burst(), cpu.idle());
    let field = match (shares, quota, period, burst, idle) {
        (Some(_), ..) => "cpu.shares",
        (_, Some(_), ..) => "cpu.quota",
        (_, _, Some(_), ..) => "cpu.period",
        (_, _, _, Some(_), _) => "cpu.burst",
        (_, _, _, _, Some(_)) => "cpu.idle",
        _ if realtime_period.is_some() => "cpu.realtimePeriod",
        _ if realtime_runtime.is_some() => "cpu.realtimeRuntime",
        _ => return Ok(()),
    };
    let files = target.files("cpu", field)?;
    if let Some(idle) = idle {
        files.put("cpu.idle", "cpu.idle", &idle.to_string())?;
    }
    // An idle cgroup has the least weight, and takes no other; its own counts again when it is idle no more.
    if let Some(shares) = shares.filter(|_| idle != Some(1)) {
        match files.unified {
            true => files.put("cpu.shares", "cpu.weight", &cpu_weight(shares).to_string())?,
            false => files.put("cpu.shares", "cpu.shares", &shares.to_string())?,
        }
    }
    // Burst must never be greater than the quota: what fails before the new quota is set is tried after it.
    let burst_file = match files.unified {
        true => "cpu.max.burst",
        false => "cpu.cfs_burst_us",
    };
    let put_burst = || match burst {
        Some(burst) => files.put("cpu.burst", burst_file, &burst.to_string()),
        None => Ok(()),
    };
    let early = put_burst();
    match files.unified {
        true => put_bandwidth(&files, quota, period)?,
        false => put_bandwidth_v1(&files, quota, period)?,
    }
    if early.is_err() {
        put_burst()?;
    }
    put_realtime(&files, realtime_period, realtime_runtime)
}

fn put_realtime(files: &Files, period: Option<u64>, runtime: Option<i64>) -> Result<()> {
    let put = |field, file, value: Option<String>| match value {
        Some(value) => {
            files.only_v1(field)?;
            files.put(field, file, &value)
        }
        None => Ok(()),
    };
    let period = period.map(|period| period.to_string());
    let put_period = || put("cpu.realtimePeriod", "cpu.rt_period_us", period.clone());
    // The old runtime may not fit the new period: then the runtime goes first.
    let early = put_period();
    let runtime = runtime.map(|runtime| runtime.to_string());
    put("cpu.realtimeRuntime", "cpu.rt_runtime_us", runtime)?;
    early.or_else(|_| put_period())
}

/// Quota and period are one file in version 2. What is not given stays as it is.
fn put_bandwidth(files: &Files, quota: Option<i64>, period: Option<u64>) -> Result<()> {
    let line = match (quota, period) {
        (None, None) => return Ok(()),
        // Without a period the kernel keeps the old one.
        (Some(quota), None) => number_or_max(quota),
        (Some(quota), Some(period)) => format!("{} {period}", number_or_max(quota)),
        (None, Some(period)) => {
            let now = read(&files.directory.join("cpu.max"))?;
            let quota = now.split_whitespace().next().unwrap_or("max");
            format!("{quota} {period}")
        }
    };
    let field = match quota {
        Some(_) => "cpu.quota",
        None => "cpu.period",
    };
    files.put(field, "cpu.max", &line)
}

fn put_bandwidth_v1(files: &Files, quota: Option<i64>, period: Option<u64>) -> Result<()> {
    let put_quota = || match quota {
        Some(quota) => files.put("cpu.quota", "cpu.cfs_quota_us", &quota.to_string()),
        None => Ok(()),
    };
    if let Some(period) = period {
        let put = || files.put("cpu.period", "cpu.cfs_period_us", &period.to_string());
        // A running container's old quota may not fit the new period: then the quota goes first.
        if put().is_err() {
            put_quota()?;
            return put();
        }
    }
    put_quota()
}

/// `memory.swap.max`, which counts swap alone, for `memory.swap`, which counts memory and swap together.
pub(crate) fn swap_max(limit: Option<i64>, swap: Option<i64>) -> Result<Option<i64>> {
    match (limit, swap) {
        (Some(limit), None) if limit < 0 => Ok(Some(-1)),
        (_, None) => Ok(None),
        (_, Some(swap)) if swap < 0 => Ok(Some(-1)),
        (Some(limit), Some(swap)) if limit > 0 && swap >= limit => Ok(Some(swap - limit)),
        (Some(limit), Some(_)) if limit > 0 => Err(unsupported(
            "memory.swap",
            "it is memory plus swap, so it cannot be less than the memory limit",
        )),
        _ => Err(unsupported(
            "memory.swap",
            "on cgroup version 2 it needs a memory limit beside it",
        )),
    }
}

fn apply_memory(target: &Target<'_>, memory: &LinuxMemory) -> Result<()> {
    // 0 means "not given" as Go clients write it.
    let given = |value: Option<i64>| value.filter(|value| *value != 0);
    let (limit, swap) = (given(memory.limit()), given(memory.swap()));
    let reservation = given(memory.reservation());
    let tcp = given(memory.kernel_tcp());
    if memory.kernel().is_some_and(|value| value > 0) {
        return Err(unsupported(
            "memory.kernel",
            "Linux has had no such limit since 5.16; leave it out",
        ));
    }
    let oom_killer = memory.disable_oom_killer();
    let field = match (limit, swap, reservation, tcp) {
        (Some(_), ..) => "memory.limit",
        (_, Some(_), ..) => "memory.swap",
        (_, _, Some(_), _) => "memory.reservation",
        (_, _, _, Some(_)) => "memory.kernelTCP",
        _ if memory.swappiness().is_some() => "memory.swappiness",
        _ if oom_killer == Some(true) => "memory.disableOOMKiller",
        _ if memory.use_hierarchy().is_some() => "memory.useHierarchy",
        _ => return Ok(()),
    };
    let files = target.files("memory", field)?;
    if files.unified {
        apply_memory_v2(&files, memory, (limit, swap), reservation, tcp)
    } else {
        apply_memory_v1(&files, memory, (limit, swap), reservation, tcp)
    }
}

fn apply_memory_v2(
    files: &Files,
    memory: &LinuxMemory,
    (limit, swap): (Option<i64>, Option<i64>),
    reservation: Option<i64>,
    tcp: Option<i64>,
) -> Result<()> {
    if memory.disable_oom_killer() == Some(true) {
        files.only_v1("memory.disableOOMKiller")?;
    }
    if memory.swappiness().is_some() {
        files.only_v1("memory.swappiness")?;
    }
    if tcp.is_some_and(|value| value > 0) {
        files.only_v1("memory.kernelTCP")?;
    }
    if memory.use_hierarchy() == Some(false) {
        return Err(unsupported(
            "memory.useHierarchy",
            "cgroup version 2 always counts the cgroups below; leave it out",
        ));
    }
    let alone = swap_max(limit, swap)?;
    if memory.check_before_update() == Some(true) {
        let usage = read(&files.directory.join("memory.current"))?;
        check_usage(usage.trim().parse().unwrap_or(0), limit, swap)?;
    }
    if let Some(alone) = alone {
        match files.put("memory.swap", "memory.swap.max", &number_or_max(alone)) {
            // Where there is no swap, both no swap and all of it are what there is.
            Err(error) if alone <= 0 && is_missing(&error) => {}
            other => other?,
        }
    }
    if let Some(limit) = limit {
        files.put("memory.limit", "memory.max", &number_or_max(limit))?;
    }
    if let Some(reservation) = reservation {
        let low = number_or_max(reservation);
        files.put("memory.reservation", "memory.low", &low)?;
    }
    Ok(())
}

/// `memory.checkBeforeUpdate`: version 1 refuses a limit below what is in use, version 2 would kill.
fn check_usage(usage: u64, limit: Option<i64>, swap: Option<i64>) -> Result<()> {
    for (field, value) in [("memory.limit", limit), ("memory.swap", swap)] {
        if value.is_some_and(|value| u64::try_from(value).is_ok_and(|value| value <= usage)) {
            return Err(unsupported(
                field,
                "more memory is in use now, and checkBeforeUpdate is set",
            ));
        }
    }
    Ok(())
}

fn apply_memory_v1(
    files: &Files,
    memory: &LinuxMemory,
    (limit, swap): (Option<i64>, Option<i64>),
    reservation: Option<i64>,
    tcp: Option<i64>,
) -> Result<()> {
    if let (Some(limit), Some(swap)) = (limit, swap)
        && swap > 0
        && (limit < 0 || swap < limit)
    {
        return Err(unsupported(
            "memory.swap",
            "it is memory plus swap, so it cannot be less than the memory limit",
        ));
    }
    if let Some(hierarchy) = memory.use_hierarchy() {
        let value = u8::from(hierarchy).to_string();
        files.put("memory.useHierarchy", "memory.use_hierarchy", &value)?;
    }
    let put_limit = || match limit {
        Some(limit) => files.put("memory.limit", "memory.limit_in_bytes", &limit.to_string()),
        None => Ok(()),
    };
    let put_swap = |swap: i64| {
        let file = "memory.memsw.limit_in_bytes";
        match files.put("memory.swap", file, &swap.to_string()) {
            Err(error) if swap < 0 && is_missing(&error) => Ok(()),
            other => other,
        }
    };
    // No memory limit beside an old limit of both would be refused.
    let swap = swap.or(limit.filter(|limit| *limit < 0));
    match swap {
        Some(swap) => {
            // Memory plus swap can never be less than memory: the order depends on what is there now.
            let early = put_limit();
            put_swap(swap)?;
            if early.is_err() {
                put_limit()?;
            }
        }
        None => put_limit()?,
    }
    if let Some(reservation) = reservation {
        let soft = reservation.to_string();
        files.put("memory.reservation", "memory.soft_limit_in_bytes", &soft)?;
    }
    if let Some(tcp) = tcp {
        let file = "memory.kmem.tcp.limit_in_bytes";
        files.put("memory.kernelTCP", file, &tcp.to_string())?;
    }
    if let Some(swappiness) = memory.swappiness() {
        let swappiness = swappiness.to_string();
        files.put("memory.swappiness", "memory.swappiness", &swappiness)?;
    }
    if let Some(disable) = memory.disable_oom_killer() {
        let value = u8::from(disable).to_string();
        files.put("memory.disableOOMKiller", "memory.oom_control", &value)?;
    }
    Ok(())
}

fn apply_huge_pages(target: &Target<'_>, index: usize, huge: &LinuxHugepageLimit) -> Result<()> {
    let field = format!("hugepageLimits[{index}]");
    let files = target.files("hugetlb", &field)?;
    let size = huge.page_size();
    let name = match files.unified {
        true => "max",
        false => "limit_in_bytes",
    };
    let file = format!("hugetlb.{size}.{name}");
    if size.contains('/') || !files.has(&file) {
        return Err(unsupported(
            &format!("{field}.pageSize"),
            "this system has no huge pages of that size; the form is \"2MB\"",
        ));
    }
    let limit = match files.unified {
        true => number_or_max(huge.limit()),
        false => huge.limit().to_string(),
    };
    let field = format!("{field}.limit");
    files.put(&field, &file, &limit)?;
    // A limit on reservations, which fails in mmap and not by a signal, is newer (Linux 5.7).
    match files.put(&field, &format!("hugetlb.{size}.rsvd.{name}"), &limit) {
        Err(error) if is_missing(&error) => Ok(()),
        other => other,
    }
}

fn apply_network(target: &Target<'_>, network: &LinuxNetwork) -> Result<()> {
    if let Some(class) = network.class_id() {
        let files = target.files("net_cls", "network.classID")?;
        files.put("network.classID", "net_cls.classid", &class.to_string())?;
    }
    for (index, one) in network.priorities().iter().flatten().enumerate() {
        let field = format!("network.priorities[{index}]");
        let files = target.files("net_prio", &field)?;
        let line = format!("{} {}", one.name(), one.priority());
        files.put(&field, "net_prio.ifpriomap", &line)?;
    }
    Ok(())
}

fn apply_rdma(target: &Target<'_>, device: &str, limits: &LinuxRdma) -> Result<()> {
    let field = format!("rdma[{device:?}]");
    let files = target.files("rdma", &field)?;
    let mut line = device.to_owned();
    for (name, value) in [
        ("hca_handle", limits.hca_handles()),
        ("hca_object", limits.hca_objects()),
    ] {
        if let Some(value) = value {
            line.push_str(&format!(" {name}={value}"));
        }
    }
    if line.len() == device.len() {
        return Err(unsupported(
            &field,
            "it needs hcaHandles, hcaObjects or both",
        ));
    }
    files.put(&field, "rdma.max", &line)
}

/// A kind of limit on what goes to and from single disks.
#[derive(Debug, Clone, Copy)]
pub struct Throttle<'a> {
    /// Its name in `linux.resources.blockIO`.
    pub field: &'static str,
    /// Its name in version 1's `blkio.throttle.*_device`.
    pub v1: &'static str,
    /// Its key in version 2's `io.max`.
    pub v2: &'static str,
    /// The disks, with their limits.
    pub devices: &'a [LinuxThrottleDevice],
}

/// All kinds of limits on single disks.
pub fn throttles(block: &LinuxBlockIo) -> [Throttle<'_>; 4] {
    [
        (
            ["throttleReadBpsDevice", "read_bps", "rbps"],
            block.throttle_read_bps_device(),
        ),
        (
            ["throttleWriteBpsDevice", "write_bps", "wbps"],
            block.throttle_write_bps_device(),
        ),
        (
            ["throttleReadIOPSDevice", "read_iops", "riops"],
            block.throttle_read_iops_device(),
        ),
        (
            ["throttleWriteIOPSDevice", "write_iops", "wiops"],
            block.throttle_write_iops_device(),
        ),
    ]
    .map(|([field, v1, v2], devices)| Throttle {
        field,
        v1,
        v2,
        devices: devices.as_deref().unwrap_or_default(),
    })
}

fn apply_block(target: &Target<'_>, block: &LinuxBlockIo) -> Result<()> {
    // 0 means "not given" as Go clients write it.
    let given = |value: Option<u16>| value.filter(|value| *value != 0).map(u64::from);
    let mut weights = vec![(
        "blockIO".to_owned(),
        None,
        given(block.weight()),
        given(block.leaf_weight()),
    )];
    for (index, one) in block.weight_device().iter().flatten().enumerate() {
        weights.push((
            format!("blockIO.weightDevice[{index}]"),
            Some(format!("{}:{}", one.major(), one.minor())),
            given(one.weight()),
            given(one.leaf_weight()),
        ));
    }
    for (field, device, weight, leaf) in &weights {
        if let Some(weight) = weight {
            let field = format!("{field}.weight");
            let files = target.files("blkio", &field)?;
            put_weight(&files, &field, device.as_deref(), *weight)?;
        }
        if let Some(leaf) = leaf {
            let field = format!("{field}.leafWeight");
            let files = target.files("blkio", &field)?;
            put_leaf_weight(&files, &field, device.as_deref(), *leaf)?;
        }
    }
    for throttle in throttles(block) {
        let Throttle { v1, v2, .. } = throttle;
        for (index, device) in throttle.devices.iter().enumerate() {
            let field = format!("blockIO.{}[{index}]", throttle.field);
            let files = target.files("blkio", &field)?;
            let number = format!("{}:{}", device.major(), device.minor());
            let rate = device.rate();
            if !files.unified {
                let file = format!("blkio.throttle.{v1}_device");
                files.put(&field, &file, &format!("{number} {rate}"))?;
            } else if rate == 0 {
                files.put(&field, "io.max", &format!("{number} {v2}=max"))?;
            } else {
                files.put(&field, "io.max", &format!("{number} {v2}={rate}"))?;
            }
        }
    }
    Ok(())
}

/// The weight of version 2's `io.weight` (1 to 10000) for a weight of version 1 (10 to 1000); there is none for others.
pub fn io_weight(weight: u64) -> Option<u64> {
    (10..=1000)
        .contains(&weight)
        .then(|| 1 + (weight - 10) * 9999 / 990)
}

/// The weight files depend on the I/O scheduler: BFQ has its own, and version 2 a general one beside it.
fn put_weight(files: &Files, field: &str, device: Option<&str>, weight: u64) -> Result<()> {
    let line = |weight: u64, all: &str| match device {
        Some(device) => format!("{device} {weight}"),
        None => format!("{all}{weight}"),
    };
    if !files.unified {
        let names = match device {
            None => ["blkio.bfq.weight", "blkio.weight"],
            Some(_) => ["blkio.bfq.weight_device", "blkio.weight_device"],
        };
        let name = names.into_iter().find(|name| files.has(name));
        let name = name.ok_or_else(|| unsupported(field, "no I/O scheduler here has weights"))?;
        return files.put(field, name, &line(weight, ""));
    }
    if files.has("io.bfq.weight") {
        return files.put(field, "io.bfq.weight", &line(weight, ""));
    }
    if !files.has("io.weight") {
        return Err(unsupported(field, "no I/O scheduler here has weights"));
    }
    let weight = io_weight(weight).ok_or_else(|| unsupported(field, "it must be 10 to 1000"))?;
    files.put(field, "io.weight", &line(weight, "default "))
}

/// CFQ alone had it, which went with Linux 5.0.
fn put_leaf_weight(files: &Files, field: &str, device: Option<&str>, weight: u64) -> Result<()> {
    let (name, line) = match device {
        None => ("blkio.leaf_weight", weight.to_string()),
        Some(device) => ("blkio.leaf_weight_device", format!("{device} {weight}")),
    };
    if files.unified || !files.has(name) {
        return Err(unsupported(
            field,
            "Linux has had no such weight since 5.0; leave it out",
        ));
    }
    files.put(field, name, &line)
}

fn apply_unified(target: &Target<'_>, values: &HashMap<String, String>) -> Result<()> {
    let Some(directory) = target.cgroup.unified() else {
        return Err(unsupported(
            "unified",
            "this system has no cgroup version 2 hierarchy",
        ));
    };
    let files = Files {
        directory,
        unified: true,
    };
    let mut names: Vec<_> = values.iter().collect();
    // cpu.max before cpu.max.burst, and the same order in every run.
    names.sort();
    for (name, value) in names {
        let field = format!("unified[{name:?}]");
        let controller = match name.split_once('.') {
            Some(("cgroup", rest)) if rest.starts_with("max.") => "cgroup",
            Some((controller, _)) if controller != "cgroup" && !name.contains('/') => controller,
            _ => {
                return Err(unsupported(
                    &field,
                    "it must name the file of a controller, such as memory.high",
                ));
            }
        };
        if controller != "cgroup" {
            target.has(&files.directory, controller)?;
        }
        if !files.has(name) {
            return Err(unsupported(
                &field,
                "there is no such file; the controller is not available here",
            ));
        }
        for line in value.lines() {
            files.put(&field, name, line)?;
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

    #[test]
    fn block_weights_map_at_both_ends_and_in_the_middle() {
        assert_eq!(io_weight(10), Some(1));
        assert_eq!(io_weight(500), Some(4950));
        assert_eq!(io_weight(1000), Some(10_000));
        assert_eq!(io_weight(9), None);
        assert_eq!(io_weight(1001), None);
    }

    #[test]
    fn swap_alone_is_both_less_memory() {
        assert_eq!(swap_max(Some(100), Some(300)).unwrap(), Some(200));
        assert_eq!(swap_max(Some(100), Some(100)).unwrap(), Some(0));
        assert_eq!(swap_max(Some(100), Some(-1)).unwrap(), Some(-1));
        assert_eq!(swap_max(None, Some(-1)).unwrap(), Some(-1));
        assert_eq!(swap_max(Some(-1), None).unwrap(), Some(-1));
        assert_eq!(swap_max(Some(100), None).unwrap(), None);
        assert!(swap_max(Some(100), Some(99)).is_err());
        assert!(swap_max(None, Some(100)).is_err());
        assert!(swap_max(Some(-1), Some(100)).is_err());
    }

    #[test]
    fn a_limit_below_the_usage_is_refused_when_that_is_asked_for() {
        assert!(check_usage(100, Some(101), None).is_ok());
        assert!(check_usage(100, Some(-1), Some(-1)).is_ok());
        assert!(check_usage(100, Some(100), None).is_err());
        assert!(check_usage(100, None, Some(50)).is_err());
    }

    #[test]
    fn a_pids_limit_is_a_number_or_none() {
        assert_eq!(pids_max(-1), "max");
        assert_eq!(pids_max(0), "1");
        assert_eq!(pids_max(7), "7");
    }
}
