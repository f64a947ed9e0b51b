//! What a VMM process can still reach, should its guest take it over: read from the host's kernel, which is trusted.

use std::collections::BTreeSet;
use std::path::PathBuf;

use engine::observation::{self, Instruction, Observation, Thread};

use super::conformance::Property;
use super::filter::{self, Filter};
use super::live;
use super::posture::{Fact, Mount, Posture, Sharing};

/// Calls that no thread of a VMM needs, and with which one could leave.
const FORBIDDEN: [&str; 26] = [
    "execve",
    "execveat",
    "fork",
    "vfork",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "mount",
    "umount2",
    "move_mount",
    "open_tree",
    "fsopen",
    "pivot_root",
    "chroot",
    "setns",
    "unshare",
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "init_module",
    "finit_module",
    "kexec_load",
    "keyctl",
    "io_uring_setup",
    "socket",
    "kcmp",
];

/// The name of the property of what a machine is given.
const SHARES: &str = "jail.shares";

/// The properties of the jail of a VMM process, whose posture is `posture`; `guest` is what the guest's kernel says of the
/// container, and `asked` what the container's configuration does.
pub fn properties(
    vmm: &Observation,
    posture: &Posture,
    guest: &Observation,
    asked: &Posture,
) -> Vec<Property> {
    let is_other = vmm.kernel != guest.kernel;
    let kernel = Fact::new("/proc/version of the guest", guest.kernel.clone());
    vec![
        Property::new("kernel", "another than the host's", &kernel, is_other),
        own_mounts(posture),
        root(posture),
        shares(posture, asked),
        Property::new(
            "jail.no-new-privileges",
            "true",
            &Fact::new(
                &posture.no_new_privileges.at,
                posture.no_new_privileges.value.to_string(),
            ),
            posture.no_new_privileges.value,
        ),
        capabilities(vmm),
        seccomp(vmm, observation::filters_of),
        directories(posture),
    ]
}

/// Whether a property that could not be seen leaves it open whether all that was asked for is there. What a machine is given
/// for other containers of its pod no configuration asks for.
pub fn must_be_seen(property: &Property) -> bool {
    property.holds.is_none() && property.name != SHARES
}

fn own_mounts(posture: &Posture) -> Property {
    let is_own = posture
        .namespaces
        .get("mount")
        .is_some_and(|fact| fact.value == Sharing::Own);
    let at = posture.namespaces.get("mount").map_or("", |fact| &fact.at);
    let found = if is_own {
        "not the host's"
    } else {
        "the host's"
    };
    Property::new(
        "jail.namespace.mount",
        "not the host's",
        &Fact::new(at, found.to_owned()),
        is_own,
    )
}

fn root(posture: &Posture) -> Property {
    let root = &posture.root_is_read_only;
    let found = Fact::new(&root.at, root.value.to_string());
    Property::new("jail.root-read-only", "true", &found, root.value)
}

/// The paths of the host that the machine is given: its root file system, and the sources of its bind mounts. In a pod
/// those of other containers are among them, which this configuration does not name.
fn shares(posture: &Posture, asked: &Posture) -> Property {
    let mounts = posture.mounts.iter().map(|fact| &fact.value);
    let shown: Vec<(&PathBuf, &Mount)> = mounts
        .filter_map(|mount| Some((mount.source.as_ref()?, mount)))
        .collect();
    let is_asked = |source: &PathBuf| {
        let mut mounts = asked.mounts.iter();
        asked.root.value.as_ref() == Some(source)
            || mounts.any(|fact| fact.value.source.as_ref() == Some(source))
    };
    let text = |(source, mount): &(&PathBuf, &Mount)| {
        let how = if mount.is_read_only { " (ro)" } else { "" };
        format!("{}{how}", source.display())
    };
    let holds = shown.iter().all(|(source, _)| is_asked(source));
    Property {
        name: SHARES.to_owned(),
        model: None,
        asked: "the root and the bind mounts".to_owned(),
        found: shown.iter().map(text).collect::<Vec<_>>().join(", "),
        holds: holds.then_some(true),
        at: posture.masked.at.clone(),
    }
}

