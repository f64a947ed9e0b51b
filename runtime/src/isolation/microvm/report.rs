//! How a child process tells its parent how far it is, or why it failed.
//!
//! Each word is a line over a pipe. A child that dies without its last word is an error too: the parent sees the end of
//! the pipe, never a hang.

use std::error::Error;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use protocol::{Code, Failure};
use serde::{Deserialize, Serialize};

/// More text than any error has.
const LIMIT: u64 = 256 << 10;

#[derive(Serialize, Deserialize)]
enum Message {
    /// It has come to the place where its parent has something to do.
    Arrived,
    Ready,
    /// An error and its causes, the outermost first.
    Failed(Vec<String>),
}

/// The child's end.
#[derive(Debug)]
pub struct Reporter(File);

/// The parent's end.
#[derive(Debug)]
pub struct Report {
    words: BufReader<io::Take<File>>,
    child: &'static str,
}

/// A pipe for the report of `child`, as an error would name it; both ends are closed on exec.
///
/// # Errors
/// The kernel's.
pub fn channel(child: &'static str) -> io::Result<(Report, Reporter)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    let words = BufReader::new(File::from(read).take(LIMIT));
    Ok((Report { words, child }, Reporter(write.into())))
}

impl From<OwnedFd> for Reporter {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl Reporter {
    /// The pipe's end, to be handed to a program that is executed.
    pub fn into_fd(self) -> OwnedFd {
        self.0.into()
    }

    /// Closes every descriptor but this, those in `others`, and the standard streams.
    ///
    /// # Errors
    /// The kernel's.
    pub fn close_all_but(&self, others: &[RawFd]) -> io::Result<()> {
        let kept = others.iter().copied().chain([self.0.as_raw_fd()]);
        let mut kept: Vec<u32> = kept.map(i32::unsigned_abs).collect();
        kept.sort_unstable();
        let firsts = [3].into_iter().chain(kept.iter().map(|fd| fd + 1));
        let lasts = kept.iter().map(|fd| fd.saturating_sub(1)).chain([u32::MAX]);
        for (first, last) in firsts.zip(lasts) {
            if first <= last {
                // SAFETY: a child of a fork closes its copies; nothing in it uses them any more.
                let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
                if result != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(())
    }

    /// The child has come to the place where its parent has something to do.
    ///
    /// # Errors
    /// The parent is gone.
    pub fn arrived(&mut self) -> io::Result<()> {
        self.send(&Message::Arrived)
    }

    /// The child is ready.
    ///
    /// # Errors
    /// The parent is gone.
    pub fn ready(mut self) -> io::Result<()> {
        self.send(&Message::Ready)
    }

    /// The child failed. A parent that is gone does not want to know.
    pub fn failed(mut self, error: &(dyn Error + 'static)) {
        let mut texts = vec![error.to_string()];
        let mut source = error.source();
        while let Some(cause) = source {
            texts.push(cause.to_string());
            source = cause.source();
        }
        let _ = self.send(&Message::Failed(texts));
    }

    fn send(&mut self, message: &Message) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.0.write_all(&line)
    }
}

impl Report {
    /// Waits for the child's next word.
    ///
    /// # Errors
    /// The child's error with its causes, or that it ended without a word.
    pub fn wait(&mut self) -> Result<(), Failure> {
        let mut line = Vec::new();
        let read = self.words.read_until(b'\n', &mut line);
        match read.map_err(|error| error.to_string()).and_then(|_| {
            serde_json::from_slice(&line)
                .map_err(|_| "it ended without saying why: see the kernel's log".to_owned())
        }) {
            Ok(Message::Arrived | Message::Ready) => Ok(()),
            Ok(Message::Failed(texts)) => Err(Failure::from_texts(Code::Internal, texts)),
            Err(reason) => Err(Failure::from_texts(
                Code::Internal,
                vec![format!("{} failed", self.child), reason],
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_arrives_with_its_causes() {
        let (mut report, reporter) = channel("the child").unwrap();
        let error =
            Failure::from_texts(Code::Internal, vec!["outer".to_owned(), "inner".to_owned()]);
        reporter.failed(&error);
        let received = report.wait().unwrap_err();
        assert_eq!(crate::error_chain(&received), "outer: inner");
    }

    #[test]
    fn a_child_that_dies_without_a_word_is_an_error() {
        let (mut report, mut reporter) = channel("the child").unwrap();
        reporter.arrived().unwrap();
        drop(reporter);
        report.wait().unwrap();
        let received = crate::error_chain(&report.wait().unwrap_err());
        assert_eq!(
            received,
            "the child failed: it ended without saying why: see the kernel's log"
        );
    }

    #[test]
    fn ready_is_ready() {
        let (mut report, reporter) = channel("the child").unwrap();
        reporter.ready().unwrap();
        report.wait().unwrap();
    }
}
