//! One stream, in either protocol: what the proxy wants, what it was told, and what it said of that.
//!
//! A stream holds no queue. It looks at what there is when its connection has room for another response, so a proxy that
//! does not read costs one response and gets the latest state when it reads again.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tokio_stream::Stream;
use tonic::{Status, Streaming};

use super::Shared;
use super::caller::{Caller, There};
use super::metrics::Open;
use super::resource::{self, Made, Name};
use crate::agent::{Consumer, Svid};
use crate::core::certificate::hex;
use crate::core::inspect::one_line;
use crate::trace::Span;

/// In traces.
const SERVICE: &str = "envoy.service.secret.v3.SecretDiscoveryService";
/// More names than a proxy has certificates.
const MAX_NAMES: usize = 128;
/// Longer than any SPIFFE ID.
const MAX_NAME: usize = 4096;
/// A proxy that does not answer a response gets the next one all the same, after this time.
const ANSWER: Duration = Duration::from_secs(10);
/// So many refused names of one stream are logged.
const LOGGED: usize = 16;
/// So much of what a proxy says is.
const LONGEST: usize = 300;

/// The two ways in which secrets are streamed.
pub(super) trait Protocol: Send + 'static {
    const METHOD: &'static str;
    type Request: Send;
    type Response: Send;
    fn asked(request: Self::Request) -> Asked;
    /// None if nothing is to be said.
    fn response(news: News<'_>, nonce: String) -> Option<Self::Response>;
}

/// A request, in whichever protocol.
pub(super) struct Asked {
    pub(super) type_url: String,
    pub(super) names: Names,
    pub(super) holds: Holds,
    /// Of the response that is answered.
    pub(super) nonce: String,
    /// Why that was not taken.
    pub(super) error: Option<String>,
}

impl Asked {
    pub(super) fn check_type(&self) -> Result<(), Status> {
        match self.type_url.as_str() {
            // The service has one type, so it need not be named.
            "" | resource::TYPE_URL => Ok(()),
            other => Err(Status::invalid_argument(format!(
                "there are no resources of the type {} here, only of {}",
                quoted(other),
                resource::TYPE_URL
            ))),
        }
    }
}

pub(super) enum Names {
    /// These and no other.
    Whole(Vec<String>),
    /// Some more, and some less.
    Changed { subscribe: Vec<String>, unsubscribe: Vec<String> },
}

/// What a proxy says that it holds from before.
#[derive(Clone, Debug)]
pub(super) enum Holds {
    /// Of all that it names.
    Version(String),
    /// Of each.
    Versions(BTreeMap<String, String>),
}

/// What there is to tell.
pub(super) struct News<'a> {
    /// All that there is for the names.
    pub(super) all: &'a [(String, Arc<Made>)],
    /// What of it differs from what was told.
    pub(super) changed: &'a [(String, Arc<Made>)],
    /// Names of which there is nothing, or nothing any more.
    pub(super) removed: &'a [String],
}

/// What is wanted: names, and what they stand for; those that stand for nothing here.
#[derive(Default)]
pub(super) struct Wanted {
    names: BTreeMap<String, Option<Name>>,
    /// Whoever names nothing gets what every proxy needs.
    everything: bool,
}

impl Wanted {
    const WILDCARD: &'static str = "*";

    pub(super) fn of(names: Vec<String>) -> Result<Self, Status> {
        let mut wanted = Self::default();
        match names.is_empty() {
            true => wanted.everything = true,
            false => wanted.add(names)?,
        }
        Ok(wanted)
    }

    fn add(&mut self, names: Vec<String>) -> Result<(), Status> {
        for name in names {
            if name == Self::WILDCARD {
                self.everything = true;
                continue;
            }
            if name.len() > MAX_NAME {
                return Err(Status::invalid_argument(format!(
                    "a name of {} bytes is longer than {MAX_NAME}",
                    name.len()
                )));
            }
            let meaning = Name::parse(&name).ok();
            self.names.insert(name, meaning);
            if self.names.len() > MAX_NAMES {
                return Err(Status::resource_exhausted(format!("one stream may name {MAX_NAMES} resources")));
            }
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) {
        match name {
            Self::WILDCARD => self.everything = false,
            _ => drop(self.names.remove(name)),
        }
    }

    fn iter(&self) -> impl Iterator<Item = (&str, Option<&Name>)> {
        let named = self.names.iter().map(|(name, meaning)| (name.as_str(), meaning.as_ref()));
        let implied = [(Name::DEFAULT, &Name::Default), (Name::ROOTS, &Name::Roots)];
        let implied =
            implied.into_iter().filter(|(name, _)| self.everything && !self.names.contains_key(*name));
        named.chain(implied.map(|(name, meaning)| (name, Some(meaning))))
    }

    fn contains(&self, name: &str) -> bool {
        self.iter().any(|(known, _)| known == name)
    }
}

/// What there is for what is wanted.
#[derive(Default)]
pub(super) struct Found {
    pub(super) ready: Vec<(String, Arc<Made>)>,
    pub(super) waiting: Vec<String>,
    absent: Vec<String>,
    /// With the reason, as metrics have it.
    refused: Vec<(String, &'static str)>,
}

impl Found {
    pub(super) fn look(caller: &mut Caller, wanted: &Wanted) -> Self {
        caller.follow(wanted.iter().filter_map(|(_, meaning)| meaning));
        let mut found = Self::default();
        for (text, meaning) in wanted.iter() {
            let text = text.to_owned();
            match meaning.map(|name| caller.has(&text, name)) {
                Some(There::Ready(made)) => found.ready.push((text, made)),
                Some(There::Waiting) => found.waiting.push(text),
                Some(There::Absent) => found.absent.push(text),
                Some(There::Forbidden) => found.refused.push((text, FORBIDDEN)),
                None => found.refused.push((text, UNKNOWN)),
            }
        }
        found
    }

