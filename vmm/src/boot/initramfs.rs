//! The initramfs: several cpio archives, one behind the other, as Linux unpacks them.
//!
//! Each part starts at a multiple of four, which is what cpio's newc format needs. The parts lie at
//! the top of the memory below the device gap, out of the kernel's way.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use super::elf::open_regular;
use super::{BootError, BootFile};
use crate::memory::GuestRam;

/// A part of the initramfs: an uncompressed or compressed cpio archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// The content of a file.
    File(PathBuf),
    /// Bytes that the caller made.
    Bytes(Vec<u8>),
}

#[derive(Debug)]
enum Part<'a> {
    File(File, u64, &'a Path),
    Bytes(&'a [u8]),
}

/// The parts, opened and measured.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    parts: Vec<Part<'a>>,
    length: u64,
}

/// The end of the initramfs: a page boundary, so that the kernel can free it whole.
const ALIGNMENT: u64 = 4096;

impl<'a> Parts<'a> {
    pub fn open(segments: &'a [Segment]) -> Result<Self, BootError> {
        let parts = segments.iter().map(Part::open);
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        let lengths = parts.iter().map(|p| p.length().next_multiple_of(4));
        let length = lengths.fold(0, u64::saturating_add);
        Ok(Self { parts, length })
    }

    /// The length of all parts, each padded.
    pub fn length(&self) -> u64 {
        self.length.saturating_add(ALIGNMENT)
    }

    /// Copies the parts so that they end below `end`; says where they are.
    pub fn load(self, ram: &GuestRam, end: u64) -> Result<Option<(u64, u64)>, BootError> {
        if self.length == 0 {
            return Ok(None);
        }
        let start = end.saturating_sub(self.length) & !(ALIGNMENT - 1);
        let mut at = start;
        for part in &self.parts {
            part.load(ram, GuestAddress(at))?;
            at += part.length().next_multiple_of(4);
        }
        Ok(Some((start, at - start)))
    }
}

impl<'a> Part<'a> {
    fn open(segment: &'a Segment) -> Result<Self, BootError> {
        match segment {
            Segment::Bytes(bytes) => Ok(Self::Bytes(bytes)),
            Segment::File(path) => {
                let file = open_regular(BootFile::Initramfs, path)?;
                let metadata = file.metadata().map_err(|e| read_error(path, e))?;
                Ok(Self::File(file, metadata.len(), path))
            }
        }
    }

    fn length(&self) -> u64 {
        match self {
            Self::File(_, length, _) => *length,
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }

    fn load(&self, ram: &GuestRam, at: GuestAddress) -> Result<(), BootError> {
        match self {
            Self::Bytes(bytes) => ram.write_slice(bytes, at).map_err(BootError::Memory),
            Self::File(file, length, path) => {
                let length = usize::try_from(*length).unwrap_or(usize::MAX);
                let mut file = file;
                ram.read_exact_volatile_from(at, &mut file, length)
                    .map_err(|error| read_error(path, io::Error::other(error)))
            }
        }
    }
}

fn read_error(path: &Path, source: io::Error) -> BootError {
    BootError::Read {
        file: BootFile::Initramfs,
        path: path.to_owned(),
        source,
    }
}
