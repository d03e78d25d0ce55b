//! What Mica decides, without doing it: identities, X.509, policy, rotation.
//!
//! Nothing here reads a clock, draws randomness, touches a file or waits. Time and serial numbers come in as
//! arguments. The one exception is the nonce inside a signature, which ring insists on drawing itself.

pub mod plan;
pub mod spiffe;
