//! What pods get, as it is typed for `mica inject` and for `mica serve --inject-address` alike.

use std::net::{AddrParseError, SocketAddr};
use std::path::Path;

use clap::ValueEnum;

use crate::core::inject::{AGENT, Agent, CREDENTIALS_PATH, SOCKET_PATH, What, Wish};
use crate::core::url::Collector;

/// What pods get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InjectMode {
    /// The Secret istio.<account>, mounted at /etc/certs
    Secret,
    /// An agent beside the container, with its socket at /run/mica
    Agent,
    /// A token and the roots, for an agent of your own in the container
    Token,
}

/// What was typed about it.
#[derive(Clone, Copy, Debug)]
pub struct Typed<'a> {
    /// Before the names of the flags below: `--` or `--inject-`.
    pub prefix: &'a str,
    /// `mode`
    pub mode: InjectMode,
    /// `container`
    pub container: Option<&'a str>,
    /// `image`
    pub image: Option<&'a str>,
    /// `files`
    pub files: Option<&'a str>,
    /// `metrics-address`
    pub metrics: Option<SocketAddr>,
    /// `trace-otlp`
    pub otlp: Option<&'a Collector>,
    /// `trace-zipkin`
    pub zipkin: Option<&'a Collector>,
    /// Whom an agent asks.
    pub authority: &'a str,
    /// Whom its token is for.
    pub audience: &'a str,
}

impl Typed<'_> {
    /// What that comes to, unless it contradicts itself.
    pub fn wish(&self) -> Result<Wish, String> {
        let Self { prefix, mode, container, image, files, metrics, otlp, zipkin, authority, audience } =
            *self;
        for (flag, given) in [
            ("image", image.is_some()),
            ("files", files.is_some()),
            ("metrics-address", metrics.is_some()),
            ("trace-otlp", otlp.is_some()),
            ("trace-zipkin", zipkin.is_some()),
        ] {
            if given && mode != InjectMode::Agent {
                return Err(format!(
                    "{prefix}{flag} says something of an agent; give it with {prefix}mode agent"
                ));
            }
        }
        for (files, taken) in
            files.into_iter().flat_map(|files| [(files, SOCKET_PATH), (files, CREDENTIALS_PATH)])
        {
            if Path::new(files).starts_with(taken) || Path::new(taken).starts_with(files) {
                return Err(format!(
                    "{prefix}files {files} is in the way of {taken}, which the agent uses for itself; choose another path, such as /etc/certs"
                ));
            }
        }
        let container = container.unwrap_or(match mode {
            InjectMode::Token => AGENT,
            InjectMode::Secret | InjectMode::Agent => "istio-proxy",
        });
        if mode == InjectMode::Agent && container == AGENT {
            return Err(format!(
                "{prefix}container {AGENT} is the agent itself; name the container that it is for, or give {prefix}mode token for an agent of your own"
            ));
        }
        let what = match mode {
            InjectMode::Secret => What::Secret,
            InjectMode::Token => What::Token { audience: audience.to_owned() },
            InjectMode::Agent => What::Agent(Box::new(Agent {
                image: image.unwrap_or(concat!("localhost/mica:", env!("CARGO_PKG_VERSION"))).to_owned(),
                authority: authority.to_owned(),
                audience: audience.to_owned(),
                files: files.map(str::to_owned),
                metrics,
                otlp: otlp.cloned(),
                zipkin: zipkin.cloned(),
            })),
        };
        Ok(Wish { container: container.to_owned(), what })
    }
}

/// A path that something may be mounted at.
pub(super) fn mounted(text: &str) -> Result<String, String> {
    let path = text.trim_end_matches('/');
    let sound = |part: &str| !matches!(part, "" | "." | "..");
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_');
    match path.strip_prefix('/') {
        Some(rest) if rest.split('/').all(sound) && path.chars().all(plain) => Ok(path.to_owned()),
        _ => Err("it is no path that a volume can be mounted at; write one such as /etc/certs".to_owned()),
    }
}

/// An address that others find something at.
pub(super) fn reachable(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text.parse().map_err(|fault: AddrParseError| fault.to_string())?;
    if address.port() == 0 || address.ip().is_loopback() {
        return Err("nobody outside of the pod finds it there; write one such as 0.0.0.0:15020, or [::]:15020 where pods have IPv6 addresses".to_owned());
    }
    Ok(address)
}
