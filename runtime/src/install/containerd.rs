//! `rt install containerd`: makes the shim known to containerd, as runtime handlers for Kubernetes' runtime classes.
//!
//! The handlers come as a file of their own, which containerd's configuration imports; nothing else of that is changed. A
//! file that is imported replaces the settings of a plugin as a whole, so this one repeats those that containerd has for
//! its CRI plugin now; after a change of those it is to be written again.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{InstallError, replace};

/// The file's name in the directory that containerd imports.
const FILE: &str = "rt.toml";

/// Write a drop-in file with the runtime handlers rt and rt-microvm
#[derive(Debug, clap::Args)]
pub(super) struct Containerd {
    /// Directory of drop-in files
    #[arg(long, value_name = "DIR", default_value = "/etc/containerd/conf.d")]
    dir: PathBuf,
    /// containerd's own configuration, which must import that directory
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/containerd/config.toml"
    )]
    config: PathBuf,
    /// Have containerd's own configuration import that directory, if it does not
    #[arg(long)]
    import: bool,
    /// Who makes a pod's sandbox: containerd from its pause image, or (containerd 2) the shim, without an image
    #[arg(long, value_enum, default_value_t)]
    sandboxer: Sandboxer,
    /// Print what would be written, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Where containerd and the shim are looked for
    #[arg(skip = std::env::var("PATH").unwrap_or_default())]
    path: String,
}

/// Who makes the sandbox of a pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Sandboxer {
    #[default]
    Podsandbox,
    Shim,
}

impl Sandboxer {
    /// As containerd's configuration has it.
    fn name(self) -> &'static str {
        match self {
            Self::Podsandbox => "podsandbox",
            Self::Shim => "shim",
        }
    }
}

impl Containerd {
    /// What a node gets whose containerd is configured as its package has it.
    pub(super) fn of_node(sandboxer: Sandboxer, path: &str) -> Self {
        Self {
            dir: "/etc/containerd/conf.d".into(),
            config: "/etc/containerd/config.toml".into(),
            import: true,
            sandboxer,
            dry_run: false,
            path: path.to_owned(),
        }
    }

    /// Installs, and says what was done and what is left to do. Returns whether anything has changed.
    ///
    /// # Errors
    /// containerd's version is not known, or a file could not be written.
    pub(super) fn install(&self, out: &mut impl Write) -> Result<bool, InstallError> {
        let path = self.dir.join(FILE);
        let failed = |reason| InstallError::Settings {
            config: self.config.clone(),
            reason,
        };
        let settings = self.settings()?;
        let own = fs::read_to_string(&self.config).unwrap_or_default();
        check_version(&own, &settings).map_err(failed)?;
        let handlers = with_handlers(&settings, self.sandboxer).map_err(failed)?;
        let importing = match self.import && !imports(&own, &self.dir) {
            true => Some(with_import(&own, &settings, &self.dir).map_err(failed)?),
            false => None,
        };
        let mut changed = self.write(&path, &handlers, out)?;
        if let Some(text) = &importing {
            changed |= self.write(&self.config, text, out)?;
        }
        for step in self.steps_left() {
            writeln!(out, "# {step}")?;
        }
        Ok(changed)
    }

    /// Writes a file as a whole, or shows it. Returns whether it was another before.
    fn write(&self, path: &Path, text: &str, out: &mut impl Write) -> Result<bool, InstallError> {
        if self.dry_run {
            writeln!(out, "# {}", path.display())?;
            out.write_all(text.as_bytes())?;
            return Ok(false);
        }
        if fs::read_to_string(path).is_ok_and(|there| there == text) {
            writeln!(out, "{} is so already", path.display())?;
            return Ok(false);
        }
        replace(path, 0o644, &mut text.as_bytes())?;
        writeln!(out, "wrote {}", path.display())?;
        Ok(true)
    }

    /// containerd's settings, with all that it imports and its defaults.
    fn settings(&self) -> Result<String, InstallError> {
        let failed = |reason: String| InstallError::Settings {
            config: self.config.clone(),
            reason,
        };
        let mut containerd = Command::new("containerd");
        // Version 1 has no settings to dump where it has no file.
        match self.config.exists() {
            true => containerd
                .arg("--config")
                .arg(&self.config)
                .args(["config", "dump"]),
            false => containerd.args(["config", "default"]),
        };
        let output = containerd.env("PATH", &self.path).output();
        let output = output.map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            return Err(failed(
                String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            ));
        }
        String::from_utf8(output.stdout).map_err(|error| failed(error.to_string()))
    }

    /// What the administrator has to see to.
    fn steps_left(&self) -> Vec<String> {
        let mut steps = Vec::new();
        let own = fs::read_to_string(&self.config).unwrap_or_default();
        if !self.import && !imports(&own, &self.dir) {
            let (config, dir) = (self.config.display(), self.dir.display());
            steps.push(format!(
                "containerd does not read it yet: {config} needs the line: imports = [\"{dir}/*.toml\"] (--import adds it)"
            ));
        }
        let shims = ["containerd-shim-rt-v2", "containerd-shim-rt-microvm-v2"];
        let is_there =
            |name: &&str| std::env::split_paths(&self.path).any(|dir| dir.join(name).is_file());
        for shim in shims.iter().filter(|shim| !is_there(shim)) {
            steps.push(format!(
                "{shim} must be on containerd's PATH: see make install"
            ));
        }
        steps.push("containerd reads its configuration when it is started again".to_owned());
        steps
    }
}

