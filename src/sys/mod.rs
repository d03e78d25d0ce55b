//! What Mica asks of the machine. The one room that may.

pub mod watch;
