//! What a process holds outside its own mounts, namespaces and processes: the way out of CVE-2024-21626.
//!
//! What is outside is told by the identity of its mount, which the kernel gives; a name is the container's to choose.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use nix::unistd::Pid;
use rustix::fs::{MemfdFlags, Statx, memfd_create};

use super::places::{identity, identity_of};
use super::processes::numbers;
use super::sockets::{self, Socket};
use super::{Namespace, Outside, host_mounts, objects, read};

/// How many descriptors and mappings are looked at.
const LIMIT: usize = 200_000;

/// How many of those that are outside are told.
const FOUND_LIMIT: usize = 256;

/// How the links of files begin that are in no mount of anybody: memory that is shared by a descriptor or a mapping.
const OF_NO_MOUNT: [&str; 5] = [
    "/memfd:",
    "/dmabuf:",
    "/SYSV",
    "/dev/zero (deleted)",
    "/anon_hugepage",
];

/// How many bytes are compared at once.
const BLOCK: usize = 1 << 16;

/// What threads share (kcmp(2)).
const KCMP_FILES: libc::c_int = 2;
const KCMP_FS: libc::c_int = 3;

/// Whose descriptors are looked at.
pub(super) struct Container<'a> {
    pub(super) processes: &'a [Pid],
    /// The text of mountinfo.
    pub(super) mounts: &'a str,
    /// Whether these are not the mounts that it was made with.
    pub(super) has_left_its_mounts: bool,
    pub(super) namespaces: &'a BTreeMap<String, Namespace>,
    /// The text of uid_map, if the users are known.
    pub(super) uid_map: &'a str,
}

/// What the looking has found so far.
struct Search {
    /// The mounts of the container.
    mounts: BTreeSet<u64>,
    has_left_its_mounts: bool,
    host_mounts: BTreeSet<u64>,
    /// The container's processes, its namespaces, and those of the host.
    processes: Vec<i32>,
    namespaces: BTreeMap<String, Namespace>,
    /// The users of its user namespace, if it has one of its own and they are known, as (first, count) of ours.
    users: Option<Vec<(u64, u64)>>,
    looked_at: usize,
    found: Held,
    /// The first file of which nobody tells whether it is in a mount that the container had.
    untold: Option<String>,
    sockets: Vec<Socket>,
    /// The mount of all memory that has a descriptor.
    memory: io::Result<u64>,
    /// Which inodes there have the bytes of this program.
    programs: RefCell<BTreeMap<u64, bool>>,
}

/// What is held.
#[derive(Default)]
pub(super) struct Held {
    /// As [`super::Observation::outside`].
    pub(super) outside: Vec<Outside>,
    /// As [`super::Observation::objects`].
    pub(super) objects: Vec<Outside>,
}

/// How much is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// Descriptors and directories.
    Descriptors,
    /// Programs and memory mappings too, for which one has to be root.
    All,
}

/// What is held that is in none of a container's mounts, namespaces of others, and processes that are not its own. `Err`:
/// why not all was looked at.
pub(super) fn outside(container: &Container<'_>, extent: Extent) -> (Held, Result<(), String>) {
    let Container {
        processes,
        mounts,
        has_left_its_mounts,
        namespaces,
        uid_map,
    } = *container;
    let user = namespaces.get("user");
    let has_users = user.is_some_and(|one| !one.host.contains(&one.own));
    let mut search = Search {
        mounts: mount_ids(mounts),
        has_left_its_mounts,
        host_mounts: mount_ids(&host_mounts().unwrap_or_default()),
        processes: processes.iter().map(|pid| pid.as_raw()).collect(),
        namespaces: namespaces.clone(),
        users: has_users
            .then(|| users(uid_map))
            .filter(|users| !users.is_empty()),
        looked_at: 0,
        found: Held::default(),
        untold: None,
        sockets: Vec::new(),
        memory: mount_of_memory(),
        programs: RefCell::default(),
    };
    let descriptors = processes
        .iter()
        .try_for_each(|pid| search.process(*pid, extent));
    let sockets = search.ask_sockets();
    let objects = match search.found.objects.len() {
        FOUND_LIMIT.. => Err(format!("{FOUND_LIMIT} objects of the kernel or more")),
        _ => Ok(()),
    };
    let untold = match search.untold {
        Some(at) => Err(format!(
            "{at} is in a mount that it has no more, or never had"
        )),
        None => Ok(()),
    };
    (
        search.found,
        descriptors.and(sockets).and(objects).and(untold),
    )
}

