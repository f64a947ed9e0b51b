//! Bringing a kernel into guest memory, with its initramfs, its command line and its boot record.
//!
//! The files are named by the caller and may still be anything, so each number in them is checked.
//! Nothing here reads what a guest wrote: it is over before the first instruction runs.

mod elf;
mod initramfs;
mod linux;
mod pvh;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;
use vm_memory::GuestMemoryError;

use crate::layout;
use crate::memory::{Memory, MemorySize};

pub use initramfs::Segment;
pub(crate) use linux::write_page_tables;

/// How a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootProtocol {
    /// PVH (Xen's direct boot ABI): 32-bit protected mode at the address in an ELF note.
    Pvh,
    /// Linux's 64-bit boot protocol: long mode at the ELF entry, with a zero page.
    Linux64,
}

/// A file that a guest boots from, as errors name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootFile {
    /// The kernel.
    Kernel,
    /// A part of the initramfs.
    Initramfs,
}

impl std::fmt::Display for BootFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
        })
    }
}

/// Why a guest cannot be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file cannot be opened.
    #[error("opening the {file} {}", .path.display())]
    Open {
        /// What it was to be.
        file: BootFile,
        /// Its path.
        path: PathBuf,
        /// What open said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("reading the {file} {}", .path.display())]
    Read {
        /// What it was to be.
        file: BootFile,
        /// Its path.
        path: PathBuf,
        /// What read said.
        #[source]
        source: io::Error,
    },
    /// The path names a directory, a device or the like.
    #[error("the {file} {} is not a regular file", .path.display())]
    NotAFile {
        /// What it was to be.
        file: BootFile,
        /// Its path.
        path: PathBuf,
    },
    /// The kernel is compressed.
    #[error(
        "the kernel {} is a compressed bzImage: unpack it to the ELF vmlinux in it first",
        .path.display()
    )]
    BzImage {
        /// Its path.
        path: PathBuf,
    },
    /// The kernel is no ELF file.
    #[error("the kernel {} is not an ELF file: give an uncompressed vmlinux", .path.display())]
    NotElf {
        /// Its path.
        path: PathBuf,
    },
    /// The kernel is an ELF file, but none for this machine.
    #[error("the kernel {} is not an x86-64 ELF kernel: {reason}", .path.display())]
    Unsupported {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// The kernel's headers name bytes that the file does not have.
    #[error(
        "the kernel {} is truncated: it has {have} bytes, its headers need {need}",
        .path.display()
    )]
    Truncated {
        /// Its path.
        path: PathBuf,
        /// The file's length.
        have: u64,
        /// The length that the headers speak of.
        need: u64,
    },
    /// PVH was asked for, but the kernel has no PVH entry.
    #[error("the kernel {} has no PVH entry (CONFIG_PVH is off)", .path.display())]
    NoPvhEntry {
        /// Its path.
        path: PathBuf,
    },
    /// Kernel and initramfs do not fit.
    #[error(
        "guest memory of {have} bytes is too small for the kernel {} with its initramfs: it needs \
         at least {need} bytes", .path.display()
    )]
    TooSmall {
        /// The kernel's path.
        path: PathBuf,
        /// The least that holds them.
        need: u64,
        /// The guest's memory, or the part of it where they may lie.
        have: u64,
    },
    /// The command line is too long.
    #[error("the kernel's command line has {length} bytes, the kernel takes at most {most}")]
    CommandLineTooLong {
        /// Its length.
        length: usize,
        /// The most that the kernel takes.
        most: usize,
    },
    /// The command line has a byte that a kernel cannot take.
    #[error("the kernel's command line has the byte {byte:#04x}; it must be printable ASCII")]
    CommandLineByte {
        /// The first such byte.
        byte: u8,
    },
    /// A boot record could not be written; a fault of the layout.
    #[error("writing the guest's boot records")]
    Memory(#[source] GuestMemoryError),
}

/// The state in which the boot processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// How the kernel is entered.
    pub protocol: BootProtocol,
    /// Where: a physical address.
    pub address: u64,
}

/// What is loaded, apart from the ACPI tables.
#[derive(Debug)]
pub(crate) struct Boot<'a> {
    pub kernel: &'a Path,
    /// The protocol asked for, or none for the one that suits the kernel.
    pub protocol: Option<BootProtocol>,
    pub initramfs: &'a [Segment],
    pub command_line: &'a str,
    /// Address of the ACPI root pointer.
    pub rsdp: u64,
}

