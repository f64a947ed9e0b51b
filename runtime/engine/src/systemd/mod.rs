//! The systemd cgroup driver: a container's cgroup is a transient scope, made and limited by systemd.
//!
//! systemd makes a scope only around a process, and ends it with its last one; a container's first process is born in
//! its cgroup, so the cgroup has to be there before. Between the two a *keeper*, a process that only waits, holds the
//! scope. Limits are set twice: as the unit's properties, for systemd to know and to show them, and then by
//! [`Cgroup::apply`](crate::Cgroup::apply), which can do more. The scope is delegated to us.

mod bus;

use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};

use crate::cgroup::{self, Layout, cpu_weight};
use crate::clone::{Child, ExitGuard, clone, exit_now};
use bus::{Bus, Property, Value};

pub use bus::Error as BusError;

/// A scope could not be named, made, changed or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `linux.cgroupsPath` does not name one.
    #[error("linux.cgroupsPath {path:?}: {reason}")]
    Path {
        /// As given.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// systemd did not do it.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The keeper could not be made.
    #[error("cannot make the process that holds a scope")]
    Keeper(#[source] std::io::Error),
    /// The system's cgroups are not known.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
}

/// The unit of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    /// The slice that it is in.
    slice: String,
    /// Its own name, with `.scope`.
    unit: String,
    /// Whether it is the user's manager that has it, and not the system's.
    user: bool,
}

/// Whether a cgroup's path is systemd's `slice:prefix:name`, and can hardly be meant as anything else.
pub fn names_a_scope(cgroups_path: &Path) -> bool {
    let text = cgroups_path.to_str().unwrap_or_default();
    let parts: Vec<&str> = text.split(':').collect();
    matches!(parts[..], [slice, _, _] if slice.ends_with(".slice"))
}

impl Scope {
    /// The scope of a container: `linux.cgroupsPath` as `slice:prefix:name`, or `rt-<id>.scope` if there is none.
    ///
    /// # Errors
    /// The path has another form, or a part that systemd would not take.
    pub fn new(cgroups_path: Option<&Path>, id: &str, user: bool) -> Result<Self, Error> {
        let given = cgroups_path.filter(|path| !path.as_os_str().is_empty());
        let refuse = |reason| Error::Path {
            path: given.unwrap_or(Path::new("")).to_owned(),
            reason,
        };
        let (slice, prefix, name) = match given {
            None => ("", "rt", id),
            Some(path) => {
                let text = path
                    .to_str()
                    .ok_or_else(|| refuse("it is not valid UTF-8"))?;
                let parts: Vec<&str> = text.split(':').collect();
                let [slice, prefix, name] = parts[..] else {
                    return Err(refuse(
                        "with --systemd-cgroup it must have the form slice:prefix:name",
                    ));
                };
                (slice, prefix, name)
            }
        };
        let slice = match (slice, user) {
            ("", true) => "user.slice",
            ("", false) => "system.slice",
            (slice, _) => slice,
        };
        if name.is_empty() || name.contains('/') || prefix.contains('/') {
            return Err(refuse(
                "the last part must name the container, without \"/\"",
            ));
        }
        if name.ends_with(".slice") {
            return Err(refuse("it names a slice; a container is a scope"));
        }
        expand_slice(slice).ok_or_else(|| {
            refuse("the first part must be a slice, such as system.slice or a-b.slice")
        })?;
        let unit = match prefix {
            "" => format!("{name}.scope"),
            prefix => format!("{prefix}-{name}.scope"),
        };
        Ok(Self {
            slice: slice.to_owned(),
            unit,
            user,
        })
    }

    /// Where the scope's cgroup will be.
    ///
    /// # Errors
    /// The user's manager does not say where its own is.
    pub fn cgroup_path(&self) -> Result<PathBuf, Error> {
        let base = match self.user {
            true => Bus::connect(true)?.control_group()?,
            false => "/".to_owned(),
        };
        let mut path = PathBuf::from(base);
        path.extend(expand_slice(&self.slice).unwrap_or_default());
        path.push(&self.unit);
        Ok(path)
    }

