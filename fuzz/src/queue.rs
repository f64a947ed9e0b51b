//! The transport's registers and the queues, without and with a device that has no other side.

use vmm::devices::virtio::balloon::Balloon;
use vmm::devices::virtio::rng::Rng;
use vmm::devices::virtio::{DeviceType, VirtQueue, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;
use crate::machine::Machine;

/// A device that reads and writes all that its chains name.
#[derive(Default)]
struct Toucher {
    queues: Vec<VirtQueue>,
}

impl VirtioDevice for Toucher {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn features(&self) -> u64 {
        // RING_EVENT_IDX and RING_INDIRECT_DESC.
        1 << 29 | 1 << 28
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 16, 1]
    }

    fn queue_events(&self) -> &[EventFd] {
        &[]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 {
            data.fill(1);
        }
    }

    fn activate(&mut self, queues: Vec<VirtQueue>, _features: u64) {
        assert_eq!(queues.len(), self.queue_sizes().len());
        self.queues = queues;
    }

    fn notify(&mut self, queue: usize) {
        let queue = &mut self.queues[queue];
        let memory = queue.memory().clone();
        queue.disable_notification();
        for _ in 0..16 {
            let Some(chain) = queue.pop() else {
                break;
            };
            // The ends are where it would go wrong.
            let mut data = [0; 64];
            let last = chain.readable_len().saturating_sub(data.len());
            chain.copy_from(&memory, 0, &mut data);
            chain.copy_from(&memory, last, &mut data);
            let last = chain.writable_len().saturating_sub(data.len());
            let length = chain.copy_to(&memory, last, &data);
            assert_eq!(length, chain.writable_len().min(data.len()));
            queue.complete(chain, length);
        }
        queue.enable_notification();
        queue.signal_used();
    }

    fn reset(&mut self) {
        self.queues.clear();
    }
}

/// The transport's registers in any order, with any value, from power on.
pub fn mmio(data: &[u8]) {
    let mut input = Input::new(data);
    let mut machine = Machine::new(Box::new(Toucher::default()));
    if input.byte() & 1 == 0 {
        machine.bring_up(input.u64(), input.u16());
    }
    run(machine, input, &mut |_| {});
}

/// The balloon's queues.
pub fn balloon_queue(data: &[u8]) {
    let mut input = Input::new(data);
    let mut machine = Machine::new(Box::new(Balloon::new()));
    machine.bring_up(input.u64(), input.u16());
    run(machine, input, &mut |_| {});
}

/// The entropy device's queue.
pub fn rng_queue(data: &[u8]) {
    let mut input = Input::new(data);
    let mut machine = Machine::new(Box::new(Rng::new()));
    machine.bring_up(input.u64(), input.u16());
    run(machine, input, &mut |_| {});
}

/// Does all that `input` says.
pub fn run(mut machine: Machine, mut input: Input<'_>, host: &mut dyn FnMut(&mut Input<'_>)) {
    while !input.is_empty() {
        machine.step(&mut input, host);
    }
}
