//! `rt logs`: what a microVM's kernel wrote to its console.
//!
//! The text is a hostile guest's: of control characters only line ends and tabs reach the terminal.

use std::io::Write;

use super::{CliError, Context, parse_id};

/// Print what the kernel of a microVM wrote to its console
///
/// It is quiet unless it panics, since each letter costs time; `loglevel=7` among vm.kernel.parameters
/// makes it talk. What the workload writes goes to whoever runs it, as with any OCI runtime.
#[derive(Debug, clap::Args)]
pub(super) struct LogsArgs {
    /// The console: there is no other log
    #[arg(long, required = true)]
    console: bool,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

impl LogsArgs {
    pub(super) fn run(self, context: &Context<'_>, out: &mut impl Write) -> Result<(), CliError> {
        let console = context.lifecycle.console(&parse_id(&self.id)?)?;
        let text = String::from_utf8_lossy(&console);
        let is_plain = |one: &char| !one.is_control() || matches!(one, '\n' | '\t');
        let text: String = text.chars().filter(is_plain).collect();
        Ok(out.write_all(text.as_bytes())?)
    }
}
