//! What is delivered, and when it has to be delivered anew.

use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

/// What one service account gets: its certificate, its key and whom to trust.
#[derive(Clone, PartialEq, Eq)]
pub struct CertificateSet {
    /// The leaf and its intermediates, PEM.
    pub chain_pem: String,
    /// PKCS#8, PEM.
    pub key_pem: Zeroizing<String>,
    /// The trust bundle, PEM; shared, because all accounts mostly have the same.
    pub roots_pem: Arc<str>,
}

impl fmt::Debug for CertificateSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateSet")
            .field("chain_pem", &self.chain_pem)
            .field("roots_pem", &self.roots_pem)
            .finish_non_exhaustive()
    }
}
