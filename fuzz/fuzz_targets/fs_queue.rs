//! Lets libFuzzer run [`fuzz::fs_queue`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::fs_queue(data));
