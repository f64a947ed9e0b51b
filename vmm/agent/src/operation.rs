//! One engine operation in a child process of its own.
//!
//! The engine blocks and forks; the agent's loop must do neither. The child runs the operation and writes
//! the outcome into a pipe as the very RPC response that the host gets. The container processes that it
//! leaves behind become children of PID 1.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{ForkResult, fork, pipe2, read};
use prost::Message;
use protocol::envelope::Response;
use protocol::message::Outcome;
use protocol::wire::MAX_PAYLOAD;
use protocol::{Code, Failure};

use crate::sys;

/// An operation under way.
#[derive(Debug)]
pub(crate) struct Operation {
    pid: i32,
    pipe: OwnedFd,
    outcome: Vec<u8>,
}

impl Operation {
    /// Starts `run` in a child that keeps only the descriptors in `keep`.
    pub(crate) fn spawn(
        keep: &[RawFd],
        run: impl FnOnce() -> Result<Vec<u8>, Failure>,
    ) -> Result<Self, Failure> {
        let failed = |errno: Errno| {
            let texts = [
                "cannot start an engine process".to_owned(),
                errno.desc().to_owned(),
            ];
            Failure::from_texts(Code::Internal, texts.to_vec())
        };
        let (read_end, write_end) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        fcntl(read_end.as_raw_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(failed)?;
        // SAFETY: the agent has a single thread, so the child may do anything that the parent may.
        match unsafe { fork() }.map_err(failed)? {
            ForkResult::Parent { child } => Ok(Self {
                pid: child.as_raw(),
                pipe: read_end,
                outcome: Vec::new(),
            }),
            ForkResult::Child => {
                let mut keep = [keep, &[write_end.as_raw_fd()]].concat();
                sys::close_all_but(&mut keep);
                sys::restore_signals();
                drop(std::panic::take_hook());
                let written = File::from(write_end).write_all(&encode(run()));
                // SAFETY: ends the process at once; nothing of the parent's may be dropped here.
                unsafe { libc::_exit(i32::from(written.is_err())) }
            }
        }
    }

    /// The child's process id.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// The pipe, to be watched for reading.
    pub(crate) fn pipe(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// Takes what the child has written so far, so that a long outcome does not fill the pipe.
    pub(crate) fn collect(&mut self) {
        let mut buffer = [0; 16 << 10];
        loop {
            match read(self.pipe.as_raw_fd(), &mut buffer) {
                Ok(length @ 1..) => self.outcome.extend_from_slice(&buffer[..length]),
                Err(Errno::EINTR) => {}
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// The response, after the child has ended as `end` says. The pipe's end of file means nothing: a
    /// container process may hold a copy of it until it runs its program.
    pub(crate) fn finish(mut self, end: Outcome) -> Response {
        self.collect();
        let died = |how: String| {
            let failure = Failure::new(Code::Internal, format!("the engine process {how}"));
            Response {
                status: Some(failure.to_status()),
                payload: Vec::new(),
            }
        };
        match end {
            Outcome::Exited(0) => Response::decode(self.outcome.as_slice())
                .unwrap_or_else(|_| died("wrote no result".to_owned())),
            Outcome::Exited(code) => died(format!("exited with code {code}")),
            Outcome::Signaled(signal) => died(format!("was killed by signal {signal}")),
        }
    }
}

fn encode(result: Result<Vec<u8>, Failure>) -> Vec<u8> {
    let result = result.and_then(|payload| {
        if payload.len() < MAX_PAYLOAD / 2 {
            Ok(payload)
        } else {
            Err(Failure::new(
                Code::ResourceExhausted,
                "the result is too large for a message",
            ))
        }
    });
    response(result).encode_to_vec()
}

/// The response with this result.
pub(crate) fn response(result: Result<Vec<u8>, Failure>) -> Response {
    match result {
        Ok(payload) => Response {
            status: None,
            payload,
        },
        Err(failure) => Response {
            status: Some(failure.to_status()),
            payload: Vec::new(),
        },
    }
}
