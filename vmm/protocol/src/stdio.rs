//! The header that opens a connection to the stdio port and names its stream.
//!
//! The host chooses a random token for each stream, passes it in the request that creates the process, and
//! connects with it, in either order. After the header both directions are raw bytes; closing one
//! direction (a half-close) is the end of file of that direction.

use thiserror::Error;

use crate::PROTOCOL_VERSION;

/// What every header begins with.
const MAGIC: [u8; 4] = *b"rtio";

/// The opening bytes of a stdio connection: magic, protocol version (u32), token (u64), big endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StdioHeader {
    /// The stream's token, as in [`Stdio`](crate::message::Stdio) or [`Console`](crate::message::Console).
    /// Never 0.
    pub token: u64,
}

/// Bytes that are not a stdio header of this version.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum StdioHeaderError {
    /// The magic is wrong.
    #[error("not a stdio stream: wrong magic in its header")]
    Magic,
    /// The version is another one.
    #[error("stdio stream of protocol version {0}, not {PROTOCOL_VERSION}")]
    Version(u32),
    /// The token is 0, which stands for "no stream".
    #[error("stdio stream with token 0")]
    Token,
}

impl StdioHeader {
    /// Bytes in the header.
    pub const LEN: usize = 16;

    /// The bytes to send first.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&PROTOCOL_VERSION.to_be_bytes());
        bytes[8..].copy_from_slice(&self.token.to_be_bytes());
        bytes
    }

    /// The header in the first bytes of a connection.
    ///
    /// # Errors
    /// [`StdioHeaderError`]: close the connection.
    pub fn decode(bytes: [u8; Self::LEN]) -> Result<Self, StdioHeaderError> {
        let [
            m0,
            m1,
            m2,
            m3,
            v0,
            v1,
            v2,
            v3,
            t0,
            t1,
            t2,
            t3,
            t4,
            t5,
            t6,
            t7,
        ] = bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(StdioHeaderError::Magic);
        }
        let version = u32::from_be_bytes([v0, v1, v2, v3]);
        if version != PROTOCOL_VERSION {
            return Err(StdioHeaderError::Version(version));
        }
        match u64::from_be_bytes([t0, t1, t2, t3, t4, t5, t6, t7]) {
            0 => Err(StdioHeaderError::Token),
            token => Ok(Self { token }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire() {
        let header = StdioHeader {
            token: 0x0123_4567_89ab_cdef,
        };
        assert_eq!(StdioHeader::decode(header.encode()), Ok(header));
    }

    #[test]
    fn other_bytes_are_refused() {
        let good = StdioHeader { token: 1 }.encode();
        let with = |index: usize, byte: u8| {
            let mut bytes = good;
            bytes[index] = byte;
            StdioHeader::decode(bytes)
        };
        assert_eq!(with(0, b'x'), Err(StdioHeaderError::Magic));
        assert_eq!(with(7, 99), Err(StdioHeaderError::Version(99)));
        assert_eq!(with(15, 0), Err(StdioHeaderError::Token));
    }
}
