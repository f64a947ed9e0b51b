//! `rt metrics` on the command line.

use std::io::{self, Write};

use super::Collector;
use super::serve::{Address, serve};
use crate::lifecycle::{self, Lifecycle};

/// Print what the containers use, in Prometheus' text format, or serve it
#[derive(Clone, clap::Args, Debug)]
pub struct Args {
    /// Serve GET /metrics there until killed: unix:/PATH, or an address of the loopback device as 127.0.0.1:9311
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<Address>,
}

/// Why there are no metrics.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The containers cannot be listed.
    #[error(transparent)]
    Collect(#[from] lifecycle::Error),
    /// Nobody can be answered.
    #[error("serve metrics at the address of --listen")]
    Serve(#[source] io::Error),
    /// They cannot be written.
    #[error("write the metrics")]
    Output(#[source] io::Error),
}

impl Args {
    /// Prints the metrics once, or serves them.
    ///
    /// # Errors
    /// The containers cannot be listed, or it cannot listen there.
    pub fn run(&self, lifecycle: Lifecycle, out: &mut impl Write) -> Result<(), Error> {
        let collector = Collector::new(lifecycle);
        match &self.listen {
            Some(address) => serve(address, &collector).map_err(Error::Serve),
            None => out
                .write_all(collector.collect()?.as_bytes())
                .map_err(Error::Output),
        }
    }
}