    /// The refusal, if it is all that there is and ever will be.
    pub(super) fn nothing_but_refused(&self) -> Option<Status> {
        let all = self.ready.is_empty() && self.waiting.is_empty() && self.absent.is_empty();
        let forbidden = self.refused.iter().find(|(_, reason)| *reason == FORBIDDEN);
        match (all, forbidden, self.refused.first()) {
            (true, Some((name, _)), _) => Some(Status::permission_denied(format!(
                "{} is no identity of this workload; ask for \"default\", or for one of its own",
                quoted(name)
            ))),
            (true, None, Some((name, _))) => Some(Status::invalid_argument(format!(
                "there is no resource {}; ask for \"default\", \"ROOTCA\", \"ALL\", a SPIFFE ID or that of a trust domain",
                quoted(name)
            ))),
            _ => None,
        }
    }

    /// Counts and logs what was refused and had not been before.
    pub(super) fn complain(&self, caller: &Caller, shared: &Shared, known: &mut BTreeSet<String>) {
        for (name, reason) in &self.refused {
            if !known.insert(name.clone()) {
                continue;
            }
            shared.metrics.refused(reason);
            if known.len() <= LOGGED {
                let caller = caller.id().map_or("", |id| id.as_str());
                tracing::warn!(caller, name = quoted(name), reason, "name refused over SDS");
            }
        }
    }
}

const FORBIDDEN: &str = "forbidden";
const UNKNOWN: &str = "unknown";

/// What was sent last.
struct Sent {
    nonce: String,
    resources: Vec<(String, Arc<Made>)>,
    at: Instant,
    answered: bool,
    /// Until it is answered.
    spans: Vec<Span>,
}

pub(super) struct Conversation<P: Protocol> {
    shared: Arc<Shared>,
    caller: Caller,
    consumer: Option<Consumer>,
    requests: Streaming<P::Request>,
    /// The proxy will ask nothing more.
    closed: bool,
    wanted: Wanted,
    /// It has asked for something, and by name.
    asked: bool,
    named: bool,
    /// What it holds from before this stream, until that was compared.
    holds: Option<Holds>,
    /// The version that each name was told with; none if it was told that there is nothing. What a proxy rejects stays
    /// here as well, so that it is not told the same again.
    told: BTreeMap<String, Option<String>>,
    /// What is being obtained, since when, if that is traced.
    awaited: BTreeMap<String, Instant>,
    sent: Option<Sent>,
    nonce: u64,
    complained: BTreeSet<String>,
    _open: Open,
}

impl<P: Protocol> Conversation<P> {
    pub(super) fn new(shared: Arc<Shared>, caller: Caller, requests: Streaming<P::Request>) -> Self {
        Self {
            consumer: None,
            _open: shared.metrics.stream(P::METHOD),
            shared,
            caller,
            requests,
            closed: false,
            wanted: Wanted::default(),
            asked: false,
            named: false,
            holds: None,
            told: BTreeMap::new(),
            awaited: BTreeMap::new(),
            sent: None,
            nonce: 0,
            complained: BTreeSet::new(),
        }
    }

    /// What is sent next; none when the stream is over.
    async fn next(&mut self) -> Option<Result<P::Response, Status>> {
        loop {
            let waiting = match self.push().await {
                Ok(Turn::Say(response)) => return Some(Ok(response)),
                Ok(Turn::Wait { more }) => more,
                Err(status) => return Some(Err(status)),
            };
            if self.closed && !waiting {
                return None;
            }
            let unanswered = self.sent.as_ref().filter(|sent| !sent.answered).map(|sent| sent.at + ANSWER);
            tokio::select! {
                request = self.requests.message(), if !self.closed => match request {
                    Ok(Some(request)) => {
                        if let Err(status) = self.take(P::asked(request)) {
                            return Some(Err(status));
                        }
                    }
                    Ok(None) => self.closed = true,
                    // The proxy is gone, or said what cannot be read.
                    Err(status) => return Some(Err(status)),
                },
                changed = self.caller.changed() => if let Err(status) = changed {
                    return Some(Err(status));
                },
                () = sleep_until(unanswered.unwrap_or_else(Instant::now)), if unanswered.is_some() => {
                    self.sent.as_mut().into_iter().for_each(|sent| sent.answered = true);
                }
            }
        }
    }

