//! Fuzz targets: each takes bytes as an attacker may choose them to a parser, and comes back.
//!
//! A target is a plain function, so that the same one is run by libFuzzer (`make fuzz`), which looks for new
//! inputs, and by a test on stable Rust, which replays those that were kept in `corpus/`. It fails by a panic,
//! by memory that is not the guest's, or by not coming back. None needs KVM, and none leaves the process but
//! for a directory of its own.
#![expect(
    clippy::unwrap_used,
    reason = "a target tells of a failure by a panic; what is set up here is no input"
)]

mod block;
mod config;
mod fs;
mod input;
mod kernel;
mod machine;
mod mem;
mod net;
mod protocol;
mod queue;
mod vsock;

pub use block::block_queue;
pub use config::config;
pub use fs::{fs_queue, fs_requests};
pub use kernel::kernel;
pub use mem::mem_queue;
pub use net::net_queue;
pub use protocol::{agent_answers, agent_calls};
pub use queue::{balloon_queue, mmio, rng_queue};
pub use vsock::{vsock_packets, vsock_queue};

/// A target's name, which is that of its corpus, and the function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("agent_answers", agent_answers),
    ("agent_calls", agent_calls),
    ("balloon_queue", balloon_queue),
    ("block_queue", block_queue),
    ("config", config),
    ("fs_queue", fs_queue),
    ("fs_requests", fs_requests),
    ("kernel", kernel),
    ("mem_queue", mem_queue),
    ("mmio", mmio),
    ("net_queue", net_queue),
    ("rng_queue", rng_queue),
    ("vsock_packets", vsock_packets),
    ("vsock_queue", vsock_queue),
];
