//! One host connection to the RPC port: frames in, frames out, never blocking.
//!
//! What the peer can make the agent hold is bounded: one frame being read, and answers up to a limit,
//! above which the agent reads no further calls until the peer has taken them.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::{read, write};
use protocol::wire::{Decoder, Frame};

/// Unsent bytes above which no further calls are read.
const OUTPUT_LIMIT: usize = 1 << 20;

/// The most frames taken in one turn.
const FRAMES_A_TURN: usize = 16;

/// A connection and what is under way on it.
#[derive(Debug)]
pub(crate) struct Connection {
    fd: OwnedFd,
    decoder: Decoder,
    input: Vec<u8>,
    output: Vec<u8>,
}

/// Where reading stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reading {
    /// Nothing more for now: an event follows.
    Blocked,
    /// There may be more: read again without an event.
    Again,
    /// The peer closed, failed or broke the format: drop the connection.
    Closed,
}

impl Connection {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            decoder: Decoder::new(),
            input: Vec::new(),
            output: Vec::new(),
        }
    }

    /// Appends the frames that have arrived to `frames`.
    pub(crate) fn read_frames(&mut self, frames: &mut Vec<Frame>) -> Reading {
        let limit = frames.len() + FRAMES_A_TURN;
        let mut buffer = [0; 16 << 10];
        loop {
            let mut input = self.input.as_slice();
            while !input.is_empty() && frames.len() < limit {
                match self.decoder.decode(&mut input) {
                    Ok(frame) => frames.extend(frame),
                    Err(_) => return Reading::Closed,
                }
            }
            self.input = input.to_vec();
            if frames.len() >= limit {
                return Reading::Again;
            }
            if self.output.len() > OUTPUT_LIMIT {
                return Reading::Blocked;
            }
            match read(self.fd.as_raw_fd(), &mut buffer) {
                Ok(0) => return Reading::Closed,
                Ok(length) => self.input.extend_from_slice(&buffer[..length]),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Reading::Blocked,
                Err(_) => return Reading::Closed,
            }
        }
    }

    /// Sends `bytes` after those that wait already.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
        self.flush();
    }

    /// Writes what the peer takes now. A failure shows when reading.
    pub(crate) fn flush(&mut self) {
        let mut written = 0;
        while written < self.output.len() {
            match write(&self.fd, &self.output[written..]) {
                Ok(length) => written += length,
                Err(Errno::EINTR) => {}
                Err(_) => break,
            }
        }
        self.output.drain(..written);
    }
}
