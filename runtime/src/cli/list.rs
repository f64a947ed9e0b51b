//! `rt state` and `rt list`: what there is.

use std::io::Write;

use serde::Serialize;

use super::{CliError, Context, parse_id, print_json, print_json_line};
use crate::isolation::Model;
use crate::lifecycle::State;

/// Print a container's state as JSON
#[derive(Debug, clap::Args)]
pub(super) struct StateArgs {
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// List the containers of the state root
#[derive(Debug, clap::Args)]
pub(super) struct ListArgs {
    /// Print the ids only
    #[arg(short, long)]
    quiet: bool,
    /// Form of the output
    #[arg(short, long, default_value = "table")]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
}

/// A row of `list --format json`, with the names that runc gives.
#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    state: &'a State,
    isolation: Model,
}

impl StateArgs {
    pub(super) fn run(self, context: &Context<'_>) -> Result<(), CliError> {
        print_json(&context.lifecycle.state(&parse_id(&self.id)?)?)
    }
}

impl ListArgs {
    pub(super) fn run(self, context: &Context<'_>) -> Result<(), CliError> {
        let containers = context.lifecycle.list()?;
        let mut out = std::io::stdout();
        if self.quiet {
            for container in &containers {
                writeln!(out, "{}", container.id)?;
            }
            return Ok(());
        }
        match self.format {
            Format::Json => {
                let rows: Vec<Row<'_>> = containers
                    .iter()
                    .map(|state| Row {
                        isolation: state.isolation,
                        state,
                    })
                    .collect();
                print_json_line(&rows)
            }
            Format::Table => Ok(out.write_all(table(&containers).as_bytes())?),
        }
    }
}

/// runc's columns and then the isolation model, each as wide as its widest cell.
fn table(containers: &[State]) -> String {
    let header = [
        "ID",
        "PID",
        "STATUS",
        "BUNDLE",
        "CREATED",
        "OWNER",
        "ISOLATION",
    ]
    .map(str::to_owned);
    let rows: Vec<[String; 7]> = std::iter::once(header)
        .chain(containers.iter().map(|state| {
            [
                state.id.to_string(),
                state.pid.to_string(),
                state.status.name().to_owned(),
                state.bundle.display().to_string(),
                state.created.clone(),
                state.owner.clone(),
                state.isolation.name().to_owned(),
            ]
        }))
        .collect();
    align(&rows)
}

/// Rows of text with each column as wide as its widest cell, but for the last.
pub(super) fn align<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let mut widths = [0; COLUMNS];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(line.join("   ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_list_is_its_header() {
        assert_eq!(
            table(&[]),
            "ID   PID   STATUS   BUNDLE   CREATED   OWNER   ISOLATION\n"
        );
    }
}
