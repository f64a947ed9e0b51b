//! How large a microVM is: virtual CPUs and memory from what the bundle says.
//!
//! One function decides. First `vm.hwConfig`, which speaks of the machine itself; then `linux.resources`, which
//! limits the workload in it; then the configuration. A wrong number is the bundle's fault and named by its place.

use oci_spec::runtime::LinuxMemory;

use crate::bundle::Bundle;
use crate::config::MicrovmConfig;

/// What the guest's kernel and agent need beside the workload's limit.
const OVERHEAD: u64 = 64 << 20;

/// What the host's cgroup gets beside the workload's limit: the guest's need and the VMM's own.
const HOST_OVERHEAD: u64 = 2 * OVERHEAD;

/// Below this no guest kernel boots reliably.
const MEMORY_MIN: u64 = 96 << 20;

/// Guest memory comes in pieces of this size, a huge page.
const MEMORY_STEP: u64 = 2 << 20;

/// The most virtual CPUs of one microVM.
const VCPUS_MAX: u32 = 64;

/// What all containers of a pod may have together, on its sandbox (containerd's CRI plugin): microseconds of processor
/// time in a period, that period, and bytes.
const POD_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// The size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Number of virtual CPUs.
    pub vcpus: u8,
    /// Guest memory in bytes, a multiple of 2 MiB.
    pub memory: u64,
}

/// A size that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{at}` is {value}: {expected}")]
pub struct SizeError {
    at: &'static str,
    value: i128,
    expected: String,
}

/// The size of the microVM for `bundle`.
///
/// - CPUs: `vm.hwConfig.vcpus`; else the quota in whole CPUs, rounded up; else the configuration. Never more than the
///   host has, unless `hwConfig` says so.
/// - Memory: `vm.hwConfig.memory`; else the limit plus [`OVERHEAD`]; else the configuration.
///
/// The sandbox of a Kubernetes pod has annotations with the sums of its containers' quotas and limits, which then count.
///
/// # Errors
/// A number is out of range.
pub fn size(bundle: &Bundle, config: &MicrovmConfig, host_cpus: u32) -> Result<Size, SizeError> {
    let hardware = bundle
        .vm()
        .and_then(|vm| vm.hw_config.clone())
        .unwrap_or_default();
    let resources = bundle
        .spec()
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());

    let vcpus = match hardware.vcpus {
        Some(vcpus) if (1..=VCPUS_MAX).contains(&vcpus) => vcpus,
        Some(vcpus) => {
            return Err(out_of_range(
                "vm.hwConfig.vcpus",
                vcpus.into(),
                format!("use 1 to {VCPUS_MAX}"),
            ));
        }
        None => {
            let cpu = resources.and_then(|resources| resources.cpu().as_ref());
            let quota = annotated(bundle, POD_CPU_QUOTA)
                .or_else(|| u64::try_from(cpu.and_then(|cpu| cpu.quota())?).ok());
            // The kernel's default period, in microseconds.
            let period = annotated(bundle, POD_CPU_PERIOD)
                .or_else(|| {
                    cpu.and_then(|cpu| cpu.period())
                        .filter(|period| *period > 0)
                })
                .unwrap_or(100_000);
            let asked = quota
                .filter(|quota| *quota > 0)
                .map(|quota| quota.div_ceil(period));
            let asked = asked.map_or(config.vcpus, |cpus| u32::try_from(cpus).unwrap_or(u32::MAX));
            within(asked, host_cpus)
        }
    };

    let limit = resources
        .and_then(|resources| resources.memory().as_ref())
        .and_then(|memory| memory.limit());
    let limit = annotated(bundle, POD_MEMORY)
        .and_then(|limit| i64::try_from(limit).ok())
        .or(limit);
    let memory = match (
        hardware.memory,
        limit
            .and_then(|limit| u64::try_from(limit).ok())
            .filter(|limit| *limit > 0),
    ) {
        (Some(memory), _) if memory < MEMORY_MIN => {
            let expected = format!("use at least {MEMORY_MIN} bytes ({} MiB)", MEMORY_MIN >> 20);
            return Err(out_of_range("vm.hwConfig.memory", memory.into(), expected));
        }
        (Some(memory), _) => memory,
        (None, Some(limit)) => limit.saturating_add(OVERHEAD),
        (None, None) => config.memory_mib.saturating_mul(1 << 20),
    };
    let memory = memory.max(MEMORY_MIN).checked_next_multiple_of(MEMORY_STEP);
    // 46 bits of guest physical address space are what every x86-64 processor with virtualization has.
    let memory = memory.filter(|memory| *memory <= 1 << 45).ok_or_else(|| {
        let (at, value) = match hardware.memory {
            Some(memory) => ("vm.hwConfig.memory", i128::from(memory)),
            None => (
                "linux.resources.memory.limit",
                i128::from(limit.unwrap_or(i64::MAX)),
            ),
        };
        out_of_range(at, value, format!("use at most {} bytes", 1_u64 << 45))
    })?;
    Ok(Size {
        vcpus: u8::try_from(vcpus).unwrap_or(u8::MAX),
        memory,
    })
}

