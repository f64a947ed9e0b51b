//! `rt checkpoint` and `rt restore`.

use std::path::PathBuf;

use super::{CliError, Context, create, parse_id};
use crate::isolation::{Images, ManageCgroups};
use crate::lifecycle::Foreground;

/// What both are told about the images.
#[derive(Debug, clap::Args)]
struct ImageOptions {
    /// Directory of the images [default: ./checkpoint]
    #[arg(long, value_name = "DIR")]
    image_path: Option<PathBuf>,
    /// Directory for criu's log and working files [default: that of the images]
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Allow open TCP connections
    #[arg(long)]
    tcp_established: bool,
    /// Allow Unix sockets that lead out of the container
    #[arg(long)]
    ext_unix_sk: bool,
    /// Allow a session that began outside of the container
    #[arg(long)]
    shell_job: bool,
    /// Allow file locks
    #[arg(long)]
    file_locks: bool,
    /// How cgroups are restored
    #[arg(long, value_name = "MODE", default_value = "soft")]
    manage_cgroups_mode: ManageCgroups,
    /// Namespace to leave empty: network
    #[arg(long, value_name = "NAMESPACE", value_parser = ["network"])]
    empty_ns: Vec<String>,
    /// Give memory of the images back as soon as it is used or superseded
    #[arg(long)]
    auto_dedup: bool,
}

/// Write a running container's processes to images, and end it
#[derive(Debug, clap::Args)]
pub(super) struct CheckpointArgs {
    #[command(flatten)]
    images: ImageOptions,
    /// Directory of an earlier --pre-dump, relative to the images
    #[arg(long, value_name = "DIR")]
    parent_path: Option<PathBuf>,
    /// Let the container go on
    #[arg(long)]
    leave_running: bool,
    /// Write the memory alone and let the container go on: a later checkpoint then has less to write
    #[arg(long)]
    pre_dump: bool,
    /// Allow files that are open and have no name
    #[arg(long)]
    link_remap: bool,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

/// Make a container from the images of a checkpoint
#[derive(Debug, clap::Args)]
pub(super) struct RestoreArgs {
    #[command(flatten)]
    images: ImageOptions,
    #[command(flatten)]
    options: create::Options,
    /// Return as soon as it runs
    #[arg(short, long)]
    detach: bool,
    /// Accepted for runc's clients: we never become a subreaper
    #[arg(long, hide = true)]
    no_subreaper: bool,
    /// Id of the container
    #[arg(value_name = "ID")]
    id: String,
}

impl ImageOptions {
    /// criu gets absolute paths: it changes its directory.
    fn resolve(&self) -> Result<Images, CliError> {
        let absolute = |path: &PathBuf| {
            std::path::absolute(path).map_err(|source| CliError::File {
                operation: "use",
                path: path.clone(),
                source,
            })
        };
        let default = PathBuf::from("checkpoint");
        Ok(Images {
            image_path: absolute(self.image_path.as_ref().unwrap_or(&default))?,
            work_path: self.work_path.as_ref().map(absolute).transpose()?,
            parent_path: None,
            leave_running: false,
            pre_dump: false,
            link_remap: false,
            tcp_established: self.tcp_established,
            ext_unix_sk: self.ext_unix_sk,
            shell_job: self.shell_job,
            file_locks: self.file_locks,
            manage_cgroups: self.manage_cgroups_mode,
            empty_network: !self.empty_ns.is_empty(),
            auto_dedup: self.auto_dedup,
        })
    }
}

impl CheckpointArgs {
    pub(super) fn run(self, context: &Context<'_>) -> Result<(), CliError> {
        let images = Images {
            parent_path: self.parent_path,
            leave_running: self.leave_running,
            pre_dump: self.pre_dump,
            link_remap: self.link_remap,
            ..self.images.resolve()?
        };
        Ok(context
            .lifecycle
            .checkpoint(&parse_id(&self.id)?, &images)?)
    }
}

impl RestoreArgs {
    pub(super) fn run(self, context: &Context<'_>) -> Result<u8, CliError> {
        let id = parse_id(&self.id)?;
        let images = self.images.resolve()?;
        let foreground = (!self.detach).then(Foreground::new).transpose()?;
        let console = self.options.console(self.detach);
        let options = self
            .options
            .resolve(context, &id, self.options.bundle(), console)?;
        let restored = context.lifecycle.restore(options, &images)?;
        create::stand_in(context, &id, restored, foreground, false)
    }
}
