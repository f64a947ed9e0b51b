//! `rt state`, `list` and `ps`: what there is.

use std::io::Write;
use std::process::Command;

use serde::Serialize;

use super::{CliError, Context, parse_id, print_json};
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

/// List the processes of a container
#[derive(Debug, clap::Args)]
pub(super) struct PsArgs {
    /// Form of the output
    #[arg(short, long, default_value = "table")]
    format: Format,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
    /// Options for ps(1) in a table [default: -ef]
    #[arg(
        value_name = "PS OPTIONS",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    options: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
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
                print_json(&rows)
            }
            Format::Table => Ok(out.write_all(table(&containers).as_bytes())?),
        }
    }
}

/// runc's columns and the isolation model, each as wide as its widest cell.
fn table(containers: &[State]) -> String {
    let header = [
        "ID",
        "PID",
        "STATUS",
        "ISOLATION",
        "BUNDLE",
        "CREATED",
        "OWNER",
    ]
    .map(str::to_owned);
    let rows: Vec<[String; 7]> = std::iter::once(header)
        .chain(containers.iter().map(|state| {
            [
                state.id.to_string(),
                state.pid.to_string(),
                state.status.name().to_owned(),
                state.isolation.name().to_owned(),
                state.bundle.display().to_string(),
                state.created.clone(),
                state.owner.clone(),
            ]
        }))
        .collect();
    let mut widths = [0; 7];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let mut text = String::new();
    for row in &rows {
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

impl PsArgs {
    pub(super) fn run(mut self, context: &Context<'_>) -> Result<(), CliError> {
        let id = parse_id(&self.id)?;
        // Behind the id too, where ps(1)'s options are.
        if let [option, value] = self.options.as_slice()
            && option == "--format"
        {
            self.format = clap::ValueEnum::from_str(value, false).map_err(CliError::Usage)?;
            self.options.clear();
        }
        let state = context.lifecycle.state(&id)?;
        let pids = context.lifecycle.processes(&id)?;
        if self.format == Format::Json {
            return print_json(&pids);
        }
        let mut out = std::io::stdout();
        if state.isolation == Model::Microvm {
            // The host's ps(1) does not see them.
            writeln!(out, "PID (in the guest)")?;
            for pid in pids {
                writeln!(out, "{pid}")?;
            }
            return Ok(());
        }
        if self.options.is_empty() {
            self.options.push("-ef".to_owned());
        }
        let output = Command::new("ps").args(&self.options).output();
        let output = output.map_err(|source| CliError::File {
            operation: "execute",
            path: "ps".into(),
            source,
        })?;
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(CliError::Usage(format!(
                "ps {}: {reason}",
                self.options.join(" ")
            )));
        }
        Ok(out.write_all(filter(&String::from_utf8_lossy(&output.stdout), &pids)?.as_bytes())?)
    }
}

/// The header of ps(1)'s table and the rows of `pids`.
fn filter(table: &str, pids: &[i32]) -> Result<String, CliError> {
    let mut lines = table.lines();
    let header = lines.next().unwrap_or_default();
    let column = header
        .split_ascii_whitespace()
        .position(|name| name == "PID")
        .ok_or_else(|| CliError::Usage("the options of ps must give a PID column".into()))?;
    let mut text = format!("{header}\n");
    for line in lines {
        let pid = line
            .split_ascii_whitespace()
            .nth(column)
            .and_then(|pid| pid.parse().ok());
        if pid.is_some_and(|pid| pids.contains(&pid)) {
            text.push_str(line);
            text.push('\n');
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ps_shows_the_containers_rows_only() {
        let table = "UID   PID  CMD\nroot    1  init\nroot   17  sh 1\nroot  170  x\n";
        assert_eq!(
            filter(table, &[17]).unwrap(),
            "UID   PID  CMD\nroot   17  sh 1\n"
        );
        assert!(filter("CMD\nx\n", &[17]).is_err());
    }

    #[test]
    fn an_empty_list_is_its_header() {
        assert_eq!(
            table(&[]),
            "ID   PID   STATUS   ISOLATION   BUNDLE   CREATED   OWNER\n"
        );
    }
}
