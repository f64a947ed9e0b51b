//! virtio-blk (virtio 1.2, 5.2): a disk of the guest that is a block device or a file of the host.
//!
//! One thread takes the driver's requests, each checked against the disk before anything is done, and gives them to the
//! kernel, which carries the data between the disk and the guest's memory, many at once ([`ring`]). What is written goes
//! to the kernel's cache, as a process's writes do, and is durable when the driver has flushed. There is no limit of the
//! device's own on its rate: the transfers count for the VMM process's cgroup, whose `io.max` holds.

use std::io;

use thiserror::Error;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use vmm_sys_util::eventfd::EventFd;

use super::queue::MAX_BUFFERS;
use super::worker::{Worker, queue_events};
use super::{
    DeviceType, Held, PauseError, ThreadHook, ThreadKind, VirtQueue, VirtioDevice, WorkerError,
};

mod disk;
#[cfg(feature = "fuzzing")]
pub(crate) mod inline;
mod request;
mod ring;
mod server;
#[cfg(test)]
mod tests;
mod transfers;

pub use disk::{Disk, DiskError};

use request::MAX_SEGMENT;
use server::{Message, Server};
use transfers::DEPTH;

const QUEUE_SIZES: [u16; 1] = [DEPTH];
/// RING_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;
/// What the device always offers.
const FEATURES: u64 =
    EVENT_IDX | bit(VIRTIO_BLK_F_SEG_MAX) | bit(VIRTIO_BLK_F_BLK_SIZE) | bit(VIRTIO_BLK_F_FLUSH);
/// And for a disk that may be written to.
const WRITABLE: u64 = bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES);
/// The buffers of a request beside those of its data: header and status.
const FRAME: usize = 2;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// Why the device could not be made.
#[derive(Debug, Error)]
pub enum BlockError {
    /// The host is out of descriptors.
    #[error("making the events of the block device")]
    Events(#[source] io::Error),
    /// The thread did not start.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

/// The block device.
#[derive(Debug)]
pub struct Block {
    config: [u8; CONFIG_SIZE],
    features: u64,
    events: Vec<EventFd>,
    worker: Worker<Message>,
}

impl Block {
    /// A device for `disk`. Its thread runs `hook` before anything of the guest's.
    ///
    /// # Errors
    /// The host is out of something or has no io_uring, or the hook fails.
    pub fn new(disk: Disk, hook: &ThreadHook) -> Result<Self, BlockError> {
        let (events, clones) = queue_events(QUEUE_SIZES.len()).map_err(BlockError::Events)?;
        let (config, features) = (config(&disk), features(&disk));
        let worker = Worker::spawn(
            ThreadKind::Block,
            "block",
            hook,
            move |mailbox| match clones.into_iter().next() {
                Some(event) => Server::new(disk, mailbox, event),
                None => Err(io::Error::other("a queue without an event")),
            },
            Server::run,
        )?;
        Ok(Self {
            config,
            features,
            events,
            worker,
        })
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.config, offset, data);
    }

    fn activate(&mut self, queues: Vec<VirtQueue>, features: u64) {
        // An error means that the thread has ended; `activate` says so.
        let _ = self.worker.mailbox().send(negotiated(features));
        self.worker.activate(queues);
    }

    fn reset(&mut self) {
        self.worker.reset();
    }

    fn pause(&mut self) -> Result<Held, PauseError> {
        self.worker.pause()
    }

    fn resume(&mut self) {
        self.worker.resume();
    }
}

/// What is offered for `disk`.
fn features(disk: &Disk) -> u64 {
    match disk.read_only {
        true => FEATURES | bit(VIRTIO_BLK_F_RO),
        false => FEATURES | WRITABLE,
    }
}

/// What a driver that took `features` may rely on (5.2.6.2): without a way to flush, that what is written is durable.
fn negotiated(features: u64) -> Message {
    Message::Negotiated {
        write_through: features & bit(VIRTIO_BLK_F_FLUSH) == 0,
    }
}

/// The length of `struct virtio_blk_config` up to the fields for a device in zones (5.2.4).
const CONFIG_SIZE: usize = 60;

fn config(disk: &Disk) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    config[..8].copy_from_slice(&disk.capacity.to_le_bytes());
    // At most 64, 2^31 / 2^9 and 1.
    let in_sectors = disk.block_size / 512;
    let fields = [
        // seg_max
        (12, (MAX_BUFFERS - FRAME) as u32),
        // blk_size
        (20, disk.block_size),
        // max_discard_sectors, max_discard_seg, discard_sector_alignment
        (36, MAX_SEGMENT),
        (40, 1),
        (44, in_sectors),
        // max_write_zeroes_sectors, max_write_zeroes_seg
        (48, MAX_SEGMENT),
        (52, 1),
    ];
    for (at, value) in fields {
        config[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    // write_zeroes_may_unmap
    config[56] = 1;
    config
}
