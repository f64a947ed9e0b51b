//! `rt start`, `kill`, `delete`, `pause` and `resume`.

use super::{CliError, Context, parse_id};
use crate::signal::Signal;

/// Let the workload of a created container run
#[derive(Debug, clap::Args)]
pub(super) struct StartArgs {
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// Send a signal to the container's first process
#[derive(Debug, clap::Args)]
pub(super) struct KillArgs {
    /// Send it to every process of the container
    #[arg(short, long)]
    all: bool,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
    /// Signal, by name or number
    #[arg(default_value = "SIGTERM")]
    signal: String,
}

/// Remove a container that has ended
#[derive(Debug, clap::Args)]
pub(super) struct DeleteArgs {
    /// Kill it first if it lives; no error if there is none
    #[arg(short, long)]
    force: bool,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// Stop all processes of a container where they are
#[derive(Debug, clap::Args)]
pub(super) struct PauseArgs {
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// Let a paused container go on
#[derive(Debug, clap::Args)]
pub(super) struct ResumeArgs {
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

impl StartArgs {
    pub(super) fn run(self, context: &Context<'_>) -> Result<(), CliError> {
        Ok(context.lifecycle.start(&parse_id(&self.id)?)?)
    }
}

impl KillArgs {
    pub(super) fn run(self, context: &Context<'_>) -> Result<(), CliError> {
        let signal: Signal = self.signal.parse()?;
        Ok(context
            .lifecycle
            .kill(&parse_id(&self.id)?, signal, self.all)?)
    }
}

impl DeleteArgs {
    pub(super) fn run(self, context: &Context<'_>) -> Result<(), CliError> {
        Ok(context.lifecycle.delete(&parse_id(&self.id)?, self.force)?)
    }
}

impl PauseArgs {
    pub(super) fn run(self, context: &Context<'_>) -> Result<(), CliError> {
        Ok(context.lifecycle.pause(&parse_id(&self.id)?)?)
    }
}

impl ResumeArgs {
    pub(super) fn run(self, context: &Context<'_>) -> Result<(), CliError> {
        Ok(context.lifecycle.resume(&parse_id(&self.id)?)?)
    }
}
