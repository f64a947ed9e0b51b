//! The network device between a driver and a socket in place of the tap device.

use std::os::unix::net::UnixDatagram;

use vmm::fuzzing::InlineNet;

use crate::input::Input;
use crate::machine::Machine;
use crate::queue::run;

/// A header and an Ethernet header: the kernel's packets are never shorter.
const SHORTEST: usize = 26;

/// The network device's queues, and packets of any length from the host.
pub fn net_queue(data: &[u8]) {
    let mut input = Input::new(data);
    let (link, host) = UnixDatagram::pair().unwrap();
    link.set_nonblocking(true).unwrap();
    host.set_nonblocking(true).unwrap();
    let device = InlineNet::new(link.into(), 1500).unwrap();
    let mut machine = Machine::new(Box::new(device));
    machine.bring_up(input.u64(), input.u16());
    let packet = vec![0xaa; SHORTEST + usize::from(u16::MAX)];
    let mut buffer = [0; 64];
    run(machine, input, &mut |input| {
        while host.recv(&mut buffer).is_ok() {}
        let length = SHORTEST + usize::from(input.u16());
        // A full socket drops packets as a link does.
        let _ = host.send(&packet[..length]);
    });
}
