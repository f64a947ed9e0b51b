//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2): a device's registers.
//!
//! Every register write is the guest's. The queue registers exist only while the driver sets the
//! device up; with DRIVER_OK they turn into [`VirtQueue`]s that no register reaches any more, so
//! that a write after activation has nothing to change.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_mmio;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

use super::{DeviceType, Held, Interrupt, PauseError, VirtQueue, VirtioDevice};
use crate::devices::bus::BusDevice;
use crate::memory::GuestRam;

/// The number of addresses that the transport answers.
pub const MMIO_SIZE: u64 = 0x1000;

/// `"virt"`, the MagicValue register.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// `"rt"`, an arbitrary VendorID.
const VENDOR: u32 = 0x7472;
const CONFIG_SPACE: u64 = virtio_mmio::VIRTIO_MMIO_CONFIG as u64;

const F_VERSION_1: u64 = 1 << 32;
const F_EVENT_IDX: u64 = 1 << 29;

/// The Status register (virtio 1.2, 2.1).
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// How far the driver has come. A stage holds what can be changed in it, and no more.
enum Stage {
    /// Before FEATURES_OK.
    Negotiating(Negotiation),
    /// Features are agreed on; queues are being set up.
    Configuring(Negotiated),
    /// DRIVER_OK: the device has the queues.
    Active(Negotiated),
    /// The driver has given up, or set DRIVER_OK on queues that cannot be.
    Failed,
}

#[derive(Default)]
struct Negotiation {
    device_page: u32,
    driver_page: u32,
    driver_features: u64,
}

/// What driver and device have agreed on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Negotiated {
    features: u64,
    queues: Vec<QueueRegisters>,
}

/// What a transport and its device are to the driver between two requests. The rest is in guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    device_type: u32,
    status: u32,
    interrupt_status: u32,
    /// None where no driver has come.
    negotiated: Option<Negotiated>,
    held: Held,
}

/// Whether a device has served a ring before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ring {
    New,
    Used,
}

/// The registers of one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    max_size: u16,
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }

    /// The queue that the registers describe, if its size is one and its rings are in memory.
    fn build(&self, memory: &GuestRam, event_idx: bool, ring: Ring) -> Option<Queue> {
        if !self.ready {
            return None;
        }
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(self.size).ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.available))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(self.used))
            .ok()?;
        let size = u64::from(self.size);
        let rings = [
            (self.descriptors, 16 * size),
            (self.available, 6 + 2 * size),
            (self.used, 6 + 8 * size),
        ];
        for (address, length) in rings {
            let length = usize::try_from(length).ok()?;
            if address == 0 || memory.get_slice(GuestAddress(address), length).is_err() {
                return None;
            }
        }
        if ring == Ring::Used {
            // A device that stands still has given chains back in the order in which it took them, and those that it
            // took and did not give back are to be taken again.
            let index = GuestAddress(self.used).checked_add(2)?;
            let next = u16::from_le(memory.load(index, Ordering::Acquire).ok()?);
            queue.set_next_avail(next);
            queue.set_next_used(next);
        }
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Some(queue)
    }
}

/// A virtio device's window of registers on the MMIO bus.
pub struct MmioTransport {
    memory: Arc<GuestRam>,
    device: Box<dyn VirtioDevice>,
    interrupt: Arc<Interrupt>,
    status: u32,
    stage: Stage,
    selected: u32,
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device", &self.device.device_type())
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Puts `device` behind registers. Its chains point into `memory`; its interrupt is a write to
    /// `irqfd`, which stands for an edge-triggered line.
    pub fn new(memory: Arc<GuestRam>, device: Box<dyn VirtioDevice>, irqfd: EventFd) -> Self {
        Self {
            memory,
            device,
            interrupt: Arc::new(Interrupt::new(irqfd)),
            status: 0,
            stage: Stage::Negotiating(Negotiation::default()),
            selected: 0,
        }
    }

