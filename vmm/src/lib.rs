//! A small KVM virtual machine monitor for x86-64; it knows nothing of OCI.
//!
//! The host and the caller's configuration are trusted. The guest is not: whatever comes from its
//! memory, its port and MMIO accesses and its sockets is checked in [`devices`].

pub mod devices;
pub mod layout;
pub mod memory;
