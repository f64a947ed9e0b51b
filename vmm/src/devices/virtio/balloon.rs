//! virtio-balloon (virtio 1.2, 5.5), of which the driver gets one thing: the reporting of free pages (5.5.6.7).
//!
//! The guest's kernel tells which pages nobody uses, in blocks of 2 MiB, some two seconds after they were freed, and the
//! host has their memory back at once. The balloon itself stays empty: a guest's memory is limited by its size and by its
//! cgroup. A guest that reports pages which it uses loses what is in them, and nobody else does. A report is served on
//! the write that announces it: it is rare, bounded, and the driver waits for it. There is no thread.

use vmm_sys_util::eventfd::EventFd;

use super::{DeviceType, VirtQueue, VirtioDevice, read_config_space};
use crate::memory;

/// The driver has queues to inflate and to deflate in any case; a report has up to 32 blocks.
const QUEUE_SIZES: [u16; 3] = [16, 16, 32];
const REPORTING_QUEUE: usize = 2;
/// VIRTIO_BALLOON_F_REPORTING.
const F_REPORTING: u64 = 1 << 5;
/// RING_EVENT_IDX.
const F_EVENT_IDX: u64 = 1 << 29;
/// `num_pages`, `actual`: what the balloon is to have, and has.
const CONFIG: [u8; 8] = [0; 8];

/// The balloon device.
#[derive(Debug, Default)]
pub struct Balloon {
    /// The one that reports come by.
    queue: Option<VirtQueue>,
}

impl Balloon {
    /// A balloon that is empty and stays so.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        F_REPORTING | F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_events(&self) -> &[EventFd] {
        &[]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&CONFIG, offset, data);
    }

    fn activate(&mut self, mut queues: Vec<VirtQueue>, features: u64) {
        if features & F_REPORTING != 0 && queues.len() > REPORTING_QUEUE {
            self.queue = Some(queues.swap_remove(REPORTING_QUEUE));
            self.notify(REPORTING_QUEUE);
        }
    }

    fn notify(&mut self, queue: usize) {
        let Some(queue) = self.queue.as_mut().filter(|_| queue == REPORTING_QUEUE) else {
            return;
        };
        queue.serve(|ram, chain| {
            for block in chain.writable(ram, 0, chain.writable_len()) {
                memory::give_back(&block);
            }
            0
        });
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Driver, READ, WRITE};
    use super::*;

    fn active(driver: &Driver) -> Balloon {
        let mut balloon = Balloon::new();
        balloon.activate(driver.queues(), F_REPORTING);
        balloon
    }

    #[test]
    fn whole_pages_of_a_report_are_given_back() {
        let mut driver = Driver::new(&QUEUE_SIZES);
        let mut balloon = active(&driver);
        let [block, odd] = [0x20_0000, 0x40_0800];
        for at in [block, block + 0x1F_FFFF, odd, odd + 0x800, odd + 0x1800] {
            driver.write(at, &[7]);
        }
        let blocks = [(block, 0x20_0000, WRITE), (odd, 0x1801, WRITE)];
        driver.offer(REPORTING_QUEUE, &blocks);
        balloon.notify(REPORTING_QUEUE);
        assert_eq!(driver.used(REPORTING_QUEUE), [(0, 0)]);
        let byte = |at| driver.read(at, 1)[0];
        assert_eq!([byte(block), byte(block + 0x1F_FFFF)], [0, 0]);
        // Of a page that is reported in part, everything stays.
        assert_eq!(
            [byte(odd), byte(odd + 0x800), byte(odd + 0x1800)],
            [7, 0, 7]
        );
        assert!(driver.irq.read().unwrap() >= 1);
    }

    #[test]
    fn what_is_no_report_changes_nothing() {
        let mut driver = Driver::new(&QUEUE_SIZES);
        let mut balloon = active(&driver);
        driver.write(0x20_0000, &[7]);
        driver.offer(REPORTING_QUEUE, &[(0x20_0000, 0x1000, READ)]);
        driver.offer(
            REPORTING_QUEUE,
            &[(driver.memory_size() - 1, 0x1000, WRITE)],
        );
        driver.offer(0, &[(0x20_0000, 0x1000, WRITE)]);
        for queue in 0..=QUEUE_SIZES.len() {
            balloon.notify(queue);
        }
        assert_eq!(driver.used(REPORTING_QUEUE), [(0, 0), (1, 0)]);
        assert_eq!((driver.used(0).len(), driver.read(0x20_0000, 1)[0]), (0, 7));
        // A driver that did not take the feature has no such queue.
        let mut other = Balloon::new();
        other.activate(driver.queues(), 0);
        assert!(other.queue.is_none());
        balloon.reset();
        balloon.notify(REPORTING_QUEUE);
    }
}
