//! The one interrupt line of a virtio-mmio device and what the driver is to find behind it.
//! Shared by the transport (vCPU threads) and the device's own thread; the host side only.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// InterruptStatus: the device has used buffers (virtio 1.2, 4.2.2).
const USED_BUFFER: u32 = 1;
/// InterruptStatus: the configuration or the device status has changed.
const CONFIGURATION_CHANGE: u32 = 2;

/// Raises the device's interrupt.
///
/// The line is edge triggered: each signal is one write to the irqfd.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    needs_reset: AtomicBool,
    irqfd: EventFd,
}

impl Interrupt {
    /// An interrupt that is raised by writing to `irqfd`.
    pub fn new(irqfd: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            irqfd,
        }
    }

    /// Tells the driver that there are used buffers.
    pub fn signal_used(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver that it broke the device and has to reset it (virtio 1.2, 2.1.2).
    pub fn signal_needs_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::SeqCst) {
            self.raise(CONFIGURATION_CHANGE);
        }
    }

    /// Tells the driver that the configuration space has changed.
    pub(super) fn signal_config_change(&self) {
        self.raise(CONFIGURATION_CHANGE);
    }

    fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        if let Err(error) = self.irqfd.write(1) {
            tracing::error!(%error, "raising a virtio interrupt");
        }
    }

    /// The InterruptStatus register.
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver has seen `bits`.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Whether the device waits to be reset.
    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Takes over the InterruptStatus of another device, whose interrupt the guest has had.
    pub(super) fn restore(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
    }

    /// Back to the state at power on.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}
