//! virtio-vsock (virtio 1.2, 5.10): stream sockets between guest and host, without a kernel module.
//!
//! On the host they are Unix sockets: clients use [`HostSocket`], this process [`VsockHandle`].
//! The guest's packets and the clients' bytes are hostile; a connection that breaks the protocol
//! is reset, and each has a bounded buffer. One thread serves all.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::worker::{Mailbox, Worker, queue_events};
use super::{
    DeviceType, Held, PauseError, ThreadHook, ThreadKind, VirtQueue, VirtioDevice, WorkerError,
};

mod connection;
mod host_socket;
#[cfg(feature = "fuzzing")]
pub(crate) mod inline;
mod listener;
mod muxer;
mod packet;

#[cfg(test)]
mod tests;

pub use host_socket::{HostSocket, HostSocketError};
pub use listener::VsockListener;

use listener::Listeners;
use muxer::{Message, Muxer};

/// The host's address.
pub const HOST_CID: u64 = 2;

/// Receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
/// RING_EVENT_IDX. Stream sockets need no feature bit.
const FEATURES: u64 = 1 << 29;
/// How long the guest's kernel may take to accept a connection. Generous: on a machine that is overloaded, or under
/// emulation, a virtual CPU may stand still for many seconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// A guest's address: neither one with a meaning of its own nor more than 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestCid(u64);

impl GuestCid {
    /// The usual choice; addresses are only seen by the guest itself.
    pub const DEFAULT: Self = Self(3);

    /// An address between 3 and 2^32 - 2, if `cid` is one.
    pub fn new(cid: u32) -> Option<Self> {
        (cid > 2 && cid < u32::MAX).then_some(Self(cid.into()))
    }
}

/// Why the socket device could not be made.
#[derive(Debug, Error)]
pub enum VsockError {
    /// The host is out of descriptors.
    #[error("making the events of the vsock device")]
    Events(#[source] io::Error),
    /// The thread did not start.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    cid: [u8; 8],
    events: Vec<EventFd>,
    worker: Worker<Message>,
    listeners: Arc<Listeners>,
}

impl Vsock {
    /// A socket device for a guest with this address; host clients use `socket`, if given. Its
    /// thread runs `hook` before anything of the guest's.
    ///
    /// # Errors
    /// The host is out of something, or the hook fails.
    pub fn new(
        cid: GuestCid,
        socket: Option<HostSocket>,
        hook: &ThreadHook,
    ) -> Result<Self, VsockError> {
        let (events, clones) = queue_events(QUEUE_SIZES.len()).map_err(VsockError::Events)?;
        let listener = socket.map(HostSocket::into_listener);
        let listeners = Arc::<Listeners>::default();
        let worker = {
            let listeners = Arc::clone(&listeners);
            Worker::spawn(
                ThreadKind::Vsock,
                "vsock",
                hook,
                move |mailbox| Muxer::new(cid.0, mailbox, clones, listener, listeners),
                Muxer::run,
            )?
        };
        Ok(Self {
            cid: cid.0.to_le_bytes(),
            events,
            worker,
            listeners,
        })
    }

    /// This process's way to the guest's ports and from them. It stays valid, though useless,
    /// when the device is gone.
    pub fn handle(&self) -> VsockHandle {
        VsockHandle {
            mailbox: Arc::clone(self.worker.mailbox()),
            listeners: Arc::clone(&self.listeners),
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Socket
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
        super::read_config_space(&self.cid, offset, data);
    }

    fn activate(&mut self, queues: Vec<VirtQueue>, _features: u64) {
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

    fn take_over(&mut self, held: &Held) -> Result<(), PauseError> {
        match *held {
            Held::Nothing => Ok(()),
            Held::Connections { next_port } => {
                let told = self.worker.mailbox().send(Message::Lost { next_port });
                told.map_err(|_| PauseError::Ended)
            }
            Held::Share(_) => Err(PauseError::OtherKind),
        }
    }
}

/// Connects this process with the guest.
#[derive(Debug, Clone)]
pub struct VsockHandle {
    mailbox: Arc<Mailbox<Message>>,
    listeners: Arc<Listeners>,
}

impl VsockHandle {
    /// Connects to `port` of the guest; waits until the guest has answered. Half-closing the
    /// stream half-closes the guest's socket, and the other way round.
    ///
    /// # Errors
    /// `ConnectionRefused`: nobody listens there. `ConnectionReset`: the guest or the device is
    /// going down. `TimedOut`: no answer within a minute.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let (reply, answer) = mpsc::sync_channel(1);
        let message = Message::Connect {
            port,
            stream: theirs,
            reply,
        };
        if self.mailbox.send(message).is_err() {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        match answer.recv_timeout(CONNECT_TIMEOUT) {
            Ok(result) => result.map(|()| ours),
            Err(RecvTimeoutError::Timeout) => Err(io::ErrorKind::TimedOut.into()),
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }

    /// Ends all connections, each when the host has taken what the guest sent. For a guest that runs no more.
    pub(crate) fn finish(&self) {
        // A thread that has ended has no connections.
        let _ = self.mailbox.send(Message::Finish);
    }

    /// Takes the guest's connections to `port` of the host from now on.
    ///
    /// # Errors
    /// `AddrInUse`: there is a listener already.
    pub fn listen(&self, port: u32) -> io::Result<VsockListener> {
        self.listeners.listen(port)
    }
}
