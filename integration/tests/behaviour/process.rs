//! The workload's process: how it ends, and what it is given.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::time::Duration;

use integration::{Claim, Fixture, Model, ensure, ensure_eq, wait_with_limit};
use serde_json::json;

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    ("exit_code_is_the_workloads", exit_code_is_the_workloads),
    (
        "death_by_signal_is_128_plus_n",
        death_by_signal_is_128_plus_n,
    ),
    (
        "signals_sent_to_run_reach_the_workload",
        signals_sent_to_run_reach_the_workload,
    ),
    (
        "environment_is_only_what_the_bundle_says",
        environment_is_only_what_the_bundle_says,
    ),
    ("arguments_arrive_unchanged", arguments_arrive_unchanged),
    (
        "working_directory_is_the_bundles",
        working_directory_is_the_bundles,
    ),
    (
        "program_is_found_in_the_containers_path",
        program_is_found_in_the_containers_path,
    ),
    ("missing_program_is_an_error", missing_program_is_an_error),
    (
        "no_descriptor_leaks_into_the_workload",
        no_descriptor_leaks_into_the_workload,
    ),
    ("rlimits_are_set", rlimits_are_set),
    (
        "ignored_signals_are_not_inherited",
        ignored_signals_are_not_inherited,
    ),
    (
        "each_variable_is_given_once_and_as_said_last",
        each_variable_is_given_once_and_as_said_last,
    ),
    (
        "program_that_cannot_be_executed_is_told",
        program_that_cannot_be_executed_is_told,
    ),
    (
        "capability_that_nobody_knows_is_left_out_with_a_warning",
        capability_that_nobody_knows_is_left_out_with_a_warning,
    ),
    (
        "processors_of_the_caller_are_not_the_workloads",
        processors_of_the_caller_are_not_the_workloads,
    ),
];

fn exit_code_is_the_workloads(fixture: &Fixture) -> Claim {
    for code in [0, 1, 7, 255] {
        let mut bundle = fixture.bundle()?;
        bundle.script(&format!("exit {code}"));
        let outcome = fixture.run(&bundle)?;
        ensure_eq!(
            outcome.status.code(),
            Some(code),
            "exit code; stderr {:?}",
            outcome.stderr
        );
    }
    Ok(())
}

fn death_by_signal_is_128_plus_n(fixture: &Fixture) -> Claim {
    for (signal, number) in [("KILL", 9), ("SEGV", 11)] {
        let mut bundle = fixture.bundle()?;
        // A namespace's init ignores signals from inside, so the shell has to be an ordinary process.
        bundle
            .without_namespace("pid")
            .script(&format!("kill -{signal} $$"));
        let outcome = fixture.run(&bundle)?;
        ensure_eq!(
            outcome.status.code(),
            Some(128 + number),
            "exit code; stderr {:?}",
            outcome.stderr
        );
    }
    Ok(())
}

fn signals_sent_to_run_reach_the_workload(fixture: &Fixture) -> Claim {
    // SIGUSR1, and the first real-time signal, which a C library may keep for itself (not of a microVM: docs/parity.md).
    let numbers: &[i32] = match fixture.model() {
        Model::Container => &[10, 34],
        Model::Microvm => &[10],
    };
    for &number in numbers {
        let mut bundle = fixture.bundle()?;
        bundle.script(&format!(
            "trap 'exit 42' {number}; echo ready; while true; do sleep 1; done"
        ));
        bundle.save()?;
        let id = fixture.id("signals");
        let mut command = fixture.rt(&["run", "--bundle"]);
        let mut child = command
            .arg(bundle.dir())
            .arg(&id)
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
        }
        ensure_eq!(line.trim(), "ready", "first line");
        // SAFETY: no memory is passed; the child has not been waited for.
        let sent = unsafe { libc::kill(i32::try_from(child.id())?, number) };
        ensure_eq!(sent, 0, "kill");
        let status = wait_with_limit(&mut child, Duration::from_secs(60))?;
        ensure_eq!(status.code(), Some(42), "exit code of run");
    }
    Ok(())
}

fn environment_is_only_what_the_bundle_says(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["env"] =
        json!(["PATH=/bin", "GREETING=hello  world", "EMPTY=", "HOME=/root"]);
    bundle.args(&["/bin/env"]);
    let outcome = fixture.run(&bundle)?.success()?;
    let mut lines: Vec<_> = outcome.stdout.lines().collect();
    lines.sort_unstable();
    ensure_eq!(
        lines,
        ["EMPTY=", "GREETING=hello  world", "HOME=/root", "PATH=/bin"],
        "environment"
    );
    Ok(())
}

fn arguments_arrive_unchanged(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.args(&[
        "/bin/printf",
        "[%s]",
        "",
        "a b",
        "$HOME",
        "\"quoted\"",
        "ünï\ncode",
        "--flag",
    ]);
    let outcome = fixture.run(&bundle)?.success()?;
    ensure_eq!(
        outcome.stdout,
        "[][a b][$HOME][\"quoted\"][ünï\ncode][--flag]",
        "arguments"
    );
    Ok(())
}