/// Whether a configuration imports the files of a directory.
fn imports(config: &str, dir: &Path) -> bool {
    let table: toml::Table = config.parse().unwrap_or_default();
    let imports = table.get("imports").and_then(toml::Value::as_array);
    imports.into_iter().flatten().any(|pattern| {
        let pattern = Path::new(pattern.as_str().unwrap_or_default());
        let name = pattern.file_name().and_then(|name| name.to_str());
        pattern.parent() == Some(dir) && matches!(name, Some("*" | "*.toml" | FILE))
    })
}

/// The configuration with an import of the directory's files; the rest stays as somebody wrote it.
fn with_import(config: &str, settings: &str, dir: &Path) -> Result<String, String> {
    let pattern = format!("\"{}/*.toml\"", dir.display());
    let table: toml::Table = config.parse().map_err(|error| format!("{error}"))?;
    let text = match config.find("imports") {
        Some(at) if table.contains_key("imports") => {
            let list = at + config[at..].find('[').ok_or("`imports` is no list")? + 1;
            format!("{}{pattern}, {}", &config[..list], &config[list..])
        }
        _ if config.is_empty() => {
            let settings: toml::Table = settings.parse().map_err(|error| format!("{error}"))?;
            let version = settings.get("version").ok_or("they have no version")?;
            format!("version = {version}\nimports = [{pattern}]\n")
        }
        // Before any table, where the keys of the whole file are.
        _ => format!("imports = [{pattern}]\n{config}"),
    };
    match imports(&text, dir) {
        true => Ok(text),
        false => Err(format!("add {pattern} to its `imports` by hand")),
    }
}

/// containerd takes its configuration and what that imports for one version. So a file of a newer one would have it
/// misread the configuration.
fn check_version(own: &str, settings: &str) -> Result<(), String> {
    let version = |text: &str| -> Result<Option<i64>, String> {
        let table: toml::Table = text.parse().map_err(|error| format!("{error}"))?;
        Ok(table.get("version").and_then(toml::Value::as_integer))
    };
    match (version(own)?, version(settings)?) {
        (Some(own), Some(needed)) if own != needed => Err(format!(
            "the file is of version {own} and this containerd writes version {needed}: put in its place what \
             `containerd config migrate` makes of it"
        )),
        _ => Ok(()),
    }
}

/// The drop-in file: the settings of the CRI plugin with our handlers among them. Pods may choose a model by the annotation
/// too, if rt's own configuration lets them.
fn with_handlers(settings: &str, sandboxer: Sandboxer) -> Result<String, String> {
    let mut settings: toml::Table = settings.parse().map_err(|error| format!("{error}"))?;
    let version = settings
        .remove("version")
        .unwrap_or(toml::Value::Integer(0));
    let (plugin, has_sandboxers) = match version.as_integer() {
        // containerd 1.6 and 1.7
        Some(2) if sandboxer != Sandboxer::Podsandbox => {
            return Err("--sandboxer needs containerd 2: version 1 makes sandboxes itself".into());
        }
        Some(2) => ("io.containerd.grpc.v1.cri", false),
        // containerd 2
        Some(3) => ("io.containerd.cri.v1.runtime", true),
        _ => return Err(format!("their version is {version}, 2 and 3 are known")),
    };
    let mut plugins = match settings.remove("plugins") {
        Some(toml::Value::Table(plugins)) => plugins,
        _ => toml::Table::new(),
    };
    let mut cri = plugins.remove(plugin).unwrap_or(toml::Table::new().into());
    let containerd = table_in(&mut cri, "containerd")?;
    let runtimes = table_in(containerd, "runtimes")?;
    for name in ["rt", "rt-microvm"] {
        let mut handler = toml::Table::from_iter([
            (
                "runtime_type".to_owned(),
                format!("io.containerd.{name}.v2").into(),
            ),
            ("pod_annotations".to_owned(), vec!["dev.rt.*"].into()),
        ]);
        if has_sandboxers {
            handler.insert("sandboxer".to_owned(), sandboxer.name().into());
        }
        if let Some(runtimes) = runtimes.as_table_mut() {
            runtimes.insert(name.to_owned(), handler.into());
        }
    }
    let plugins = toml::Table::from_iter([(plugin.to_owned(), cri)]);
    let file = toml::Table::from_iter([
        ("version".to_owned(), version),
        ("plugins".to_owned(), plugins.into()),
    ]);
    Ok(format!("# Written by `rt install containerd`.\n{file}"))
}

