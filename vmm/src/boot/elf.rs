//! Reads an ELF `vmlinux`: where its segments go and how it is entered.
//!
//! Every number of the file is taken as hostile. The formats: ELF-64 (System V gABI, chapters 4 and
//! 5) and Xen's PVH note (`XEN_ELFNOTE_PHYS32_ENTRY`).

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, BootFile};
use crate::layout;
use crate::memory::GuestRam;

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;
const MACHINE_X86_64: u16 = 62;
const TYPE_EXEC: u16 = 2;
const TYPE_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Xen's note that holds the 32-bit entry point for PVH.
const XEN_PHYS32_ENTRY: u32 = 18;
/// The owner of the notes that every Linux kernel has (`include/linux/elfnote-lto.h`, `build-salt.h`).
const LINUX_OWNER: &[u8] = b"Linux\0\0\0";
/// Notes of a kernel take some hundred bytes; more than this is not read.
const NOTES_MAX: u64 = 64 << 10;
/// A bzImage has its magic behind the boot sector (Linux x86 boot protocol, `header`).
const BZIMAGE_MAGIC_AT: u64 = 0x202;

/// A part of the kernel that is to be in memory.
#[derive(Debug, Clone, Copy)]
struct Segment {
    offset: u64,
    address: u64,
    file_length: u64,
}

/// An ELF kernel that has been checked and not yet loaded.
#[derive(Debug)]
pub(super) struct Kernel {
    file: File,
    path: PathBuf,
    entry: u64,
    notes: Notes,
    segments: Vec<Segment>,
    end: u64,
}

/// What the notes of a kernel say.
#[derive(Debug, Clone, Copy, Default)]
struct Notes {
    /// It is Linux.
    linux: bool,
    /// The 32-bit entry for PVH.
    pvh_entry: Option<u64>,
}

impl Kernel {
    /// Opens the kernel at `path` and checks all of its headers.
    pub fn open(path: &Path) -> Result<Self, BootError> {
        let file = open_regular(BootFile::Kernel, path)?;
        Parser { file: &file, path }.parse()?.complete(file, path)
    }

    /// The 64-bit entry, a physical address.
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// The 32-bit PVH entry, a physical address, if the kernel has one.
    pub fn pvh_entry(&self) -> Option<u64> {
        self.notes.pvh_entry
    }

    /// Whether the kernel is Linux, whose 64-bit entry needs no note.
    pub fn is_linux(&self) -> bool {
        self.notes.linux
    }

    /// The first physical address behind the kernel and its zeroed data.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Copies the segments to where they belong. What is to be zero is so already.
    pub fn load(&self, ram: &GuestRam) -> Result<(), BootError> {
        for segment in &self.segments {
            let mut file = &self.file;
            let length = usize::try_from(segment.file_length).unwrap_or(usize::MAX);
            file.seek(SeekFrom::Start(segment.offset))
                .map_err(|source| self.read_error(source))?;
            ram.read_exact_volatile_from(GuestAddress(segment.address), &mut file, length)
                .map_err(|error| self.read_error(io::Error::other(error)))?;
        }
        Ok(())
    }

    fn read_error(&self, source: io::Error) -> BootError {
        BootError::Read {
            file: BootFile::Kernel,
            path: self.path.clone(),
            source,
        }
    }
}

/// Opens a file to boot from; refuses what would block or never end.
pub(super) fn open_regular(file: BootFile, path: &Path) -> Result<File, BootError> {
    use std::os::unix::fs::OpenOptionsExt;
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .and_then(|f| f.metadata().map(|m| (f, m)));
    match opened {
        Ok((opened, metadata)) if metadata.is_file() => Ok(opened),
        Ok(_) => Err(BootError::NotAFile {
            file,
            path: path.to_owned(),
        }),
        Err(source) => Err(BootError::Open {
            file,
            path: path.to_owned(),
            source,
        }),
    }
}

/// What the headers say.
struct Headers {
    entry: u64,
    notes: Notes,
    segments: Vec<Segment>,
    end: u64,
}

impl Headers {
    fn complete(self, file: File, path: &Path) -> Result<Kernel, BootError> {
        Ok(Kernel {
            file,
            path: path.to_owned(),
            entry: self.entry,
            notes: self.notes,
            segments: self.segments,
            end: self.end,
        })
    }
}

struct Parser<'a> {
    file: &'a File,
    path: &'a Path,
}

