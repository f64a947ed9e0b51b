//! The threads that serve queues, and how the rest of the process talks to them.
//!
//! A device starts its threads when it is made, before guest code runs, so that each can be
//! confined first: privileged set-up, then the caller's hook (a seccomp filter), then requests.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use thiserror::Error;
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Held, PauseError, VirtQueue};

/// Enough for the deepest call into the file system server in a debug build. The C library keeps the stack of a
/// thread that has ended: with the default of 2 MiB that would be a huge page for nothing.
pub(super) const STACK_SIZE: usize = 256 << 10;

/// What a device thread does, and so which system calls it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThreadKind {
    /// Carries data between a disk and the guest's memory.
    Block,
    /// Serves a shared directory.
    Fs,
    /// Carries packets between a network device and the host's kernel.
    Net,
    /// Moves bytes between the guest's sockets and the host's.
    Vsock,
}

type Hook = dyn Fn(ThreadKind) -> io::Result<()> + Send + Sync;

/// Runs on each device thread when its own set-up is done and before it serves anything: the place
/// to give up privileges and to install the seccomp filter of that kind of thread.
#[derive(Clone)]
pub struct ThreadHook(Arc<Hook>);

impl ThreadHook {
    /// A hook that calls `f`; an error keeps the device from being made.
    pub fn new(f: impl Fn(ThreadKind) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(f))
    }

    /// A hook that does nothing.
    pub fn none() -> Self {
        Self::new(|_| Ok(()))
    }
}

impl fmt::Debug for ThreadHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ThreadHook")
    }
}

/// Why a device thread could not be started.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The host is out of threads, memory or descriptors.
    #[error("starting the device thread {name}")]
    Spawn {
        /// The thread's name.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The thread's own set-up failed.
    #[error("setting up the device thread {name}")]
    SetUp {
        /// The thread's name.
        name: String,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The caller's hook failed.
    #[error("confining the device thread {name}")]
    Hook {
        /// The thread's name.
        name: String,
        /// What the hook said.
        #[source]
        source: io::Error,
    },
}

/// What the transport and the owner of a device tell its thread.
#[derive(Debug)]
pub(super) enum Control {
    /// Serve these queues.
    Activate(Vec<VirtQueue>),
    /// Drop the queues and all that belongs to the driver, then say so.
    Reset(SyncSender<()>),
    /// Serve nothing for a while.
    Pause(Pause),
    /// End the thread.
    Stop,
}

/// A device's thread is to stand still.
#[derive(Debug)]
pub(super) struct Pause {
    reached: SyncSender<Result<Held, PauseError>>,
    resumed: Receiver<()>,
}

impl Pause {
    /// Stands still, between two requests, until the device goes on. Tells what the device has beside its rings.
    pub(super) fn stand_still(self, held: Result<Held, PauseError>) {
        // Who asked waits for this; if it is gone, the device goes on.
        let _ = self.reached.send(held);
        // Nothing is ever sent: it ends when the other side is dropped.
        let _ = self.resumed.recv();
    }
}

/// Messages to a thread that waits for an event.
pub(super) struct Mailbox<M> {
    /// `None` once the thread has ended.
    messages: Mutex<Option<VecDeque<M>>>,
    event: EventFd,
}

impl<M> fmt::Debug for Mailbox<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").finish_non_exhaustive()
    }
}

impl<M> Mailbox<M> {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            messages: Mutex::new(Some(VecDeque::new())),
            event: new_event()?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<VecDeque<M>>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fires when there are messages.
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Hands `message` to the thread; gives it back if the thread has ended.
    pub(super) fn send(&self, message: M) -> Result<(), M> {
        match self.lock().as_mut() {
            Some(messages) => messages.push_back(message),
            None => return Err(message),
        }
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "waking a device thread");
        }
        Ok(())
    }

    /// All messages that have come in.
    pub(super) fn drain(&self) -> VecDeque<M> {
        // Not ready only means that another drain has taken the messages along.
        let _ = self.event.read();
        self.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn close(&self) {
        self.lock().take();
    }
}

/// Closes the mailbox when the thread ends, in whatever way, so that nobody waits for it.
struct CloseOnDrop<M>(Arc<Mailbox<M>>);

impl<M> Drop for CloseOnDrop<M> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A device thread. Dropping it ends the thread and waits for that.
#[derive(Debug)]
pub(super) struct Worker<M: From<Control>> {
    mailbox: Arc<Mailbox<M>>,
    thread: Option<JoinHandle<()>>,
    /// Dropped to let a thread go on that stands still.
    pause: Option<SyncSender<()>>,
}

