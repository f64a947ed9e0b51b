//! The inode numbers that the guest sees.
//!
//! A share is one device to the guest, but has files of several file systems of the host: one for each volume, perhaps.
//! Two files with the same number would be one file to programs (`cp a b` refuses, `tar` writes a link).

use std::sync::{PoisonError, RwLock};

use fuse_backend_rs::abi::fuse_abi::stat64;

/// Above the numbers that file systems use in practice.
const SHIFT: u32 = 48;
/// Of the file system that has the share's root: in a tree of mounts nothing but the directories that hold them.
const ROOTS_PLACE: u64 = 0xffff;

/// The file systems of a share, in the order in which the guest came to them.
///
/// The numbers of the first one are the host's; those of another one differ from the host's by its place, in bits that
/// are not used. A number stays what it is as long as the server lives.
#[derive(Debug)]
pub(super) struct Numbering {
    root: u64,
    devices: RwLock<Vec<u64>>,
}

impl Numbering {
    /// For a share whose root is on this device.
    pub(super) fn new(root: u64) -> Self {
        Self {
            root,
            devices: RwLock::default(),
        }
    }

    /// Makes the number of a file one that no file of another device has.
    pub(super) fn apply(&self, attributes: &mut stat64) {
        let place = self.place(attributes.st_dev);
        // Whatever the bits are: within a device no two numbers become one.
        attributes.st_ino ^= place << SHIFT;
    }

    fn place(&self, device: u64) -> u64 {
        if device == self.root {
            return ROOTS_PLACE;
        }
        let find = |devices: &[u64]| devices.iter().position(|&known| known == device);
        let known = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = find(&known) {
            return place as u64;
        }
        drop(known);
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        let place = find(&devices).unwrap_or_else(|| {
            devices.push(device);
            devices.len() - 1
        });
        place as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(numbering: &Numbering, device: u64, number: u64) -> u64 {
        let mut attributes = fuse_backend_rs::api::filesystem::Entry::default().attr;
        (attributes.st_dev, attributes.st_ino) = (device, number);
        numbering.apply(&mut attributes);
        attributes.st_ino
    }

    #[test]
    fn files_of_two_devices_have_two_numbers_and_those_of_the_first_the_hosts() {
        let numbering = Numbering::new(1);
        let root = number(&numbering, 1, 5);
        let first = number(&numbering, 7, 5);
        let second = number(&numbering, 8, 5);
        assert_eq!(first, 5);
        assert!(root != first && first != second && root != second);
        for _ in 0..2 {
            assert_eq!(number(&numbering, 8, 5), second);
            assert_eq!(number(&numbering, 7, 6), 6);
        }
    }
}
