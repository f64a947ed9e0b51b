//! The block device without its thread, for the fuzz targets.

use super::super::worker::{Control, Mailbox};
use super::*;

/// A block device that serves its queue on the driver's notification.
pub struct InlineBlock {
    server: Server,
    mailbox: Mailbox<Message>,
    event: EventFd,
    config: [u8; CONFIG_SIZE],
    features: u64,
}

// SAFETY: what is not `Send` in it are pointers to guest memory, which only the kernel follows, and only while the
// memory is there.
unsafe impl Send for InlineBlock {}

impl std::fmt::Debug for InlineBlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InlineBlock")
    }
}

impl InlineBlock {
    /// A device for `disk`.
    ///
    /// # Errors
    /// The host is out of descriptors or has no io_uring.
    pub fn new(disk: Disk) -> io::Result<Self> {
        let mailbox = Mailbox::new()?;
        let event = super::super::worker::new_event()?;
        let (config, features) = (config(&disk), features(&disk));
        Ok(Self {
            server: Server::new(disk, &mailbox, event.try_clone()?)?,
            mailbox,
            event,
            config,
            features,
        })
    }

    fn tell(&mut self, message: Message) {
        // The mailbox is closed by a thread's end only, and there is none.
        let _ = self.mailbox.send(message);
        self.turn();
    }

    fn turn(&mut self) {
        if let Err(error) = self.server.turn(&self.mailbox, 0) {
            tracing::error!(%error, "the block device has ended");
        }
    }
}

impl VirtioDevice for InlineBlock {
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
        &[]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::super::read_config_space(&self.config, offset, data);
    }

    fn activate(&mut self, queues: Vec<VirtQueue>, features: u64) {
        self.tell(negotiated(features));
        self.tell(Control::Activate(queues).into());
    }

    fn notify(&mut self, _queue: usize) {
        // It holds a number that no test counts up to.
        let _ = self.event.write(1);
        self.turn();
    }

    fn reset(&mut self) {
        let (done, _wait) = std::sync::mpsc::sync_channel(1);
        self.tell(Control::Reset(done).into());
    }
}
