//! A driver for the tests: lays out rings in a small guest memory and speaks to a device as a
//! guest's kernel would, or as it should not.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::worker::new_event;
use super::{Interrupt, VirtQueue};
use crate::memory::{GuestRam, Region};

/// A buffer for the device to read.
pub const READ: u16 = 0;
/// A buffer for the device to write.
pub const WRITE: u16 = 2;
const NEXT: u16 = 1;

/// An address, a length and [`READ`] or [`WRITE`].
pub type Descriptor = (u64, u32, u16);

const MEMORY_SIZE: u64 = 8 << 20;
/// Rings lie in the first 64 KiB, 16 KiB each queue.
const RING_SPACE: u64 = 0x4000;

struct Ring {
    size: u16,
    base: u64,
    next_descriptor: u16,
    available: u16,
}

/// The driver's side of up to four queues.
pub struct Driver {
    memory: Arc<GuestRam>,
    interrupt: Arc<Interrupt>,
    pub irq: EventFd,
    rings: Vec<Ring>,
}

impl Driver {
    /// A driver with one queue for each of `sizes` (at most 256).
    pub fn new(sizes: &[u16]) -> Self {
        let irq = new_event().unwrap();
        let length = usize::try_from(MEMORY_SIZE).unwrap();
        let region = GuestRegionMmap::from_range(GuestAddress(0), length, None);
        let region = Region::from(region.unwrap());
        let rings = sizes.iter().zip(0u64..);
        Self {
            memory: Arc::new(GuestRam::from_regions(vec![region]).unwrap()),
            interrupt: Arc::new(Interrupt::new(irq.try_clone().unwrap())),
            irq,
            rings: rings
                .map(|(&size, i)| Ring {
                    size,
                    // Address 0 is no ring.
                    base: i * RING_SPACE + 0x1000,
                    next_descriptor: 0,
                    available: 0,
                })
                .collect(),
        }
    }

    pub fn memory(&self) -> Arc<GuestRam> {
        Arc::clone(&self.memory)
    }

    pub fn memory_size(&self) -> u64 {
        MEMORY_SIZE
    }

    /// Addresses of a queue's descriptor table, available ring and used ring.
    pub fn addresses(&self, queue: usize) -> [u64; 3] {
        let base = self.rings[queue].base;
        [base, base + 0x1000, base + 0x2000]
    }

    /// The queues as a transport would hand them to a device.
    pub fn queues(&self) -> Vec<VirtQueue> {
        let build = |i: usize| {
            let [descriptors, available, used] = self.addresses(i).map(GuestAddress);
            let mut queue = Queue::new(self.rings[i].size).unwrap();
            queue.try_set_desc_table_address(descriptors).unwrap();
            queue.try_set_avail_ring_address(available).unwrap();
            queue.try_set_used_ring_address(used).unwrap();
            queue.set_ready(true);
            let interrupt = Arc::clone(&self.interrupt);
            VirtQueue::new(queue, self.memory(), interrupt)
        };
        (0..self.rings.len()).map(build).collect()
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(address))
            .unwrap();
    }

    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }

    /// Fills one slot of the descriptor table.
    pub fn describe(&self, queue: usize, slot: u16, descriptor: Descriptor, next: Option<u16>) {
        let (address, length, flags) = descriptor;
        let flags = flags | next.map_or(0, |_| NEXT);
        let mut raw = Vec::with_capacity(16);
        raw.extend(address.to_le_bytes());
        raw.extend(length.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.unwrap_or(0).to_le_bytes());
        let [table, ..] = self.addresses(queue);
        self.write(table + 16 * u64::from(slot), &raw);
    }

    /// Makes the chain that begins at slot `head` available.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let [_, available, _] = self.addresses(queue);
        let ring = &mut self.rings[queue];
        let slot = u64::from(ring.available % ring.size);
        ring.available = ring.available.wrapping_add(1);
        let index = ring.available;
        self.write(available + 4 + 2 * slot, &head.to_le_bytes());
        self.set_available_index(queue, index);
    }

    pub fn set_available_index(&self, queue: usize, index: u16) {
        let [_, available, _] = self.addresses(queue);
        self.write(available + 2, &index.to_le_bytes());
    }

    /// Makes a chain of these descriptors available, in the table's next free slots; returns the
    /// head. The table's slots are used in turn: the caller keeps no more than fit.
    pub fn offer(&mut self, queue: usize, descriptors: &[Descriptor]) -> u16 {
        let size = self.rings[queue].size;
        let head = self.rings[queue].next_descriptor;
        let mut slot = head;
        for (i, &descriptor) in descriptors.iter().enumerate() {
            let next = (slot + 1) % size;
            let last = i + 1 == descriptors.len();
            self.describe(queue, slot, descriptor, (!last).then_some(next));
            slot = next;
        }
        self.rings[queue].next_descriptor = slot;
        self.publish(queue, head);
        head
    }

    /// How many chains the device has given back, ever (modulo 2^16).
    pub fn used_index(&self, queue: usize) -> u16 {
        let [_, _, used] = self.addresses(queue);
        u16::from_le_bytes(self.read(used + 2, 2).try_into().unwrap())
    }

    /// One entry of the used ring: head and length.
    pub fn used_entry(&self, queue: usize, index: u16) -> (u32, u32) {
        let [_, _, used] = self.addresses(queue);
        let slot = u64::from(index % self.rings[queue].size);
        let raw = self.read(used + 4 + 8 * slot, 8);
        let number =
            |range: std::ops::Range<usize>| u32::from_le_bytes(raw[range].try_into().unwrap());
        (number(0..4), number(4..8))
    }

    /// What the device has given back, while the ring has not wrapped.
    pub fn used(&self, queue: usize) -> Vec<(u32, u32)> {
        let entries = 0..self.used_index(queue);
        entries.map(|i| self.used_entry(queue, i)).collect()
    }

    pub fn needs_reset(&self) -> bool {
        self.interrupt.needs_reset()
    }
}
