//! `rt guest`: import, list and remove guest kernels.

use std::io::{self, Write};
use std::path::PathBuf;

use serde_json::json;

use super::{Error, Import, Listed, Store};

/// Guest kernels for microVMs.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Directory that holds the guest kernels [default: /var/lib/rt/guests]
    #[arg(long, value_name = "DIR", global = true)]
    guest_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Make a guest kernel of a distribution's kernel and its modules
    Import {
        /// Kernel image: /boot/vmlinuz-<release>, or an uncompressed vmlinux
        #[arg(long, value_name = "FILE")]
        kernel: PathBuf,
        /// The kernel's modules [default: /lib/modules/<release>]
        #[arg(long, value_name = "DIR")]
        modules: Option<PathBuf>,
        /// Name of the guest kernel [default: the kernel's release]
        #[arg(long)]
        name: Option<String>,
    },
    /// List the guest kernels
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove a guest kernel
    #[command(alias = "rm")]
    Remove {
        /// Name of the guest kernel
        name: String,
    },
}

impl Args {
    /// Carries the command out and prints its result to `out`; `configured` are the directory and the name of the
    /// guest that the configuration file sets.
    ///
    /// # Errors
    /// As [`Import::run`], [`Store::list`] and [`Store::remove`]; and if `out` cannot be written.
    pub fn run(self, configured: Configured<'_>, out: &mut impl Write) -> Result<(), Error> {
        let store = Store::locate(self.guest_dir.as_deref(), configured.dir);
        match self.command {
            Command::Import {
                kernel,
                modules,
                name,
            } => {
                let imported = Import {
                    kernel,
                    modules,
                    name,
                }
                .run(&store)?;
                let guest = &imported.guest;
                let mut text = format!(
                    "imported guest kernel {} (Linux {})\n",
                    guest.name(),
                    guest.kernel_release()
                );
                if !imported.missing.is_empty() {
                    text.push_str(&format!(
                        "note: this kernel has no {}; bundles that need one of them will not run on it\n",
                        imported.missing.join(", ")
                    ));
                }
                print(out, &text)
            }
            Command::List { json } => print(out, &list(&store, configured.name, json)?),
            Command::Remove { name } => store.remove(&name),
        }
    }
}

/// What the configuration file says of guests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Configured<'a> {
    /// The directory that holds them.
    pub dir: Option<&'a std::path::Path>,
    /// The one to use.
    pub name: Option<&'a str>,
}

fn list(store: &Store, wanted: Option<&str>, as_json: bool) -> Result<String, Error> {
    let guests = store.list()?;
    let default = store.select(wanted).ok();
    let is_default = |name: &str| default.as_ref().is_some_and(|guest| guest.name() == name);
    if as_json {
        let rows: Vec<serde_json::Value> = guests
            .iter()
            .map(|Listed { name, guest }| match guest {
                Ok(guest) => {
                    let record = guest.record();
                    json!({
                        "name": name,
                        "kind": record.kind,
                        "kernel_release": record.kernel_release,
                        "created": record.created,
                        "modules": record.modules,
                        "drivers": record.drivers,
                        "kernel": guest.kernel(),
                        "default": is_default(name),
                    })
                }
                Err(error) => json!({ "name": name, "error": error.to_string() }),
            })
            .collect();
        return Ok(format!("{:#}\n", serde_json::Value::Array(rows)));
    }
    if guests.is_empty() {
        return Ok(format!(
            "{}\n",
            Error::NoGuest {
                root: store.root().to_owned()
            }
        ));
    }
    let width = guests
        .iter()
        .map(|listed| listed.name.len())
        .max()
        .unwrap_or(0)
        .max(4);
    let mut text = format!("{:width$}  KIND      MODULES  DEFAULT  KERNEL\n", "NAME");
    for Listed { name, guest } in &guests {
        match guest {
            Ok(guest) => {
                let yes_no = |claim| if claim { "yes" } else { "no" };
                text.push_str(&format!(
                    "{name:width$}  {:8}  {:7}  {:7}  {}\n",
                    guest.record().kind,
                    yes_no(guest.record().modules),
                    yes_no(is_default(name)),
                    guest.kernel_release(),
                ));
            }
            Err(error) => text.push_str(&format!("{name:width$}  unusable: {error}\n")),
        }
    }
    Ok(text)
}

fn print(out: &mut impl Write, text: &str) -> Result<(), Error> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Whoever reads has enough, as `head` does.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(Error::io("write", "standard output")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Rt {
        #[command(flatten)]
        guest: Args,
    }

    fn run(args: &[&str]) -> Result<String, Error> {
        let mut out = Vec::new();
        Rt::try_parse_from([&["rt"], args].concat())
            .unwrap()
            .guest
            .run(Configured::default(), &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn an_empty_list_says_how_to_get_a_guest() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().to_str().unwrap();
        assert!(
            run(&["list", "--guest-dir", dir])
                .unwrap()
                .contains("rt guest import")
        );
        assert_eq!(
            run(&["list", "--guest-dir", dir, "--json"]).unwrap(),
            "[]\n"
        );
    }

    #[test]
    fn a_damaged_guest_is_listed_with_its_fault() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("half")).unwrap();
        let dir = dir.path().to_str().unwrap();
        assert!(
            run(&["list", "--guest-dir", dir])
                .unwrap()
                .contains("unusable")
        );
        assert!(
            run(&["list", "--guest-dir", dir, "--json"])
                .unwrap()
                .contains("\"error\"")
        );
        run(&["rm", "half", "--guest-dir", dir]).unwrap();
        assert_eq!(
            run(&["list", "--guest-dir", dir, "--json"]).unwrap(),
            "[]\n"
        );
    }
}
