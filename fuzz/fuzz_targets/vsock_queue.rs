//! Lets libFuzzer run [`fuzz::vsock_queue`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::vsock_queue(data));
