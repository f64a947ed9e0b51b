//! The I/O APIC: which interrupt a device's line raises, as the guest programs it.
//!
//! It has as many pins as the machine has lines, not the 24 of KVM's own: a kernel visits every pin several times
//! while it boots, and each visit leaves the guest. An interrupt itself does not come here: a line is an eventfd that
//! KVM turns into the message of its pin's entry. Registers: Intel 82093AA, version 0x11, which has no EOI register.
//!
//! Every line is edge-triggered. A masked pin's eventfd is taken from KVM, so that what a device signals meanwhile
//! waits in it and is delivered with the unmasking.

use std::io;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use crate::layout;

/// Number of addresses.
pub(crate) const SIZE: u64 = 0x20;

const SELECT: u64 = 0;
const WINDOW: u64 = 0x10;

const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
/// The first entry's low half; its high half and the other entries follow.
const ENTRIES: u8 = 0x10;

const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR, which only the I/O APIC sets.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;

/// An interrupt as a write to the local APICs' address range (Intel SDM volume 3, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Message {
    pub address: u32,
    pub data: u32,
}

impl Message {
    /// What an entry asks for, as an edge.
    fn of(entry: u64) -> Self {
        let destination = (entry >> 56) as u32;
        let logical = (entry >> 11 & 1) as u32;
        Self {
            address: layout::LOCAL_APIC | destination << 12 | logical << 2,
            // The vector and the delivery mode are at the same place in both.
            data: (entry & 0x7ff) as u32,
        }
    }
}

/// KVM's side of the lines.
pub(crate) trait Lines: Send {
    /// Replaces all messages; a line without one raises nothing.
    fn route(&self, messages: &[(u32, Message)]) -> io::Result<()>;
    /// Has `line` raise the message of pin `pin`; what it holds already counts.
    fn connect(&self, line: &EventFd, pin: u32) -> io::Result<()>;
    /// The reverse of `connect`.
    fn disconnect(&self, line: &EventFd, pin: u32) -> io::Result<()>;
}

#[derive(Debug)]
struct Pin {
    entry: u64,
    line: Option<EventFd>,
    connected: bool,
}

/// What the guest has programmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    select: u8,
    id: u32,
    entries: Vec<u64>,
}

/// The device.
#[derive(Debug)]
pub(crate) struct IoApic<L> {
    lines: L,
    select: u8,
    id: u32,
    pins: Vec<Pin>,
    /// The message of each pin that KVM knows.
    routed: Vec<Option<Message>>,
}

impl<L: Lines> IoApic<L> {
    /// With `pins` pins, to which nothing leads yet.
    pub fn new(pins: u8, lines: L) -> Self {
        let pin = || Pin {
            entry: MASKED,
            line: None,
            connected: false,
        };
        Self {
            lines,
            select: 0,
            id: 0,
            pins: (0..pins).map(|_| pin()).collect(),
            routed: vec![None; pins.into()],
        }
    }

    /// Leads a device's line to a pin; says whether there is such a pin.
    pub fn attach(&mut self, pin: u32, line: EventFd) -> bool {
        let pin = usize::try_from(pin)
            .ok()
            .and_then(|pin| self.pins.get_mut(pin));
        pin.map(|pin| pin.line = Some(line)).is_some()
    }

    /// What the guest has programmed so far.
    pub fn state(&self) -> State {
        State {
            select: self.select,
            id: self.id,
            entries: self.pins.iter().map(|pin| pin.entry).collect(),
        }
    }

    /// Programs a fresh device as another was whose lines are the same.
    ///
    /// # Errors
    /// KVM does not take a pin's route.
    pub fn restore(&mut self, state: &State) -> io::Result<()> {
        (self.select, self.id) = (state.select, state.id);
        for (index, entry) in state.entries.iter().enumerate() {
            if let Some(pin) = self.pins.get_mut(index) {
                pin.entry = *entry;
                self.apply(index)?;
            }
        }
        Ok(())
    }