/// Whether a process made a mount namespace for itself: the program that it executes is in none of its mounts, and in none
/// of the host's, from where it could have come.
pub(super) fn has_left_its_mounts(pid: Pid, mounts: &str) -> bool {
    let Ok(program) = identity_of(&format!("/proc/{pid}/exe")) else {
        return false;
    };
    let mut known = mount_ids(mounts);
    known.extend(mount_ids(&host_mounts().unwrap_or_default()));
    known.extend(mount_of_memory());
    !known.contains(&program.stx_mnt_id)
}

/// The ranges of users in the text of uid_map (user_namespaces(7)).
fn users(uid_map: &str) -> Vec<(u64, u64)> {
    let range = |line: &str| {
        let mut numbers = line.split_whitespace().skip(1).map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    };
    uid_map.lines().filter_map(range).collect()
}

fn mount_of_memory() -> io::Result<u64> {
    let memory = memfd_create("rt", MemfdFlags::CLOEXEC)?;
    Ok(identity(memory, "")?.stx_mnt_id)
}

fn mount_ids(mounts: &str) -> BTreeSet<u64> {
    let lines = mounts.lines();
    lines
        .filter_map(|line| line.split(' ').next()?.parse().ok())
        .collect()
}

impl Search {
    fn process(&mut self, pid: Pid, extent: Extent) -> Result<(), String> {
        let directory = format!("/proc/{pid}");
        let more = self.mounts_of_its_own(&directory);
        let streams = ["0", "1", "2"].map(|number| key(&format!("{directory}/fd/{number}")));
        let streams: Vec<_> = streams.into_iter().flatten().collect();
        if extent == Extent::All {
            self.program_and_mappings(&directory, &more)?;
        }
        for tid in numbers(&format!("{directory}/task")) {
            let is_first = tid == pid.as_raw();
            let task = format!("{directory}/task/{tid}");
            // The first thread of a process may have ended, and has nothing any more then.
            let own = if is_first { &directory } else { &task };
            let is_other = |kind| is_first || !is_shared(pid.as_raw(), tid, kind);
            if is_other(KCMP_FS) {
                for link in ["cwd", "root"] {
                    self.place(format!("{own}/{link}"), &more)?;
                }
            }
            if is_other(KCMP_FILES) {
                let holder = (own.as_str(), tid, !is_first);
                self.descriptors(holder, &streams, &more)?;
            }
        }
        Ok(())
    }

    /// The mounts of a process that has others than its container, and not the host's.
    fn mounts_of_its_own(&self, directory: &str) -> BTreeSet<u64> {
        use std::os::unix::fs::MetadataExt;
        let id = fs::metadata(format!("{directory}/ns/mnt")).map(|file| file.ino());
        let known = self.namespaces.get("mnt");
        let is_other = |id: u64| known.is_some_and(|one| one.own != id && !one.host.contains(&id));
        if !id.is_ok_and(is_other) {
            return BTreeSet::new();
        }
        read(&format!("{directory}/mountinfo"))
            .map_or_else(|_| BTreeSet::new(), |text| mount_ids(&text))
    }

    fn place(&mut self, link: String, more: &BTreeSet<u64>) -> Result<(), String> {
        if let Some(file) = self.stranger(&link, more)? {
            self.push_file(&link, &file);
        }
        Ok(())
    }

    fn is_own(&self, mount: u64, more: &BTreeSet<u64>) -> bool {
        self.mounts.contains(&mount) || more.contains(&mount)
    }

