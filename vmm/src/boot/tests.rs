use std::fs;
use std::path::PathBuf;

use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::hvm_start_info;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::*;

/// A kernel of one segment at 1 MiB, with or without a PVH note; it is not Linux.
fn elf(pvh: bool) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    put(&mut file, 16, &2u16.to_le_bytes());
    put(&mut file, 18, &62u16.to_le_bytes());
    put(&mut file, 24, &0x10_0000u64.to_le_bytes());
    put(&mut file, 32, &64u64.to_le_bytes());
    put(&mut file, 54, &56u16.to_le_bytes());
    put(&mut file, 56, &2u16.to_le_bytes());
    // Loadable: 0x100 bytes from 0x800, with 0x1000 in memory.
    put(&mut file, 64, &1u32.to_le_bytes());
    put(&mut file, 64 + 8, &0x800u64.to_le_bytes());
    put(&mut file, 64 + 24, &0x10_0000u64.to_le_bytes());
    put(&mut file, 64 + 32, &0x100u64.to_le_bytes());
    put(&mut file, 64 + 40, &0x1000u64.to_le_bytes());
    // Notes: one of another owner, then Xen's.
    put(&mut file, 120, &4u32.to_le_bytes());
    put(&mut file, 120 + 8, &0x400u64.to_le_bytes());
    put(&mut file, 120 + 32, &48u64.to_le_bytes());
    put(&mut file, 0x400, &note(b"Other\0", 1, &[7]));
    let kind = if pvh { 18 } else { 19 };
    put(
        &mut file,
        0x418,
        &note(b"Xen\0", kind, &0x10_0010u64.to_le_bytes()),
    );
    put(&mut file, 0x800, b"kernel");
    file
}

fn note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for number in [name.len() as u32, description.len() as u32, kind] {
        note.extend(number.to_le_bytes());
    }
    for part in [name, description] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

struct Fixture {
    directory: TempDir,
    memory: Memory,
}

impl Fixture {
    fn new() -> Self {
        Self {
            directory: TempDir::new().unwrap(),
            memory: Memory::new(MemorySize::from_mib(16).unwrap()).unwrap(),
        }
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn load(
        &self,
        kernel: &[u8],
        protocol: Option<BootProtocol>,
        initramfs: &[Segment],
    ) -> Result<Entry, BootError> {
        let kernel = self.file("vmlinux", kernel);
        let boot = Boot {
            kernel: &kernel,
            protocol,
            initramfs,
            command_line: "quiet",
            rsdp: 0xe_0000,
        };
        load(&self.memory, &boot)
    }

    fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let address = GuestAddress(address);
        self.memory.ram().read_slice(&mut bytes, address).unwrap();
        bytes
    }
}

#[test]
fn pvh_is_taken_where_a_kernel_other_than_linux_has_it() {
    let fixture = Fixture::new();
    let entry = fixture.load(&elf(true), None, &[]).unwrap();
    let protocol = BootProtocol::Pvh;
    let address = 0x10_0010;
    assert_eq!(entry, Entry { protocol, address });
    assert_eq!(fixture.bytes(0x10_0000, 7), b"kernel\0");
    assert_eq!(fixture.bytes(layout::COMMAND_LINE, 6), b"quiet\0");

    let protocol = BootProtocol::Linux64;
    let address = 0x10_0000;
    let expected = Entry { protocol, address };
    assert_eq!(fixture.load(&elf(false), None, &[]).unwrap(), expected);
    let asked = fixture.load(&elf(true), Some(protocol), &[]).unwrap();
    assert_eq!(asked, expected);
    let mut linux = elf(true);
    put(&mut linux, 0x400, &note(b"Linux\0", 1, &[7]));
    assert_eq!(fixture.load(&linux, None, &[]).unwrap(), expected);
}

#[test]
fn pvh_that_is_asked_for_must_be_there() {
    let result = Fixture::new().load(&elf(false), Some(BootProtocol::Pvh), &[]);
    let error = result.unwrap_err().to_string();
    assert!(
        error.ends_with("has no PVH entry (CONFIG_PVH is off)"),
        "{error}"
    );
}

#[test]
fn initramfs_parts_are_padded_and_both_records_point_to_them() {
    let fixture = Fixture::new();
    let path = fixture.file("modules.cpio", b"12345");
    let parts = [
        Segment::File(path),
        Segment::Bytes(b"abc".to_vec()),
        Segment::Bytes(b"Z".to_vec()),
    ];
    let at = (16 << 20) - 4096;
    let protocol = Some(BootProtocol::Linux64);
    fixture.load(&elf(true), protocol, &parts).unwrap();
    assert_eq!(fixture.bytes(at, 16), b"12345\0\0\0abc\0Z\0\0\0");
    let zero_page = GuestAddress(layout::ZERO_PAGE);
    let params: boot_params = fixture.memory.ram().read_obj(zero_page).unwrap();
    let header = params.hdr;
    let (image, size) = (header.ramdisk_image, header.ramdisk_size);
    assert_eq!((u64::from(image), size), (at, 16));
    let map = params.e820_table;
    let high = map[2];
    let (address, length, count) = (high.addr, high.size, params.e820_entries);
    assert_eq!((count, address, length), (3, 1 << 20, 15 << 20));

    fixture.load(&elf(true), None, &parts).unwrap();
    let info = GuestAddress(layout::PVH_INFO);
    let info: hvm_start_info = fixture.memory.ram().read_obj(info).unwrap();
    assert_eq!((info.nr_modules, info.memmap_entries), (1, 3));
    let module = fixture.bytes(info.modlist_paddr, 16);
    let expected = [at.to_le_bytes(), 16u64.to_le_bytes()].concat();
    assert_eq!(module, expected);
}

