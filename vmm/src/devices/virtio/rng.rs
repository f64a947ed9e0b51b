//! virtio-rng (virtio 1.2, 5.4): entropy from the host's kernel.
//!
//! The guest chooses how much it asks for; a request is bounded and served on the write that
//! announces it, because it is rare and short. There is no thread.

use std::io;

use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::EventFd;

use super::{DeviceType, VirtQueue, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [16];
/// The most bytes that one request gets; the driver asks again for more.
const MAX_REQUEST: usize = 4096;
/// RING_EVENT_IDX.
const FEATURES: u64 = 1 << 29;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    queue: Option<VirtQueue>,
}

impl Rng {
    /// An entropy device; its source is getrandom(2).
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_events(&self) -> &[EventFd] {
        &[]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, mut queues: Vec<VirtQueue>, _features: u64) {
        self.queue = queues.pop();
        self.notify(0);
    }

    fn notify(&mut self, _queue: usize) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        queue.serve(|memory, chain| {
            let filled = chain
                .writable(memory, 0, MAX_REQUEST)
                .try_fold(0, |done, slice| Ok::<_, io::Error>(done + fill(&slice)?));
            filled.unwrap_or_else(|error| {
                tracing::error!(%error, "getrandom");
                0
            })
        });
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}

fn fill(slice: &VolatileSlice<'_>) -> io::Result<usize> {
    let mut done = 0;
    let mut random = [0; 256];
    while done < slice.len() {
        let part = random.len().min(slice.len() - done);
        // SAFETY: the buffer is valid for writes of `part` bytes, no more than its length.
        let got = unsafe { libc::getrandom(random.as_mut_ptr().cast(), part, 0) };
        let Ok(got) = usize::try_from(got) else {
            return Err(io::Error::last_os_error());
        };
        let Ok(target) = slice.subslice(done, got) else {
            break;
        };
        target.copy_from(&random[..got]);
        done += got;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Driver, READ, WRITE};
    use super::*;

    #[test]
    fn requests_are_filled_and_bounded() {
        let mut driver = Driver::new(&QUEUE_SIZES);
        let mut rng = Rng::new();
        let [a, b] = [0x1_0000, 0x2_0000];
        driver.offer(0, &[(a, 32, WRITE), (b, 300, WRITE)]);
        rng.activate(driver.queues(), 0);
        assert_eq!(driver.used(0), [(0, 332)]);
        // 16 zero bytes in a row by chance: once in 2^128.
        for part in [driver.read(a, 32), driver.read(b + 280, 20)] {
            assert!(part.windows(16).all(|w| w != [0; 16]));
        }
        assert_eq!(driver.read(b + 300, 4), [0; 4]);
        driver.offer(0, &[(a, 0x10_0000, WRITE)]);
        rng.notify(0);
        assert_eq!(driver.used(0)[1].1, 4096);
        assert!(driver.irq.read().unwrap() >= 1);
    }

    #[test]
    fn malformed_requests_get_nothing() {
        let mut driver = Driver::new(&QUEUE_SIZES);
        let mut rng = Rng::new();
        driver.offer(0, &[(0x1_0000, 32, READ)]);
        driver.offer(0, &[(driver.memory_size() - 1, 2, WRITE)]);
        rng.activate(driver.queues(), 0);
        assert_eq!(driver.used(0), [(0, 0), (1, 0)]);
        rng.reset();
        rng.notify(0);
    }
}
