//! The guest's physical address space: one place for every fixed address.
//!
//! RAM fills the space from 0, except for the gap below 4 GiB where devices are. The first megabyte
//! holds what the VMM writes for the kernel to read: boot parameters, page tables, ACPI tables.

/// First address behind the RAM that lies below 4 GiB: the start of the 32-bit device gap.
pub const MMIO_GAP_START: u64 = 0xc000_0000;
/// First address behind the 32-bit device gap; more RAM follows here.
pub const MMIO_GAP_END: u64 = 1 << 32;

/// The page where the 64-bit boot protocol's `boot_params` ("zero page") lie.
pub const ZERO_PAGE: u64 = 0x7000;
/// Where PVH's `hvm_start_info`, its memory map and its module list lie.
pub const PVH_INFO: u64 = 0x6000;
/// The global descriptor table that a booting vCPU has loaded.
pub const GDT: u64 = 0x500;
/// The identity page tables of the 64-bit boot: one page each for PML4, PDPT and PD.
pub const PAGE_TABLES: u64 = 0x9000;
/// The top of the stack that the 64-bit boot protocol's entry may use.
pub const BOOT_STACK: u64 = 0x8ff0;
/// The kernel's command line, NUL-terminated.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Most bytes of the command line with its NUL: x86's `COMMAND_LINE_SIZE`.
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of the low RAM that the kernel may use freely.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The ACPI tables, in the BIOS area, where also a kernel that is told nothing looks for the RSDP.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the area for ACPI tables.
pub const ACPI_TABLES_END: u64 = 0x10_0000;
/// The lowest address at which a kernel segment may lie.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// Base of the virtio-mmio devices' register windows.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// Size of one virtio-mmio register window: a page, so that each can be mapped alone.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// The interrupt line of the first virtio-mmio device; each following one has the next.
pub const VIRTIO_GSI_BASE: u32 = 5;
/// The most virtio-mmio devices. The I/O APIC has no more pins than there are lines.
pub const VIRTIO_MMIO_MAX: u32 = 32;

/// What the room for memory that comes while the machine runs is aligned to: the largest piece in which Linux takes any.
pub const ROOM_ALIGN: u64 = 2 << 30;

/// The I/O APIC's registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APIC's registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that Intel's VMX needs for real mode; below them lies its identity map page.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// The page for VMX's identity map.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// First port of the serial console, a 16550.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The serial console's interrupt line.
pub const SERIAL_GSI: u32 = 4;
/// First port of the power registers: sleep control, sleep status, reset.
pub const POWER_PORT: u16 = 0x600;
/// The keyboard controller's command port, which a kernel without ACPI writes to for a reset.
pub const I8042_COMMAND_PORT: u16 = 0x64;
