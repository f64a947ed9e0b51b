//! Lets libFuzzer run [`fuzz::balloon_queue`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::balloon_queue(data));
