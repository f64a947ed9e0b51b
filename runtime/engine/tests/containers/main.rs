//! Real containers, made by the engine on this host as root.
//!
//! The engine clones its caller, so a test must have one thread: each runs in a process of its own, which this
//! program starts with the test's name. What a name claims is what the test shows.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking; without the usual harness the lints do not know that it is one"
)]

mod cgroup;
mod exec;
mod fixture;
mod life;
mod process;
mod rootfs;

use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Failed, Trial};

type Test = (&'static str, fn());

fn main() -> ExitCode {
    let tests: Vec<Test> = [
        process::TESTS,
        rootfs::TESTS,
        life::TESTS,
        exec::TESTS,
        cgroup::TESTS,
    ]
    .concat();
    if let [flag, name] = &std::env::args().skip(1).collect::<Vec<_>>()[..]
        && flag == "--one"
    {
        let (_, test) = tests.iter().find(|(known, _)| known == name).unwrap();
        test();
        return ExitCode::SUCCESS;
    }
    let mut arguments = Arguments::from_args();
    // Some count what the whole machine has: one after the other.
    arguments.test_threads.get_or_insert(1);
    let reason = reason_not_to_run();
    if let Some(reason) = reason.filter(|_| !arguments.list) {
        println!("skipped: every container of the engine: {reason}");
    }
    let trials = tests
        .iter()
        .map(|&(name, _)| {
            Trial::test(name, move || in_a_process(name)).with_ignored_flag(reason.is_some())
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn reason_not_to_run() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("containers need root");
    }
    if !std::path::Path::new("/bin/busybox").exists() {
        return Some("/bin/busybox (package busybox-static) is not installed");
    }
    None
}

fn in_a_process(name: &str) -> Result<(), Failed> {
    // A test that hangs must not hang the others.
    let output = Command::new("timeout")
        .args(["--kill-after=1", "60"])
        .arg(std::env::current_exe()?)
        .args(["--one", name])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if output.status.success() {
        for line in text.lines().filter(|line| line.starts_with("skipped:")) {
            println!("{line}");
        }
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(format!("{}\n{text}{errors}", output.status).into())
}
