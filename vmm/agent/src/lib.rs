//! The guest's PID 1: it sets up the guest, then serves the host's calls with the container engine.
//!
//! It is one thread around one epoll loop, because it forks a process for each engine operation, and a
//! forked child of a threaded program may not do what the engine does. It trusts the host, which owns the
//! VM anyway, and no container process.

mod agent;
pub mod boot;
mod connection;
mod container;
mod disks;
mod network;
mod operation;
mod process;
mod relay;
mod renew;
mod sys;
mod terminal;

pub use agent::{Agent, AgentError};
