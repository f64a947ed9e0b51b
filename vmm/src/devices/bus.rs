//! Address ranges and the devices that answer in them: one bus for ports, one for MMIO.
//!
//! The addresses and the data come from the guest. The bus finds the device; an access that no
//! device covers wholly reads as all ones and is dropped on a write, as on real hardware.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// A device that serves a range of port or MMIO addresses.
///
/// `offset` counts from the start of the range under which the device was put on the bus, and
/// `offset + data.len()` never passes its end. Everything else about an access (its size, its
/// alignment, the data) is the guest's choice.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads at `offset`; it comes filled with `0xff`.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes the `data` that the guest writes at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as the bus holds it: shared between the vCPU threads, one access at a time.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a device could not be put on a bus. All of these are faults of the machine's layout.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range has no address in it.
    #[error("the bus range of {name} at {base:#x} is empty")]
    Empty {
        /// The device's name.
        name: &'static str,
        /// First address of the range.
        base: u64,
    },
    /// The range passes the end of the address space.
    #[error("the bus range of {name} at {base:#x} with {size:#x} addresses wraps around")]
    Wraps {
        /// The device's name.
        name: &'static str,
        /// First address of the range.
        base: u64,
        /// Number of addresses.
        size: u64,
    },
    /// Another device already answers in part of the range.
    #[error("the bus range of {name} at {base:#x} overlaps that of {other}")]
    Overlap {
        /// The device's name.
        name: &'static str,
        /// First address of the range.
        base: u64,
        /// The device that is already there.
        other: &'static str,
    },
}

struct Entry {
    base: u64,
    /// Last address of the range: the range may end at the end of the address space.
    last: u64,
    name: &'static str,
    device: SharedDevice,
}

/// Devices by address. It is filled while the machine is built and only read while it runs.
#[derive(Default)]
pub struct Bus {
    /// Sorted by `base`; no two overlap.
    entries: Vec<Entry>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.entries.iter().map(|e| (e.name, e.base..=e.last));
        f.debug_map().entries(ranges).finish()
    }
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at the `size` addresses from `base`.
    ///
    /// # Errors
    /// An empty range, one that wraps around, or one that overlaps another device's.
    pub fn insert(
        &mut self,
        name: &'static str,
        base: u64,
        size: u64,
        device: SharedDevice,
    ) -> Result<(), BusError> {
        let Some(span) = size.checked_sub(1) else {
            return Err(BusError::Empty { name, base });
        };
        let Some(last) = base.checked_add(span) else {
            return Err(BusError::Wraps { name, base, size });
        };
        let at = self.entries.partition_point(|e| e.base < base);
        let before = at.checked_sub(1).and_then(|i| self.entries.get(i));
        let after = self.entries.get(at);
        let overlap = before
            .filter(|e| e.last >= base)
            .or_else(|| after.filter(|e| e.base <= last));
        if let Some(other) = overlap {
            let other = other.name;
            return Err(BusError::Overlap { name, base, other });
        }
        let entry = Entry {
            base,
            last,
            name,
            device,
        };
        self.entries.insert(at, entry);
        Ok(())
    }

    /// Serves a guest's read of `data.len()` bytes at `addr`; says whether a device answered.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((entry, offset)) = self.find(addr, data.len()) else {
            return false;
        };
        let mut device = entry.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.read(offset, data);
        true
    }

    /// Serves a guest's write of `data` at `addr`; says whether a device took it.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        let Some((entry, offset)) = self.find(addr, data.len()) else {
            return false;
        };
        let mut device = entry.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.write(offset, data);
        true
    }

    fn find(&self, addr: u64, len: usize) -> Option<(&Entry, u64)> {
        let at = self.entries.partition_point(|e| e.base <= addr);
        let entry = self.entries.get(at.checked_sub(1)?)?;
        let last = addr.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        (last <= entry.last).then(|| (entry, addr - entry.base))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    fn device() -> Arc<Mutex<Recorder>> {
        Arc::default()
    }

    #[test]
    fn an_access_reaches_the_device_at_its_offset() {
        let mut bus = Bus::new();
        let low = device();
        bus.insert("low", 0x100, 0x10, low.clone()).unwrap();
        bus.insert("high", 0x110, 0x10, device()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x10e, &mut data));
        assert_eq!(data, [0xe; 2]);
        assert!(bus.write(0x104, &[1, 2, 3, 4]));
        assert_eq!(low.lock().unwrap().0, [(4, vec![1, 2, 3, 4])]);
    }

    #[test]
    fn an_access_outside_or_across_the_edge_reads_ones() {
        let mut bus = Bus::new();
        bus.insert("low", 0x100, 0x10, device()).unwrap();
        bus.insert("high", 0x110, 0x10, device()).unwrap();
        for addr in [0, 0xff, 0x10d, 0x11d, 0x120, u64::MAX - 1, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(addr, &mut data), "{addr:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(addr, &data));
        }
        assert!(!bus.read(0x100, &mut []));
    }

    #[test]
    fn a_range_that_overlaps_wraps_or_is_empty_is_refused() {
        let mut bus = Bus::new();
        bus.insert("a", 0x100, 0x10, device()).unwrap();
        for (base, size) in [(0x100, 1), (0x10f, 1), (0xff, 2), (0, 0x1000)] {
            let error = bus.insert("b", base, size, device()).unwrap_err();
            let other = "a";
            let name = "b";
            assert_eq!(error, BusError::Overlap { name, base, other });
        }
        let (name, base, size) = ("b", u64::MAX, 2);
        let error = bus.insert(name, base, size, device()).unwrap_err();
        assert_eq!(error, BusError::Wraps { name, base, size });
        let error = bus.insert(name, base, 0, device()).unwrap_err();
        assert_eq!(error, BusError::Empty { name, base });
        bus.insert("last", u64::MAX, 1, device()).unwrap();
        assert!(bus.read(u64::MAX, &mut [0]));
    }
}