/// Where things lie, for the boot records.
#[derive(Debug)]
struct Loaded {
    command_line: u64,
    command_line_length: u32,
    /// Address and length; none if there is no initramfs.
    initramfs: Option<(u64, u64)>,
    rsdp: u64,
    size: MemorySize,
}

/// A range of the guest's memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MapEntry {
    address: u64,
    length: u64,
    /// As in e820: 1 is RAM, 3 holds ACPI tables.
    kind: u32,
}

const E820_RAM: u32 = 1;
const E820_ACPI: u32 = 3;

/// The memory map that the kernel is told.
fn memory_map(size: MemorySize) -> Vec<MapEntry> {
    let mut map = vec![
        MapEntry {
            address: 0,
            length: layout::LOW_RAM_END,
            kind: E820_RAM,
        },
        MapEntry {
            address: layout::ACPI_TABLES,
            length: layout::ACPI_TABLES_END - layout::ACPI_TABLES,
            kind: E820_ACPI,
        },
    ];
    for (start, length) in size.ranges() {
        let address = start.0.max(layout::HIGH_RAM_START);
        map.push(MapEntry {
            address,
            length: start.0 + length - address,
            kind: E820_RAM,
        });
    }
    map
}

/// Loads everything and writes the boot record.
pub(crate) fn load(memory: &Memory, boot: &Boot<'_>) -> Result<Entry, BootError> {
    let ram = memory.ram();
    let kernel = elf::Kernel::open(boot.kernel)?;
    let entry = entry(&kernel, boot)?;
    let low = memory.size().bytes().min(layout::MMIO_GAP_START);
    let parts = initramfs::Parts::open(boot.initramfs)?;
    let too_small = |need| BootError::TooSmall {
        path: boot.kernel.to_owned(),
        need,
        have: low,
    };
    // The kernel also needs memory to run in, of which only it knows how much.
    let need = kernel.end().saturating_add(parts.length());
    if need > low {
        return Err(too_small(need));
    }
    kernel.load(ram)?;
    let initramfs = parts.load(ram, low)?;

    let command_line = check_command_line(boot.command_line)?;
    let address = vm_memory::GuestAddress(layout::COMMAND_LINE);
    vm_memory::Bytes::write_slice(&**ram, &command_line, address).map_err(BootError::Memory)?;
    let loaded = Loaded {
        command_line: layout::COMMAND_LINE,
        command_line_length: boot.command_line.len() as u32,
        initramfs,
        rsdp: boot.rsdp,
        size: memory.size(),
    };
    match entry.protocol {
        BootProtocol::Pvh => pvh::write_start_info(ram, &loaded),
        BootProtocol::Linux64 => linux::write_zero_page(ram, &loaded),
    }
    .map_err(BootError::Memory)?;
    Ok(entry)
}

/// Chooses how the kernel is entered. By PVH, Linux first looks for Xen at 256 places, each of them
/// an exit; by its own protocol it does not. Another kernel is entered by PVH if it can be.
fn entry(kernel: &elf::Kernel, boot: &Boot<'_>) -> Result<Entry, BootError> {
    let pvh = |address| Entry {
        protocol: BootProtocol::Pvh,
        address,
    };
    let linux = Entry {
        protocol: BootProtocol::Linux64,
        address: kernel.entry(),
    };
    match (boot.protocol, kernel.pvh_entry()) {
        (Some(BootProtocol::Pvh), Some(address)) => Ok(pvh(address)),
        (Some(BootProtocol::Pvh), None) => {
            let path = boot.kernel.to_owned();
            Err(BootError::NoPvhEntry { path })
        }
        (None, Some(address)) if !kernel.is_linux() => Ok(pvh(address)),
        (None | Some(BootProtocol::Linux64), _) => Ok(linux),
    }
}

/// The command line with its NUL, if a kernel can take it.
fn check_command_line(text: &str) -> Result<Vec<u8>, BootError> {
    let most = layout::COMMAND_LINE_MAX - 1;
    let length = text.len();
    if length > most {
        return Err(BootError::CommandLineTooLong { length, most });
    }
    if let Some(byte) = text.bytes().find(|b| !(b' '..=b'~').contains(b)) {
        return Err(BootError::CommandLineByte { byte });
    }
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    Ok(bytes)
}

#[cfg(test)]
mod tests;
