//! The device between a driver and a file.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::super::testing::{Driver, READ, WRITE};
use super::*;

const PATIENCE: Duration = Duration::from_secs(10);
/// Where the driver has its header, its data and its status.
const HEADER: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STATUS: u64 = 0x1_8000;
const DONE: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// Not a status: what is there before the device answers.
const NONE: u8 = 0xee;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

struct Machine {
    driver: Driver,
    device: Block,
    file: File,
}

impl Machine {
    /// A driver that is up, with a disk of so many sectors, each filled with its number; none where there is no io_uring.
    fn new(sectors: u8, read_only: bool) -> Option<Self> {
        let file = tempfile::tempfile().unwrap();
        for sector in 0..sectors {
            let offset = u64::from(sector) * 512;
            file.write_all_at(&[sector; 512], offset).unwrap();
        }
        let disk = Disk::new(file.try_clone().unwrap(), read_only, "disk0").unwrap();
        let mut device = match Block::new(disk, &ThreadHook::none()) {
            Ok(device) => device,
            Err(error) => {
                let cause = std::error::Error::source(&error).unwrap().to_string();
                assert!(cause.contains("io_uring"), "{error}: {cause}");
                println!("skipped: {cause}");
                return None;
            }
        };
        let driver = Driver::new(&QUEUE_SIZES);
        let features = device.features();
        device.activate(driver.queues(), features);
        Some(Self {
            driver,
            device,
            file,
        })
    }

    fn notify(&self) {
        self.device.queue_events()[0].write(1).unwrap();
    }

    /// Waits until the device has given back `count` chains, ever.
    fn wait_for(&self, count: u16) {
        while self.driver.used_index(0) < count {
            // SAFETY: the descriptor belongs to the driver, which outlives this.
            let irq = unsafe {
                std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(
                    &self.driver.irq,
                ))
            };
            let mut fds = [PollFd::new(irq, PollFlags::POLLIN)];
            let patience = PollTimeout::try_from(PATIENCE).unwrap();
            assert_eq!(poll(&mut fds, patience), Ok(1), "no answer");
            self.driver.irq.read().unwrap();
        }
    }

    fn header(&self, kind: u32, sector: u64) {
        let header = [u64::from(kind).to_le_bytes(), sector.to_le_bytes()].concat();
        self.driver.write(HEADER, &header);
        self.driver.write(STATUS, &[NONE]);
    }

    /// Makes a request with these buffers between its header and its status; how it ended.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> u8 {
        self.header(kind, sector);
        let mut chain = vec![(HEADER, 16, READ)];
        chain.extend(data);
        chain.push((STATUS, 1, WRITE));
        let before = self.driver.used_index(0);
        self.driver.offer(0, &chain);
        self.notify();
        self.wait_for(before + 1);
        self.driver.read(STATUS, 1)[0]
    }

    /// A request for one range, as discarding and zeroing has it.
    fn range(&mut self, kind: u32, sector: u64, count: u32, flags: u32) -> u8 {
        let range = [
            &sector.to_le_bytes()[..],
            &count.to_le_bytes(),
            &flags.to_le_bytes(),
        ];
        self.driver.write(DATA, &range.concat());
        self.request(kind, 0, &[(DATA, 16, READ)])
    }

    fn sector(&self, sector: u64) -> [u8; 512] {
        let mut data = [0; 512];
        self.file.read_exact_at(&mut data, sector * 512).unwrap();
        data
    }
}

#[test]
fn sectors_are_read_and_written() {
    let Some(mut machine) = Machine::new(8, false) else {
        return;
    };
    // Across two buffers, which need not be of whole sectors.
    let halves = [(DATA, 700, WRITE), (DATA + 0x1000, 324, WRITE)];
    assert_eq!(machine.request(IN, 3, &halves), DONE);
    assert_eq!(machine.driver.used(0), [(0, 1025)]);
    let read = [
        machine.driver.read(DATA, 700),
        machine.driver.read(DATA + 0x1000, 324),
    ];
    assert_eq!(read.concat(), [[3; 512], [4; 512]].concat());

    machine.driver.write(DATA, &[0xaa; 512]);
    assert_eq!(machine.request(OUT, 7, &[(DATA, 512, READ)]), DONE);
    assert_eq!(machine.request(FLUSH, 0, &[]), DONE);
    assert_eq!(machine.sector(7), [0xaa; 512]);
    assert_eq!(machine.sector(6), [6; 512]);
}