/// The memory of a machine that runs, when its workload's limit becomes `limit`: what it would be made with, but no more
/// than the host has. A container gets no more than that either, whatever its limit.
pub fn grown(limit: u64, host_memory: u64) -> u64 {
    limit.saturating_add(OVERHEAD).min(host_memory)
}

/// What the host's cgroup of a machine may have when its workload may have `workload`: [`HOST_OVERHEAD`] more. A machine
/// that has `machine` bytes whatever its workload may have needs room for those.
pub fn host_memory(workload: &LinuxMemory, machine: u64) -> LinuxMemory {
    let machine = i64::try_from(machine.saturating_add(OVERHEAD)).unwrap_or(i64::MAX);
    let more = match workload.limit() {
        Some(limit) if limit > 0 => {
            let raised = limit.saturating_add_unsigned(HOST_OVERHEAD);
            raised.max(machine) - limit
        }
        _ => HOST_OVERHEAD as i64,
    };
    let raised = |limit: Option<i64>| match limit {
        Some(limit) if limit > 0 => Some(limit.saturating_add(more)),
        unlimited => unlimited,
    };
    let mut host = *workload;
    host.set_limit(raised(workload.limit()))
        .set_swap(raised(workload.swap()))
        .set_reservation(raised(workload.reservation()))
        .set_kernel(None)
        .set_kernel_tcp(None);
    host
}

/// The size of a microVM whose bundle says nothing of it.
pub fn configured(config: &MicrovmConfig, host_cpus: u32) -> Size {
    let memory = config.memory_mib.saturating_mul(1 << 20).max(MEMORY_MIN);
    Size {
        // At most VCPUS_MAX.
        vcpus: within(config.vcpus, host_cpus) as u8,
        memory: memory
            .checked_next_multiple_of(MEMORY_STEP)
            .unwrap_or(memory),
    }
}

/// As many virtual CPUs as are asked for and the host has.
fn within(asked: u32, host_cpus: u32) -> u32 {
    asked.clamp(1, host_cpus.clamp(1, VCPUS_MAX))
}

/// What an annotation says if it is a number above 0: 0 stands for no limit.
fn annotated(bundle: &Bundle, key: &str) -> Option<u64> {
    let number = bundle.annotation(key)?.parse().ok()?;
    (number > 0).then_some(number)
}

