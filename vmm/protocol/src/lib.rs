//! What the host and the guest's agent say to each other.
//!
//! Two vsock ports carry everything. On [`RPC_PORT`] the host calls the agent in the ttrpc wire format
//! ([`wire`], [`envelope`]) with the methods of [`method`] and the messages of [`message`]. On
//! [`STDIO_PORT`] each connection is one raw byte stream of a process, named by a [`StdioHeader`]. At boot
//! the agent connects to the host's [`RPC_PORT`] and sends one [`message::Hello`]: it is ready.
//!
//! Neither side trusts the other: every length is checked before memory is taken for it, and the host
//! treats each answer of the agent as written by an attacker.

mod client;
pub mod envelope;
mod failure;
pub mod message;
pub mod method;
mod stdio;
pub mod wire;

pub use client::{Client, ClientError, decode_response, encode_hello, encode_request, read_hello};
pub use failure::{Code, Failure};
pub use method::Method;
pub use stdio::{StdioHeader, StdioHeaderError};

/// The version of everything in this crate that is visible on the wire. Host and agent must agree exactly:
/// both come from one build of the project, and the host packs the agent that it will talk to.
pub const PROTOCOL_VERSION: u32 = 5;

/// The vsock port of the RPC. The agent listens on it in the guest; the host listens on the same number
/// for the agent's [`message::Hello`].
pub const RPC_PORT: u32 = 1024;

/// The vsock port in the guest on which the agent takes stdio streams.
pub const STDIO_PORT: u32 = 1025;

/// The directory in the guest under which the agent mounts each share by its tag.
pub const SHARES_DIR: &str = "/run/rt";

/// The directory in the guest in which the agent links each disk by its serial number.
pub const DISKS_DIR: &str = "/run/rt/disks";

/// The virtio-fs tag of the tree with one directory for each container's root file system.
pub const ROOTFS_TAG: &str = "rootfs";

/// The virtio-fs tag of the tree with the sources of bind mounts.
pub const VOLUMES_TAG: &str = "volumes";
