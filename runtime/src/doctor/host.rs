//! What the host's kernel offers, and what is installed.

use std::fs;
use std::path::Path;

use engine::cgroup::Layout;
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::AccessFlags;

use super::Check;
use crate::config::MicrovmConfig;
use crate::error_chain;
use crate::guest::Store;
use crate::isolation::microvm;

/// The controllers that bundles set limits by.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "cpuset"];
/// A server of shared files keeps one descriptor for each file that a guest knows.
const OPEN_FILES_WANTED: u64 = 65_536;
/// Without these no container can be made; the numbers are those of the kernel's `uapi/linux/capability.h`.
const NEEDED_CAPABILITIES: [(&str, u32); 4] = [
    ("CAP_SETGID", 6),
    ("CAP_SETUID", 7),
    ("CAP_SETPCAP", 8),
    ("CAP_SYS_ADMIN", 21),
];
const CAP_SYS_RESOURCE: u32 = 24;
/// What the VMM and the host need beside a guest, in MiB.
const MEMORY_BESIDE: u64 = 64;

pub(super) fn root() -> Check {
    if nix::unistd::geteuid().is_root() {
        Check::ok("root", "running as root")
    } else {
        Check::fail(
            "root",
            "not running as root",
            "run rt as root; an ordinary user can have containers, not microVMs",
        )
    }
}

pub(super) fn user() -> Check {
    if nix::unistd::geteuid().is_root() {
        Check::ok("user", "running as root")
    } else {
        Check::warn(
            "user",
            "not running as root",
            "each bundle needs a user namespace then: `rt spec --rootless` writes one that has it",
        )
    }
}

pub(super) fn capabilities() -> Check {
    const NAME: &str = "capabilities";
    if !nix::unistd::geteuid().is_root() {
        return Check::ok(NAME, "those of the user namespaces that rt makes");
    }
    let Some(effective) = read("/proc/self/status").and_then(|text| effective_capabilities(&text))
    else {
        return Check::warn(NAME, "/proc/self/status cannot be read", "mount /proc");
    };
    let has = |bit: u32| effective & (1 << bit) != 0;
    let missing: Vec<&str> = NEEDED_CAPABILITIES
        .iter()
        .filter(|(_, bit)| !has(*bit))
        .map(|(name, _)| *name)
        .collect();
    if !missing.is_empty() {
        return Check::fail(
            NAME,
            format!("{} missing", join(missing)),
            "give rt the full capabilities of root; it may be in a container itself",
        );
    }
    if !has(CAP_SYS_RESOURCE) {
        return Check::warn(
            NAME,
            "CAP_SYS_RESOURCE missing",
            "bundles that raise a hard limit, lower oom_score_adj or ask for this capability will fail",
        );
    }
    Check::ok(NAME, "all that containers need")
}

pub(super) fn cgroups() -> Check {
    const NAME: &str = "cgroup";
    let layout = match Layout::detect() {
        Ok(layout) => layout,
        Err(error) => {
            return Check::fail(
                NAME,
                error_chain(&error),
                "mount it: mount -t cgroup2 none /sys/fs/cgroup",
            );
        }
    };
    let unified = match layout.unified() {
        Some(hierarchy) => read(hierarchy.mount.join("cgroup.controllers")).unwrap_or_default(),
        None => String::new(),
    };
    let has = |controller: &str| {
        layout.v1(controller).is_some()
            || unified
                .split_ascii_whitespace()
                .any(|name| name == controller)
    };
    let writable = layout
        .hierarchies()
        .iter()
        .filter(|hierarchy| {
            hierarchy.is_unified() || CONTROLLERS.iter().any(|name| hierarchy.has(name))
        })
        .all(|hierarchy| nix::unistd::access(&hierarchy.mount, AccessFlags::W_OK).is_ok());
    let found = format!(
        "{} with {}",
        layout.name(),
        join(CONTROLLERS.into_iter().filter(|name| has(name)))
    );
    let missing: Vec<&str> = CONTROLLERS.into_iter().filter(|name| !has(name)).collect();
    if !writable {
        let advice = "mount it writable, or run rt where it is";
        return Check::fail(
            NAME,
            format!("{found}, but it cannot be written to"),
            advice,
        );
    }
    if !missing.is_empty() {
        let advice = format!(
            "bundles that limit by {} will fail; enable them in the kernel",
            join(missing)
        );
        return Check::warn(NAME, found, advice);
    }
    Check::ok(NAME, found)
}

