//! The loader of kernels.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;

use vmm::fuzzing::load_kernel;
use vmm::memory::{Memory, MemorySize};

/// A file in memory and a machine's memory, for as long as the thread lives.
struct Place {
    file: File,
    path: PathBuf,
    memory: Memory,
}

thread_local! {
    static PLACE: Place = Place::new();
}

impl Place {
    fn new() -> Self {
        // SAFETY: the name is a string of C; the descriptor is ours alone.
        let file = unsafe {
            let fd = libc::memfd_create(c"kernel".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        };
        Self {
            path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
            file,
            memory: Memory::new(MemorySize::from_bytes(MemorySize::MIN).unwrap()).unwrap(),
        }
    }
}

/// An ELF kernel's headers, notes and segments.
pub fn kernel(data: &[u8]) {
    PLACE.with(|place| {
        let mut file = &place.file;
        file.set_len(0).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(data).unwrap();
        // Either is fine; it has to come back.
        let _ = load_kernel(&place.memory, &place.path);
    });
}
