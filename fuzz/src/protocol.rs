//! The agent's protocol both ways: what the guest's agent reads of the host, and the host of the agent.

use std::io::{self, Read, Write};

use engine::cgroup::Stats;
use engine::observation::Observation;
use oci_spec::runtime::{LinuxResources, Process, Spec};
use prost::Message;
use protocol::envelope::{Request, Response, Status};
use protocol::message::{
    CreateContainerRequest, ExecRequest, ObserveResponse, StatsResponse, UpdateRequest,
};
use protocol::method::{self, Method};
use protocol::wire::{self, Decoder, Frame, Kind};
use protocol::{Client, ClientError, Failure, StdioHeader};

use crate::input::Input;

/// Calls a function once with each of the agent's methods as its type parameter.
macro_rules! for_each_method {
    ($function:ident $arguments:tt) => {
        for_each_method!(
            @ $function $arguments
            CreateContainer StartContainer Exec Signal Wait FinishSending ResizeTerminal Processes Observe
            Stats WaitOom Pause Resume Update State Delete Shutdown
        )
    };
    (@ $function:ident $arguments:tt $($method:ident)*) => {
        $($function::<method::$method> $arguments;)*
    };
}

/// What the guest's agent reads: frames in any portions, requests, and the JSON in them.
pub fn agent_calls(data: &[u8]) {
    let mut input = Input::new(data);
    let portion = usize::from(input.byte()) + 1;
    let rest = input.bytes(usize::MAX);
    if let Some(header) = rest.first_chunk::<{ StdioHeader::LEN }>()
        && let Ok(header) = StdioHeader::decode(*header)
    {
        assert_eq!(header.encode(), rest[..StdioHeader::LEN]);
    }
    for frame in frames(rest, portion) {
        call(&frame);
    }
    // Without the frame around it: most inputs get no further.
    for_each_method!(request_of(rest));
}

fn frames(bytes: &[u8], portion: usize) -> Vec<Frame> {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    for mut chunk in bytes.chunks(portion) {
        while !chunk.is_empty() {
            match decoder.decode(&mut chunk) {
                Ok(frame) => frames.extend(frame),
                Err(_) => return frames,
            }
        }
    }
    if decoder.is_at_boundary() {
        let encoded = frames.iter().map(|frame| {
            assert!(frame.payload.len() <= wire::MAX_PAYLOAD);
            wire::encode(frame.kind, frame.stream_id, &frame.payload).unwrap()
        });
        assert_eq!(encoded.collect::<Vec<_>>().concat(), bytes);
    }
    frames
}

fn call(frame: &Frame) {
    if frame.kind == Kind::Request
        && let Ok(request) = Request::decode(frame.payload.as_slice())
        && request.service == method::SERVICE
    {
        for_each_method!(request_if_named(&request));
    }
}

fn request_if_named<M: Method>(request: &Request) {
    if request.method == M::NAME {
        request_of::<M>(&request.payload);
    }
}

fn request_of<M: Method>(payload: &[u8]) {
    let Ok(request) = M::Request::decode(payload) else {
        return;
    };
    let again = M::Request::decode(request.encode_to_vec().as_slice()).unwrap();
    assert_eq!(again.encode_to_vec(), request.encode_to_vec());
    match M::NAME {
        "CreateContainer" => {
            let text = CreateContainerRequest::decode(payload).unwrap().spec_json;
            if let Ok(spec) = serde_json::from_str::<Spec>(&text) {
                // Either is fine.
                let _ = engine::validate(&spec);
            }
        }
        "Exec" => {
            let request = ExecRequest::decode(payload).unwrap();
            drop(serde_json::from_str::<Process>(&request.process_json));
        }
        "Update" => {
            let request = UpdateRequest::decode(payload).unwrap();
            drop(serde_json::from_str::<LinuxResources>(
                &request.resources_json,
            ));
        }
        _ => {}
    }
}

/// A stream whose other end has said all that it will.
struct Said<'a>(&'a [u8]);

impl Read for Said<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Said<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the host reads of the guest's agent: its hello, and answers to each method.
pub fn agent_answers(data: &[u8]) {
    // Either is fine, here and below.
    let _ = protocol::read_hello(&mut &*data);
    for_each_method!(answer_to(data));
    if let Ok(status) = Status::decode(data) {
        failure(&Failure::from_status(status));
    }
}

fn answer_to<M: Method>(data: &[u8]) {
    judge::<M>(Client::new(Said(data)).call::<M>(&M::Request::default()));
    let frame = |payload| Frame {
        stream_id: 1,
        kind: Kind::Response,
        flags: 0,
        payload,
    };
    judge::<M>(protocol::decode_response::<M>(&frame(data.to_vec())));
    let response = Response {
        status: None,
        payload: data.to_vec(),
    };
    judge::<M>(protocol::decode_response::<M>(&frame(
        response.encode_to_vec(),
    )));
}

fn judge<M: Method>(result: Result<M::Response, ClientError>) {
    match result {
        Ok(response) => {
            let bytes = response.encode_to_vec();
            match M::NAME {
                "Observe" => {
                    let response = ObserveResponse::decode(bytes.as_slice()).unwrap();
                    drop(serde_json::from_slice::<Observation>(&response.observation));
                }
                "Stats" => {
                    let response = StatsResponse::decode(bytes.as_slice()).unwrap();
                    drop(serde_json::from_str::<Stats>(&response.stats_json));
                }
                _ => {}
            }
        }
        Err(ClientError::Failed(told)) => failure(&told),
        Err(_) => {}
    }
}

/// What a guest says goes to a terminal: bounded, and without control characters.
fn failure(failure: &Failure) {
    assert!(failure.texts().count() <= 17);
    for text in failure.texts() {
        // A replacement character takes three bytes.
        assert!(text.len() <= 3 * 4096);
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'));
    }
    assert_eq!(
        Failure::from_status(failure.to_status()).code(),
        failure.code()
    );
}
