//! Which device nodes a container may open or make: `linux.resources.devices`.
//!
//! The rules are folded into one default and its exceptions. Version 1 takes them as text; version 2 has no file for
//! them, so they become a small BPF program of type `BPF_PROG_TYPE_CGROUP_DEVICE`, attached to the cgroup.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::{Cgroup, Error, Result, io_error, write};

/// Access bits of the kernel's device check (`BPF_DEVCG_ACC_*`).
const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Block,
    Char,
}

/// A set of devices: a kind, and numbers that may stand for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Devices {
    kind: Kind,
    major: Option<u32>,
    minor: Option<u32>,
}

/// What every container may use: the devices that the runtime itself puts there, and making (not opening) any node.
const DEFAULTS: [(Kind, Option<u32>, Option<u32>, u8); 11] = [
    (Kind::Char, None, None, MKNOD),
    (Kind::Block, None, None, MKNOD),
    (Kind::Char, Some(1), Some(3), ALL), // null
    (Kind::Char, Some(1), Some(5), ALL), // zero
    (Kind::Char, Some(1), Some(7), ALL), // full
    (Kind::Char, Some(1), Some(8), ALL), // random
    (Kind::Char, Some(1), Some(9), ALL), // urandom
    (Kind::Char, Some(5), Some(0), ALL), // tty
    (Kind::Char, Some(5), Some(1), ALL), // console
    (Kind::Char, Some(5), Some(2), ALL), // ptmx
    (Kind::Char, Some(136), None, ALL),  // pts
];

/// The rules folded: a default answer and the accesses that are answered the other way.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Policy {
    allow: bool,
    exceptions: BTreeMap<Devices, u8>,
}

impl Policy {
    fn new(rules: &[LinuxDeviceCgroup]) -> Result<Self> {
        let mut policy = Self {
            allow: false,
            exceptions: BTreeMap::new(),
        };
        for (index, rule) in rules.iter().enumerate() {
            policy.add(index, rule)?;
        }
        for (kind, major, minor, access) in DEFAULTS {
            policy.set(Devices { kind, major, minor }, access, true);
        }
        Ok(policy)
    }

    fn add(&mut self, index: usize, rule: &LinuxDeviceCgroup) -> Result<()> {
        let refuse = |name: &str, reason| Error::Unsupported {
            field: format!("linux.resources.devices[{index}].{name}"),
            reason,
        };
        let number = |name: &str, value: Option<i64>| match value {
            None | Some(-1) => Ok(None),
            Some(value) => u32::try_from(value)
                .map(Some)
                .map_err(|_| refuse(name, "it must be -1 or a device number")),
        };
        let major = number("major", rule.major())?;
        let minor = number("minor", rule.minor())?;
        let mut access = 0;
        for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => return Err(refuse("access", "it must be made of r, w and m")),
            };
        }
        let kind = match rule.typ().unwrap_or(LinuxDeviceType::A) {
            LinuxDeviceType::A => {
                if major.is_some() || minor.is_some() {
                    return Err(refuse(
                        "type",
                        "\"a\" stands for all devices, without numbers",
                    ));
                }
                self.allow = rule.allow();
                self.exceptions.clear();
                return Ok(());
            }
            LinuxDeviceType::B => Kind::Block,
            LinuxDeviceType::C | LinuxDeviceType::U => Kind::Char,
            LinuxDeviceType::P => return Err(refuse("type", "a pipe is not a device")),
        };
        self.set(Devices { kind, major, minor }, access, rule.allow());
        Ok(())
    }

    fn set(&mut self, devices: Devices, access: u8, allow: bool) {
        let entry = self.exceptions.entry(devices).or_default();
        if allow == self.allow {
            *entry &= !access;
        } else {
            *entry |= access;
        }
        if *entry == 0 {
            self.exceptions.remove(&devices);
        }
    }

    fn allows_all(&self) -> bool {
        self.allow && self.exceptions.is_empty()
    }
}