    /// The pin whose entry the selected register is a half of, and whether it is the high half.
    fn selected(&self) -> Option<(usize, bool)> {
        let register = self.select.checked_sub(ENTRIES)?;
        Some(((register / 2).into(), register % 2 == 1))
    }

    fn read_window(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => self.id,
            VERSION => 0x11 | u32::try_from(self.pins.len().saturating_sub(1)).unwrap_or(0) << 16,
            _ => match self.selected() {
                Some((pin, high)) => self.pins.get(pin).map_or(u32::MAX, |pin| {
                    (if high { pin.entry >> 32 } else { pin.entry }) as u32
                }),
                None => u32::MAX,
            },
        }
    }

    fn write_window(&mut self, value: u32) {
        if self.select == ID {
            self.id = value & 0x0f00_0000;
        } else if let Some((index, high)) = self.selected()
            && let Some(pin) = self.pins.get_mut(index)
        {
            let value = u64::from(value);
            pin.entry = if high {
                pin.entry & 0xffff_ffff | value << 32
            } else {
                pin.entry & !0xffff_ffff | value & !READ_ONLY
            };
            if let Err(error) = self.apply(index) {
                tracing::error!(pin = index, %error, "KVM does not take an interrupt's route");
            }
        }
    }

    /// Tells KVM what the pin's entry says now.
    fn apply(&mut self, index: usize) -> io::Result<()> {
        let (Some(pin), Some(routed)) = (self.pins.get_mut(index), self.routed.get_mut(index))
        else {
            return Ok(());
        };
        let Some(line) = &pin.line else {
            return Ok(());
        };
        // There are at most 256 pins.
        let number = index as u32;
        if pin.entry & MASKED != 0 {
            if std::mem::take(&mut pin.connected) {
                self.lines.disconnect(line, number)?;
            }
            return Ok(());
        }
        let message = Message::of(pin.entry);
        if routed.replace(message) != Some(message) {
            let messages: Vec<_> = (0..)
                .zip(&self.routed)
                .filter_map(|(pin, message)| Some((pin, (*message)?)))
                .collect();
            self.lines.route(&messages)?;
        }
        if !pin.connected {
            self.lines.connect(line, number)?;
            pin.connected = true;
        }
        Ok(())
    }
}

