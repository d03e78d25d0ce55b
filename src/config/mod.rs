//! What the user types.

pub mod cli;
pub mod serve;
