//! The socket device's thread: one epoll loop between the guest's queues and the host's sockets.
//!
//! Every socket is watched edge-triggered and once; what is readable is remembered in its
//! connection until the guest has room. Work is bounded everywhere: packets in one turn, answers
//! that wait for room, connections, and bytes in each.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{Connection, Fate, MAX_DATA, Origin};
use super::host_socket::{Request, read_request};
use super::listener::Listeners;
use super::packet::{HEADER_SIZE, Header, Op, Ports, TYPE_STREAM};
use super::{HOST_CID, QUEUE_SIZES};
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::worker::{Control, Mailbox, wait_for_events};
use crate::devices::virtio::{Held, VirtQueue};

/// The most connections, in whatever state; further ones are refused.
const MAX_CONNECTIONS: usize = 1024;
/// The most clients of the host socket that have not sent their line yet.
const MAX_CLIENTS: usize = 64;
/// The most answers that wait for the guest to make room; then its packets wait, too.
const MAX_REPLIES: usize = 256;
/// The most packets each way before other events are looked at.
const PACKETS_A_TURN: usize = 64;
/// Ports on the host's side of connections that the host opens.
const FIRST_HOST_PORT: u32 = 1 << 30;

const MAILBOX: u64 = 0;
const QUEUES: u64 = 1;
const LISTENER: u64 = 8;
const FIRST_TOKEN: u64 = 16;

/// What the device and its handles tell the thread.
#[derive(Debug)]
pub enum Message {
    /// From the transport or the owner.
    Control(Control),
    /// Connect the stream to a port of the guest, and say whether it took it.
    Connect {
        port: u32,
        stream: UnixStream,
        reply: SyncSender<io::Result<()>>,
    },
    /// The guest of the queues to come has connections that nobody here knows, from ports of the host below this one.
    Lost { next_port: u32 },
    /// The guest sends nothing any more: end the connections when the host has taken what it sent.
    Finish,
}

impl From<Control> for Message {
    fn from(control: Control) -> Self {
        Self::Control(control)
    }
}

/// The guest's side: present while the driver is up.
struct Queues {
    rx: VirtQueue,
    tx: VirtQueue,
    event: Option<VirtQueue>,
    /// Chains of the event queue that were taken.
    event_chains: VecDeque<Chain>,
    /// A receive chain that was taken and found no packet.
    spare: Option<Chain>,
}

/// The most buffers for events that a driver can have.
const EVENTS: usize = QUEUE_SIZES[2] as usize;

/// The event that ends all connections of the guest's (virtio 1.2, 5.10.6.7): `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();

/// How far the guest is told that its connections are lost. Its driver ends whatever connections there are when it comes
/// to the event, also such as are newer: until it gives the event's buffer back it must hear of none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Due,
    Told,
    Over,
}

/// All connections and what is needed to serve them.
pub struct Muxer {
    guest_cid: u64,
    epoll: Epoll,
    queue_events: Vec<EventFd>,
    listener: Option<UnixListener>,
    listeners: Arc<Listeners>,
    queues: Option<Queues>,
    loss: Loss,
    connections: HashMap<u64, Connection>,
    /// The connections that the guest knows; a lingering one is not among them.
    by_ports: HashMap<Ports, u64>,
    clients: HashMap<u64, UnixStream>,
    /// Connections that may have something to send, in turn.
    ready: VecDeque<u64>,
    /// RSTs for packets without a connection.
    replies: VecDeque<Header>,
    next_token: u64,
    next_port: u32,
    scratch: Vec<u8>,
    /// There is work that no event will announce.
    again: bool,
    stopped: bool,
}

