//! The guest's RAM: host memory that the guest may read and write at will.
//!
//! It is aligned to 2 MiB on the host and advised for huge pages, so that one nested page fault
//! fills 2 MiB. It is mapped without reservation: a guest costs what it touches, not its size.
//! Nothing in RAM can be trusted; whoever reads it copies first and checks the copy.
//!
//! Above it there can be room for memory that comes while the machine runs: addresses of the host that nobody may touch
//! and that KVM knows nothing of, until a part is opened. Closed they cost nothing, however many there are.

mod region;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use thiserror::Error;
use vm_memory::{
    GuestAddress, GuestMemoryRegion, GuestRegionCollection, GuestRegionMmap, MmapRegion,
    VolatileSlice,
};

use crate::layout;

pub use region::Region;

/// The guest's memory as the devices see it. It has no dirty bitmap.
pub type GuestRam = GuestRegionCollection<Region>;

/// The size of a huge page on x86-64, and the granularity of a guest's memory.
pub const HUGE_PAGE: u64 = 2 << 20;

/// The pieces in which Linux takes memory that comes while it runs, and from where on it may choose larger ones, of up to
/// [`layout::ROOM_ALIGN`].
const SECTION: u64 = 128 << 20;
const LARGE_SECTIONS_FROM: u64 = 64 << 30;

/// The size of a page of the host's kernel on x86-64.
const HOST_PAGE: usize = 4096;

/// A guest's memory size in bytes: a multiple of 2 MiB between [`MemorySize::MIN`] and
/// [`MemorySize::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(u64);

impl MemorySize {
    /// The least that a guest can be given; a Linux kernel wants more.
    pub const MIN: u64 = 16 << 20;
    /// The most that a guest can be given, so that every address fits 40 bits.
    pub const MAX: u64 = 512 << 30;

    /// A guest memory of `bytes`, rounded up to a multiple of 2 MiB.
    ///
    /// # Errors
    /// A size outside the limits.
    pub fn from_bytes(bytes: u64) -> Result<Self, MemoryError> {
        if !(Self::MIN..=Self::MAX).contains(&bytes) {
            return Err(MemoryError::Size { bytes });
        }
        Ok(Self(bytes.next_multiple_of(HUGE_PAGE)))
    }

    /// A guest memory of `mib` MiB.
    ///
    /// # Errors
    /// As [`MemorySize::from_bytes`].
    pub fn from_mib(mib: u64) -> Result<Self, MemoryError> {
        Self::from_bytes(mib.saturating_mul(1 << 20))
    }

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// The ranges of guest physical addresses that RAM fills: start and length, in order.
    pub fn ranges(self) -> Vec<(GuestAddress, u64)> {
        let low = self.0.min(layout::MMIO_GAP_START);
        let mut ranges = vec![(GuestAddress(0), low)];
        if self.0 > low {
            ranges.push((GuestAddress(layout::MMIO_GAP_END), self.0 - low));
        }
        ranges
    }

    /// The guest physical addresses above RAM where more can come: start and length. None if no guest can have more.
    fn room(self) -> Option<(GuestAddress, u64)> {
        let (last, length) = self.ranges().pop()?;
        let end = (last.0 + length).max(layout::MMIO_GAP_END);
        let start = end.next_multiple_of(layout::ROOM_ALIGN);
        let most = (Self::MAX - self.0) / layout::ROOM_ALIGN * layout::ROOM_ALIGN;
        (most > 0).then_some((GuestAddress(start), most))
    }

    /// The pieces in which more memory can come.
    fn section(self) -> u64 {
        if self.0 < LARGE_SECTIONS_FROM {
            SECTION
        } else {
            layout::ROOM_ALIGN
        }
    }
}