#[test]
fn the_disk_describes_itself() {
    let Some(mut machine) = Machine::new(8, false) else {
        return;
    };
    assert_eq!(machine.request(GET_ID, 0, &[(DATA, 20, WRITE)]), DONE);
    assert_eq!(
        machine.driver.read(DATA, 20),
        b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    machine.driver.write(DATA, &[NONE; 8]);
    assert_eq!(machine.request(GET_ID, 0, &[(DATA, 3, WRITE)]), DONE);
    assert_eq!(machine.driver.read(DATA, 4), [b'd', b'i', b's', NONE]);
    let mut capacity = [0; 8];
    machine.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 8);
    let mut past = [NONE; 4];
    machine.device.read_config(58, &mut past);
    assert_eq!(past, [0, 0, NONE, NONE]);
    assert_eq!(machine.device.features() & 1 << 5, 0);
}

#[test]
fn what_is_not_on_the_disk_is_refused() {
    let Some(mut machine) = Machine::new(8, false) else {
        return;
    };
    for (sector, length) in [
        (8, 512),
        (7, 1024),
        (u64::MAX, 512),
        (1 << 55, 512),
        (0, 511),
    ] {
        for (kind, access) in [(IN, WRITE), (OUT, READ)] {
            let status = machine.request(kind, sector, &[(DATA, length, access)]);
            assert_eq!(status, FAILED, "{kind} {sector} {length}");
        }
    }
    for (sector, count) in [(8, 1), (0, 9), (u64::MAX, 1), (0, u32::MAX)] {
        assert_eq!(machine.range(DISCARD, sector, count, 0), FAILED);
        assert_eq!(machine.range(WRITE_ZEROES, sector, count, 0), FAILED);
    }
    assert_eq!(machine.file.metadata().unwrap().len(), 8 * 512);
    assert_eq!(machine.request(77, 0, &[]), UNSUPPORTED);
    assert_eq!(machine.range(WRITE_ZEROES, 0, 1, 2), UNSUPPORTED);
    assert_eq!(machine.range(DISCARD, 0, 1, 1), UNSUPPORTED);
    // The first two ranges of one request.
    assert_eq!(machine.request(DISCARD, 0, &[(DATA, 32, READ)]), FAILED);
    for sector in 0..8 {
        assert_eq!(machine.sector(sector.into()), [sector; 512]);
    }
}

#[test]
fn a_chain_without_a_header_or_a_status_comes_back() {
    let Some(mut machine) = Machine::new(8, false) else {
        return;
    };
    machine.header(IN, 0);
    machine
        .driver
        .offer(0, &[(HEADER, 15, READ), (STATUS, 1, WRITE)]);
    machine.driver.offer(0, &[(HEADER, 16, READ)]);
    machine.notify();
    machine.wait_for(2);
    assert_eq!(machine.driver.used(0), [(0, 1), (2, 0)]);
    assert_eq!(machine.driver.read(STATUS, 1), [FAILED]);
    // No data at all is nothing to do.
    assert_eq!(machine.request(IN, 0, &[]), DONE);
}

#[test]
fn nothing_is_written_to_a_read_only_disk() {
    let Some(mut machine) = Machine::new(8, true) else {
        return;
    };
    assert_ne!(machine.device.features() & 1 << 5, 0);
    assert_eq!(machine.device.features() & WRITABLE, 0);
    assert_eq!(machine.request(OUT, 0, &[(DATA, 512, READ)]), FAILED);
    assert_eq!(machine.range(WRITE_ZEROES, 0, 1, 0), FAILED);
    assert_eq!(machine.range(DISCARD, 0, 1, 0), FAILED);
    assert_eq!(machine.request(IN, 5, &[(DATA, 512, WRITE)]), DONE);
    assert_eq!(machine.driver.read(DATA, 512), [5; 512]);
}

