//! Which device nodes a container may open or make: `linux.resources.devices`.
//!
//! A rule overrides those before it. Version 2 has no file for them: they become a small BPF program of type
//! `BPF_PROG_TYPE_CGROUP_DEVICE`, attached to the cgroup, which asks the last rule first. Version 1 takes them as text,
//! but knows only one default and its exceptions: rules that cannot be folded into that are refused.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::{Cgroup, Error, Result, io_error, write};

/// Access bits of the kernel's device check (`BPF_DEVCG_ACC_*`).
pub(super) const MKNOD: u8 = 1;
pub(super) const READ: u8 = 2;
pub(super) const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Block,
    Char,
}

/// A set of devices: a kind, and numbers that may stand for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Devices {
    pub(super) kind: Kind,
    pub(super) major: Option<u32>,
    pub(super) minor: Option<u32>,
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

/// One rule, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    devices: Devices,
    access: u8,
    allow: bool,
    /// Its place in `linux.resources.devices`; `None` is one of ours.
    index: Option<usize>,
}

impl Devices {
    /// Whether all of the others are among these.
    fn cover(&self, other: &Self) -> bool {
        let covers = |own: Option<u32>, other: Option<u32>| own.is_none() || own == other;
        self.kind == other.kind
            && covers(self.major, other.major)
            && covers(self.minor, other.minor)
    }

    /// Whether a device can be among both.
    fn meet(&self, other: &Self) -> bool {
        let meets =
            |one: Option<u32>, two: Option<u32>| one.is_none() || two.is_none() || one == two;
        self.kind == other.kind && meets(self.major, other.major) && meets(self.minor, other.minor)
    }
}

/// What may be done with devices: an answer for all, and the rules that come after it, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Policy {
    allow: bool,
    rules: Vec<Rule>,
}