/// Why guest memory could not be had.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The size is outside the limits.
    #[error(
        "guest memory of {bytes} bytes: give it between {} and {} bytes",
        MemorySize::MIN,
        MemorySize::MAX
    )]
    Size {
        /// The size asked for.
        bytes: u64,
    },
    /// The host gave no address space.
    #[error(
        "mapping {bytes} bytes of guest memory (see RLIMIT_AS and /proc/sys/vm/overcommit_memory)"
    )]
    Map {
        /// The length of the mapping.
        bytes: u64,
        /// What mmap said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be mapped.
    #[error("mapping the memory of a snapshot")]
    File {
        /// What mmap said.
        #[source]
        source: io::Error,
    },
    /// The host does not let a part of the room for more be used.
    #[error("opening {bytes} bytes of guest memory (see /proc/sys/vm/overcommit_memory)")]
    Open {
        /// The length of the part.
        bytes: u64,
        /// What mprotect said.
        #[source]
        source: io::Error,
    },
    /// The mappings do not make an address space; a fault of the layout.
    #[error("arranging the guest memory's regions")]
    Regions(#[source] vm_memory::GuestRegionCollectionError),
}

/// Guest RAM of one machine and its mappings on the host.
///
/// Dropping it gives the pages back to the host. The address range itself stays mapped for the life
/// of the process, because a clone of the [`GuestRam`] in a device may still point to it.
#[derive(Debug)]
pub struct Memory {
    ram: Arc<GuestRam>,
    mappings: Vec<HostMapping>,
    size: MemorySize,
    room: Option<Room>,
}

/// Where memory comes while the machine runs.
#[derive(Debug)]
struct Room {
    region: Arc<Region>,
    mapping: HostMapping,
    /// How many KVM memory slots its open part has.
    slots: u32,
}

/// One private mapping of host memory, aligned to 2 MiB and never unmapped.
#[derive(Debug, Clone, Copy)]
struct HostMapping {
    address: *mut u8,
    length: usize,
}

// SAFETY: the pointer names memory that is mapped for the life of the process; it is only handed to
// KVM and madvise, never dereferenced here.
unsafe impl Send for HostMapping {}
// SAFETY: as for Send; there is no interior state.
unsafe impl Sync for HostMapping {}

/// A part of guest RAM as KVM's memory slots want it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub guest: u64,
    pub host: u64,
    pub length: u64,
}

impl Memory {
    /// Maps `size` of zeroed guest memory.
    ///
    /// # Errors
    /// The host refuses the mapping.
    pub fn new(size: MemorySize) -> Result<Self, MemoryError> {
        Self::map(size, None)
    }

    /// Maps `size` of guest memory that begins as what `file` holds, range after range. The file must be as long and
    /// must not be cut; what the guest writes stays out of it.
    ///
    /// # Errors
    /// The host refuses the mapping.
    pub fn of_file(size: MemorySize, file: &File) -> Result<Self, MemoryError> {
        Self::map(size, Some(file))
    }

    fn map(size: MemorySize, file: Option<&File>) -> Result<Self, MemoryError> {
        let mut mappings = Vec::new();
        let mut regions = Vec::new();
        let mut offset = 0;
        for (start, length) in size.ranges() {
            let mapping = HostMapping::new(length, libc::PROT_READ | libc::PROT_WRITE)?;
            if let Some(file) = file {
                mapping
                    .fill_from(file, offset)
                    .map_err(|source| MemoryError::File { source })?;
            }
            offset += length;
            mappings.push(mapping);
            regions.push(Region::from(mapping.region(start, length)?));
        }
        let ram = GuestRam::from_regions(regions).map_err(MemoryError::Regions)?;
        Ok(Self {
            ram: Arc::new(ram),
            mappings,
            size,
            room: None,
        })
    }

    /// Reserves room for memory that comes later, all of it closed. Before the RAM is shared.
    ///
    /// # Errors
    /// The host has no addresses for it.
    pub(crate) fn add_room(&mut self) -> Result<(), MemoryError> {
        let Some((start, length)) = self.size.room() else {
            return Ok(());
        };
        let mapping = HostMapping::new(length, libc::PROT_NONE)?;
        let region = Arc::new(Region::closed(mapping.region(start, length)?));
        let ram = self.ram.insert_region(Arc::clone(&region));
        self.ram = Arc::new(ram.map_err(MemoryError::Regions)?);
        self.room = Some(Room {
            region,
            mapping,
            slots: 0,
        });
        Ok(())
    }