    /// For each queue the event to register as ioeventfd: a 32-bit write at
    /// [`MmioTransport::QUEUE_NOTIFY`] of the queue's index. None if the device serves its queues
    /// on the write itself.
    pub fn queue_notify_eventfds(&self) -> &[EventFd] {
        self.device.queue_events()
    }

    /// Offset of the QueueNotify register.
    pub const QUEUE_NOTIFY: u64 = virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

    fn features(&self) -> u64 {
        self.device.features() | F_VERSION_1
    }

    fn read_register(&self, offset: u64) -> u32 {
        let Ok(register) = u32::try_from(offset) else {
            return 0;
        };
        match register {
            virtio_mmio::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            virtio_mmio::VIRTIO_MMIO_VERSION => VERSION,
            virtio_mmio::VIRTIO_MMIO_DEVICE_ID => self.device.device_type() as u32,
            virtio_mmio::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            virtio_mmio::VIRTIO_MMIO_DEVICE_FEATURES => match &self.stage {
                Stage::Negotiating(negotiation) => match negotiation.device_page {
                    0 => low(self.features()),
                    1 => high(self.features()),
                    _ => 0,
                },
                _ => 0,
            },
            virtio_mmio::VIRTIO_MMIO_QUEUE_NUM_MAX => self
                .selected_index()
                .and_then(|i| self.device.queue_sizes().get(i))
                .map_or(0, |&size| u32::from(size)),
            virtio_mmio::VIRTIO_MMIO_QUEUE_READY => match &self.stage {
                Stage::Configuring(negotiated) => self
                    .selected_index()
                    .and_then(|i| negotiated.queues.get(i))
                    .map_or(0, |queue| u32::from(queue.ready)),
                Stage::Active(_) => self
                    .selected_index()
                    .is_some_and(|i| i < self.device.queue_sizes().len())
                    .into(),
                Stage::Negotiating(_) | Stage::Failed => 0,
            },
            virtio_mmio::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            virtio_mmio::VIRTIO_MMIO_STATUS => self.status_register(),
            // No device has a shared memory region: a length of all ones says so (4.2.2).
            virtio_mmio::VIRTIO_MMIO_SHM_LEN_LOW
            | virtio_mmio::VIRTIO_MMIO_SHM_LEN_HIGH
            | virtio_mmio::VIRTIO_MMIO_SHM_BASE_LOW
            | virtio_mmio::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            virtio_mmio::VIRTIO_MMIO_CONFIG_GENERATION => self.device.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let Ok(register) = u32::try_from(offset) else {
            return;
        };
        match register {
            virtio_mmio::VIRTIO_MMIO_QUEUE_SEL => self.selected = value,
            virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            virtio_mmio::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            virtio_mmio::VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.write_set_up_register(register, value),
        }
    }

    /// The registers that are frozen when their stage is over.
    fn write_set_up_register(&mut self, register: u32, value: u32) {
        let selected = self.selected_index();
        match &mut self.stage {
            Stage::Negotiating(negotiation) => match register {
                virtio_mmio::VIRTIO_MMIO_DEVICE_FEATURES_SEL => negotiation.device_page = value,
                virtio_mmio::VIRTIO_MMIO_DRIVER_FEATURES_SEL => negotiation.driver_page = value,
                virtio_mmio::VIRTIO_MMIO_DRIVER_FEATURES => match negotiation.driver_page {
                    0 => set_low(&mut negotiation.driver_features, value),
                    1 => set_high(&mut negotiation.driver_features, value),
                    _ => {}
                },
                _ => {}
            },
            Stage::Configuring(negotiated) => {
                let Some(queue) = selected.and_then(|i| negotiated.queues.get_mut(i)) else {
                    return;
                };
                match register {
                    virtio_mmio::VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
                    _ if queue.ready => {}
                    virtio_mmio::VIRTIO_MMIO_QUEUE_NUM => {
                        // Zero is no size: the queue will not be taken.
                        queue.size = u16::try_from(value).unwrap_or(0);
                    }
                    virtio_mmio::VIRTIO_MMIO_QUEUE_DESC_LOW => {
                        set_low(&mut queue.descriptors, value);
                    }
                    virtio_mmio::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                        set_high(&mut queue.descriptors, value);
                    }
                    virtio_mmio::VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                        set_low(&mut queue.available, value);
                    }
                    virtio_mmio::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                        set_high(&mut queue.available, value);
                    }
                    virtio_mmio::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
                    virtio_mmio::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
                    _ => {}
                }
            }
            Stage::Active(_) | Stage::Failed => {}
        }
    }

    fn selected_index(&self) -> Option<usize> {
        usize::try_from(self.selected).ok()
    }

    fn status_register(&self) -> u32 {
        let needs_reset = if self.interrupt.needs_reset() {
            status::NEEDS_RESET
        } else {
            0
        };
        self.status | needs_reset
    }

    /// The driver's steps in their order (virtio 1.2, 3.1.1). A step that is out of order, or that
    /// takes one back, is ignored; the driver sees that when it reads the register.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let value = value & !status::NEEDS_RESET;
        if value & status::FAILED != 0 {
            if matches!(self.stage, Stage::Active(_)) {
                self.device.reset();
            }
            self.status |= status::FAILED;
            self.stage = Stage::Failed;
            return;
        }
        if self.status & !value != 0 {
            return;
        }
        for step in [
            status::ACKNOWLEDGE,
            status::DRIVER,
            status::FEATURES_OK,
            status::DRIVER_OK,
        ] {
            if value & step != 0 && self.status & step == 0 && !self.step(step) {
                return;
            }
        }
    }

    /// Takes one step if it is the next one; says whether it was.
    fn step(&mut self, step: u32) -> bool {
        let before = match step {
            status::ACKNOWLEDGE => 0,
            status::DRIVER => status::ACKNOWLEDGE,
            status::FEATURES_OK => status::ACKNOWLEDGE | status::DRIVER,
            _ => status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK,
        };
        if self.status != before {
            return false;
        }
        match (step, &self.stage) {
            (status::FEATURES_OK, Stage::Negotiating(negotiation)) => {
                let features = negotiation.driver_features;
                if features & !self.features() != 0 || features & F_VERSION_1 == 0 {
                    tracing::warn!(
                        features,
                        "the virtio driver takes features that are not offered"
                    );
                    return false;
                }
                let sizes = self.device.queue_sizes().iter();
                self.stage = Stage::Configuring(Negotiated {
                    features,
                    queues: sizes.map(|&size| QueueRegisters::new(size)).collect(),
                });
            }
            (status::DRIVER_OK, Stage::Configuring(negotiated)) => {
                let negotiated = negotiated.clone();
                if !self.activate(negotiated, Ring::New) {
                    tracing::warn!("the virtio driver set up queues that cannot be");
                    self.stage = Stage::Failed;
                    self.interrupt.signal_needs_reset();
                }
            }
            _ => {}
        }
        self.status |= step;
        true
    }

    /// Gives the device its queues; says whether they can be.
    fn activate(&mut self, negotiated: Negotiated, rings: Ring) -> bool {
        let features = negotiated.features;
        let event_idx = features & F_EVENT_IDX != 0;
        let built: Option<Vec<Queue>> = negotiated
            .queues
            .iter()
            .map(|queue| queue.build(&self.memory, event_idx, rings))
            .collect();
        let Some(queues) = built else { return false };
        let queues = queues.into_iter().map(|queue| {
            VirtQueue::new(queue, Arc::clone(&self.memory), Arc::clone(&self.interrupt))
        });
        self.device.activate(queues.collect(), features);
        self.stage = Stage::Active(negotiated);
        true
    }

    /// Has the device stand still, and tells what a new one needs to go on in its place. No vCPU may run.
    pub(crate) fn pause(&mut self) -> Result<State, PauseError> {
        let negotiated = match &self.stage {
            Stage::Negotiating(_) if self.status & status::DRIVER == 0 => None,
            Stage::Active(negotiated) if !self.interrupt.needs_reset() => Some(negotiated.clone()),
            _ => return Err(PauseError::Unsettled),
        };
        let held = match negotiated {
            Some(_) => self.device.pause()?,
            None => Held::Nothing,
        };
        Ok(State {
            device_type: self.device.device_type() as u32,
            status: self.status,
            interrupt_status: self.interrupt.status(),
            negotiated,
            held,
        })
    }

    /// What kind of device it is.
    pub(crate) fn device_type(&self) -> DeviceType {
        self.device.device_type()
    }

    /// Lets the device go on, if it stands still.
    pub(crate) fn resume(&mut self) {
        self.device.resume();
    }

    /// Goes on where a device like this one was paused, with the memory as it was; says whether it is like it.
    pub(crate) fn restore(&mut self, state: &State) -> Result<bool, PauseError> {
        if state.device_type != self.device.device_type() as u32 {
            return Ok(false);
        }
        self.status = state.status;
        self.interrupt.restore(state.interrupt_status);
        let Some(negotiated) = &state.negotiated else {
            return Ok(true);
        };
        if negotiated.features & !self.features() != 0
            || negotiated.queues.len() != self.device.queue_sizes().len()
        {
            return Ok(false);
        }
        self.device.take_over(&state.held)?;
        if !self.activate(negotiated.clone(), Ring::Used) {
            return Ok(false);
        }
        // The other's last interrupt may have been under way still. One too many does nothing.
        self.interrupt.signal_used();
        Ok(true)
    }

    fn reset(&mut self) {
        if matches!(self.stage, Stage::Active(_)) {
            self.device.reset();
        }
        self.interrupt.reset();
        self.status = 0;
        self.selected = 0;
        self.stage = Stage::Negotiating(Negotiation::default());
    }

    /// A notification that no ioeventfd took.
    fn notify(&mut self, queue: u32) {
        let Ok(queue) = usize::try_from(queue) else {
            return;
        };
        if !matches!(self.stage, Stage::Active(_)) || queue >= self.device.queue_sizes().len() {
            return;
        }
        match self.device.queue_events().get(queue) {
            Some(event) => {
                if let Err(error) = event.write(1) {
                    tracing::error!(%error, "waking a virtio device");
                }
            }
            None => self.device.notify(queue),
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            data.fill(0);
            self.device.read_config(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // No device has a configuration space that the driver may write.
        if offset < CONFIG_SPACE
            && offset.is_multiple_of(4)
            && let Ok(data) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

fn low(value: u64) -> u32 {
    (value & u64::from(u32::MAX)) as u32
}

fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

fn set_low(target: &mut u64, value: u32) {
    *target = *target & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(target: &mut u64, value: u32) {
    *target = *target & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::testing::{Driver, READ};
    use super::super::worker::new_event;
    use super::*;

    #[derive(Default)]
    struct Seen {
        queues: Vec<VirtQueue>,
        features: u64,
        resets: usize,
    }

    struct Probe {
        seen: Arc<Mutex<Seen>>,
        events: [EventFd; 1],
    }

    impl VirtioDevice for Probe {
        fn device_type(&self) -> DeviceType {
            DeviceType::Entropy
        }
        fn features(&self) -> u64 {
            F_EVENT_IDX | 1
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16]
        }
        fn queue_events(&self) -> &[EventFd] {
            &self.events
        }
        fn read_config(&self, offset: u64, data: &mut [u8]) {
            super::super::read_config_space(b"config", offset, data);
        }
        fn activate(&mut self, queues: Vec<VirtQueue>, features: u64) {
            let mut seen = self.seen.lock().unwrap();
            seen.queues = queues;
            seen.features = features;
        }
        fn reset(&mut self) {
            let mut seen = self.seen.lock().unwrap();
            seen.queues.clear();
            seen.resets += 1;
        }
    }

    struct Machine {
        driver: Driver,
        transport: MmioTransport,
        seen: Arc<Mutex<Seen>>,
    }

    const MAGIC_VALUE: u64 = 0x00;
    const DEVICE_ID: u64 = 0x08;
    const DEVICE_FEATURES: u64 = 0x10;
    const DEVICE_FEATURES_SEL: u64 = 0x14;
    const DRIVER_FEATURES: u64 = 0x20;
    const DRIVER_FEATURES_SEL: u64 = 0x24;
    const QUEUE_SEL: u64 = 0x30;
    const QUEUE_NUM_MAX: u64 = 0x34;
    const QUEUE_NUM: u64 = 0x38;
    const QUEUE_READY: u64 = 0x44;
    const INTERRUPT_STATUS: u64 = 0x60;
    const INTERRUPT_ACK: u64 = 0x64;
    const STATUS: u64 = 0x70;
    const QUEUE_DESC: u64 = 0x80;
    const QUEUE_AVAIL: u64 = 0x90;
    const QUEUE_USED: u64 = 0xa0;
    const SHM_LEN_LOW: u64 = 0xb0;

    impl Machine {
        fn new() -> Self {
            Self::of(Driver::new(&[16]))
        }

        fn of(driver: Driver) -> Self {
            let seen = Arc::<Mutex<Seen>>::default();
            let probe = Probe {
                seen: Arc::clone(&seen),
                events: [new_event().unwrap()],
            };
            let irqfd = driver.irq.try_clone().unwrap();
            let transport = MmioTransport::new(driver.memory(), Box::new(probe), irqfd);
            Self {
                driver,
                transport,
                seen,
            }
        }

        fn read(&mut self, offset: u64) -> u32 {
            let mut data = [0; 4];
            self.transport.read(offset, &mut data);
            u32::from_le_bytes(data)
        }

        fn write(&mut self, offset: u64, value: u32) {
            self.transport.write(offset, &value.to_le_bytes());
        }

        fn negotiate(&mut self, features: u64) {
            self.write(STATUS, 1);
            self.write(STATUS, 3);
            for page in [0, 1] {
                self.write(DRIVER_FEATURES_SEL, page);
                let value = if page == 0 {
                    low(features)
                } else {
                    high(features)
                };
                self.write(DRIVER_FEATURES, value);
            }
            self.write(STATUS, 11);
        }

        fn set_up_queue(&mut self) {
            let [descriptors, available, used] = self.driver.addresses(0);
            self.write(QUEUE_SEL, 0);
            self.write(QUEUE_NUM, 16);
            for (register, address) in [
                (QUEUE_DESC, descriptors),
                (QUEUE_AVAIL, available),
                (QUEUE_USED, used),
            ] {
                self.write(register, low(address));
                self.write(register + 4, high(address));
            }
            self.write(QUEUE_READY, 1);
        }

        fn activate(&mut self) {
            self.negotiate(F_VERSION_1 | F_EVENT_IDX);
            self.set_up_queue();
            self.write(STATUS, 15);
        }
    }

    #[test]
    fn the_driver_finds_the_device_and_brings_it_up() {
        let mut machine = Machine::new();
        assert_eq!(&machine.read(MAGIC_VALUE).to_le_bytes(), b"virt");
        assert_eq!(machine.read(4), 2);
        assert_eq!(machine.read(DEVICE_ID), 4);
        assert_eq!(machine.read(DEVICE_FEATURES), low(F_EVENT_IDX) | 1);
        machine.write(DEVICE_FEATURES_SEL, 1);
        assert_eq!(machine.read(DEVICE_FEATURES), 1);
        machine.write(DEVICE_FEATURES_SEL, 2);
        assert_eq!(machine.read(DEVICE_FEATURES), 0);
        assert_eq!(machine.read(QUEUE_NUM_MAX), 16);
        assert_eq!(machine.read(SHM_LEN_LOW), u32::MAX);
        let mut config = [0xff; 8];
        machine.transport.read(0x102, &mut config);
        assert_eq!(&config, b"nfig\0\0\0\0");
        machine.activate();
        assert_eq!(machine.read(STATUS), 15);
        assert_eq!(machine.read(QUEUE_READY), 1);
        let seen = machine.seen.lock().unwrap();
        assert_eq!(seen.queues.len(), 1);
        assert_eq!(seen.features, F_VERSION_1 | F_EVENT_IDX);
    }

    #[test]
    fn features_that_are_not_offered_are_refused() {
        for features in [0, F_EVENT_IDX, F_VERSION_1 | 2, u64::MAX] {
            let mut machine = Machine::new();
            machine.negotiate(features);
            assert_eq!(machine.read(STATUS), 3, "{features:#x}");
            machine.set_up_queue();
            machine.write(STATUS, 15);
            assert!(machine.seen.lock().unwrap().queues.is_empty());
        }
    }

    #[test]
    fn steps_out_of_order_are_ignored() {
        let mut machine = Machine::new();
        for value in [2, 4, 8, 12] {
            machine.write(STATUS, value);
            assert_eq!(machine.read(STATUS), 0);
        }
        machine.negotiate(F_VERSION_1);
        machine.write(STATUS, 3);
        assert_eq!(machine.read(STATUS), 11);
    }

    #[test]
    fn no_register_changes_a_queue_after_activation() {
        let mut machine = Machine::new();
        machine.activate();
        for register in [
            QUEUE_NUM,
            QUEUE_DESC,
            QUEUE_AVAIL,
            QUEUE_USED,
            QUEUE_READY,
            DRIVER_FEATURES,
        ] {
            for value in [0, 1, 0xffff_fff0] {
                machine.write(register, value);
                machine.write(register + 4, value);
            }
        }
        assert_eq!(machine.read(QUEUE_READY), 1);
        machine.write(STATUS, 15);
        assert_eq!(machine.read(STATUS), 15);
        machine.driver.write(0x1_0000, b"data");
        machine.driver.offer(0, &[(0x1_0000, 4, READ)]);
        let mut seen = machine.seen.lock().unwrap();
        assert_eq!(seen.queues[0].pop().unwrap().readable_len(), 4);
    }

    #[test]
    fn a_device_goes_on_where_another_was_halted() {
        let mut first = Machine::new();
        first.activate();
        for address in [0x1_0000, 0x2_0000] {
            first.driver.offer(0, &[(address, 4, READ)]);
        }
        {
            let mut seen = first.seen.lock().unwrap();
            let chain = seen.queues[0].pop().unwrap();
            seen.queues[0].complete(chain, 0);
            seen.queues[0].signal_used();
            // This one it has no time for.
            assert!(seen.queues[0].pop().is_some());
        }
        let state = first.transport.pause().unwrap();

        let mut next = Machine::of(first.driver);
        assert!(next.transport.restore(&state).unwrap());
        assert_eq!(next.read(STATUS), 15);
        assert_eq!(next.read(INTERRUPT_STATUS), 1);
        let mut seen = next.seen.lock().unwrap();
        assert_eq!(seen.features, F_VERSION_1 | F_EVENT_IDX);
        let chain = seen.queues[0].pop().unwrap();
        seen.queues[0].complete(chain, 0);
        assert!(seen.queues[0].pop().is_none());
        assert_eq!(next.driver.used(0), [(0, 0), (1, 0)]);
    }

    #[test]
    fn a_device_is_paused_only_between_steps_and_restored_only_as_it_was() {
        let mut machine = Machine::new();
        let untouched = machine.transport.pause().unwrap();
        machine.negotiate(F_VERSION_1);
        let error = machine.transport.pause().unwrap_err();
        assert!(matches!(error, PauseError::Unsettled), "{error}");
        machine.set_up_queue();
        machine.write(STATUS, 15);
        let state = machine.transport.pause().unwrap();
        let restored = |change: fn(&mut State)| {
            let mut state = state.clone();
            change(&mut state);
            Machine::new().transport.restore(&state).unwrap()
        };
        assert!(restored(|_| {}));
        assert!(!restored(|state| state.device_type = 1));
        assert!(!restored(|state| state
            .negotiated
            .as_mut()
            .unwrap()
            .features |= 2));
        assert!(!restored(|state| state
            .negotiated
            .as_mut()
            .unwrap()
            .queues
            .clear()));
        assert!(!restored(|state| {
            state.negotiated.as_mut().unwrap().queues[0].used = u64::MAX;
        }));
        let mut fresh = Machine::new();
        assert!(fresh.transport.restore(&untouched).unwrap());
        fresh.activate();
        assert_eq!(fresh.read(STATUS), 15);
    }

    #[test]
    fn queues_that_cannot_be_ask_for_a_reset() {
        let end = low(Driver::new(&[]).memory_size());
        let bad: [(u64, u32); 8] = [
            (QUEUE_NUM, 0),
            (QUEUE_NUM, 15),
            (QUEUE_NUM, 32),
            (QUEUE_NUM, 0x1_0010),
            (QUEUE_DESC, end),
            (QUEUE_DESC + 4, u32::MAX),
            (QUEUE_AVAIL, 0x1001),
            (QUEUE_USED, end - 4),
        ];
        for (register, value) in bad {
            let mut machine = Machine::new();
            machine.negotiate(F_VERSION_1);
            machine.set_up_queue();
            machine.write(QUEUE_READY, 0);
            machine.write(register, value);
            machine.write(QUEUE_READY, 1);
            machine.write(STATUS, 15);
            assert_eq!(machine.read(STATUS) & 64, 64, "{register:#x} {value:#x}");
            assert!(machine.seen.lock().unwrap().queues.is_empty());
        }
    }

    #[test]
    fn a_reset_takes_the_queues_back_and_the_device_comes_up_again() {
        let mut machine = Machine::new();
        machine.activate();
        machine.write(STATUS, 0);
        assert_eq!(machine.read(STATUS), 0);
        assert_eq!(machine.read(QUEUE_READY), 0);
        assert_eq!(machine.seen.lock().unwrap().resets, 1);
        machine.activate();
        assert_eq!(machine.seen.lock().unwrap().queues.len(), 1);
        machine.write(STATUS, 128);
        assert_eq!(machine.seen.lock().unwrap().resets, 2);
        machine.write(STATUS, 15);
        assert!(machine.seen.lock().unwrap().queues.is_empty());
    }

    #[test]
    fn an_interrupt_is_raised_and_acknowledged() {
        let mut machine = Machine::new();
        machine.activate();
        machine.transport.interrupt.signal_used();
        assert_eq!(machine.driver.irq.read().unwrap(), 1);
        assert_eq!(machine.read(INTERRUPT_STATUS), 1);
        machine.write(INTERRUPT_ACK, 1);
        assert_eq!(machine.read(INTERRUPT_STATUS), 0);
    }

    #[test]
    fn a_notification_fires_the_event_of_an_active_queue_only() {
        let mut machine = Machine::new();
        machine.write(MmioTransport::QUEUE_NOTIFY, 0);
        machine.activate();
        let event = machine.transport.queue_notify_eventfds()[0]
            .try_clone()
            .unwrap();
        assert!(event.read().is_err());
        for queue in [1, u32::MAX, 0] {
            machine.write(MmioTransport::QUEUE_NOTIFY, queue);
        }
        assert_eq!(event.read().unwrap(), 1);
    }

    #[test]
    fn odd_accesses_do_nothing() {
        let mut machine = Machine::new();
        for offset in 0..MMIO_SIZE {
            for length in [0, 1, 2, 3, 5, 8] {
                let mut data = vec![0xff; length];
                machine.transport.read(offset, &mut data);
                machine.transport.write(offset, &data);
            }
        }
        for offset in [u64::MAX, u64::MAX - 3, 1 << 32] {
            let mut data = [0; 4];
            machine.transport.read(offset, &mut data);
            machine.transport.write(offset, &data);
        }
        assert_eq!(machine.read(STATUS), 0);
    }
}
