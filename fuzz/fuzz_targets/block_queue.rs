//! Lets libFuzzer run [`fuzz::block_queue`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::block_queue(data));
