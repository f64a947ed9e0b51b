//! virtio-mem (virtio 1.3, 5.15): memory that comes and goes while the machine runs.
//!
//! The host says how much there is to be, and the driver plugs and unplugs blocks of a region above RAM until it is so, or
//! as far as it can. Nobody but the driver plugs anything, and it gets no more than was asked for. A block that it unplugs
//! is given back to the host at once. What is in the region beyond the part that the host has opened nobody reaches; a
//! guest that uses blocks there which it has not plugged takes from its cgroup, as with its RAM. Requests are served on
//! the write that announces them: the driver waits for each. There is no thread.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use super::queue::Chain;
use super::{DeviceType, Held, Interrupt, PauseError, VirtQueue, VirtioDevice, read_config_space};
use crate::memory::{self, GuestRam, Region};

const QUEUE_SIZES: [u16; 1] = [16];
/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: the driver is not to read what it has not plugged.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// RING_EVENT_IDX.
const F_EVENT_IDX: u64 = 1 << 29;

/// What the driver plugs and unplugs at a time: the smallest piece that every Linux takes, also those whose largest
/// pieces of free memory have 4 MiB.
pub const BLOCK: u64 = 4 << 20;

/// `struct virtio_mem_req`: type, padding, then the address of the first block and their number.
const REQUEST_SIZE: usize = 24;
const REQUEST_PLUG: u16 = 0;
const REQUEST_UNPLUG: u16 = 1;
const REQUEST_UNPLUG_ALL: u16 = 2;
const REQUEST_STATE: u16 = 3;

/// `struct virtio_mem_resp`: type, padding, then the state that was asked for.
const RESPONSE_SIZE: usize = 10;

/// What is answered to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Response {
    /// It is done.
    Ack,
    /// It would be more than the host asks for.
    Nack,
    /// There are no such blocks, or they are plugged or unplugged already.
    Error,
    /// Done; what the blocks are.
    State(BlockState),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BlockState {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

impl Response {
    fn bytes(self) -> [u8; RESPONSE_SIZE] {
        let (kind, state) = match self {
            Self::Ack => (0_u16, 0),
            Self::Nack => (1, 0),
            Self::Error => (3, 0),
            Self::State(state) => (0, state as u16),
        };
        let mut bytes = [0; RESPONSE_SIZE];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        bytes
    }
}

/// What is called, on a vCPU's thread, when there is as much memory as was asked for.
pub type Arrived = Box<dyn FnOnce() + Send>;

/// What the driver and the host agree on.
#[derive(Default)]
struct Blocks {
    /// For each block that the driver may plug, whether it is.
    plugged: Vec<bool>,
    /// Bytes that are plugged.
    plugged_size: u64,
    /// Bytes that are to be plugged.
    requested_size: u64,
    generation: u32,
    /// While a driver is there.
    interrupt: Option<Arc<Interrupt>>,
    /// Whom to tell.
    arrived: Option<Arrived>,
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blocks")
            .field("plugged_size", &self.plugged_size)
            .field("requested_size", &self.requested_size)
            .finish_non_exhaustive()
    }
}

impl Blocks {
    /// Bytes from the region's start on that the driver may plug.
    fn usable_size(&self) -> u64 {
        self.plugged.len() as u64 * BLOCK
    }

    /// Makes all of `range`, which there is, plugged or unplugged.
    fn set(&mut self, range: Range<usize>, plugged: bool) {
        let bytes = range.len() as u64 * BLOCK;
        self.plugged[range].fill(plugged);
        if plugged {
            self.plugged_size += bytes;
        } else {
            self.plugged_size -= bytes;
        }
        self.generation = self.generation.wrapping_add(1);
    }

    /// Tells who waits for it that there is as much as was asked for, if it is so.
    fn settle(&mut self) {
        if self.plugged_size == self.requested_size
            && let Some(arrived) = self.arrived.take()
        {
            arrived();
        }
    }
}

fn lock(blocks: &Mutex<Blocks>) -> MutexGuard<'_, Blocks> {
    blocks.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How much memory of a region there is and is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PluggedMemory {
    /// Bytes that the driver has plugged.
    pub plugged: u64,
    /// Bytes that it was asked for.
    pub requested: u64,
    /// Whether there is a driver.
    pub has_driver: bool,
}

