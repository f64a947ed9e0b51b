//! KVM's own counters of a vCPU, by its statistics descriptor (`KVM_GET_STATS_FD`, Linux 5.14).
//!
//! The bytes come from the host's kernel; they are parsed with checks all the same, since their
//! layout is the kernel's to choose.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

/// `KVM_GET_STATS_FD`, `_IO(KVMIO, 0xce)` of the kernel's `uapi/linux/kvm.h`.
const KVM_GET_STATS_FD: libc::Ioctl = 0xaece;
/// `struct kvm_stats_header`: six 32-bit numbers.
const HEADER_BYTES: usize = 24;
/// `struct kvm_stats_desc` without its name.
const DESCRIPTOR_BYTES: usize = 16;
/// More descriptors or longer names than any kernel has.
const DESCRIPTORS_MAX: usize = 64 << 10;

/// The statistics of one vCPU. Reading them does not disturb it.
#[derive(Debug)]
pub(crate) struct VcpuStats {
    file: File,
    /// Where in the file the counter of all exits is.
    exits_at: u64,
}

impl VcpuStats {
    /// Opens the statistics of a vCPU; `None` where the kernel has none.
    pub fn open(vcpu: &impl AsRawFd) -> Option<Self> {
        // SAFETY: the ioctl takes no argument and returns a new descriptor or -1.
        let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD, 0) };
        if fd < 0 {
            return None;
        }
        // SAFETY: the descriptor is new and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        let exits_at = find(&file, b"exits").ok().flatten()?;
        Some(Self { file, exits_at })
    }

    /// How often the vCPU has left the guest, to the kernel or to user space.
    pub fn exits(&self) -> io::Result<u64> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, self.exits_at)?;
        Ok(u64::from_ne_bytes(value))
    }
}

/// Finds where the counter `name` is in a statistics file.
fn find(file: &File, name: &[u8]) -> io::Result<Option<u64>> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let number = |at: usize| -> u32 {
        let bytes = header.get(at..at + 4).and_then(|b| b.first_chunk::<4>());
        bytes.map_or(0, |b| u32::from_ne_bytes(*b))
    };
    let (name_size, count) = (number(4) as usize, number(8) as usize);
    let (descriptors_at, data_at) = (number(16), number(20));
    let stride = DESCRIPTOR_BYTES.saturating_add(name_size);
    let length = stride.saturating_mul(count);
    if length > DESCRIPTORS_MAX {
        return Ok(None);
    }
    let mut descriptors = vec![0; length];
    file.read_exact_at(&mut descriptors, descriptors_at.into())?;
    for descriptor in descriptors.chunks_exact(stride) {
        let (fields, text) = descriptor.split_at(DESCRIPTOR_BYTES);
        let found = text.split(|b| *b == 0).next() == Some(name);
        if let (true, Some(offset)) = (found, fields[8..].first_chunk::<4>()) {
            return Ok(Some(
                u64::from(data_at) + u64::from(u32::from_ne_bytes(*offset)),
            ));
        }
    }
    Ok(None)
}
