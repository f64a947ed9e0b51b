//! The socket device between a driver and sockets of the host whose other ends may do anything as well.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};

use vmm::devices::virtio::vsock::{GuestCid, VsockListener};
use vmm::fuzzing::{InlineVsock, VsockHost};

use crate::input::Input;
use crate::machine::{DATA, HIGH, Machine, READ, WRITE};
use crate::queue::run;

const RX: usize = 0;
const TX: usize = 1;
const HEADER: usize = 44;
/// The most streams that the host's side keeps.
const MAX_STREAMS: usize = 32;
/// The first port on the host's side of connections that the host opens.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// What is on the host: listeners of this process, clients of the socket, and their streams.
struct Host {
    device: VsockHost,
    address: SocketAddr,
    listeners: [Option<VsockListener>; 3],
    streams: Vec<UnixStream>,
}

fn device() -> (InlineVsock, Host) {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("rt-fuzz-{}-{number}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let socket = UnixListener::bind_addr(&address).unwrap();
    socket.set_nonblocking(true).unwrap();
    let (inline, device) = InlineVsock::new(GuestCid::DEFAULT, socket).unwrap();
    let listeners = [1, 2, 3].map(|port| device.listen(port).ok());
    let host = Host {
        device,
        address,
        listeners,
        streams: Vec::new(),
    };
    (inline, host)
}

impl Host {
    fn keep(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).unwrap();
        if self.streams.len() < MAX_STREAMS {
            self.streams.push(stream);
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let kind = input.byte() % 8;
        let which = usize::from(input.byte());
        let listener = which % self.listeners.len();
        match kind {
            0 => {
                let accepted = self.listeners[listener].as_ref();
                if let Some(stream) = accepted.and_then(VsockListener::try_accept) {
                    self.keep(stream);
                }
            }
            1 => {
                let port = listener as u32 + 1;
                self.listeners[listener] = match self.listeners[listener].take() {
                    Some(_) => None,
                    None => self.device.listen(port).ok(),
                };
            }
            2 => {
                let (stream, _answer) = self.device.connect(input.byte().into()).unwrap();
                self.keep(stream);
            }
            3 => {
                let mut client = UnixStream::connect_addr(&self.address).unwrap();
                let port = input.byte();
                if port > 0 {
                    client
                        .write_all(format!("CONNECT {port}\n").as_bytes())
                        .unwrap();
                }
                let length = input.byte().into();
                client.write_all(input.bytes(length)).unwrap();
                self.keep(client);
            }
            _ if self.streams.is_empty() => {}
            4 => drop(self.streams.swap_remove(which % self.streams.len())),
            _ => {
                let streams = self.streams.len();
                let stream = &mut self.streams[which % streams];
                // A full or closed stream is as good as any, here and below.
                let _ = match kind {
                    5 => stream.write(&vec![0x55; input.u16().into()]).map(drop),
                    6 => stream.read(&mut vec![0; input.u16().into()]).map(drop),
                    _ => stream.shutdown(input.one_of(&[
                        Shutdown::Read,
                        Shutdown::Write,
                        Shutdown::Both,
                    ])),
                };
            }
        }
    }
}

/// The socket device's queues.
pub fn vsock_queue(data: &[u8]) {
    let mut input = Input::new(data);
    let (device, mut host) = device();
    let mut machine = Machine::new(Box::new(device));
    machine.bring_up(input.u64(), input.u16());
    run(machine, input, &mut |input| host.step(input));
}

/// Packets of the guest's in any order, with any numbers in them, in sound chains.
pub fn vsock_packets(data: &[u8]) {
    let mut input = Input::new(data);
    let (device, mut host) = device();
    let mut machine = Machine::new(Box::new(device));
    machine.bring_up(u64::MAX, 128);
    let mut offered = 0;
    while !input.is_empty() {
        if input.byte() & 1 == 0 {
            packet(&mut machine, &mut input);
        } else {
            host.step(&mut input);
        }
        // A guest that has no room now and then.
        let room = 64_u64.saturating_sub(offered);
        for _ in 0..room.min(u64::from(input.byte() % 16)) {
            let buffer = HIGH + 0x800 * offered_slot(&machine);
            machine.offer(RX, &[(buffer, 0x800, WRITE)]);
            offered += 1;
        }
        machine.notify(RX as u32);
        while machine.take_used(TX).is_some() {}
        while let Some((head, length)) = machine.take_used(RX) {
            offered -= 1;
            check(&machine, head, length);
        }
    }
}

/// The receive buffer that goes with the next slot of the table.
fn offered_slot(machine: &Machine) -> u64 {
    u64::from(machine.next_slot(RX) % 64)
}

fn packet(machine: &mut Machine, input: &mut Input<'_>) {
    let choice = input.byte();
    let op = u16::from(choice % 9);
    let host = match input.byte() {
        port @ ..0x80 => u32::from(port % 4),
        port @ ..0xf0 => FIRST_HOST_PORT + u32::from(port % 8),
        _ => input.u32(),
    };
    let guest = u32::from(input.byte());
    let flags = u32::from(input.byte());
    let buf_alloc = 1_u32 << (input.byte() % 32);
    let fwd_cnt = match input.byte() {
        0xff => input.u32(),
        few => 16 * u32::from(few),
    };
    let data = match op {
        5 => usize::from(input.u16()),
        _ => 0,
    };
    let length = match choice {
        0xf0.. => input.u32(),
        _ => data as u32,
    };
    let kind = if choice >= 0xe0 { input.u16() } else { 1 };
    let mut header = Vec::with_capacity(HEADER);
    header.extend(3_u64.to_le_bytes());
    header.extend(2_u64.to_le_bytes());
    for number in [guest, host, length] {
        header.extend(number.to_le_bytes());
    }
    header.extend(kind.to_le_bytes());
    header.extend(op.to_le_bytes());
    for number in [flags, buf_alloc, fwd_cnt] {
        header.extend(number.to_le_bytes());
    }
    machine.poke(DATA, &header);
    let chain = [
        (DATA, HEADER as u32, READ),
        (DATA + HEADER as u64, data as u32, READ),
    ];
    machine.offer(TX, if data > 0 { &chain } else { &chain[..1] });
    machine.notify(TX as u32);
}

/// What the device writes is a packet to the guest, as long as it says.
fn check(machine: &Machine, head: u16, length: u32) {
    let header = machine.peek::<HEADER>(HIGH + 0x800 * u64::from(head % 64));
    let [c0, c1, c2, c3] = [24, 25, 26, 27].map(|at| header[at]);
    let data = u32::from_le_bytes([c0, c1, c2, c3]);
    assert_eq!(length, HEADER as u32 + data);
    assert_eq!(header[..8], 2_u64.to_le_bytes());
    assert_eq!(header[8..16], 3_u64.to_le_bytes());
    assert!((1..=7).contains(&header[30]), "op {}", header[30]);
}
