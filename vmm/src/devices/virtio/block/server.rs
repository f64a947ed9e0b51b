//! The block device's thread: requests from the driver's queue to the kernel, and their ends back.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::disk::Disk;
use super::transfers::{DEPTH, Transfers};
use crate::devices::virtio::worker::{Control, Mailbox, new_event, wait_for_events};
use crate::devices::virtio::{Held, VirtQueue};

const MAILBOX: u64 = 0;
const QUEUE: u64 = 1;
const ENDED: u64 = 2;

/// What the thread is told.
#[derive(Debug)]
pub(super) enum Message {
    Control(Control),
    /// What driver and device agreed on for the queue that follows.
    Negotiated {
        /// Whether each write is to be durable when it ends.
        write_through: bool,
    },
}

impl From<Control> for Message {
    fn from(control: Control) -> Self {
        Self::Control(control)
    }
}

/// The thread's state.
pub(super) struct Server {
    epoll: Epoll,
    event: EventFd,
    /// Fires when a transfer has ended.
    ended: EventFd,
    /// Present while the driver is up.
    queue: Option<VirtQueue>,
    transfers: Transfers,
    stopped: bool,
}

impl Server {
    pub(super) fn new(disk: Disk, mailbox: &Mailbox<Message>, event: EventFd) -> io::Result<Self> {
        let ended = new_event()?;
        let server = Self {
            epoll: Epoll::new()?,
            transfers: Transfers::new(disk, &ended)?,
            event,
            ended,
            queue: None,
            stopped: false,
        };
        server.watch(mailbox.event().as_raw_fd(), MAILBOX)?;
        server.watch(server.event.as_raw_fd(), QUEUE)?;
        server.watch(server.ended.as_raw_fd(), ENDED)?;
        Ok(server)
    }

    fn watch(&self, fd: RawFd, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, token);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }

    /// Serves until it is told to stop.
    pub(super) fn run(mut self, mailbox: &Mailbox<Message>) {
        while !self.stopped {
            if let Err(error) = self.turn(mailbox, -1) {
                tracing::error!(%error, "the block device has ended");
                return;
            }
        }
    }

    /// Waits up to `timeout` milliseconds for events (-1: until there is one) and serves them.
    pub(super) fn turn(&mut self, mailbox: &Mailbox<Message>, timeout: i32) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 3];
        let count = wait_for_events(&self.epoll, timeout, &mut events)?;
        for event in &events[..count] {
            // Not ready only means that the event was read before.
            match event.data() {
                MAILBOX => self.read_mailbox(mailbox)?,
                QUEUE => drop(self.event.read()),
                _ => drop(self.ended.read()),
            }
        }
        self.serve()
    }

    fn read_mailbox(&mut self, mailbox: &Mailbox<Message>) -> io::Result<()> {
        for message in mailbox.drain() {
            match message {
                Message::Negotiated { write_through } => {
                    self.transfers.write_through = write_through;
                }
                Message::Control(Control::Activate(mut queues)) => self.queue = queues.pop(),
                Message::Control(Control::Reset(done)) => {
                    if let Some(queue) = &mut self.queue {
                        self.transfers.settle(queue)?;
                        queue.signal_used();
                    }
                    self.queue = None;
                    // Who asked waits for this; if it is gone, nobody does.
                    let _ = done.send(());
                }
                Message::Control(Control::Pause(pause)) => {
                    // What is under way may complete in any order: nothing must be.
                    if let Some(queue) = &mut self.queue {
                        self.transfers.settle(queue)?;
                        queue.signal_used();
                    }
                    pause.stand_still(Ok(Held::Nothing));
                }
                Message::Control(Control::Stop) => self.stopped = true,
            }
        }
        Ok(())
    }

    /// Answers what has ended, and takes what the driver has made available.
    fn serve(&mut self) -> io::Result<()> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        self.transfers.finish(queue)?;
        queue.disable_notification();
        let mut taken = 0;
        // Without room the next transfer's end leads here again.
        while self.transfers.has_room() {
            if taken == DEPTH {
                // The mailbox first; there may be more here, for which there is no notification.
                self.event.write(1)?;
                break;
            }
            if let Some(chain) = queue.pop() {
                self.transfers.begin(chain, queue)?;
                taken += 1;
            } else if !queue.enable_notification() {
                break;
            }
        }
        self.transfers.submit()?;
        queue.signal_used();
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Some(queue) = &mut self.queue else { return };
        if let Err(error) = self.transfers.settle(queue) {
            tracing::error!(%error, "waiting for the disk");
            // The kernel may write to the guest's memory still: it stays.
            mem::forget(Arc::clone(queue.memory()));
        }
    }
}