impl Muxer {
    /// A muxer that waits for `mailbox`, the queues' events and clients of `listener`.
    pub fn new(
        guest_cid: u64,
        mailbox: &Mailbox<Message>,
        queue_events: Vec<EventFd>,
        listener: Option<UnixListener>,
        listeners: Arc<Listeners>,
    ) -> io::Result<Self> {
        let muxer = Self {
            guest_cid,
            epoll: Epoll::new()?,
            queue_events,
            listener,
            listeners,
            queues: None,
            loss: Loss::Over,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            clients: HashMap::new(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            next_token: FIRST_TOKEN,
            next_port: FIRST_HOST_PORT,
            scratch: vec![0; MAX_DATA],
            again: false,
            stopped: false,
        };
        muxer.watch(mailbox.event().as_raw_fd(), MAILBOX, EventSet::IN)?;
        for (event, token) in muxer.queue_events.iter().zip(QUEUES..) {
            muxer.watch(event.as_raw_fd(), token, EventSet::IN)?;
        }
        if let Some(listener) = &muxer.listener {
            // By edges: where a client cannot be accepted for want of descriptors, the event must
            // not come again at once.
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            muxer.watch(listener.as_raw_fd(), LISTENER, events)?;
        }
        Ok(muxer)
    }

    fn watch(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        let event = EpollEvent::new(events, token);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }

    /// Serves until it is told to stop.
    pub fn run(mut self, mailbox: &Mailbox<Message>) {
        while !self.stopped {
            if let Err(error) = self.turn(mailbox, -1) {
                tracing::error!(%error, "waiting for vsock events");
                return;
            }
        }
    }

    /// Waits up to `timeout` milliseconds for events (-1: until there is one) and serves them.
    pub fn turn(&mut self, mailbox: &Mailbox<Message>, timeout: i32) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 64];
        let timeout = if self.again { 0 } else { timeout };
        let count = wait_for_events(&self.epoll, timeout, &mut events)?;
        for event in &events[..count] {
            match event.data() {
                MAILBOX => self.read_mailbox(mailbox),
                LISTENER => self.accept_clients(),
                token if token < FIRST_TOKEN => {
                    let queue = usize::try_from(token - QUEUES).unwrap_or(usize::MAX);
                    if let Some(event) = self.queue_events.get(queue) {
                        // Not ready only means that the event was read before.
                        let _ = event.read();
                    }
                }
                token => self.on_socket(token, event.event_set()),
            }
        }
        self.pump();
        Ok(())
    }

    fn read_mailbox(&mut self, mailbox: &Mailbox<Message>) {
        for message in mailbox.drain() {
            match message {
                Message::Control(Control::Activate(queues)) => {
                    let mut queues = queues.into_iter();
                    if let (Some(rx), Some(tx)) = (queues.next(), queues.next()) {
                        self.queues = Some(Queues {
                            rx,
                            tx,
                            event: queues.next(),
                            event_chains: VecDeque::new(),
                            spare: None,
                        });
                    }
                }
                Message::Control(Control::Reset(done)) => {
                    self.queues = None;
                    self.loss = Loss::Over;
                    self.connections.clear();
                    self.by_ports.clear();
                    self.ready.clear();
                    self.replies.clear();
                    // The transport waits for this.
                    let _ = done.send(());
                }
                Message::Control(Control::Pause(pause)) => {
                    let held = match self.by_ports.is_empty() {
                        true => Held::Nothing,
                        false => Held::Connections {
                            next_port: self.next_port,
                        },
                    };
                    pause.stand_still(Ok(held));
                }
                Message::Control(Control::Stop) => self.stopped = true,
                Message::Lost { next_port } => {
                    self.loss = Loss::Due;
                    self.next_port = next_port.max(FIRST_HOST_PORT);
                }
                Message::Finish => {
                    let tokens: Vec<u64> = self.by_ports.values().copied().collect();
                    for token in tokens {
                        if let Some(connection) = self.connections.get_mut(&token) {
                            let fate = connection.end();
                            self.settle(token, fate);
                        }
                    }
                }
                Message::Connect {
                    port,
                    stream,
                    reply,
                } => {
                    let token = self.new_token();
                    match self.watch_stream(&stream, token) {
                        Ok(()) => self.request(token, port, stream, Origin::Process(reply)),
                        Err(error) => drop(reply.send(Err(error))),
                    }
                }
            }
        }
    }

    fn new_token(&mut self) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        token
    }

    fn watch_stream(&self, stream: &UnixStream, token: u64) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.watch(stream.as_raw_fd(), token, events)
    }

    /// Takes the clients that wait. Those that cannot be taken now wait for the next one's event.
    fn accept_clients(&mut self) {
        loop {
            let Some(Ok((client, _))) = self.listener.as_ref().map(UnixListener::accept) else {
                return;
            };
            if self.clients.len() >= MAX_CLIENTS {
                // The one that has kept the others waiting longest.
                if let Some(oldest) = self.clients.keys().min().copied() {
                    self.clients.remove(&oldest);
                }
            }
            let token = self.new_token();
            match self.watch_stream(&client, token) {
                Ok(()) => drop(self.clients.insert(token, client)),
                Err(error) => tracing::warn!(%error, "watching a vsock client"),
            }
        }
    }

    /// Opens a connection to a port of the guest.
    fn request(&mut self, token: u64, guest_port: u32, stream: UnixStream, origin: Origin) {
        if !self.make_room() {
            if let Origin::Process(reply) = origin {
                // Whoever asked may have given up.
                let _ = reply.send(Err(io::Error::from_raw_os_error(libc::EMFILE)));
            }
            return;
        }
        let mut ports = Ports {
            host: self.next_port,
            guest: guest_port,
        };
        // Ends: there are fewer connections than ports.
        while self.by_ports.contains_key(&ports) {
            ports.host = ports.host.wrapping_add(1).max(FIRST_HOST_PORT);
        }
        self.next_port = ports.host.wrapping_add(1).max(FIRST_HOST_PORT);
        let connection = Connection::requested(ports, self.guest_cid, stream, origin);
        self.insert(token, connection);
    }

    fn insert(&mut self, token: u64, connection: Connection) {
        self.by_ports.insert(connection.ports, token);
        self.connections.insert(token, connection);
        self.queue(token);
    }

    /// Whether one more connection may be. One that is closed on the other side gives way.
    fn make_room(&mut self) -> bool {
        if self.connections.len() < MAX_CONNECTIONS {
            return true;
        }
        let mut all = self.connections.iter();
        let over =
            all.find(|(token, c)| c.is_closing() || self.by_ports.get(&c.ports) != Some(*token));
        match over.map(|(&token, _)| token) {
            Some(token) => {
                self.settle(token, Fate::Reset);
                true
            }
            None => false,
        }
    }

    /// Puts a connection in the queue if it may have something for the guest.
    fn queue(&mut self, token: u64) {
        if let Some(connection) = self.connections.get_mut(&token)
            && !connection.queued
            && self.by_ports.get(&connection.ports) == Some(&token)
            && connection.has_output()
        {
            connection.queued = true;
            self.ready.push_back(token);
        }
    }

    fn settle(&mut self, token: u64, fate: Fate) {
        let Some(connection) = self.connections.get(&token) else {
            return;
        };
        let ports = connection.ports;
        let lingering = self.by_ports.get(&ports) != Some(&token);
        match fate {
            Fate::Keep if lingering && connection.is_drained() => {
                self.connections.remove(&token);
            }
            Fate::Keep => self.queue(token),
            Fate::Reset | Fate::Forget => {
                self.connections.remove(&token);
                if !lingering {
                    self.by_ports.remove(&ports);
                    if fate == Fate::Reset {
                        self.reply_reset(ports);
                    }
                }
            }
            Fate::Linger => {
                self.by_ports.remove(&ports);
            }
        }
    }

    fn on_socket(&mut self, token: u64, events: EventSet) {
        if let Some(client) = self.clients.get(&token) {
            match read_request(client) {
                Request::Incomplete => {}
                Request::Invalid => drop(self.clients.remove(&token)),
                Request::Connect(port) => {
                    if let Some(client) = self.clients.remove(&token) {
                        self.request(token, port, client, Origin::Client);
                    }
                }
            }
            return;
        }
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        let readable = events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        let fate = connection.on_event(readable, events.contains(EventSet::OUT), hung_up);
        self.settle(token, fate);
    }

    fn reply_reset(&mut self, ports: Ports) {
        self.replies.push_back(Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: ports.host,
            destination_port: ports.guest,
            length: 0,
            kind: TYPE_STREAM,
            op: Some(Op::Reset),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        });
    }

    /// Moves packets both ways until there is nothing to do or it is time to look at events.
    fn pump(&mut self) {
        self.again = false;
        let Some(mut queues) = self.queues.take() else {
            return;
        };
        if !self.tell_loss(&mut queues) {
            self.queues = Some(queues);
            return;
        }
        queues.tx.disable_notification();
        queues.rx.disable_notification();
        let mut received = 0;
        let mut sent = 0;
        while received < PACKETS_A_TURN && self.replies.len() < MAX_REPLIES {
            let Some(chain) = queues.tx.pop() else {
                break;
            };
            received += 1;
            self.receive(&queues.tx, &chain);
            queues.tx.complete(chain, 0);
        }
        let mut starved = false;
        while sent < PACKETS_A_TURN && self.has_output() {
            let Some(chain) = queues.spare.take().or_else(|| queues.rx.pop()) else {
                starved = true;
                break;
            };
            match self.send(&queues.rx, &chain) {
                Some(length) => {
                    sent += 1;
                    queues.rx.complete(chain, length);
                }
                None => {
                    queues.spare = Some(chain);
                    break;
                }
            }
        }
        if received > 0 {
            queues.tx.signal_used();
        }
        if sent > 0 {
            queues.rx.signal_used();
        }
        // Without room for answers the guest's packets wait for the receive queue.
        if self.replies.len() < MAX_REPLIES {
            self.again |= queues.tx.enable_notification();
        }
        if starved {
            self.again |= queues.rx.enable_notification();
        } else {
            self.again |= self.has_output();
        }
        self.queues = Some(queues);
    }

    /// Tells the guest that its connections are lost, if they are; whether it knows.
    fn tell_loss(&mut self, queues: &mut Queues) -> bool {
        let Some(events) = queues.event.as_mut().filter(|_| self.loss != Loss::Over) else {
            return true;
        };
        let taken = queues.event_chains.len();
        loop {
            // All there are, so that the next one is announced; of a driver that never ends, as many as it can have.
            while queues.event_chains.len() < EVENTS
                && let Some(chain) = events.pop()
            {
                queues.event_chains.push_back(chain);
            }
            let are_more = events.enable_notification();
            if !are_more || queues.event_chains.len() == EVENTS {
                break;
            }
        }
        if self.loss == Loss::Told && queues.event_chains.len() > taken {
            self.loss = Loss::Over;
        }
        if self.loss == Loss::Due
            && let Some(chain) = queues.event_chains.pop_front()
        {
            let length = chain.copy_to(events.memory(), 0, &TRANSPORT_RESET);
            events.complete(chain, length);
            events.signal_used();
            self.loss = Loss::Told;
        }
        self.loss == Loss::Over
    }

    fn has_output(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// Writes one packet into `chain`; says how long it is, if there was one.
    fn send(&mut self, rx: &VirtQueue, chain: &Chain) -> Option<usize> {
        if chain.writable_len() <= HEADER_SIZE {
            // Too small to be of use: goes back empty.
            return Some(0);
        }
        if let Some(reply) = self.replies.pop_front() {
            return Some(chain.copy_to(rx.memory(), 0, &reply.to_bytes()));
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&token) else {
                continue;
            };
            connection.queued = false;
            if self.by_ports.get(&connection.ports) != Some(&token) {
                continue;
            }
            let length = connection.send(rx.memory(), chain, &mut self.scratch);
            self.queue(token);
            if length.is_some() {
                return length;
            }
        }
        None
    }

    /// Takes one packet of the guest's.
    fn receive(&mut self, tx: &VirtQueue, chain: &Chain) {
        let memory = tx.memory();
        let Some(header) = Header::read(memory, chain) else {
            return;
        };
        if header.destination_cid != HOST_CID || header.source_cid != self.guest_cid {
            return;
        }
        let ports = Ports {
            host: header.destination_port,
            guest: header.source_port,
        };
        let Some(op) = header.op.filter(|_| header.kind == TYPE_STREAM) else {
            return self.reply_reset(ports);
        };
        let length = match op {
            Op::Data => usize::try_from(header.length).unwrap_or(usize::MAX),
            _ => 0,
        };
        let Some(&token) = self.by_ports.get(&ports) else {
            match op {
                Op::Request => self.accept(ports, &header),
                Op::Reset => {}
                _ => self.reply_reset(ports),
            }
            return;
        };
        let mut scratch = std::mem::take(&mut self.scratch);
        let data = scratch.get_mut(..length).and_then(|data| {
            let copied = chain.copy_from(memory, HEADER_SIZE, data);
            (copied == length).then_some(&*data)
        });
        let fate = match (self.connections.get_mut(&token), data) {
            (Some(connection), Some(data)) => connection.receive(op, &header, data),
            // Longer than any packet, or than its chain.
            _ => Fate::Reset,
        };
        self.scratch = scratch;
        self.settle(token, fate);
    }

    /// The guest asks for a connection to a port of the host's.
    fn accept(&mut self, ports: Ports, request: &Header) {
        if !self.make_room() {
            return self.reply_reset(ports);
        }
        let token = self.new_token();
        let accepted = UnixStream::pair().and_then(|(ours, theirs)| {
            self.watch_stream(&ours, token)?;
            self.listeners.deliver(ports.host, theirs)?;
            Ok(ours)
        });
        match accepted {
            Ok(ours) => {
                let connection = Connection::accepted(ports, self.guest_cid, ours, request);
                self.insert(token, connection);
            }
            Err(error) => {
                tracing::debug!(%error, port = ports.host, "refusing a connection of the guest's");
                self.reply_reset(ports);
            }
        }
    }
}
