//! Lets libFuzzer run [`fuzz::vsock_packets`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::vsock_packets(data));
