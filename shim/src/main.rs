//! `containerd-shim-rt-v2`, not yet a shim: it only says so.
fn main() {}
