//! The device between a driver and a packet socket on its tap device, in a network namespace of the test's own.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};

use super::super::testing::{Driver, READ, WRITE};
use super::*;

const MERGEABLE: u64 = FEATURES;
const HEADER: usize = 12;
const PATIENCE: u16 = 10_000;

/// A frame of a type that nothing else sends.
fn frame(length: usize, fill: u8) -> Vec<u8> {
    let mut frame = vec![fill; length];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// The other side of the tap device: what the host's kernel sees of it.
struct Link(OwnedFd);

impl Link {
    fn open(tap: &Tap) -> Self {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let protocol = 0x88b5_u16.to_be();
        let mut request: libc::ifreq = unsafe_zeroed();
        for (target, byte) in request.ifr_name.iter_mut().zip(tap.name().bytes()) {
            *target = byte.cast_signed();
        }
        // SAFETY: makes a socket; the descriptor is ours.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_PACKET, kind, protocol.into());
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: both requests take an `ifreq` that outlives the call; the kernel fills in the index.
        let index = unsafe {
            assert_eq!(
                libc::ioctl(
                    socket.as_raw_fd(),
                    libc::SIOCGIFINDEX as libc::Ioctl,
                    &raw mut request
                ),
                0
            );
            let index = request.ifr_ifru.ifru_ifindex;
            request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
            assert_eq!(
                libc::ioctl(
                    socket.as_raw_fd(),
                    libc::SIOCSIFFLAGS as libc::Ioctl,
                    &raw mut request
                ),
                0
            );
            index
        };
        let mut address: libc::sockaddr_ll = unsafe_zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index;
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address is a `sockaddr_ll` of that length.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        Self(socket)
    }

    fn send(&self, frame: &[u8]) {
        let sent = nix::unistd::write(&self.0, frame).unwrap();
        assert_eq!(sent, frame.len());
    }

    fn receive(&self) -> Vec<u8> {
        assert!(is_ready(self.0.as_fd(), PATIENCE), "no packet");
        let mut frame = vec![0; 2000];
        let length = nix::unistd::read(self.0.as_raw_fd(), &mut frame).unwrap();
        frame.truncate(length);
        frame
    }
}

/// A structure of the C library that is only numbers.
fn unsafe_zeroed<T: Copy>() -> T {
    // SAFETY: all zeroes is a value of a structure that holds only numbers.
    unsafe { std::mem::zeroed() }
}

fn is_ready(fd: BorrowedFd<'_>, millis: u16) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(millis)).unwrap() == 1
}

/// A device with a driver that took `features`; not where there is no tap device.
fn device(features: u64) -> Option<(Driver, Net, Link)> {
    if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
        println!("skipped: a tap device needs root and /dev/net/tun");
        return None;
    }
    // Of this test's thread alone.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    for which in ["all", "default"] {
        // The kernel's own packets would come between.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1");
    }
    let tap = Tap::create("test%d").unwrap();
    let link = Link::open(&tap);
    let interface = Interface {
        tap,
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
    };
    let mut net = Net::new(interface, &ThreadHook::none()).unwrap();
    let driver = Driver::new(&QUEUE_SIZES);
    net.activate(driver.queues(), features);
    Some((driver, net, link))
}

/// Waits until the device has given back `count` chains of a queue, ever.
fn wait_for(driver: &Driver, queue: usize, count: u16) {
    // SAFETY: the descriptor is the driver's, which outlives this borrow.
    let irq = unsafe { BorrowedFd::borrow_raw(driver.irq.as_raw_fd()) };
    while driver.used_index(queue) < count {
        assert!(is_ready(irq, PATIENCE), "no interrupt");
        driver.irq.read().unwrap();
    }
}

#[test]
fn a_packet_of_the_guest_reaches_the_link() {
    let Some((mut driver, net, link)) = device(MERGEABLE) else {
        return;
    };
    let sent = frame(100, 7);
    driver.write(0x1_0000, &[0; HEADER]);
    driver.write(0x2_0000, &sent);
    driver.offer(
        1,
        &[
            (0x1_0000, HEADER as u32, READ),
            (0x2_0000, 60, READ),
            (0x2_003c, 40, READ),
        ],
    );
    net.queue_events()[1].write(1).unwrap();
    assert_eq!(link.receive(), sent);
    wait_for(&driver, 1, 1);
    assert_eq!(driver.used(1), [(0, 0)]);
}

