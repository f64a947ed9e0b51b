//! For the fuzz targets: devices that serve their queues on the notification itself, in the caller's
//! thread, and the loading of a kernel without a machine. What parses is the code that a machine runs.

use std::path::Path;
use std::sync::Arc;

use crate::boot::{self, Boot, BootError, Entry};
use crate::memory::{Memory, MemoryError, MemorySize, Region};

pub use crate::devices::virtio::block::inline::InlineBlock;
pub use crate::devices::virtio::fs::inline::InlineFs;
pub use crate::devices::virtio::net::inline::InlineNet;
pub use crate::devices::virtio::vsock::inline::{InlineVsock, VsockHost};

/// Brings the kernel at `path` into `memory`, as a machine's start does.
///
/// # Errors
/// The file is no kernel, or does not fit.
pub fn load_kernel(memory: &Memory, path: &Path) -> Result<Entry, BootError> {
    let boot = Boot {
        kernel: path,
        protocol: None,
        initramfs: &[],
        command_line: "quiet",
        rsdp: crate::layout::ACPI_TABLES,
    };
    boot::load(memory, &boot)
}

/// Room for memory that comes while a machine runs, of which the first `bytes` are open.
///
/// # Errors
/// The host's.
pub fn open_room(bytes: u64) -> Result<Arc<Region>, MemoryError> {
    let size = MemorySize::from_bytes(MemorySize::MIN)?;
    let mut memory = Memory::new(size)?;
    memory.add_room()?;
    memory.open_room(bytes, |_, _| Ok::<_, MemoryError>(()))?;
    let none = MemoryError::Size { bytes };
    memory.room().cloned().ok_or(none)
}
