//! Watching objects of one kind, of each of which only a little is kept.

use std::fmt::Debug;
use std::pin::Pin;

use kube::runtime::WatchStreamExt as _;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt as _};

use super::metrics::Metrics;

/// Why it may not be so any more what the watches have told.
#[derive(Clone, Copy, Debug)]
pub(super) enum Doubt {
    /// What is newer has a smaller version.
    WentBack,
    /// It did not answer for a while, in which a backup may have been put in its place.
    WasAway,
}

/// What all watches of one API server share.
#[derive(Clone, Debug, Default)]
pub(super) struct Watches {
    pub(super) metrics: Metrics,
    again: watch::Sender<()>,
}

impl Watches {
    /// Has everything read again. A watch goes on from the version that it has come to, and an API server that was put
    /// back to a backup may not have it yet, or mean something else by it. What is known stays until it was read.
    pub(super) fn read_again(&self, why: Doubt) {
        match why {
            Doubt::WentBack => {
                tracing::warn!("the API server has gone back to an older backup; everything is read again");
            }
            Doubt::WasAway => tracing::warn!(
                "the API server was away, and may have come back as an older backup; everything is read again"
            ),
        }
        self.again.send_replace(());
    }

    /// Begins to watch. After a failure it is tried again by and by.
    pub(super) fn watch<K, B>(&self, api: Api<K>, config: watcher::Config, backoff: fn() -> B) -> Watch<K>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
        B: Backoff + 'static,
    {
        self.metrics.watched(&K::plural(&()));
        let begin =
            move || -> Events<K> { Box::pin(watcher(api.clone(), config.clone()).backoff(backoff())) };
        let events = begin();
        let (again, metrics) = (self.again.subscribe(), self.metrics.clone());
        Watch { begin: Box::new(begin), events, is_listing: true, again, metrics }
    }
}

type Events<K> = Pin<Box<dyn Stream<Item = watcher::Result<Event<K>>> + Send>>;

/// A watch, which has no end.
pub(super) struct Watch<K> {
    begin: Box<dyn Fn() -> Events<K> + Send + Sync>,
    events: Events<K>,
    /// A list that is under way is read to its end, since a slow server would otherwise never get there.
    is_listing: bool,
    again: watch::Receiver<()>,
    metrics: Metrics,
}

impl<K: Resource<DynamicType = ()>> Watch<K> {
    /// Waits for the next event. Cancel safe.
    pub(super) async fn next(&mut self) -> Event<K> {
        loop {
            let event = tokio::select! {
                Ok(()) = self.again.changed(), if !self.is_listing => {
                    self.events = (self.begin)();
                    self.is_listing = true;
                    continue;
                }
                event = self.events.next() => event,
            };
            match event {
                Some(Ok(event)) => {
                    match event {
                        Event::Init => self.is_listing = true,
                        Event::InitDone => self.is_listing = false,
                        _ => {}
                    }
                    return event;
                }
                Some(Err(fault)) => {
                    let what = K::plural(&());
                    self.metrics.watch_failed(&what);
                    let fault = super::said(&fault);
                    tracing::warn!(%what, fault, "watching the API server failed; it is tried again, and what is known stays");
                }
                None => std::future::pending().await,
            }
        }
    }
}

/// What a watch tells.
pub(super) enum Change<T> {
    /// All are about to be read.
    Begun,
    /// All there are.
    All(Vec<T>),
    /// One is there, or is another than before.
    There(T),
    /// One is gone.
    Gone(T),
}

/// Follows the objects of an API for ever: all of it, or the one of a name.
pub(super) async fn follow<K, T>(
    api: Api<K>,
    name: Option<&str>,
    watches: &Watches,
    reduce: impl Fn(&K) -> T,
    tell: impl FnMut(Change<T>),
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let chosen = name.map(|name| format!("metadata.name={name}"));
    follow_where(api, chosen.as_deref(), watches, reduce, tell).await;
}

/// Follows the objects of an API for ever: all of it, or those whose fields are as is said.
pub(super) async fn follow_where<K, T>(
    api: Api<K>,
    fields: Option<&str>,
    watches: &Watches,
    reduce: impl Fn(&K) -> T,
    mut tell: impl FnMut(Change<T>),
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut config = watcher::Config::default();
    if let Some(fields) = fields {
        config = config.fields(fields);
    }
    let mut watch = watches.watch(api, config, watcher::DefaultBackoff::default);
    let mut all = Vec::new();
    loop {
        match watch.next().await {
            Event::Init => {
                all = Vec::new();
                tell(Change::Begun);
            }
            Event::InitApply(object) => all.push(reduce(&object)),
            Event::InitDone => {
                tracing::debug!(what = %K::plural(&()), count = all.len(), "all have been read from the API server");
                tell(Change::All(std::mem::take(&mut all)));
            }
            Event::Apply(object) => tell(Change::There(reduce(&object))),
            Event::Delete(object) => tell(Change::Gone(reduce(&object))),
        }
    }
}