/// None, but for the threads that serve files for the guest's users.
fn capabilities(vmm: &Observation) -> Property {
    let allowed: BTreeSet<String> = vmm::capabilities::FILE_SERVER
        .iter()
        .map(ToString::to_string)
        .collect();
    let mut beyond = Vec::new();
    for thread in &vmm.threads {
        let held = live::capabilities_of(thread, "CapPrm");
        let is_file_server =
            live::status(thread, "Name").is_some_and(|name| name.starts_with("fs"));
        let held: Vec<&String> = held
            .iter()
            .filter(|one| !is_file_server || !allowed.contains(*one))
            .collect();
        if !held.is_empty() {
            let held: Vec<&str> = held.iter().map(|one| one.as_str()).collect();
            beyond.push(format!("thread {}: {}", name_of(thread), held.join(" ")));
        }
    }
    let at = format!("/proc/{}/task/*/status: CapPrm", vmm.pid);
    let found = if beyond.is_empty() {
        format!("none in {} threads but those of files", vmm.threads.len())
    } else {
        beyond.join("; ")
    };
    Property::new(
        "jail.capabilities",
        "none, and for files what a file server needs",
        &Fact::new(at, found),
        beyond.is_empty(),
    )
}

fn name_of(thread: &Thread) -> String {
    let name = live::status(thread, "Name").unwrap_or_default();
    format!("{} ({name})", thread.tid)
}

/// Every thread has a filter, and none lets a forbidden call through.
fn seccomp(
    vmm: &Observation,
    filters_of: impl Fn(i32) -> Result<Vec<Vec<Instruction>>, String>,
) -> Property {
    let mut open = Vec::new();
    let mut unread = None;
    for thread in &vmm.threads {
        let filters = match filters_of(thread.tid) {
            Ok(filters) => filters,
            Err(reason) => {
                unread = Some(reason);
                continue;
            }
        };
        let filters: Vec<Filter> = filters.iter().map(|one| live::filter_of(one)).collect();
        let calls = FORBIDDEN
            .iter()
            .filter(|name| filter::lets_through(&filters, name, &[0]));
        let calls: Vec<&str> = calls.copied().collect();
        if filters.is_empty() {
            open.push(format!("thread {}: no filter", name_of(thread)));
        } else if !calls.is_empty() {
            open.push(format!("thread {}: {}", name_of(thread), calls.join(" ")));
        }
    }
    let at = format!("the seccomp filters of process {}", vmm.pid);
    let asked = "a filter in each thread, without a way out";
    let found = match (&unread, open.is_empty()) {
        (Some(reason), true) => reason.clone(),
        (_, true) => format!("{} threads, each with one", vmm.threads.len()),
        (_, false) => open.join("; "),
    };
    let holds = open.is_empty();
    let mut property = Property::new("jail.seccomp", asked, &Fact::new(at, found), holds);
    if unread.is_some() && holds {
        property.holds = None;
    }
    property
}

