//! The `mica` program.

fn main() {}