impl Policy {
    fn new(given: &[LinuxDeviceCgroup]) -> Result<Self> {
        let mut policy = Self {
            allow: false,
            rules: Vec::new(),
        };
        for (index, rule) in given.iter().enumerate() {
            policy.add(index, rule)?;
        }
        for (kind, major, minor, access) in DEFAULTS {
            policy.rules.push(Rule {
                devices: Devices { kind, major, minor },
                access,
                allow: true,
                index: None,
            });
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
        let kinds: &[Kind] = match rule.typ().unwrap_or(LinuxDeviceType::A) {
            LinuxDeviceType::A => &[Kind::Block, Kind::Char],
            LinuxDeviceType::B => &[Kind::Block],
            LinuxDeviceType::C | LinuxDeviceType::U => &[Kind::Char],
            LinuxDeviceType::P => return Err(refuse("type", "a pipe is not a device")),
        };
        if kinds.len() == 2 && access == ALL && major.is_none() && minor.is_none() {
            self.allow = rule.allow();
            self.rules.clear();
            return Ok(());
        }
        for kind in kinds {
            self.rules.push(Rule {
                devices: Devices {
                    kind: *kind,
                    major,
                    minor,
                },
                access,
                allow: rule.allow(),
                index: Some(index),
            });
        }
        Ok(())
    }

    /// What may be done with one device.
    fn access(&self, device: &Devices) -> u8 {
        let allows = |bit: &u8| {
            let mut rules = self.rules.iter().rev();
            let last = rules.find(|rule| rule.access & bit != 0 && rule.devices.cover(device));
            last.map_or(self.allow, |rule| rule.allow)
        };
        [MKNOD, READ, WRITE].into_iter().filter(allows).sum()
    }

    fn allows_all(&self) -> bool {
        self.allow && self.rules.iter().all(|rule| rule.allow)
    }

    /// The devices, and the accesses to them, for which the answer for all does not hold.
    fn exceptions(&self) -> Result<BTreeMap<Devices, u8>> {
        let mut exceptions: BTreeMap<Devices, u8> = BTreeMap::new();
        for rule in &self.rules {
            if rule.allow != self.allow {
                *exceptions.entry(rule.devices).or_default() |= rule.access;
                continue;
            }
            for (devices, access) in &mut exceptions {
                if rule.devices.cover(devices) {
                    *access &= !rule.access;
                } else if rule.devices.meet(devices) && *access & rule.access != 0 {
                    let index = rule.index.map(|index| format!("[{index}]"));
                    return Err(Error::Unsupported {
                        field: format!("linux.resources.devices{}", index.unwrap_or_default()),
                        reason: "it takes some devices out of a wildcard before it, which cgroup version 1 cannot",
                    });
                }
            }
            exceptions.retain(|_, access| *access != 0);
        }
        Ok(exceptions)
    }
}

pub(super) fn apply(cgroup: &Cgroup, rules: &[LinuxDeviceCgroup]) -> Result<()> {
    let policy = Policy::new(rules)?;
    // An ordinary user's container can make no node, and opens those that it is given with that user's rights.
    if cgroup.is_none() || super::is_rootless() {
        return Ok(());
    }
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

/// A rule as version 1 writes it: `c 1:3 rwm`, with `*` for any number.
pub(super) fn line(devices: &Devices, access: u8) -> String {
    let number = |value: Option<u32>| value.map_or("*".to_owned(), |value| value.to_string());
    let kind = match devices.kind {
        Kind::Block => 'b',
        Kind::Char => 'c',
    };
    format!(
        "{kind} {}:{} {}",
        number(devices.major),
        number(devices.minor),
        letters(access)
    )
}

fn letters(access: u8) -> String {
    let all = [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')];
    let given = all.into_iter().filter(|(bit, _)| access & bit != 0);
    given.map(|(_, letter)| letter).collect()
}

/// What `rules` (`linux.resources.devices`) let a container do with one block device: of the letters `rw`. Making its node
/// is nobody's to deny.
///
/// # Errors
/// [`Error::Unsupported`] names the rule that is none.
pub fn block_device_access(
    rules: Option<&[LinuxDeviceCgroup]>,
    major: u32,
    minor: u32,
) -> Result<String> {
    let Some(rules) = rules else {
        return Ok(letters(READ | WRITE));
    };
    let device = Devices {
        kind: Kind::Block,
        major: Some(major),
        minor: Some(minor),
    };
    Ok(letters(
        Policy::new(rules)?.access(&device) & (READ | WRITE),
    ))
}

/// What every container may use, as version 1 writes it.
#[must_use]
pub fn default_devices() -> Vec<String> {
    DEFAULTS
        .into_iter()
        .map(|(kind, major, minor, access)| line(&Devices { kind, major, minor }, access))
        .collect()
}

fn apply_v1(directory: &Path, policy: &Policy) -> Result<()> {
    let exceptions = policy.exceptions()?;
    let (reset, other) = if policy.allow {
        ("devices.allow", "devices.deny")
    } else {
        ("devices.deny", "devices.allow")
    };
    write(&directory.join(reset), "a")?;
    if exceptions.is_empty() {
        return Ok(());
    }
    // One open file for all: the kernel takes one rule a write.
    let path = directory.join(other);
    let failed = |source| io_error("write the device rules to", &path, source);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .map_err(failed)?;
    for (devices, access) in &exceptions {
        file.write_all(line(devices, *access).as_bytes())
            .map_err(failed)?;
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

/// The program: r2 kind, r3 the accesses not yet allowed, r4 major, r5 minor of `struct bpf_cgroup_dev_ctx`.
///
/// Of the rules for a device, from the last to the first, an allowing one takes its accesses out of r3, and the answer
/// is yes when none is left; a denying one answers no if one of its accesses is still there.
fn program(policy: &Policy) -> Vec<Instruction> {
    let mut code = vec![
        instruction(LOAD_WORD, 0x12, 0, 0),
        instruction(MOVE_REGISTER_32, 0x23, 0, 0),
        instruction(AND_32, 0x02, 0, 0xffff),
        instruction(SHIFT_RIGHT_32, 0x03, 0, 16),
        instruction(LOAD_WORD, 0x14, 4, 0),
        instruction(LOAD_WORD, 0x15, 8, 0),
    ];
    for rule in policy.rules.iter().rev() {
        let kind = match rule.devices.kind {
            Kind::Block => 1,
            Kind::Char => 2,
        };
        let numbers = [(0x04, rule.devices.major), (0x05, rule.devices.minor)];
        let tests: Vec<(u8, i32)> = [(0x02, kind)]
            .into_iter()
            .chain(numbers.into_iter().filter_map(|(register, number)| {
                // The numbers are compared as the bits that they are.
                Some((register, number? as i32))
            }))
            .collect();
        let access = i32::from(rule.access);
        let body = if rule.allow {
            vec![
                instruction(AND_32, 0x03, 0, i32::from(ALL) & !access),
                instruction(JUMP_UNEQUAL_32, 0x03, 2, 0),
                instruction(MOVE_32, 0x00, 0, 1),
                instruction(EXIT, 0, 0, 0),
            ]
        } else {
            vec![
                instruction(MOVE_REGISTER_32, 0x31, 0, 0),
                instruction(AND_32, 0x01, 0, access),
                instruction(JUMP_EQUAL_32, 0x01, 2, 0),
                instruction(MOVE_32, 0x00, 0, 0),
                instruction(EXIT, 0, 0, 0),
            ]
        };
        // Each failed test jumps behind this rule: over the other tests and the answer.
        for (position, (register, value)) in tests.iter().enumerate() {
            let distance = (tests.len() - position - 1 + body.len()) as i16;
            code.push(instruction(JUMP_UNEQUAL_32, *register, distance, *value));
        }
        code.extend(body);
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

pub(super) fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
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
    let old = attached(&target, 0).unwrap_or_default();
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

/// The most programs that a cgroup has in force, with those of the cgroups above: the kernel takes 64 for each.
const PROGRAM_LIMIT: usize = 1024;

/// The device programs of a cgroup: by no flags those that are attached to this very one.
pub(super) fn attached(target: &fs::File, query_flags: u32) -> io::Result<Vec<OwnedFd>> {
    let mut ids = vec![0_u32; PROGRAM_LIMIT];
    let mut query = QueryAttributes {
        target: target.as_raw_fd() as u32,
        kind: BPF_CGROUP_DEVICE,
        query_flags,
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
pub(super) mod tests {
    use oci_spec::runtime::LinuxDeviceCgroupBuilder;

    use super::super::device_access::run;
    use super::*;

    /// The answer of the program on one request.
    fn answer(code: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [kind | access << 16, major, minor];
        run(&bytes(code), context).unwrap()
    }

    /// As the kernel has it in memory.
    fn bytes(code: &[Instruction]) -> Vec<u8> {
        let one = |one: &Instruction| {
            let [low, high] = one.offset.to_le_bytes();
            let [a, b, c, d] = one.immediate.to_le_bytes();
            [one.code, one.registers, low, high, a, b, c, d]
        };
        code.iter().flat_map(one).collect()
    }

    /// The program of `linux.resources.devices`.
    pub(crate) fn program_of(rules: serde_json::Value) -> Vec<u8> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(rules).unwrap();
        bytes(&program(&Policy::new(&rules).unwrap()))
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

    fn rule(
        allow: bool,
        kind: LinuxDeviceType,
        numbers: [i64; 2],
        access: &str,
    ) -> LinuxDeviceCgroup {
        LinuxDeviceCgroupBuilder::default()
            .allow(allow)
            .typ(kind)
            .major(numbers[0])
            .minor(numbers[1])
            .access(access)
            .build()
            .unwrap()
    }

    use LinuxDeviceType::{A, B as Block, C as Char};

    #[test]
    fn accesses_are_gathered_from_several_rules() {
        let rules = [
            rule(false, A, [-1, -1], "rwm"),
            rule(true, Block, [8, -1], "r"),
            rule(true, Block, [8, 1], "w"),
        ];
        let code = program(&Policy::new(&rules).unwrap());
        assert!(answer(&code, B, u32::from(READ | WRITE), 8, 1));
        assert!(!answer(&code, B, u32::from(READ | WRITE), 8, 2));
        assert!(!answer(&code, B, u32::from(READ), 9, 1));
    }

    #[test]
    fn a_rule_overrides_those_before_it() {
        let rules = [
            rule(true, Char, [10, -1], "rwm"),
            rule(false, Char, [10, 200], "w"),
            rule(false, Char, [10, 201], "rw"),
            rule(true, Char, [10, 201], "rw"),
        ];
        let policy = Policy::new(&rules).unwrap();
        let code = program(&policy);
        assert!(answer(&code, C, u32::from(READ), 10, 200));
        assert!(!answer(&code, C, u32::from(READ | WRITE), 10, 200));
        assert!(answer(&code, C, u32::from(READ | WRITE), 10, 201));
        assert!(answer(&code, C, u32::from(READ | WRITE), 10, 1));
        let error = policy.exceptions().unwrap_err().to_string();
        assert!(error.starts_with("linux.resources.devices[1]: "), "{error}");
    }

    #[test]
    fn what_allows_all_clears_what_was_before_it() {
        let rules = [
            rule(false, Char, [10, 200], "rwm"),
            rule(true, A, [-1, -1], "rwm"),
        ];
        let policy = Policy::new(&rules).unwrap();
        assert!(policy.allows_all());
        assert!(answer(&program(&policy), C, u32::from(READ), 10, 200));
        assert!(policy.exceptions().unwrap().is_empty());
    }

    #[test]
    fn a_part_of_all_is_not_all() {
        let rules = [rule(true, A, [-1, -1], "rwm"), rule(false, A, [-1, 7], "w")];
        let code = program(&Policy::new(&rules).unwrap());
        assert!(!answer(&code, B, u32::from(WRITE), 8, 7));
        assert!(answer(&code, B, u32::from(READ), 8, 7));
        assert!(answer(&code, B, u32::from(WRITE), 8, 8));
    }

    #[test]
    fn version_1_gets_one_default_and_its_exceptions() {
        let rules = [
            rule(true, A, [-1, -1], "rwm"),
            rule(false, Char, [10, 200], "rwm"),
            rule(true, Char, [10, -1], "r"),
        ];
        let policy = Policy::new(&rules).unwrap();
        let tun = Devices {
            kind: Kind::Char,
            major: Some(10),
            minor: Some(200),
        };
        // Making nodes is among what every container may do.
        let exceptions: Vec<_> = policy.exceptions().unwrap().into_iter().collect();
        assert_eq!(exceptions, [(tun, WRITE)]);
    }

    #[test]
    fn what_a_block_device_may_be_used_for_is_what_the_program_says() {
        let rules = [
            rule(false, A, [-1, -1], "rwm"),
            rule(true, Block, [8, -1], "rw"),
            rule(false, Block, [8, 1], "w"),
            rule(true, Char, [9, 0], "rw"),
        ];
        let code = program(&Policy::new(&rules).unwrap());
        for (numbers, expected) in [((8, 0), "rw"), ((8, 1), "r"), ((9, 0), "")] {
            let (major, minor) = numbers;
            let access = block_device_access(Some(&rules), major, minor).unwrap();
            assert_eq!(access, expected);
            for (bit, letter) in [(READ, 'r'), (WRITE, 'w')] {
                let allowed = answer(&code, B, bit.into(), major, minor);
                assert_eq!(access.contains(letter), allowed, "{numbers:?} {letter}");
            }
        }
        assert_eq!(block_device_access(None, 8, 0).unwrap(), "rw");
    }

    #[test]
    fn a_wrong_rule_is_named() {
        let error = Policy::new(&[rule(true, Char, [-1, -1], "rx")]).unwrap_err();
        let error = error.to_string();
        assert!(
            error.starts_with("linux.resources.devices[0].access"),
            "{error}"
        );
    }
}
