//! Lets libFuzzer run [`fuzz::rng_queue`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::rng_queue(data));
