//! A queue as a device uses it: chains out, used lengths in, notifications suppressed both ways.
//!
//! The rings and the descriptors lie in guest memory and may change at any time. A chain is read
//! once into a [`Chain`], whose buffers are known to lie in guest RAM; what is malformed goes
//! back to the driver unused, and a broken ring stops the queue until the driver resets the device.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, VolatileSlice};

use super::Interrupt;
use crate::memory::GuestRam;

/// The most buffers in a chain that a device other than the file system takes.
pub(super) const MAX_BUFFERS: usize = 64;

/// A piece of guest RAM that a descriptor names. It lies within one memory region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Buffer {
    address: GuestAddress,
    length: usize,
}

/// Why a descriptor chain is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("a descriptor names memory outside the guest's RAM")]
    OutOfRange,
    #[error("a descriptor is empty")]
    ZeroLength,
    #[error("a buffer to read follows one to write")]
    Order,
    #[error("the chain loops, leaves the table or has too many descriptors")]
    Unterminated,
}

/// A descriptor chain, checked: first what the device may read, then what it may write.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

impl Chain {
    fn parse(
        memory: &GuestRam,
        descriptors: DescriptorChain<&GuestRam>,
    ) -> Result<Self, Malformed> {
        let mut chain = Self {
            head: descriptors.head_index(),
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut ended = false;
        for descriptor in descriptors {
            if chain.readable.len() + chain.writable.len() == MAX_BUFFERS {
                return Err(Malformed::Unterminated);
            }
            let buffer = Buffer {
                address: descriptor.addr(),
                length: usize::try_from(descriptor.len()).map_err(|_| Malformed::OutOfRange)?,
            };
            if buffer.length == 0 {
                return Err(Malformed::ZeroLength);
            }
            if memory.get_slice(buffer.address, buffer.length).is_err() {
                return Err(Malformed::OutOfRange);
            }
            if descriptor.is_write_only() {
                chain.writable.push(buffer);
            } else if chain.writable.is_empty() {
                chain.readable.push(buffer);
            } else {
                return Err(Malformed::Order);
            }
            ended = !descriptor.has_next();
        }
        if ended {
            Ok(chain)
        } else {
            Err(Malformed::Unterminated)
        }
    }

    /// How many bytes the device may read.
    pub fn readable_len(&self) -> usize {
        self.readable.iter().map(|b| b.length).sum()
    }

    /// How many bytes the device may write.
    pub fn writable_len(&self) -> usize {
        self.writable.iter().map(|b| b.length).sum()
    }

    /// The memory behind `length` bytes (or fewer, at the end) to read from `offset` on.
    pub fn readable<'a>(
        &'a self,
        memory: &'a GuestRam,
        offset: usize,
        length: usize,
    ) -> impl Iterator<Item = VolatileSlice<'a>> {
        slices(&self.readable, memory, offset, length)
    }

    /// The memory behind `length` bytes (or fewer, at the end) to write from `offset` on.
    pub fn writable<'a>(
        &'a self,
        memory: &'a GuestRam,
        offset: usize,
        length: usize,
    ) -> impl Iterator<Item = VolatileSlice<'a>> {
        slices(&self.writable, memory, offset, length)
    }

    /// Copies bytes to read from `offset` on into `data`; returns how many there were.
    pub fn copy_from(&self, memory: &GuestRam, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.readable(memory, offset, data.len()) {
            done += slice.copy_to(&mut data[done..]);
        }
        done
    }

    /// Copies `data` into what is to be written from `offset` on; returns how much fitted.
    pub fn copy_to(&self, memory: &GuestRam, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.writable(memory, offset, data.len()) {
            let length = slice.len();
            slice.copy_from(&data[done..done + length]);
            done += length;
        }
        done
    }
}

fn slices<'a>(
    buffers: &'a [Buffer],
    memory: &'a GuestRam,
    offset: usize,
    length: usize,
) -> impl Iterator<Item = VolatileSlice<'a>> {
    let mut skip = offset;
    let mut left = length;
    buffers.iter().filter_map(move |buffer| {
        if skip >= buffer.length {
            skip -= buffer.length;
            return None;
        }
        let start = std::mem::take(&mut skip);
        let take = left.min(buffer.length - start);
        if take == 0 {
            return None;
        }
        left -= take;
        let whole = memory.get_slice(buffer.address, buffer.length).ok()?;
        whole.subslice(start, take).ok()
    })
}

/// A queue that the driver has set up and can no longer change.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    memory: Arc<GuestRam>,
    interrupt: Arc<Interrupt>,
    /// Chains given back since the driver was last looked at for whether it wants to know.
    completed: u16,
    broken: bool,
}