/// From a directory of the host that is open, everything below it is reached.
fn directories(posture: &Posture) -> Property {
    let is_directory =
        |fact: &&Fact<String>| std::fs::metadata(&fact.at).is_ok_and(|file| file.is_dir());
    let held = posture.outside.iter().filter(is_directory);
    let held: Vec<&str> = held.map(|fact| fact.value.as_str()).collect();
    let found = if held.is_empty() {
        "none".to_owned()
    } else {
        held.join(", ")
    };
    let at = "the descriptors of the VMM process";
    Property::new(
        "jail.directories",
        "none of the host open",
        &Fact::new(at, found),
        held.is_empty(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::posture::tests::nothing;

    const KEPT: &str = "Name:\tvcpu0\nCapPrm:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2";
    const FILES: &str = "Name:\tfs0\nCapPrm:\t0000000000000001\nNoNewPrivs:\t1\nSeccomp:\t2";

    fn vmm() -> Observation {
        let thread = |tid: i32, status: &str| Thread {
            pid: 7,
            tid,
            status: status.to_owned(),
        };
        Observation {
            pid: 7,
            kernel: "Linux version 1".to_owned(),
            left: BTreeSet::new(),
            namespaces: [(
                "mnt".to_owned(),
                observation::Namespace {
                    own: 2,
                    host: vec![1],
                    is_host_known: true,
                },
            )]
            .into(),
            uid_map: String::new(),
            gid_map: String::new(),
            rlimits: String::new(),
            mounts: "50 40 0:50 / / ro - tmpfs tmpfs ro\n\
                     51 50 8:1 /b/rootfs /share ro - ext4 /dev/sda1 rw\n"
                .to_owned(),
            host_mounts: "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n".to_owned(),
            label: None,
            oom_score: 0,
            threads: vec![thread(7, KEPT), thread(8, FILES)],
            places: Vec::new(),
            root_is_top: Ok(true),
            outside: Vec::new(),
            objects: Vec::new(),
            other_rlimits: Vec::new(),
            cgroup: Default::default(),
            sysctls: Default::default(),
            strays: Vec::new(),
            devices: Ok(Vec::new()),
            limits: observation::Limits::default(),
            seccomp: Ok(Vec::new()),
            other_filters: Vec::new(),
            unseen: Default::default(),
        }
    }

    /// The names of the properties that do not hold, and of those that cannot be seen.
    fn broken(change: impl Fn(&mut Observation)) -> Vec<String> {
        let mut vmm = vmm();
        change(&mut vmm);
        let mut guest = vmm.clone();
        guest.kernel = "Linux version 2".to_owned();
        let mut asked = nothing();
        asked.root.value = Some("/b/rootfs".into());
        let mut all = properties(&vmm, &live::posture(&vmm), &guest, &asked);
        // The threads are none that could be held.
        all.retain(|one| one.name != "jail.seccomp");
        let broken = all.into_iter().filter(|one| one.holds != Some(true));
        broken.map(|one| one.name).collect()
    }

    #[test]
    fn each_property_of_the_jail_can_break() {
        assert_eq!(broken(|_| ()), [""; 0]);
        assert_eq!(
            broken(|vmm| vmm.kernel = "Linux version 2".to_owned()),
            ["kernel"]
        );
        let join = |vmm: &mut Observation| {
            vmm.namespaces.insert(
                "mnt".to_owned(),
                observation::Namespace {
                    own: 1,
                    host: vec![1],
                    is_host_known: true,
                },
            );
        };
        assert_eq!(broken(join), ["jail.namespace.mount"]);
        let write = |vmm: &mut Observation| {
            vmm.mounts = vmm
                .mounts
                .replace("/ / ro - tmpfs tmpfs ro", "/ / rw - tmpfs tmpfs rw")
        };
        assert_eq!(broken(write), ["jail.root-read-only"]);
        let share = |vmm: &mut Observation| vmm.mounts = vmm.mounts.replace("/b/rootfs", "/etc");
        assert_eq!(broken(share), ["jail.shares"]);
        let gain =
            |vmm: &mut Observation| vmm.threads[0].status = KEPT.replace("Privs:\t1", "Privs:\t0");
        assert_eq!(broken(gain), ["jail.no-new-privileges"]);
        // CAP_CHOWN for a thread that serves no files, and CAP_SYS_ADMIN for one that does.
        let chown =
            |vmm: &mut Observation| vmm.threads[0].status = KEPT.replace("0000\nNo", "0001\nNo");
        assert_eq!(broken(chown), ["jail.capabilities"]);
        let admin = |vmm: &mut Observation| {
            vmm.threads[1].status = FILES.replace("00001\nNo", "200001\nNo")
        };
        assert_eq!(broken(admin), ["jail.capabilities"]);
        let open = |vmm: &mut Observation| {
            vmm.outside.push(observation::Outside {
                at: "/proc/self/cwd".to_owned(),
                target: "/etc".to_owned(),
            });
        };
        assert_eq!(broken(open), ["jail.directories"]);
    }

    #[test]
    fn a_thread_without_a_filter_or_with_a_way_out_is_found() {
        let allow = vec![vec![Instruction(6, 0, 0, libc::SECCOMP_RET_ALLOW)]];
        let kill = vec![vec![Instruction(6, 0, 0, libc::SECCOMP_RET_KILL_PROCESS)]];
        let holds = |of_8: Result<Vec<Vec<Instruction>>, String>| {
            seccomp(&vmm(), |tid| {
                if tid == 8 {
                    of_8.clone()
                } else {
                    Ok(kill.clone())
                }
            })
            .holds
        };
        assert_eq!(holds(Ok(kill.clone())), Some(true));
        assert_eq!(holds(Ok(allow)), Some(false));
        assert_eq!(holds(Ok(Vec::new())), Some(false));
        assert_eq!(holds(Err("not told".to_owned())), None);
    }
}
