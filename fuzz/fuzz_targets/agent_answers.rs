//! Lets libFuzzer run [`fuzz::agent_answers`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::agent_answers(data));
