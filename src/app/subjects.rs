//! Whose certificates: those of the accounts in a folder, which are delivered, or of the accounts in a cluster, which ask.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::serve::{Error, stopping, until, usage};
use super::{report, tokens};
use crate::auth::token::Tokens;
use crate::auth::{Accounts, Liveness, Nodes};
use crate::authority::Authority;
use crate::cluster::{Cluster, Election, Events, Objects};
use crate::config::serve::Args;
use crate::reconcile::{self, Event, Reconciler, Report};
use crate::sink::Sink as _;
use crate::sink::folder::FolderSink;
use crate::source::Source as _;
use crate::source::folder::FolderSource;
use crate::sys;
use crate::sys::dir::{Access, Dir};

/// Events that wait while the loop works.
const EVENTS: usize = 64;

/// Whose certificates.
pub(super) enum Subjects {
    /// The accounts of a folder of manifests.
    Folder { source: Box<FolderSource>, secrets: PathBuf },
    /// The accounts of a cluster.
    Cluster(Cluster),
}

/// Subjects that are being followed.
pub(super) struct Followed {
    /// Which of them live.
    pub(super) liveness: Arc<dyn Liveness>,
    /// And which of them run where, if that can be known.
    pub(super) nodes: Option<Arc<dyn Nodes>>,
    /// Told when all of them have been seen once.
    pub(super) first: oneshot::Receiver<First>,
    /// To be told when that has been reported.
    pub(super) reported: oneshot::Sender<()>,
    /// To be told of a new issuer.
    pub(super) events: mpsc::Sender<Event>,
}

/// How the first look went.
pub(super) enum First {
    /// Certificates were delivered into this folder.
    Delivered(PathBuf, Report),
    /// The accounts of the API server at this address are known.
    Known(String),
}

impl Subjects {
    /// The cluster that they are in.
    pub(super) fn cluster(&self) -> Option<&Cluster> {
        match self {
            Self::Folder { .. } => None,
            Self::Cluster(cluster) => Some(cluster),
        }
    }

    /// Starts what follows them.
    #[expect(clippy::too_many_arguments, reason = "called once, by what has them all")]
    pub(super) fn follow(
        self,
        args: &Args,
        data: &Dir,
        tokens: &Arc<Tokens>,
        authority: &Arc<Authority>,
        registry: &mut Registry,
        stopped: &watch::Receiver<bool>,
        tasks: &mut JoinSet<Result<(), Error>>,
    ) -> Result<Followed, Error> {
        match self {
            Self::Folder { source, secrets } => {
                follow_folder(args, *source, secrets, data, authority, registry, stopped, tasks)
            }
            Self::Cluster(cluster) => Ok(follow_cluster(args, cluster, tokens, registry, stopped, tasks)),
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "called once, from above")]
fn follow_folder(
    args: &Args,
    mut source: FolderSource,
    secrets: PathBuf,
    data: &Dir,
    authority: &Arc<Authority>,
    registry: &mut Registry,
    stopped: &watch::Receiver<bool>,
    tasks: &mut JoinSet<Result<(), Error>>,
) -> Result<Followed, Error> {
    let access = Access { mode: args.secrets_mode, owner: args.secrets_owner, group: args.secrets_group };
    let sink = Arc::new(FolderSink::open(data, &secrets, access).map_err(usage)?);
    let metrics = reconcile::Metrics::default();
    metrics.register(registry);
    registry.register_collector(Box::new(SourceFaults(source.faults())));

    let options = reconcile::Options { lifetime: args.ttl, key_kind: args.key_kind.into() };
    let (door, place) = (authority.clone(), sink.clone());
    let reconciler = Reconciler::new(door, place, options, metrics, stopped.clone(), report::progress());
    let (events, inbox) = mpsc::channel(EVENTS);
    let (passed, first_pass) = oneshot::channel();
    // Writing folders blocks, so the loop has a thread of its own.
    let handle = tokio::runtime::Handle::current();
    tasks.spawn_blocking(move || {
        handle.block_on(reconciler.run(inbox, passed));
        Ok(())
    });
    let liveness = Arc::new(Accounts::default());
    let (accounts, source_events) = (liveness.clone(), events.clone());
    tasks.spawn(until(stopping(stopped), async move {
        loop {
            let change = source.next().await;
            accounts.take(&change.added, &change.removed, change.settled);
            if source_events.send(Event::Source(change)).await.is_err() {
                return;
            }
        }
    }));
    // What the first pass writes needs no second look, and whoever waits for it should not wait for watches too.
    let (told, first) = oneshot::channel();
    let (reported, is_reported) = oneshot::channel();
    let sink_events = events.clone();
    tasks.spawn(until(stopping(stopped), async move {
        let Ok(report) = first_pass.await else { return };
        let _ = told.send(First::Delivered(secrets, report));
        let _ = is_reported.await;
        while sink_events.send(Event::Disturbed(sink.disturbed().await)).await.is_ok() {}
    }));
    Ok(Followed { liveness, nodes: None, first, reported, events })
}

fn follow_cluster(
    args: &Args,
    cluster: Cluster,
    tokens: &Arc<Tokens>,
    registry: &mut Registry,
    stopped: &watch::Receiver<bool>,
    tasks: &mut JoinSet<Result<(), Error>>,
) -> Followed {
    // Whoever has istio-ca's rights may neither follow pods nor post Events nor hold a Lease.
    let is_istio_ca = args.istio_ca.is_some();
    let objects = Objects::new(&cluster);
    let objects = Arc::new(if is_istio_ca { objects.without_pods() } else { objects });
    objects.register(registry);
    if !is_istio_ca {
        let election = Election::new(&cluster);
        election.register(registry);
        let stop = stopping(stopped);
        tasks.spawn(async move {
            election.run(stop).await;
            Ok(())
        });
    }
    let tellings = Arc::new(Events::new(&cluster, &sys::host_name()));
    tellings.register(registry);
    if !is_istio_ca {
        tasks.spawn(until(stopping(stopped), async move { tellings.post().await }));
    }
    let (events, mut inbox) = mpsc::channel(EVENTS);
    // Nobody has anything delivered that a new issuer would have to replace.
    tasks.spawn(until(stopping(stopped), async move { while inbox.recv().await.is_some() {} }));
    let followed = objects.clone();
    tasks.spawn(until(stopping(stopped), async move { followed.follow().await }));
    let (told, first) = oneshot::channel();
    let (reported, is_reported) = oneshot::channel();
    let (place, known, settled) = (cluster.place().to_owned(), objects.clone(), tokens.clone());
    tasks.spawn(until(stopping(stopped), async move {
        tokio::join!(known.completed(), settled.settled());
        let _ = told.send(First::Known(place));
        let _ = is_reported.await;
        std::future::pending().await
    }));
    let (stop, args, tokens) = (stopping(stopped), args.clone(), tokens.clone());
    tasks.spawn(async move {
        tokio::select! {
            () = stop => Ok(()),
            ended = tokens::follow(&args, cluster, &tokens) => ended,
        }
    });
    Followed { liveness: objects.clone(), nodes: Some(objects), first, reported, events }
}

/// How many documents, files and folders of the source cannot be read at the moment.
#[derive(Debug)]
struct SourceFaults(Arc<AtomicUsize>);

impl Collector for SourceFaults {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let gauge = ConstGauge::new(self.0.load(Ordering::Relaxed) as u64);
        let help = "Documents, files and folders of the source that cannot be read or are refused";
        gauge.encode(encoder.encode_descriptor("mica_source_faults", help, None, gauge.metric_type())?)
    }
}
