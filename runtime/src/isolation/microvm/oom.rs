//! News of the guest's out-of-memory killer, by a call to its agent that is answered when there is some.
//!
//! The guest is hostile: what it answers is a number for the user, and a broken answer ends the watch.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::poll::PollFlags;
use protocol::message::OomRequest;
use protocol::method::{Method, WaitOom};
use protocol::wire::Decoder;
use protocol::{ClientError, RPC_PORT, decode_response, encode_request};

use super::agent::{AgentError, VSOCK, connect};
use crate::id::ContainerId;
use crate::isolation::{IsolationError, OomWatch};

/// A connection to the agent on which one call waits.
#[derive(Debug)]
pub struct GuestWatch {
    stream: UnixStream,
    decoder: Decoder,
    id: ContainerId,
    known: u64,
    stream_id: u32,
}

impl GuestWatch {
    /// Waits for more kills than the `known` ones.
    ///
    /// # Errors
    /// The agent cannot be reached.
    pub fn new(vm_dir: &Path, id: &ContainerId, known: u64) -> Result<Self, AgentError> {
        let stream = connect(vm_dir, RPC_PORT).map_err(|source| AgentError::Connect {
            path: vm_dir.join(VSOCK).display().to_string(),
            source,
        })?;
        let mut watch = Self {
            stream,
            decoder: Decoder::new(),
            id: id.clone(),
            known,
            stream_id: 1,
        };
        watch.ask()?;
        Ok(watch)
    }

    fn ask(&mut self) -> Result<(), ClientError> {
        let request = OomRequest {
            id: self.id.as_str().to_owned(),
            known: self.known,
        };
        let bytes = encode_request::<WaitOom>(self.stream_id, &request)?;
        self.stream.write_all(&bytes).map_err(stream_error)
    }

    /// The kills in the answer, if it is there.
    fn answer(&mut self) -> Result<Option<u64>, ClientError> {
        self.stream.set_nonblocking(true).map_err(stream_error)?;
        let mut buffer = [0; 512];
        let read = self.stream.read(&mut buffer);
        self.stream.set_nonblocking(false).map_err(stream_error)?;
        let mut input = match read {
            Ok(0) => {
                return Err(ClientError::Closed {
                    method: WaitOom::NAME,
                });
            }
            Ok(length) => &buffer[..length],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(stream_error(error)),
        };
        let method = WaitOom::NAME;
        let frame = self
            .decoder
            .decode(&mut input)
            .map_err(|source| ClientError::Wire { method, source })?;
        let Some(frame) = frame else { return Ok(None) };
        if frame.stream_id != self.stream_id {
            return Err(ClientError::Unexpected { method });
        }
        Ok(Some(decode_response::<WaitOom>(&frame)?.kills))
    }
}

fn stream_error(source: io::Error) -> ClientError {
    ClientError::Io {
        method: WaitOom::NAME,
        source,
    }
}

impl OomWatch for GuestWatch {
    fn polled(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        Some((self.stream.as_fd(), PollFlags::POLLIN))
    }

    fn news(&mut self) -> Result<u64, IsolationError> {
        let Some(kills) = self.answer().map_err(IsolationError::failed)? else {
            return Ok(0);
        };
        let news = kills.saturating_sub(std::mem::replace(&mut self.known, kills));
        self.stream_id = self.stream_id.wrapping_add(2);
        // If the machine is ending, its end is what comes next.
        let _ = self.ask();
        Ok(news)
    }
}
