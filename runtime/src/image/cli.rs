//! `rt bundle`: making bundles.

use std::io::{self, Write};
use std::path::PathBuf;

use oci_spec::runtime::Spec;

use super::{Error, Platform, Unpack};

/// Bundles.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Make a bundle of an image: an OCI layout, its archive, or an archive of `docker save`
    ///
    /// The bundle is for root alone (mode 0700), since it may hold set-user-ID programs.
    Unpack {
        /// The image: a directory or a tar archive
        image: PathBuf,
        /// The bundle's directory, which must not exist
        dir: PathBuf,
        /// The image to take, where there are several
        #[arg(long)]
        tag: Option<String>,
        /// The platform to take, where there are several [default: linux/amd64]
        #[arg(long, value_name = "OS/ARCH")]
        platform: Option<Platform>,
        /// The most that the layers may unpack to, in MiB
        #[arg(long, value_name = "MIB", default_value_t = 32 << 10)]
        max_size: u64,
    },
}

impl Args {
    /// Carries the command out and prints its result to `out`; `base` is the runtime's default configuration.
    ///
    /// # Errors
    /// As [`Unpack::run`], and if `out` cannot be written.
    pub fn run(self, base: Spec, out: &mut impl Write) -> Result<(), Error> {
        let Command::Unpack {
            image,
            dir,
            tag,
            platform,
            max_size,
        } = self.command;
        let unpacked = Unpack {
            image: &image,
            target: &dir,
            tag: tag.as_deref(),
            platform: platform.as_ref(),
            max_bytes: max_size.saturating_mul(1 << 20),
        }
        .run(base)?;
        let layers = if unpacked.layers == 1 {
            "layer"
        } else {
            "layers"
        };
        let mut text = format!(
            "unpacked {} {layers} to {}\n",
            unpacked.layers,
            dir.display()
        );
        if !unpacked.has_command {
            text.push_str(
                "note: the image names no command; set process.args in its config.json\n",
            );
        }
        if unpacked.skipped_xattrs > 0 {
            text.push_str(&format!(
                "note: {} extended attributes were left out\n",
                unpacked.skipped_xattrs
            ));
        }
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
                Err(Error::io("write", "standard output")(e))
            }
            _ => Ok(()),
        }
    }
}
