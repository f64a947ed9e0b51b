//! The file system device without its threads, for the fuzz targets.

use super::*;

/// A file system device of one request queue that serves it on the driver's notification.
pub struct InlineFs(Service);

impl std::fmt::Debug for InlineFs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InlineFs")
    }
}

impl InlineFs {
    /// A device that serves `share` in the thread that calls this, which gets a umask and a working
    /// directory of its own.
    ///
    /// # Errors
    /// The share cannot be opened, or the host is out of something.
    pub fn new(share: Share) -> Result<Self, FsError> {
        credentials::prepare_thread().map_err(FsError::Events)?;
        let mailbox = Mailbox::new().map_err(FsError::Events)?;
        let tree = Arc::new(SharedTree::open(share)?);
        let server = Arc::new(Server::new(Arc::clone(&tree)));
        let service = Service::new(Some(tree), server, &mailbox, Vec::new());
        Ok(Self(service.map_err(FsError::Events)?))
    }
}

impl VirtioDevice for InlineFs {
    fn device_type(&self) -> DeviceType {
        DeviceType::FileSystem
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn queue_events(&self) -> &[EventFd] {
        &[]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, queues: Vec<VirtQueue>, _features: u64) {
        self.0.queues = queues;
    }

    fn notify(&mut self, _queue: usize) {
        self.0.serve();
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}
