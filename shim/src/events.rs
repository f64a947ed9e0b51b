//! What happens, told to containerd: a queue that keeps its order and outlives a containerd that is started again.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{MessageField, MessageFull};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::{Client, EventsClient, ttrpc};

use crate::error::Failure;

/// How long containerd may take to accept an event.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// How long to wait before a containerd that is not there is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How many events are kept for a containerd that is not there; the oldest go first.
const KEPT: usize = 4096;

/// The queue.
pub struct Events {
    queue: Arc<Queue>,
    namespace: String,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    events: VecDeque<Envelope>,
    /// One more is on its way.
    sending: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Envelope {
        let mut waiting = self.lock();
        loop {
            if let Some(event) = waiting.events.pop_front() {
                waiting.sending = true;
                return event;
            }
            waiting.sending = false;
            self.changed.notify_all();
            waiting = self
                .changed
                .wait(waiting)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Events {
    /// Starts a thread that sends what is queued to containerd's ttrpc socket at `address`.
    pub fn new(address: String, namespace: String) -> Result<Self, Failure> {
        let queue = Arc::new(Queue::default());
        let mut sender = Sender {
            address,
            client: None,
        };
        let sent = Arc::clone(&queue);
        thread::Builder::new()
            .name("events".to_owned())
            .spawn(move || {
                loop {
                    sender.send(sent.next());
                }
            })
            .map_err(Failure::io("start a thread"))?;
        Ok(Self { queue, namespace })
    }

    /// Queues an event.
    pub fn send<M: MessageFull>(&self, topic: &str, event: &M) {
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(runtime::clock::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(any(event)),
            ..Default::default()
        };
        let mut waiting = self.queue.lock();
        if waiting.events.len() >= KEPT
            && let Some(lost) = waiting.events.pop_front()
        {
            tracing::warn!("containerd is not there: event {} is lost", lost.topic);
        }
        waiting.events.push_back(envelope);
        self.queue.changed.notify_all();
    }

    /// Waits until all events are sent, at most for `limit`.
    pub fn flush(&self, limit: Duration) {
        let is_busy = |waiting: &mut Waiting| waiting.sending || !waiting.events.is_empty();
        let waiting = self.queue.lock();
        drop(
            self.queue
                .changed
                .wait_timeout_while(waiting, limit, is_busy),
        );
    }
}

/// The connection to containerd.
struct Sender {
    address: String,
    client: Option<EventsClient>,
}

impl Sender {
    /// Sends one event, however long that takes. One that containerd refuses is dropped.
    fn send(&mut self, envelope: Envelope) {
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..Default::default()
        };
        loop {
            match self.try_send(&request) {
                Ok(()) => return,
                Err(ttrpc::Error::RpcStatus(status)) => {
                    tracing::warn!(
                        "containerd refused event {}: {status:?}",
                        request.envelope.topic
                    );
                    return;
                }
                Err(error) => {
                    tracing::debug!("containerd cannot be told: {error}");
                    self.client = None;
                    thread::sleep(RETRY);
                }
            }
        }
    }

    fn try_send(&mut self, request: &ForwardRequest) -> ttrpc::Result<()> {
        let client = match self.client.take() {
            Some(client) => client,
            None => EventsClient::new(Client::connect(&format!("unix://{}", self.address))?),
        };
        let context = ttrpc::context::with_duration(ANSWER_LIMIT);
        let result = client.forward(context, request);
        self.client = Some(client);
        result.map(drop)
    }
}

/// A message as containerd's `typeurl` has it: under its name alone.
pub fn any<M: MessageFull>(message: &M) -> Any {
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        // It fails only for a message that lacks a required field, and version 3 of the language has none.
        value: message.write_to_bytes().unwrap_or_default(),
        ..Default::default()
    }
}

/// A time since 1970.
pub fn timestamp(time: Duration) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        nanos: time.subsec_nanos().cast_signed(),
        ..Default::default()
    }
}
