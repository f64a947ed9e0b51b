//! Machines that go on from a template in place of booting.
//!
//! Where the tests run in a lab it has templates of the usual machines too, so that most claims there are made of
//! machines that began from one.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use integration::{Bundle, Claim, Fixture, Outcome, ensure, ensure_eq};
use serde_json::{Value, json};

use crate::Entry;
use crate::microvm_failures::nothing_is_left;

pub const CLAIMS: &[Entry] = &[
    (
        "machines_of_one_template_are_strangers",
        machines_of_one_template_are_strangers,
    ),
    (
        "a_template_is_used_where_it_fits_and_refused_where_it_is_damaged",
        a_template_is_used_where_it_fits_and_refused_where_it_is_damaged,
    ),
];

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The fixture's `rt` with a directory of templates of its own.
struct Templates<'a> {
    fixture: &'a Fixture,
    config: PathBuf,
    directory: PathBuf,
}

impl<'a> Templates<'a> {
    fn new(fixture: &'a Fixture) -> Result<Self, Error> {
        let directory = fixture.dir().join("templates");
        let config = fixture.dir().join("config.toml");
        fs::write(&config, format!("[microvm]\ntemplates = {directory:?}\n"))?;
        Ok(Self {
            fixture,
            config,
            directory,
        })
    }

    fn rt(&self, args: &[&str]) -> Command {
        let mut command = self.fixture.rt(&["--config"]);
        command.arg(&self.config).args(args);
        command
    }

    fn run(&self, bundle: &Bundle, name: &str, input: &[u8]) -> Result<Outcome, Error> {
        bundle.save()?;
        let mut command = self.rt(&["run", "--bundle"]);
        command.arg(bundle.dir()).arg(self.fixture.id(name));
        Ok(self.fixture.complete(command, input.to_vec())?)
    }

    /// Makes the template that the usual bundle's machine fits; its id.
    fn create(&self) -> Result<String, Error> {
        let made = self.rt(&["template", "create"]).output()?;
        ensure!(made.status.success(), "template: {made:?}");
        let listed = self.rt(&["template", "list", "--json"]).output()?;
        let all: Value = serde_json::from_slice(&listed.stdout)?;
        let id = all[0]["id"]
            .as_str()
            .ok_or_else(|| format!("the list is {all}"))?;
        Ok(id.to_owned())
    }
}

fn machines_of_one_template_are_strangers(fixture: &Fixture) -> Claim {
    let templates = Templates::new(fixture)?;
    templates.create()?;
    let volume = fixture.dir().join("volume");
    fs::create_dir(&volume)?;
    let mut bundle = fixture.bundle()?;
    bundle.bind(&volume, "/volume", &[]);
    bundle.script(
        "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1; \
         date +%s; cat; echo written >> /volume/file; exit 7",
    );
    let mut seen = Vec::new();
    for name in ["one", "two"] {
        let outcome = templates.run(&bundle, name, b"input")?;
        ensure_eq!(outcome.code(), 7, "exit code; {:?}", outcome.stderr);
        let lines: Vec<String> = outcome.stdout.lines().map(str::to_owned).collect();
        ensure_eq!(lines.len(), 5, "lines of {:?}", outcome.stdout);
        ensure_eq!(lines[4], "input", "what was read");
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let late = now.saturating_sub(lines[3].parse()?);
        ensure!(late < 60, "the guest's clock is {late} s late");
        seen.extend(lines[..3].to_vec());
    }
    let total = seen.len();
    seen.sort();
    seen.dedup();
    ensure_eq!(seen.len(), total, "different values of {seen:?}");
    ensure_eq!(
        fs::read_to_string(volume.join("file"))?,
        "written\nwritten\n",
        "the volume's file"
    );
    Ok(())
}

fn a_template_is_used_where_it_fits_and_refused_where_it_is_damaged(fixture: &Fixture) -> Claim {
    let templates = Templates::new(fixture)?;
    let id = templates.create()?;
    ensure_eq!(
        templates.create()?,
        id,
        "the id of the one that took its place"
    );
    let mut bundle = fixture.bundle()?;
    bundle.args(&["/bin/true"]);
    let runs =
        |bundle: &Bundle, name| -> Claim { templates.run(bundle, name, b"")?.success().map(drop) };
    let refused = |name, words: &[&str]| -> Claim {
        let outcome = templates.run(&bundle, name, b"")?;
        ensure_eq!(outcome.code(), 1, "exit code; {:?}", outcome.stderr);
        for word in words {
            ensure!(
                outcome.stderr.contains(word),
                "no {word:?} in {:?}",
                outcome.stderr
            );
        }
        nothing_is_left(fixture)
    };
    runs(&bundle, "whole")?;

    fs::set_permissions(&templates.directory, Permissions::from_mode(0o777))?;
    refused(
        "writable",
        &["could be written by others than root", "chmod"],
    )?;
    fs::set_permissions(&templates.directory, Permissions::from_mode(0o700))?;

    let memory = templates.directory.join(&id).join("memory");
    let file = File::options().write(true).open(&memory)?;
    let length = file.metadata()?.len();
    file.set_len(length / 2)?;
    refused("truncated", &[&id, "rt template remove", "memory has"])?;
    // A machine of another size has nothing to do with it.
    let mut larger = fixture.bundle()?;
    larger.args(&["/bin/true"]);
    larger.spec["vm"] = json!({"hwConfig": {"memory": 288 << 20}});
    runs(&larger, "larger")?;

    // Whole in length, but nothing in it runs: the machine's end is told, and quickly.
    file.set_len(0)?;
    file.set_len(length)?;
    refused("empty", &["does not go on from its template"])?;

    templates.rt(&["template", "remove", &id]).status()?;
    runs(&bundle, "removed")?;
    let again = templates.rt(&["template", "remove", &id]).output()?;
    let again = String::from_utf8_lossy(&again.stderr).into_owned();
    ensure!(
        again.contains("there is no template"),
        "removed twice: {again}"
    );
    Ok(())
}
