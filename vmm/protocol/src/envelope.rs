//! The protobuf messages in every ttrpc frame, around a method's own messages (ttrpc's `request.proto` and
//! `google.rpc.Status`).

/// The payload of a request frame.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// The service's full name; [`method::SERVICE`](crate::method::SERVICE) for the agent.
    #[prost(string, tag = "1")]
    pub service: String,
    /// The method's name within the service.
    #[prost(string, tag = "2")]
    pub method: String,
    /// The method's encoded request message.
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    /// Nanoseconds after which the caller will not wait any more; 0 is no limit. The agent ignores it: an
    /// operation that is under way is not undone by an impatient caller.
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
    /// Key and value pairs beside the request; none is in use.
    #[prost(message, repeated, tag = "5")]
    pub metadata: Vec<KeyValue>,
}

/// One pair of [`Request::metadata`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct KeyValue {
    /// The name.
    #[prost(string, tag = "1")]
    pub key: String,
    /// The value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// The payload of a response frame.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    /// The error; absent or with code 0 on success.
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    /// The method's encoded response message, on success.
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

/// An error (`google.rpc.Status`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct Status {
    /// A gRPC status code.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// What failed.
    #[prost(string, tag = "2")]
    pub message: String,
    /// More about it; the agent sends at most one [`FailureDetails`].
    #[prost(message, repeated, tag = "3")]
    pub details: Vec<Any>,
}

/// A message with its type (`google.protobuf.Any`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct Any {
    /// The type's name.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The encoded message.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// What the agent tells of a failure beside its text: the host prints the chain of causes as it prints one
/// of its own.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FailureDetails {
    /// One text for each cause, from the nearest to the deepest.
    #[prost(string, repeated, tag = "1")]
    pub causes: Vec<String>,
    /// The exit code with which a runtime ends after this failure, 0 if no particular one: 127 if the
    /// program is not found, 126 if it cannot be executed.
    #[prost(uint32, tag = "2")]
    pub exit_code: u32,
}

impl FailureDetails {
    /// The [`Any::type_url`] of this message.
    pub const TYPE_URL: &str = "rt.agent.v1.FailureDetails";
}