    /// Makes the scope with the limits given. It stays at least as long as what is returned.
    ///
    /// The caller must have one thread: it is cloned.
    ///
    /// # Errors
    /// systemd's answer, for example that there is such a unit.
    pub fn start(&self, id: &str, resources: Option<&LinuxResources>) -> Result<Keeper, Error> {
        let mut bus = Bus::connect(self.user)?;
        let keeper = Keeper::new().map_err(Error::Keeper)?;
        let mut properties = vec![
            ("Description", Value::Text(format!("rt container {id}"))),
            ("Slice", Value::Text(self.slice.clone())),
            ("Delegate", Value::Bool(true)),
            ("PIDs", Value::Pids(vec![keeper.pid().as_raw() as u32])),
            ("MemoryAccounting", Value::Bool(true)),
            ("CPUAccounting", Value::Bool(true)),
            ("TasksAccounting", Value::Bool(true)),
            ("DefaultDependencies", Value::Bool(false)),
        ];
        let unified = Layout::of_system()?.v1("memory").is_none();
        properties.push((
            if unified {
                "IOAccounting"
            } else {
                "BlockIOAccounting"
            },
            Value::Bool(true),
        ));
        properties.extend(limits(resources, unified));
        match bus.start(&self.unit, &properties) {
            // One that has failed stays known until somebody says that it may go.
            Err(error) if error.is("UnitExists") => {
                bus.reset_failed(&self.unit)?;
                bus.start(&self.unit, &properties)?;
            }
            other => other?,
        }
        Ok(keeper)
    }

    /// Tells systemd of changed limits.
    ///
    /// # Errors
    /// systemd's answer.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        let unified = Layout::of_system()?.v1("memory").is_none();
        let properties = limits(Some(resources), unified);
        if !properties.is_empty() {
            Bus::connect(self.user)?.set(&self.unit, &properties)?;
        }
        Ok(())
    }

    /// Ends the scope. It may have ended by itself.
    ///
    /// # Errors
    /// systemd's answer.
    pub fn stop(&self) -> Result<(), Error> {
        let mut bus = Bus::connect(self.user)?;
        match bus.stop(&self.unit) {
            Err(error) if error.is("NoSuchUnit") => return Ok(()),
            other => other?,
        }
        // It is known still only if it has failed.
        match bus.reset_failed(&self.unit) {
            Err(error) if !error.is("NoSuchUnit") => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// systemd.slice(5): `a-b.slice` lies in `a.slice`; `-.slice` is the root.
fn expand_slice(slice: &str) -> Option<Vec<String>> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(Vec::new());
    }
    let mut path = Vec::new();
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() || part.contains('/') {
            return None;
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
        prefix.push('-');
    }
    Some(path)
}

/// A process that waits, so that a scope is not empty; it ends when this is dropped, or with us.
#[derive(Debug)]
pub struct Keeper(Child);

impl Keeper {
    fn new() -> std::io::Result<Self> {
        let parent = nix::unistd::getpid();
        match clone(0, None)? {
            Some(child) => Ok(Self(child)),
            None => {
                let _guard = ExitGuard;
                let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
                // The parent may have ended before that.
                if nix::unistd::getppid() != parent {
                    exit_now(0);
                }
                loop {
                    nix::unistd::pause();
                }
            }
        }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.0.pid
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.kill_and_reap();
    }
}

/// systemd.resource-control(5): the limits that a unit can have.
fn limits(resources: Option<&LinuxResources>, unified: bool) -> Vec<Property> {
    let mut properties = Vec::new();
    let Some(resources) = resources else {
        return properties;
    };
    // -1 and infinity are the same bits.
    let number = |value: i64| Value::U64(value as u64);
    if let Some(memory) = resources.memory() {
        let given = |value: Option<i64>| value.filter(|value| *value != 0);
        let (limit, swap) = (given(memory.limit()), given(memory.swap()));
        if let Some(limit) = limit {
            let name = if unified { "MemoryMax" } else { "MemoryLimit" };
            properties.push((name, number(limit)));
        }
        if unified {
            if let Some(reservation) = given(memory.reservation()) {
                properties.push(("MemoryLow", number(reservation)));
            }
            // What makes no sense is refused by Cgroup::apply.
            if let Ok(Some(swap)) = cgroup::swap_max(limit, swap) {
                properties.push(("MemorySwapMax", number(swap)));
            }
        }
    }
    if let Some(cpu) = resources.cpu() {
        match cpu.shares().filter(|shares| *shares != 0) {
            Some(shares) if unified => {
                properties.push(("CPUWeight", Value::U64(cpu_weight(shares))));
            }
            Some(shares) => properties.push(("CPUShares", Value::U64(shares))),
            // systemd's word for an idle cgroup (252).
            None if unified && cpu.idle() == Some(1) => {
                properties.push(("CPUWeight", Value::U64(0)))
            }
            None => {}
        }
        let period = cpu.period().filter(|period| *period != 0);
        if let Some(period) = period {
            properties.push(("CPUQuotaPeriodUSec", Value::U64(period)));
        }
        if let Some(quota) = cpu.quota().filter(|quota| *quota != 0) {
            let a_second = cpu_quota_per_second(quota, period.unwrap_or(100_000));
            properties.push(("CPUQuotaPerSecUSec", Value::U64(a_second)));
        }
        for (name, list) in [
            ("AllowedCPUs", cpu.cpus()),
            ("AllowedMemoryNodes", cpu.mems()),
        ] {
            let bits = list.as_deref().filter(|list| !list.is_empty());
            properties.extend(bits.and_then(bits_of).map(|bits| (name, Value::Bits(bits))));
        }
    }
    if let Some(pids) = resources.pids() {
        properties.push((
            "TasksMax",
            number(if pids.limit() == 0 { 1 } else { pids.limit() }),
        ));
    }
    properties
}