pub(super) fn namespaces() -> Check {
    const NAME: &str = "namespaces";
    let missing: Vec<&str> = ["pid", "net", "ipc", "uts", "mnt", "cgroup"]
        .into_iter()
        .filter(|name| !Path::new("/proc/self/ns").join(name).exists())
        .collect();
    if missing.is_empty() {
        Check::ok(NAME, "pid, network, ipc, uts, mount, cgroup")
    } else {
        Check::fail(
            NAME,
            format!("no {}", join(missing)),
            "use a kernel with all namespaces (CONFIG_NAMESPACES)",
        )
    }
}

pub(super) fn user_namespaces() -> Check {
    const NAME: &str = "user-namespaces";
    const ADVICE: &str =
        "bundles with a user namespace will fail; raise user.max_user_namespaces by sysctl";
    if !Path::new("/proc/self/ns/user").exists() {
        return Check::warn(
            NAME,
            "the kernel has none",
            "bundles with a user namespace will fail",
        );
    }
    match read("/proc/sys/user/max_user_namespaces")
        .and_then(|text| text.trim().parse::<u64>().ok())
    {
        Some(0) => Check::warn(NAME, "user.max_user_namespaces is 0", ADVICE),
        Some(most) => Check::ok(NAME, format!("up to {most}")),
        None => Check::warn(NAME, "user.max_user_namespaces cannot be read", ADVICE),
    }
}

pub(super) fn seccomp() -> Check {
    const NAME: &str = "seccomp";
    match read("/proc/sys/kernel/seccomp/actions_avail") {
        Some(actions) => Check::ok(NAME, format!("filters, actions {}", actions.trim())),
        None => Check::fail(
            NAME,
            "the kernel has no seccomp filters",
            "use a kernel with CONFIG_SECCOMP_FILTER; bundles with a seccomp section will be refused",
        ),
    }
}

pub(super) fn overlay() -> Check {
    const NAME: &str = "overlay";
    let found = read("/proc/filesystems").is_some_and(|text| has_file_system(&text, "overlay"));
    if found {
        Check::ok(NAME, "overlayfs is there")
    } else {
        Check::warn(
            NAME,
            "overlayfs is not loaded",
            "modprobe overlay; container engines keep images with it",
        )
    }
}

pub(super) fn open_files() -> Check {
    const NAME: &str = "open-files";
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard >= OPEN_FILES_WANTED => Check::ok(NAME, format!("hard limit {hard}")),
        Ok((_, hard)) => Check::warn(
            NAME,
            format!("hard limit {hard}"),
            format!(
                "raise it to {OPEN_FILES_WANTED} (ulimit -Hn, LimitNOFILE=): no bundle can have more, and a microVM's \
                 shared files take one for each file in use"
            ),
        ),
        Err(errno) => Check::warn(
            NAME,
            format!("the limit cannot be read: {errno}"),
            "look at ulimit -Hn",
        ),
    }
}

pub(super) fn guest_kernel(config: &MicrovmConfig) -> Check {
    const NAME: &str = "guest-kernel";
    let store = Store::locate(None, Some(&config.guests));
    match store.select(config.guest.as_deref()) {
        Ok(guest) => {
            let record = guest.record();
            Check::ok(
                NAME,
                format!(
                    "{} ({}, Linux {})",
                    guest.name(),
                    record.kind,
                    record.kernel_release
                ),
            )
        }
        Err(error) => Check::fail(NAME, error_chain(&error), "make guest, or rt guest import"),
    }
}

