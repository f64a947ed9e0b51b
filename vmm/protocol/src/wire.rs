//! The ttrpc frame: a ten-byte header and a payload, decoded from bytes that come in any portions.
//!
//! The agent forks container processes, so it must have neither threads nor an async runtime; the servers
//! of the `ttrpc` crate need one of them. The format itself is small: this codec does no I/O, so that one
//! implementation serves the agent's non-blocking epoll loop and the host's blocking client.
//!
//! The bytes are the peer's. A payload length is checked against [`MAX_PAYLOAD`] as soon as the header is
//! complete, and memory grows only with bytes that arrived, not with what a header promises.

use thiserror::Error;

/// Bytes in a frame's header: payload length (u32), stream id (u32), kind (u8), flags (u8), big endian.
pub const HEADER_LEN: usize = 10;

/// The largest payload of one frame, in bytes (the limit of ttrpc's other implementations).
pub const MAX_PAYLOAD: usize = 4 << 20;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An [`envelope::Request`](crate::envelope::Request).
    Request,
    /// An [`envelope::Response`](crate::envelope::Response).
    Response,
}

impl Kind {
    fn from_byte(byte: u8) -> Result<Self, WireError> {
        match byte {
            1 => Ok(Self::Request),
            2 => Ok(Self::Response),
            other => Err(WireError::UnknownKind(other)),
        }
    }

    fn to_byte(self) -> u8 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
        }
    }
}

/// One complete frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Ties a response to its request. Clients use odd numbers, each once a connection.
    pub stream_id: u32,
    /// What the payload is.
    pub kind: Kind,
    /// ttrpc's stream flags; zero for plain calls, the only ones in use.
    pub flags: u8,
    /// The encoded envelope.
    pub payload: Vec<u8>,
}

/// Bytes that are not a frame. The connection cannot be used any further.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum WireError {
    /// The header announces more than [`MAX_PAYLOAD`].
    #[error("frame of {0} bytes is larger than the limit of {MAX_PAYLOAD} bytes")]
    TooLarge(usize),
    /// The header has a kind that is neither request nor response.
    #[error("frame of unknown kind {0:#x}")]
    UnknownKind(u8),
    /// The header has stream flags, and no streaming call exists.
    #[error("frame with stream flags {0:#x}, and no method streams")]
    UnexpectedFlags(u8),
}

/// The bytes of a frame, ready to be written.
///
/// # Errors
/// [`WireError::TooLarge`] if the payload exceeds [`MAX_PAYLOAD`].
pub fn encode(kind: Kind, stream_id: u32, payload: &[u8]) -> Result<Vec<u8>, WireError> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= MAX_PAYLOAD)
        .ok_or(WireError::TooLarge(payload.len()))?;
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(&stream_id.to_be_bytes());
    bytes.push(kind.to_byte());
    bytes.push(0);
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// Puts frames together from bytes as they arrive.
#[derive(Debug, Default)]
pub struct Decoder {
    header: [u8; HEADER_LEN],
    header_filled: usize,
    body: Option<Body>,
}

/// A frame whose header is complete and whose payload is not.
#[derive(Debug)]
struct Body {
    frame: Frame,
    missing: usize,
}

impl Decoder {
    /// A decoder at the start of a connection.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the front of `input`, and shortens it by those. Returns the next frame once it is
    /// complete; `None` means that all of `input` was taken and more is needed.
    ///
    /// # Errors
    /// Any [`WireError`]: give the connection up.
    pub fn decode(&mut self, input: &mut &[u8]) -> Result<Option<Frame>, WireError> {
        let mut body = match self.body.take() {
            Some(body) => body,
            None => match self.take_header(input)? {
                Some(body) => body,
                None => return Ok(None),
            },
        };
        let (taken, rest) = input.split_at(body.missing.min(input.len()));
        *input = rest;
        body.frame.payload.extend_from_slice(taken);
        body.missing -= taken.len();
        if body.missing == 0 {
            return Ok(Some(body.frame));
        }
        self.body = Some(body);
        Ok(None)
    }