fn working_directory_is_the_bundles(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["cwd"] = json!("/var");
    bundle.args(&["/bin/pwd"]);
    let outcome = fixture.run(&bundle)?.success()?;
    ensure_eq!(outcome.stdout, "/var\n", "working directory");
    Ok(())
}

fn program_is_found_in_the_containers_path(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    std::fs::create_dir(bundle.in_rootfs("opt"))?;
    std::os::unix::fs::symlink("/bin/busybox", bundle.in_rootfs("opt/echo"))?;
    bundle.spec["process"]["env"] = json!(["PATH=/nowhere:/opt"]);
    bundle.args(&["echo", "found"]);
    ensure_eq!(fixture.run(&bundle)?.success()?.stdout, "found\n", "output");
    Ok(())
}

fn missing_program_is_an_error(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.args(&["no-such-program"]);
    let outcome = fixture.run(&bundle)?;
    ensure!(outcome.code() != 0, "a missing program was run");
    ensure!(
        outcome.stderr.contains("no-such-program"),
        "the program is not named: {:?}",
        outcome.stderr
    );
    ensure!(
        outcome
            .stderr
            .contains("executable file not found in $PATH"),
        "reason: {:?}",
        outcome.stderr
    );
    Ok(())
}

fn no_descriptor_leaks_into_the_workload(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    // The shell opens the directory itself, as descriptor 3 or a higher one of its own.
    bundle.args(&["/bin/ls", "/proc/self/fd"]);
    let outcome = fixture.run(&bundle)?.success()?;
    let open: Vec<_> = outcome.stdout.split_whitespace().collect();
    ensure_eq!(
        open,
        ["0", "1", "2", "3"],
        "descriptors (3 is the listing's own)"
    );
    Ok(())
}

fn rlimits_are_set(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
    ]);
    bundle.script("ulimit -Sn; ulimit -Hn; ulimit -c");
    ensure_eq!(
        fixture.run(&bundle)?.success()?.stdout,
        "100\n200\n0\n",
        "soft, hard, core"
    );
    Ok(())
}

fn ignored_signals_are_not_inherited(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    // Not through a shell, which may ignore signals of its own.
    bundle.args(&["/bin/grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status"]);
    let outcome = fixture.run(&bundle)?.success()?;
    for line in outcome.stdout.lines() {
        let mask = line.split_whitespace().nth(1).unwrap_or_default();
        ensure_eq!(u64::from_str_radix(mask, 16)?, 0, "{line}");
    }
    Ok(())
}

fn each_variable_is_given_once_and_as_said_last(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.spec["process"]["env"] = json!([
        "PATH=/nowhere",
        "HOME=/var",
        "TWICE=1",
        "PATH=/bin",
        "TWICE="
    ]);
    bundle.args(&["env"]);
    let outcome = fixture.run(&bundle)?.success()?;
    let mut lines: Vec<_> = outcome.stdout.lines().collect();
    lines.sort_unstable();
    ensure_eq!(lines, ["HOME=/var", "PATH=/bin", "TWICE="], "environment");
    Ok(())
}

fn program_that_cannot_be_executed_is_told(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    let script = bundle.in_rootfs("bin/script");
    std::fs::write(&script, "#!/no/such/interpreter\n")?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    bundle.args(&["/bin/script"]);
    let outcome = fixture.run(&bundle)?;
    ensure_eq!(outcome.status.code(), Some(127), "exit code");
    let reason = "exec /bin/script: no such file or directory";
    ensure!(
        outcome.stderr.contains(reason),
        "reason: {:?}",
        outcome.stderr
    );
    Ok(())
}

fn capability_that_nobody_knows_is_left_out_with_a_warning(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    let sets = json!(["CAP_KILL", "CAP_OF_A_LATER_KERNEL"]);
    bundle.spec["process"]["capabilities"] =
        json!({"bounding": sets, "effective": sets, "permitted": sets});
    bundle.args(&["/bin/grep", "^CapEff", "/proc/self/status"]);
    let outcome = fixture.run(&bundle)?.success()?;
    ensure_eq!(
        outcome.stdout,
        "CapEff:\t0000000000000020\n",
        "capabilities"
    );
    ensure!(
        outcome.stderr.contains("CAP_OF_A_LATER_KERNEL"),
        "warning: {:?}",
        outcome.stderr
    );
    Ok(())
}

fn processors_of_the_caller_are_not_the_workloads(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.args(&["/bin/grep", "^Cpus_allowed_list", "/proc/self/status"]);
    let usual = fixture.run(&bundle)?.success()?.stdout;
    let mut command = fixture.rt(&["run", "--bundle"]);
    command.arg(bundle.dir()).arg(fixture.id("bound"));
    let mut first = nix::sched::CpuSet::new();
    first.set(0)?;
    // SAFETY: between fork and exec it makes one system call, with memory that was there before.
    unsafe {
        command.pre_exec(move || {
            Ok(nix::sched::sched_setaffinity(
                nix::unistd::Pid::from_raw(0),
                &first,
            )?)
        });
    }
    let bound = integration::finish(&mut command, None)?.success()?.stdout;
    ensure_eq!(bound, usual, "processors");
    Ok(())
}