#[test]
fn a_packet_that_the_kernel_refuses_is_dropped_and_the_next_one_sent() {
    let Some((mut driver, net, link)) = device(MERGEABLE) else {
        return;
    };
    let sent = frame(64, 9);
    // A kind of segment that does not exist; then a header that is cut off; then one to be written.
    driver.write(0x1_0000, &[0, 77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    driver.write(0x2_0000, &[0; HEADER]);
    driver.write(0x2_000c, &sent);
    driver.offer(1, &[(0x1_0000, HEADER as u32, READ), (0x2_000c, 64, READ)]);
    driver.offer(1, &[(0x2_0000, 5, READ)]);
    driver.offer(1, &[(0x3_0000, 100, WRITE)]);
    driver.offer(1, &[(0x2_0000, 12 + 64, READ)]);
    net.queue_events()[1].write(1).unwrap();
    assert_eq!(link.receive(), sent);
    wait_for(&driver, 1, 4);
    assert_eq!(driver.used(1).len(), 4);
}

#[test]
fn a_packet_for_the_guest_takes_as_many_buffers_as_it_needs() {
    let Some((mut driver, net, link)) = device(MERGEABLE) else {
        return;
    };
    // Less than the largest packet needs, until the queue is full.
    for index in 0..256 {
        driver.offer(0, &[(0x1_0000 + index * 0x1000, 400, WRITE)]);
    }
    net.queue_events()[0].write(1).unwrap();
    let sent = frame(1000, 5);
    link.send(&sent);
    wait_for(&driver, 0, 3);
    assert_eq!(driver.used(0), [(0, 400), (1, 400), (2, 212)]);
    assert_eq!(driver.read(0x1_0000 + 10, 2), [3, 0]);
    let parts = [
        driver.read(0x1_000c, 388),
        driver.read(0x1_1000, 400),
        driver.read(0x1_2000, 212),
    ];
    assert_eq!(parts.concat(), sent);
}

#[test]
fn a_packet_waits_for_a_buffer() {
    // One buffer for each packet, and no long segments.
    let Some((mut driver, net, link)) = device(EVENT_IDX) else {
        return;
    };
    let sent = frame(300, 3);
    link.send(&sent);
    // SAFETY: the descriptor is the driver's, which outlives this borrow.
    let irq = unsafe { BorrowedFd::borrow_raw(driver.irq.as_raw_fd()) };
    assert!(!is_ready(irq, 50));
    driver.offer(0, &[(0x1_0000, 12, WRITE), (0x2_0000, 2000, WRITE)]);
    net.queue_events()[0].write(1).unwrap();
    wait_for(&driver, 0, 1);
    assert_eq!(driver.used(0), [(0, 312)]);
    assert_eq!(driver.read(0x1_000a, 2), [1, 0]);
    assert_eq!(driver.read(0x2_0000, 300), sent);
}

#[test]
fn a_reset_lets_go_of_the_queues() {
    let Some((mut driver, mut net, link)) = device(MERGEABLE) else {
        return;
    };
    for index in 0..256 {
        driver.offer(0, &[(0x1_0000 + index * 0x1000, 2048, WRITE)]);
    }
    net.queue_events()[0].write(1).unwrap();
    net.reset();
    link.send(&frame(200, 1));
    // SAFETY: the descriptor is the driver's, which outlives this borrow.
    let irq = unsafe { BorrowedFd::borrow_raw(driver.irq.as_raw_fd()) };
    assert!(!is_ready(irq, 50));
    // The packet is there for the next driver.
    let driver = &mut Driver::new(&QUEUE_SIZES);
    driver.offer(0, &[(0x1_0000, 2048, WRITE)]);
    net.activate(driver.queues(), EVENT_IDX);
    wait_for(driver, 0, 1);
    assert_eq!(driver.used(0), [(0, 212)]);
}

#[test]
fn a_driver_that_contradicts_itself_is_served_without_offloads() {
    for features in [VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4].map(bit) {
        let Some((mut driver, net, link)) = device(features) else {
            return;
        };
        driver.offer(0, &[(0x1_0000, 2048, WRITE)]);
        net.queue_events()[0].write(1).unwrap();
        link.send(&frame(100, 1));
        wait_for(&driver, 0, 1);
        assert_eq!(driver.used(0), [(0, 112)]);
    }
}

#[test]
fn the_configuration_has_the_address_and_the_mtu() {
    let Some((_, net, _)) = device(MERGEABLE) else {
        return;
    };
    let mut config = [0xaa; 16];
    net.read_config(0, &mut config);
    assert_eq!(config[..6], [2, 0, 0, 0, 0, 1]);
    assert_eq!(config[10..12], 1500_u16.to_le_bytes());
    assert_eq!(config[12..], [0xaa; 4]);
}

#[test]
fn a_name_that_is_none_is_refused() {
    let error = Tap::create("a-name-that-is-too-long").unwrap_err();
    assert!(
        matches!(error, TapError::Name(_) | TapError::Open(_)),
        "{error}"
    );
}
