//! Real clients of `rt`: podman, docker and containerd, each started from its
//! package, with state of its own, in a world of its own.
//!
//! A claim is written once for all the clients that share a command line, and
//! runs over every isolation model that this machine can run. The lab is some
//! twenty times slower than a host: only the essential claims run there, and
//! only over the model that may need it.
//! `RT` and `RT_MODELS` mean what they mean to the behaviour tests.

mod containerd;
mod cri;
mod docker;
mod engine;
mod faults;
mod node;
mod podman;
mod process;
mod sandbox;
mod shim;

use std::env;
use std::ffi::OsStr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, LazyLock};

use integration::{Claim, Model, World, binary_under_test, reason_not_to_run, write_image};
use libtest_mimic::{Arguments, Failed, Trial};

/// The image that every client has.
const IMAGE: &str = "localhost/rt-test:latest";

/// A claim about the client `C`.
struct Entry<C> {
    name: &'static str,
    claim: fn(&C) -> Claim,
    /// Whether it runs in the lab too.
    essential: bool,
    /// The models that it holds for; a difference is in docs/parity.md.
    models: &'static [Model],
}

impl<C> Entry<C> {
    /// A claim that runs in the lab too.
    const fn essential(name: &'static str, claim: fn(&C) -> Claim) -> Self {
        Self {
            name,
            claim,
            essential: true,
            models: BOTH,
        }
    }

    /// A claim that runs on a host that is fast.
    const fn further(name: &'static str, models: &'static [Model], claim: fn(&C) -> Claim) -> Self {
        Self {
            name,
            claim,
            essential: false,
            models,
        }
    }
}

const BOTH: &[Model] = &[Model::Container, Model::Microvm];
const CONTAINER: &[Model] = &[Model::Container];
const MICROVM: &[Model] = &[Model::Microvm];

/// Why something did not work.
type Reason = Box<dyn std::error::Error + Send + Sync>;

/// What a client is started with.
struct Start {
    world: World,
    model: Model,
    /// The binary under test.
    rt: PathBuf,
    /// The binary to name to the client: its name selects the model.
    runtime: PathBuf,
    /// The same for a client that takes a shim.
    shim: PathBuf,
    /// The archive of [`IMAGE`].
    image: PathBuf,
}

impl Start {
    fn new(client: &str, model: Model, rt: &Path) -> Result<Self, Reason> {
        let mut world = World::new(&format!("{client}-{}", model.name()))?;
        let (name, shim) = match model {
            Model::Container => ("rt", "containerd-shim-rt-v2"),
            Model::Microvm => ("rt-microvm", "containerd-shim-rt-microvm-v2"),
        };
        let runtime = world.dir().join(name);
        symlink(rt, &runtime)?;
        let shim = world.dir().join(shim);
        // containerd finds our shim by its name.
        let dir = world.dir().to_owned();
        world.prefer_programs_in(&dir);
        symlink(rt.with_file_name("containerd-shim-rt-v2"), &shim)?;
        let image = world.dir().join("image.tar");
        write_image(&image, IMAGE, &["/bin/sh"], world.dir())?;
        Ok(Self {
            world,
            model,
            rt: rt.to_owned(),
            runtime,
            shim,
            image,
        })
    }

    /// The same in another world, for a claim that needs a daemon for itself.
    fn another(&self, client: &str) -> Result<Self, Reason> {
        Self::new(client, self.model, &self.rt)
    }
}

