//! The command line that containerd gives a shim, in the syntax of Go's `flag` package.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use runtime::isolation::Model;

use crate::error::{Failure, Kind};

/// What the process is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start the server for a container, or find the one that its pod has; print the address.
    Start,
    /// Remove what a server that is gone left of a container.
    Delete,
    /// Be the server; what `start` executes.
    Serve,
    /// Print the version.
    Version,
    /// Print what we are, as a protobuf.
    Info,
}

/// The command line, taken apart.
#[derive(Debug)]
pub struct Flags {
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// The container.
    pub id: String,
    /// Its bundle; empty for the working directory.
    pub bundle: PathBuf,
    pub debug: bool,
    /// The name that we were called by.
    pub program: PathBuf,
}

impl Flags {
    /// Takes a command line apart, the program's name first.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, Failure> {
        let mut arguments = arguments.into_iter();
        let mut flags = Self {
            action: Action::Serve,
            namespace: String::new(),
            address: String::new(),
            id: String::new(),
            bundle: PathBuf::new(),
            debug: false,
            program: arguments.next().unwrap_or_default().into(),
        };
        let wrong = |reason: String| Failure::new(Kind::Invalid, reason);
        let text = |argument: OsString| {
            let text = argument.into_string();
            text.map_err(|raw| wrong(format!("argument {raw:?} is not UTF-8")))
        };
        let mut action = None;
        while let Some(argument) = arguments.next() {
            let argument = text(argument)?;
            let Some(flag) = argument.strip_prefix('-') else {
                action = Some(match argument.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    "serve" => Action::Serve,
                    other => return Err(wrong(format!("unknown action {other:?}"))),
                });
                break;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match (name, value.as_deref()) {
                ("v" | "version", _) => action = Some(Action::Version),
                ("info", _) => action = Some(Action::Info),
                ("debug", value) => flags.debug = value != Some("false"),
                _ => {
                    let value = match value {
                        Some(value) => value,
                        None => text(
                            arguments
                                .next()
                                .ok_or_else(|| wrong(format!("flag -{name} needs a value")))?,
                        )?,
                    };
                    match name {
                        "namespace" => flags.namespace = value,
                        "address" => flags.address = value,
                        "id" => flags.id = value,
                        "bundle" => flags.bundle = value.into(),
                        // Events go over containerd's ttrpc socket, and our own socket is ours to choose.
                        "publish-binary" | "socket" => {}
                        _ => return Err(wrong(format!("unknown flag -{name}"))),
                    }
                }
            }
        }
        flags.action = action.ok_or_else(|| {
            wrong("this is containerd's to start: it is given -namespace, -id and an action".into())
        })?;
        let needs_container =
            matches!(flags.action, Action::Start | Action::Delete | Action::Serve);
        if needs_container && (flags.namespace.is_empty() || flags.id.is_empty()) {
            return Err(wrong("-namespace and -id must be given".into()));
        }
        // The namespace becomes a directory's name, as the id does.
        for (flag, value) in [("-namespace", &flags.namespace), ("-id", &flags.id)] {
            if needs_container && let Err(error) = value.parse::<runtime::id::ContainerId>() {
                return Err(wrong(format!("{flag}: {error}")));
            }
        }
        Ok(flags)
    }

    /// The model that the name of the binary stands for, as `containerd-shim-rt-microvm-v2`.
    pub fn model(&self) -> Option<Model> {
        let name = self.program.file_name()?.to_str()?;
        let name = name.strip_prefix("containerd-shim-")?;
        let name = name.strip_suffix("-v2").unwrap_or(name);
        Model::of_binary(Path::new(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, Failure> {
        Flags::parse(line.split(' ').map(OsString::from))
    }

    #[test]
    fn containerds_command_lines_are_understood() {
        let line = "/bin/containerd-shim-rt-microvm-v2 -namespace n -address=/a --publish-binary /b -id i -debug start";
        let flags = parse(line).unwrap();
        assert_eq!(flags.action, Action::Start);
        assert_eq!((flags.namespace.as_str(), flags.id.as_str()), ("n", "i"));
        assert_eq!((flags.address.as_str(), flags.debug), ("/a", true));
        assert_eq!(flags.model(), Some(Model::Microvm));

        let flags = parse("containerd-shim-rt-v2 -namespace n -id i -bundle /x delete").unwrap();
        assert_eq!(flags.action, Action::Delete);
        assert_eq!(
            (flags.bundle.as_path(), flags.model()),
            (Path::new("/x"), None)
        );
        assert_eq!(parse("shim -v").unwrap().action, Action::Version);
        assert_eq!(parse("shim -info").unwrap().action, Action::Info);
    }

    #[test]
    fn wrong_command_lines_are_refused() {
        for line in [
            "shim",
            "shim start",
            "shim -id i start",
            "shim -namespace n -id i",
            "shim -namespace n -id i stop",
            "shim -namespace n -id",
            "shim -other x -id i start",
            "shim -namespace .. -id i start",
            "shim -namespace n -id a/b delete",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
