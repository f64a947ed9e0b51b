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

type Test = (&'static str, fn());

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let tests: Vec<Test> = [
        process::TESTS,
        rootfs::TESTS,
        life::TESTS,
        exec::TESTS,
        cgroup::TESTS,
    ]
    .concat();
    if let [flag, name] = &args[..]
        && flag == "--one"
    {
        let (_, test) = tests.iter().find(|(known, _)| known == name).unwrap();
        test();
        return ExitCode::SUCCESS;
    }
    if args.iter().any(|arg| arg == "--list") {
        for (name, _) in tests {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: containers need root");
        return ExitCode::SUCCESS;
    }
    if !std::path::Path::new("/bin/busybox").exists() {
        println!("skipped: /bin/busybox (package busybox-static) is not installed");
        return ExitCode::SUCCESS;
    }
    let filters: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let program = std::env::current_exe().unwrap();
    let mut failed = Vec::new();
    let mut passed = 0;
    for (name, _) in tests {
        if !filters.is_empty() && !filters.iter().any(|filter| name.contains(filter.as_str())) {
            continue;
        }
        // A test that hangs must not hang the others.
        let output = Command::new("timeout")
            .args(["--kill-after=1", "60"])
            .arg(&program)
            .args(["--one", name])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            passed += 1;
            println!("test {name} ... ok");
            for line in text.lines().filter(|line| line.starts_with("skipped:")) {
                println!("  {line}");
            }
        } else {
            println!("test {name} ... FAILED ({})", output.status);
            println!("{text}{}", String::from_utf8_lossy(&output.stderr));
            failed.push(name);
        }
    }
    println!("\n{passed} passed, {} failed {failed:?}", failed.len());
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
