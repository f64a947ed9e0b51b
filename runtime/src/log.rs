//! The log: lines as runc writes them, since clients read the reason of a failure from the last one.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Filter, Layer, SubscriberExt};

use crate::clock;

/// The form of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// `time="..." level=error msg="..."`
    Text,
    /// `{"level":"error","msg":"...","time":"..."}`
    Json,
}

/// Where log lines go: a file, or nowhere but standard error.
#[derive(Debug, Clone)]
pub struct Log {
    file: Option<Arc<File>>,
    format: Format,
}

impl Log {
    /// A log at `path`, which is made and appended to; without one it goes to standard error.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: Option<&Path>, format: Format) -> std::io::Result<Self> {
        let open = |path: &Path| {
            OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o644)
                .open(path)
        };
        Ok(match path.filter(|path| !path.as_os_str().is_empty()) {
            Some(path) => Self::to(open(path)?, format),
            None => Self { file: None, format },
        })
    }

    /// A log in an open file.
    pub fn to(file: File, format: Format) -> Self {
        let file = Some(Arc::new(file));
        Self { file, format }
    }

    /// Writes the reason of a failure to the log file. Standard error gets it from the caller.
    pub fn error(&self, message: &str) {
        if let Some(file) = &self.file {
            let _ = file
                .as_ref()
                .write_all(self.line("error", message).as_bytes());
        }
    }

    fn write(&self, level: &str, message: &str) {
        let line = self.line(level, message);
        let _ = match &self.file {
            Some(file) => file.as_ref().write_all(line.as_bytes()),
            None => std::io::stderr().write_all(line.as_bytes()),
        };
    }

    fn line(&self, level: &str, message: &str) -> String {
        let time = clock::rfc3339(clock::now());
        match self.format {
            Format::Json => {
                let line = serde_json::json!({ "level": level, "msg": message, "time": time });
                format!("{line}\n")
            }
            Format::Text => format!("time=\"{time}\" level={level} msg={message:?}\n"),
        }
    }
}

impl<S: Subscriber> Layer<S> for Log {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let mut text = Text::default();
        event.record(&mut text);
        self.write(level, &format!("{}{}", text.message, text.fields));
    }
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

/// Without `--debug` only our own warnings: libraries tell as errors what we handle.
struct Ours {
    debug: bool,
}

impl Ours {
    fn wants(&self, metadata: &Metadata<'_>) -> bool {
        let target = metadata.target().split("::").next().unwrap_or_default();
        self.debug
            || (*metadata.level() <= Level::WARN
                && matches!(
                    target,
                    "runtime" | "engine" | "vmm" | "rt" | "containerd_shim_rt_v2"
                ))
    }
}

impl<S> Filter<S> for Ours {
    fn enabled(&self, metadata: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        self.wants(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(if self.debug {
            LevelFilter::DEBUG
        } else {
            LevelFilter::WARN
        })
    }
}

/// Sends this process's log events to `log`.
pub fn install(log: Log, debug: bool) {
    let subscriber = tracing_subscriber::registry().with(log.with_filter(Ours { debug }));
    // It fails only where one is set already, which then stays.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_lines_have_what_clients_parse() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        Log::open(Some(&path), Format::Json)
            .unwrap()
            .error("a \"b\"\nc");
        let text = std::fs::read_to_string(path).unwrap();
        let line: serde_json::Value =
            serde_json::from_str(text.strip_suffix('\n').unwrap()).unwrap();
        assert_eq!(
            (&line["level"], &line["msg"]),
            (&"error".into(), &"a \"b\"\nc".into())
        );
        assert!(line["time"].as_str().unwrap().ends_with('Z'));
        assert_eq!(text.lines().count(), 1);
    }
}
