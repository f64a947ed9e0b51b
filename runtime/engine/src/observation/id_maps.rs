//! Which ids an id-mapped mount maps onto which: statmount(2) tells it, since Linux 6.15. An older kernel tells only that
//! there is a map.

use std::fs::File;
use std::os::fd::AsFd;

use nix::unistd::Pid;
use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::ioctl::{Getter, Opcode, ioctl, opcode};

use super::IdMaps;

/// `linux/mount.h`: the maps, and that the kernel knows them.
const MAPS: u64 = 0x2000 | 0x4000;
/// `linux/stat.h`: the number of a mount that no other ever has.
const STATX_MNT_ID_UNIQUE: u32 = 0x4000;
/// `linux/nsfs.h`: the number of a mount namespace.
const NS_GET_MNTNS_ID: Opcode = opcode::read::<u64>(0xb7, 0x5);
/// The call, of all architectures.
const SYS_STATMOUNT: libc::c_long = 457;

/// Where the fields are in `struct statmount`: what the kernel told, the number of ranges and where the first one is, of
/// users and of groups, and the texts.
const MASK: usize = 8;
const USERS: usize = 152;
const GROUPS: usize = 160;
const TEXTS: usize = 512;

/// `struct mnt_id_req`.
#[repr(C)]
struct Request {
    size: u32,
    spare: u32,
    mount: u64,
    parameter: u64,
    namespace: u64,
}

/// The number of a process's mount namespace, by which its mounts are asked for.
pub(super) fn namespace(pid: Pid) -> Option<u64> {
    let file = File::open(format!("/proc/{pid}/ns/mnt")).ok()?;
    // SAFETY: the request writes a number of this size.
    unsafe { ioctl(file, Getter::<NS_GET_MNTNS_ID, u64>::new()) }.ok()
}

/// The maps of the mount of `file`, which is in a mount namespace; none if it has none, or the kernel does not tell.
pub(super) fn of(file: impl AsFd, namespace: u64) -> Option<IdMaps> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = statx(
        file,
        "",
        flags,
        StatxFlags::from_bits_retain(STATX_MNT_ID_UNIQUE),
    )
    .ok()?;
    if found.stx_mask & STATX_MNT_ID_UNIQUE == 0 {
        return None;
    }
    let request = Request {
        size: u32::try_from(size_of::<Request>()).ok()?,
        spare: 0,
        mount: found.stx_mnt_id,
        parameter: MAPS,
        namespace,
    };
    // A map has 340 ranges at most.
    let mut answer = vec![0_u8; 1 << 15];
    // SAFETY: the kernel reads a request of the size that it has, and writes no more than there is room for.
    let code = unsafe {
        let (asked, room) = (&raw const request, answer.as_mut_ptr());
        libc::syscall(SYS_STATMOUNT, asked, room, answer.len(), 0)
    };
    (code == 0).then(|| parse(&answer)).flatten()
}

fn parse(answer: &[u8]) -> Option<IdMaps> {
    let word = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?));
    let mask = u64::from_ne_bytes(answer.get(MASK..MASK + 8)?.try_into().ok()?);
    let map = |at: usize| {
        let (count, first) = (word(at)?, usize::try_from(word(at + 4)?).ok()?);
        let texts = answer
            .get(TEXTS.checked_add(first)?..)?
            .split(|byte| *byte == 0);
        let ranges = texts.take(usize::try_from(count).ok()?);
        let ranges: Vec<_> = ranges.map(String::from_utf8_lossy).collect();
        Some(ranges.join("\n"))
    };
    (mask & MAPS == MAPS).then_some(IdMaps {
        users: map(USERS)?,
        groups: map(GROUPS)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_as_the_kernel_writes_it() {
        let mut answer = vec![0_u8; 1024];
        answer[MASK..MASK + 8].copy_from_slice(&MAPS.to_ne_bytes());
        let mut put =
            |at: usize, word: u32| answer[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        put(USERS, 2);
        put(USERS + 4, 1);
        put(GROUPS, 1);
        put(GROUPS + 4, 21);
        let texts = b"\x000 1000 1\x001 2000 10\x00\x000 7 20\x00";
        answer[TEXTS..TEXTS + texts.len()].copy_from_slice(texts);
        let maps = parse(&answer).unwrap();
        assert_eq!(
            (maps.users.as_str(), maps.groups.as_str()),
            ("0 1000 1\n1 2000 10", "0 7 20")
        );
        answer[MASK] = 0;
        answer[MASK + 1] = 0x20;
        assert!(parse(&answer).is_none());
        assert!(parse(&[]).is_none());
    }
}
