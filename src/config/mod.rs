//! What the user types.

// Doc comments here are help texts, where <data-dir> is a placeholder and no HTML.
#![allow(rustdoc::invalid_html_tags)]

pub mod agent;
pub mod cli;
pub mod inject;
pub mod istio_ca;
pub mod serve;
pub mod trace;
