//! Lets libFuzzer run [`fuzz::net_queue`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::net_queue(data));
