//! The agent's errors, as they cross the wire with their chain of causes.
//!
//! The host prints them as it prints an error of its own. They are the guest's words: the number and the
//! size of the texts are bounded and control characters are replaced, so that a guest cannot write escape
//! sequences to the terminal of an administrator.

use std::error::Error;
use std::fmt;

use prost::Message;

use crate::envelope::{Any, FailureDetails, Status};

/// The most causes that are kept of one failure.
const MAX_CAUSES: usize = 16;

/// The most bytes that are kept of one text.
const MAX_TEXT: usize = 4096;

/// What kind of failure it is (a subset of the gRPC status codes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The request itself is wrong.
    InvalidArgument,
    /// No such container or process.
    NotFound,
    /// A container, process or stream of this name exists.
    AlreadyExists,
    /// A limit of the agent is reached.
    ResourceExhausted,
    /// The container is not in the state for this.
    FailedPrecondition,
    /// The agent has no such method.
    Unimplemented,
    /// The operation failed.
    Internal,
}

impl Code {
    fn to_number(self) -> i32 {
        match self {
            Self::InvalidArgument => 3,
            Self::NotFound => 5,
            Self::AlreadyExists => 6,
            Self::ResourceExhausted => 8,
            Self::FailedPrecondition => 9,
            Self::Unimplemented => 12,
            Self::Internal => 13,
        }
    }

    /// Codes that this crate does not send are all [`Code::Internal`] to the host.
    fn from_number(number: i32) -> Self {
        match number {
            3 => Self::InvalidArgument,
            5 => Self::NotFound,
            6 => Self::AlreadyExists,
            8 => Self::ResourceExhausted,
            9 => Self::FailedPrecondition,
            12 => Self::Unimplemented,
            _ => Self::Internal,
        }
    }
}

/// An error that the agent reported: a kind, a text, and its causes as [`Error::source`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    code: Code,
    chain: Chain,
    exit_code: Option<u8>,
}

/// One text and its cause.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Chain {
    text: String,
    cause: Option<Box<Chain>>,
}

impl Failure {
    /// A failure without a cause.
    #[must_use]
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self::from_texts(code, vec![text.into()])
    }

    /// A failure with the text of `error` and of each of its sources.
    #[must_use]
    pub fn from_error(code: Code, error: &dyn Error) -> Self {
        let mut texts = vec![error.to_string()];
        let mut source = error.source();
        while let Some(cause) = source {
            texts.push(cause.to_string());
            source = cause.source();
        }
        Self::from_texts(code, texts)
    }

    /// A failure with these texts, the outermost first.
    #[must_use]
    pub fn from_texts(code: Code, mut texts: Vec<String>) -> Self {
        texts.truncate(1 + MAX_CAUSES);
        let mut chain = None;
        for text in texts.into_iter().rev() {
            let text = printable(&text);
            chain = Some(Chain {
                text,
                cause: chain.map(Box::new),
            });
        }
        let unknown = || Chain {
            text: "unknown failure".to_owned(),
            cause: None,
        };
        Self {
            code,
            chain: chain.unwrap_or_else(unknown),
            exit_code: None,
        }
    }

    /// What kind of failure it is.
    #[must_use]
    pub fn code(&self) -> Code {
        self.code
    }

    /// The texts, the outermost first.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        std::iter::successors(Some(&self.chain), |chain| chain.cause.as_deref())
            .map(|chain| chain.text.as_str())
    }

    /// The failure with the exit code that a runtime ends with after it.
    #[must_use]
    pub fn with_exit_code(mut self, code: u8) -> Self {
        self.exit_code = Some(code).filter(|&code| code != 0);
        self
    }

    /// The exit code that a runtime ends with after this failure, if a particular one: 127 if a program
    /// was not found, 126 if it could not be executed.
    #[must_use]
    pub fn exit_code(&self) -> Option<u8> {
        self.exit_code
    }

    /// The failure as it is sent.
    #[must_use]
    pub fn to_status(&self) -> Status {
        let causes: Vec<String> = self.texts().skip(1).map(str::to_owned).collect();
        let details = FailureDetails {
            causes,
            exit_code: self.exit_code.unwrap_or(0).into(),
        };
        let any = Any {
            type_url: FailureDetails::TYPE_URL.to_owned(),
            value: details.encode_to_vec(),
        };
        Status {
            code: self.code.to_number(),
            message: self.chain.text.clone(),
            details: vec![any],
        }
    }

    /// The failure in a status that a peer sent. Details that cannot be read are left out.
    #[must_use]
    pub fn from_status(status: Status) -> Self {
        let details = status
            .details
            .iter()
            .find(|any| any.type_url == FailureDetails::TYPE_URL)
            .and_then(|any| FailureDetails::decode(any.value.as_slice()).ok())
            .unwrap_or_default();
        let mut texts = vec![status.message];
        texts.extend(details.causes);
        let failure = Self::from_texts(Code::from_number(status.code), texts);
        failure.with_exit_code(u8::try_from(details.exit_code).unwrap_or(0))
    }
}

/// `text` without control characters, cut at [`MAX_TEXT`] bytes.
fn printable(text: &str) -> String {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let replace = |c: char| {
        if c.is_control() && c != '\n' {
            char::REPLACEMENT_CHARACTER
        } else {
            c
        }
    };
    text[..end].chars().map(replace).collect()
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.chain.fmt(f)
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.chain.source()
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for Chain {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as &dyn Error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_survives_the_wire() {
        let texts = ["cannot create c1", "cannot mount /proc", "EPERM"]
            .map(String::from)
            .to_vec();
        let sent = Failure::from_texts(Code::FailedPrecondition, texts).with_exit_code(127);
        let received = Failure::from_status(sent.to_status());
        assert_eq!(received, sent);
        assert_eq!(received.to_string(), "cannot create c1");
        assert_eq!(
            received.source().unwrap().source().unwrap().to_string(),
            "EPERM"
        );
    }

    #[test]
    fn a_guest_cannot_write_escape_sequences_or_flood() {
        let texts = vec!["\u{1b}[2J".to_owned(), "é".repeat(MAX_TEXT)];
        let failure = Failure::from_texts(Code::Internal, texts);
        assert_eq!(failure.to_string(), "\u{fffd}[2J");
        assert_eq!(failure.source().unwrap().to_string().len(), MAX_TEXT);
        let many = Failure::from_texts(Code::Internal, vec![String::new(); 1000]);
        assert_eq!(many.texts().count(), 1 + MAX_CAUSES);
    }
}
