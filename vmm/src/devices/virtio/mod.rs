//! The virtio devices on the MMIO transport: file system, disk, network, socket, entropy, balloon and
//! memory.
//!
//! Everything that comes out of guest memory or a device register is hostile. It is parsed once,
//! in [`queue`] (descriptor chains) and [`mmio`] (registers), into types that hold only checked
//! values; a device that meets nonsense asks the driver for a reset instead of guessing.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

pub mod balloon;
pub mod block;
pub mod fs;
mod interrupt;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod vsock;
mod worker;

#[cfg(test)]
pub(crate) mod testing;

pub use interrupt::Interrupt;
pub use mmio::MmioTransport;
pub use queue::VirtQueue;
pub use worker::{ThreadHook, ThreadKind, WorkerError};

/// What kind of device the driver finds (virtio 1.2, chapter 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceType {
    /// Network device, section 5.1.
    Network = 1,
    /// Block device, section 5.2.
    Block = 2,
    /// Entropy device, section 5.4.
    Entropy = 4,
    /// Traditional memory balloon device, section 5.5.
    Balloon = 5,
    /// Socket device, section 5.10.
    Socket = 19,
    /// Memory device, section 5.15.
    Memory = 24,
    /// File system device, section 5.11.
    FileSystem = 26,
}

/// What a device has beside its rings that one which goes on in its place needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Held {
    /// Nothing.
    #[default]
    Nothing,
    /// Connections, which end with the device.
    Connections {
        /// The host's port of the next one. The guest's kernel knows those before for as long as anybody there has the
        /// connection open.
        next_port: u32,
    },
    /// What the guest knows of a share.
    Share(fs::HeldTree),
}

/// Why a device cannot be paused, or another cannot go on in its place.
#[derive(Debug, Error)]
pub enum PauseError {
    /// It has memory that is not in a snapshot.
    #[error(
        "the machine has memory that came while it ran, which would not be written down: with a lower limit its guest gives \
         back what it can"
    )]
    Memory,
    /// Its thread is gone.
    #[error("a thread of a device has ended")]
    Ended,
    /// The driver was setting it up, or has failed.
    #[error("a virtio device of the machine is being set up or has failed")]
    Unsettled,
    /// A share cannot be written down, or is not what it was.
    #[error(transparent)]
    Share(#[from] fs::HeldError),
    /// What the other one held is of another kind of device.
    #[error("a device of the snapshot is of another kind")]
    OtherKind,
}

/// A virtio device behind a transport.
///
/// The transport calls it with its own lock held, from the thread of the vCPU that touched a
/// register. Requests are served elsewhere: by the device's own thread, which waits for
/// [`VirtioDevice::queue_events`], or in [`VirtioDevice::notify`] where a request is trivial.
pub trait VirtioDevice: Send {
    /// What the driver finds in the DeviceID register.
    fn device_type(&self) -> DeviceType;

    /// The feature bits that the device offers beside `VIRTIO_F_VERSION_1`.
    fn features(&self) -> u64;

    /// For each queue the most descriptors that it may have: powers of two up to 32768.
    fn queue_sizes(&self) -> &[u16];

    /// For each queue the event that the driver's notification is to fire, or nothing at all if
    /// [`VirtioDevice::notify`] serves the queues.
    fn queue_events(&self) -> &[EventFd];

    /// Fills `data` from the device's configuration space at `offset`. The bytes beyond its end
    /// keep their value.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// A number that changes whenever the configuration space does.
    fn config_generation(&self) -> u32 {
        0
    }

    /// Starts to serve `queues`, one for each of [`VirtioDevice::queue_sizes`]; `features` are
    /// the bits that the driver took.
    fn activate(&mut self, queues: Vec<VirtQueue>, features: u64);

    /// Serves a queue for which there is no event.
    fn notify(&mut self, _queue: usize) {}

    /// Stops to serve the queues, between two requests, until [`VirtioDevice::resume`]; what there is beside the rings.
    /// No vCPU runs then, so that a device which serves on notification stands still already.
    ///
    /// # Errors
    /// It cannot be done. The device may stand still nevertheless.
    fn pause(&mut self) -> Result<Held, PauseError> {
        Ok(Held::Nothing)
    }

    /// Goes on, if it stands still.
    fn resume(&mut self) {}

    /// Takes over what another one held when it was paused. Before [`VirtioDevice::activate`].
    ///
    /// # Errors
    /// It cannot be had any more, or is none of this device's.
    fn take_over(&mut self, held: &Held) -> Result<(), PauseError> {
        match held {
            Held::Nothing => Ok(()),
            _ => Err(PauseError::OtherKind),
        }
    }

    /// Stops to serve the queues and forgets what belongs to the driver. When this returns the
    /// device touches the queues' memory no more.
    fn reset(&mut self);
}

/// Copies the part of a configuration space that an access at `offset` covers.
fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    if let Some(rest) = space.get(start..) {
        let length = rest.len().min(data.len());
        data[..length].copy_from_slice(&rest[..length]);
    }
}
