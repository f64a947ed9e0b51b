//! Which devices a cgroup of version 2 lets its processes use: its device programs, read back from the kernel and run here.
//!
//! The programs are others' too (systemd's, another runtime's). The kernel has verified them, so that they end; a step
//! limit holds all the same, and one that does what no device program does is not guessed at.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use super::devices::{Devices, Kind, MKNOD, READ, WRITE, attached, bpf, line};
use super::{Error, Result, io_error};

const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_F_QUERY_EFFECTIVE: u32 = 1;

/// How many steps a program is given.
const STEP_LIMIT: usize = 1 << 20;

/// Kernel ABI: `union bpf_attr` for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
#[derive(Default)]
struct InfoAttributes {
    fd: u32,
    length: u32,
    info: u64,
}

/// Kernel ABI: the first fields of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_length: u32,
    /// Bytes.
    length: u32,
    jited: u64,
    instructions: u64,
}

/// What the processes of a cgroup may do with devices, in the form of version 1: `c 1:3 rwm`, with `*` for any number.
///
/// # Errors
/// The programs cannot be read by this user, or cannot be understood.
pub(crate) fn allowed_devices(directory: &Path) -> Result<Vec<String>> {
    let failed = |source| io_error("read the device programs of", directory, source);
    let target = fs::File::open(directory).map_err(failed)?;
    let programs = attached(&target, BPF_F_QUERY_EFFECTIVE).map_err(failed)?;
    let programs: io::Result<Vec<_>> = programs.into_iter().map(instructions).collect();
    let programs = programs.map_err(failed)?;
    let access = |kind: u32, major: u32, minor: u32| -> Result<u8> {
        let mut allowed = 0;
        for bit in [READ, WRITE, MKNOD] {
            let context = [u32::from(bit) << 16 | kind, major, minor];
            let mut is_allowed = true;
            for program in &programs {
                is_allowed &= run(program, context).ok_or_else(|| Error::Unsupported {
                    field: directory.display().to_string(),
                    reason: "a device program of it is not understood",
                })?;
            }
            allowed |= if is_allowed { bit } else { 0 };
        }
        Ok(allowed)
    };
    let mut list = Vec::new();
    for (number, kind, known) in [(1, Kind::Block, "block"), (2, Kind::Char, "char")] {
        let mut push = |major, minor, access| {
            if access != 0 {
                list.push(line(&Devices { kind, major, minor }, access));
            }
        };
        // Numbers that no device has stand for all.
        let any = access(number, NO_MAJOR, NO_MINOR)?;
        push(None, None, any);
        let devices = known_devices(known);
        let majors: BTreeSet<u32> = devices.iter().map(|(major, _)| *major).collect();
        for major in majors {
            let of_major = access(number, major, NO_MINOR)?;
            if of_major & !any != 0 {
                push(Some(major), None, of_major);
            }
            for (_, minor) in devices.iter().filter(|(own, _)| *own == major) {
                let of_device = access(number, major, *minor)?;
                if of_device & !(any | of_major) != 0 {
                    push(Some(major), Some(*minor), of_device);
                }
            }
        }
    }
    let everything = ["b *:* rwm".to_owned(), "c *:* rwm".to_owned()];
    if list == everything {
        list = vec!["a *:* rwm".to_owned()];
    }
    Ok(list)
}

/// Greater than any number in use (`MAJOR`, `MINOR` have 12 and 20 bits).
const NO_MAJOR: u32 = 0xFFF;
const NO_MINOR: u32 = 0xF_FFFF;

/// The numbers of this system's devices.
fn known_devices(kind: &str) -> BTreeSet<(u32, u32)> {
    let entries = fs::read_dir(Path::new("/sys/dev").join(kind));
    let names = entries
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name());
    let numbers = names.filter_map(|name| {
        let (major, minor) = name.to_str()?.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    // Pseudo-terminals are made as they are opened.
    numbers
        .chain((kind == "char").then_some((136, 0)))
        .collect()
}

fn instructions(program: OwnedFd) -> io::Result<Vec<u8>> {
    let mut info = ProgramInfo::default();
    let ask = |info: &mut ProgramInfo| {
        let mut attributes = InfoAttributes {
            fd: program.as_raw_fd() as u32,
            length: size_of::<ProgramInfo>() as u32,
            info: std::ptr::from_mut(info) as u64,
        };
        bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)
    };
    ask(&mut info)?;
    let mut bytes = vec![0_u8; info.length as usize];
    info = ProgramInfo {
        length: info.length,
        instructions: bytes.as_mut_ptr() as u64,
        ..ProgramInfo::default()
    };
    ask(&mut info)?;
    // Whom it does not trust with them, the kernel gives a length and no instruction.
    if info.instructions == 0 || bytes.is_empty() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(bytes)
}

/// Where the context lies for a program: no other address is read.
const CONTEXT: u64 = 1 << 40;

