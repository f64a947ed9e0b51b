//! The `rt` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(runtime::cli::main(std::env::args_os()))
}
