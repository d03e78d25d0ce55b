//! Watching objects of one kind, of each of which only a little is kept.

use std::fmt::Debug;
use std::pin::pin;

use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio_stream::StreamExt as _;

use super::metrics::Metrics;

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
    metrics: &Metrics,
    reduce: impl Fn(&K) -> T,
    tell: impl FnMut(Change<T>),
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let chosen = name.map(|name| format!("metadata.name={name}"));
    follow_where(api, chosen.as_deref(), metrics, reduce, tell).await;
}

/// Follows the objects of an API for ever: all of it, or those whose fields are as is said.
pub(super) async fn follow_where<K, T>(
    api: Api<K>,
    fields: Option<&str>,
    metrics: &Metrics,
    reduce: impl Fn(&K) -> T,
    mut tell: impl FnMut(Change<T>),
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let what = K::plural(&());
    metrics.watched(&what);
    let mut config = watcher::Config::default();
    if let Some(fields) = fields {
        config = config.fields(fields);
    }
    let mut events = pin!(watcher(api, config).default_backoff());
    let mut all = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => {
                all = Vec::new();
                tell(Change::Begun);
            }
            Ok(Event::InitApply(object)) => all.push(reduce(&object)),
            Ok(Event::InitDone) => {
                tracing::debug!(%what, count = all.len(), "all have been read from the API server");
                tell(Change::All(std::mem::take(&mut all)));
            }
            Ok(Event::Apply(object)) => tell(Change::There(reduce(&object))),
            Ok(Event::Delete(object)) => tell(Change::Gone(reduce(&object))),
            Err(fault) => {
                metrics.watch_failed(&what);
                let fault = super::said(&fault);
                tracing::warn!(%what, fault, "watching the API server failed; it is tried again, and what is known stays");
            }
        }
    }
}
