//! How a child that sets up a container tells its parent what failed: one message through a pipe.
//!
//! The pipe is close-on-exec, so its end without a message means that all went well. The child is our own code
//! (no program of the container has run when it writes), yet the length is bounded all the same.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::OFlag;

use crate::error::{Context, Error};

/// What kind of failure a child met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    NotFound(String),
    NotExecutable(String),
    Setup(String),
}

impl Failure {
    /// As it is sent: a letter for the kind, and the text.
    pub(crate) fn parts(&self) -> (u8, &str) {
        match self {
            Self::NotFound(text) => (b'f', text),
            Self::NotExecutable(text) => (b'x', text),
            Self::Setup(text) => (b's', text),
        }
    }

    /// The reverse of [`Failure::parts`]; the text is the other process's.
    pub(crate) fn from_parts(kind: u8, text: &[u8]) -> Self {
        let text = String::from_utf8_lossy(text).into_owned();
        match kind {
            b'f' => Self::NotFound(text),
            b'x' => Self::NotExecutable(text),
            _ => Self::Setup(text),
        }
    }

    pub(crate) fn text(&self) -> &str {
        self.parts().1
    }

    /// The exit code of a process that ends with this failure.
    pub(crate) fn exit_code(&self) -> i32 {
        match self {
            Self::NotFound(_) => 127,
            Self::NotExecutable(_) => 126,
            Self::Setup(_) => 1,
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NotFound(text) => Self::CommandNotFound(text),
            Failure::NotExecutable(text) => Self::CommandNotExecutable(text),
            Failure::Setup(text) => Self::Setup(text),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::CommandNotFound(text) => Self::NotFound(text),
            Error::CommandNotExecutable(text) => Self::NotExecutable(text),
            Error::Setup(text) => Self::Setup(text),
            other => Self::Setup(chain(&other)),
        }
    }
}

/// An error and its causes on one line, from the operation down to what the kernel said. Errors of foreign crates often
/// print their cause themselves: a text that ends with it does not get it twice.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// The longest message that is taken from a child.
const LIMIT: u64 = 16 * 1024;

pub(crate) struct Reader(File);

pub(crate) struct Writer(File);

pub(crate) fn pipe() -> Result<(Reader, Writer), Error> {
    let (read, write): (OwnedFd, OwnedFd) =
        nix::unistd::pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe".to_owned())?;
    Ok((Reader(read.into()), Writer(write.into())))
}

impl Writer {
    pub(crate) fn send(&self, failure: &Failure) {
        let (kind, text) = failure.parts();
        let mut message = vec![kind];
        message.extend_from_slice(text.as_bytes());
        // The parent may be gone; there is nobody else to tell.
        let _ = (&self.0).write_all(&message);
    }
}

impl Reader {
    /// Waits for the other side's end; `None` when it had nothing to report.
    pub(crate) fn receive(self) -> Option<Failure> {
        let mut message = Vec::new();
        let _ = self.0.take(LIMIT).read_to_end(&mut message);
        let (kind, text) = message.split_first()?;
        Some(Failure::from_parts(*kind, text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_crosses_the_pipe_with_its_kind() {
        for failure in [
            Failure::NotFound("a".into()),
            Failure::NotExecutable("b".into()),
            Failure::Setup("c".into()),
        ] {
            let (reader, writer) = pipe().unwrap();
            writer.send(&failure);
            drop(writer);
            assert_eq!(reader.receive(), Some(failure));
        }
    }

    #[test]
    fn the_end_without_a_message_is_success() {
        let (reader, writer) = pipe().unwrap();
        drop(writer);
        assert_eq!(reader.receive(), None);
    }
}
