//! The `rt` command.
fn main() {}