/// systemd keeps a quota as a percentage: rounded up, the kernel then takes the exact one below it.
fn cpu_quota_per_second(quota: i64, period: u64) -> u64 {
    match u64::try_from(quota) {
        Ok(quota) => (quota.saturating_mul(1_000_000) / period).next_multiple_of(10_000),
        Err(_) => u64::MAX,
    }
}

/// A list such as `0-2,7` as bits, the lowest first.
fn bits_of(list: &str) -> Option<Vec<u8>> {
    let mut bits = Vec::new();
    for range in list.split(',').map(str::trim).filter(|one| !one.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        // The kernel has at most 8192 processors.
        if first > last || last >= 8192 {
            return None;
        }
        for number in first..=last {
            if bits.len() <= number / 8 {
                bits.resize(number / 8 + 1, 0);
            }
            bits[number / 8] |= 1 << (number % 8);
        }
    }
    Some(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(given: &str) -> Result<String, Error> {
        let scope = Scope::new(Some(Path::new(given)), "c1", false)?;
        Ok(scope.cgroup_path()?.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_path_names_slice_prefix_and_container() {
        assert_eq!(
            path("a-b-c.slice:rt:c1").unwrap(),
            "/a.slice/a-b.slice/a-b-c.slice/rt-c1.scope"
        );
        assert_eq!(path(":rt:c1").unwrap(), "/system.slice/rt-c1.scope");
        assert_eq!(path("-.slice::c1").unwrap(), "/c1.scope");
        assert_eq!(path("").unwrap(), "/system.slice/rt-c1.scope");
    }

    #[test]
    fn what_systemd_would_not_take_is_refused() {
        for given in [
            "/a/b",
            "a.slice:b",
            "a.slice:b:c:d",
            "a:b:c",
            "a--b.slice:x:y",
            ".slice:x:y",
            "../a.slice:x:y",
            "a.slice:x:../y",
            "a.slice:x/y:z",
            "a.slice:x:",
            "a.slice:x:y.slice",
        ] {
            let error = path(given).unwrap_err().to_string();
            assert!(error.starts_with("linux.cgroupsPath"), "{given}: {error}");
        }
    }

    #[test]
    fn limits_become_properties() {
        let resources: LinuxResources = serde_json::from_str(
            r#"{"memory": {"limit": 100, "swap": 300}, "pids": {"limit": -1},
                "cpu": {"shares": 1024, "quota": 15000, "period": 100000, "cpus": "0,2-3"}}"#,
        )
        .unwrap();
        let properties = limits(Some(&resources), true);
        for expected in [
            ("MemoryMax", Value::U64(100)),
            ("MemorySwapMax", Value::U64(200)),
            ("TasksMax", Value::U64(u64::MAX)),
            ("CPUWeight", Value::U64(100)),
            ("CPUQuotaPerSecUSec", Value::U64(150_000)),
            ("CPUQuotaPeriodUSec", Value::U64(100_000)),
            ("AllowedCPUs", Value::Bits(vec![0b1101])),
        ] {
            assert!(
                properties.contains(&expected),
                "{expected:?}: {properties:?}"
            );
        }
        assert!(limits(Some(&resources), false).contains(&("CPUShares", Value::U64(1024))));
        assert_eq!(cpu_quota_per_second(1, 100_000), 10_000);
        assert_eq!(bits_of("8-9"), Some(vec![0, 3]));
        assert_eq!(bits_of("3-1"), None);
    }
}
