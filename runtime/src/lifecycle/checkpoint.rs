//! `checkpoint` and `restore`: a running container becomes images, and images a running container.

use engine::hooks::Kind;

use super::{CreateOptions, Created, Error, Lifecycle, run_hooks, saved_hooks};
use crate::id::ContainerId;
use crate::isolation::Images;
use crate::signal::Signal;
use crate::state::Status;

impl Lifecycle {
    /// Writes a running container's processes to images. Unless it is to go on, the container is deleted then.
    ///
    /// # Errors
    /// It does not run, or its model cannot do it. The container goes on.
    pub fn checkpoint(&self, id: &ContainerId, images: &Images) -> Result<(), Error> {
        let container = self.store.lock(id)?;
        if self.status(&container) != Status::Running {
            return Err(Error::Status {
                problem: "container not running",
                id: id.clone(),
            });
        }
        let isolation = container.record().isolation.isolation();
        isolation.checkpoint(&self.target(container.record(), container.dir()), images)?;
        // The lock is its own.
        drop(container);
        if images.leave_running || images.pre_dump {
            return Ok(());
        }
        self.delete(id, true)
    }

    /// Makes a container from images. It runs.
    ///
    /// # Errors
    /// As [`Lifecycle::create`].
    pub fn restore(&self, options: CreateOptions<'_>, images: &Images) -> Result<Created, Error> {
        let id = options.id;
        let restored = self.make_from(options, Some(images))?;
        let container = self.store.lock(id)?;
        let hooks = saved_hooks(&container)?;
        let poststart = hooks.as_ref().and_then(|hooks| hooks.poststart().as_ref());
        run_hooks(
            Kind::Poststart,
            poststart,
            container.record(),
            Status::Running,
        )
        .inspect_err(|_| {
            let isolation = container.record().isolation.isolation();
            let target = self.target(container.record(), container.dir());
            let _ = isolation.kill(&target, Signal::KILL, true);
        })?;
        Ok(restored)
    }
}
