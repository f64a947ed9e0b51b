//! `rt update`: other limits for a container that lives, by runc's flags or as JSON.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};

use super::{CliError, Context, parse_id, parse_json, read_json};

/// Change the resource limits of a container
#[derive(Debug, clap::Args)]
pub(super) struct UpdateArgs {
    /// File with `linux.resources` as JSON, - for standard input; the flags of limits then do not count
    #[arg(short, long, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Weight for block devices, 10 to 1000
    #[arg(long, value_name = "WEIGHT")]
    blkio_weight: Option<u16>,
    /// Period of the CPU quota in microseconds; 0 for the system's default
    #[arg(long, value_name = "MICROSECONDS")]
    cpu_period: Option<u64>,
    /// CPU time in a period, in microseconds; -1 for no limit
    #[arg(long, value_name = "MICROSECONDS", allow_negative_numbers = true)]
    cpu_quota: Option<i64>,
    /// CPU time that may be saved up, in microseconds
    #[arg(long, value_name = "MICROSECONDS")]
    cpu_burst: Option<u64>,
    /// Weight for the CPU, 1024 by default
    #[arg(long, value_name = "SHARES")]
    cpu_share: Option<u64>,
    /// Period of the real-time CPU limit in microseconds
    #[arg(long, value_name = "MICROSECONDS")]
    cpu_rt_period: Option<u64>,
    /// Real-time CPU time in a period, in microseconds
    #[arg(long, value_name = "MICROSECONDS", allow_negative_numbers = true)]
    cpu_rt_runtime: Option<i64>,
    /// Processors to use, as in 0-2,7
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Memory nodes to use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// 1: run only where a processor is idle; 0: as usual
    #[arg(long, value_name = "0|1")]
    cpu_idle: Option<i64>,
    /// Memory limit, with a unit as in 64M; -1 for no limit
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory: Option<Size>,
    /// Memory to keep when memory is short
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory_reservation: Option<Size>,
    /// Limit of memory and swap together; -1 for no limit
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory_swap: Option<Size>,
    /// Ignored, as the kernel has no such limit any more
    #[arg(long, value_name = "SIZE", hide = true, allow_hyphen_values = true)]
    kernel_memory: Option<String>,
    /// Ignored, as runc ignores it
    #[arg(long, value_name = "SIZE", hide = true, allow_hyphen_values = true)]
    kernel_memory_tcp: Option<String>,
    /// Processes and threads; -1 for no limit
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// Schema of Intel's L3 cache allocation (not supported: refused)
    #[arg(long, value_name = "SCHEMA")]
    l3_cache_schema: Option<String>,
    /// Schema of Intel's memory bandwidth allocation (not supported: refused)
    #[arg(long, value_name = "SCHEMA")]
    mem_bw_schema: Option<String>,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

impl UpdateArgs {
    pub(super) fn run(self, context: &Context<'_>) -> Result<(), CliError> {
        let id = parse_id(&self.id)?;
        let schemas = [
            ("--l3-cache-schema", &self.l3_cache_schema),
            ("--mem-bw-schema", &self.mem_bw_schema),
        ];
        if let Some((flag, _)) = schemas.iter().find(|(_, schema)| schema.is_some()) {
            return Err(CliError::Usage(format!(
                "{flag}: Intel RDT is not supported; leave it out"
            )));
        }
        for (flag, value) in [
            ("--kernel-memory", &self.kernel_memory),
            ("--kernel-memory-tcp", &self.kernel_memory_tcp),
        ] {
            if value.is_some() {
                tracing::warn!("{flag} is ignored: the kernel has no such limit any more");
            }
        }
        let resources = match &self.resources {
            Some(path) => read(path)?,
            None => self.resources(),
        };
        Ok(context.lifecycle.update(&id, &resources)?)
    }

    /// What the flags say.
    fn resources(self) -> LinuxResources {
        let mut cpu = LinuxCpu::default();
        cpu.set_shares(self.cpu_share)
            .set_quota(self.cpu_quota)
            .set_period(self.cpu_period)
            .set_burst(self.cpu_burst)
            .set_idle(self.cpu_idle)
            .set_realtime_period(self.cpu_rt_period)
            .set_realtime_runtime(self.cpu_rt_runtime)
            .set_cpus(self.cpuset_cpus)
            .set_mems(self.cpuset_mems);
        let bytes = |size: Option<Size>| size.map(|size| size.0);
        let mut memory = LinuxMemory::default();
        memory
            .set_limit(bytes(self.memory))
            .set_reservation(bytes(self.memory_reservation))
            .set_swap(bytes(self.memory_swap));
        let block = self.blkio_weight.map(|weight| {
            let mut block = LinuxBlockIo::default();
            block.set_weight(Some(weight));
            block
        });
        let pids = self.pids_limit.map(|limit| {
            let mut pids = LinuxPids::default();
            pids.set_limit(limit);
            pids
        });
        let mut resources = LinuxResources::default();
        // The default of oci-spec is not "nothing".
        resources
            .set_devices(None)
            .set_cpu(Some(cpu))
            .set_memory(Some(memory))
            .set_block_io(block)
            .set_pids(pids);
        resources
    }
}

fn read(path: &Path) -> Result<LinuxResources, CliError> {
    const WHAT: &str = "`linux.resources`";
    if path.as_os_str() != "-" {
        return read_json(path, WHAT);
    }
    let mut text = Vec::new();
    std::io::stdin()
        .read_to_end(&mut text)
        .map_err(|source| CliError::File {
            operation: "read",
            path: path.to_owned(),
            source,
        })?;
    parse_json(path, &text, WHAT)
}

/// Bytes, by a number with or without a unit (`64M`, `1.5 GiB`; a kilobyte has 1024); -1 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size(i64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "-1" {
            return Ok(Self(-1));
        }
        let invalid = || format!("{text:?} is no size: use a number of bytes, or a unit as in 64M");
        let end = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let unit = unit.strip_prefix(' ').unwrap_or(unit).to_ascii_lowercase();
        let unit = unit.strip_suffix('b').unwrap_or(&unit);
        let power = match unit.strip_suffix('i').unwrap_or(unit) {
            "" => 0,
            "k" => 1,
            "m" => 2,
            "g" => 3,
            "t" => 4,
            "p" => 5,
            _ => return Err(invalid()),
        };
        let factor = 1i64 << (10 * power);
        let bytes = match number.parse::<i64>() {
            Ok(number) => number.checked_mul(factor),
            Err(_) => {
                let number = number.parse::<f64>().map_err(|_| invalid())?;
                let bytes = number * factor as f64;
                // Up to 2^53 a fraction's bytes are exact enough to be cut off.
                (bytes < 9e15).then_some(bytes as i64)
            }
        };
        bytes.map(Self).ok_or_else(invalid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_units_of_the_clients() {
        for (text, bytes) in [
            ("-1", -1),
            ("0", 0),
            ("1000", 1000),
            ("64M", 64 << 20),
            ("64mb", 64 << 20),
            ("64 MiB", 64 << 20),
            ("1.5k", 1536),
            ("2b", 2),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "-2", "M", "1x", "1..5M", "9999999P", "1e3", "0x10", "."] {
            assert!(text.parse::<Size>().is_err(), "{text:?}");
        }
    }
}
