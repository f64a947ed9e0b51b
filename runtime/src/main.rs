//! The `rt` command.

use std::ffi::OsString;
use std::process::ExitCode;

use runtime::isolation::microvm;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    ExitCode::from(if microvm::is_vmm(&arguments) {
        microvm::main(arguments)
    } else {
        runtime::cli::main(arguments)
    })
}