#[test]
fn ranges_become_zeros_and_room_is_given_back() {
    let Some(mut machine) = Machine::new(64, false) else {
        return;
    };
    let before = machine.file.metadata().unwrap().blocks();
    for (kind, sector, flags) in [(DISCARD, 0, 0), (WRITE_ZEROES, 16, 1)] {
        match machine.range(kind, sector, 8, flags) {
            DONE => {
                assert_eq!(machine.sector(sector), [0; 512]);
                assert!(machine.file.metadata().unwrap().blocks() < before);
            }
            // Not every file system can.
            status => assert_eq!(status, UNSUPPORTED),
        }
    }
    assert_eq!(machine.sector(8), [8; 512]);
    assert_eq!(machine.sector(24), [24; 512]);
    assert_eq!(machine.file.metadata().unwrap().len(), 64 * 512);
}

#[test]
fn a_disk_that_fails_is_told() {
    let Some(mut machine) = Machine::new(8, false) else {
        return;
    };
    machine.file.set_len(1024).unwrap();
    // The half that is there is not enough.
    assert_eq!(machine.request(IN, 1, &[(DATA, 1024, WRITE)]), FAILED);
    assert_eq!(machine.request(IN, 1, &[(DATA, 512, WRITE)]), DONE);
}

#[test]
fn many_requests_are_served_at_once_and_a_reset_waits_for_them() {
    let Some(mut machine) = Machine::new(200, false) else {
        return;
    };
    // 42 chains of three descriptors fit into the table; the driver waits for none of them.
    for i in 0..42_u8 {
        let header = HEADER + 16 * u64::from(i);
        let fields = [u64::from(IN).to_le_bytes(), u64::from(i).to_le_bytes()];
        machine.driver.write(header, &fields.concat());
        let chain = [
            (header, 16, READ),
            (DATA + 512 * u64::from(i), 512, WRITE),
            (STATUS + u64::from(i), 1, WRITE),
        ];
        machine.driver.offer(0, &chain);
    }
    machine.notify();
    machine.wait_for(1);
    machine.device.reset();
    let given_back = machine.driver.used_index(0);
    for (head, length) in machine.driver.used(0) {
        let i = u64::from(head / 3);
        assert_eq!(length, 513);
        assert_eq!(machine.driver.read(STATUS + i, 1), [DONE]);
        let data = machine.driver.read(DATA + 512 * i, 512);
        assert_eq!(data, [u8::try_from(i).unwrap(); 512]);
    }
    // Nothing of the driver's is touched any more, and the next one is served.
    machine.driver.write(DATA, &[NONE; 512]);
    machine.notify();
    let next = Driver::new(&QUEUE_SIZES);
    let features = machine.device.features();
    machine.device.activate(next.queues(), features);
    assert_eq!(machine.driver.used_index(0), given_back);
    assert_eq!(machine.driver.read(DATA, 512), [NONE; 512]);
    machine.driver = next;
    assert_eq!(machine.request(IN, 199, &[(DATA, 512, WRITE)]), DONE);
    assert_eq!(machine.driver.read(DATA, 512), [199; 512]);
}

#[test]
fn a_driver_that_cannot_flush_has_durable_writes() {
    assert!(matches!(
        negotiated(EVENT_IDX),
        Message::Negotiated {
            write_through: true
        }
    ));
    assert!(matches!(
        negotiated(FEATURES),
        Message::Negotiated {
            write_through: false
        }
    ));
    let Some(mut machine) = Machine::new(8, false) else {
        return;
    };
    machine.device.reset();
    machine.driver = Driver::new(&QUEUE_SIZES);
    machine.device.activate(machine.driver.queues(), EVENT_IDX);
    machine.driver.write(DATA, &[0xbb; 512]);
    assert_eq!(machine.request(OUT, 2, &[(DATA, 512, READ)]), DONE);
    assert_eq!(machine.sector(2), [0xbb; 512]);
}
