//! `rt template`: machines that microVMs begin from in place of booting.

use std::io::Write;

use super::{CliError, Context};
use crate::isolation::microvm::template::{Listed, Template, Templates};
use crate::isolation::microvm::{self, template};

/// Templates: booted microVMs, written down, that others go on from
///
/// `rt run --isolation microvm` begins from a template instead of booting where one has the same guest kernel, agent,
/// kernel parameters, vCPUs, memory and number of network interfaces, and was made on this host's kernel. Machines of one
/// template have their guest kernel's random addresses in common.
#[derive(Debug, clap::Args)]
pub(super) struct TemplateArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Boot a microVM and write it down
    Create {
        /// Virtual CPUs [default: the configuration's]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
        vcpus: Option<u8>,
        /// Guest memory in MiB; for a container with a memory limit, that and 64 [default: the configuration's]
        #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(96..=524_288))]
        memory: Option<u64>,
        /// Network interfaces: 1 for most containers of podman, docker and Kubernetes
        #[arg(long, value_name = "N", default_value = "0", value_parser = clap::value_parser!(u8).range(0..=8))]
        interfaces: u8,
    },
    /// List the templates
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove a template; machines that began from it go on
    #[command(alias = "rm")]
    Remove {
        /// Its id
        id: String,
    },
}

impl TemplateArgs {
    pub(super) fn run(self, context: &Context<'_>, out: &mut impl Write) -> Result<(), CliError> {
        let config = &context.config().microvm;
        let templates = Templates::new(&config.templates);
        let text = match self.command {
            Command::Create {
                vcpus,
                memory,
                interfaces,
            } => {
                let mut boot = microvm::default_boot(config)?;
                boot.vcpus = vcpus.unwrap_or(boot.vcpus);
                // Whole huge pages, as any machine has.
                let asked = memory.map(|mib| mib.next_multiple_of(2) << 20);
                boot.memory = asked.unwrap_or(boot.memory);
                let made = templates.create(&boot, interfaces.into())?;
                format!("{HEADING}\n{}\n", line(&made))
            }
            Command::List { json: true } => {
                let rows: Vec<_> = templates.list()?.iter().map(to_json).collect();
                format!("{:#}\n", serde_json::Value::Array(rows))
            }
            Command::List { json: false } => {
                let mut text = format!("{HEADING}\n");
                for Listed { id, template } in templates.list()? {
                    text.push_str(&match template {
                        Ok(template) => line(&template),
                        Err(error) => format!("{id}  unusable: {error}"),
                    });
                    text.push('\n');
                }
                text
            }
            Command::Remove { id } => {
                templates.remove(&id)?;
                String::new()
            }
        };
        Ok(out.write_all(text.as_bytes())?)
    }
}

const HEADING: &str = "ID                VCPUS  MEMORY     INTERFACES  DISK       CREATED                         KERNEL";

fn line(template: &Template) -> String {
    let template::Record {
        shape,
        kernel,
        created,
    } = &template.record;
    let mib = |bytes: u64| format!("{} MiB", bytes.div_ceil(1 << 20));
    format!(
        "{}  {:5}  {:9}  {:10}  {:9}  {created:30}  {}",
        template.id,
        shape.vcpus,
        mib(shape.memory),
        shape.interfaces,
        mib(template.disk_bytes),
        kernel.display(),
    )
}

fn to_json(listed: &Listed) -> serde_json::Value {
    let id = &listed.id;
    match &listed.template {
        Ok(template) => {
            let record = &template.record;
            serde_json::json!({
                "id": id,
                "vcpus": record.shape.vcpus,
                "memory": record.shape.memory,
                "interfaces": record.shape.interfaces,
                "disk_bytes": template.disk_bytes,
                "created": record.created,
                "kernel": record.kernel,
            })
        }
        Err(error) => serde_json::json!({ "id": id, "error": error.to_string() }),
    }
}