/// The table that a table has under this name, made if it is not there.
fn table_in<'a>(value: &'a mut toml::Value, name: &str) -> Result<&'a mut toml::Value, String> {
    let table = value
        .as_table_mut()
        .ok_or_else(|| format!("{name} is not in a table"))?;
    let inner = table.entry(name).or_insert(toml::Table::new().into());
    match inner {
        toml::Value::Table(_) => Ok(inner),
        _ => Err(format!("{name} is no table")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plugins_other_settings_stay() {
        for (version, plugin) in [
            (2, "io.containerd.grpc.v1.cri"),
            (3, "io.containerd.cri.v1.runtime"),
        ] {
            let settings = format!(
                "version = {version}\n[plugins.'other']\na = 1\n[plugins.'{plugin}']\nsandbox = 'mine'\n\
                 [plugins.'{plugin}'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n"
            );
            let file = with_handlers(&settings, Sandboxer::Podsandbox).unwrap();
            let file: toml::Table = file.parse().unwrap();
            let plugins = file["plugins"].as_table().unwrap();
            assert_eq!(plugins.len(), 1);
            assert_eq!(plugins[plugin]["sandbox"].as_str(), Some("mine"));
            let runtimes = plugins[plugin]["containerd"]["runtimes"]
                .as_table()
                .unwrap();
            let kind = |name: &str| runtimes[name]["runtime_type"].as_str();
            assert_eq!(kind("runc"), Some("io.containerd.runc.v2"));
            assert_eq!(kind("rt"), Some("io.containerd.rt.v2"));
            assert_eq!(kind("rt-microvm"), Some("io.containerd.rt-microvm.v2"));
        }
        for wrong in [
            "",
            "version = 1",
            "version = 2\n[plugins]\n'io.containerd.grpc.v1.cri' = 1",
            "=",
        ] {
            assert!(
                with_handlers(wrong, Sandboxer::Podsandbox).is_err(),
                "{wrong}"
            );
        }
    }

    #[test]
    fn who_makes_the_sandbox_is_said_where_it_can_be() {
        let file = with_handlers("version = 3", Sandboxer::Shim).unwrap();
        let file: toml::Table = file.parse().unwrap();
        let runtimes = &file["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"];
        for name in ["rt", "rt-microvm"] {
            assert_eq!(runtimes[name]["sandboxer"].as_str(), Some("shim"));
        }
        let file = with_handlers("version = 2", Sandboxer::Podsandbox).unwrap();
        assert!(!file.contains("sandboxer"), "{file}");
        let refused = with_handlers("version = 2", Sandboxer::Shim).unwrap_err();
        assert!(refused.contains("containerd 2"), "{refused}");
    }

    #[test]
    fn a_configuration_of_another_version_is_left_alone() {
        assert!(check_version("", "version = 3").is_ok());
        assert!(check_version("version = 3", "version = 3").is_ok());
        let refused = check_version("version = 2", "version = 3").unwrap_err();
        assert!(refused.contains("config migrate"), "{refused}");
    }

    #[test]
    fn an_import_of_the_directory_is_seen() {
        for (text, expected) in [
            ("", false),
            ("imports = [\"/etc/containerd/config.toml\"]", false),
            (
                "imports = [\"/a.toml\", \"/etc/containerd/conf.d/*.toml\"]",
                true,
            ),
            ("imports = [\"/etc/containerd/conf.d/rt.toml\"]", true),
        ] {
            let dir = Path::new("/etc/containerd/conf.d");
            assert_eq!(imports(text, dir), expected, "{text}");
        }
    }

    #[test]
    fn an_import_is_added_to_what_is_there() {
        let dir = Path::new("/d");
        for (config, expected) in [
            ("", "version = 3\nimports = [\"/d/*.toml\"]\n"),
            (
                "# mine\nversion = 2\n",
                "imports = [\"/d/*.toml\"]\n# mine\nversion = 2\n",
            ),
            ("imports = []\n[a]\n", "imports = [\"/d/*.toml\", ]\n[a]\n"),
            (
                "imports = [\"/e\"]\n",
                "imports = [\"/d/*.toml\", \"/e\"]\n",
            ),
        ] {
            assert_eq!(
                with_import(config, "version = 3", dir).unwrap(),
                expected,
                "{config}"
            );
        }
        for (config, reason) in [
            ("=", "TOML parse error"),
            ("# imports = [1]\nimports = []\n", "by hand"),
        ] {
            let refused = with_import(config, "version = 3", dir).unwrap_err();
            assert!(refused.contains(reason), "{refused}");
        }
    }
}
