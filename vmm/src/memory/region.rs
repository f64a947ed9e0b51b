//! A range of the guest's physical addresses, of which the part in front is memory.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result;
use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionMmap,
    GuestUsize, MemoryRegionAddress, VolatileSlice,
};

/// A region of guest memory. RAM is open as a whole; room for memory that comes later is opened from its start on. What is
/// not open is out of range for whoever asks.
#[derive(Debug)]
pub struct Region {
    mapping: GuestRegionMmap<()>,
    /// Bytes that are open. It only grows.
    open: AtomicU64,
}

impl From<GuestRegionMmap<()>> for Region {
    fn from(mapping: GuestRegionMmap<()>) -> Self {
        let open = AtomicU64::new(mapping.len());
        Self { mapping, open }
    }
}

impl Region {
    /// A region of which nothing is open.
    pub(super) fn closed(mapping: GuestRegionMmap<()>) -> Self {
        let open = AtomicU64::new(0);
        Self { mapping, open }
    }

    /// How many bytes are open.
    pub(crate) fn open(&self) -> u64 {
        self.open.load(Ordering::Acquire)
    }

    /// From now on the first `bytes` are open, which can be read and written.
    pub(super) fn set_open(&self, bytes: u64) {
        self.open.store(bytes, Ordering::Release);
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.mapping.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    fn bitmap(&self) -> BS<'_, ()> {
        self.mapping.bitmap()
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, ()>>> {
        match offset.0.checked_add(count as u64) {
            Some(end) if end <= self.open() => self.mapping.get_slice(offset, count),
            _ => Err(GuestMemoryError::InvalidBackendAddress),
        }
    }

    fn as_volatile_slice(&self) -> Result<VolatileSlice<'_, BS<'_, ()>>> {
        self.get_slice(MemoryRegionAddress(0), self.open() as usize)
    }
}

impl GuestMemoryRegionBytes for Region {}