pub(super) fn apply(cgroup: &Cgroup, rules: &[LinuxDeviceCgroup]) -> Result<()> {
    let policy = Policy::new(rules)?;
    if let Some(directory) = cgroup.v1("devices") {
        return apply_v1(&directory, &policy);
    }
    match cgroup.unified() {
        Some(directory) => apply_v2(&directory, &policy),
        None if policy.allows_all() => Ok(()),
        None => Err(Error::NoController {
            field: "linux.resources.devices".to_owned(),
            controller: "devices",
        }),
    }
}

fn apply_v1(directory: &Path, policy: &Policy) -> Result<()> {
    let (reset, other) = if policy.allow {
        ("devices.allow", "devices.deny")
    } else {
        ("devices.deny", "devices.allow")
    };
    write(&directory.join(reset), "a")?;
    for (devices, access) in &policy.exceptions {
        let number = |value: Option<u32>| value.map_or("*".to_owned(), |value| value.to_string());
        let mut line = match devices.kind {
            Kind::Block => "b ".to_owned(),
            Kind::Char => "c ".to_owned(),
        };
        line.push_str(&number(devices.major));
        line.push(':');
        line.push_str(&number(devices.minor));
        line.push(' ');
        for (bit, letter) in [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')] {
            if access & bit != 0 {
                line.push(letter);
            }
        }
        write(&directory.join(other), &line)?;
    }
    Ok(())
}

/// Kernel ABI: `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the low four bits, source in the high four.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers,
        offset,
        immediate,
    }
}

const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const AND_32: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const SHIFT_RIGHT_32: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const MOVE_32: u8 = 0xb4; // BPF_ALU | BPF_MOV | BPF_K
const MOVE_REGISTER_32: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const JUMP_EQUAL_32: u8 = 0x16; // BPF_JMP32 | BPF_JEQ | BPF_K
const JUMP_UNEQUAL_32: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
const EXIT: u8 = 0x95;

