//! The memory device between a driver that may do anything and a host that asks for more and for less.

use std::sync::Arc;

use vmm::devices::virtio::mem::{BLOCK, Mem};
use vmm::fuzzing;
use vmm::memory::Region;

use crate::input::Input;
use crate::machine::{DATA, HIGH, Machine, READ, WRITE};

/// Bytes that the driver may plug.
const OPEN: u64 = 128 << 20;
const REQUEST_SIZE: usize = 24;
const RESPONSE_SIZE: u32 = 10;

thread_local! {
    static REGION: Arc<Region> = fuzzing::open_room(OPEN).unwrap();
}

/// Registers, memory, descriptors and notifications, and requests in sound chains, whose blocks need not be there.
pub fn mem_queue(data: &[u8]) {
    let mut input = Input::new(data);
    let device = Mem::new(REGION.with(Arc::clone));
    let handle = device.handle();
    let mut machine = Machine::new(Box::new(device));
    machine.bring_up(input.u64(), input.u16());
    let mut most = 0;
    while !input.is_empty() {
        match input.byte() % 4 {
            0 => machine.step(&mut input, &mut |_| {}),
            1 => {
                handle.request(u64::from(input.byte()) * BLOCK, Box::new(|| {}));
            }
            _ => {
                machine.poke(DATA, &request(&mut input));
                machine.offer(
                    0,
                    &[
                        (DATA, REQUEST_SIZE as u32, READ),
                        (HIGH, RESPONSE_SIZE, WRITE),
                    ],
                );
                machine.notify(0);
            }
        }
        let memory = handle.memory();
        most = memory.requested.max(most);
        assert!(memory.plugged <= most && memory.plugged.is_multiple_of(BLOCK));
    }
}

fn request(input: &mut Input<'_>) -> [u8; REQUEST_SIZE] {
    let mut request = [0; REQUEST_SIZE];
    request[0] = input.byte() % 5;
    let first = (1 << 32) + u64::from(input.byte()) * BLOCK;
    let odd = match input.byte() {
        0xff => input.u64(),
        _ => 0,
    };
    request[8..16].copy_from_slice(&first.wrapping_add(odd).to_le_bytes());
    request[16] = input.byte();
    request
}
