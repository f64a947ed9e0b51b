//! One stream between a guest's socket and a Unix socket of the host, with credit both ways.
//!
//! Each side may lie or stall. The guest gets no more buffer here than was announced to it: what
//! exceeds that ends the connection. A host that does not read fills that buffer and no more.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;

use nix::sys::socket::{MsgFlags, send};

use super::packet::{HEADER_SIZE, Header, Op, Ports, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use crate::devices::virtio::queue::Chain;
use crate::memory::GuestRam;

/// The buffer that each connection grants to the guest, in bytes.
pub const BUF_ALLOC: u32 = 64 << 10;
/// The most data in a packet either way (Linux's limit as well).
pub const MAX_DATA: usize = 64 << 10;

/// Who on the host asked for the connection, and how to tell that it is there.
#[derive(Debug)]
pub enum Origin {
    /// A client on the host's Unix socket, which waits for a line.
    Client,
    /// [`super::VsockHandle::connect`].
    Process(SyncSender<io::Result<()>>),
}

/// What becomes of a connection after a packet.
#[derive(Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Keep,
    /// It is over; the guest is to get a RST.
    Reset,
    /// It is over, and the guest knows.
    Forget,
    /// The guest has forgotten it, but the host has not got all of the data yet.
    Linger,
}

/// The state of one stream.
#[derive(Debug)]
pub struct Connection {
    pub ports: Ports,
    guest_cid: u64,
    stream: UnixStream,
    /// Present until the connection is established.
    origin: Option<Origin>,
    request_due: bool,
    response_due: bool,

    /// From the guest, not yet taken by the host's socket.
    backlog: VecDeque<u8>,
    /// Bytes that came from the guest, and those of them that left the backlog.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// The `forwarded` that the guest was last told.
    announced: Wrapping<u32>,
    credit_update_due: bool,
    guest_sends_no_more: bool,
    writable: bool,
    /// The host's socket takes no more.
    host_deaf: bool,

    /// Bytes sent to the guest, and what the guest says of its buffer.
    sent: Wrapping<u32>,
    peer_buf_alloc: u32,
    peer_fwd_cnt: Wrapping<u32>,
    credit_requested: bool,
    readable: bool,
    /// The host's socket has reached its end.
    host_done: bool,
    guest_receives_no_more: bool,

    shutdown_sent: u32,
    /// Whether the connection stands in the queue of those with something to send.
    pub queued: bool,
}

impl Connection {
    /// A connection that the host opens: the guest is sent a REQUEST.
    pub fn requested(ports: Ports, guest_cid: u64, stream: UnixStream, origin: Origin) -> Self {
        Self {
            request_due: true,
            origin: Some(origin),
            ..Self::new(ports, guest_cid, stream)
        }
    }

    /// A connection that the guest opened with this REQUEST: it is sent a RESPONSE.
    pub fn accepted(ports: Ports, guest_cid: u64, stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self {
            response_due: true,
            ..Self::new(ports, guest_cid, stream)
        };
        connection.take_credit(request);
        connection
    }

