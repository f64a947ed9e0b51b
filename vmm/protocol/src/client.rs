//! The host's side of the RPC: one blocking call after the other over any byte stream.
//!
//! The agent may be in an attacker's hands. Its answers are bounded by the codec, must be responses to the
//! call that is under way, and must decode as the method's message; anything else is an error that ends
//! the use of the connection.

use std::io::{self, Read, Write};

use prost::Message;
use thiserror::Error;

use crate::envelope::{Request, Response};
use crate::failure::Failure;
use crate::message::Hello;
use crate::method::{self, Method};
use crate::wire::{self, Decoder, Frame, Kind, WireError};

/// Why a call has no result. After any but [`ClientError::Failed`] the connection must be dropped.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The agent did the call and it failed. The failure's text stands for itself.
    #[error(transparent)]
    Failed(Failure),
    /// The stream's time limit passed without an answer.
    #[error("the guest's agent did not answer {method} in time")]
    TimedOut {
        /// The method called.
        method: &'static str,
    },
    /// The agent closed the connection.
    #[error("the guest's agent closed the connection during {method}")]
    Closed {
        /// The method called.
        method: &'static str,
    },
    /// The stream failed.
    #[error("cannot talk to the guest's agent for {method}")]
    Io {
        /// The method called.
        method: &'static str,
        /// The stream's error.
        #[source]
        source: io::Error,
    },
    /// A frame is malformed, or the request is too large for one.
    #[error("bad frame in {method}")]
    Wire {
        /// The method called.
        method: &'static str,
        /// What is wrong with it.
        #[source]
        source: WireError,
    },
    /// An answer does not decode.
    #[error("the guest's agent sent a malformed answer to {method}")]
    Decode {
        /// The method called.
        method: &'static str,
        /// Where decoding stopped.
        #[source]
        source: prost::DecodeError,
    },
    /// A frame that is not the answer to the call under way.
    #[error("the guest's agent sent a frame that does not belong to {method}")]
    Unexpected {
        /// The method called.
        method: &'static str,
    },
    /// The agent speaks another version of the protocol.
    #[error(
        "the guest's agent speaks protocol version {agent}, this runtime {}: \
         use the rt-agent that was built with this rt",
        crate::PROTOCOL_VERSION
    )]
    Version {
        /// The agent's version.
        agent: u32,
    },
}

/// Calls methods of the agent over a connected stream.
///
/// A time limit is the stream's own: with `set_read_timeout` a call that is not answered in time fails
/// with [`ClientError::TimedOut`]. For concurrent calls (a [`method::Wait`] beside others) open a
/// connection for each, or use [`encode_request`], [`Decoder`] and [`decode_response`] in a loop.
#[derive(Debug)]
pub struct Client<S> {
    stream: S,
    decoder: Decoder,
    next_id: u32,
}

impl<S: Read + Write> Client<S> {
    /// A client over a stream that is connected to the agent's RPC port.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            decoder: Decoder::new(),
            next_id: 1,
        }
    }

    /// The stream, to set time limits.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Calls `M` and waits for the answer.
    ///
    /// # Errors
    /// [`ClientError::Failed`] with what the agent reports; all others are of the connection.
    pub fn call<M: Method>(&mut self, request: &M::Request) -> Result<M::Response, ClientError> {
        let stream_id = self.next_id;
        let bytes = encode_request::<M>(stream_id, request)?;
        self.next_id = stream_id.wrapping_add(2);
        self.stream
            .write_all(&bytes)
            .map_err(|source| stream_error(M::NAME, source))?;
        let frame = read_frame(&mut self.stream, &mut self.decoder, M::NAME)?;
        if frame.stream_id != stream_id {
            return Err(ClientError::Unexpected { method: M::NAME });
        }
        decode_response::<M>(&frame)
    }
}

/// The bytes of a call of `M`. `stream_id` must be odd and new on the connection.
///
/// # Errors
/// [`ClientError::Wire`] if the request is larger than a frame may be.
pub fn encode_request<M: Method>(
    stream_id: u32,
    request: &M::Request,
) -> Result<Vec<u8>, ClientError> {
    let payload = request.encode_to_vec();
    request_frame(method::SERVICE, M::NAME, stream_id, payload)
}

/// The result in a frame that answers a call of `M`. The caller has matched the stream id.
///
/// # Errors
/// [`ClientError::Failed`] with what the agent reports; all others are of the connection.
pub fn decode_response<M: Method>(frame: &Frame) -> Result<M::Response, ClientError> {
    let method = M::NAME;
    if frame.kind != Kind::Response {
        return Err(ClientError::Unexpected { method });
    }
    let malformed = |source| ClientError::Decode { method, source };
    let response = Response::decode(frame.payload.as_slice()).map_err(malformed)?;
    match response.status {
        Some(status) if status.code != 0 => Err(ClientError::Failed(Failure::from_status(status))),
        _ => M::Response::decode(response.payload.as_slice()).map_err(malformed),
    }
}

/// The bytes of the agent's [`Hello`].
///
/// # Errors
/// [`ClientError::Wire`] if it is larger than a frame may be.
pub fn encode_hello(hello: &Hello) -> Result<Vec<u8>, ClientError> {
    request_frame(
        method::HOST_SERVICE,
        method::HELLO,
        1,
        hello.encode_to_vec(),
    )
}

