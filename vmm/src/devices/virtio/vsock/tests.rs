//! The socket device seen from both ends: a fake driver sends packets one by one and the host's
//! end is a real Unix socket.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::connection::BUF_ALLOC;
use super::listener::Listeners;
use super::muxer::{Message, Muxer};
use super::packet::{HEADER_SIZE, Header, Op, Ports, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::*;
use crate::devices::virtio::testing::{Driver, READ, WRITE};
use crate::devices::virtio::worker::Control;

const GUEST: u64 = 3;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x40_0000;
const BUFFER: u32 = 4096 + HEADER_SIZE as u32;
const GUEST_BUFFER: u32 = 256 << 10;

/// What the guest got.
type Packet = (Header, Vec<u8>);

struct Harness {
    driver: Driver,
    muxer: Muxer,
    mailbox: Arc<Mailbox<Message>>,
    handle: VsockHandle,
    /// Receive buffers are offered while this is set.
    refill: bool,
    offered: u16,
    seen: u16,
    sent: u16,
}

impl Harness {
    fn new() -> Self {
        let driver = Driver::new(&QUEUE_SIZES);
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let listeners = Arc::<Listeners>::default();
        let muxer = Muxer::new(GUEST, &mailbox, Vec::new(), None, Arc::clone(&listeners)).unwrap();
        let handle = VsockHandle {
            mailbox: Arc::clone(&mailbox),
            listeners,
        };
        let activate = Control::Activate(driver.queues());
        mailbox.send(activate.into()).unwrap();
        let mut harness = Self {
            driver,
            muxer,
            mailbox,
            handle,
            refill: true,
            offered: 0,
            seen: 0,
            sent: 0,
        };
        harness.turn();
        harness
    }

    fn turn(&mut self) {
        while self.refill && self.offered.wrapping_sub(self.seen) < 64 {
            let slot = u64::from(self.offered % 128);
            let address = RX_BUFFERS + slot * 0x2000;
            self.driver.offer(RX, &[(address, BUFFER, WRITE)]);
            self.offered = self.offered.wrapping_add(1);
        }
        self.muxer.turn(&self.mailbox, 0).unwrap();
    }

    /// The packets that have come since the last call.
    fn packets(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        loop {
            for _ in 0..4 {
                self.turn();
            }
            let before = packets.len();
            while self.seen != self.driver.used_index(RX) {
                let (head, length) = self.driver.used_entry(RX, self.seen);
                self.seen = self.seen.wrapping_add(1);
                let address = RX_BUFFERS + u64::from(head) * 0x2000;
                let raw = self.driver.read(address, usize::try_from(length).unwrap());
                let (header, data) = raw.split_first_chunk::<HEADER_SIZE>().unwrap();
                let header = Header::from_bytes(header);
                assert_eq!(header.length as usize, data.len());
                assert_eq!((header.source_cid, header.destination_cid), (2, GUEST));
                packets.push((header, data.to_vec()));
            }
            if packets.len() == before {
                return packets;
            }
        }
    }

    fn ops(&mut self) -> Vec<Op> {
        let packets = self.packets();
        packets.iter().map(|(h, _)| h.op.unwrap()).collect()
    }

    fn raw(&mut self, header: Header, data: &[u8]) {
        let slot = u64::from(self.sent % 32);
        self.sent = self.sent.wrapping_add(1);
        let address = TX_BUFFERS + slot * 0x1_1000;
        self.driver.write(address, &header.to_bytes());
        self.driver.write(address + HEADER_SIZE as u64, data);
        let length = u32::try_from(HEADER_SIZE + data.len()).unwrap();
        self.driver.offer(TX, &[(address, length, READ)]);
        self.turn();
    }

    fn send(&mut self, guest: &Guest, op: Op, flags: u32, data: &[u8]) {
        self.raw(guest.header(op, flags, data.len()), data);
    }

    /// The guest connects to a port of this process.
    fn guest_connects(&mut self, port: u32) -> (Guest, UnixStream, VsockListener) {
        let listener = self.handle.listen(port).unwrap();
        let guest = Guest::new(port, 5000);
        self.send(&guest, Op::Request, 0, &[]);
        assert_eq!(self.ops(), [Op::Response]);
        let stream = listener.try_accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        (guest, stream, listener)
    }
}

const RX: usize = 0;
const TX: usize = 1;

/// The guest's side of one connection.
struct Guest {
    ports: Ports,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Guest {
    fn new(host: u32, guest: u32) -> Self {
        Self {
            ports: Ports { host, guest },
            buf_alloc: GUEST_BUFFER,
            fwd_cnt: 0,
        }
    }

    fn header(&self, op: Op, flags: u32, length: usize) -> Header {
        Header {
            source_cid: GUEST,
            destination_cid: HOST_CID,
            source_port: self.ports.guest,
            destination_port: self.ports.host,
            length: u32::try_from(length).unwrap(),
            kind: TYPE_STREAM,
            op: Some(op),
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }
}

fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut part = [0; 4096];
    while let Ok(n @ 1..) = stream.read(&mut part) {
        all.extend(&part[..n]);
    }
    all
}

#[test]
fn a_guest_connects_and_bytes_go_both_ways() {
    let mut harness = Harness::new();
    let (guest, mut stream, _listener) = harness.guest_connects(1024);
    harness.send(&guest, Op::Data, 0, b"from the guest");
    assert_eq!(read_all(&mut stream), b"from the guest");
    stream.write_all(b"from the host").unwrap();
    let packets = harness.packets();
    assert_eq!(packets.len(), 1);
    let (header, data) = &packets[0];
    assert_eq!(header.op, Some(Op::Data));
    assert_eq!(header.fwd_cnt, 14);
    assert_eq!(header.buf_alloc, BUF_ALLOC);
    assert_eq!(data, b"from the host");
}

#[test]
fn a_port_without_a_listener_is_refused() {
    let mut harness = Harness::new();
    harness.send(&Guest::new(7, 5000), Op::Request, 0, &[]);
    assert_eq!(harness.ops(), [Op::Reset]);
    let (_, _, listener) = harness.guest_connects(7);
    drop(listener);
    harness.send(&Guest::new(7, 5001), Op::Request, 0, &[]);
    assert!(harness.ops().contains(&Op::Reset));
}

#[test]
fn the_process_connects_and_is_told_the_outcome() {
    let mut harness = Harness::new();
    for (answer, expected) in [
        (Op::Response, None),
        (Op::Reset, Some(io::ErrorKind::ConnectionRefused)),
    ] {
        let handle = harness.handle.clone();
        let thread = std::thread::spawn(move || handle.connect(1025));
        let header = loop {
            let mut packets = harness.packets().into_iter().map(|(header, _)| header);
            if let Some(header) = packets.find(|header| header.op == Some(Op::Request)) {
                break header;
            }
        };
        assert_eq!(header.destination_port, 1025);
        let guest = Guest::new(header.source_port, 1025);
        harness.send(&guest, answer, 0, &[]);
        let error = thread.join().unwrap().err().map(|e| e.kind());
        assert_eq!(error, expected);
    }
}

#[test]
fn the_hosts_end_of_data_leaves_the_other_direction_open() {
    let mut harness = Harness::new();
    let (guest, mut stream, _listener) = harness.guest_connects(1024);
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let packets = harness.packets();
    let ops: Vec<_> = packets.iter().map(|(h, _)| h.op.unwrap()).collect();
    assert_eq!(ops, [Op::Data, Op::Shutdown]);
    assert_eq!(packets[1].0.flags, SHUTDOWN_SEND);
    harness.send(&guest, Op::Data, 0, b"answer");
    assert_eq!(read_all(&mut stream), b"answer");
    // The guest closes as well: nothing is left to say, and both sides know.
    harness.send(&guest, Op::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, &[]);
    assert_eq!(harness.ops(), [Op::Reset]);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_guests_end_of_data_leaves_the_other_direction_open() {
    let mut harness = Harness::new();
    let (guest, mut stream, _listener) = harness.guest_connects(1024);
    harness.send(&guest, Op::Data, 0, b"last words");
    harness.send(&guest, Op::Shutdown, SHUTDOWN_SEND, &[]);
    stream.set_nonblocking(false).unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last words");
    stream.write_all(b"answer").unwrap();
    let packets = harness.packets();
    assert_eq!(packets[0].1, b"answer");
    drop(stream);
    let packets = harness.packets();
    assert_eq!(packets[0].0.op, Some(Op::Shutdown));
    assert_eq!(packets[0].0.flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    harness.send(&guest, Op::Reset, 0, &[]);
    assert!(harness.ops().is_empty());
}

#[test]
fn a_host_that_dies_is_reported_with_both_directions() {
    let mut harness = Harness::new();
    let (guest, stream, _listener) = harness.guest_connects(1024);
    drop(stream);
    let packets = harness.packets();
    assert_eq!(packets[0].0.flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    // What the guest sends before it has seen that is swallowed.
    harness.send(&guest, Op::Data, 0, b"too late");
    assert!(!harness.ops().contains(&Op::Reset));
    harness.send(&guest, Op::Reset, 0, &[]);
    harness.send(&guest, Op::Data, 0, b"much too late");
    assert_eq!(harness.ops(), [Op::Reset]);
}

#[test]
fn a_guest_without_room_gets_no_data_and_is_asked_for_credit_once() {
    let mut harness = Harness::new();
    let (mut guest, mut stream, _listener) = harness.guest_connects(1024);
    guest.buf_alloc = 10;
    harness.send(&guest, Op::CreditUpdate, 0, &[]);
    stream.write_all(b"0123456789abcdef").unwrap();
    let packets = harness.packets();
    assert_eq!(packets[0].1, b"0123456789");
    assert_eq!(packets[1].0.op, Some(Op::CreditRequest));
    assert_eq!(packets.len(), 2);
    guest.fwd_cnt = 4;
    harness.send(&guest, Op::CreditUpdate, 0, &[]);
    assert_eq!(harness.packets()[0].1, b"abcd");
    // Claims to have consumed what it was never sent: that is no room.
    guest.fwd_cnt = 1000;
    harness.send(&guest, Op::CreditUpdate, 0, &[]);
    assert!(!harness.ops().contains(&Op::Data));
}

#[test]
fn a_guest_that_ignores_our_credit_is_reset() {
    let mut harness = Harness::new();
    let (guest, stream, _listener) = harness.guest_connects(1024);
    let packet = [7; 32 << 10];
    let mut sent = 0usize;
    let ops = loop {
        harness.send(&guest, Op::Data, 0, &packet);
        sent += packet.len();
        let ops = harness.ops();
        if ops.contains(&Op::Reset) {
            break ops;
        }
        assert!(sent < 4 << 20, "no limit is kept");
    };
    assert_eq!(ops, [Op::Reset]);
    // The host's socket buffer and ours; not a byte more.
    assert!(sent > BUF_ALLOC as usize);
    drop(stream);
}

#[test]
fn a_stalled_host_gets_everything_even_after_the_guest_is_gone() {
    let mut harness = Harness::new();
    let (mut guest, mut stream, _listener) = harness.guest_connects(1024);
    let mut sent = Vec::new();
    let mut told = 0;
    // Until the credit is used up, because the host does not read.
    while sent.len() - told as usize + 8192 <= BUF_ALLOC as usize {
        let packet: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
        harness.send(&guest, Op::Data, 0, &packet);
        sent.extend(packet);
        if let Some((header, _)) = harness.packets().last() {
            told = header.fwd_cnt;
        }
        guest.fwd_cnt = 0;
    }
    harness.send(&guest, Op::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, &[]);
    harness.send(&guest, Op::Reset, 0, &[]);
    // The same ports again, while the old data is still on its way.
    let (_again, _stream, _listener) = {
        drop(_listener);
        harness.guest_connects(1024)
    };
    let mut got = Vec::new();
    while got.len() < sent.len() {
        let part = read_all(&mut stream);
        got.extend(part);
        harness.turn();
    }
    assert!(got == sent);
    stream.set_nonblocking(false).unwrap();
    harness.turn();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn protocol_violations_reset_the_connection() {
    let mut harness = Harness::new();
    let (guest, _stream, _listener) = harness.guest_connects(1);
    harness.send(&guest, Op::Request, 0, &[]);
    assert_eq!(harness.ops(), [Op::Reset]);
    let (guest, _stream, _listener) = harness.guest_connects(2);
    harness.send(&guest, Op::Response, 0, &[]);
    assert_eq!(harness.ops(), [Op::Reset]);
    let (guest, _stream, _listener) = harness.guest_connects(3);
    harness.send(&guest, Op::Shutdown, SHUTDOWN_SEND, &[]);
    harness.send(&guest, Op::Data, 0, b"more");
    assert_eq!(harness.ops(), [Op::Reset]);
    let (guest, _stream, _listener) = harness.guest_connects(4);
    // More data announced than the chain has.
    harness.raw(guest.header(Op::Data, 0, 100), b"short");
    assert_eq!(harness.ops(), [Op::Reset]);
    let (guest, _stream, _listener) = harness.guest_connects(5);
    let mut header = guest.header(Op::Data, 0, 0);
    header.length = u32::MAX;
    harness.raw(header, b"");
    assert_eq!(harness.ops(), [Op::Reset]);
}

#[test]
fn packets_for_others_or_of_other_kinds_reach_nobody() {
    let mut harness = Harness::new();
    let (guest, mut stream, _listener) = harness.guest_connects(1024);
    let mut header = guest.header(Op::Data, 0, 3);
    header.destination_cid = 9;
    harness.raw(header, b"abc");
    header = guest.header(Op::Data, 0, 3);
    header.source_cid = 4;
    harness.raw(header, b"abc");
    assert!(harness.ops().is_empty());
    header = guest.header(Op::Data, 0, 3);
    header.kind = 2;
    harness.raw(header, b"abc");
    header.kind = TYPE_STREAM;
    header.op = None;
    harness.raw(header, b"abc");
    assert_eq!(harness.ops(), [Op::Reset, Op::Reset]);
    assert!(read_all(&mut stream).is_empty());
}

#[test]
fn answers_wait_for_room_and_are_bounded() {
    let mut harness = Harness::new();
    assert!(harness.packets().is_empty());
    // No more receive buffers: use up those that are out.
    harness.refill = false;
    let mut taken = 0;
    for port in 0..2000 {
        harness.send(&Guest::new(9, port), Op::Request, 0, &[]);
        taken = harness.driver.used_index(TX);
        if usize::from(taken) < usize::try_from(port).unwrap() {
            break;
        }
    }
    assert!((256..=400).contains(&taken), "{taken}");
    harness.refill = true;
    let resets = harness.ops().len();
    assert_eq!(resets, usize::from(harness.driver.used_index(TX)));
}

#[test]
fn a_client_of_the_host_socket_is_connected_by_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let socket = HostSocket::bind(directory.path(), "v.sock").unwrap();
    let mut harness = Harness::new();
    let listener = socket.into_listener();
    harness.muxer = Muxer::new(
        GUEST,
        &harness.mailbox,
        Vec::new(),
        Some(listener),
        Arc::default(),
    )
    .unwrap();
    harness.offered = 0;
    harness.driver = Driver::new(&QUEUE_SIZES);
    let activate = Control::Activate(harness.driver.queues());
    harness.mailbox.send(activate.into()).unwrap();
    let mut client = UnixStream::connect(directory.path().join("v.sock")).unwrap();
    client.write_all(b"CONNECT 52\nearly").unwrap();
    let packets = harness.packets();
    assert_eq!(packets.len(), 1);
    assert_eq!(packets[0].0.op, Some(Op::Request));
    assert_eq!(packets[0].0.destination_port, 52);
    let guest = Guest::new(packets[0].0.source_port, 52);
    harness.send(&guest, Op::Response, 0, &[]);
    assert_eq!(harness.packets()[0].1, b"early");
    client.set_nonblocking(true).unwrap();
    let expected = format!("OK {}\n", guest.ports.host);
    assert_eq!(read_all(&mut client), expected.as_bytes());
    // Several at once, and more than may be silent.
    let path = directory.path().join("v.sock");
    let silent: Vec<_> = (0..100)
        .map(|_| {
            harness.turn();
            UnixStream::connect(&path).unwrap()
        })
        .collect();
    harness.turn();
    let turned_away = silent.iter().filter(|client| {
        let mut client: &UnixStream = client;
        client.set_nonblocking(true).unwrap();
        matches!(client.read(&mut [0]), Ok(0))
    });
    assert_eq!(turned_away.count(), 36);
    drop(silent);
    harness.turn();
    // One that is refused sees the end of its stream.
    let mut client = UnixStream::connect(directory.path().join("v.sock")).unwrap();
    client.write_all(b"CONNECT 53\n").unwrap();
    let port = harness.packets()[0].0.source_port;
    harness.send(&Guest::new(port, 53), Op::Reset, 0, &[]);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn ten_mebibytes_go_each_way_at_once() {
    const TOTAL: usize = 10 << 20;
    let mut harness = Harness::new();
    let (mut guest, stream, _listener) = harness.guest_connects(1024);
    stream.set_nonblocking(false).unwrap();
    let pattern = |i: usize| (i % 251) as u8;
    let reader = {
        let mut stream = stream.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            all
        })
    };
    let writer = std::thread::spawn(move || {
        let data: Vec<u8> = (0..TOTAL).map(pattern).collect();
        (&stream).write_all(&data).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        stream
    });
    let mut got: Vec<u8> = Vec::new();
    let mut sent = 0;
    let mut forwarded = 0;
    let mut host_done = false;
    while sent < TOTAL || !host_done {
        let room = BUF_ALLOC as usize - (sent - forwarded);
        let length = room.min(32 << 10).min(TOTAL - sent);
        if length > 0 {
            let data: Vec<u8> = (sent..sent + length).map(pattern).collect();
            harness.send(&guest, Op::Data, 0, &data);
            sent += length;
            if sent == TOTAL {
                harness.send(&guest, Op::Shutdown, SHUTDOWN_SEND, &[]);
            }
        }
        harness.muxer.turn(&harness.mailbox, 1).unwrap();
        for (header, data) in harness.packets() {
            got.extend(&data);
            guest.fwd_cnt = u32::try_from(got.len()).unwrap();
            forwarded = header.fwd_cnt as usize;
            host_done |= header.op == Some(Op::Shutdown);
        }
        harness.send(&guest, Op::CreditUpdate, 0, &[]);
    }
    assert!(got.iter().enumerate().all(|(i, &b)| b == pattern(i)));
    assert_eq!(got.len(), TOTAL);
    drop(writer.join().unwrap());
    while !reader.is_finished() {
        harness.muxer.turn(&harness.mailbox, 1).unwrap();
    }
    let all = reader.join().unwrap();
    assert_eq!(all.len(), TOTAL);
    assert!(all.iter().enumerate().all(|(i, &b)| b == pattern(i)));
}

#[test]
fn a_reset_of_the_device_ends_all_connections() {
    let mut harness = Harness::new();
    let (_, mut stream, _listener) = harness.guest_connects(1024);
    let (done, wait) = mpsc::sync_channel(1);
    let message = Control::Reset(done).into();
    harness.mailbox.send(message).unwrap();
    harness.turn();
    wait.recv().unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_device_runs_its_thread_and_stops_it() {
    let mut device = Vsock::new(GuestCid::DEFAULT, None, &ThreadHook::none()).unwrap();
    let mut cid = [0xff; 8];
    device.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 3);
    let mut driver = Driver::new(&QUEUE_SIZES);
    device.activate(driver.queues(), 0);
    driver.offer(RX, &[(RX_BUFFERS, BUFFER, WRITE)]);
    let header = Guest::new(9, 1).header(Op::Request, 0, 0);
    driver.write(TX_BUFFERS, &header.to_bytes());
    driver.offer(TX, &[(TX_BUFFERS, HEADER_SIZE as u32, READ)]);
    device.queue_events()[TX].write(1).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while driver.used_index(RX) == 0 {
        assert!(std::time::Instant::now() < deadline, "no answer");
        std::thread::yield_now();
    }
    device.reset();
    let handle = device.handle();
    drop(device);
    let error = handle.connect(1).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn addresses_with_a_meaning_are_no_guests() {
    for cid in [0, 1, 2, u32::MAX] {
        assert!(GuestCid::new(cid).is_none());
    }
    assert_eq!(GuestCid::new(3), Some(GuestCid::DEFAULT));
}

#[test]
fn a_guest_hears_of_no_connection_before_it_has_ended_its_lost_ones() {
    const EVENT: usize = 2;
    const EVENTS: u64 = 0x30_0000;
    let mut harness = Harness::new();
    for slot in 0..2 {
        let buffer = (EVENTS + slot * 8, 8, WRITE);
        harness.driver.offer(EVENT, &[buffer]);
        harness.driver.write(EVENTS + slot * 8, &[0xff; 8]);
    }
    let next_port = (1 << 30) + 7;
    harness.mailbox.send(Message::Lost { next_port }).unwrap();
    let handle = harness.handle.clone();
    let thread = std::thread::spawn(move || handle.connect(1025));
    let lost = Guest::new(1024, 5000);
    harness.send(&lost, Op::Data, 0, b"x");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(harness.ops(), []);
    assert_eq!(harness.driver.used(EVENT), [(0, 4)]);
    assert_eq!(harness.driver.read(EVENTS, 5), [0, 0, 0, 0, 0xff]);
    // It has: it gives the event's buffer back.
    harness.driver.offer(EVENT, &[(EVENTS, 8, WRITE)]);
    let limit = std::time::Instant::now() + Duration::from_secs(20);
    let mut ops = Vec::new();
    while ops.len() < 2 {
        assert!(std::time::Instant::now() < limit, "{ops:?}");
        ops.extend(harness.packets().into_iter().map(|(header, _)| header));
    }
    let [reset, request] = ops.as_slice() else {
        panic!("{ops:?}")
    };
    assert_eq!(reset.op, Some(Op::Reset));
    assert_eq!(
        (request.op, request.source_port),
        (Some(Op::Request), next_port)
    );
    let guest = Guest::new(request.source_port, 1025);
    harness.send(&guest, Op::Response, 0, &[]);
    thread.join().unwrap().unwrap();
    assert_eq!(harness.driver.used(EVENT).len(), 1);
}

#[test]
fn what_a_guest_that_ended_has_sent_reaches_the_host() {
    let mut harness = Harness::new();
    let (guest, mut stream, _listener) = harness.guest_connects(1024);
    harness.send(&guest, Op::Data, 0, b"last words");
    harness.mailbox.send(Message::Finish).unwrap();
    harness.turn();
    assert_eq!(read_all(&mut stream), b"last words");
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}