    fn new(ports: Ports, guest_cid: u64, stream: UnixStream) -> Self {
        Self {
            ports,
            guest_cid,
            stream,
            origin: None,
            request_due: false,
            response_due: false,
            backlog: VecDeque::new(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            credit_update_due: false,
            guest_sends_no_more: false,
            // Edge-triggered events tell of changes: what holds now is found out by trying.
            writable: true,
            host_deaf: false,
            sent: Wrapping(0),
            peer_buf_alloc: 0,
            peer_fwd_cnt: Wrapping(0),
            credit_requested: false,
            readable: true,
            host_done: false,
            guest_receives_no_more: false,
            shutdown_sent: 0,
            queued: false,
        }
    }

    /// Whether the host has taken all that the guest has sent.
    pub fn is_drained(&self) -> bool {
        self.backlog.is_empty()
    }

    fn established(&self) -> bool {
        self.origin.is_none()
    }

    /// Whether both directions are closed and only the guest's RST is awaited.
    pub fn is_closing(&self) -> bool {
        self.shutdown_sent == SHUTDOWN_RECEIVE | SHUTDOWN_SEND
    }

    /// How much the guest can take now. A guest that claims to have consumed more than it was
    /// sent has no room.
    fn credit(&self) -> u32 {
        let in_flight = self.sent - self.peer_fwd_cnt;
        self.peer_buf_alloc.saturating_sub(in_flight.0)
    }

    fn take_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// Whether there may be a packet to send to the guest.
    pub fn has_output(&self) -> bool {
        if !self.established() {
            return self.request_due;
        }
        self.response_due
            || self.credit_update_due
            || self.shutdown_due() != 0
            || self.wants_to_read() && (self.credit() > 0 || !self.credit_requested)
    }

    fn wants_to_read(&self) -> bool {
        self.readable && !self.host_done && !self.guest_receives_no_more
    }

    fn shutdown_due(&self) -> u32 {
        let mut flags = 0;
        if self.host_done {
            flags |= SHUTDOWN_SEND;
        }
        if self.host_deaf && !self.guest_sends_no_more {
            flags |= SHUTDOWN_RECEIVE;
        }
        // With both directions at their end the guest is to forget the connection.
        if self.host_done && self.host_deaf {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags & !self.shutdown_sent
    }

    /// Handles a packet from the guest. `data` is what the packet carries: `header.length` bytes.
    pub fn receive(&mut self, op: Op, header: &Header, data: &[u8]) -> Fate {
        self.take_credit(header);
        match op {
            Op::Request => Fate::Reset,
            Op::Response => self.receive_response(),
            Op::Reset => {
                if let Some(Origin::Process(reply)) = self.origin.take() {
                    // Whoever asked may have given up.
                    let _ = reply.send(Err(io::ErrorKind::ConnectionRefused.into()));
                }
                if self.guest_sends_no_more && !self.backlog.is_empty() {
                    Fate::Linger
                } else {
                    Fate::Forget
                }
            }
            _ if !self.established() => Fate::Reset,
            Op::Shutdown => self.receive_shutdown(header.flags),
            Op::Data => self.receive_data(data),
            Op::CreditUpdate => Fate::Keep,
            Op::CreditRequest => {
                self.credit_update_due = true;
                Fate::Keep
            }
        }
    }

    fn receive_response(&mut self) -> Fate {
        match self.origin.take() {
            Some(Origin::Client) => {
                let line = format!("OK {}\n", self.ports.host);
                // A socket that nothing was written to has room for a line.
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                match send(self.stream.as_raw_fd(), line.as_bytes(), flags) {
                    Ok(length) if length == line.len() => Fate::Keep,
                    _ => Fate::Reset,
                }
            }
            Some(Origin::Process(reply)) => match reply.send(Ok(())) {
                Ok(()) => Fate::Keep,
                Err(_) => Fate::Reset,
            },
            None => Fate::Reset,
        }
    }

    /// The guest is gone: what it sent is still the host's.
    pub fn end(&mut self) -> Fate {
        self.guest_receives_no_more = true;
        self.guest_sends_no_more = true;
        self.after_flush()
    }

    fn receive_shutdown(&mut self, flags: u32) -> Fate {
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_receives_no_more {
            self.guest_receives_no_more = true;
            // Fails only if the host's end is gone already.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_sends_no_more = true;
        }
        self.after_flush()
    }

    fn receive_data(&mut self, data: &[u8]) -> Fate {
        let Ok(length) = u32::try_from(data.len()) else {
            return Fate::Reset;
        };
        let held = self.received - self.forwarded;
        let fits = held.0.checked_add(length).is_some_and(|n| n <= BUF_ALLOC);
        if !fits || self.guest_sends_no_more {
            return Fate::Reset;
        }
        self.received += length;
        let mut rest = data;
        if self.backlog.is_empty() {
            match self.write(data) {
                Ok(written) => rest = &data[written..],
                Err(()) => rest = &[],
            }
        }
        self.backlog.extend(rest);
        Fate::Keep
    }

    /// Writes to the host's socket what it takes now. An error means that it will never take more.
    fn write(&mut self, data: &[u8]) -> Result<usize, ()> {
        let mut done = 0;
        while done < data.len() && self.writable && !self.host_deaf {
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match send(self.stream.as_raw_fd(), &data[done..], flags) {
                Ok(n) => done += n,
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => self.writable = false,
                Err(_) => self.host_deaf = true,
            }
        }
        if self.host_deaf {
            self.drop_backlog();
            return Err(());
        }
        self.count_forwarded(done);
        Ok(done)
    }

    fn count_forwarded(&mut self, bytes: usize) {
        // No more than BUF_ALLOC is ever held.
        self.forwarded += u32::try_from(bytes).unwrap_or(u32::MAX);
        if (self.forwarded - self.announced).0 >= BUF_ALLOC / 2 {
            self.credit_update_due = true;
        }
    }

    /// Nobody will read what the guest has sent.
    fn drop_backlog(&mut self) {
        self.backlog = VecDeque::new();
        self.forwarded = self.received;
    }

    /// The host's socket has become readable, writable or both.
    pub fn on_event(&mut self, readable: bool, writable: bool, hung_up: bool) -> Fate {
        self.readable |= readable || hung_up;
        self.writable |= writable;
        if hung_up && !self.host_deaf {
            self.host_deaf = true;
            self.drop_backlog();
        }
        self.flush()
    }

    fn flush(&mut self) -> Fate {
        let mut backlog = std::mem::take(&mut self.backlog);
        while !backlog.is_empty() && self.writable {
            match self.write(backlog.as_slices().0) {
                Ok(written) => drop(backlog.drain(..written)),
                Err(()) => return self.after_flush(),
            }
        }
        if !backlog.is_empty() {
            self.backlog = backlog;
        }
        self.after_flush()
    }

    /// Passes the guest's end of data on, once all of the data is.
    fn after_flush(&mut self) -> Fate {
        if !self.guest_sends_no_more || !self.backlog.is_empty() {
            return Fate::Keep;
        }
        if self.guest_receives_no_more {
            return Fate::Reset;
        }
        if !self.host_deaf {
            self.host_deaf = true;
            // Fails only if the host's end is gone already.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Fate::Keep
    }

    /// Writes the next packet for the guest into `chain`; says how long it is, if there is one.
    /// `scratch` holds [`MAX_DATA`] bytes.
    pub fn send(&mut self, memory: &GuestRam, chain: &Chain, scratch: &mut [u8]) -> Option<usize> {
        if !self.established() {
            if !std::mem::take(&mut self.request_due) {
                return None;
            }
            return self.put(memory, chain, Op::Request, 0, 0);
        }
        if std::mem::take(&mut self.response_due) {
            return self.put(memory, chain, Op::Response, 0, 0);
        }
        if self.wants_to_read() {
            let room = chain.writable_len().saturating_sub(HEADER_SIZE);
            let credit = usize::try_from(self.credit()).unwrap_or(usize::MAX);
            let limit = room.min(credit).min(scratch.len());
            if limit > 0 {
                let length = self.read(&mut scratch[..limit]);
                if length > 0 {
                    chain.copy_to(memory, HEADER_SIZE, &scratch[..length]);
                    self.sent += u32::try_from(length).unwrap_or(u32::MAX);
                    return self.put(memory, chain, Op::Data, 0, length);
                }
            } else if !self.credit_requested {
                self.credit_requested = true;
                return self.put(memory, chain, Op::CreditRequest, 0, 0);
            }
        }
        let flags = self.shutdown_due();
        if flags != 0 {
            self.shutdown_sent |= flags;
            return self.put(memory, chain, Op::Shutdown, self.shutdown_sent, 0);
        }
        if self.credit_update_due {
            return self.put(memory, chain, Op::CreditUpdate, 0, 0);
        }
        None
    }

    /// Reads from the host's socket; 0 if there is nothing (now, or ever again).
    fn read(&mut self, buffer: &mut [u8]) -> usize {
        loop {
            match self.stream.read(buffer) {
                Ok(0) => self.host_done = true,
                Ok(length) => return length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(_) => {
                    self.host_done = true;
                    self.host_deaf = true;
                    self.drop_backlog();
                }
            }
            return 0;
        }
    }

    fn put(
        &mut self,
        memory: &GuestRam,
        chain: &Chain,
        op: Op,
        flags: u32,
        length: usize,
    ) -> Option<usize> {
        let header = Header {
            source_cid: super::HOST_CID,
            destination_cid: self.guest_cid,
            source_port: self.ports.host,
            destination_port: self.ports.guest,
            // At most MAX_DATA.
            length: u32::try_from(length).unwrap_or(0),
            kind: TYPE_STREAM,
            op: Some(op),
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded.0,
        };
        self.announced = self.forwarded;
        self.credit_update_due = false;
        chain.copy_to(memory, 0, &header.to_bytes());
        Some(HEADER_SIZE + length)
    }
}
