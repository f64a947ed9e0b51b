//! `rt ps`: the processes of a container.
//!
//! A table of ours, with the columns of `ps -ef`, so that both models have one; with options for ps(1) it is that
//! program's, which sees the host's processes only. What a process calls itself is its own choice: nothing of it
//! reaches the terminal as a control character.

use std::collections::HashMap;
use std::io::Write;
use std::process::Command;
use std::time::Duration;

use engine::ProcessInfo;

use super::list::{Format, align};
use super::{CliError, Context, parse_id, print_json_line};
use crate::clock;
use crate::isolation::Model;

/// List the processes of a container
#[derive(Debug, clap::Args)]
pub(super) struct PsArgs {
    /// Form of the output
    #[arg(short, long, default_value = "table")]
    format: Format,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
    /// Options for ps(1) in a table, for a container only
    #[arg(
        value_name = "PS OPTIONS",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    options: Vec<String>,
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
        let isolation = context.lifecycle.state(&id)?.isolation;
        let processes = context.lifecycle.processes(&id)?;
        let pids: Vec<i32> = processes.iter().map(|process| process.pid).collect();
        if self.format == Format::Json {
            return print_json_line(&pids);
        }
        let text = if self.options.is_empty() {
            let users = user_names(&std::fs::read_to_string("/etc/passwd").unwrap_or_default());
            table(&processes, &users, clock::now())
        } else if isolation == Model::Microvm {
            return Err(CliError::Usage(
                "ps(1) sees no process of a microVM: leave its options out".into(),
            ));
        } else {
            of_ps(&self.options, &pids)?
        };
        Ok(std::io::stdout().write_all(text.as_bytes())?)
    }
}

/// The names in a passwd(5) file.
fn user_names(passwd: &str) -> HashMap<u32, String> {
    passwd
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            Some((
                fields.nth(2)?.parse().ok()?,
                line.split(':').next()?.to_owned(),
            ))
        })
        .collect()
}

fn table(processes: &[ProcessInfo], users: &HashMap<u32, String>, now: Duration) -> String {
    let header = ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"].map(str::to_owned);
    let rows = processes.iter().map(|process| {
        let name = users.get(&process.uid).cloned();
        [
            name.unwrap_or_else(|| process.uid.to_string()),
            process.pid.to_string(),
            process.parent.to_string(),
            usage(process.cpu, now.saturating_sub(process.started)).to_string(),
            clock::short(process.started, now),
            terminal(process.terminal),
            elapsed(process.cpu),
            process.command.replace(char::is_control, "?"),
        ]
    });
    align(&std::iter::once(header).chain(rows).collect::<Vec<_>>())
}

/// Processor time in hundredths of the time since the start.
fn usage(cpu: Duration, age: Duration) -> u128 {
    cpu.as_millis() * 100 / age.as_millis().max(1)
}

/// `[days-]hours:minutes:seconds`
fn elapsed(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let days = if days > 0 {
        format!("{days}-")
    } else {
        String::new()
    };
    format!(
        "{days}{hours:02}:{:02}:{:02}",
        seconds / 60 % 60,
        seconds % 60
    )
}

/// The name of a terminal by its device number: proc(5) packs the major number into the bits 8 to 15, the minor into
/// the rest. Majors 136 to 143 are the pseudoterminals.
fn terminal(device: u32) -> String {
    let (major, minor) = (device >> 8 & 0xff, device & 0xff | device >> 12 & 0xf_ff00);
    match major {
        136..=143 => format!("pts/{}", (major - 136) * 0x10_0000 + minor),
        4 if minor < 64 => format!("tty{minor}"),
        4 => format!("ttyS{}", minor - 64),
        _ => "?".to_owned(),
    }
}

/// What ps(1) prints with `options`, without the rows of others.
fn of_ps(options: &[String], pids: &[i32]) -> Result<String, CliError> {
    let output = Command::new("ps").args(options).output();
    let output = output.map_err(|source| CliError::File {
        operation: "execute",
        path: "ps".into(),
        source,
    })?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(CliError::Usage(format!(
            "ps {}: {reason}",
            options.join(" ")
        )));
    }
    filter(&String::from_utf8_lossy(&output.stdout), pids)
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
    fn a_process_has_the_columns_of_ps() {
        let process = ProcessInfo {
            pid: 17,
            parent: 1,
            uid: 33,
            terminal: 34_819,
            cpu: Duration::from_secs(90_061),
            started: Duration::from_secs(1_000_000),
            command: "sh -c \u{1b}[2J".to_owned(),
        };
        let users = user_names("root:x:0:0::/root:/bin/sh\nbad line\nwww-data:x:33:33:::\n");
        let now = Duration::from_secs(1_180_122);
        assert_eq!(
            table(&[process], &users, now),
            "UID        PID   PPID   C    STIME   TTY     TIME         CMD\n\
             www-data   17    1      50   Jan12   pts/3   1-01:01:01   sh -c ?[2J\n"
        );
    }
}
