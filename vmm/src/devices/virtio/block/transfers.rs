//! Requests on their way between the driver and the kernel.
//!
//! The kernel touches a request's memory until it says that the transfer has ended: whoever lets go of the queue
//! settles what is in flight first.

use std::io;
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::{opcode, types};
use vmm_sys_util::eventfd::EventFd;

use super::disk::Disk;
use super::request::{Operation, Request, Status};
use super::ring::{FILE, Ring};
use crate::devices::virtio::VirtQueue;
use crate::devices::virtio::queue::Chain;
use crate::memory::GuestRam;

/// The most transfers at once: as many as the driver's queue has descriptors, so that it hardly ever waits for one.
pub(super) const DEPTH: u16 = 128;

/// A request that the kernel works on.
struct Transfer {
    request: Request,
    operation: Operation,
    /// Bytes that are done: the kernel may stop half-way.
    done: usize,
    /// What is left of the guest's memory for it.
    pieces: Vec<libc::iovec>,
}

pub(super) struct Transfers {
    disk: Disk,
    ring: Ring,
    /// Whether each write is to be durable when it ends: the driver does not know that it could flush.
    pub(super) write_through: bool,
    slots: Vec<Option<Transfer>>,
    /// The slots that have none.
    free: Vec<usize>,
}

impl Transfers {
    /// Of `disk`; `event` fires when one has ended.
    pub(super) fn new(disk: Disk, event: &EventFd) -> io::Result<Self> {
        Ok(Self {
            ring: Ring::new(&disk.file, DEPTH.into(), event)?,
            disk,
            write_through: false,
            slots: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH.into()).collect(),
        })
    }

    /// Whether another request can be taken.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Takes the request in `chain`, or answers it at once. There is room.
    pub(super) fn begin(&mut self, chain: Chain, queue: &mut VirtQueue) -> io::Result<()> {
        let memory = Arc::clone(queue.memory());
        let (request, operation) = match Request::parse(chain, &memory, &self.disk) {
            Ok(parsed) => parsed,
            Err(chain) => {
                queue.complete(chain, 0);
                return Ok(());
            }
        };
        let status = match operation {
            Ok(Operation::Identify) => {
                request.identify(&memory, &self.disk);
                Status::Done
            }
            Ok(operation) if operation.is_empty() => Status::Done,
            Ok(operation) => {
                let Some(slot) = self.free.pop() else {
                    return Err(io::Error::other("more requests than transfers"));
                };
                self.slots[slot] = Some(Transfer {
                    request,
                    operation,
                    done: 0,
                    pieces: Vec::new(),
                });
                return self.push(slot, &memory);
            }
            Err(status) => status,
        };
        request.complete(&memory, queue, status);
        Ok(())
    }

    /// Has the kernel do what is left of the transfer in this slot.
    fn push(&mut self, slot: usize, memory: &GuestRam) -> io::Result<()> {
        let Some(transfer) = &mut self.slots[slot] else {
            return Ok(());
        };
        let entry = transfer.entry(memory, self.write_through);
        // SAFETY: the pieces stay as they are until the transfer's end is read, and so does the guest memory that they
        // name: the queue, which holds it, goes only when nothing is in flight.
        unsafe { self.ring.push(&entry.user_data(slot as u64)) }
    }

    /// Has the kernel begin with what was taken.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.ring.submit(0)
    }

    /// Answers the requests whose transfers have ended.
    pub(super) fn finish(&mut self, queue: &mut VirtQueue) -> io::Result<()> {
        let memory = Arc::clone(queue.memory());
        while let Some((slot, result)) = self.ring.ended() {
            // No more than the number of slots.
            let slot = slot as usize;
            let Some(transfer) = self.slots.get_mut(slot).and_then(Option::as_mut) else {
                continue;
            };
            match transfer.advance(result) {
                None => self.push(slot, &memory)?,
                Some(status) => {
                    self.free.push(slot);
                    if let Some(transfer) = self.slots[slot].take() {
                        transfer.request.complete(&memory, queue, status);
                    }
                }
            }
        }
        Ok(())
    }

    /// Waits until nothing is in flight, and answers it all.
    pub(super) fn settle(&mut self, queue: &mut VirtQueue) -> io::Result<()> {
        while self.free.len() < self.slots.len() {
            self.ring.submit(1)?;
            self.finish(queue)?;
        }
        Ok(())
    }
}

impl Transfer {
    /// What the kernel is asked for.
    fn entry(&mut self, memory: &GuestRam, write_through: bool) -> Entry {
        self.request
            .pieces(self.operation, self.done, memory, &mut self.pieces);
        // A chain has at most 64.
        let (pieces, count) = (self.pieces.as_ptr(), self.pieces.len() as u32);
        let give_back = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let zero = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        let fallocate = |mode, offset, length| {
            let call = opcode::Fallocate::new(FILE, length);
            call.offset(offset).mode(mode).build()
        };
        match self.operation {
            Operation::Read { offset, .. } => opcode::Readv::new(FILE, pieces, count)
                .offset(offset + self.done as u64)
                .build(),
            Operation::Write { offset, .. } => opcode::Writev::new(FILE, pieces, count)
                .offset(offset + self.done as u64)
                .rw_flags(if write_through { libc::RWF_DSYNC } else { 0 })
                .build(),
            Operation::Flush | Operation::Identify => opcode::Fsync::new(FILE)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Operation::Discard { offset, length } => fallocate(give_back, offset, length),
            Operation::Zero {
                offset,
                length,
                unmap,
            } => fallocate(if unmap { give_back } else { zero }, offset, length),
        }
    }

    /// How the request ended, if it has; `result` is the kernel's.
    fn advance(&mut self, result: i32) -> Option<Status> {
        let transferred = match usize::try_from(result) {
            Ok(bytes) => bytes,
            Err(_) => {
                return match -result {
                    libc::EINTR => None,
                    // The driver does without it from then on.
                    libc::EOPNOTSUPP => Some(Status::Unsupported),
                    errno => {
                        let error = io::Error::from_raw_os_error(errno);
                        tracing::warn!(%error, operation = ?self.operation, "the disk fails");
                        Some(Status::Failed)
                    }
                };
            }
        };
        match self.operation {
            Operation::Read { length, .. } | Operation::Write { length, .. } => {
                self.done += transferred;
                match transferred {
                    _ if self.done >= length => Some(Status::Done),
                    // The file has become shorter.
                    0 => Some(Status::Failed),
                    _ => None,
                }
            }
            _ => Some(Status::Done),
        }
    }
}
