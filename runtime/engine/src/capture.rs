//! Keeps libcontainer's own words about a failure.
//!
//! Its errors cross from the container's first process as one line without their cause; the cause is only logged.
//! So the error events of that process go to a memory file that parent and child share, and the first of them is
//! the innermost cause. Nothing here is read by or from the container's program.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;

use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// The errors logged while a closure ran, in this process and in its children.
pub(crate) struct Capture {
    file: File,
}

impl Capture {
    pub(crate) fn new() -> std::io::Result<Self> {
        let fd: OwnedFd = memfd_create(c"rt-engine-errors", MemFdCreateFlag::MFD_CLOEXEC)?;
        Ok(Self { file: fd.into() })
    }

    /// Runs the closure with its errors kept.
    pub(crate) fn run<T>(&self, work: impl FnOnce() -> T) -> std::io::Result<T> {
        let sink = Sink {
            file: self.file.try_clone()?,
        };
        Ok(tracing::subscriber::with_default(sink, work))
    }

    /// The first error, which is the cause of the others.
    pub(crate) fn first(&mut self) -> Option<String> {
        let mut text = String::new();
        self.file.seek(SeekFrom::Start(0)).ok()?;
        (&self.file)
            .take(16 * 1024)
            .read_to_string(&mut text)
            .ok()?;
        text.lines().next().map(str::to_owned)
    }
}

struct Sink {
    file: File,
}

impl Subscriber for Sink {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR && metadata.is_event()
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let _ = (&self.file).write_all(line.finish().as_bytes());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// An event's message followed by its fields.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn finish(mut self) -> String {
        if !self.fields.is_empty() {
            let _ = write!(self.message, " ({})", self.fields);
        }
        let mut line = self.message.replace('\n', " ");
        line.push('\n');
        line
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
            return;
        }
        if !self.fields.is_empty() {
            self.fields.push_str(", ");
        }
        let _ = write!(self.fields, "{}={value:?}", field.name());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_is_kept_with_its_fields() {
        let mut capture = Capture::new().unwrap();
        capture
            .run(|| {
                tracing::info!("not this");
                tracing::error!(path = "/x", "cannot mount");
                tracing::error!("failed");
            })
            .unwrap();
        assert_eq!(capture.first().unwrap(), "cannot mount (path=\"/x\")");
    }
}
