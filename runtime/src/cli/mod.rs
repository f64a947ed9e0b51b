//! The command line: runc's, so that every client of runc is a client of ours, and what is ours alone.
//!
//! Whoever calls us is as trusted as the user id it runs under. This folder parses, asks the lifecycle and prints; it
//! decides nothing about containers.

mod checkpoint;
mod control;
mod create;
mod events;
mod exec;
mod features;
mod list;
mod logs;
mod ps;
mod spec;
mod template;
mod update;

pub use features::features;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Parser;

use crate::config::{Config, ConfigError};
use crate::id::{ContainerId, IdError};
use crate::isolation::Model;
use crate::lifecycle::{self, Lifecycle};
use crate::log;
use crate::state::Store;
use crate::verify::attack::Attacker;
use crate::{bench, doctor, error_chain, guest, image, install, metrics, verify};

/// The state root of the superuser.
const DEFAULT_ROOT: &str = "/run/rt";

/// Runs OCI bundles as containers or as microVMs.
#[derive(Debug, Parser)]
#[command(
    name = "rt",
    version = VERSION,
    max_term_width = 100,
    disable_help_subcommand = true,
    disable_version_flag = true,
    args_override_self = true
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Behind the name, in the form that clients take apart: `rt version 1.2.3`, `spec: 1.3.0`.
const VERSION: &str = concat!("version ", env!("CARGO_PKG_VERSION"), "\nspec: 1.3.0");

