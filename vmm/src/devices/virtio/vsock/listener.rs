//! Ports of the host on which this process takes the guest's connections.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

/// The most connections that wait to be accepted on one port; further ones are refused.
const MAX_WAITING: usize = 128;

#[derive(Debug)]
struct Waiting {
    streams: VecDeque<UnixStream>,
    /// Counts `streams`.
    event: Arc<EventFd>,
}

/// The ports that are listened on.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    ports: Mutex<HashMap<u32, Waiting>>,
}

impl Listeners {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Waiting>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to listen on `port`.
    pub(super) fn listen(self: &Arc<Self>, port: u32) -> io::Result<VsockListener> {
        let mut ports = self.lock();
        if ports.contains_key(&port) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC | EFD_SEMAPHORE)?);
        let waiting = Waiting {
            streams: VecDeque::new(),
            event: Arc::clone(&event),
        };
        ports.insert(port, waiting);
        Ok(VsockListener {
            port,
            event,
            listeners: Arc::clone(self),
        })
    }

    /// Hands a new connection to whoever listens on `port`.
    pub(super) fn deliver(&self, port: u32, stream: UnixStream) -> io::Result<()> {
        let mut ports = self.lock();
        let Some(waiting) = ports.get_mut(&port) else {
            return Err(io::ErrorKind::ConnectionRefused.into());
        };
        if waiting.streams.len() >= MAX_WAITING {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        waiting.event.write(1)?;
        waiting.streams.push_back(stream);
        Ok(())
    }
}

/// Takes the guest's connections to one port of the host (CID 2). Its descriptor is readable while
/// there is one to accept. Dropping it closes the port.
#[derive(Debug)]
pub struct VsockListener {
    port: u32,
    event: Arc<EventFd>,
    listeners: Arc<Listeners>,
}

impl VsockListener {
    /// The port listened on.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// The next connection, if one waits. The stream is a blocking one.
    pub fn try_accept(&self) -> Option<UnixStream> {
        let mut ports = self.listeners.lock();
        let stream = ports.get_mut(&self.port)?.streams.pop_front()?;
        // Counts down; under the lock it is not zero.
        let _ = self.event.read();
        Some(stream)
    }

    /// The next connection; waits for it.
    ///
    /// # Errors
    /// What poll(2) says.
    pub fn accept(&self) -> io::Result<UnixStream> {
        loop {
            if let Some(stream) = self.try_accept() {
                return Ok(stream);
            }
            let mut wait = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
            match poll(&mut wait, PollTimeout::NONE) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for VsockListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor belongs to `event`, which lives as long as the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        self.listeners.lock().remove(&self.port);
    }
}
