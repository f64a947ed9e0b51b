//! How a failure in a process that sets up a container is told to its parent, and an error to a person.

use crate::error::Error;

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
