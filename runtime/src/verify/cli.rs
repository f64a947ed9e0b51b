//! `rt verify` on the command line.

use std::io::{self, Write};
use std::path::Path;

use super::attack::Attacker;
use super::policy::Policy;
use super::report::Format;
use super::{VerifyError, attacks, bundle, container, process};
use crate::doctor;
use crate::isolation::Model;
use crate::lifecycle::Lifecycle;

/// Tell what a bundle gives up of its isolation, or whether a running container has what it asked for
///
/// Exits with 0 if the policy is kept and all that was asked for is there, with 1 if not, and with 2 if that could not be
/// found out.
#[derive(Clone, clap::Args, Debug)]
pub struct Args {
    /// The bundle's directory [default: the current one]; with --live the container's id
    #[arg(value_name = "BUNDLE|ID", required_if_eq("live", "true"))]
    subject: Option<String>,
    /// Look at a running container
    #[arg(long)]
    live: bool,
    /// Look at a process, which any runtime may have made; BUNDLE is then what it was made from
    #[arg(long, conflicts_with = "live")]
    pid: Option<i32>,
    /// Run a hostile program with the rights of BUNDLE, or with few, that tries to get out; in every model that can run
    /// here, or in that of --isolation
    #[arg(long, conflicts_with_all = ["live", "pid"])]
    attack: bool,
    /// The policy: baseline, restricted, rt-strict, or a file
    #[arg(long, value_name = "NAME|FILE", default_value = "baseline")]
    policy: String,
    /// The form of the report
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    format: Format,
}

/// Why the command gave no report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing could be verified.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// The report cannot be written.
    #[error("write the report")]
    Output(#[from] io::Error),
}

impl Args {
    /// Prints the report and returns the exit code. The attacker's bundle is the one that is named, if any.
    ///
    /// # Errors
    /// There is nothing to report on, or `out` cannot be written.
    pub fn run(
        &self,
        lifecycle: &Lifecycle,
        attacker: Attacker<'_>,
        asked: Option<Model>,
        out: &mut impl Write,
    ) -> Result<u8, Error> {
        let policy = Policy::load(&self.policy).map_err(VerifyError::from)?;
        let subject = self.subject.as_deref();
        let report = match (self.pid, subject) {
            (Some(pid), bundle) => process(pid, bundle.map(Path::new), &policy)?,
            (None, Some(id)) if self.live => {
                container(lifecycle, &id.parse().map_err(VerifyError::from)?, &policy)?
            }
            (None, directory) if self.attack => {
                let models = asked.map_or_else(|| usable_models(lifecycle), |model| vec![model]);
                attacks(
                    Attacker {
                        bundle: directory.map(Path::new),
                        ..attacker
                    },
                    &models,
                )?
            }
            (None, directory) => bundle(Path::new(directory.unwrap_or(".")), &policy)?,
        };
        out.write_all(report.render(self.format)?.as_bytes())?;
        Ok(match (report.holds, report.unseen) {
            (false, _) => 1,
            (true, 0) => 0,
            (true, _) => 2,
        })
    }
}

fn usable_models(lifecycle: &Lifecycle) -> Vec<Model> {
    let report = doctor::Report::examine(lifecycle.config());
    let models = [Model::Container, Model::Microvm].into_iter();
    models.filter(|model| report.of(*model).usable).collect()
}
