//! The disks of a machine: the block devices of the host that the bundle has nodes for and may use, and those that it
//! mounts.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, Mount, Spec};
use protocol::DISKS_DIR;

use super::{GuestSpecError, PodInit, has_option, impossible, is_bind};

/// A block device of the host that the machine has as a disk.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Disk {
    /// Its node on the host.
    pub path: PathBuf,
    /// Its numbers there.
    pub major: u32,
    /// As above.
    pub minor: u32,
    /// Whether the host refuses the guest's writes.
    pub read_only: bool,
    /// What the bundle's device rules let the container do with it: of the letters `rw`.
    pub access: String,
}

/// The serial number by which the guest finds the disk with this index.
pub fn serial(disk: usize) -> String {
    format!("disk{disk}")
}

fn number(number: i64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// The machine's disks, while they are found.
#[derive(Default)]
pub(super) struct Disks {
    /// The bundle's.
    rules: Option<Vec<LinuxDeviceCgroup>>,
    /// Each with the place in the configuration where it is first named.
    found: Vec<(String, Disk)>,
}

impl Disks {
    /// The block devices that the configuration has nodes for and may use.
    pub(super) fn of_nodes(spec: &Spec) -> Result<Self, GuestSpecError> {
        let mut disks = Self::default();
        let Some(linux) = spec.linux() else {
            return Ok(disks);
        };
        let resources = linux.resources().as_ref();
        disks.rules = resources.and_then(|resources| resources.devices().clone());
        for (index, node) in linux.devices().iter().flatten().enumerate() {
            if node.typ() == LinuxDeviceType::B {
                let numbers = (number(node.major()), number(node.minor()));
                disks.add_node(&format!("linux.devices[{index}]"), numbers)?;
            }
        }
        Ok(disks)
    }

    /// Adds the block device that a file system is mounted from, whose place in the guest becomes the source.
    pub(super) fn take_source(
        &mut self,
        index: usize,
        mount: &mut Mount,
    ) -> Result<(), GuestSpecError> {
        if !is_bind(mount)
            && let Some(source) = mount.source()
            && source.is_absolute()
            && let Ok(metadata) = source.metadata()
            && metadata.file_type().is_block_device()
        {
            let device = metadata.rdev();
            let numbers = (libc::major(device), libc::minor(device));
            let read_only = has_option(mount, "ro");
            let disk = self.add(&format!("mounts[{index}].source"), numbers, read_only)?;
            mount.set_source(Some(Path::new(DISKS_DIR).join(serial(disk))));
        }
        Ok(())
    }

    /// All that were found, for a machine of its own; that of a `pod` gets no further one.
    pub(super) fn into_all(self, pod: Option<PodInit>) -> Result<Vec<Disk>, GuestSpecError> {
        if pod.is_some()
            && let Some((at, _)) = self.found.first()
        {
            let what = "take a disk into its pod's machine, which runs already";
            return Err(impossible(at.clone(), what));
        }
        Ok(self.found.into_iter().map(|(_, disk)| disk).collect())
    }

    /// Adds the block device that there is a node for, if the container may read or write it and it is there: without,
    /// the node is as dead in the guest as it would be on the host.
    fn add_node(&mut self, at: &str, numbers: (u32, u32)) -> Result<(), GuestSpecError> {
        let access = self.access(numbers)?;
        if !access.is_empty() && has_content(numbers) {
            self.add(at, numbers, !access.contains('w'))?;
        }
        Ok(())
    }

    fn access(&self, (major, minor): (u32, u32)) -> Result<String, GuestSpecError> {
        let rules = self.rules.as_deref();
        Ok(engine::cgroup::block_device_access(rules, major, minor)?)
    }

    /// Adds the block device with these numbers; its index.
    fn add(
        &mut self,
        at: &str,
        numbers: (u32, u32),
        read_only: bool,
    ) -> Result<usize, GuestSpecError> {
        let same = |disk: &Disk| (disk.major, disk.minor) == numbers;
        if let Some(index) = self.found.iter().position(|(_, disk)| same(disk)) {
            self.found[index].1.read_only &= read_only;
            return Ok(index);
        }
        let (major, minor) = numbers;
        let path = block_device(numbers).map_err(|source| GuestSpecError::Unusable {
            at: at.to_owned(),
            path: format!("the block device {major}:{minor}").into(),
            source,
        })?;
        let access = self.access(numbers)?;
        let disk = Disk {
            path,
            major,
            minor,
            read_only,
            access,
        };
        self.found.push((at.to_owned(), disk));
        Ok(self.found.len() - 1)
    }
}

/// What the host's kernel tells of the block device with these numbers.
fn attribute((major, minor): (u32, u32), name: &str) -> io::Result<String> {
    std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{name}"))
}

/// Whether the host has the block device with these numbers, with a disk in it.
fn has_content(numbers: (u32, u32)) -> bool {
    attribute(numbers, "size").is_ok_and(|sectors| sectors.trim_end() != "0")
}

/// The node of the host's block device with these numbers.
fn block_device(numbers: (u32, u32)) -> io::Result<PathBuf> {
    let properties = attribute(numbers, "uevent")?;
    let mut names = properties
        .lines()
        .filter_map(|line| line.strip_prefix("DEVNAME="));
    let name = names.next().ok_or(io::ErrorKind::NotFound)?;
    let path = Path::new("/dev").join(name);
    let metadata = path.metadata()?;
    let is_it = metadata.file_type().is_block_device()
        && metadata.rdev() == libc::makedev(numbers.0, numbers.1);
    if is_it {
        Ok(path)
    } else {
        Err(io::ErrorKind::NotFound.into())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::super::tests::{rewritten, rewritten_in};
    use super::*;

    /// A disk of this host, whatever it is, and its node; none where there is none.
    fn some_disk() -> Option<((u32, u32), PathBuf)> {
        let all = fs::read_dir("/sys/dev/block").ok()?;
        let found = all.flatten().find_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let (major, minor) = name.split_once(':')?;
            let numbers = (major.parse().ok()?, minor.parse().ok()?);
            has_content(numbers).then_some(numbers)
        });
        let numbers = found.or_else(|| {
            println!("skipped: this host has no disk");
            None
        })?;
        Some((numbers, block_device(numbers).ok()?))
    }

    #[test]
    fn a_block_device_that_may_be_used_is_a_disk() {
        let Some(((major, minor), node)) = some_disk() else {
            return;
        };
        let found = |access: &'static str, mount: Value| {
            let node = json!({"path": "/dev/x", "type": "b", "major": major, "minor": minor});
            let guest = rewritten(|_, config| {
                config["linux"]["devices"] = json!([node]);
                config["linux"]["resources"]["devices"] = json!([{"allow": false}, {"allow": true, "type": "b", "major": major, "access": access}]);
                config["mounts"] = mount;
            });
            let guest = guest.unwrap();
            let sources = guest.spec.mounts().iter().flatten();
            let sources: Vec<_> = sources.map(|mount| mount.source().clone()).collect();
            (guest.disks, sources)
        };
        let disk = |read_only, access: &str| Disk {
            path: node.clone(),
            major,
            minor,
            read_only,
            access: access.to_owned(),
        };
        assert_eq!(found("rw", json!([])).0, [disk(false, "rw")]);
        assert_eq!(found("r", json!([])).0, [disk(true, "r")]);
        assert_eq!(found("m", json!([])).0, []);
        let mounted = |options: &[&str]| json!([{"destination": "/d", "type": "ext4", "source": node, "options": options}]);
        let source = Some(PathBuf::from("/run/rt/disks/disk0"));
        // One disk for both.
        assert_eq!(
            found("r", mounted(&[])),
            (vec![disk(false, "r")], vec![source.clone()])
        );
        assert_eq!(
            found("m", mounted(&["ro"])),
            (vec![disk(true, "")], vec![source])
        );
    }

    #[test]
    fn a_block_device_comes_into_no_machine_that_runs() {
        let Some(((major, minor), _)) = some_disk() else {
            return;
        };
        let pod = Some(PodInit {
            host: 4711,
            guest: 42,
        });
        let error = rewritten_in(pod, |_, config| {
            config["linux"]["devices"] =
                json!([{"path": "/dev/x", "type": "b", "major": major, "minor": minor}]);
        });
        assert_eq!(
            error.unwrap_err(),
            "config.json: `linux.devices[0]`: a microVM cannot take a disk into its pod's machine, which runs already; \
             use --isolation container"
        );
    }
}