#[derive(Debug, clap::Args)]
struct Global {
    /// Directory of the containers' state [default: /run/rt, for other users $XDG_RUNTIME_DIR/rt]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// File to append log lines to [default: standard error]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Form of the log lines
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: log::Format,
    /// Log everything
    #[arg(long)]
    debug: bool,
    /// Let systemd make the cgroup of a container that is created: linux.cgroupsPath is slice:prefix:name
    #[arg(long)]
    systemd_cgroup: bool,
    /// Whether a container that is created may go without a cgroup [default: auto]
    #[arg(long, value_name = "auto|true|false")]
    rootless: Option<String>,
    /// Accepted for clients of old: criu is found on the PATH
    #[arg(long, value_name = "FILE", hide = true)]
    criu: Option<PathBuf>,
    /// Isolation model: container or microvm [default: what the bundle or the configuration says]
    #[arg(long, value_name = "MODEL", global = true)]
    isolation: Option<Model>,
    /// Configuration file [default: /etc/rt/config.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the version
    #[arg(short, long, action = clap::ArgAction::Version)]
    version: Option<bool>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Run(create::RunArgs),
    Create(create::CreateArgs),
    Start(control::StartArgs),
    State(list::StateArgs),
    Kill(control::KillArgs),
    Delete(control::DeleteArgs),
    List(list::ListArgs),
    Exec(exec::ExecArgs),
    Ps(ps::PsArgs),
    Logs(logs::LogsArgs),
    Pause(control::PauseArgs),
    Resume(control::ResumeArgs),
    Update(update::UpdateArgs),
    Events(events::EventsArgs),
    Checkpoint(checkpoint::CheckpointArgs),
    Restore(checkpoint::RestoreArgs),
    Spec(spec::SpecArgs),
    /// Print what this runtime supports, as JSON
    Features,
    Guest(guest::cli::Args),
    Template(template::TemplateArgs),
    Bundle(image::cli::Args),
    Doctor(doctor::cli::Args),
    Bench(bench::BenchArgs),
    Install(install::Args),
    Verify(verify::cli::Args),
    Metrics(metrics::cli::Args),
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Id(#[from] IdError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Bundle(#[from] crate::bundle::BundleError),
    #[error(transparent)]
    Selection(#[from] crate::isolation::SelectionError),
    #[error(transparent)]
    Signal(#[from] crate::signal::UnknownSignal),
    #[error(transparent)]
    Isolation(#[from] crate::isolation::IsolationError),
    #[error(transparent)]
    Lifecycle(#[from] lifecycle::Error),
    #[error(transparent)]
    Template(#[from] crate::isolation::microvm::template::TemplateError),
    #[error(transparent)]
    Guest(#[from] guest::Error),
    #[error(transparent)]
    Image(#[from] image::Error),
    #[error(transparent)]
    Bench(#[from] bench::BenchError),
    #[error(transparent)]
    Install(#[from] install::InstallError),
    #[error(transparent)]
    Metrics(#[from] metrics::cli::Error),
    #[error(transparent)]
    Verify(#[from] verify::cli::Error),
    #[error("{0}")]
    Usage(String),
    #[error("{operation} {}", path.display())]
    File {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path}: not the JSON of {what}")]
    Json {
        path: String,
        what: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("encode the output")]
    Encode(#[from] serde_json::Error),
    #[error("write the output")]
    Output(#[from] std::io::Error),
    /// `exec` tells its own failures from the process's exit codes, as runc does.
    #[error("exec failed")]
    Exec(#[source] Box<CliError>),
}

/// The exit code of `exec` where no process of the container gives one.
const EXEC_FAILED: u8 = 255;
/// The exit code of `verify` without a report: 1 is an answer.
const VERIFY_FAILED: u8 = 2;

impl CliError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Exec(_) => EXEC_FAILED,
            _ => 1,
        }
    }
}

/// What every command is given.
struct Context<'a> {
    lifecycle: Lifecycle,
    global: &'a Global,
    /// The model that the binary's name stands for.
    binary: Option<Model>,
}

impl Context<'_> {
    fn config(&self) -> &Config {
        self.lifecycle.config()
    }
}

/// Runs the command line and returns the exit code. The first argument is the name we were called by.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if may_enter_a_container(&arguments) {
        // Should it fail, the command does it again when it knows that it must, and says why it cannot.
        let _ = Model::Container.seal();
    }
    let binary = arguments
        .first()
        .and_then(|name| Model::of_binary(Path::new(name)));
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are "errors" that go to standard output.
            let _ = error.print();
            return if error.use_stderr() {
                refuse(&arguments, &error)
            } else {
                0
            };
        }
    };
    let is_verify = matches!(cli.command, Command::Verify(_));
    let log = match log::Log::open(cli.global.log.as_deref(), cli.global.log_format) {
        Ok(log) => log,
        Err(error) => {
            let path = cli.global.log.unwrap_or_default();
            eprintln!("rt: open the log {}: {error}", path.display());
            return if is_verify { VERIFY_FAILED } else { 1 };
        }
    };
    log::install(log.clone(), cli.global.debug);
    match run(cli, binary) {
        Ok(code) => code,
        Err(error) => {
            let text = error_chain(&error);
            log.error(&text);
            eprintln!("rt: {text}");
            if is_verify {
                VERIFY_FAILED
            } else {
                error.exit_code()
            }
        }
    }
}

/// Whether a command line looks as if it makes or enters a container of the host. What is done before the binary is sealed
/// is done twice, so that it is worth a guess: a wrong one costs no more than one more execve(2).
fn may_enter_a_container(arguments: &[OsString]) -> bool {
    let enters = |word: &OsString| word == "run" || word == "create" || word == "exec";
    let is_microvm = |word: &OsString| word.as_encoded_bytes().ends_with(b"microvm");
    arguments.iter().any(enters) && !arguments.iter().any(is_microvm)
}

/// Logs a command line that is wrong, for clients that read the reason from the log alone, and returns the exit code.
fn refuse(arguments: &[OsString], error: &clap::Error) -> u8 {
    use clap::CommandFactory;
    let understood = Cli::command()
        .ignore_errors(true)
        .try_get_matches_from(arguments)
        .unwrap_or_default();
    let path: Option<&PathBuf> = understood.try_get_one("log").unwrap_or_default();
    let format = understood.try_get_one("log_format").unwrap_or_default();
    let format = format.copied().unwrap_or(log::Format::Text);
    if let Ok(log) = log::Log::open(path.map(PathBuf::as_path), format) {
        let text = error.to_string();
        // The rest is usage.
        let reason = text.lines().next().unwrap_or_default();
        log.error(reason.trim_start_matches("error: "));
    }
    match understood.subcommand_name() {
        Some("exec") => EXEC_FAILED,
        Some("verify") => VERIFY_FAILED,
        _ => 1,
    }
}

fn run(cli: Cli, binary: Option<Model>) -> Result<u8, CliError> {
    let Cli { global, command } = cli;
    let config = Config::load(global.config.as_deref())?;
    let root = global.root.clone().unwrap_or_else(default_root);
    // Other processes of ours get it too, and may have another working directory.
    let root = std::path::absolute(&root).map_err(|source| CliError::File {
        operation: "use the state root",
        path: root,
        source,
    })?;
    let lifecycle = Lifecycle::new(Store::new(root), config);
    let context = Context {
        lifecycle,
        global: &global,
        binary,
    };
    let mut out = std::io::stdout();
    match command {
        Command::Run(arguments) => return arguments.run(&context),
        Command::Create(arguments) => arguments.run(&context)?,
        Command::Start(arguments) => arguments.run(&context)?,
        Command::State(arguments) => arguments.run(&context)?,
        Command::Kill(arguments) => arguments.run(&context)?,
        Command::Delete(arguments) => arguments.run(&context)?,
        Command::List(arguments) => arguments.run(&context)?,
        Command::Exec(arguments) => {
            return arguments
                .run(&context)
                .map_err(|error| CliError::Exec(Box::new(error)));
        }
        Command::Ps(arguments) => arguments.run(&context)?,
        Command::Logs(arguments) => arguments.run(&context, &mut out)?,
        Command::Pause(arguments) => arguments.run(&context)?,
        Command::Resume(arguments) => arguments.run(&context)?,
        Command::Update(arguments) => arguments.run(&context)?,
        Command::Events(arguments) => arguments.run(&context)?,
        Command::Checkpoint(arguments) => arguments.run(&context)?,
        Command::Restore(arguments) => return arguments.run(&context),
        Command::Spec(arguments) => arguments.run()?,
        Command::Features => features::print()?,
        Command::Guest(arguments) => {
            let microvm = &context.config().microvm;
            let configured = guest::cli::Configured {
                dir: Some(&microvm.guests),
                name: microvm.guest.as_deref(),
            };
            arguments.run(configured, &mut out)?;
        }
        Command::Template(arguments) => arguments.run(&context, &mut out)?,
        Command::Bundle(arguments) => arguments.run(spec::base()?, &mut out)?,
        Command::Doctor(arguments) => {
            return Ok(arguments.run(global.isolation, context.config(), &mut out)?);
        }
        Command::Bench(arguments) => writeln!(out, "{}", bench::run(&arguments)?)?,
        Command::Install(arguments) => arguments.run(&mut out)?,
        Command::Metrics(arguments) => arguments.run(context.lifecycle, &mut out)?,
        Command::Verify(arguments) => {
            let attacker = Attacker {
                bundle: None,
                base: &spec::configuration(!nix::unistd::geteuid().is_root()),
                config: global.config.as_deref(),
            };
            let asked = global.isolation;
            return Ok(arguments.run(&context.lifecycle, attacker, asked, &mut out)?);
        }
    }
    Ok(0)
}

/// For the superuser `/run/rt`; for others below the directory that the session gives them.
fn default_root() -> PathBuf {
    let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    match runtime_dir {
        Some(dir) if !nix::unistd::geteuid().is_root() => PathBuf::from(dir).join("rt"),
        _ => PathBuf::from(DEFAULT_ROOT),
    }
}

/// An id argument, checked when the command runs so that the error is worded and logged like every other.
fn parse_id(text: &str) -> Result<ContainerId, CliError> {
    Ok(text.parse()?)
}

/// One line, as lists are printed.
fn print_json_line(value: &impl serde::Serialize) -> Result<(), CliError> {
    let mut text = serde_json::to_vec(value)?;
    text.push(b'\n');
    Ok(std::io::stdout().write_all(&text)?)
}

/// Reads a file of JSON.
fn read_json<T: serde::de::DeserializeOwned>(
    path: &Path,
    what: &'static str,
) -> Result<T, CliError> {
    parse_json(path, &read(path)?, what)
}

fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    std::fs::read(path).map_err(|source| CliError::File {
        operation: "read",
        path: path.to_owned(),
        source,
    })
}

fn parse_json<T: serde::de::DeserializeOwned>(
    path: &Path,
    text: &[u8],
    what: &'static str,
) -> Result<T, CliError> {
    serde_json::from_slice(text).map_err(|source| CliError::Json {
        path: path.display().to_string(),
        what,
        source,
    })
}

fn print_json(value: &impl serde::Serialize) -> Result<(), CliError> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    Ok(std::io::stdout().write_all(&text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Cli {
        Cli::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn options_are_accepted_before_and_behind_the_id() {
        for line in [
            "rt create --bundle /b --pid-file /p --console-socket /s c1",
            "rt create c1 --bundle /b --pid-file /p --console-socket /s",
            "rt --root /r --log /l --log-format json --systemd-cgroup create -b /b c1 --no-pivot --no-new-keyring",
            "rt --rootless=false run --isolation microvm /b",
            "rt delete --force c1",
            "rt delete c1 --force",
            "rt kill --all c1 KILL",
            "rt kill c1 9 --all",
            "rt kill -a c1",
            "rt list -q",
            "rt list --format json",
            "rt ps --format json c1",
            "rt ps c1 -ef",
            "rt logs --console c1",
            "rt metrics --listen unix:/run/rt/metrics.sock",
            "rt --rootless auto --log a --log b state c1",
            "rt update c1 --memory -1 --cpu-quota -1 --pids-limit -1",
            "rt update --resources - c1",
            "rt events c1 --interval 1s --stats",
            "rt checkpoint c1 --image-path /i --work-path /w --leave-running --tcp-established --ext-unix-sk",
            "rt checkpoint --pre-dump --parent-path ../p --file-locks --shell-job --auto-dedup c1",
            "rt checkpoint --manage-cgroups-mode ignore --empty-ns network --link-remap c1",
            "rt restore --image-path /i --bundle /b --detach --pid-file /p --no-pivot --no-subreaper c1",
        ] {
            parse(line);
        }
    }

    #[test]
    fn what_follows_the_command_of_exec_is_the_commands() {
        let cli = parse("rt exec -t c1 --user 1:2 sh -c -t --user");
        let Command::Exec(exec) = cli.command else {
            panic!("not exec")
        };
        assert_eq!(exec.command(), ["sh", "-c", "-t", "--user"]);
    }
}