/// The host's side of a memory device.
#[derive(Debug, Clone)]
pub struct MemHandle {
    blocks: Arc<Mutex<Blocks>>,
    region: Arc<Region>,
}

impl MemHandle {
    /// How much memory there is.
    pub fn memory(&self) -> PluggedMemory {
        let blocks = lock(&self.blocks);
        PluggedMemory {
            plugged: blocks.plugged_size,
            requested: blocks.requested_size,
            has_driver: blocks.interrupt.is_some(),
        }
    }

    /// Asks the driver for `bytes` of memory, a multiple of [`BLOCK`] within what is open of the region. `arrived` is called
    /// when it has as much, unless something else is asked for before.
    pub fn request(&self, bytes: u64, arrived: Arrived) {
        let mut blocks = lock(&self.blocks);
        // At most what a region has in its hundreds of GiB.
        let usable = (self.region.open() / BLOCK) as usize;
        blocks.plugged.resize(usable, false);
        blocks.requested_size = bytes.min(blocks.usable_size()) / BLOCK * BLOCK;
        blocks.generation = blocks.generation.wrapping_add(1);
        blocks.arrived = Some(arrived);
        if let Some(interrupt) = &blocks.interrupt {
            interrupt.signal_config_change();
        }
        blocks.settle();
    }
}

/// The memory device.
#[derive(Debug)]
pub struct Mem {
    blocks: Arc<Mutex<Blocks>>,
    region: Arc<Region>,
    queue: Option<VirtQueue>,
}

impl Mem {
    /// A device that plugs nothing yet; what it plugs is in `region`.
    pub fn new(region: Arc<Region>) -> Self {
        Self {
            blocks: Arc::default(),
            region,
            queue: None,
        }
    }

    /// The host's side of it.
    pub fn handle(&self) -> MemHandle {
        MemHandle {
            blocks: Arc::clone(&self.blocks),
            region: Arc::clone(&self.region),
        }
    }

    /// Does what the driver asks for; the bytes come from it.
    fn serve(&self, request: &[u8; REQUEST_SIZE]) -> Response {
        let half = |at: usize| u16::from_le_bytes([request[at], request[at + 1]]);
        let [.., a, b, c, d, e, f, g, h] = request[..16] else {
            return Response::Error;
        };
        let address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let mut blocks = lock(&self.blocks);
        let range = self.range(&blocks, address, half(16));
        let count = |range: &Range<usize>| {
            let of_range = &blocks.plugged[range.clone()];
            of_range.iter().filter(|plugged| **plugged).count()
        };
        match (half(0), range) {
            (REQUEST_PLUG, Some(range)) if count(&range) == 0 => {
                let size = blocks.plugged_size + range.len() as u64 * BLOCK;
                if size > blocks.requested_size {
                    return Response::Nack;
                }
                blocks.set(range, true);
            }
            (REQUEST_UNPLUG, Some(range)) if count(&range) == range.len() => {
                self.give_back(&range);
                blocks.set(range, false);
            }
            (REQUEST_UNPLUG_ALL, _) => {
                let all = 0..blocks.plugged.len();
                self.give_back(&all);
                blocks.plugged.fill(false);
                blocks.plugged_size = 0;
                blocks.generation = blocks.generation.wrapping_add(1);
            }
            (REQUEST_STATE, Some(range)) => {
                return Response::State(match count(&range) {
                    0 => BlockState::Unplugged,
                    count if count == range.len() => BlockState::Plugged,
                    _ => BlockState::Mixed,
                });
            }
            _ => return Response::Error,
        }
        blocks.settle();
        Response::Ack
    }

