//! The container engine that the host and the guest agent share.