fn out_of_range(at: &'static str, value: i128, expected: String) -> SizeError {
    SizeError {
        at,
        value,
        expected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sized(vm: &str, resources: &str) -> Result<Size, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        let config = format!(
            r#"{{"ociVersion":"1.2.0","root":{{"path":"rootfs"}},"vm":{vm},"linux":{{"resources":{resources}}},
            "process":{{"cwd":"/","args":["sh"],"user":{{"uid":0,"gid":0}}}}}}"#
        );
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        let config = MicrovmConfig {
            vcpus: 1,
            memory_mib: 256,
            ..MicrovmConfig::default()
        };
        size(&Bundle::load(dir.path()).unwrap(), &config, 4).map_err(|error| error.to_string())
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_configuration_decides_where_the_bundle_is_silent() {
        assert_eq!(
            sized("null", "{}"),
            Ok(Size {
                vcpus: 1,
                memory: 256 * MIB
            })
        );
        assert_eq!(
            sized("{}", r#"{"memory":{"limit":-1},"cpu":{"quota":-1}}"#),
            Ok(Size {
                vcpus: 1,
                memory: 256 * MIB
            })
        );
    }

    #[test]
    fn limits_are_rounded_up_and_get_the_overhead() {
        let limits = r#"{"memory":{"limit":134217729},"cpu":{"quota":150000,"period":100000}}"#;
        assert_eq!(
            sized("null", limits),
            Ok(Size {
                vcpus: 2,
                memory: 194 * MIB
            })
        );
        assert_eq!(
            sized("null", r#"{"memory":{"limit":4096}}"#),
            Ok(Size {
                vcpus: 1,
                memory: 96 * MIB
            })
        );
        assert_eq!(
            sized("null", r#"{"cpu":{"quota":9000000}}"#).unwrap().vcpus,
            4
        );
    }

    #[test]
    fn hardware_speaks_for_the_machine_itself() {
        let hardware = r#"{"hwConfig":{"vcpus":8,"memory":536870912}}"#;
        let limits = r#"{"memory":{"limit":1073741824},"cpu":{"quota":100000}}"#;
        assert_eq!(
            sized(hardware, limits),
            Ok(Size {
                vcpus: 8,
                memory: 512 * MIB
            })
        );
    }

    #[test]
    fn a_pods_sums_count_for_its_sandbox() {
        let pod = |annotations: &str| {
            let section = format!(r#"null,"annotations":{{{annotations}}}"#);
            sized(
                &section,
                r#"{"cpu":{"quota":100000},"memory":{"limit":67108864}}"#,
            )
            .unwrap()
        };
        let sums = r#""io.kubernetes.cri.sandbox-cpu-quota":"250000",
            "io.kubernetes.cri.sandbox-cpu-period":"100000","io.kubernetes.cri.sandbox-memory":"536870912""#;
        let expected = Size {
            vcpus: 3,
            memory: 576 * MIB,
        };
        assert_eq!(pod(sums), expected);
        let none =
            r#""io.kubernetes.cri.sandbox-cpu-quota":"0","io.kubernetes.cri.sandbox-memory":"-7""#;
        let expected = Size {
            vcpus: 1,
            memory: 128 * MIB,
        };
        assert_eq!(pod(none), expected);
    }

    #[test]
    fn the_hosts_cgroup_has_room_for_the_machine_beside_the_workloads_limit() {
        let of = |limit: i64, swap: i64, machine: u64| {
            let mut memory = LinuxMemory::default();
            memory.set_limit(Some(limit)).set_swap(Some(swap));
            let host = host_memory(&memory, machine);
            (host.limit().unwrap(), host.swap().unwrap())
        };
        let mib = MIB as i64;
        assert_eq!(of(64 * mib, 80 * mib, 0), (192 * mib, 208 * mib));
        assert_eq!(of(64 * mib, -1, 128 * MIB), (192 * mib, -1));
        // It keeps what it was made with.
        assert_eq!(of(64 * mib, 80 * mib, 256 * MIB), (320 * mib, 336 * mib));
        assert_eq!(of(-1, -1, 256 * MIB), (-1, -1));
        assert_eq!(of(i64::MAX, 0, 0), (i64::MAX, 0));
    }

    #[test]
    fn a_machine_grows_as_it_would_be_made_but_not_beyond_its_host() {
        assert_eq!(grown(1024 * MIB, 4096 * MIB), 1088 * MIB);
        assert_eq!(grown(u64::MAX, 4096 * MIB), 4096 * MIB);
    }

    #[test]
    fn impossible_sizes_are_named() {
        assert_eq!(
            sized(r#"{"hwConfig":{"vcpus":0}}"#, "{}").unwrap_err(),
            "`vm.hwConfig.vcpus` is 0: use 1 to 64"
        );
        let error = sized(r#"{"hwConfig":{"memory":1024}}"#, "{}").unwrap_err();
        assert_eq!(
            error,
            "`vm.hwConfig.memory` is 1024: use at least 100663296 bytes (96 MiB)"
        );
        let error = sized("null", r#"{"memory":{"limit":9223372036854775807}}"#).unwrap_err();
        assert!(
            error.starts_with("`linux.resources.memory.limit` is 9223372036854775807: use at most"),
            "{error}"
        );
    }
}
