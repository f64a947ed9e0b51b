//! The machine's disks, which a container's spec names as the block devices that they are on the host.
//!
//! A disk has other numbers in this kernel, given in the order in which drivers find their devices; its serial number is
//! what both sides know it by. The host is trusted; what is on the disks is not looked at.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, Spec};
use protocol::DISKS_DIR;
use protocol::message::Disk;
use thiserror::Error;

/// Where the kernel lists its disks.
const BLOCK_DEVICES: &str = "/sys/block";

/// Major and minor number.
type Numbers = (u32, u32);

/// A disk that a spec names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AttachedDisk {
    /// On the host.
    host: Numbers,
    /// Here.
    guest: Numbers,
}

/// A disk cannot be given to a container.
#[derive(Debug, Error)]
pub(crate) enum DiskError {
    /// No driver has found it.
    #[error("the guest has no disk {serial}: does its kernel have the driver virtio_blk?")]
    Missing {
        /// Its serial number.
        serial: String,
    },
    /// A path cannot be made or read.
    #[error("cannot {operation} {}", path.display())]
    Path {
        /// What was tried.
        operation: &'static str,
        /// With what.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A device rule that is none.
    #[error("cannot make a device rule of {access:?}")]
    Rule {
        /// Its letters.
        access: String,
        /// What is wrong.
        #[source]
        source: oci_spec::OciSpecError,
    },
}

/// Finds the disks, links each at its place below [`DISKS_DIR`], and has `spec` name them as they are here.
pub(crate) fn attach(disks: &[Disk], spec: &mut Spec) -> Result<Vec<AttachedDisk>, DiskError> {
    let mut attached = Vec::with_capacity(disks.len());
    for disk in disks {
        let (name, guest) = find(&disk.serial)?;
        let link = Path::new(DISKS_DIR).join(&disk.serial);
        fs::create_dir_all(DISKS_DIR).map_err(path_error("create", Path::new(DISKS_DIR)))?;
        match symlink(Path::new("/dev").join(name), &link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(path_error("create", &link)(error));
            }
            _ => {}
        }
        rename(spec, disk, guest)?;
        attached.push(AttachedDisk {
            host: (disk.major, disk.minor),
            guest,
        });
    }
    Ok(attached)
}

/// The name and the numbers of the disk with this serial number.
fn find(serial: &str) -> Result<(std::ffi::OsString, Numbers), DiskError> {
    let all = Path::new(BLOCK_DEVICES);
    let entries = fs::read_dir(all).map_err(path_error("read", all))?;
    for entry in entries {
        let path = entry.map_err(path_error("read", all))?.path();
        // Not every kind of disk has one.
        let Ok(own) = fs::read_to_string(path.join("serial")) else {
            continue;
        };
        let number = fs::read_to_string(path.join("dev"));
        let number = number.map_err(path_error("read", &path))?;
        if own.trim_end() == serial
            && let Some((major, minor)) = number.trim_end().split_once(':')
            && let (Ok(major), Ok(minor)) = (major.parse(), minor.parse())
            && let Some(name) = path.file_name()
        {
            return Ok((name.to_owned(), (major, minor)));
        }
    }
    let serial = serial.to_owned();
    Err(DiskError::Missing { serial })
}

/// Gives the nodes of `disk` the numbers that it has here, and puts a rule that says what was said of it in place of those
/// that name it.
fn rename(spec: &mut Spec, disk: &Disk, guest: Numbers) -> Result<(), DiskError> {
    let Some(linux) = spec.linux_mut() else {
        return Ok(());
    };
    let host = (i64::from(disk.major), i64::from(disk.minor));
    for node in linux.devices_mut().iter_mut().flatten() {
        if node.typ() == LinuxDeviceType::B && (node.major(), node.minor()) == host {
            node.set_major(guest.0.into());
            node.set_minor(guest.1.into());
        }
    }
    let rules = linux.resources_mut().as_mut();
    if let Some(rules) = rules.and_then(|resources| resources.devices_mut().as_mut()) {
        let names_it = |rule: &LinuxDeviceCgroup| {
            rule.typ() == Some(LinuxDeviceType::B)
                && (rule.major(), rule.minor()) == (Some(host.0), Some(host.1))
        };
        rules.retain(|rule| !names_it(rule));
        let (given, kept): (String, String) = ['r', 'w']
            .iter()
            .partition(|letter| disk.access.contains(**letter));
        for (access, allow) in [(given, true), (kept, false)] {
            if !access.is_empty() {
                rules.push(rule(guest, access, allow)?);
            }
        }
    }
    Ok(())
}

