//! What the guest sees beside its processors and its memory: the buses and the devices on them.
//!
//! Everything below this module reads bytes that the guest wrote. A device trusts none of them: an
//! offset, a length or a register value may be anything, and none may panic the process.

pub mod bus;
pub(crate) mod io_apic;
pub(crate) mod power;
pub(crate) mod serial;
pub mod virtio;
