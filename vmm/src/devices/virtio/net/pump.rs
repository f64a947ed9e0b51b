//! The network device's thread: packets from the tap device to the guest's receive queue, and from its transmit queue
//! to the tap device.
//!
//! Nothing is kept here: a packet that finds no buffer stays in the kernel's queue, which drops what is too much, as a
//! wire does.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::tap::{HEADER_SIZE, Offloads, Tap};
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::worker::{Control, Mailbox, wait_for_events};
use crate::devices::virtio::{Held, VirtQueue};
use crate::memory::GuestRam;

const MAILBOX: u64 = 0;
const RECEIVE: u64 = 1;
const TRANSMIT: u64 = 2;
const TAP: u64 = 3;

/// Packets that go one way before the other way and the mailbox have their turn.
const BURST: usize = 64;
/// The largest packet whose segments are still to be cut, with room for its link header and a VLAN's.
const LARGEST_SEGMENT: usize = 65_535 + 18;
/// An Ethernet header with a VLAN's.
const LINK_HEADER: usize = 18;
/// The most pieces of memory that one readv(2) or writev(2) takes.
const MAX_PIECES: usize = libc::UIO_MAXIOV as usize;
/// Where `num_buffers` is in the header (virtio 1.2, 5.1.6).
const NUM_BUFFERS: usize = 10;

/// What the thread is told.
#[derive(Debug)]
pub(super) enum Message {
    Control(Control),
    /// What driver and device agreed on for the queues that follow.
    Negotiated {
        offloads: Offloads,
        /// Whether a received packet may take several chains.
        mergeable: bool,
    },
}

impl From<Control> for Message {
    fn from(control: Control) -> Self {
        Self::Control(control)
    }
}

/// The guest's side: present while the driver is up.
struct Queues {
    receive: VirtQueue,
    transmit: VirtQueue,
    /// Receive chains that were taken and hold nothing yet, and how many bytes they can.
    empty: VecDeque<Chain>,
    room: usize,
}

/// The thread's state.
pub(super) struct Pump {
    tap: Tap,
    mtu: usize,
    epoll: Epoll,
    events: Vec<EventFd>,
    queues: Option<Queues>,
    mergeable: bool,
    /// The most bytes that one packet can have, header included.
    largest: usize,
    /// Whether the tap device is waited for.
    watches_tap: bool,
    pieces: Pieces,
    stopped: bool,
}

impl Pump {
    pub(super) fn new(
        tap: Tap,
        mtu: u16,
        mailbox: &Mailbox<Message>,
        events: Vec<EventFd>,
    ) -> io::Result<Self> {
        tap.set_offloads(Offloads::default())?;
        Self::with_plain_tap(tap, mtu, mailbox, events)
    }

    /// The same for a tap device that leaves nothing to its reader yet.
    pub(super) fn with_plain_tap(
        tap: Tap,
        mtu: u16,
        mailbox: &Mailbox<Message>,
        events: Vec<EventFd>,
    ) -> io::Result<Self> {
        let mut pump = Self {
            mtu: mtu.into(),
            epoll: Epoll::new()?,
            events,
            queues: None,
            mergeable: false,
            largest: 0,
            watches_tap: false,
            pieces: Pieces::default(),
            stopped: false,
            tap,
        };
        pump.expect(Offloads::default(), false);
        pump.watch(mailbox.event().as_raw_fd(), MAILBOX, EventSet::IN)?;
        for (event, token) in pump.events.iter().zip(RECEIVE..) {
            pump.watch(event.as_raw_fd(), token, EventSet::IN)?;
        }
        pump.watch(pump.tap.as_raw_fd(), TAP, EventSet::empty())?;
        Ok(pump)
    }

    fn watch(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        let event = EpollEvent::new(events, token);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }

    /// Serves until it is told to stop.
    pub(super) fn run(mut self, mailbox: &Mailbox<Message>) {
        while !self.stopped {
            if let Err(error) = self.turn(mailbox, -1) {
                tracing::error!(%error, "the network device has ended");
                return;
            }
        }
    }