pub(super) fn agent(config: &MicrovmConfig) -> Check {
    const NAME: &str = "agent";
    match microvm::agent_binary(config.agent.as_deref()) {
        Ok(path) => Check::ok(NAME, path.display().to_string()),
        Err(error) => Check::fail(
            NAME,
            error_chain(&error),
            "install rt-agent beside rt, or set microvm.agent",
        ),
    }
}

pub(super) fn memory(guest_mib: u64) -> Check {
    const NAME: &str = "memory";
    let wanted = guest_mib.saturating_add(MEMORY_BESIDE);
    match read("/proc/meminfo").and_then(|text| available_mib(&text)) {
        Some(available) if available >= wanted => {
            Check::ok(NAME, format!("{available} MiB available"))
        }
        Some(available) => Check::warn(
            NAME,
            format!("{available} MiB available, a microVM takes up to {guest_mib} MiB"),
            "free memory, or set microvm.memory_mib lower",
        ),
        None => Check::warn(NAME, "/proc/meminfo cannot be read", "mount /proc"),
    }
}

pub(super) fn huge_pages() -> Check {
    const NAME: &str = "huge-pages";
    let chosen = read("/sys/kernel/mm/transparent_hugepage/enabled").and_then(|text| chosen(&text));
    match chosen.as_deref() {
        Some(mode @ ("always" | "madvise")) => Check::ok(NAME, format!("transparent, {mode}")),
        _ => Check::warn(
            NAME,
            "no transparent huge pages",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled; without them microVMs start slower",
        ),
    }
}

pub(super) fn tun() -> Check {
    const NAME: &str = "tun";
    if Path::new("/dev/net/tun").exists() {
        Check::ok(NAME, "/dev/net/tun is there")
    } else {
        Check::warn(
            NAME,
            "there is no /dev/net/tun",
            "modprobe tun; without it a microVM has no network but loopback",
        )
    }
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok()
}

fn join<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.into_iter().collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// `CapEff` of /proc/self/status: a bit for each capability.
fn effective_capabilities(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// Whether /proc/filesystems lists `name`, as the last word of a line.
fn has_file_system(text: &str, name: &str) -> bool {
    text.lines()
        .any(|line| line.split_ascii_whitespace().next_back() == Some(name))
}

/// `MemAvailable` of /proc/meminfo, in MiB.
fn available_mib(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kib >> 10)
}

/// The word in brackets, by which the kernel marks the choice in force.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read_as_it_writes_them() {
        assert!(has_file_system(
            "nodev\tproc\nnodev\toverlay\n\text4\n",
            "overlay"
        ));
        assert!(!has_file_system("nodev\toverlayx\n", "overlay"));
        assert_eq!(
            available_mib("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"),
            Some(2)
        );
        assert_eq!(available_mib("MemTotal: 9 kB\n"), None);
        assert_eq!(
            chosen("always [madvise] never\n").as_deref(),
            Some("madvise")
        );
        assert_eq!(chosen(""), None);
        assert_eq!(
            effective_capabilities("CapPrm:\t0\nCapEff:\t00000000000000c0\n"),
            Some(0xc0)
        );
    }

    #[test]
    fn a_missing_guest_kernel_says_how_to_get_one() {
        let dir = tempfile::tempdir().unwrap();
        // `RT_GUEST_DIR` goes before the configuration; where it is set this test would read the host.
        if std::env::var_os("RT_GUEST_DIR").is_some() {
            println!("skipped: RT_GUEST_DIR is set");
            return;
        }
        let config = MicrovmConfig {
            guests: dir.path().to_owned(),
            ..MicrovmConfig::default()
        };
        let check = guest_kernel(&config);
        assert_eq!(check.status, super::super::Status::Fail);
        assert!(check.message.contains("make guest"), "{check:?}");
    }

    #[test]
    fn a_guest_larger_than_the_memory_is_a_warning() {
        assert_eq!(memory(u64::MAX).status, super::super::Status::Warn);
    }
}