    /// The blocks from `address` on, if there are so many that the driver may plug.
    fn range(&self, blocks: &Blocks, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.region.start_addr().0)?;
        let first = usize::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(count.into())?;
        let is_range = count > 0 && offset.is_multiple_of(BLOCK) && end <= blocks.plugged.len();
        is_range.then_some(first..end)
    }

    /// The host has the memory of `range`, which is open, back.
    fn give_back(&self, range: &Range<usize>) {
        let offset = MemoryRegionAddress(range.start as u64 * BLOCK);
        let length = range.len() * BLOCK as usize;
        if let Ok(slice) = self.region.get_slice(offset, length) {
            memory::give_back(&slice);
        }
    }

    /// Serves one chain; how much was written to it.
    fn answer(&self, ram: &GuestRam, chain: &Chain) -> usize {
        let mut request = [0; REQUEST_SIZE];
        if chain.writable_len() < RESPONSE_SIZE {
            return 0;
        }
        let response = match chain.copy_from(ram, 0, &mut request) {
            REQUEST_SIZE => self.serve(&request),
            _ => Response::Error,
        };
        chain.copy_to(ram, 0, &response.bytes())
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Memory
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE | F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_events(&self) -> &[EventFd] {
        &[]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let blocks = lock(&self.blocks);
        // block_size, node_id and padding, addr, region_size, usable_region_size, plugged_size, requested_size.
        let fields = [
            BLOCK,
            0,
            self.region.start_addr().0,
            self.region.len(),
            blocks.usable_size(),
            blocks.plugged_size,
            blocks.requested_size,
        ];
        read_config_space(fields.map(u64::to_le_bytes).as_flattened(), offset, data);
    }

    fn config_generation(&self) -> u32 {
        lock(&self.blocks).generation
    }

    fn activate(&mut self, mut queues: Vec<VirtQueue>, _features: u64) {
        self.queue = queues.pop();
        let interrupt = self
            .queue
            .as_ref()
            .map(|queue| Arc::clone(queue.interrupt()));
        lock(&self.blocks).interrupt = interrupt;
        self.notify(0);
    }

    fn notify(&mut self, _queue: usize) {
        let Some(mut queue) = self.queue.take() else {
            return;
        };
        queue.serve(|ram, chain| self.answer(ram, chain));
        self.queue = Some(queue);
    }

    fn pause(&mut self) -> Result<Held, PauseError> {
        let blocks = lock(&self.blocks);
        match (blocks.plugged_size, blocks.requested_size) {
            (0, 0) => Ok(Held::Nothing),
            _ => Err(PauseError::Memory),
        }
    }

    /// What is plugged stays so: the driver that comes next finds it, and unplugs it if it is not its own.
    fn reset(&mut self) {
        self.queue = None;
        lock(&self.blocks).interrupt = None;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use vm_memory::Bytes;

    use super::super::testing::{Descriptor, Driver, READ, WRITE};
    use super::*;
    use crate::memory::{Memory, MemoryError, MemorySize};

    /// What the host has opened.
    const OPEN: u64 = 128 << 20;
    /// Where requests and answers are.
    const REQUEST: u64 = 0x1_0000;
    const ANSWER: u64 = 0x2_0000;

    struct Machine {
        driver: Driver,
        memory: Memory,
        device: Mem,
        handle: MemHandle,
        arrived: Arc<AtomicUsize>,
    }

    impl Machine {
        /// A machine that was asked to plug so many blocks.
        fn asked_for(blocks: u64) -> Self {
            let mut memory = Memory::new(MemorySize::from_mib(16).unwrap()).unwrap();
            memory.add_room().unwrap();
            let opened = memory.open_room(OPEN, |_, _| Ok::<_, MemoryError>(()));
            opened.unwrap();
            let driver = Driver::new(&QUEUE_SIZES);
            let mut device = Mem::new(Arc::clone(memory.room().unwrap()));
            let handle = device.handle();
            assert!(!handle.memory().has_driver);
            device.activate(driver.queues(), F_UNPLUGGED_INACCESSIBLE);
            let mut machine = Self {
                driver,
                memory,
                device,
                handle,
                arrived: Arc::default(),
            };
            machine.ask(blocks);
            machine
        }

        fn ask(&mut self, blocks: u64) {
            let arrived = Arc::clone(&self.arrived);
            let count = move || {
                arrived.fetch_add(1, Ordering::SeqCst);
            };
            self.handle.request(blocks * BLOCK, Box::new(count));
        }

        /// The address of a block.
        fn block(&self, number: u64) -> u64 {
            self.memory.room().unwrap().start_addr().0 + number * BLOCK
        }

        /// A request's answer: its type, and the state.
        fn request(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
            let mut bytes = [0; REQUEST_SIZE];
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            bytes[8..16].copy_from_slice(&address.to_le_bytes());
            bytes[16..18].copy_from_slice(&count.to_le_bytes());
            self.driver.write(REQUEST, &bytes);
            self.driver.write(ANSWER, &[0xff; RESPONSE_SIZE]);
            let length = self.offer(&[(REQUEST, 24, READ), (ANSWER, 10, WRITE)]);
            assert_eq!(length as usize, RESPONSE_SIZE);
            let answer = self.driver.read(ANSWER, RESPONSE_SIZE);
            let half = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
            (half(0), half(8))
        }

        /// How much the device writes to a chain.
        fn offer(&mut self, descriptors: &[Descriptor]) -> u32 {
            let before = self.driver.used_index(0);
            self.driver.offer(0, descriptors);
            self.device.notify(0);
            assert_eq!(self.driver.used_index(0), before.wrapping_add(1));
            self.driver.used_entry(0, before).1
        }

        /// Of the configuration space: usable, plugged and requested size, in blocks.
        fn sizes(&self) -> [u64; 3] {
            [32, 40, 48].map(|offset| {
                let mut bytes = [0; 8];
                self.device.read_config(offset, &mut bytes);
                u64::from_le_bytes(bytes) / BLOCK
            })
        }

        fn arrived(&self) -> usize {
            self.arrived.load(Ordering::SeqCst)
        }
    }

    const ACK: (u16, u16) = (0, 0);
    const NACK: (u16, u16) = (1, 0);
    const ERROR: (u16, u16) = (3, 0);

    #[test]
    fn the_driver_plugs_what_it_is_asked_for_and_no_more() {
        let mut machine = Machine::asked_for(3);
        assert_eq!((machine.sizes(), machine.arrived()), ([32, 0, 3], 0));
        let first = machine.block(4);
        assert_eq!(machine.request(REQUEST_PLUG, first, 2), ACK);
        assert_eq!((machine.sizes(), machine.arrived()), ([32, 2, 3], 0));
        assert_eq!(machine.request(REQUEST_PLUG, machine.block(0), 2), NACK);
        assert_eq!(machine.request(REQUEST_PLUG, machine.block(31), 1), ACK);
        assert_eq!((machine.sizes(), machine.arrived()), ([32, 3, 3], 1));
        assert_eq!(machine.request(REQUEST_PLUG, machine.block(7), 1), NACK);
        let expected = PluggedMemory {
            plugged: 3 * BLOCK,
            requested: 3 * BLOCK,
            has_driver: true,
        };
        assert_eq!(machine.handle.memory(), expected);
        // What there is already has arrived.
        machine.ask(3);
        assert_eq!(machine.arrived(), 2);
    }

    #[test]
    fn an_unplugged_block_holds_nothing() {
        let mut machine = Machine::asked_for(2);
        assert_eq!(machine.request(REQUEST_PLUG, machine.block(0), 2), ACK);
        let places = [0, BLOCK - 1, BLOCK].map(|at| vm_memory::GuestAddress(machine.block(0) + at));
        for at in places {
            machine.memory.ram().write_obj(7_u8, at).unwrap();
        }
        machine.ask(1);
        assert_eq!(machine.request(REQUEST_UNPLUG, machine.block(0), 1), ACK);
        assert_eq!((machine.sizes(), machine.arrived()), ([32, 1, 1], 2));
        let held = places.map(|at| machine.memory.ram().read_obj::<u8>(at).unwrap());
        assert_eq!(held, [0, 0, 7]);
        assert_eq!(machine.request(REQUEST_UNPLUG_ALL, 0, 0), ACK);
        assert_eq!(machine.sizes(), [32, 0, 1]);
        let held: u8 = machine.memory.ram().read_obj(places[2]).unwrap();
        assert_eq!(held, 0);
    }

    #[test]
    fn the_state_of_blocks_is_told() {
        let mut machine = Machine::asked_for(2);
        assert_eq!(machine.request(REQUEST_PLUG, machine.block(1), 2), ACK);
        for (first, count, state) in [(1, 2, 0), (0, 1, 1), (3, 29, 1), (0, 32, 2), (2, 2, 2)] {
            let answer = machine.request(REQUEST_STATE, machine.block(first), count);
            assert_eq!(answer, (0, state), "{first} {count}");
        }
    }

    #[test]
    fn what_cannot_be_asked_for_changes_nothing() {
        let mut machine = Machine::asked_for(32);
        assert_eq!(machine.request(REQUEST_PLUG, machine.block(2), 2), ACK);
        let before = machine.sizes();
        let start = machine.block(0);
        let bad = [
            // Unaligned, below, behind, around the end of all addresses, too many, and none at all.
            (start + 1, 1),
            (start + 0x1000, 1),
            (start - BLOCK, 1),
            (0, 1),
            (machine.block(32), 1),
            (u64::MAX / BLOCK * BLOCK, u16::MAX),
            (machine.block(31), 2),
            (start, u16::MAX),
            (start, 0),
        ];
        for (address, count) in bad {
            for kind in [REQUEST_PLUG, REQUEST_UNPLUG, REQUEST_STATE] {
                let answer = machine.request(kind, address, count);
                assert_eq!(answer, ERROR, "{kind} {address:#x} {count}");
            }
        }
        // Plugged twice, and unplugged what is not plugged, also in part.
        for (kind, first, count) in [
            (REQUEST_PLUG, 2, 1),
            (REQUEST_PLUG, 0, 3),
            (REQUEST_UNPLUG, 0, 1),
            (REQUEST_UNPLUG, 3, 2),
            (4, 2, 1),
            (u16::MAX, 0, 1),
        ] {
            let answer = machine.request(kind, machine.block(first), count);
            assert_eq!(answer, ERROR, "{kind} {first} {count}");
        }
        assert_eq!(machine.sizes(), before);
        // Chains that hold no request, or have no room for an answer.
        assert_eq!(
            machine.offer(&[(REQUEST, 23, READ), (ANSWER, 10, WRITE)]),
            10
        );
        assert_eq!(machine.driver.read(ANSWER, 1), [3]);
        assert_eq!(machine.offer(&[(ANSWER, 10, WRITE)]), 10);
        assert_eq!(machine.offer(&[(REQUEST, 24, READ), (ANSWER, 9, WRITE)]), 0);
        assert_eq!(machine.offer(&[(REQUEST, 24, READ)]), 0);
        assert_eq!(machine.sizes(), before);
    }

    #[test]
    fn the_driver_is_told_what_it_is_asked_for() {
        let mut machine = Machine::asked_for(1);
        let generation = machine.device.config_generation();
        // A signal was sent by then.
        machine.driver.irq.read().unwrap();
        machine.ask(2);
        machine.driver.irq.read().unwrap();
        assert_ne!(machine.device.config_generation(), generation);
        let generation = machine.device.config_generation();
        assert_eq!(machine.request(REQUEST_PLUG, machine.block(0), 1), ACK);
        assert_ne!(machine.device.config_generation(), generation);
        // No more can be asked for than is open.
        machine.ask(1000);
        assert_eq!(machine.sizes(), [32, 1, 32]);
        let mut all = [0xee; 64];
        machine.device.read_config(0, &mut all);
        assert_eq!(all[..8], BLOCK.to_le_bytes());
        assert_eq!(all[56..], [0xee; 8]);
    }

    #[test]
    fn memory_that_came_keeps_a_machine_from_being_written_down() {
        let mut machine = Machine::asked_for(0);
        assert!(machine.device.pause().is_ok());
        machine.ask(1);
        assert!(matches!(machine.device.pause(), Err(PauseError::Memory)));
        assert_eq!(machine.request(REQUEST_PLUG, machine.block(0), 1), ACK);
        machine.ask(0);
        assert!(matches!(machine.device.pause(), Err(PauseError::Memory)));
        assert_eq!(machine.request(REQUEST_UNPLUG_ALL, 0, 0), ACK);
        assert!(machine.device.pause().is_ok());
    }

    #[test]
    fn a_reset_leaves_what_is_plugged_for_the_next_driver() {
        let mut machine = Machine::asked_for(1);
        assert_eq!(machine.request(REQUEST_PLUG, machine.block(0), 1), ACK);
        machine.device.reset();
        machine.device.notify(0);
        assert!(!machine.handle.memory().has_driver);
        machine.ask(0);
        assert_eq!((machine.sizes(), machine.arrived()), ([32, 1, 0], 1));
        machine.driver = Driver::new(&QUEUE_SIZES);
        machine.device.activate(machine.driver.queues(), 0);
        assert_eq!(machine.request(REQUEST_UNPLUG_ALL, 0, 0), ACK);
        assert_eq!((machine.sizes(), machine.arrived()), ([32, 0, 0], 2));
    }
}