#[test]
fn what_is_not_a_kernel_is_refused_by_name() {
    let mut bzimage = vec![0; 0x1000];
    put(&mut bzimage, 0x202, b"HdrS");
    let mut arm = elf(true);
    put(&mut arm, 18, &183u16.to_le_bytes());
    let mut entry = elf(true);
    put(&mut entry, 24, &0x20_0000u64.to_le_bytes());
    let mut low = elf(true);
    put(&mut low, 64 + 24, &0x1000u64.to_le_bytes());
    let fixture = Fixture::new();
    for (kernel, text) in [
        (&b""[..], "is not an ELF file"),
        (b"\x7fELF", "is not an ELF file"),
        (b"#!/bin/sh\n", "is not an ELF file"),
        (&bzimage, "is a compressed bzImage"),
        (&elf(true)[..100], "is truncated"),
        (
            &elf(true)[..0x880],
            "is truncated: it has 2176 bytes, its headers need 2304",
        ),
        (&arm, "it is for another processor"),
        (&entry, "its entry lies outside of its segments"),
        (&low, "a segment lies below 1 MiB"),
    ] {
        let error = fixture.load(kernel, None, &[]).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
        assert!(error.contains("/vmlinux"), "{error}");
    }
}

#[test]
fn no_byte_of_a_kernel_can_make_the_loader_panic() {
    let fixture = Fixture::new();
    let good = elf(true);
    let numbers = (16..64).chain(64..176).chain(0x400..0x430);
    for at in numbers {
        for value in [0, 0x7f, 0x80, 0xff] {
            let mut kernel = good.clone();
            kernel[at] = value;
            kernel[at | 7] = value;
            // Whether it loads or not, it comes back.
            let _ = fixture.load(&kernel, None, &[]);
        }
    }
}

#[test]
fn memory_that_is_too_small_is_told_with_what_is_needed() {
    let fixture = Fixture::new();
    let parts = [Segment::Bytes(vec![0; 16 << 20])];
    let error = fixture.load(&elf(true), None, &parts).unwrap_err();
    let need = 0x10_1000 + (16 << 20) + 4096;
    assert!(
        error
            .to_string()
            .contains(&format!("at least {need} bytes")),
        "{error}"
    );
    let mut huge = elf(true);
    put(&mut huge, 64 + 40, &(u64::MAX - 0x10_0000).to_le_bytes());
    let error = fixture.load(&huge, None, &[]).unwrap_err();
    assert!(matches!(error, BootError::TooSmall { .. }), "{error}");
}

#[test]
fn files_that_are_missing_or_no_files_are_named() {
    let fixture = Fixture::new();
    let missing = [Segment::File("/nonexistent/part.cpio".into())];
    let error = fixture.load(&elf(true), None, &missing).unwrap_err();
    let text = "opening the initramfs /nonexistent/part.cpio";
    assert_eq!(error.to_string(), text);
    let directory = [Segment::File(fixture.directory.path().to_owned())];
    let error = fixture.load(&elf(true), None, &directory).unwrap_err();
    assert!(matches!(error, BootError::NotAFile { .. }), "{error}");
}

#[test]
fn a_command_line_is_short_and_printable() {
    assert_eq!(check_command_line("a b").unwrap(), b"a b\0");
    let most = layout::COMMAND_LINE_MAX - 1;
    assert!(check_command_line(&"x".repeat(most)).is_ok());
    for (text, what) in [
        ("x".repeat(most + 1), "has 2048 bytes"),
        ("a\nb".to_owned(), "the byte 0x0a"),
        ("a\0".to_owned(), "the byte 0x00"),
        ("ü".to_owned(), "the byte 0xc3"),
    ] {
        let error = check_command_line(&text).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn the_memory_map_leaves_out_the_device_gap() {
    let map = memory_map(MemorySize::from_mib(4096).unwrap());
    let ram = map.iter().filter(|e| e.kind == E820_RAM);
    let ranges: Vec<_> = ram.map(|e| (e.address, e.address + e.length)).collect();
    assert_eq!(
        ranges,
        [
            (0, layout::LOW_RAM_END),
            (layout::HIGH_RAM_START, layout::MMIO_GAP_START),
            (layout::MMIO_GAP_END, layout::MMIO_GAP_END + (1 << 30)),
        ]
    );
}
