//! virtio-fs (virtio 1.2, 5.11): a directory of the host in the guest, served in this process.
//!
//! The FUSE requests are the guest's and hostile. fuse-backend-rs decodes them and passes them to
//! the host's kernel; [`share`] decides what may reach it. Each request queue has a thread.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use thiserror::Error;
use virtio_queue::DescriptorChain;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::worker::{Control, Mailbox, Worker, new_event};
use super::{
    DeviceType, Held, PauseError, ThreadHook, ThreadKind, VirtQueue, VirtioDevice, WorkerError,
};
use crate::memory::GuestRam;

mod credentials;
mod handles;
mod held;
#[cfg(feature = "fuzzing")]
pub(crate) mod inline;
mod numbering;
mod share;

#[cfg(test)]
mod tests;

pub use held::{HeldError, HeldTree};
pub use share::{Access, Cache, Share, ShareError};

use share::SharedTree;

/// Enough for a request of 1 MiB in separate pages, with room for its neighbours.
const QUEUE_SIZE: u16 = 1024;
/// RING_EVENT_IDX and RING_INDIRECT_DESC.
const FEATURES: u64 = 1 << 29 | 1 << 28;
/// The most descriptors, and bytes both ways, in a request: the largest carries 1 MiB of data.
const MAX_DESCRIPTORS: usize = 1024;
const MAX_BYTES: u64 = 2 << 20;
/// The length of a tag in the configuration space.
const TAG_LENGTH: usize = 36;
/// The most request queues of a device.
const MAX_REQUEST_QUEUES: u32 = 16;

/// The name by which the guest mounts a share: 1 to 36 bytes without NUL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag([u8; TAG_LENGTH]);

impl Tag {
    /// The tag `name`, if it can be one.
    pub fn new(name: &str) -> Option<Self> {
        let mut tag = [0; TAG_LENGTH];
        let name = name.as_bytes();
        if name.is_empty() || name.contains(&0) {
            return None;
        }
        tag.get_mut(..name.len())?.copy_from_slice(name);
        Some(Self(tag))
    }
}

/// Why the file system device could not be made.
#[derive(Debug, Error)]
pub enum FsError {
    /// There are none or too many.
    #[error("a file system device with {0} request queues: give it 1 to {MAX_REQUEST_QUEUES}")]
    RequestQueues(u32),
    /// The share cannot be served.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The host is out of descriptors.
    #[error("making the events of a file system device")]
    Events(#[source] io::Error),
    /// A thread did not start.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

/// The file system device.
#[derive(Debug)]
pub struct Fs {
    config: [u8; TAG_LENGTH + 4],
    queue_sizes: Vec<u16>,
    events: Vec<EventFd>,
    workers: Vec<Worker<Control>>,
    tree: Arc<SharedTree>,
}

impl Fs {
    /// A device that serves `share` under `tag` with `request_queues` queues and as many threads
    /// (guests before Linux 6.11 use one). They run `hook` before anything of the guest's.
    ///
    /// /proc has to be mounted where this process can see it, as long as the device lives, and the
    /// process has to be in its last mount namespace. As root the threads use the capabilities
    /// CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, MKNOD, SETFCAP, SETGID and SETUID
    /// (and SYS_ADMIN for `trusted.` attributes), and SETPCAP before `hook`.
    ///
    /// # Errors
    /// The share cannot be opened, the host is out of something, or the hook fails.
    pub fn new(
        tag: Tag,
        share: Share,
        request_queues: u32,
        hook: &ThreadHook,
    ) -> Result<Self, FsError> {
        if !(1..=MAX_REQUEST_QUEUES).contains(&request_queues) {
            return Err(FsError::RequestQueues(request_queues));
        }
        let mut config = [0; TAG_LENGTH + 4];
        config[..TAG_LENGTH].copy_from_slice(&tag.0);
        config[TAG_LENGTH..].copy_from_slice(&request_queues.to_le_bytes());
        let tree = Arc::new(SharedTree::open(share)?);
        let server = Arc::new(Server::new(Arc::clone(&tree)));
        // The high-priority queue comes first; the thread of the first request queue serves it.
        let queues = 1 + request_queues;
        let events: io::Result<Vec<_>> = (0..queues).map(|_| new_event()).collect();
        let events = events.map_err(FsError::Events)?;
        let mut workers = Vec::new();
        for (i, event) in events.iter().enumerate().skip(1) {
            let mut watched = vec![event.try_clone().map_err(FsError::Events)?];
            if i == 1 {
                watched.insert(0, events[0].try_clone().map_err(FsError::Events)?);
            }
            let server = Arc::clone(&server);
            // The first thread is the last one to be reset: it clears what all have used.
            let tree = (i == 1).then(|| Arc::clone(&tree));
            workers.push(Worker::spawn(
                ThreadKind::Fs,
                &format!("fs{}", i - 1),
                hook,
                move |mailbox| {
                    credentials::prepare_thread()?;
                    Service::new(tree, server, mailbox, watched)
                },
                Service::run,
            )?);
        }
        Ok(Self {
            config,
            queue_sizes: events.iter().map(|_| QUEUE_SIZE).collect(),
            events,
            workers,
            tree,
        })
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::FileSystem
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.config, offset, data);
    }

    fn activate(&mut self, queues: Vec<VirtQueue>, _features: u64) {
        let mut queues = queues.into_iter();
        let high_priority = queues.next();
        let mut first = high_priority.into_iter();
        for (worker, queue) in self.workers.iter().zip(queues) {
            worker.activate(first.by_ref().chain([queue]).collect());
        }
    }

    fn reset(&mut self) {
        for worker in self.workers.iter().rev() {
            worker.reset();
        }
    }

    fn pause(&mut self) -> Result<Held, PauseError> {
        // The first one tells what all know, when the others stand still.
        let mut workers = self.workers.iter_mut().rev();
        workers.try_fold(Held::Nothing, |_, worker| worker.pause())
    }

    fn resume(&mut self) {
        for worker in &mut self.workers {
            worker.resume();
        }
    }

    fn take_over(&mut self, held: &Held) -> Result<(), PauseError> {
        match held {
            Held::Share(held) => Ok(self.tree.take_over(held)?),
            _ => Err(PauseError::OtherKind),
        }
    }
}

/// What one thread serves.
struct Service {
    /// What to clear on a reset.
    tree: Option<Arc<SharedTree>>,
    server: Arc<Server<Arc<SharedTree>>>,
    epoll: Epoll,
    events: Vec<EventFd>,
    queues: Vec<VirtQueue>,
}

impl Service {
    fn new(
        tree: Option<Arc<SharedTree>>,
        server: Arc<Server<Arc<SharedTree>>>,
        mailbox: &Mailbox<Control>,
        events: Vec<EventFd>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let watched = std::iter::once(mailbox.event()).chain(&events);
        for (token, event) in (0..).zip(watched) {
            let interest = EpollEvent::new(EventSet::IN, token);
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest)?;
        }
        Ok(Self {
            tree,
            server,
            epoll,
            events,
            queues: Vec::new(),
        })
    }

