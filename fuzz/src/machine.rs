//! A machine of one virtio device: guest memory, the registers, and a driver that may do anything.
//!
//! Pages that nobody may touch lie around each region of memory: an access beyond it ends the process.

use std::ptr;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};
use vmm::devices::bus::BusDevice;
use vmm::devices::virtio::{MmioTransport, VirtioDevice};
use vmm::memory::{GuestRam, Region};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::Input;

/// Guest memory: first addresses and lengths, with a hole in between.
const REGIONS: [(u64, usize); 2] = [(0, 0x4_0000), (HIGH, 0x2_0000)];
/// The second region, behind the hole. No ring lies there.
pub const HIGH: u64 = 0x6_0000;
/// Where no ring lies in the first region.
pub const DATA: u64 = 0x2_0000;
const GUARD: usize = 0x1_0000;
/// The most descriptors that the driver gives a queue.
const MAX_SIZE: u16 = 256;

pub const READ: u16 = 0;
pub const WRITE: u16 = 2;
const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

/// An address, a length and [`READ`] or [`WRITE`].
pub type Descriptor = (u64, u32, u16);

const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM_MAX: u64 = 0x34;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const STATUS: u64 = 0x70;
/// The low halves of the addresses of table, available ring and used ring; the high ones follow each.
const QUEUE_ADDRESSES: [u64; 3] = [0x80, 0x90, 0xa0];

/// One queue as the driver knows it.
#[derive(Default)]
struct Ring {
    size: u16,
    next_slot: u16,
    available: u16,
    /// Chains that the device gave back and the driver has seen.
    seen: u16,
}

pub struct Machine {
    memory: Arc<GuestRam>,
    transport: MmioTransport,
    rings: Vec<Ring>,
}

thread_local! {
    static MEMORY: Arc<GuestRam> = Arc::new(guarded_memory());
}

