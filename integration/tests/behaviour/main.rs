//! The behaviour of `rt`: each claim is written once and holds in every
//! isolation model that this machine can run.
//!
//! A model that cannot run here is said in one line and its claims are counted
//! as ignored. `RT` names the binary under test; by default it is the one built
//! beside this test. `RT_MODELS` (comma-separated) limits the models. A microVM's
//! crash walks, a machine for each step, and those of containers under emulation
//! are for `RT_TEST_CRASH=yes` alone.

mod attacks;
mod bad_input;
mod checkpoint;
mod crash;
mod disks;
mod events;
mod exec;
mod filesystem;
mod hooks;
mod identity;
mod leftovers;
mod lifecycle;
mod load;
mod microvm;
mod microvm_failures;
mod network;
mod pods;
mod process;
mod restrictions;
mod rootless;
mod stdio;
mod systemd_cgroup;
mod templates;
mod terminal;
mod update;
mod verify;

use std::path::Path;
use std::process::ExitCode;

use integration::{Claim, Fixture, Model, binary_under_test, reason_not_to_run};
use libtest_mimic::{Arguments, Failed, Trial};

/// A claim: its name, and the function that fails when it does not hold.
type Entry = (&'static str, fn(&Fixture) -> Claim);

fn main() -> ExitCode {
    if let Some(code) = attacks::program::run() {
        return code;
    }
    let mut arguments = Arguments::from_args();
    // Two processors do not run two virtual machines faster than one.
    arguments.test_threads.get_or_insert(2);
    let rt = match binary_under_test() {
        Ok(rt) => rt,
        Err(reason) => {
            eprintln!("{reason}");
            return ExitCode::FAILURE;
        }
    };
    let models =
        [Model::Container, Model::Microvm].map(|model| (model, reason_not_to_run(&rt, model)));
    if !arguments.list {
        for (model, reason) in &models {
            if let Some(reason) = reason {
                println!("skipped: every {} claim: {reason}", model.name());
            }
        }
    }
    let walks_all = std::env::var_os("RT_TEST_CRASH").is_some();
    let walks_containers = walks_all || std::env::var_os("RT_LAB").is_none();
    if !walks_all && !arguments.list {
        println!("skipped: every crash walk of a microVM, or under emulation: make test-crash");
    }
    let mut trials = Vec::new();
    for (model, reason) in &models {
        let both = [
            process::CLAIMS,
            stdio::CLAIMS,
            identity::CLAIMS,
            filesystem::CLAIMS,
            disks::CLAIMS,
            restrictions::CLAIMS,
            hooks::CLAIMS,
            lifecycle::CLAIMS,
            exec::CLAIMS,
            events::CLAIMS,
            checkpoint::CLAIMS,
            update::CLAIMS,
            terminal::CLAIMS,
            bad_input::CLAIMS,
            leftovers::CLAIMS,
            network::CLAIMS,
            pods::CLAIMS,
            load::CLAIMS,
            verify::CLAIMS,
        ];
        let only = match model {
            Model::Microvm => [
                microvm::CLAIMS,
                microvm_failures::CLAIMS,
                attacks::MICROVM_CLAIMS,
                network::MICROVM_CLAIMS,
                pods::MICROVM_CLAIMS,
                templates::CLAIMS,
                update::MICROVM_CLAIMS,
                verify::MICROVM_CLAIMS,
            ]
            .as_slice(),
            Model::Container => &[
                systemd_cgroup::CLAIMS,
                rootless::CLAIMS,
                verify::CONTAINER_CLAIMS,
            ],
        };
        let all = both.iter().chain(attacks::CLAIMS).chain(only);
        for (name, claim) in all.copied().flatten() {
            trials.push(trial(&rt, *model, name, *claim).with_ignored_flag(reason.is_some()));
        }
        let walks = match model {
            Model::Container => walks_containers,
            Model::Microvm => walks_all,
        };
        let walked = reason.is_none() && walks;
        for (name, claim) in crash::CLAIMS {
            trials.push(trial(&rt, *model, name, *claim).with_ignored_flag(!walked));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(rt: &Path, model: Model, name: &str, claim: fn(&Fixture) -> Claim) -> Trial {
    let rt = rt.to_owned();
    Trial::test(format!("{}::{name}", model.name()), move || {
        let fixture = Fixture::new(model, &rt).map_err(|error| Failed::from(error.to_string()))?;
        claim(&fixture).map_err(|reason| Failed::from(reason.to_string()))
    })
}
