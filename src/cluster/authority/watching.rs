//! Watches of single secrets, for the word that there was a change and nothing else.

use std::pin::Pin;
use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::api::{PartialObjectMeta, WatchEvent, WatchParams};
use kube::{Api, Client};
use tokio::time::{Instant, sleep_until};
use tokio_stream::{Stream, StreamExt as _};

use crate::cluster::call::jittered;
use crate::cluster::{PATIENCE, said};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

type Events = Pin<Box<dyn Stream<Item = kube::Result<WatchEvent<PartialObjectMeta<Secret>>>> + Send>>;

/// Both.
pub(super) struct Watching([Watch; 2]);

impl Watching {
    pub(super) fn new(client: &Client, namespace: &str, names: [&'static str; 2]) -> Self {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
        Self(names.map(|name| Watch::new(secrets.clone(), name)))
    }

    /// Waits until one of them may have changed. May be dropped and called again.
    pub(super) async fn next(&mut self) {
        let [one, other] = &mut self.0;
        tokio::select! {
            () = one.next() => {}
            () = other.next() => {}
        }
    }
}

struct Watch {
    secrets: Api<Secret>,
    name: &'static str,
    events: Option<Events>,
    next_try: Instant,
    pause: Duration,
}

impl Watch {
    fn new(secrets: Api<Secret>, name: &'static str) -> Self {
        Self { secrets, name, events: None, next_try: Instant::now(), pause: FIRST_PAUSE }
    }

    async fn next(&mut self) {
        loop {
            let Some(events) = &mut self.events else {
                sleep_until(self.next_try).await;
                match begin(&self.secrets, self.name).await {
                    // What happened since the one before is not told by this one, if it was a removal.
                    Ok(events) => {
                        self.events = Some(events);
                        return;
                    }
                    Err(fault) => self.failed(&fault),
                }
                continue;
            };
            match events.next().await {
                Some(Ok(WatchEvent::Bookmark(_))) => {}
                Some(Ok(WatchEvent::Error(status))) => self.failed(&status.message),
                Some(Ok(_)) => {
                    self.pause = FIRST_PAUSE;
                    return;
                }
                Some(Err(fault)) => self.failed(&said(&fault)),
                // The API server ends each after some minutes.
                None => {
                    self.events = None;
                    self.next_try = Instant::now() + jittered(FIRST_PAUSE);
                }
            }
        }
    }

    fn failed(&mut self, fault: &str) {
        tracing::warn!(secret = self.name, fault, "the authority's secret cannot be watched; trying again");
        self.events = None;
        self.next_try = Instant::now() + jittered(self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

/// From what is there now on, so that nothing is missed between two watches.
async fn begin(secrets: &Api<Secret>, name: &str) -> Result<Events, String> {
    let params = WatchParams::default().fields(&format!("metadata.name={}", name));
    match tokio::time::timeout(PATIENCE, secrets.watch_metadata(&params, "0")).await {
        Ok(Ok(events)) => Ok(Box::pin(events)),
        Ok(Err(fault)) => Err(said(&fault)),
        Err(_) => Err(format!("no answer within {} seconds", PATIENCE.as_secs())),
    }
}