    fn take(&mut self, asked: Asked) -> Result<(), Status> {
        asked.check_type()?;
        let first = !std::mem::replace(&mut self.asked, true);
        let answers = self.sent.as_mut().filter(|sent| sent.nonce == asked.nonce);
        let stale = !asked.nonce.is_empty() && answers.is_none();
        if let Some(sent) = answers.filter(|sent| !sent.answered) {
            sent.answered = true;
            let (resources, spans) = (sent.resources.clone(), std::mem::take(&mut sent.spans));
            self.answered(&resources, asked.error.as_deref());
            ended(spans, asked.error.is_some());
        }
        match asked.names {
            // It was sent before the last response was read, and will be said again in answer to that.
            Names::Whole(_) if stale && self.sent.is_some() => return Ok(()),
            Names::Whole(names) => {
                self.named |= !names.is_empty();
                let wanted = match names.is_empty() && self.named {
                    true => Wanted::default(),
                    false => Wanted::of(names)?,
                };
                self.told.retain(|name, _| wanted.contains(name));
                self.awaited.retain(|name, _| wanted.contains(name));
                self.wanted = wanted;
            }
            Names::Changed { subscribe, unsubscribe } => {
                if first && subscribe.is_empty() && unsubscribe.is_empty() {
                    self.wanted.everything = true;
                }
                unsubscribe.iter().for_each(|name| self.wanted.remove(name));
                // Whoever subscribes again may have thrown away what there was.
                subscribe.iter().for_each(|name| drop(self.told.remove(name)));
                self.wanted.add(subscribe)?;
                let wanted = &self.wanted;
                self.told.retain(|name, _| wanted.contains(name));
                self.awaited.retain(|name, _| wanted.contains(name));
            }
        }
        if first {
            self.holds = Some(asked.holds);
        }
        Ok(())
    }

    fn answered(&self, resources: &[(String, Arc<Made>)], error: Option<&str>) {
        let caller = self.caller.id().map_or("", |id| id.as_str());
        for (name, made) in resources {
            let (name, version) = (quoted(name), &made.version);
            match error {
                Some(error) => {
                    self.shared.metrics.rejected(made.kind);
                    let error = shortened(error);
                    tracing::warn!(caller, name, version, error, "proxy rejected what it was sent over SDS");
                }
                None => {
                    self.shared.metrics.acknowledged(made.kind);
                    self.acknowledged(made);
                    tracing::debug!(caller, name, version, "proxy took what it was sent over SDS");
                }
            }
        }
    }

    /// By its own word, the proxy holds this.
    fn acknowledged(&self, made: &Made) {
        let Some(consumer) = &self.consumer else { return };
        for (domain, bundle) in &made.holds {
            consumer.acknowledged(domain, *bundle);
            let caller = self.caller.id().map_or("", |id| id.as_str());
            tracing::info!(caller, %domain, bundle = hex(bundle), "bundle acknowledged over SDS");
        }
    }

    async fn push(&mut self) -> Result<Turn<P::Response>, Status> {
        if self.closed
            && let Some(sent) = &mut self.sent
        {
            // Nobody will answer any more.
            sent.answered = true;
        }
        if self.sent.as_ref().is_some_and(|sent| !sent.answered) {
            return Ok(Turn::Wait { more: true });
        }
        if self.consumer.is_none() {
            self.consumer = self.caller.join();
        }
        let mut found = Found::look(&mut self.caller, &self.wanted);
        let mut changed = self.changed(&found);
        if changed.iter().any(|(_, made)| made.is_certificate()) && !self.caller.is_fresh() {
            self.caller.attest().await?;
            found = Found::look(&mut self.caller, &self.wanted);
            changed = self.changed(&found);
        }
        self.waits_for(&found);
        found.complain(&self.caller, &self.shared, &mut self.complained);
        if let Some(status) = found.nothing_but_refused() {
            return Err(status);
        }
        let gone = found.absent.iter().chain(found.refused.iter().map(|(name, _)| name));
        let removed: Vec<String> = gone.filter(|name| self.told.get(*name) != Some(&None)).cloned().collect();
        let more = !found.waiting.is_empty();
        if changed.is_empty() && removed.is_empty() {
            return Ok(Turn::Wait { more });
        }
        let spans = self.spans(&changed);
        for (name, made) in &changed {
            self.told.insert(name.clone(), Some(made.version.clone()));
        }
        self.told.extend(removed.iter().map(|name| (name.clone(), None)));
        let nonce = (self.nonce + 1).to_string();
        let news = News { all: &found.ready, changed: &changed, removed: &removed };
        let Some(response) = P::response(news, nonce.clone()) else { return Ok(Turn::Wait { more }) };
        self.nonce += 1;
        for (_, made) in &changed {
            self.shared.metrics.sent(made.kind);
            for (domain, bundle) in &made.holds {
                self.consumer.iter().for_each(|consumer| consumer.given(domain, *bundle));
            }
        }
        self.sent = Some(Sent { nonce, resources: changed, at: Instant::now(), answered: false, spans });
        Ok(Turn::Say(response))
    }

