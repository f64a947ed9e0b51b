//! Lets libFuzzer run [`fuzz::mem_queue`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::mem_queue(data));
