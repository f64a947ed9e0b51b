//! Lets libFuzzer run [`fuzz::agent_calls`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::agent_calls(data));