type Starter<C> = fn(Start) -> Result<C, Reason>;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(2);
    let rt = match binary_under_test() {
        Ok(rt) => rt,
        Err(reason) => {
            eprintln!("{reason}");
            return ExitCode::FAILURE;
        }
    };
    let has_no_second = cri::reason_not_to_run_second();
    if let Some(reason) = has_no_second.as_ref().filter(|_| !arguments.list) {
        println!("skipped: every claim about containerd 2: {reason}");
    }
    // Moments that chance chooses fail on another day than the one that made the mistake.
    let without_faults = env::var_os(faults::HITS).is_none();
    if without_faults && !arguments.list {
        println!("skipped: every claim about faults at random moments: make test-faults");
    }
    let mut trials = Vec::new();
    for model in [Model::Container, Model::Microvm] {
        let reason = reason_not_to_run(&rt, model).or_else(reason_not_to_run_in_the_lab);
        if let Some(reason) = reason.as_ref().filter(|_| !arguments.list) {
            println!("skipped: every {} claim: {reason}", model.name());
        }
        let here = Here {
            model,
            rt: &rt,
            ignored: reason.is_some(),
        };
        trials.extend(here.trials("podman", podman::start, &[engine::CLAIMS, podman::CLAIMS]));
        trials.extend(here.trials("docker", docker::start, &[engine::CLAIMS, docker::CLAIMS]));
        trials.extend(here.trials("containerd", containerd::start, &[containerd::CLAIMS]));
        trials.extend(here.trials("node", node::start, &[node::CLAIMS]));
        let claims = [containerd::CLAIMS, shim::CLAIMS];
        trials.extend(here.trials("shim", shim::start, &claims));
        let disturbed = here.unless(without_faults);
        trials.extend(disturbed.trials("faults-ctr", Ok, &[faults::CTR_CLAIMS]));
        trials.extend(disturbed.trials("faults-cri", faults::pods, &[faults::POD_CLAIMS]));
        let claims = [cri::CLAIMS, cri::NODE_CLAIMS];
        trials.extend(here.trials("cri", cri::start, &claims));
        let here = here.unless(has_no_second.is_some());
        trials.extend(here.trials("cri-2", cri::start_second, &claims));
        let claims = [cri::CLAIMS, sandbox::CLAIMS];
        trials.extend(here.trials("cri-2-shim", cri::start_without_image, &claims));
        let disturbed = here.unless(without_faults);
        let start = faults::pods_without_image;
        trials.extend(disturbed.trials("faults-cri-2-shim", start, &[faults::POD_CLAIMS]));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Under emulation a daemon takes minutes to start and to do anything: only who asks for it waits so long, and longer for
/// `all`.
const ASKED_FOR: &str = "RT_TEST_CLIENTS";

fn reason_not_to_run_in_the_lab() -> Option<String> {
    let asked_for = env::var_os(ASKED_FOR).is_some();
    (is_lab() && !asked_for).then(|| "slow in the lab: make test-clients".to_owned())
}

fn is_lab() -> bool {
    env::var_os("RT_LAB").as_deref() == Some(OsStr::new("1"))
}

/// Where trials run.
struct Here<'a> {
    model: Model,
    rt: &'a Path,
    ignored: bool,
}

impl Here<'_> {
    /// The same, where nothing runs for a further reason.
    fn unless(&self, reason: bool) -> Self {
        Self {
            ignored: self.ignored || reason,
            ..*self
        }
    }

    /// The trials of one client, which the first of them starts and the last one ends.
    fn trials<C: Send + Sync + 'static>(
        &self,
        client: &'static str,
        start: Starter<C>,
        claims: &[&[Entry<C>]],
    ) -> Vec<Trial> {
        let only_essential =
            is_lab() && env::var_os(ASKED_FOR).as_deref() != Some(OsStr::new("all"));
        let (model, rt) = (self.model, self.rt.to_owned());
        let started = Arc::new(LazyLock::new(move || {
            Start::new(client, model, &rt)
                .and_then(start)
                .map_err(|error| format!("cannot start {client}: {error}"))
        }));
        let held =
            claims.iter().copied().flatten().filter(|entry| {
                entry.models.contains(&model) && (entry.essential || !only_essential)
            });
        held.map(|entry| {
            let (claim, started) = (entry.claim, Arc::clone(&started));
            let name = format!("{client}::{}::{}", model.name(), entry.name);
            Trial::test(name, move || {
                let client = (*started).as_ref().map_err(Failed::from)?;
                claim(client).map_err(|reason| Failed::from(reason.to_string()))
            })
            .with_ignored_flag(self.ignored)
        })
        .collect()
    }
}