fn guarded_memory() -> GuestRam {
    let regions = REGIONS.map(|(start, length)| {
        let whole = length + 2 * GUARD;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other.
        let base = unsafe { libc::mmap(ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        let inside = base.cast::<u8>().wrapping_add(GUARD);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the range is in the mapping that was just made, which nobody uses yet.
        let opened = unsafe { libc::mprotect(inside.cast(), length, access) };
        assert_eq!(opened, 0);
        // SAFETY: the range is mapped with this access and is never unmapped.
        let region = unsafe { MmapRegion::build_raw(inside, length, access, flags) };
        Region::from(GuestRegionMmap::new(region.unwrap(), GuestAddress(start)).unwrap())
    });
    GuestRam::from_regions(regions.into()).unwrap()
}

/// Guest memory, zeroed. There is one a thread: a machine made before must not be used any more.
pub fn fresh_memory() -> Arc<GuestRam> {
    static ZEROS: [u8; REGIONS[0].1] = [0; REGIONS[0].1];
    let memory = MEMORY.with(Arc::clone);
    for (start, length) in REGIONS {
        memory
            .write_slice(&ZEROS[..length], GuestAddress(start))
            .unwrap();
    }
    memory
}

impl Machine {
    /// A machine with this device as it is at power on.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = fresh_memory();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let rings = device.queue_sizes().iter().map(|_| Ring::default());
        Self {
            rings: rings.collect(),
            transport: MmioTransport::new(Arc::clone(&memory), device, irq),
            memory,
        }
    }

    /// The machine as it was made, with a device that was reset.
    pub fn reset(&mut self) {
        self.write(STATUS, 0);
        fresh_memory();
        for ring in &mut self.rings {
            *ring = Ring::default();
        }
    }

    /// Sets the device up as a driver does that takes what `mask` leaves of the features, with queues of
    /// at most `size` descriptors.
    pub fn bring_up(&mut self, mask: u64, size: u16) {
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        for page in 0..2 {
            self.write(DEVICE_FEATURES_SEL, page);
            self.write(DRIVER_FEATURES_SEL, page);
            let mask = (mask | 1 << 32) >> (32 * page);
            let features = self.read(DEVICE_FEATURES) & mask as u32;
            self.write(DRIVER_FEATURES, features);
        }
        self.write(STATUS, 11);
        for queue in 0..self.rings.len() {
            self.write(QUEUE_SEL, queue as u32);
            let most = self.read(QUEUE_NUM_MAX) as u16;
            let size = size.clamp(1, most.min(MAX_SIZE));
            self.rings[queue].size = 1 << size.ilog2();
            self.write(QUEUE_NUM, self.rings[queue].size.into());
            for (register, address) in QUEUE_ADDRESSES.into_iter().zip(addresses(queue)) {
                self.write(register, address as u32);
                self.write(register + 4, 0);
            }
            self.write(QUEUE_READY, 1);
        }
        self.write(STATUS, 15);
    }

    pub fn write(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    pub fn read(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn notify(&mut self, queue: u32) {
        self.write(MmioTransport::QUEUE_NOTIFY, queue);
    }

    /// Writes to guest memory; what is not there is left out.
    pub fn poke(&self, address: u64, data: &[u8]) {
        // An input may name any address.
        let _ = self.memory.write(data, GuestAddress(address));
    }

    pub fn peek<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        // As for `poke`.
        let _ = self.memory.read(&mut data, GuestAddress(address));
        data
    }

    fn describe(&self, table: u64, slot: u16, descriptor: Descriptor, next: u16) {
        let (address, length, flags) = descriptor;
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&length.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.poke(table + 16 * u64::from(slot), &raw);
    }

    fn publish(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.available % ring.size.max(1);
        ring.available = ring.available.wrapping_add(1);
        let index = ring.available;
        let [_, available, _] = addresses(queue);
        self.poke(available + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        self.poke(available + 2, &index.to_le_bytes());
    }

    /// Makes a chain of these descriptors available, in the table's next slots.
    pub fn offer(&mut self, queue: usize, descriptors: &[Descriptor]) {
        let size = self.rings[queue].size.max(1);
        let [table, ..] = addresses(queue);
        let head = self.rings[queue].next_slot % size;
        let mut slot = head;
        for (i, &(address, length, flags)) in descriptors.iter().enumerate() {
            let next = (slot + 1) % size;
            let last = i + 1 == descriptors.len();
            let flags = if last { flags } else { flags | NEXT };
            self.describe(table, slot, (address, length, flags), next);
            slot = next;
        }
        self.rings[queue].next_slot = slot;
        self.publish(queue, head);
    }

    /// The slot of the table in which the next chain of [`Machine::offer`] begins.
    pub fn next_slot(&self, queue: usize) -> u16 {
        self.rings[queue].next_slot
    }

    /// What the device gave back since the last call, heads and lengths: one chain.
    pub fn take_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let [_, _, used] = addresses(queue);
        let ring = &mut self.rings[queue];
        let slot = u64::from(ring.seen % ring.size.max(1));
        if u16::from_le_bytes(self.peek(used + 2)) == self.rings[queue].seen {
            return None;
        }
        let ring = &mut self.rings[queue];
        ring.seen = ring.seen.wrapping_add(1);
        let [h0, h1, _, _, l0, l1, l2, l3] = self.peek(used + 4 + 8 * slot);
        Some((
            u16::from_le_bytes([h0, h1]),
            u32::from_le_bytes([l0, l1, l2, l3]),
        ))
    }

    /// Does what the next bytes of `input` say; `host` does so for what comes from elsewhere than the guest.
    pub fn step(&mut self, input: &mut Input<'_>, host: &mut dyn FnMut(&mut Input<'_>)) {
        let queues = self.rings.len();
        let queue = |input: &mut Input<'_>| usize::from(input.byte()) % queues;
        match input.byte() % 9 {
            0 => {
                let register = u64::from(input.byte()) * 4;
                self.write(register, input.u32());
            }
            1 => {
                let offset = input.u16() % 0x1000;
                let mut data = [0; 8];
                let length = 1 + usize::from(input.byte() % 8);
                self.transport.read(offset.into(), &mut data[..length]);
            }
            2 => {
                let offset = input.u16() % 0x1000;
                let length = 1 + usize::from(input.byte() % 8);
                self.transport.write(offset.into(), input.bytes(length));
            }
            3 => {
                let address = any_address(input);
                let length = input.byte().into();
                self.poke(address, input.bytes(length));
            }
            4 | 5 => {
                let queue = queue(input);
                let count = usize::from(input.byte() % 16);
                let chain: Vec<_> = (0..count).map(|_| any_descriptor(input)).collect();
                self.offer(queue, &chain);
                self.notify(queue as u32);
            }
            6 => {
                let queue = queue(input);
                let [table, ..] = addresses(queue);
                // In the queue's table, or in a table in memory that a descriptor may name.
                let table = input.one_of(&[table, DATA, HIGH]);
                let slot = input.u16() % MAX_SIZE;
                let (address, length, flags) = any_descriptor(input);
                let flags = flags | u16::from(input.byte());
                self.describe(table, slot, (address, length, flags), input.u16());
            }
            7 => {
                let queue = queue(input);
                self.publish(queue, input.u16());
                self.notify(queue as u32);
            }
            _ => {
                host(input);
                self.notify(queue(input) as u32);
            }
        }
    }
}

/// A queue's descriptor table, available ring and used ring.
fn addresses(queue: usize) -> [u64; 3] {
    let base = 0x1000 + queue as u64 * 0x4000;
    [base, base + 0x1000, base + 0x2000]
}

/// In memory, in the hole, or anywhere.
fn any_address(input: &mut Input<'_>) -> u64 {
    match input.u16() {
        u16::MAX => input.u64(),
        short => u64::from(short) << 3,
    }
}

fn any_descriptor(input: &mut Input<'_>) -> Descriptor {
    let kind = input.byte();
    let address = any_address(input);
    let length = match kind & 0x30 {
        0x00 => u32::from(input.byte()),
        0x10 => u32::from(input.u16()),
        0x20 => 16 * u32::from(input.byte()),
        _ => input.u32(),
    };
    let flags = input_flags(kind);
    (address, length, flags)
}

fn input_flags(kind: u8) -> u16 {
    let direction = if kind & 1 == 0 { READ } else { WRITE };
    let table = if kind & 0xc2 == 0xc2 { INDIRECT } else { 0 };
    direction | table
}
