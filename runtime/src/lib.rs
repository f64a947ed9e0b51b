//! The library behind the `rt` command: bundles, the state record, the lifecycle and the two isolation models.
//!
//! Data flows one way: command line or shim, [`lifecycle`], [`isolation`], kernel. The command line and the shim hold
//! no lifecycle logic.

pub mod bench;
pub mod bundle;
pub mod cli;
pub mod clock;
pub mod config;
pub mod doctor;
pub mod guest;
pub mod id;
pub mod image;
pub mod install;
pub mod isolation;
pub mod lifecycle;
pub mod log;
pub mod metrics;
pub mod process;
pub mod signal;
pub mod state;
pub mod verify;

pub use engine::error_chain;

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("open the door")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_chain_reads_from_the_operation_to_the_cause() {
        let error = Outer(std::io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(
            error_chain(&error),
            "open the door: No such file or directory (os error 2)"
        );
    }
}