/// Runs a program (`linux/bpf.h`, struct bpf_insn) on a `struct bpf_cgroup_dev_ctx`; `None`: it does more than a device
/// program needs to.
pub(super) fn run(program: &[u8], context: [u32; 3]) -> Option<bool> {
    let mut registers = [0_u64; 16];
    registers[1] = CONTEXT;
    let bytes: Vec<u8> = context.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut at = 0_usize;
    for _ in 0..STEP_LIMIT {
        let one: &[u8; 8] = program.get(at.checked_mul(8)?..)?.first_chunk()?;
        let code = one[0];
        let (to, from) = (usize::from(one[1] & 0xF), usize::from(one[1] >> 4));
        let offset = isize::from(i16::from_le_bytes([one[2], one[3]]));
        let immediate = i32::from_le_bytes([one[4], one[5], one[6], one[7]]);
        at += 1;
        // Immediates are extended by their sign.
        let operand = if code & 0x08 == 0 {
            immediate as u64
        } else {
            registers[from]
        };
        let is_narrow = matches!(code & 0x07, 0x04 | 0x06);
        let (left, right) = if is_narrow {
            (registers[to] & 0xFFFF_FFFF, operand & 0xFFFF_FFFF)
        } else {
            (registers[to], operand)
        };
        match code & 0x07 {
            // BPF_LDX | BPF_MEM
            0x01 if code & 0xE0 == 0x60 => {
                let length = match code & 0x18 {
                    0x00 => 4,
                    0x08 => 2,
                    0x10 => 1,
                    _ => return None,
                };
                let start = registers[from]
                    .wrapping_add_signed(offset as i64)
                    .checked_sub(CONTEXT)?;
                let start = usize::try_from(start).ok()?;
                let field = bytes.get(start..start.checked_add(length)?)?;
                let value = field
                    .iter()
                    .rev()
                    .fold(0, |value, byte| value << 8 | u64::from(*byte));
                registers[to] = value;
            }
            // BPF_LD | BPF_IMM | BPF_DW, in two slots
            0x00 if code == 0x18 => {
                let upper: &[u8; 8] = program.get(at * 8..)?.first_chunk()?;
                let upper = u32::from_le_bytes([upper[4], upper[5], upper[6], upper[7]]);
                registers[to] = u64::from(upper) << 32 | u64::from(immediate as u32);
                at += 1;
            }
            // BPF_ALU, BPF_ALU64
            0x04 | 0x07 => {
                let bits = if is_narrow { 31 } else { 63 };
                let value = match code & 0xF0 {
                    0x00 => left.wrapping_add(right),
                    0x10 => left.wrapping_sub(right),
                    0x20 => left.wrapping_mul(right),
                    0x30 => left.checked_div(right).unwrap_or(0),
                    0x40 => left | right,
                    0x50 => left & right,
                    0x60 => left << (right & bits),
                    0x70 => left >> (right & bits),
                    0x80 => left.wrapping_neg(),
                    0xA0 => left ^ right,
                    0xB0 => right,
                    _ => return None,
                };
                registers[to] = if is_narrow {
                    value & 0xFFFF_FFFF
                } else {
                    value
                };
            }
            // BPF_JMP, BPF_JMP32
            0x05 | 0x06 => {
                let holds = match code & 0xF0 {
                    0x00 => true,
                    0x10 => left == right,
                    0x20 => left > right,
                    0x30 => left >= right,
                    0x40 => left & right != 0,
                    0x50 => left != right,
                    0xA0 => left < right,
                    0xB0 => left <= right,
                    0x90 => return Some(registers[0] & 0xFFFF_FFFF != 0),
                    _ => return None,
                };
                if holds {
                    at = at.checked_add_signed(offset)?;
                }
            }
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::devices::tests::program_of;
    use super::*;

    const ALL: u8 = READ | WRITE | MKNOD;

    #[test]
    fn our_own_programs_are_understood() {
        let program = program_of(serde_json::json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 8, "minor": 1, "access": "r"}
        ]));
        let ask = |kind, major, minor, access: u8| {
            run(&program, [u32::from(access) << 16 | kind, major, minor])
        };
        assert_eq!(ask(1, 8, 1, READ), Some(true));
        assert_eq!(ask(1, 8, 1, WRITE), Some(false));
        assert_eq!(ask(1, 8, 2, READ), Some(false));
        assert_eq!(ask(2, 1, 3, ALL), Some(true));
        assert_eq!(ask(2, 1, 1, READ), Some(false));
        assert_eq!(ask(2, NO_MAJOR, NO_MINOR, MKNOD), Some(true));
    }

    #[test]
    fn what_is_not_a_device_program_is_not_guessed_at() {
        let call = [0x85, 0, 0, 0, 1, 0, 0, 0];
        let stack = [0x61, 0xA0, 0, 0, 0, 0, 0, 0];
        let beyond = [0x61, 0x10, 12, 0, 0, 0, 0, 0];
        let for_ever = [0x05, 0, 0xFF, 0xFF, 0, 0, 0, 0];
        for program in [&call[..], &stack, &beyond, &for_ever, &[], &[0x95]] {
            assert_eq!(run(program, [0; 3]), None, "{program:?}");
        }
    }
}
