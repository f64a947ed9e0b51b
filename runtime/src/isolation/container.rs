//! The container model: the engine on the host's kernel.

use oci_spec::runtime::LinuxResources;

use super::{CreateContext, ExecRequest, Isolation, IsolationError, Model, Target};
use crate::signal::Signal;

/// The model.
#[derive(Debug)]
pub struct ContainerModel;

fn missing(operation: &'static str) -> IsolationError {
    IsolationError::Unsupported { model: Model::Container, operation, reason: "it is not in this build yet" }
}

impl Isolation for ContainerModel {
    fn model(&self) -> Model {
        Model::Container
    }

    fn runs_create_hooks(&self) -> bool {
        true
    }

    fn create(&self, _: &CreateContext<'_>) -> Result<i32, IsolationError> {
        Err(missing("create"))
    }

    fn start(&self, _: &Target<'_>) -> Result<(), IsolationError> {
        Err(missing("start"))
    }

    fn kill(&self, _: &Target<'_>, _: Signal, _: bool) -> Result<(), IsolationError> {
        Err(missing("kill"))
    }

    fn delete(&self, _: &Target<'_>) -> Result<(), IsolationError> {
        Ok(())
    }

    fn exec(&self, _: &Target<'_>, _: &ExecRequest<'_>) -> Result<i32, IsolationError> {
        Err(missing("exec"))
    }

    fn pause(&self, _: &Target<'_>) -> Result<(), IsolationError> {
        Err(missing("pause"))
    }

    fn resume(&self, _: &Target<'_>) -> Result<(), IsolationError> {
        Err(missing("resume"))
    }

    fn update(&self, _: &Target<'_>, _: &LinuxResources) -> Result<(), IsolationError> {
        Err(missing("update"))
    }

    fn processes(&self, _: &Target<'_>) -> Result<Vec<i32>, IsolationError> {
        Err(missing("list processes"))
    }
}
