//! What a machine that goes on from another's snapshot must not have in common with its siblings.
//!
//! The host, which is trusted, sends randomness and the time before it asks for a container. What the kernel drew when
//! it booted, such as its own addresses, stays shared.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use protocol::message::RenewRequest;
use thiserror::Error;

/// The bytes of a seed.
const SEED: usize = 32;

/// The argument of `RNDADDENTROPY` (random(4)) with a seed.
#[repr(C)]
struct Entropy {
    bits: libc::c_int,
    bytes: libc::c_int,
    seed: [u8; SEED],
}

/// The machine is not its own.
#[derive(Debug, Error)]
pub(crate) enum RenewError {
    /// Too little randomness.
    #[error("a seed of {0} bytes: it takes {SEED}")]
    Seed(usize),
    /// The kernel's generator.
    #[error("cannot seed the kernel's random generator")]
    Random(#[source] io::Error),
    /// The clock.
    #[error("cannot set the time")]
    Clock(#[source] Errno),
}

/// Seeds the kernel's random generator, so that from now on it gives what no sibling gets, and sets the time.
///
/// # Errors
/// [`RenewError`]; the machine must not be used then.
pub(crate) fn renew(request: &RenewRequest) -> Result<(), RenewError> {
    let seed = request.seed.first_chunk().copied();
    seed_kernel(seed.ok_or(RenewError::Seed(request.seed.len()))?).map_err(RenewError::Random)?;
    let now = TimeSpec::from_duration(Duration::from_nanos(request.unix_nanos));
    clock_settime(ClockId::CLOCK_REALTIME, now).map_err(RenewError::Clock)
}

fn seed_kernel(seed: [u8; SEED]) -> io::Result<()> {
    nix::ioctl_write_ptr_bad!(add_entropy, 0x4008_5203, Entropy);
    nix::ioctl_none_bad!(reseed, 0x5207);
    let generator = File::open("/dev/urandom")?;
    let entropy = Entropy {
        bits: 8 * SEED as libc::c_int,
        bytes: SEED as libc::c_int,
        seed,
    };
    // SAFETY: the kernel reads the structure, which says how long it is.
    unsafe { add_entropy(generator.as_raw_fd(), &raw const entropy) }?;
    // SAFETY: the call has no argument.
    unsafe { reseed(generator.as_raw_fd()) }?;
    Ok(())
}
