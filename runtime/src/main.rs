//! The `rt` command.

use std::ffi::OsString;
use std::process::ExitCode;

use dlmalloc::GlobalDlmalloc;
use runtime::isolation::microvm;
use runtime::verify::attack;

#[global_allocator]
static ALLOCATOR: GlobalDlmalloc = GlobalDlmalloc;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if attack::program::run(&arguments) {
        return ExitCode::SUCCESS;
    }
    ExitCode::from(if microvm::is_vmm(&arguments) {
        microvm::main(arguments)
    } else {
        runtime::cli::main(arguments)
    })
}
