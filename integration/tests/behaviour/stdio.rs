//! Standard input, output and error as pipes.

use integration::{Claim, Fixture, ensure, ensure_eq};

use crate::Entry;

pub const CLAIMS: &[Entry] = &[
    ("stdout_and_stderr_stay_apart", stdout_and_stderr_stay_apart),
    ("stdin_is_read_to_its_end", stdin_is_read_to_its_end),
    ("ten_mebibytes_pass_each_way", ten_mebibytes_pass_each_way),
    (
        "output_of_a_workload_that_ends_at_once_is_whole",
        output_of_a_workload_that_ends_at_once_is_whole,
    ),
    ("stdin_may_stay_unread", stdin_may_stay_unread),
    (
        "stdio_are_pipes_that_can_be_reopened",
        stdio_are_pipes_that_can_be_reopened,
    ),
];

fn stdout_and_stderr_stay_apart(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("echo out; echo err >&2");
    let outcome = fixture.run(&bundle)?.success()?;
    ensure_eq!(outcome.stdout, "out\n", "stdout");
    ensure_eq!(outcome.stderr, "err\n", "stderr");
    Ok(())
}

fn stdin_is_read_to_its_end(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.args(&["/bin/cat"]);
    let outcome = fixture
        .run_with_input(&bundle, b"first\nsecond".to_vec())?
        .success()?;
    ensure_eq!(outcome.stdout, "first\nsecond", "stdout");
    let outcome = fixture.run_with_input(&bundle, Vec::new())?.success()?;
    ensure_eq!(outcome.stdout, "", "stdout of an empty stdin");
    Ok(())
}

fn ten_mebibytes_pass_each_way(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.args(&["/bin/cat"]);
    // Not periodic in any buffer's size, so that a lost or doubled buffer shows.
    let input: Vec<u8> = (0..10_u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let outcome = fixture.run_with_input(&bundle, input.clone())?.success()?;
    ensure_eq!(
        outcome.raw_stdout.len(),
        input.len(),
        "bytes that came back"
    );
    ensure!(
        outcome.raw_stdout == input,
        "the bytes that came back are not the bytes that went in"
    );
    Ok(())
}

fn output_of_a_workload_that_ends_at_once_is_whole(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("seq 1 20000; seq 1 20000 >&2; exit 3");
    let outcome = fixture.run(&bundle)?;
    ensure_eq!(outcome.code(), 3, "exit code");
    ensure_eq!(outcome.stdout.lines().count(), 20_000, "lines on stdout");
    ensure_eq!(outcome.stderr.lines().count(), 20_000, "lines on stderr");
    Ok(())
}

fn stdin_may_stay_unread(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.args(&["/bin/true"]);
    let outcome = fixture.run_with_input(&bundle, vec![b'x'; 4 << 20])?;
    ensure_eq!(outcome.code(), 0, "exit code; stderr {:?}", outcome.stderr);
    Ok(())
}

fn stdio_are_pipes_that_can_be_reopened(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    bundle.script("echo one > /dev/stdout; echo two > /proc/self/fd/1; cat /dev/stdin");
    let outcome = fixture
        .run_with_input(&bundle, b"three\n".to_vec())?
        .success()?;
    ensure_eq!(outcome.stdout, "one\ntwo\nthree\n", "stdout");
    Ok(())
}
