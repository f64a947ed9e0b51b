//! Which privileges each kind of thread keeps once guest code can run: none, but for the file server.
//!
//! That one acts for the guest's users on files that belong to whomever. Its capabilities reach no further than the
//! directories that it has open and those below the process's root, which its owner is to make small.

use caps::{CapSet, Capability, CapsHashSet};

use crate::seccomp::Thread;

/// What a server of files needs to do as the guest's kernel, which has checked the guest's users, says: own, open and
/// change what belongs to anybody, be anybody for a new file, and reopen a file by its handle.
pub const FILE_SERVER: &[Capability] = &[
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];

/// Takes all capabilities from the calling thread that its kind does not need, for good.
///
/// # Errors
/// The kernel's.
pub(crate) fn limit(thread: Thread) -> Result<(), caps::errors::CapsError> {
    let needed: &[Capability] = match thread {
        Thread::Fs => FILE_SERVER,
        Thread::Vcpu
        | Thread::Block
        | Thread::Net
        | Thread::Vsock
        | Thread::Relay
        | Thread::Main => &[],
    };
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = needed
        .iter()
        .copied()
        .filter(|capability| permitted.contains(capability))
        .collect();
    // In this order: what is effective must be permitted.
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    caps::clear(None, CapSet::Inheritable)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_thread_keeps_what_its_kind_needs_and_others_keep_theirs() {
        let before = caps::read(None, CapSet::Effective).unwrap();
        for (kind, needed) in [(Thread::Vcpu, &[][..]), (Thread::Fs, FILE_SERVER)] {
            let kept = thread::spawn(move || {
                limit(kind).unwrap();
                [CapSet::Effective, CapSet::Permitted].map(|set| caps::read(None, set).unwrap())
            });
            let expected: CapsHashSet = needed
                .iter()
                .copied()
                .filter(|capability| before.contains(capability))
                .collect();
            assert_eq!(kept.join().unwrap(), [expected.clone(), expected]);
        }
        assert_eq!(caps::read(None, CapSet::Effective).unwrap(), before);
    }
}