    /// The program that a process executes, and the files in its memory; one that came in from outside brought those along.
    fn program_and_mappings(
        &mut self,
        directory: &str,
        more: &BTreeSet<u64>,
    ) -> Result<(), String> {
        let mut known = BTreeSet::new();
        let mappings = format!("{directory}/map_files");
        let names = match fs::read_dir(&mappings) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(format!("{mappings}: {error}")),
        };
        let links = names.flatten().map(|entry| entry.path());
        for link in [Path::new(directory).join("exe")].into_iter().chain(links) {
            self.looked_at += 1;
            if self.looked_at > LIMIT {
                return Err(format!("more than {LIMIT} descriptors and mappings"));
            }
            let at = link.to_string_lossy();
            let target = match fs::read_link(&link) {
                Ok(target) => target,
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    return Err(format!("{at}: {error}"));
                }
                // It is there no more.
                Err(_) => continue,
            };
            if !target.is_absolute() {
                self.object(&at, &target);
                continue;
            }
            if let Some(file) = self.stranger(&at, more)?
                && known.insert((file.stx_mnt_id, file.stx_ino))
                && !self.is_memory(&at, &target, &file)
            {
                self.push_file(&at, &file);
                if at.ends_with("/exe") {
                    break;
                }
            }
        }
        Ok(())
    }

    /// What a link leads to, if that is in none of the container's mounts.
    fn stranger(&self, at: &str, more: &BTreeSet<u64>) -> Result<Option<Statx>, String> {
        match identity_of(at) {
            Ok(file) if self.is_own(file.stx_mnt_id, more) => Ok(None),
            Ok(file) => Ok(Some(file)),
            Err(error) => match error.kind() {
                io::ErrorKind::Unsupported => Err(error.to_string()),
                io::ErrorKind::PermissionDenied => Err(format!("{at}: {error}")),
                // It has ended, or was closed.
                _ => Ok(None),
            },
        }
    }

    fn descriptors(
        &mut self,
        (directory, holder, is_thread): (&str, i32, bool),
        streams: &[(u64, u64)],
        more: &BTreeSet<u64>,
    ) -> Result<(), String> {
        for number in numbers(&format!("{directory}/fd")) {
            self.looked_at += 1;
            if self.looked_at > LIMIT {
                return Err(format!("more than {LIMIT} descriptors and mappings"));
            }
            let at = format!("{directory}/fd/{number}");
            let Ok(target) = fs::read_link(&at) else {
                continue;
            };
            // The standard streams are the caller's to choose, and with them their copies; a directory is no stream.
            let is_stream = |file: &Statx| {
                let is_directory = u32::from(file.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
                !is_directory && streams.contains(&(file.stx_mnt_id, file.stx_ino))
            };
            if !target.is_absolute() {
                // `pipe:[7]` and the like are in no file system, and no path has such a name.
                if target.to_string_lossy().starts_with("socket:[") {
                    if !identity_of(&at).is_ok_and(|file| is_stream(&file)) {
                        self.sockets.push(Socket {
                            at,
                            holder,
                            is_thread,
                            number,
                        });
                    }
                } else if self.is_of_others(&target, &format!("{directory}/fdinfo/{number}")) {
                    self.push(&at);
                } else {
                    self.object(&at, &target);
                }
                continue;
            }
            let Some(file) = self.stranger(&at, more)? else {
                continue;
            };
            if !is_stream(&file) && !self.is_memory(&at, &target, &file) {
                self.push_file(&at, &file);
            }
        }
        Ok(())
    }

    /// Whether it is memory that a process of the container may have made.
    fn is_memory(&self, at: &str, target: &Path, file: &Statx) -> bool {
        let name = target.to_string_lossy();
        // The name alone says nothing: a file of the host could have it.
        let is_memory = !self.host_mounts.contains(&file.stx_mnt_id)
            && file.stx_dev_major == 0
            && OF_NO_MOUNT.iter().any(|begin| name.starts_with(begin));
        let owner = u64::from(file.stx_uid);
        let is_of_another = self.users.as_ref().is_some_and(|users| {
            let mut users = users.iter();
            !users.any(|(first, count)| owner.checked_sub(*first).is_some_and(|id| id < *count))
        });
        is_memory && !is_of_another && !self.is_this_program(at, file)
    }

    /// Whether it has the bytes of this program, which a container's first process once was.
    fn is_this_program(&self, at: &str, file: &Statx) -> bool {
        // Other file systems than the kernel's own may not answer.
        if self.memory.as_ref().ok() != Some(&file.stx_mnt_id) {
            return false;
        }
        let mut known = self.programs.borrow_mut();
        *known.entry(file.stx_ino).or_insert_with(|| {
            let is_same = || -> io::Result<bool> {
                let (mut own, mut other) = (File::open("/proc/self/exe")?, File::open(at)?);
                if own.metadata()?.len() != other.metadata()?.len() {
                    return Ok(false);
                }
                let (mut one, mut two) = (vec![0; BLOCK], vec![0; BLOCK]);
                loop {
                    let count = own.read(&mut one)?;
                    other.read_exact(&mut two[..count])?;
                    if count == 0 || one[..count] != two[..count] {
                        return Ok(count == 0);
                    }
                }
            };
            is_same().unwrap_or(false)
        })
    }

    /// Notes an object of the kernel of which nobody tells who made it.
    fn object(&mut self, at: &str, target: &Path) {
        let name = target.to_string_lossy();
        // Its own namespaces are no secret.
        let is_own = objects::namespace(&name).is_some_and(|(kind, id)| {
            let known = self.namespaces.get(kind);
            known.is_none_or(|known| known.own == id)
        });
        if self.found.objects.len() < FOUND_LIMIT && !is_own && objects::needs(&name).is_some() {
            self.found.objects.push(Outside {
                at: at.to_owned(),
                target: name.into_owned(),
            });
        }
    }

    /// Asks the sockets that were found, unless the network is the host's: of that nothing is outside.
    fn ask_sockets(&mut self) -> Result<(), String> {
        let sockets = std::mem::take(&mut self.sockets);
        let Some(net) = self.namespaces.get("net") else {
            return Ok(());
        };
        if net.host.contains(&net.own) {
            return Ok(());
        }
        // That a process is in another network is told of it.
        let networks = self.processes.iter();
        let networks = networks.filter_map(|pid| sockets::network_of(&format!("/proc/{pid}")));
        let own = networks.chain([net.own]).collect();
        for at in sockets::of_others(sockets, own)? {
            self.push(&at);
        }
        Ok(())
    }

    /// Whether it is a namespace of the host, or a process that is not the container's.
    fn is_of_others(&self, target: &Path, info: &str) -> bool {
        let target = target.to_string_lossy();
        if target == "anon_inode:[pidfd]" {
            let info = read(info).unwrap_or_default();
            let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"));
            let pid = pid.and_then(|pid| pid.trim().parse::<i32>().ok());
            // One that has ended has none.
            return pid.is_some_and(|pid| pid > 0 && !self.processes.contains(&pid));
        }
        objects::namespace(&target).is_some_and(|(kind, id)| {
            let known = self.namespaces.get(kind);
            known.is_some_and(|known| known.own != id && known.host.contains(&id))
        })
    }

    /// Notes a file that is in none of the container's mounts; of one that has left its own that says nothing.
    fn push_file(&mut self, at: &str, file: &Statx) {
        let mount = file.stx_mnt_id;
        let is_known =
            self.host_mounts.contains(&mount) || self.memory.as_ref().ok() == Some(&mount);
        if self.has_left_its_mounts && !is_known {
            self.untold.get_or_insert_with(|| at.to_owned());
        } else {
            self.push(at);
        }
    }

    fn push(&mut self, at: &str) {
        if self.found.outside.len() == FOUND_LIMIT {
            return;
        }
        let target = fs::read_link(at).unwrap_or_default();
        self.found.outside.push(Outside {
            at: at.to_owned(),
            target: target.to_string_lossy().into_owned(),
        });
    }
}

/// The mount and the inode of what a descriptor leads to.
fn key(at: &str) -> Option<(u64, u64)> {
    let file = identity_of(at).ok()?;
    Some((file.stx_mnt_id, file.stx_ino))
}

/// Whether two threads share their descriptors or their directories; if that is not told, they may not.
fn is_shared(one: i32, other: i32, kind: libc::c_int) -> bool {
    // SAFETY: the call takes numbers alone.
    let answer = unsafe { libc::syscall(libc::SYS_kcmp, one, other, kind, 0, 0) };
    answer == 0
}
