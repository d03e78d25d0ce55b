//! The client's side of the CSR API: connecting to a running Mica and asking it.