impl Parser<'_> {
    fn parse(&self) -> Result<Headers, BootError> {
        let header: [u8; HEADER_BYTES] = match self.bytes(0, HEADER_BYTES as u64) {
            Ok(bytes) => bytes.try_into().map_err(|_| self.not_elf())?,
            Err(BootError::Truncated { .. }) => return Err(self.no_kernel()),
            Err(error) => return Err(error),
        };
        if !header.starts_with(b"\x7fELF") {
            return Err(self.no_kernel());
        }
        let reason = match () {
            () if header[4] != 2 => Some("it is not 64-bit"),
            () if header[5] != 1 => Some("it is big-endian"),
            () if u16_at(&header, 18) != MACHINE_X86_64 => Some("it is for another processor"),
            () if ![TYPE_EXEC, TYPE_DYN].contains(&u16_at(&header, 16)) => {
                Some("it is not an executable")
            }
            () if u16_at(&header, 54) != PROGRAM_HEADER_BYTES => {
                Some("its program headers have an unknown size")
            }
            () => None,
        };
        if let Some(reason) = reason {
            return Err(self.unsupported(reason));
        }
        self.segments(&header)
    }

    fn segments(&self, header: &[u8; HEADER_BYTES]) -> Result<Headers, BootError> {
        let count = u64::from(u16_at(header, 56));
        let table = self.bytes(u64_at(header, 32), count * u64::from(PROGRAM_HEADER_BYTES))?;
        let mut headers = Headers {
            entry: u64_at(header, 24),
            notes: Notes::default(),
            segments: Vec::new(),
            end: 0,
        };
        for program in table.chunks_exact(PROGRAM_HEADER_BYTES.into()) {
            let segment = Segment {
                offset: u64_at(program, 8),
                address: u64_at(program, 24),
                file_length: u64_at(program, 32),
            };
            match u32_at(program, 0) {
                PT_LOAD => self.add(&mut headers, segment, u64_at(program, 40))?,
                PT_NOTE => {
                    let length = segment.file_length.min(NOTES_MAX);
                    headers.notes.read(&self.bytes(segment.offset, length)?);
                }
                _ => {}
            }
        }
        let loaded = layout::HIGH_RAM_START..headers.end;
        let entries = [Some(headers.entry), headers.notes.pvh_entry];
        if !entries.iter().flatten().all(|entry| loaded.contains(entry)) {
            return Err(self.unsupported("its entry lies outside of its segments"));
        }
        Ok(headers)
    }

    fn add(
        &self,
        headers: &mut Headers,
        segment: Segment,
        memory_length: u64,
    ) -> Result<(), BootError> {
        if segment.file_length > memory_length {
            return Err(self.unsupported("a segment is longer in the file than in memory"));
        }
        if segment.address < layout::HIGH_RAM_START {
            return Err(self.unsupported("a segment lies below 1 MiB"));
        }
        let end = segment.address.checked_add(memory_length);
        let end = end.ok_or_else(|| self.unsupported("a segment wraps around"))?;
        self.check_length(segment.offset, segment.file_length)?;
        headers.end = headers.end.max(end);
        headers.segments.push(segment);
        Ok(())
    }

    /// Fails if the file has no `length` bytes at `offset`.
    fn check_length(&self, offset: u64, length: u64) -> Result<(), BootError> {
        let have = self.file.metadata().map_err(|e| self.read_error(e))?.len();
        let need = offset.saturating_add(length);
        if need > have {
            let path = self.path.to_owned();
            return Err(BootError::Truncated { path, have, need });
        }
        Ok(())
    }

    fn bytes(&self, offset: u64, length: u64) -> Result<Vec<u8>, BootError> {
        self.check_length(offset, length)?;
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        let read = self.file.read_exact_at(&mut bytes, offset);
        read.map_err(|source| self.read_error(source))?;
        Ok(bytes)
    }

    /// The error for a file without the ELF magic.
    fn no_kernel(&self) -> BootError {
        match self.bytes(BZIMAGE_MAGIC_AT, 4) {
            Ok(magic) if magic == b"HdrS" => BootError::BzImage {
                path: self.path.to_owned(),
            },
            _ => self.not_elf(),
        }
    }

    fn not_elf(&self) -> BootError {
        BootError::NotElf {
            path: self.path.to_owned(),
        }
    }

    fn unsupported(&self, reason: &'static str) -> BootError {
        BootError::Unsupported {
            path: self.path.to_owned(),
            reason,
        }
    }

    fn read_error(&self, source: io::Error) -> BootError {
        BootError::Read {
            file: BootFile::Kernel,
            path: self.path.to_owned(),
            source,
        }
    }
}

impl Notes {
    /// Takes up what a segment of notes says; stops where it is cut short.
    fn read(&mut self, mut notes: &[u8]) {
        while let Some((note, rest)) = Note::split(notes) {
            self.linux |= note.owner == LINUX_OWNER;
            if note.owner == b"Xen\0" && note.kind == XEN_PHYS32_ENTRY {
                let entry = note.description.first_chunk::<4>();
                self.pvh_entry = entry.map(|e| u32::from_le_bytes(*e).into());
            }
            notes = rest;
        }
    }
}

/// A note; owner and description are padded to a multiple of four.
struct Note<'a> {
    owner: &'a [u8],
    kind: u32,
    description: &'a [u8],
}

impl<'a> Note<'a> {
    fn split(notes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (head, rest) = notes.split_at_checked(12)?;
        let padded = |at| (u32_at(head, at) as usize).next_multiple_of(4);
        let (owner, rest) = rest.split_at_checked(padded(0))?;
        let (description, rest) = rest.split_at_checked(padded(4))?;
        let note = Self {
            owner,
            kind: u32_at(head, 8),
            description,
        };
        Some((note, rest))
    }
}

/// Reads a little-endian number from a header whose length has been checked.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