impl<M: From<Control> + Send + 'static> Worker<M> {
    /// Starts a thread that runs `set_up`, the hook and then `run` until [`Control::Stop`].
    /// Returns when set-up and hook have succeeded.
    pub(super) fn spawn<T: 'static>(
        kind: ThreadKind,
        name: &str,
        hook: &ThreadHook,
        set_up: impl FnOnce(&Mailbox<M>) -> io::Result<T> + Send + 'static,
        run: impl FnOnce(T, &Mailbox<M>) + Send + 'static,
    ) -> Result<Self, WorkerError> {
        let spawn_error = |source| WorkerError::Spawn {
            name: name.to_owned(),
            source,
        };
        let mailbox = Arc::new(Mailbox::new().map_err(spawn_error)?);
        let (ready, outcome) = mpsc::sync_channel(1);
        let thread = {
            let (name, hook) = (name.to_owned(), hook.clone());
            let guard = CloseOnDrop(Arc::clone(&mailbox));
            thread::Builder::new()
                .name(name.clone())
                .stack_size(STACK_SIZE)
                .spawn(move || {
                    let prepared = set_up(&guard.0)
                        .map_err(|source| WorkerError::SetUp {
                            name: name.clone(),
                            source,
                        })
                        .and_then(|state| match (hook.0)(kind) {
                            Ok(()) => Ok(state),
                            Err(source) => Err(WorkerError::Hook { name, source }),
                        });
                    match prepared {
                        Ok(state) => {
                            // The creator waits for this; if it is gone, Stop follows.
                            let _ = ready.send(Ok(()));
                            run(state, &guard.0);
                        }
                        Err(error) => {
                            let _ = ready.send(Err(error));
                        }
                    }
                })
                .map_err(spawn_error)?
        };
        let worker = Self {
            mailbox,
            thread: Some(thread),
            pause: None,
        };
        match outcome.recv() {
            Ok(result) => result.map(|()| worker),
            Err(_) => Err(spawn_error(io::Error::other("the thread panicked"))),
        }
    }

    /// The way to the thread.
    pub(super) fn mailbox(&self) -> &Arc<Mailbox<M>> {
        &self.mailbox
    }

    /// Hands queues to the thread.
    pub(super) fn activate(&self, queues: Vec<VirtQueue>) {
        if self.mailbox.send(Control::Activate(queues).into()).is_err() {
            tracing::error!("a device thread has ended; its queues are not served");
        }
    }

    /// Takes the queues away from the thread and waits until it has let go of them.
    pub(super) fn reset(&self) {
        let (done, wait) = mpsc::sync_channel(1);
        if self.mailbox.send(Control::Reset(done).into()).is_ok() {
            // An error means that the thread has ended: it holds no queues either.
            let _ = wait.recv();
        }
    }

    /// Has the thread stand still, and waits until it does; what the device has beside its rings.
    pub(super) fn pause(&mut self) -> Result<Held, PauseError> {
        let (reached, wait) = mpsc::sync_channel(1);
        let (pause, resumed) = mpsc::sync_channel(0);
        let message = Control::Pause(Pause { reached, resumed });
        if self.mailbox.send(message.into()).is_err() {
            return Err(PauseError::Ended);
        }
        let held = wait.recv().unwrap_or(Err(PauseError::Ended));
        self.pause = Some(pause);
        held
    }

    /// Lets the thread go on.
    pub(super) fn resume(&mut self) {
        self.pause = None;
    }
}

impl<M: From<Control>> Drop for Worker<M> {
    fn drop(&mut self) {
        self.pause = None;
        // An error means that the thread has ended already.
        let _ = self.mailbox.send(Control::Stop.into());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a device thread panicked");
        }
    }
}

/// Waits up to `timeout` milliseconds for events (-1: until there is one); how many there are. A signal is none.
pub(super) fn wait_for_events(
    epoll: &Epoll,
    timeout: i32,
    events: &mut [EpollEvent],
) -> io::Result<usize> {
    match epoll.wait(timeout, events) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        waited => waited,
    }
}

/// An event for each of a device's queues, and once more for its thread.
pub(super) fn queue_events(queues: usize) -> io::Result<(Vec<EventFd>, Vec<EventFd>)> {
    let events: Vec<_> = (0..queues).map(|_| new_event()).collect::<Result<_, _>>()?;
    let clones = events
        .iter()
        .map(EventFd::try_clone)
        .collect::<Result<_, _>>()?;
    Ok((events, clones))
}

/// A new event that neither blocks nor survives exec.
pub(super) fn new_event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_that_fails_keeps_the_thread_from_running() {
        let hook = ThreadHook::new(|kind| {
            assert_eq!(kind, ThreadKind::Vsock);
            Err(io::Error::from_raw_os_error(libc::EPERM))
        });
        let error = Worker::<Control>::spawn(
            ThreadKind::Vsock,
            "test",
            &hook,
            |_| Ok(()),
            |(), _| panic!("must not run"),
        )
        .unwrap_err();
        assert!(matches!(error, WorkerError::Hook { .. }), "{error}");
    }

    #[test]
    fn a_thread_stands_still_until_it_may_go_on_or_is_to_end() {
        let (went_on, wait) = mpsc::channel();
        let mut worker = Worker::<Control>::spawn(
            ThreadKind::Net,
            "test",
            &ThreadHook::none(),
            |_| Ok(()),
            move |(), mailbox| {
                loop {
                    for message in mailbox.drain() {
                        match message {
                            Control::Pause(pause) => {
                                pause.stand_still(Ok(Held::Nothing));
                                went_on.send(()).unwrap();
                            }
                            Control::Stop => return,
                            _ => {}
                        }
                    }
                    thread::yield_now();
                }
            },
        )
        .unwrap();
        assert!(matches!(worker.pause(), Ok(Held::Nothing)));
        assert!(wait.try_recv().is_err());
        worker.resume();
        wait.recv().unwrap();
        assert!(worker.pause().is_ok());
        drop(worker);
        wait.recv().unwrap();
    }

    #[test]
    fn a_message_to_a_thread_that_ended_comes_back() {
        let worker = Worker::<Control>::spawn(
            ThreadKind::Fs,
            "test",
            &ThreadHook::none(),
            |_| Ok(()),
            |(), _| {},
        )
        .unwrap();
        let mailbox = Arc::clone(worker.mailbox());
        drop(worker);
        assert!(mailbox.send(Control::Stop).is_err());
    }
}