fn rule(guest: Numbers, access: String, allow: bool) -> Result<LinuxDeviceCgroup, DiskError> {
    let built = LinuxDeviceCgroupBuilder::default()
        .allow(allow)
        .typ(LinuxDeviceType::B)
        .major(guest.0)
        .minor(guest.1)
        .access(access.as_str())
        .build();
    built.map_err(|source| DiskError::Rule { access, source })
}

/// Has a rule of the devices cgroup (`b 254:0 rw`) name a disk as the host does.
pub(crate) fn name_as_on_host(rule: &mut String, disks: &[AttachedDisk]) {
    for AttachedDisk { host, guest } in disks {
        let here = format!("b {}:{} ", guest.0, guest.1);
        if let Some(access) = rule.strip_prefix(&here) {
            *rule = format!("b {}:{} {access}", host.0, host.1);
            return;
        }
    }
}

fn path_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Path {
        operation,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn disk(access: &str) -> Disk {
        Disk {
            serial: "disk0".to_owned(),
            major: 7,
            minor: 3,
            access: access.to_owned(),
        }
    }

    #[test]
    fn nodes_and_rules_name_the_disk_as_it_is_here() {
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0",
            "linux": {
                "devices": [
                    {"type": "b", "path": "/dev/data", "major": 7, "minor": 3},
                    {"type": "c", "path": "/dev/other", "major": 7, "minor": 3},
                ],
                "resources": {"devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "b", "major": 7, "minor": 3, "access": "r"},
                ]},
            },
        }))
        .unwrap();
        rename(&mut spec, &disk("r"), (254, 16)).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let nodes = linux.devices().as_ref().unwrap();
        let numbers: Vec<_> = nodes
            .iter()
            .map(|node| (node.major(), node.minor()))
            .collect();
        assert_eq!(numbers, [(254, 16), (7, 3)]);
        let rules = linux
            .resources()
            .as_ref()
            .unwrap()
            .devices()
            .as_ref()
            .unwrap();
        let said: Vec<_> = rules[1..]
            .iter()
            .map(|rule| {
                (
                    rule.allow(),
                    rule.major(),
                    rule.minor(),
                    rule.access().clone().unwrap(),
                )
            })
            .collect();
        let of = |allow, letters: &str| (allow, Some(254), Some(16), letters.to_owned());
        assert_eq!(said, [of(true, "r"), of(false, "w")]);
    }

    #[test]
    fn who_has_no_rules_gets_none() {
        let mut spec: Spec =
            serde_json::from_value(json!({"ociVersion": "1.2.0", "linux": {"resources": {}}}))
                .unwrap();
        rename(&mut spec, &disk("rw"), (254, 0)).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.resources().as_ref().unwrap().devices().is_none());
    }

    #[test]
    fn rules_are_told_in_the_numbers_of_the_host() {
        let disks = [AttachedDisk {
            host: (7, 3),
            guest: (254, 0),
        }];
        for (here, there) in [
            ("b 254:0 rw", "b 7:3 rw"),
            ("b 254:01 rw", "b 254:01 rw"),
            ("c 254:0 rw", "c 254:0 rw"),
        ] {
            let mut rule = here.to_owned();
            name_as_on_host(&mut rule, &disks);
            assert_eq!(rule, there);
        }
    }

    #[test]
    fn a_disk_that_is_not_there_is_named() {
        if !Path::new(BLOCK_DEVICES).exists() {
            println!("skipped: no {BLOCK_DEVICES}");
            return;
        }
        let error = find("no-such-disk").unwrap_err();
        assert!(
            error.to_string().contains("no disk no-such-disk"),
            "{error}"
        );
    }
}