/// The program: r2 kind, r3 access, r4 major, r5 minor of `struct bpf_cgroup_dev_ctx`.
fn program(policy: &Policy) -> Vec<Instruction> {
    let mut code = vec![
        instruction(LOAD_WORD, 0x12, 0, 0),
        instruction(MOVE_REGISTER_32, 0x23, 0, 0),
        instruction(AND_32, 0x02, 0, 0xffff),
        instruction(SHIFT_RIGHT_32, 0x03, 0, 16),
        instruction(LOAD_WORD, 0x14, 4, 0),
        instruction(LOAD_WORD, 0x15, 8, 0),
    ];
    for (devices, access) in &policy.exceptions {
        let mut tests = vec![(
            JUMP_UNEQUAL_32,
            0x02,
            match devices.kind {
                Kind::Block => 1,
                Kind::Char => 2,
            },
        )];
        if let Some(major) = devices.major {
            tests.push((JUMP_UNEQUAL_32, 0x04, major as i32));
        }
        if let Some(minor) = devices.minor {
            tests.push((JUMP_UNEQUAL_32, 0x05, minor as i32));
        }
        let masked = if policy.allow {
            // Any access that is denied denies the request.
            Some((i32::from(*access), JUMP_EQUAL_32))
        } else if *access == ALL {
            None
        } else {
            // Any access beyond the allowed ones is not for this rule.
            Some((i32::from(ALL & !access), JUMP_UNEQUAL_32))
        };
        // Each failed test jumps behind this rule: over the other tests, the mask and the answer.
        let length = tests.len() + masked.map_or(0, |_| 3) + 2;
        for (position, (jump, register, value)) in tests.iter().enumerate() {
            let distance = (length - position - 1) as i16;
            code.push(instruction(*jump, *register, distance, *value));
        }
        if let Some((mask, jump)) = masked {
            code.push(instruction(MOVE_REGISTER_32, 0x31, 0, 0));
            code.push(instruction(AND_32, 0x01, 0, mask));
            code.push(instruction(jump, 0x01, 2, 0));
        }
        code.push(instruction(MOVE_32, 0x00, 0, i32::from(!policy.allow)));
        code.push(instruction(EXIT, 0, 0, 0));
    }
    code.push(instruction(MOVE_32, 0x00, 0, i32::from(policy.allow)));
    code.push(instruction(EXIT, 0, 0, 0));
    code
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Kernel ABI: the first fields of `union bpf_attr` for `BPF_PROG_LOAD`; the rest is zero.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// Kernel ABI: `union bpf_attr` for `BPF_PROG_ATTACH` and `BPF_PROG_DETACH`.
#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Kernel ABI: `union bpf_attr` for `BPF_PROG_QUERY`.
#[repr(C)]
#[derive(Default)]
struct QueryAttributes {
    target: u32,
    kind: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
}

/// Kernel ABI: `union bpf_attr` for `BPF_PROG_GET_FD_BY_ID`.
#[repr(C)]
#[derive(Default)]
struct IdAttributes {
    id: u32,
    next: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the structure is the kernel's for this command, of the size given; what it points to outlives the call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer as libc::c_int)
}

fn apply_v2(directory: &Path, policy: &Policy) -> Result<()> {
    let failed = |operation: &str| {
        let operation = format!("{operation} the device program of");
        move |source| io_error(&operation, directory, source)
    };
    let target = fs::File::open(directory).map_err(|source| io_error("open", directory, source))?;
    // A program that is not there cannot be in the way: without BPF in the kernel there is none.
    let old = attached(&target).unwrap_or_default();
    if !policy.allows_all() {
        let code = program(policy);
        let mut load = LoadAttributes {
            kind: BPF_PROG_TYPE_CGROUP_DEVICE,
            count: code.len() as u32,
            instructions: code.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            ..LoadAttributes::default()
        };
        let fd = bpf(BPF_PROG_LOAD, &mut load).map_err(failed("load"))?;
        // SAFETY: the kernel has just made this descriptor for us alone (close-on-exec is always set on it).
        let loaded = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut attach = AttachAttributes {
            target: target.as_raw_fd() as u32,
            program: loaded.as_raw_fd() as u32,
            kind: BPF_CGROUP_DEVICE,
            flags: BPF_F_ALLOW_MULTI,
        };
        bpf(BPF_PROG_ATTACH, &mut attach).map_err(failed("attach"))?;
    }
    // All attached programs must agree, so the old ones go after the new one is there.
    for program in old {
        let mut detach = AttachAttributes {
            target: target.as_raw_fd() as u32,
            program: program.as_raw_fd() as u32,
            kind: BPF_CGROUP_DEVICE,
            flags: 0,
        };
        bpf(BPF_PROG_DETACH, &mut detach).map_err(failed("detach"))?;
    }
    Ok(())
}

/// The device programs that are attached to this very cgroup.
fn attached(target: &fs::File) -> io::Result<Vec<OwnedFd>> {
    let mut ids = [0u32; 64];
    let mut query = QueryAttributes {
        target: target.as_raw_fd() as u32,
        kind: BPF_CGROUP_DEVICE,
        ids: ids.as_mut_ptr() as u64,
        count: ids.len() as u32,
        ..QueryAttributes::default()
    };
    bpf(BPF_PROG_QUERY, &mut query)?;
    ids.iter()
        .take(query.count as usize)
        .map(|id| {
            let mut attributes = IdAttributes {
                id: *id,
                ..IdAttributes::default()
            };
            let fd = bpf(BPF_PROG_GET_FD_BY_ID, &mut attributes)?;
            // SAFETY: the kernel has just made this descriptor for us alone.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxDeviceCgroupBuilder;

    use super::*;

    /// Runs the program as the kernel would, on one request.
    fn answer(code: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [kind | access << 16, major, minor];
        let mut registers = [0u32; 11];
        let mut next = 0usize;
        loop {
            let one = code[next];
            next += 1;
            let to = usize::from(one.registers & 0xf);
            let from = usize::from(one.registers >> 4);
            let jump = match one.code {
                LOAD_WORD => {
                    registers[to] = context[one.offset as usize / 4];
                    false
                }
                AND_32 => {
                    registers[to] &= one.immediate as u32;
                    false
                }
                SHIFT_RIGHT_32 => {
                    registers[to] >>= one.immediate;
                    false
                }
                MOVE_32 => {
                    registers[to] = one.immediate as u32;
                    false
                }
                MOVE_REGISTER_32 => {
                    registers[to] = registers[from];
                    false
                }
                JUMP_EQUAL_32 => registers[to] == one.immediate as u32,
                JUMP_UNEQUAL_32 => registers[to] != one.immediate as u32,
                EXIT => return registers[0] != 0,
                other => panic!("unknown instruction {other:#x}"),
            };
            if jump {
                next += one.offset as usize;
            }
        }
    }

    const B: u32 = 1;
    const C: u32 = 2;

    #[test]
    fn the_default_devices_are_allowed_and_others_are_not() {
        let code = program(&Policy::new(&[]).unwrap());
        assert!(answer(&code, C, u32::from(READ | WRITE), 1, 3), "null");
        assert!(answer(&code, C, u32::from(WRITE), 136, 77), "a terminal");
        assert!(
            answer(&code, C, u32::from(MKNOD), 10, 200),
            "making any node"
        );
        assert!(!answer(&code, C, u32::from(READ), 10, 200), "opening tun");
        assert!(!answer(&code, B, u32::from(READ), 8, 0), "a disk");
        assert!(!answer(&code, B, u32::from(READ), 1, 3), "the kind counts");
    }

    #[test]
    fn rules_are_folded_in_their_order() {
        let rules = [
            LinuxDeviceCgroupBuilder::default()
                .allow(false)
                .access("rwm")
                .build()
                .unwrap(),
            LinuxDeviceCgroupBuilder::default()
                .allow(true)
                .typ(LinuxDeviceType::B)
                .major(8)
                .access("r")
                .build()
                .unwrap(),
            LinuxDeviceCgroupBuilder::default()
                .allow(true)
                .typ(LinuxDeviceType::B)
                .major(8)
                .access("w")
                .build()
                .unwrap(),
        ];
        let code = program(&Policy::new(&rules).unwrap());
        assert!(answer(&code, B, u32::from(READ | WRITE), 8, 1));
        assert!(!answer(&code, B, u32::from(READ), 9, 1));
    }

    #[test]
    fn exceptions_to_allowing_all_deny_any_of_their_accesses() {
        let rules = [
            LinuxDeviceCgroupBuilder::default()
                .allow(true)
                .build()
                .unwrap(),
            LinuxDeviceCgroupBuilder::default()
                .allow(false)
                .typ(LinuxDeviceType::C)
                .major(10)
                .minor(200)
                .access("w")
                .build()
                .unwrap(),
        ];
        let policy = Policy::new(&rules).unwrap();
        let code = program(&policy);
        assert!(answer(&code, C, u32::from(READ), 10, 200));
        assert!(!answer(&code, C, u32::from(READ | WRITE), 10, 200));
        assert!(answer(&code, B, u32::from(READ | WRITE), 8, 0));
        assert!(!policy.allows_all());
        assert!(Policy::new(&rules[..1]).unwrap().allows_all());
    }

    #[test]
    fn a_wrong_rule_is_named() {
        let rule = LinuxDeviceCgroupBuilder::default()
            .allow(true)
            .typ(LinuxDeviceType::C)
            .access("rx")
            .build()
            .unwrap();
        let error = Policy::new(&[rule]).unwrap_err().to_string();
        assert!(
            error.starts_with("linux.resources.devices[0].access"),
            "{error}"
        );
    }
}
