//! A request of the driver (virtio 1.2, 5.2.6), read once from guest memory and checked against the disk.
//!
//! The driver is hostile: a request is carried out only if all that it names lies on the disk and in its buffers.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::disk::{Disk, SECTOR};
use crate::devices::virtio::VirtQueue;
use crate::devices::virtio::queue::Chain;
use crate::memory::GuestRam;

/// The type, a reserved field and the first sector before the data.
const HEADER_SIZE: usize = 16;
/// What a request to discard or to zero has for data, once: first sector, number of sectors, flags.
const SEGMENT_SIZE: usize = 16;
/// The most sectors that one request discards or zeroes: 2 GiB.
pub(super) const MAX_SEGMENT: u32 = 1 << 22;

/// How a request ended, as the driver reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Done = VIRTIO_BLK_S_OK as u8,
    Failed = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What is to be done, in bytes of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// The disk's bytes from `offset` on into the chain's writable buffers, but for the status.
    Read { offset: u64, length: usize },
    /// The chain's readable buffers behind the header to the disk, from `offset` on.
    Write { offset: u64, length: usize },
    /// All that was written becomes durable.
    Flush,
    /// The disk's serial number into the chain's writable buffers.
    Identify,
    /// Nobody needs the range's content any more.
    Discard { offset: u64, length: u64 },
    /// The range becomes zeros; `unmap` says that it need not keep its room.
    Zero {
        offset: u64,
        length: u64,
        unmap: bool,
    },
}

impl Operation {
    /// Whether there is nothing to do, for which the kernel need not be asked.
    pub(super) fn is_empty(self) -> bool {
        match self {
            Self::Read { length, .. } | Self::Write { length, .. } => length == 0,
            Self::Discard { length, .. } | Self::Zero { length, .. } => length == 0,
            Self::Flush | Self::Identify => false,
        }
    }
}

/// A request whose answer has a place.
#[derive(Debug)]
pub(super) struct Request {
    chain: Chain,
    /// Where the status is among the writable bytes: it is the last of them.
    status: usize,
}

impl Request {
    /// The request that `chain` holds, and what it asks for, or how it ends at once.
    ///
    /// # Errors
    /// The chain has no byte for a status: it can only be given back.
    pub(super) fn parse(
        chain: Chain,
        memory: &GuestRam,
        disk: &Disk,
    ) -> Result<(Self, Result<Operation, Status>), Chain> {
        let Some(status) = chain.writable_len().checked_sub(1) else {
            return Err(chain);
        };
        let operation = operation(&chain, status, memory, disk);
        Ok((Self { chain, status }, operation))
    }

    /// The memory that [`Operation::Read`] or [`Operation::Write`] has still to fill or to read when `done` bytes are
    /// done, for the kernel.
    pub(super) fn pieces(
        &self,
        operation: Operation,
        done: usize,
        memory: &GuestRam,
        pieces: &mut Vec<libc::iovec>,
    ) {
        pieces.clear();
        let piece = |slice: vm_memory::VolatileSlice<'_>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        match operation {
            Operation::Read { length, .. } => {
                let slices = self.chain.writable(memory, done, length - done);
                pieces.extend(slices.map(piece));
            }
            Operation::Write { length, .. } => {
                let slices = self
                    .chain
                    .readable(memory, HEADER_SIZE + done, length - done);
                pieces.extend(slices.map(piece));
            }
            _ => {}
        }
    }

    /// Answers [`Operation::Identify`].
    pub(super) fn identify(&self, memory: &GuestRam, disk: &Disk) {
        let length = disk.serial.len().min(self.status);
        self.chain.copy_to(memory, 0, &disk.serial[..length]);
    }

    /// Gives the request back to the driver.
    pub(super) fn complete(self, memory: &GuestRam, queue: &mut VirtQueue, status: Status) {
        self.chain.copy_to(memory, self.status, &[status as u8]);
        queue.complete(self.chain, self.status + 1);
    }
}

/// What the request in `chain` asks for, whose data ends `end` bytes into the writable buffers.
fn operation(
    chain: &Chain,
    end: usize,
    memory: &GuestRam,
    disk: &Disk,
) -> Result<Operation, Status> {
    let mut header = [0; HEADER_SIZE];
    if chain.copy_from(memory, 0, &mut header) < HEADER_SIZE {
        return Err(Status::Failed);
    }
    let (kind, sector) = (u32_at(&header, 0), u64_at(&header, 8));
    let range = |length: usize| {
        // Sums of at most 64 32-bit lengths.
        let offset = disk.range(sector, length as u64).ok_or(Status::Failed);
        offset.map(|offset| (offset, length))
    };
    match kind {
        VIRTIO_BLK_T_IN => {
            let (offset, length) = range(end)?;
            Ok(Operation::Read { offset, length })
        }
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.read_only => {
            Err(Status::Failed)
        }
        VIRTIO_BLK_T_OUT => {
            let (offset, length) = range(chain.readable_len() - HEADER_SIZE)?;
            Ok(Operation::Write { offset, length })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Operation::Identify),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let mut segment = [0; SEGMENT_SIZE];
            let is_one = chain.readable_len() == HEADER_SIZE + SEGMENT_SIZE;
            chain.copy_from(memory, HEADER_SIZE, &mut segment);
            let (sector, count, flags) = (
                u64_at(&segment, 0),
                u32_at(&segment, 8),
                u32_at(&segment, 12),
            );
            if !is_one || count > MAX_SEGMENT {
                return Err(Status::Failed);
            }
            let length = u64::from(count) * SECTOR;
            let offset = disk.range(sector, length).ok_or(Status::Failed)?;
            // A flag that is not known changes what the request means (5.2.6.2).
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            match (kind, flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) {
                (VIRTIO_BLK_T_DISCARD, 0) if !unmap => Ok(Operation::Discard { offset, length }),
                (VIRTIO_BLK_T_WRITE_ZEROES, 0) => Ok(Operation::Zero {
                    offset,
                    length,
                    unmap,
                }),
                _ => Err(Status::Unsupported),
            }
        }
        _ => Err(Status::Unsupported),
    }
}

fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}