    fn waits_for(&mut self, found: &Found) {
        if self.caller.agent().tracer.is_on() {
            for name in &found.waiting {
                self.awaited.entry(name.clone()).or_insert_with(Instant::now);
            }
        }
    }

    /// From when the proxy wanted each certificate, or there was another one, until it answers.
    fn spans(&mut self, changed: &[(String, Arc<Made>)]) -> Vec<Span> {
        let agent = self.caller.agent().clone();
        if !agent.tracer.is_on() {
            return Vec::new();
        }
        let certificates = changed.iter().filter_map(|(name, made)| Some((name, made.svid()?)));
        let span = |(name, svid): (&String, &Arc<Svid>)| {
            let since = self.awaited.remove(name);
            let had_another = self.told.get(name).is_some_and(Option::is_some);
            let mut span = agent.delivery(svid, since.is_some() || had_another);
            span.is_answer(SERVICE, P::METHOD);
            span.set("mica.resource", quoted(name));
            span.since(since.unwrap_or_else(Instant::now));
            span
        };
        certificates.map(span).collect()
    }

    /// What differs from what the proxy was told, on this stream or on one before.
    fn changed(&mut self, found: &Found) -> Vec<(String, Arc<Made>)> {
        let held = |holds: &Holds, name: &String, made: &Made| match holds {
            Holds::Version(version) => *version == resource::version(&found.ready),
            Holds::Versions(versions) => versions.get(name) == Some(&made.version),
        };
        if let Some(holds) = self.holds.clone() {
            for (name, made) in &found.ready {
                if !self.told.contains_key(name) && held(&holds, name, made) {
                    self.told.insert(name.clone(), Some(made.version.clone()));
                    self.acknowledged(made);
                }
            }
            if found.waiting.is_empty() {
                self.holds = None;
            }
        }
        let differs = |(name, made): &&(String, Arc<Made>)| {
            self.told.get(name).is_none_or(|told| told.as_ref() != Some(&made.version))
        };
        found.ready.iter().filter(differs).cloned().collect()
    }
}

enum Turn<T> {
    Say(T),
    /// Nothing to say now; whether there will be more without another request.
    Wait {
        more: bool,
    },
}

/// The proxy has answered, and taken it or not.
fn ended(spans: Vec<Span>, was_rejected: bool) {
    for mut span in spans {
        match was_rejected {
            true => span.fail("rejected"),
            false => span.set("mica.answer", "acknowledged"),
        }
    }
}

/// The responses of a conversation, each made when it is asked for.
pub(super) struct Responses<P: Protocol> {
    turn: Option<Pin<Box<dyn Future<Output = Said<P>> + Send>>>,
}

type Said<P> = (Conversation<P>, Option<Result<<P as Protocol>::Response, Status>>);

impl<P: Protocol> Responses<P> {
    pub(super) fn of(conversation: Conversation<P>) -> Self {
        Self { turn: Some(Self::turn(conversation)) }
    }

    fn turn(mut conversation: Conversation<P>) -> Pin<Box<dyn Future<Output = Said<P>> + Send>> {
        Box::pin(async move {
            let said = conversation.next().await;
            (conversation, said)
        })
    }
}

impl<P: Protocol> Stream for Responses<P> {
    type Item = Result<P::Response, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(turn) = &mut self.turn else { return Poll::Ready(None) };
        let (conversation, said) = ready!(turn.as_mut().poll(context));
        self.turn = match said {
            Some(Ok(_)) => Some(Self::turn(conversation)),
            Some(Err(_)) | None => None,
        };
        Poll::Ready(said)
    }
}

/// What a proxy says, for a line of the log or of a status.
fn quoted(text: &str) -> String {
    format!("\"{}\"", shortened(text))
}

fn shortened(text: &str) -> String {
    let line = one_line(&text[..text.floor_char_boundary(LONGEST)]);
    if text.len() > LONGEST { format!("{line}…") } else { line }
}