impl VirtQueue {
    /// Takes a configured queue, whose rings were found to lie in `memory`.
    pub(super) fn new(queue: Queue, memory: Arc<GuestRam>, interrupt: Arc<Interrupt>) -> Self {
        Self {
            queue,
            memory,
            interrupt,
            completed: 0,
            broken: false,
        }
    }

    /// The most chains that can be available at once.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The guest RAM that the queue's chains point to.
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
    }

    /// The interrupt of the device that the queue belongs to.
    pub(super) fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// The next chain, if the driver has made one available.
    ///
    /// Malformed chains are given back unused. A ring that cannot be right ends the queue.
    pub fn pop(&mut self) -> Option<Chain> {
        // Bounds the work on malformed chains; the driver's next notification goes on.
        for _ in 0..=self.queue.size() {
            let memory = Arc::clone(&self.memory);
            let descriptors = self.next_descriptors(memory.as_ref())?;
            let head = descriptors.head_index();
            match Chain::parse(&memory, descriptors) {
                Ok(chain) => return Some(chain),
                Err(error) => {
                    tracing::debug!(%error, "malformed descriptor chain");
                    self.complete_head(head, 0);
                }
            }
        }
        None
    }

    /// Serves what the driver has made available, for a device without a thread; `serve` says how much it wrote to a chain.
    pub(super) fn serve(&mut self, mut serve: impl FnMut(&GuestRam, &Chain) -> usize) {
        let memory = Arc::clone(&self.memory);
        // One round at most, so that a driver that keeps adding does not keep the thread.
        for _ in 0..self.queue.max_size() {
            let Some(chain) = self.pop() else {
                break;
            };
            let length = serve(&memory, &chain);
            self.complete(chain, length);
        }
        // The driver's next notification is due when it adds the next chain.
        self.enable_notification();
        self.signal_used();
    }

    /// The next chain as the library parses it: with no bound on the number of buffers other than
    /// the size of the descriptor table.
    pub fn pop_descriptors(&mut self) -> Option<DescriptorChain<Arc<GuestRam>>> {
        let memory = Arc::clone(&self.memory);
        self.next_descriptors(memory)
    }

    fn next_descriptors<M>(&mut self, memory: M) -> Option<DescriptorChain<M>>
    where
        M: Clone + std::ops::Deref<Target = GuestRam>,
    {
        if self.broken {
            return None;
        }
        match self.queue.iter(memory) {
            Ok(mut available) => available.next(),
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    /// Gives `chain` back with `length` bytes written to it.
    pub fn complete(&mut self, chain: Chain, length: usize) {
        self.complete_head(chain.head, length);
    }

    /// Gives the chain with this head back with `length` bytes written to it.
    pub fn complete_head(&mut self, head: u16, length: usize) {
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        match self.queue.add_used(self.memory.as_ref(), head, length) {
            Ok(()) => self.completed = self.completed.wrapping_add(1),
            Err(error) => self.fail(&error),
        }
    }

    /// Gives back the chains, with what was written to each, that together hold one thing: the
    /// driver sees all of them or none.
    pub fn complete_together(&mut self, chains: impl ExactSizeIterator<Item = (Chain, usize)>) {
        let last = chains.len().wrapping_sub(1);
        for (index, (chain, length)) in chains.enumerate() {
            if index == last {
                // It publishes the entries before its own with it.
                self.complete(chain, length);
            } else if let Err(error) = self.write_used(&chain, length) {
                return self.fail(&error);
            }
        }
    }

    /// Writes the next entry of the used ring without moving the index that the driver looks at.
    fn write_used(&mut self, chain: &Chain, length: usize) -> Result<(), Error> {
        let next = self.queue.next_used();
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        // The ring's own two fields, then eight bytes for each entry.
        let offset = 4 + 8 * u64::from(next % self.queue.size());
        let entry = GuestAddress(self.queue.used_ring())
            .checked_add(offset)
            .ok_or(Error::AddressOverflow)?;
        // The head and the length, 32 bits each, little endian.
        let element = u64::from(length) << 32 | u64::from(chain.head);
        self.memory
            .write_obj(element.to_le(), entry)
            .map_err(Error::GuestMemory)?;
        self.queue.set_next_used(next.wrapping_add(1));
        self.completed = self.completed.wrapping_add(1);
        Ok(())
    }

    /// Interrupts the driver if it wants to know of the chains given back since the last call.
    pub fn signal_used(&mut self) {
        match self.wants_to_know() {
            Ok(true) => self.interrupt.signal_used(),
            Ok(false) => {}
            Err(error) => self.fail(&error),
        }
    }

    /// Virtio 1.2, 2.7.7.2. The library has the same, but counts only what it published by itself.
    fn wants_to_know(&mut self) -> Result<bool, Error> {
        let completed = std::mem::take(&mut self.completed);
        if completed == 0 || !self.queue.event_idx_enabled() {
            return Ok(completed > 0);
        }
        // The driver writes which entry it waits for and then looks at the index once more: what we
        // published has to be seen before we look.
        fence(Ordering::SeqCst);
        // Behind the ring's own two fields and its entries.
        let offset = 4 + 2 * u64::from(self.queue.size());
        let address = GuestAddress(self.queue.avail_ring())
            .checked_add(offset)
            .ok_or(Error::AddressOverflow)?;
        let awaited: u16 = self
            .memory
            .load(address, Ordering::Relaxed)
            .map_err(Error::GuestMemory)?;
        let since = self.queue.next_used().wrapping_sub(u16::from_le(awaited));
        Ok(since.wrapping_sub(1) < completed)
    }

    /// Asks the driver for no notifications while the queue is being drained.
    pub fn disable_notification(&mut self) {
        if let Err(error) = self.queue.disable_notification(self.memory.as_ref()) {
            self.fail(&error);
        }
    }

    /// Asks the driver for notifications; says whether chains have come in meanwhile, for which
    /// there will be none.
    pub fn enable_notification(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(self.memory.as_ref()) {
            Ok(more) => more,
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    fn fail(&mut self, error: &Error) {
        if !self.broken {
            tracing::warn!(%error, "the driver broke a virtio queue; it has to reset the device");
            self.broken = true;
            self.interrupt.signal_needs_reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Driver, READ, WRITE};

    #[test]
    fn a_chain_is_read_and_written_across_its_buffers() {
        let mut driver = Driver::new(&[16]);
        let mut queue = driver.queues().remove(0);
        let memory = driver.memory();
        let [a, b, c] = [0x1_0000, 0x2_0000, 0x3_0000];
        driver.write(a, b"abcd");
        driver.write(b, b"efgh");
        driver.offer(0, &[(a, 4, READ), (b, 4, READ), (c, 3, WRITE)]);
        let chain = queue.pop().unwrap();
        assert_eq!((chain.readable_len(), chain.writable_len()), (8, 3));
        let mut data = [0; 8];
        assert_eq!(chain.copy_from(&memory, 2, &mut data), 6);
        assert_eq!(&data[..6], b"cdefgh");
        assert_eq!(chain.copy_to(&memory, 1, b"xyz"), 2);
        assert_eq!(driver.read(c, 3), b"\0xy");
        queue.complete(chain, 3);
        assert_eq!(driver.used(0), [(0, 3)]);
        assert!(queue.pop().is_none());
    }

    #[test]
    fn malformed_chains_come_back_unused_and_the_next_one_is_served() {
        let mut driver = Driver::new(&[16]);
        let mut queue = driver.queues().remove(0);
        let end = driver.memory_size();
        driver.offer(0, &[(end, 4, READ)]);
        driver.offer(0, &[(end - 2, 4, READ)]);
        driver.offer(0, &[(u64::MAX - 1, 4, READ)]);
        driver.offer(0, &[(0x1_0000, 0, READ)]);
        driver.offer(0, &[(0x1_0000, u32::MAX, WRITE)]);
        driver.offer(0, &[(0x1_0000, 4, WRITE), (0x1_0000, 4, READ)]);
        driver.offer(0, &[(0x1_0000, 4, READ)]);
        let chain = queue.pop().unwrap();
        assert_eq!(chain.readable_len(), 4);
        assert_eq!(driver.used(0).len(), 6);
        assert!(driver.used(0).iter().all(|(_, length)| *length == 0));
        assert!(!driver.needs_reset());
    }

    #[test]
    fn a_loop_and_a_chain_out_of_the_table_are_malformed() {
        let mut driver = Driver::new(&[16]);
        let mut queue = driver.queues().remove(0);
        driver.describe(0, 0, (0x1_0000, 4, READ), Some(1));
        driver.describe(0, 1, (0x1_0000, 4, READ), Some(0));
        driver.publish(0, 0);
        driver.describe(0, 2, (0x1_0000, 4, READ), Some(16));
        driver.publish(0, 2);
        driver.publish(0, 999);
        assert!(queue.pop().is_none());
        assert_eq!(driver.used(0)[..2], [(0, 0), (2, 0)]);
    }

    #[test]
    fn an_available_index_that_cannot_be_stops_the_queue() {
        let mut driver = Driver::new(&[16]);
        let mut queue = driver.queues().remove(0);
        driver.offer(0, &[(0x1_0000, 4, READ)]);
        driver.set_available_index(0, 1000);
        assert!(queue.pop().is_none());
        assert!(driver.needs_reset());
        driver.set_available_index(0, 1);
        assert!(queue.pop().is_none());
        assert!(!queue.enable_notification());
    }
}
