//! virtio-net (virtio 1.2, 5.1): an Ethernet interface of the guest whose other end is a tap device of the host.
//!
//! One thread carries packets both ways, each with one copy by the host's kernel between its buffers and the guest's.
//! The guest's descriptors are checked like any device's; its packets and their headers go to the kernel as they are,
//! which takes neither for granted. Checksums and the cutting of long segments are left to whoever needs them.

use std::io;

use thiserror::Error;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use vmm_sys_util::eventfd::EventFd;

use super::worker::{Worker, queue_events};
use super::{
    DeviceType, Held, PauseError, ThreadHook, ThreadKind, VirtQueue, VirtioDevice, WorkerError,
};

#[cfg(feature = "fuzzing")]
pub(crate) mod inline;
mod pump;
mod tap;

#[cfg(test)]
mod tests;

pub use tap::{Tap, TapError};

use pump::{Message, Pump};
use tap::Offloads;

/// Receive, transmit.
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// RING_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;
/// What the device always offers.
const FEATURES: u64 = EVENT_IDX
    | bit(VIRTIO_NET_F_MAC)
    | bit(VIRTIO_NET_F_MTU)
    | bit(VIRTIO_NET_F_MRG_RXBUF)
    | bit(VIRTIO_NET_F_CSUM)
    | bit(VIRTIO_NET_F_HOST_TSO4)
    | bit(VIRTIO_NET_F_HOST_TSO6)
    | bit(VIRTIO_NET_F_HOST_ECN)
    | bit(VIRTIO_NET_F_GUEST_CSUM)
    | bit(VIRTIO_NET_F_GUEST_TSO4)
    | bit(VIRTIO_NET_F_GUEST_TSO6)
    | bit(VIRTIO_NET_F_GUEST_ECN);

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// A network interface of a machine.
#[derive(Debug)]
pub struct Interface {
    /// Its other end.
    pub tap: Tap,
    /// The guest's address on the link.
    pub mac: [u8; 6],
    /// The largest packet without its link header, in bytes; at least 68.
    pub mtu: u16,
}

/// Why the device could not be made.
#[derive(Debug, Error)]
pub enum NetError {
    /// The host is out of descriptors.
    #[error("making the events of the network device")]
    Events(#[source] io::Error),
    /// The thread did not start.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    /// The configuration space: address, status, queue pairs, MTU.
    config: [u8; 12],
    events: Vec<EventFd>,
    worker: Worker<Message>,
}

impl Net {
    /// A device for `interface`. Its thread runs `hook` before anything of the guest's.
    ///
    /// # Errors
    /// The host is out of something, or the hook fails.
    pub fn new(interface: Interface, hook: &ThreadHook) -> Result<Self, NetError> {
        let (events, clones) = queue_events(QUEUE_SIZES.len()).map_err(NetError::Events)?;
        let Interface { tap, mac, mtu } = interface;
        let mut config = [0; 12];
        config[..6].copy_from_slice(&mac);
        config[10..].copy_from_slice(&mtu.to_le_bytes());
        let name = format!("net-{}", tap.name());
        let worker = Worker::spawn(
            ThreadKind::Net,
            // What a thread's name may have.
            &name[..name.len().min(15)],
            hook,
            move |mailbox| Pump::new(tap, mtu, mailbox, clones),
            Pump::run,
        )?;
        Ok(Self {
            config,
            events,
            worker,
        })
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Network
    }

    fn features(&self) -> u64 {
        FEATURES
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
        let negotiated = Message::Negotiated {
            offloads: offloads(features),
            mergeable: mergeable(features),
        };
        // An error means that the thread has ended; `activate` says so.
        let _ = self.worker.mailbox().send(negotiated);
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

/// What a driver that took `features` wants left to it.
fn offloads(features: u64) -> Offloads {
    let has = |feature: u32| features & bit(feature) != 0;
    // A driver that takes long segments but no packets without a checksum contradicts itself (5.1.3.1).
    let checksum = has(VIRTIO_NET_F_GUEST_CSUM);
    let [tso4, tso6] =
        [VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6].map(|feature| checksum && has(feature));
    Offloads {
        checksum,
        tso4,
        tso6,
        ecn: (tso4 || tso6) && has(VIRTIO_NET_F_GUEST_ECN),
    }
}

/// Whether a received packet may take several chains.
fn mergeable(features: u64) -> bool {
    features & bit(VIRTIO_NET_F_MRG_RXBUF) != 0
}