    /// The room for memory that comes later, if there is any.
    pub(crate) fn room(&self) -> Option<&Arc<Region>> {
        Some(&self.room.as_ref()?.region)
    }

    /// Opens at least the first `bytes` of the room; `register` makes the new part known to KVM, by a slot's number.
    ///
    /// # Errors
    /// The host's, or that of `register`; the part is not open then.
    pub(crate) fn open_room<E: From<MemoryError>>(
        &mut self,
        bytes: u64,
        register: impl FnOnce(u32, Slot) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(room) = &mut self.room else {
            return Ok(());
        };
        let open = room.region.open();
        let wanted = bytes.next_multiple_of(self.size.section());
        let wanted = wanted.min(room.region.len());
        if wanted <= open {
            return Ok(());
        }
        let part = room.mapping.part(open, wanted - open);
        part.allow_access().map_err(|source| MemoryError::Open {
            bytes: wanted - open,
            source,
        })?;
        let slot = Slot {
            guest: room.region.start_addr().0 + open,
            host: part.address as u64,
            length: wanted - open,
        };
        // There are two of RAM at most.
        register(self.mappings.len() as u32 + room.slots, slot)?;
        room.slots += 1;
        room.region.set_open(wanted);
        Ok(())
    }

    /// The RAM, to be shared with devices.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// How much RAM there is.
    pub fn size(&self) -> MemorySize {
        self.size
    }

    /// The KVM memory slots that make up the RAM.
    pub(crate) fn slots(&self) -> impl Iterator<Item = Slot> {
        let ranges = self.size.ranges().into_iter();
        ranges
            .zip(&self.mappings)
            .map(|((guest, length), mapping)| Slot {
                guest: guest.0,
                host: mapping.address as u64,
                length,
            })
    }
}

/// Gives the whole pages of a part of guest RAM back to the host; the guest finds there what it found at first.
pub(crate) fn give_back(part: &VolatileSlice<'_>) {
    let guard = part.ptr_guard_mut();
    let start = guard.as_ptr();
    let head = start.align_offset(HOST_PAGE).min(part.len());
    let length = (part.len() - head) / HOST_PAGE * HOST_PAGE;
    if length == 0 {
        return;
    }
    // SAFETY: the range lies in the slice's mapping. What a volatile slice names may change at any time, and the advice
    // changes no more than that.
    let result =
        unsafe { libc::madvise(start.wrapping_add(head).cast(), length, libc::MADV_DONTNEED) };
    if result != 0 {
        // The guest has lost nothing, and the host won nothing.
        let error = io::Error::last_os_error();
        tracing::debug!(%error, "giving memory back");
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let room = self.room.iter().map(|room| &room.mapping);
        for mapping in self.mappings.iter().chain(room) {
            mapping.advise(libc::MADV_DONTNEED);
        }
    }
}

