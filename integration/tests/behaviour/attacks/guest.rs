//! A container that attacks the machine it runs in, and through it the host.

use integration::{Claim, Fixture, ensure};

use super::{program, put_attacker};
use crate::Entry;

pub const CLAIMS: &[Entry] = &[(
    "no_container_reaches_the_agent_or_the_host_by_vsock",
    no_container_reaches_the_agent_or_the_host_by_vsock,
)];

/// Kata's: whoever can speak to the agent is obeyed.
fn no_container_reaches_the_agent_or_the_host_by_vsock(fixture: &Fixture) -> Claim {
    let mut bundle = fixture.bundle()?;
    put_attacker(&bundle)?;
    bundle.args(&[program::PATH, program::KNOCK]);
    let outcome = fixture.run(&bundle)?.success()?;
    ensure!(
        outcome.stdout.contains("knocked"),
        "the attack was not tried: {outcome:?}"
    );
    ensure!(
        !outcome.stdout.contains("OPEN"),
        "somebody listens: {:?}",
        outcome.stdout
    );
    Ok(())
}