/// Reads the agent's [`Hello`] from a connection that it made to the host, and checks its version.
///
/// # Errors
/// [`ClientError::Version`] if the agent is of another version; all others are of the connection.
pub fn read_hello(stream: &mut impl Read) -> Result<Hello, ClientError> {
    let method = method::HELLO;
    let frame = read_frame(stream, &mut Decoder::new(), method)?;
    if frame.kind != Kind::Request {
        return Err(ClientError::Unexpected { method });
    }
    let malformed = |source| ClientError::Decode { method, source };
    let request = Request::decode(frame.payload.as_slice()).map_err(malformed)?;
    if request.service != method::HOST_SERVICE || request.method != method {
        return Err(ClientError::Unexpected { method });
    }
    let hello = Hello::decode(request.payload.as_slice()).map_err(malformed)?;
    if hello.protocol_version != crate::PROTOCOL_VERSION {
        return Err(ClientError::Version {
            agent: hello.protocol_version,
        });
    }
    Ok(hello)
}

fn request_frame(
    service: &str,
    method: &'static str,
    stream_id: u32,
    payload: Vec<u8>,
) -> Result<Vec<u8>, ClientError> {
    let request = Request {
        service: service.to_owned(),
        method: method.to_owned(),
        payload,
        ..Request::default()
    };
    wire::encode(Kind::Request, stream_id, &request.encode_to_vec())
        .map_err(|source| ClientError::Wire { method, source })
}

/// Reads until one frame is complete. Bytes behind it must not be there: only one call is under way.
fn read_frame(
    stream: &mut impl Read,
    decoder: &mut Decoder,
    method: &'static str,
) -> Result<Frame, ClientError> {
    let mut buffer = [0; 4096];
    loop {
        let length = match stream.read(&mut buffer) {
            Ok(0) => return Err(ClientError::Closed { method }),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(stream_error(method, source)),
        };
        let mut input = &buffer[..length];
        let frame = decoder
            .decode(&mut input)
            .map_err(|source| ClientError::Wire { method, source })?;
        match frame {
            Some(frame) if input.is_empty() => return Ok(frame),
            Some(_) => return Err(ClientError::Unexpected { method }),
            None => {}
        }
    }
}

fn stream_error(method: &'static str, source: io::Error) -> ClientError {
    match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::TimedOut { method },
        _ => ClientError::Io { method, source },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::Code;
    use crate::message::{ContainerRequest, StateResponse};
    use crate::method::State;

    fn response_frame(stream_id: u32, response: &Response) -> Vec<u8> {
        wire::encode(Kind::Response, stream_id, &response.encode_to_vec()).unwrap()
    }

    /// What a call gives when the agent answers with `bytes` and closes.
    fn call_answered_by(bytes: Vec<u8>) -> Result<StateResponse, ClientError> {
        let (host, mut agent) = UnixStream::pair().unwrap();
        let answer = thread::spawn(move || {
            let frame = read_frame(&mut agent, &mut Decoder::new(), "State").unwrap();
            let request = Request::decode(frame.payload.as_slice()).unwrap();
            assert_eq!(
                (request.service.as_str(), request.method.as_str()),
                (method::SERVICE, "State")
            );
            let _ = agent.write_all(&bytes);
        });
        let result = Client::new(host).call::<State>(&ContainerRequest {
            id: "c1".to_owned(),
        });
        answer.join().unwrap();
        result
    }

    #[test]
    fn a_call_returns_the_response() {
        let state = StateResponse {
            status: "running".to_owned(),
            pid: 42,
        };
        let response = Response {
            status: None,
            payload: state.encode_to_vec(),
        };
        assert_eq!(
            call_answered_by(response_frame(1, &response)).unwrap(),
            state
        );
    }

    #[test]
    fn a_failure_keeps_its_code_and_text() {
        let failure = Failure::new(Code::NotFound, "no container c1");
        let response = Response {
            status: Some(failure.to_status()),
            payload: Vec::new(),
        };
        let error = call_answered_by(response_frame(1, &response)).unwrap_err();
        assert_eq!(error.to_string(), "no container c1");
        assert!(matches!(error, ClientError::Failed(f) if f.code() == Code::NotFound));
    }

    #[test]
    fn hostile_answers_are_errors() {
        let empty = Response::default();
        let request = wire::encode(Kind::Request, 1, b"").unwrap();
        let garbage = wire::encode(Kind::Response, 1, &[0xff; 64]).unwrap();
        let twice = [response_frame(1, &empty), response_frame(1, &empty)].concat();
        let unexpected = |bytes| {
            matches!(
                call_answered_by(bytes).unwrap_err(),
                ClientError::Unexpected { .. }
            )
        };
        assert!(unexpected(response_frame(3, &empty)));
        assert!(unexpected(request));
        assert!(unexpected(twice));
        assert!(matches!(
            call_answered_by(garbage).unwrap_err(),
            ClientError::Decode { .. }
        ));
        assert!(matches!(
            call_answered_by(vec![0xff; 10]).unwrap_err(),
            ClientError::Wire { .. }
        ));
        assert!(matches!(
            call_answered_by(vec![0; 3]).unwrap_err(),
            ClientError::Closed { .. }
        ));
    }

    #[test]
    fn a_silent_agent_is_a_timeout() {
        let (host, _agent) = UnixStream::pair().unwrap();
        host.set_read_timeout(Some(Duration::from_millis(10)))
            .unwrap();
        let error = Client::new(host)
            .call::<State>(&ContainerRequest::default())
            .unwrap_err();
        assert!(matches!(error, ClientError::TimedOut { method: "State" }));
    }

    #[test]
    fn a_hello_of_another_version_is_refused() {
        let hello = |protocol_version| Hello {
            protocol_version,
            ..Hello::default()
        };
        let bytes = encode_hello(&hello(crate::PROTOCOL_VERSION)).unwrap();
        read_hello(&mut bytes.as_slice()).unwrap();
        let bytes = encode_hello(&hello(crate::PROTOCOL_VERSION + 1)).unwrap();
        let error = read_hello(&mut bytes.as_slice()).unwrap_err();
        assert!(matches!(error, ClientError::Version { .. }));
    }
}
