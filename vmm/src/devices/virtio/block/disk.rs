//! What the host has in the place of a disk: a block device or a file of raw content.
//!
//! It is the caller's choice and trusted; its size and the size of its blocks are asked for once.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

use thiserror::Error;

/// The unit of a device's addresses and of its capacity, whatever its blocks are (virtio 1.2, 5.2.4).
pub(super) const SECTOR: u64 = 512;

/// What a serial number has room for (virtio 1.2, 5.2.6).
pub(super) const SERIAL_SIZE: usize = 20;

nix::ioctl_read_bad!(block_size, libc::BLKSSZGET, libc::c_int);
nix::ioctl_read_bad!(is_read_only, BLKROGET, libc::c_int);
nix::ioctl_read!(size_in_bytes, 0x12, 114, u64);
/// `linux/fs.h`: whether a block device is read-only.
const BLKROGET: libc::c_ulong = 0x125e;

/// Why a file is no disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// It is something else.
    #[error("it is neither a block device nor a file")]
    Kind,
    /// It has less than a sector.
    #[error("it is empty")]
    Empty,
    /// The name that the guest is to find it by.
    #[error("its serial number {0:?} is not 1 to {SERIAL_SIZE} ASCII characters")]
    Serial(String),
    /// The kernel does not tell.
    #[error("the kernel does not tell its {what}")]
    Unknown {
        /// What was asked for.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

/// A disk of a machine.
#[derive(Debug)]
pub struct Disk {
    pub(super) file: File,
    /// In sectors; at least one.
    pub(super) capacity: u64,
    /// In bytes: a power of two from 512 on.
    pub(super) block_size: u32,
    pub(super) read_only: bool,
    /// Padded with zeros.
    pub(super) serial: [u8; SERIAL_SIZE],
}

impl Disk {
    /// The disk that `file` is, which is open for what the guest may do. It goes by `serial`. What the device does not
    /// let anybody write, neither does the disk.
    ///
    /// # Errors
    /// It cannot be one.
    pub fn new(file: File, read_only: bool, serial: &str) -> Result<Self, DiskError> {
        let unknown = |what| move |source| DiskError::Unknown { what, source };
        let metadata = file.metadata().map_err(unknown("kind"))?;
        let mut disk = Self {
            capacity: metadata.len() / SECTOR,
            // At most 2^9.
            block_size: SECTOR as u32,
            read_only,
            serial: padded(serial)?,
            file,
        };
        if metadata.file_type().is_block_device() {
            let fd = disk.file.as_raw_fd();
            let (mut size, mut block, mut protected) = (0, 0, 0);
            let asked = |what| move |error: nix::Error| unknown(what)(error.into());
            // SAFETY: the request writes a u64.
            unsafe { size_in_bytes(fd, &raw mut size) }.map_err(asked("size"))?;
            // SAFETY: the request writes an int.
            unsafe { block_size(fd, &raw mut block) }.map_err(asked("block size"))?;
            // SAFETY: the request writes an int.
            unsafe { is_read_only(fd, &raw mut protected) }.map_err(asked("protection"))?;
            disk.capacity = size / SECTOR;
            disk.block_size = block.unsigned_abs();
            disk.read_only |= protected != 0;
        } else if !metadata.is_file() {
            return Err(DiskError::Kind);
        }
        if disk.capacity == 0 {
            return Err(DiskError::Empty);
        }
        Ok(disk)
    }

    /// Where `length` bytes from `sector` on begin, in bytes, if they are whole sectors of the disk.
    pub(super) fn range(&self, sector: u64, length: u64) -> Option<u64> {
        let end = sector.checked_add(length / SECTOR)?;
        (length.is_multiple_of(SECTOR) && end <= self.capacity).then(|| sector * SECTOR)
    }
}

fn padded(serial: &str) -> Result<[u8; SERIAL_SIZE], DiskError> {
    let mut padded = [0; SERIAL_SIZE];
    match padded.get_mut(..serial.len()) {
        Some(start) if !serial.is_empty() && serial.is_ascii() => {
            start.copy_from_slice(serial.as_bytes());
            Ok(padded)
        }
        _ => Err(DiskError::Serial(serial.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(length: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        file
    }

    #[test]
    fn a_file_is_a_disk_of_its_whole_sectors() {
        let disk = Disk::new(file(4096 + 511), false, "data").unwrap();
        assert_eq!((disk.capacity, disk.block_size), (8, 512));
        assert_eq!(&disk.serial[..5], b"data\0");
        assert_eq!(disk.range(7, 512), Some(3584));
        assert_eq!(disk.range(8, 0), Some(4096));
        for (sector, length) in [
            (7, 1024),
            (8, 512),
            (0, 511),
            (u64::MAX, 512),
            (0, u64::MAX),
        ] {
            assert_eq!(disk.range(sector, length), None, "{sector} {length}");
        }
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let error = |file, serial| Disk::new(file, false, serial).unwrap_err().to_string();
        assert_eq!(error(file(511), "s"), "it is empty");
        let directory = File::open("/").unwrap();
        assert_eq!(
            error(directory, "s"),
            "it is neither a block device nor a file"
        );
        for serial in ["", "123456789012345678901", "\u{e4}"] {
            assert!(error(file(512), serial).contains("serial number"));
        }
    }
}
