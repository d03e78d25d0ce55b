//! What the user types.

pub mod serve;