    /// Whether the bytes so far end between two frames: an end of the connection here loses nothing.
    #[must_use]
    pub fn is_at_boundary(&self) -> bool {
        self.header_filled == 0 && self.body.is_none()
    }

    fn take_header(&mut self, input: &mut &[u8]) -> Result<Option<Body>, WireError> {
        let missing = HEADER_LEN - self.header_filled;
        let (taken, rest) = input.split_at(missing.min(input.len()));
        *input = rest;
        let end = self.header_filled + taken.len();
        self.header[self.header_filled..end].copy_from_slice(taken);
        self.header_filled = end;
        if end < HEADER_LEN {
            return Ok(None);
        }
        self.header_filled = 0;
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, flags] = self.header;
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if length > MAX_PAYLOAD {
            return Err(WireError::TooLarge(length));
        }
        if flags != 0 {
            return Err(WireError::UnexpectedFlags(flags));
        }
        let frame = Frame {
            stream_id: u32::from_be_bytes([s0, s1, s2, s3]),
            kind: Kind::from_byte(kind)?,
            flags,
            payload: Vec::new(),
        };
        Ok(Some(Body {
            frame,
            missing: length,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(length: u32, kind: u8, flags: u8) -> Vec<u8> {
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend_from_slice(&7_u32.to_be_bytes());
        bytes.extend_from_slice(&[kind, flags]);
        bytes
    }

    #[test]
    fn frames_survive_any_split_of_the_bytes() {
        let mut bytes = encode(Kind::Request, 1, b"first").unwrap();
        bytes.extend(encode(Kind::Response, 3, b"").unwrap());
        bytes.extend(encode(Kind::Request, 5, &[9; 300]).unwrap());
        for portion in 1..bytes.len() {
            let mut decoder = Decoder::new();
            let mut frames = Vec::new();
            for mut chunk in bytes.chunks(portion) {
                while !chunk.is_empty() {
                    frames.extend(decoder.decode(&mut chunk).unwrap());
                }
            }
            assert!(decoder.is_at_boundary());
            assert_eq!(frames.len(), 3, "portions of {portion}");
            assert_eq!(frames[0].payload, b"first");
            assert_eq!((frames[1].stream_id, frames[1].kind), (3, Kind::Response));
            assert_eq!(frames[2].payload, [9; 300]);
        }
    }

    #[test]
    fn a_length_above_the_limit_is_refused_before_any_payload() {
        let over = u32::try_from(MAX_PAYLOAD + 1).unwrap();
        let bytes = header(over, 1, 0);
        let error = Decoder::new().decode(&mut bytes.as_slice()).unwrap_err();
        assert_eq!(error, WireError::TooLarge(MAX_PAYLOAD + 1));
        assert!(encode(Kind::Request, 1, &vec![0; MAX_PAYLOAD + 1]).is_err());
    }

    #[test]
    fn memory_grows_with_the_bytes_that_came() {
        let mut bytes = header(u32::try_from(MAX_PAYLOAD).unwrap(), 1, 0);
        bytes.extend([0; 100]);
        let mut decoder = Decoder::new();
        assert_eq!(decoder.decode(&mut bytes.as_slice()), Ok(None));
        assert!(!decoder.is_at_boundary());
        assert!(decoder.body.unwrap().frame.payload.capacity() < 4096);
    }

    #[test]
    fn unknown_kinds_and_flags_are_refused() {
        let bytes = header(0, 3, 0);
        assert_eq!(
            Decoder::new().decode(&mut bytes.as_slice()),
            Err(WireError::UnknownKind(3))
        );
        let bytes = header(0, 1, 2);
        assert_eq!(
            Decoder::new().decode(&mut bytes.as_slice()),
            Err(WireError::UnexpectedFlags(2))
        );
    }
}
