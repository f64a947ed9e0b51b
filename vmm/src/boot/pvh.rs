//! The PVH boot record: Xen's `hvm_start_info` (`xen/include/public/arch-x86/hvm/start_info.h`).

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{Loaded, memory_map};
use crate::layout;
use crate::memory::GuestRam;

const MAGIC: u32 = 0x336e_c578;
/// The version with a memory map.
const VERSION: u32 = 1;

/// Writes the start info, its module list and its memory map.
pub(super) fn write_start_info(ram: &GuestRam, loaded: &Loaded) -> Result<(), GuestMemoryError> {
    let module_at = layout::PVH_INFO + size_of::<hvm_start_info>() as u64;
    let map_at = module_at + size_of::<hvm_modlist_entry>() as u64;
    let map = memory_map(loaded.size);
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: loaded.command_line,
        rsdp_paddr: loaded.rsdp,
        memmap_paddr: map_at,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some((paddr, size)) = loaded.initramfs {
        info.nr_modules = 1;
        info.modlist_paddr = module_at;
        let module = hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        };
        ram.write_obj(module, GuestAddress(module_at))?;
    }
    ram.write_obj(info, GuestAddress(layout::PVH_INFO))?;
    for (index, entry) in (0..).zip(map) {
        let at = map_at + index * size_of::<hvm_memmap_table_entry>() as u64;
        let entry = hvm_memmap_table_entry {
            addr: entry.address,
            size: entry.length,
            type_: entry.kind,
            reserved: 0,
        };
        ram.write_obj(entry, GuestAddress(at))?;
    }
    Ok(())
}
