//! The library behind the `rt` command.
