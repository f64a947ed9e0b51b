//! The network device without its thread and without a tap device, for the fuzz targets.

use std::os::fd::OwnedFd;

use super::super::worker::{Control, Mailbox};
use super::*;

/// A network device that serves its queues on the driver's notification.
pub struct InlineNet {
    pump: Pump,
    mailbox: Mailbox<Message>,
    events: Vec<EventFd>,
}

// SAFETY: what is not `Send` in it are the pointers of the last packet's pieces, which are only followed in the
// call that has just filled them in.
unsafe impl Send for InlineNet {}

impl std::fmt::Debug for InlineNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InlineNet")
    }
}

impl InlineNet {
    /// A device whose packets go to `link`, a non-blocking socket that keeps their borders.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(link: OwnedFd, mtu: u16) -> io::Result<Self> {
        let mailbox = Mailbox::new()?;
        let (events, clones) = queue_events(QUEUE_SIZES.len())?;
        let pump = Pump::with_plain_tap(Tap::of_socket(link), mtu, &mailbox, clones)?;
        Ok(Self {
            pump,
            mailbox,
            events,
        })
    }

    fn tell(&mut self, control: Control) {
        // The mailbox is closed by a thread's end only, and there is none.
        let _ = self.mailbox.send(control.into());
        self.turn();
    }

    fn turn(&mut self) {
        if let Err(error) = self.pump.turn(&self.mailbox, 0) {
            tracing::error!(%error, "the network device has ended");
        }
    }
}

impl VirtioDevice for InlineNet {
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
        &[]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, queues: Vec<VirtQueue>, features: u64) {
        self.pump.expect(offloads(features), mergeable(features));
        self.tell(Control::Activate(queues));
    }

    fn notify(&mut self, queue: usize) {
        if let Some(event) = self.events.get(queue) {
            // It holds a number that no test counts up to.
            let _ = event.write(1);
        }
        self.turn();
    }

    fn reset(&mut self) {
        let (done, _wait) = std::sync::mpsc::sync_channel(1);
        self.tell(Control::Reset(done));
    }
}
