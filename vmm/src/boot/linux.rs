//! The 64-bit boot protocol of Linux: the zero page (`Documentation/arch/x86/boot.rst` and
//! `zero-page.rst` of the kernel), the page tables and the descriptors that the entry expects.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{Loaded, memory_map};
use crate::layout;
use crate::memory::GuestRam;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Version 2.15, the first with all fields that are set here.
const PROTOCOL_VERSION: u16 = 0x20f;
/// `type_of_loader` of a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the kernel lies at 1 MiB or above.
const LOADED_HIGH: u8 = 1;

/// A page table entry: present, writable.
const PRESENT_WRITABLE: u64 = 0b11;
/// A page directory entry: a 2 MiB page.
const LARGE_PAGE: u64 = 1 << 7;

/// Writes the zero page and the page tables.
pub(super) fn write_zero_page(ram: &GuestRam, loaded: &Loaded) -> Result<(), GuestMemoryError> {
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.version = PROTOCOL_VERSION;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags = LOADED_HIGH;
    params.hdr.kernel_alignment = crate::memory::HUGE_PAGE as u32;
    params.hdr.cmd_line_ptr = loaded.command_line as u32;
    params.hdr.cmdline_size = loaded.command_line_length;
    if let Some((address, length)) = loaded.initramfs {
        // Both lie below 4 GiB: the initramfs ends before the device gap.
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = length as u32;
    }
    params.acpi_rsdp_addr = loaded.rsdp;
    for (slot, entry) in params.e820_table.iter_mut().zip(memory_map(loaded.size)) {
        *slot = boot_e820_entry {
            addr: entry.address,
            size: entry.length,
            type_: entry.kind,
        };
        params.e820_entries += 1;
    }
    ram.write_obj(params, GuestAddress(layout::ZERO_PAGE))?;
    write_page_tables(ram)
}

/// Maps the first GiB to itself with 2 MiB pages.
pub(crate) fn write_page_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let [pml4, pdpt, pd] = [0, 1, 2].map(|page| layout::PAGE_TABLES + page * 4096);
    ram.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    ram.write_obj(pd | PRESENT_WRITABLE, GuestAddress(pdpt))?;
    for index in 0..512u64 {
        let entry = index << 21 | LARGE_PAGE | PRESENT_WRITABLE;
        ram.write_obj(entry, GuestAddress(pd + index * 8))?;
    }
    Ok(())
}