impl<L: Lines> BusDevice for IoApic<L> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => self.select.into(),
            WINDOW => self.read_window(),
            _ => return,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SELECT, [select, ..]) => self.select = *select,
            (WINDOW, &[a, b, c, d]) => self.write_window(u32::from_le_bytes([a, b, c, d])),
            // Other registers and sizes do nothing on the hardware either.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[derive(Debug, Clone, PartialEq, Eq)]
    enum Call {
        Route(Vec<(u32, Message)>),
        Connect(u32),
        Disconnect(u32),
    }

    #[derive(Default, Clone)]
    struct Recorder(Arc<Mutex<Vec<Call>>>);

    impl Recorder {
        fn push(&self, call: Call) -> io::Result<()> {
            self.0.lock().unwrap().push(call);
            Ok(())
        }

        fn take(&self) -> Vec<Call> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl Lines for Recorder {
        fn route(&self, messages: &[(u32, Message)]) -> io::Result<()> {
            self.push(Call::Route(messages.to_vec()))
        }

        fn connect(&self, _: &EventFd, pin: u32) -> io::Result<()> {
            self.push(Call::Connect(pin))
        }

        fn disconnect(&self, _: &EventFd, pin: u32) -> io::Result<()> {
            self.push(Call::Disconnect(pin))
        }
    }

    fn device() -> (IoApic<Recorder>, Recorder) {
        let recorder = Recorder::default();
        let mut device = IoApic::new(4, recorder.clone());
        assert!(device.attach(2, EventFd::new(EFD_NONBLOCK).unwrap()));
        assert!(!device.attach(4, EventFd::new(EFD_NONBLOCK).unwrap()));
        (device, recorder)
    }

    fn read(device: &mut IoApic<Recorder>, register: u8) -> u32 {
        device.write(SELECT, &u32::from(register).to_le_bytes());
        let mut data = [0; 4];
        device.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(device: &mut IoApic<Recorder>, register: u8, value: u32) {
        device.write(SELECT, &[register]);
        device.write(WINDOW, &value.to_le_bytes());
    }

    #[test]
    fn the_version_tells_the_number_of_pins() {
        let (mut device, _) = device();
        assert_eq!(read(&mut device, VERSION), 0x0003_0011);
        write(&mut device, ID, u32::MAX);
        assert_eq!(read(&mut device, ID), 0x0f00_0000);
        assert_eq!(read(&mut device, ARBITRATION), 0x0f00_0000);
    }

    #[test]
    fn an_unmasked_line_is_routed_and_connected_once() {
        let (mut device, recorder) = device();
        assert_eq!(read(&mut device, ENTRIES + 4), 0x1_0000);
        write(&mut device, ENTRIES + 5, 3 << 24);
        write(&mut device, ENTRIES + 4, 0x1_0931);
        assert_eq!(recorder.take(), []);
        write(&mut device, ENTRIES + 4, 0x931);
        let message = Message {
            address: 0xfee0_3004,
            data: 0x131,
        };
        assert_eq!(
            recorder.take(),
            [Call::Route(vec![(2, message)]), Call::Connect(2)]
        );
        write(&mut device, ENTRIES + 4, 0x931);
        assert_eq!(recorder.take(), []);
        write(&mut device, ENTRIES + 4, 0x1_0931);
        write(&mut device, ENTRIES + 4, 0x931);
        assert_eq!(recorder.take(), [Call::Disconnect(2), Call::Connect(2)]);
        assert_eq!(read(&mut device, ENTRIES + 4), 0x931);
        assert_eq!(read(&mut device, ENTRIES + 5), 3 << 24);
    }

    #[test]
    fn a_device_is_programmed_as_another_was() {
        let (mut first, _) = device();
        write(&mut first, ENTRIES + 4, 0x931);
        write(&mut first, ID, 3 << 24);
        let (mut next, recorder) = device();
        next.restore(&first.state()).unwrap();
        let message = Message {
            address: 0xfee0_0004,
            data: 0x131,
        };
        assert_eq!(
            recorder.take(),
            [Call::Route(vec![(2, message)]), Call::Connect(2)]
        );
        assert_eq!(next.state(), first.state());
        assert_eq!(read(&mut next, ID), 3 << 24);
    }

    #[test]
    fn a_level_entry_is_an_edge_and_reads_back() {
        let (mut device, recorder) = device();
        write(&mut device, ENTRIES + 4, !0x1_0000);
        let edge = Message {
            address: 0xfee0_0004,
            data: 0x7ff,
        };
        assert_eq!(
            recorder.take(),
            [Call::Route(vec![(2, edge)]), Call::Connect(2)]
        );
        assert_eq!(read(&mut device, ENTRIES + 4), 0xfffe_afff);
    }

    #[test]
    fn what_is_not_there_reads_ones_and_takes_nothing() {
        let (mut device, recorder) = device();
        for register in [3, 0xf, ENTRIES + 8, 0x3f, 0xff] {
            write(&mut device, register, 0);
            assert_eq!(read(&mut device, register), u32::MAX);
        }
        // A pin without a line, a short write, an offset between the registers.
        write(&mut device, ENTRIES, 0x31);
        device.write(SELECT, &[ENTRIES + 4]);
        device.write(WINDOW, &[0x31, 0]);
        device.write(4, &[0; 4]);
        device.write(SELECT, &[]);
        let mut data = [0xff; 4];
        device.read(8, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(recorder.take(), []);
    }
}
