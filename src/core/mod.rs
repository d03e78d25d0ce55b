//! What Mica decides, without doing it: identities, X.509, policy, rotation.
//!
//! Nothing here reads a clock, draws randomness, touches a file or waits. Time and serial numbers come in as
//! arguments. The one exception is the nonce inside a signature, which ring insists on drawing itself.

pub mod authority_files;
pub mod bundle;
pub mod calendar;
pub mod caller;
pub mod certificate;
pub mod cgroup;
pub mod chain;
mod check;
pub mod continuity;
pub mod csr;
mod der;
pub mod documents;
pub mod election;
pub mod fair;
pub mod federation;
pub mod forwarded;
pub mod granted;
pub mod inject;
pub mod inspect;
pub mod issuer;
pub mod jwt_svid;
pub mod key;
pub mod keyring;
pub mod lifetime;
pub mod pem;
pub mod plan;
pub mod policy;
pub mod profile;
pub mod published;
pub mod refusal;
pub mod rivals;
pub mod rotation;
pub mod selection;
pub mod settings;
pub mod spiffe;
pub mod token;
pub mod trace;
pub mod url;
pub mod window;
pub mod workloads;
