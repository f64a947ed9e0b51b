//! The registers by which a guest ends its machine.
//!
//! ACPI's sleep control and status registers and its reset register for a kernel that runs, and the
//! keyboard controller's reset line for one that panics before it has read the ACPI tables.

use std::sync::Arc;

use super::bus::BusDevice;
use crate::exit::{ExitLatch, VmExit};

/// Offset of the sleep control register (ACPI 6.5, 4.8.3.7).
pub(crate) const SLEEP_CONTROL: u16 = 0;
/// Offset of the sleep status register.
pub(crate) const SLEEP_STATUS: u16 = 1;
/// Offset of the reset register.
pub(crate) const RESET: u16 = 2;
/// Number of ports.
pub(crate) const PORTS: u16 = 3;
/// What the FADT tells the guest to write to the reset register.
pub(crate) const RESET_VALUE: u8 = 1;
/// The sleep type of S5, as the DSDT's `_S5_` package names it.
pub(crate) const S5_SLEEP_TYPE: u8 = 5;

/// Sleep control: enter the sleep state that the type names.
const SLEEP_ENABLE: u8 = 1 << 5;

/// ACPI's power registers.
#[derive(Debug)]
pub(crate) struct PowerRegisters {
    latch: Arc<ExitLatch>,
}

impl PowerRegisters {
    pub fn new(latch: Arc<ExitLatch>) -> Self {
        Self { latch }
    }
}

impl BusDevice for PowerRegisters {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let sleep = SLEEP_ENABLE | S5_SLEEP_TYPE << 2;
        if offset == u64::from(SLEEP_CONTROL) && value & (SLEEP_ENABLE | 7 << 2) == sleep {
            self.latch.set(VmExit::Shutdown);
        } else if offset == u64::from(RESET) && value == RESET_VALUE {
            self.latch.set(VmExit::Reset);
        }
    }
}

/// The keyboard controller's command port, of which only the reset line is there.
#[derive(Debug)]
pub(crate) struct KeyboardReset {
    latch: Arc<ExitLatch>,
}

impl KeyboardReset {
    /// The command that pulses the processor's reset line.
    const PULSE_RESET: u8 = 0xfe;

    pub fn new(latch: Arc<ExitLatch>) -> Self {
        Self { latch }
    }
}

impl BusDevice for KeyboardReset {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // The input buffer is empty: a command may be written.
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data == [Self::PULSE_RESET] {
            self.latch.set(VmExit::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit_after(offset: u16, data: &[u8]) -> Option<VmExit> {
        let latch = Arc::new(ExitLatch::new().unwrap());
        PowerRegisters::new(latch.clone()).write(offset.into(), data);
        latch.get().cloned()
    }

    #[test]
    fn only_s5_with_the_enable_bit_powers_off() {
        assert_eq!(exit_after(SLEEP_CONTROL, &[0x34]), Some(VmExit::Shutdown));
        for value in [0x14, 0x30, 0x20, 0] {
            assert_eq!(exit_after(SLEEP_CONTROL, &[value]), None, "{value:#x}");
        }
        assert_eq!(exit_after(SLEEP_CONTROL, &[0x34, 0]), None);
        assert_eq!(exit_after(SLEEP_STATUS, &[0x34]), None);
    }

    #[test]
    fn the_reset_registers_reset() {
        assert_eq!(exit_after(RESET, &[RESET_VALUE]), Some(VmExit::Reset));
        assert_eq!(exit_after(RESET, &[0xfe]), None);
        let latch = Arc::new(ExitLatch::new().unwrap());
        let mut keyboard = KeyboardReset::new(latch.clone());
        keyboard.write(0, &[0xd1]);
        assert_eq!(latch.get(), None);
        keyboard.write(0, &[0xfe]);
        assert_eq!(latch.get(), Some(&VmExit::Reset));
    }
}
