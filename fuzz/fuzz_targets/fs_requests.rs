//! Lets libFuzzer run [`fuzz::fs_requests`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::fs_requests(data));