impl HostMapping {
    fn new(bytes: u64, access: libc::c_int) -> Result<Self, MemoryError> {
        let fail = |source| MemoryError::Map { bytes, source };
        let too_large = || fail(io::Error::from_raw_os_error(libc::ENOMEM));
        let length = usize::try_from(bytes).map_err(|_| too_large())?;
        let padded = length
            .checked_add(HUGE_PAGE as usize)
            .ok_or_else(too_large)?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no other.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                padded,
                access,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(fail(io::Error::last_os_error()));
        }
        let start = start.cast::<u8>();
        let head = start.align_offset(HUGE_PAGE as usize).min(padded - length);
        let address = start.wrapping_add(head);
        let tail = padded - length - head;
        for (unused, unused_length) in [(start, head), (address.wrapping_add(length), tail)] {
            if unused_length > 0 {
                // SAFETY: both parts lie in the mapping made above, outside what is kept.
                unsafe { libc::munmap(unused.cast(), unused_length) };
            }
        }
        let mapping = Self { address, length };
        // Both are hints: a host without huge pages or with its own policy still runs the guest.
        mapping.advise(libc::MADV_HUGEPAGE);
        mapping.advise(libc::MADV_DONTDUMP);
        Ok(mapping)
    }

    /// Puts private mappings of the file's bytes from `offset` on in place of the zeros, where the file has any. A huge
    /// page without one stays as it is: a page of a file's hole would first be made in the page cache, then copied.
    fn fill_from(&self, file: &File, offset: u64) -> io::Result<()> {
        let mut done = 0;
        while let Some(data) = next(file, offset + done, Whence::SeekData)? {
            let start = (data - offset) / HUGE_PAGE * HUGE_PAGE;
            if start >= self.length as u64 {
                break;
            }
            let hole = next(file, data, Whence::SeekHole)?.unwrap_or(data);
            let end = (hole - offset).next_multiple_of(HUGE_PAGE);
            done = end.min(self.length as u64);
            self.map_file(start, done - start, file, offset + start)?;
        }
        Ok(())
    }

    fn map_file(&self, start: u64, length: u64, file: &File, offset: u64) -> io::Result<()> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let address = self.address.wrapping_add(start as usize);
        // SAFETY: the range lies in a mapping of our own, and nothing refers to it yet.
        let mapped = unsafe {
            libc::mmap(
                address.cast(),
                length as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.advise(libc::MADV_DONTDUMP);
        Ok(())
    }

    /// The part of `bytes` from `offset` on, which lies in it.
    fn part(&self, offset: u64, bytes: u64) -> Self {
        Self {
            address: self.address.wrapping_add(offset as usize),
            length: bytes as usize,
        }
    }

    fn allow_access(&self) -> io::Result<()> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the range is a mapping of our own that nobody could use before.
        match unsafe { libc::mprotect(self.address.cast(), self.length, access) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn advise(&self, advice: libc::c_int) {
        // SAFETY: the range is a mapping of our own. Of the advices given, only MADV_DONTNEED
        // changes content, to what it was at first, which guest memory may hold at any time.
        unsafe { libc::madvise(self.address.cast(), self.length, advice) };
    }

    fn region(&self, start: GuestAddress, bytes: u64) -> Result<GuestRegionMmap<()>, MemoryError> {
        // SAFETY: the range is mapped with these flags and is never unmapped. It is readable and writable, or in a room,
        // whose region lets nobody reach what is not yet.
        let region = unsafe {
            MmapRegion::build_raw(
                self.address,
                self.length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            )
        }
        .map_err(|source| MemoryError::Map {
            bytes,
            source: io::Error::other(source),
        })?;
        GuestRegionMmap::new(region, start).ok_or(MemoryError::Regions(
            vm_memory::GuestRegionCollectionError::MemoryRegionOverlap,
        ))
    }
}

/// Where the file has data, or none, from `offset` on; `None` behind the last.
fn next(file: &File, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
    let from = i64::try_from(offset).map_err(io::Error::other)?;
    match lseek(file.as_raw_fd(), from, whence) {
        Ok(found) => Ok(Some(found.unsigned_abs())),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use vm_memory::{Bytes, GuestMemory};

    #[test]
    fn memory_of_a_file_begins_as_the_file_and_leaves_it_alone() {
        let file = tempfile::tempfile().unwrap();
        let size = MemorySize::from_mib(32).unwrap();
        file.set_len(size.bytes()).unwrap();
        // In the third huge page, across the border of the fifth and the sixth, and in the last.
        let places = [(5 << 20) + 77, (10 << 20) - 1, (32 << 20) - 2];
        for at in places {
            file.write_all_at(&[7, 8], at).unwrap();
        }
        let memory = Memory::of_file(size, &file).unwrap();
        let byte = |at: u64| memory.ram().read_obj::<u8>(GuestAddress(at)).unwrap();
        for at in places {
            assert_eq!((byte(at), byte(at + 1)), (7, 8), "{at:#x}");
        }
        for at in [0, (4 << 20) - 1, 5 << 20, 12 << 20, 31 << 20] {
            assert_eq!(byte(at), 0, "{at:#x}");
            memory.ram().write_obj(9_u8, GuestAddress(at)).unwrap();
            assert_eq!(byte(at), 9);
        }
        let mut first = [1];
        file.read_exact_at(&mut first, 5 << 20).unwrap();
        assert_eq!(first, [0]);
    }

    #[test]
    fn ram_is_aligned_to_huge_pages_and_zeroed() {
        let memory = Memory::new(MemorySize::from_mib(32).unwrap()).unwrap();
        for slot in memory.slots() {
            assert_eq!(slot.host % HUGE_PAGE, 0);
        }
        let value: u64 = memory.ram().read_obj(GuestAddress(31 << 20)).unwrap();
        assert_eq!(value, 0);
    }

    #[test]
    fn more_than_the_gap_allows_continues_above_4_gib() {
        let size = MemorySize::from_mib(4096).unwrap();
        let memory = Memory::new(size).unwrap();
        let total: u64 = memory.slots().map(|s| s.length).sum();
        assert_eq!(total, size.bytes());
        let ram = memory.ram();
        assert!(ram.address_in_range(GuestAddress(layout::MMIO_GAP_START - 1)));
        assert!(!ram.address_in_range(GuestAddress(layout::VIRTIO_MMIO_BASE)));
        assert!(!ram.address_in_range(GuestAddress(layout::MMIO_GAP_END - 1)));
        ram.write_obj(7u8, GuestAddress(layout::MMIO_GAP_END + (1 << 30) - 1))
            .unwrap();
    }

    #[test]
    fn room_lies_above_ram_and_only_its_open_part_is_memory() {
        let mut memory = Memory::new(MemorySize::from_mib(32).unwrap()).unwrap();
        memory.add_room().unwrap();
        let start = memory.room().unwrap().start_addr();
        assert_eq!(start.0, layout::MMIO_GAP_END);
        let reaches = |memory: &Memory, at: u64| {
            let written = memory.ram().write_obj(7_u8, GuestAddress(start.0 + at));
            let slice = memory.ram().get_slice(GuestAddress(start.0 + at), 1);
            assert_eq!(written.is_ok(), slice.is_ok());
            slice.is_ok()
        };
        assert!(!reaches(&memory, 0));
        let mut slots = Vec::new();
        for bytes in [1, SECTION, 3 * SECTION, SECTION] {
            let opened = memory.open_room(bytes, |number, slot| {
                slots.push((number, slot.guest - start.0, slot.length));
                Ok::<_, MemoryError>(())
            });
            opened.unwrap();
        }
        assert_eq!(slots, [(1, 0, SECTION), (2, SECTION, 2 * SECTION)]);
        assert!(reaches(&memory, 3 * SECTION - 1));
        assert!(!reaches(&memory, 3 * SECTION));
        let over = memory
            .ram()
            .get_slice(GuestAddress(start.0 + 3 * SECTION - 1), 2);
        assert!(over.is_err());
        let refused = memory.open_room(4 * SECTION, |_, _| Err(MemoryError::Size { bytes: 0 }));
        assert!(refused.is_err() && !reaches(&memory, 3 * SECTION));
    }

    #[test]
    fn room_keeps_every_address_within_40_bits() {
        for mib in [96, 3 << 10, 4 << 10, 5000, 500 << 10] {
            let size = MemorySize::from_mib(mib).unwrap();
            let (start, length) = size.room().unwrap();
            let (last, of_last) = size.ranges().pop().unwrap();
            assert!(start.0 >= last.0 + of_last && start.0.is_multiple_of(layout::ROOM_ALIGN));
            assert!(size.bytes() + length <= MemorySize::MAX && start.0 + length <= 1 << 40);
        }
        let most = MemorySize::from_bytes(MemorySize::MAX).unwrap();
        assert!(most.room().is_none());
    }

    #[test]
    fn a_size_is_rounded_up_and_kept_within_limits() {
        let size = MemorySize::from_bytes((64 << 20) + 1).unwrap();
        assert_eq!(size.bytes(), 66 << 20);
        for bytes in [0, MemorySize::MIN - 1, MemorySize::MAX + 1, u64::MAX] {
            assert!(MemorySize::from_bytes(bytes).is_err(), "{bytes}");
        }
        assert!(MemorySize::from_mib(u64::MAX).is_err());
    }
}