    /// Waits up to `timeout` milliseconds for events (-1: until there is one) and serves them.
    pub(super) fn turn(&mut self, mailbox: &Mailbox<Message>, timeout: i32) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 4];
        let count = wait_for_events(&self.epoll, timeout, &mut events)?;
        for event in &events[..count] {
            match event.data() {
                MAILBOX => self.read_mailbox(mailbox)?,
                RECEIVE => {
                    // Not ready only means that the event was read before.
                    let _ = self.events[0].read();
                    self.receive()?;
                }
                TRANSMIT => {
                    let _ = self.events[1].read();
                    self.transmit()?;
                }
                _ => self.receive()?,
            }
        }
        Ok(())
    }

    fn read_mailbox(&mut self, mailbox: &Mailbox<Message>) -> io::Result<()> {
        for message in mailbox.drain() {
            match message {
                Message::Negotiated {
                    offloads,
                    mergeable,
                } => self.negotiated(offloads, mergeable)?,
                Message::Control(Control::Activate(queues)) => {
                    let mut queues = queues.into_iter();
                    self.queues =
                        queues
                            .next()
                            .zip(queues.next())
                            .map(|(receive, transmit)| Queues {
                                receive,
                                transmit,
                                empty: VecDeque::new(),
                                room: 0,
                            });
                    self.receive()?;
                    self.transmit()?;
                }
                Message::Control(Control::Reset(done)) => {
                    self.queues = None;
                    self.watch_tap(false)?;
                    // Who asked waits for this; if it is gone, nobody does.
                    let _ = done.send(());
                }
                Message::Control(Control::Pause(pause)) => pause.stand_still(Ok(Held::Nothing)),
                Message::Control(Control::Stop) => self.stopped = true,
            }
        }
        Ok(())
    }

    fn negotiated(&mut self, offloads: Offloads, mergeable: bool) -> io::Result<()> {
        self.tap.set_offloads(offloads)?;
        self.expect(offloads, mergeable);
        Ok(())
    }

    /// Knows from now on how large packets of the tap device may be and what they may take.
    pub(super) fn expect(&mut self, offloads: Offloads, mergeable: bool) {
        self.mergeable = mergeable;
        let packet = match offloads.tso4 || offloads.tso6 {
            true => LARGEST_SEGMENT,
            false => self.mtu + LINK_HEADER,
        };
        self.largest = HEADER_SIZE + packet;
    }

    fn watch_tap(&mut self, watch: bool) -> io::Result<()> {
        if self.watches_tap == watch {
            return Ok(());
        }
        let events = if watch {
            EventSet::IN
        } else {
            EventSet::empty()
        };
        let event = EpollEvent::new(events, TAP);
        self.epoll
            .ctl(ControlOperation::Modify, self.tap.as_raw_fd(), event)?;
        self.watches_tap = watch;
        Ok(())
    }

    /// Packets of the tap device into the guest's memory, as long as there are packets and room.
    fn receive(&mut self) -> io::Result<()> {
        let Some(queues) = &mut self.queues else {
            return Ok(());
        };
        let memory = Arc::clone(queues.receive.memory());
        let mut has_room = true;
        for _ in 0..BURST {
            has_room = queues.make_room(self.largest, self.mergeable);
            if !has_room {
                break;
            }
            let chains = if self.mergeable { usize::MAX } else { 1 };
            let slices = queues
                .empty
                .iter()
                .take(chains)
                .flat_map(|chain| chain.writable(&memory, 0, self.largest));
            let length = match self.pieces.transfer(libc::readv, &self.tap, slices) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Whoever took the interface down or away: there is nothing to wait for.
                Err(error) => {
                    tracing::warn!(%error, "the tap device cannot be read any more");
                    has_room = false;
                    break;
                }
            };
            queues.hand_over(&memory, length);
        }
        queues.receive.signal_used();
        self.watch_tap(has_room)
    }

    /// Packets of the guest to the tap device, until there is none.
    fn transmit(&mut self) -> io::Result<()> {
        let Some(queues) = &mut self.queues else {
            return Ok(());
        };
        let memory = Arc::clone(queues.transmit.memory());
        queues.transmit.disable_notification();
        let mut sent = 0;
        loop {
            while sent < BURST
                && let Some(chain) = queues.transmit.pop()
            {
                let slices = chain.readable(&memory, 0, usize::MAX);
                // What the kernel refuses, for its header or for want of memory, is lost as on a wire.
                if let Err(error) = self.pieces.transfer(libc::writev, &self.tap, slices) {
                    tracing::trace!(%error, "a packet of the guest was dropped");
                }
                queues.transmit.complete(chain, 0);
                sent += 1;
            }
            if sent == BURST {
                // The other way first; there may be more here, for which there is no notification.
                self.events[1].write(1)?;
                break;
            }
            if !queues.transmit.enable_notification() {
                break;
            }
        }
        queues.transmit.signal_used();
        Ok(())
    }
}

impl Queues {
    /// Takes chains until a packet of `largest` bytes fits. If there are not enough, the driver notifies of the next.
    fn make_room(&mut self, largest: usize, mergeable: bool) -> bool {
        loop {
            let size = usize::from(self.receive.size());
            let enough = match mergeable {
                // A driver with small buffers and a short queue gets what fits, not nothing.
                true => self.room >= largest || self.empty.len() == size,
                false => !self.empty.is_empty(),
            };
            if enough {
                return true;
            }
            if let Some(chain) = self.receive.pop() {
                self.room = self.room.saturating_add(chain.writable_len());
                self.empty.push_back(chain);
            } else if !self.receive.enable_notification() {
                return false;
            }
        }
    }

    /// Gives the first chains, which hold `length` bytes now, back to the driver.
    fn hand_over(&mut self, memory: &GuestRam, length: usize) {
        let mut left = length;
        let mut count = 0;
        while left > 0
            && let Some(chain) = self.empty.get(count)
        {
            left = left.saturating_sub(chain.writable_len());
            count += 1;
        }
        if let Some(first) = self.empty.front() {
            // No more than a queue has.
            let count = u16::try_from(count).unwrap_or(u16::MAX);
            first.copy_to(memory, NUM_BUFFERS, &count.to_le_bytes());
        }
        let room = &mut self.room;
        let mut left = length;
        let filled = self.empty.drain(..count).map(|chain| {
            let size = chain.writable_len();
            *room -= size;
            let part = size.min(left);
            left -= part;
            (chain, part)
        });
        self.receive.complete_together(filled);
    }
}

/// readv(2) or writev(2).
type Call = unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int) -> libc::ssize_t;

/// The pieces of guest memory of one packet, for the kernel.
#[derive(Default)]
struct Pieces(Vec<libc::iovec>);

impl Pieces {
    /// Carries one packet between the tap device and guest memory; how many bytes it has, or had.
    fn transfer<'a>(
        &mut self,
        call: Call,
        tap: &Tap,
        slices: impl Iterator<Item = VolatileSlice<'a>>,
    ) -> io::Result<usize> {
        self.0.clear();
        self.0
            .extend(slices.take(MAX_PIECES).map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            }));
        // At most `MAX_PIECES`.
        let count = self.0.len() as libc::c_int;
        // SAFETY: each vector is a slice of guest memory that is mapped as long as the queue that the chains came
        // from, and may change at any time: only the kernel touches it.
        let done = unsafe { call(tap.as_raw_fd(), self.0.as_ptr(), count) };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }
}
