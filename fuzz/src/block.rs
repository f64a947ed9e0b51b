//! The block device between a driver and a file in memory.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

use vmm::devices::virtio::block::Disk;
use vmm::fuzzing::InlineBlock;

use crate::input::Input;
use crate::machine::Machine;
use crate::queue::run;

/// In bytes: a few sectors more than the driver's memory has room for.
const SIZE: u64 = 0x8_0000;

/// The block device's queue: with a disk that may be written to, or not.
pub fn block_queue(data: &[u8]) {
    let mut input = Input::new(data);
    let disk = Disk::new(memory_file(), input.byte() & 1 != 0, "fuzz").unwrap();
    let device = match InlineBlock::new(disk) {
        Ok(device) => device,
        Err(error) => return println!("skipped: {error}"),
    };
    let mut machine = Machine::new(Box::new(device));
    machine.bring_up(input.u64(), input.u16());
    run(machine, input, &mut |_| {});
}

fn memory_file() -> File {
    // SAFETY: the name is a string that outlives the call; the descriptor is new and ours.
    let fd =
        unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC)) };
    let file = File::from(fd);
    file.set_len(SIZE).unwrap();
    file
}