    fn run(mut self, mailbox: &Mailbox<Control>) {
        let mut ready = [EpollEvent::default(); 4];
        let mut again = false;
        loop {
            let timeout = if again { 0 } else { -1 };
            let count = match self.epoll.wait(timeout, &mut ready) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "waiting for file system requests");
                    return;
                }
            };
            for event in &ready[..count] {
                // Not ready only means that the event was read before.
                if let Some(queue) = event.data().checked_sub(1)
                    && let Ok(queue) = usize::try_from(queue)
                    && let Some(event) = self.events.get(queue)
                {
                    let _ = event.read();
                }
            }
            for message in mailbox.drain() {
                match message {
                    Control::Activate(queues) => self.queues = queues,
                    Control::Reset(done) => {
                        self.reset();
                        // The transport waits for this.
                        let _ = done.send(());
                    }
                    Control::Pause(pause) => pause.stand_still(self.held()),
                    Control::Stop => return,
                }
            }
            again = self.serve();
        }
    }

    /// What the driver knows, by the thread that also clears it: it may do what the server does.
    fn held(&self) -> Result<Held, PauseError> {
        match &self.tree {
            Some(tree) => Ok(Held::Share(tree.held()?)),
            None => Ok(Held::Nothing),
        }
    }

    /// Lets go of the queues and of what the driver knew.
    fn reset(&mut self) {
        self.queues.clear();
        if let Some(tree) = &self.tree {
            tree.clear();
        }
    }

    /// Serves what is available, a ring full from each queue at most; says whether there is more.
    fn serve(&mut self) -> bool {
        let mut more = false;
        for queue in &mut self.queues {
            queue.disable_notification();
            for _ in 0..QUEUE_SIZE {
                let Some(chain) = queue.pop_descriptors() else {
                    break;
                };
                let head = chain.head_index();
                let length = handle(&self.server, queue.memory(), chain);
                queue.complete_head(head, length);
                queue.signal_used();
            }
            more |= queue.enable_notification();
        }
        more
    }
}

/// Whether a request can be one by its size. The server makes buffers as large as what a chain
/// names, and descriptors may name the same memory again and again.
fn is_bounded(chain: DescriptorChain<Arc<GuestRam>>) -> bool {
    let mut bytes = 0u64;
    for (count, descriptor) in chain.enumerate() {
        bytes = bytes.saturating_add(descriptor.len().into());
        if count >= MAX_DESCRIPTORS || bytes > MAX_BYTES {
            return false;
        }
    }
    true
}

/// Serves one request; says how long the answer is. What is no request gets none.
fn handle(
    server: &Server<Arc<SharedTree>>,
    memory: &GuestRam,
    chain: DescriptorChain<Arc<GuestRam>>,
) -> usize {
    if !is_bounded(chain.clone()) {
        tracing::debug!("a file system request that is too large");
        return 0;
    }
    let reader = Reader::from_descriptor_chain(memory, chain.clone());
    let writer = VirtioFsWriter::new(memory, chain);
    let (reader, writer) = match (reader, writer) {
        (Ok(reader), Ok(writer)) => (reader, writer),
        (Err(error), _) | (_, Err(error)) => {
            tracing::debug!(%error, "a file system request outside of memory");
            return 0;
        }
    };
    match server.handle_message(reader, writer.into(), None, None) {
        Ok(length) => length,
        Err(error) => {
            tracing::debug!(%error, "a file system request that is none");
            0
        }
    }
}
