//! Whose certificates: those of the accounts in a folder, which are delivered, or of the accounts in a cluster, which ask.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::serve::{Error, stopping, until, usage};
use super::{report, tokens};
use crate::auth::token::Tokens;
use crate::auth::{Accounts, Liveness, LivingPolicy, Nodes};
use crate::authority::{Authority, Keeper};
use crate::cluster::{
    AccountSource, Cluster, ClusterKeyring, Election, EventReason, Events, FederatedBundles, Foreign,
    Leadership, Namespaces, Objects, Roots, RootsOptions, Secrets, Severity, Told, Wanted, WebhookTrust,
};
use crate::config::serve::{Args, MadeKind};
use crate::core::key::KeyKind;
use crate::core::published::Published;
use crate::core::selection::Rules;
use crate::core::spiffe::TrustDomain;
use crate::reconcile::{self, Event, Judge, News, Reconciler, Report};
use crate::sink::Sink as _;
use crate::sink::folder::FolderSink;
use crate::source::Source as _;
use crate::source::folder::FolderSource;
use crate::sys::dir::{Access, Dir};

/// Events that wait while the loop works.
const EVENTS: usize = 64;
/// Where nobody else writes, this replica does after much less.
const ELECTED: Duration = Duration::from_secs(1);

/// Whose certificates.
pub(super) enum Subjects {
    /// The accounts of a folder of manifests.
    Folder { source: Box<FolderSource>, secrets: PathBuf },
    /// The accounts of a cluster.
    Cluster { cluster: Cluster, tellings: Arc<Events> },
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
    /// The accounts of the API server at this address are known, and have their secrets if this replica writes them.
    Known(String, Option<Report>),
}

impl Subjects {
    /// The cluster that they are in.
    pub(super) fn cluster(&self) -> Option<&Cluster> {
        match self {
            Self::Folder { .. } => None,
            Self::Cluster { cluster, .. } => Some(cluster),
        }
    }

    /// Starts what follows them.
    #[expect(clippy::too_many_arguments, reason = "called once, by what has them all")]
    pub(super) fn follow(
        self,
        args: &Args,
        data: &Dir,
        policy: &Arc<LivingPolicy>,
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
            Self::Cluster { cluster, tellings } => Ok(follow_cluster(
                args, cluster, tellings, policy, tokens, authority, registry, stopped, tasks,
            )),
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

    let options = reconcile::Options::fixed(args.ttl, args.key_kind.into());
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

#[expect(clippy::too_many_arguments, reason = "called once, from above")]
fn follow_cluster(
    args: &Args,
    cluster: Cluster,
    tellings: Arc<Events>,
    policy: &Arc<LivingPolicy>,
    tokens: &Arc<Tokens>,
    authority: &Arc<Authority>,
    registry: &mut Registry,
    stopped: &watch::Receiver<bool>,
    tasks: &mut JoinSet<Result<(), Error>>,
) -> Followed {
    // Whoever has istio-ca's rights may neither follow pods nor post Events nor hold a Lease.
    let is_istio_ca = args.istio_ca.is_some();
    let objects = Objects::new(&cluster);
    let objects = Arc::new(if is_istio_ca { objects.without_pods() } else { objects });
    objects.register(registry);
    let mut leadership = if is_istio_ca {
        Leadership::always()
    } else {
        let election = Election::new(&cluster, tellings.clone());
        election.register(registry);
        let leadership = election.leadership();
        let stop = stopping(stopped);
        tasks.spawn(async move {
            election.run(stop).await;
            Ok(())
        });
        leadership
    };
    tellings.register(registry);
    let delivered = tellings.clone();
    let own = cluster.namespace().to_owned();
    let watched = Some(&args.watch_namespaces).filter(|names| !names.is_empty());
    let rules = Rules {
        watched: watched.map(|names| names.iter().cloned().collect()),
        by_default: args.namespaces_by_default,
        own: own.clone(),
    };
    let namespaces = Namespaces::new(&cluster, rules);
    let namespaces = Arc::new(if is_istio_ca { namespaces.without_labels() } else { namespaces });
    namespaces.register(registry);
    if !is_istio_ca {
        let posted = tellings.clone();
        tasks.spawn(until(stopping(stopped), async move { posted.post().await }));
        let chosen = namespaces.clone();
        tasks.spawn(until(stopping(stopped), async move { chosen.follow().await }));
        if let Some(name) = args.federated_config_map() {
            let door = authority.clone();
            let current = Box::new(move || {
                let bundles = door.bundles().borrow().clone();
                let written = |(domain, bundle): (&TrustDomain, &Arc<Published>)| {
                    Some((domain.to_string(), bundle.to_json().ok()?))
                };
                Foreign {
                    known: bundles.federated.iter().filter_map(written).collect(),
                    awaited: bundles.awaited.iter().map(ToString::to_string).collect(),
                }
            });
            let bundles = FederatedBundles::new(
                &cluster,
                name.to_owned(),
                current,
                namespaces.clone(),
                leadership.clone(),
            );
            bundles.register(registry);
            tasks.spawn(until(stopping(stopped), async move { bundles.run().await }));
        }
        let options = RootsOptions {
            config_map: args.root_config_map().map(str::to_owned),
            trust_bundle: args.cluster_trust_bundle.then(|| args.trust_domain.clone()),
            own,
        };
        let keeper = Keeper::new(authority.clone(), ClusterKeyring::new(&cluster, leadership.clone()));
        tasks.spawn(until(stopping(stopped), keeper.keep()));
        if let Some(webhook) = args.inject_webhook() {
            let door = authority.clone();
            let current = Box::new(move || door.issuer().bundle().clone());
            let trust = Arc::new(WebhookTrust::new(&cluster, webhook, current, leadership.clone()));
            tasks.spawn(until(stopping(stopped), async move { trust.run().await }));
        }
        let door = authority.clone();
        let current = Box::new(move || door.issuer().bundle().clone());
        let roots = Arc::new(Roots::new(
            &cluster,
            options,
            current,
            namespaces.clone(),
            leadership.clone(),
            tellings,
        ));
        roots.register(registry);
        tasks.spawn(until(stopping(stopped), async move { roots.run().await }));
    }
    let metrics = reconcile::Metrics::default();
    metrics.register(registry);
    let (events, inbox) = mpsc::channel(EVENTS);
    let followed = objects.clone();
    tasks.spawn(until(stopping(stopped), async move { followed.follow().await }));
    let (passed, first_pass) = oneshot::channel();
    let (chosen, known) = (namespaces.clone(), objects.clone());
    let wanted: Wanted = Arc::new(move |account| {
        chosen.choice(account.namespace()).is_some_and(|choice| choice.serves(known.deliver(account)))
    });
    let delivery = Delivery {
        cluster: cluster.clone(),
        objects: objects.clone(),
        wanted,
        namespaces: namespaces.clone(),
        leadership: leadership.clone(),
        authority: authority.clone(),
        policy: policy.clone(),
        options: delivery_options(args, policy.clone(), objects.clone(), delivered),
        metrics,
        stopped: stopped.clone(),
    };
    tasks.spawn(until(stopping(stopped), delivery.run(inbox, passed)));
    let (told, first) = oneshot::channel();
    let (reported, is_reported) = oneshot::channel();
    let (place, known, settled) = (cluster.place().to_owned(), objects.clone(), tokens.clone());
    tasks.spawn(until(stopping(stopped), async move {
        tokio::join!(known.completed(), settled.settled());
        // A replica that does not write need not wait for the one that does.
        let report = match tokio::time::timeout(ELECTED, leadership.gained()).await {
            Ok(()) => tokio::select! {
                report = first_pass => report.ok(),
                () = leadership.lost() => None,
            },
            Err(_) => None,
        };
        drop(leadership);
        let _ = told.send(First::Known(place, report));
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

/// Policy says what is delivered, within which accounts have wishes; and Events tell.
fn delivery_options(
    args: &Args,
    policy: Arc<LivingPolicy>,
    objects: Arc<Objects>,
    events: Arc<Events>,
) -> reconcile::Options {
    let default: KeyKind = args.key_kind.into();
    let mut made = vec![default];
    let others = <MadeKind as clap::ValueEnum>::value_variants().iter().map(|kind| KeyKind::from(*kind));
    made.extend(others.filter(|kind| *kind != default));
    let known = objects.clone();
    reconcile::Options {
        terms: Arc::new(move |account| policy.current().deliver(account, &known.wishes(account), &made)),
        tell: Arc::new(move |account, news| {
            let (severity, reason, note) = match news {
                News::Taken(why) => (Severity::Warning, EventReason::SecretNameTaken, why),
                News::Repaired(fault) => (Severity::Warning, EventReason::SecretRepaired, fault),
                News::Refused(why) => (Severity::Warning, EventReason::AnnotationRefused, why),
                News::NotServed(fault) => (Severity::Warning, EventReason::NotServed, fault),
            };
            events.tell(&objects.reference(account), severity, reason, note.to_owned());
        }),
    }
}

/// Keeps the secrets of a cluster's accounts, while this replica may write.
struct Delivery {
    cluster: Cluster,
    objects: Arc<Objects>,
    wanted: Wanted,
    namespaces: Arc<Namespaces>,
    leadership: Leadership,
    authority: Arc<Authority>,
    policy: Arc<LivingPolicy>,
    options: reconcile::Options,
    metrics: reconcile::Metrics,
    stopped: watch::Receiver<bool>,
}

impl Delivery {
    /// Term by term. `first` hears of the first pass of the first one.
    async fn run(self, mut inbox: mpsc::Receiver<Event>, first: oneshot::Sender<Report>) {
        let mut leadership = self.leadership.clone();
        let mut first = Some(first);
        loop {
            // What is to be told to somebody who does not write is told to nobody.
            tokio::select! {
                () = leadership.gained() => {}
                event = inbox.recv() => match event {
                    Some(_) => continue,
                    None => return,
                },
            }
            tokio::select! {
                () = self.term(&mut inbox, &mut first) => {}
                () = leadership.lost() => {}
            }
        }
    }

    /// Begins with nothing known, and ends when it is dropped.
    async fn term(&self, inbox: &mut mpsc::Receiver<Event>, first: &mut Option<oneshot::Sender<Report>>) {
        let Self { objects, wanted, authority, namespaces, .. } = self;
        // Nobody is given up for not being known yet, and what is known from the beginning is no news.
        namespaces.completed().await;
        let flips = namespaces.flips();
        let mut source = AccountSource::new(objects.clone(), wanted.clone());
        let secrets = Arc::new(Secrets::new(
            &self.cluster,
            objects.clone(),
            wanted.clone(),
            self.leadership.clone(),
            self.cluster.namespace(),
        ));
        let judge = Judge::new(authority.clone(), self.options.terms.clone());
        let (events, told) = mpsc::channel(EVENTS);
        let (passed, first_pass) = oneshot::channel();
        let (metrics, stopped) = (self.metrics.clone(), self.stopped.clone());
        let reconciler = Reconciler::new(
            authority.clone(),
            secrets.clone(),
            self.options.clone(),
            metrics,
            stopped,
            report::progress(),
        );
        let follow = async {
            let change = source.next().await;
            if events.send(Event::Source(change)).await.is_err() {
                return;
            }
            let mut watch = secrets.watch();
            let mut granted = self.policy.changes();
            loop {
                let event = tokio::select! {
                    change = source.next() => Event::Source(change),
                    flipped = flips.next() => {
                        flipped.iter().for_each(|namespace| objects.tell_again(namespace));
                        continue;
                    }
                    // What was refused may be granted now.
                    Ok(()) = granted.changed() => Event::Disturbed(objects.wishing()),
                    Some(event) = inbox.recv() => event,
                    told = watch.next() => match told {
                        Told::Listing => Event::Listing,
                        Told::Found(account, found) => {
                            let observed = judge.observed(&account, found);
                            Event::Seen(account, observed)
                        }
                        Told::Listed => Event::Listed,
                        Told::Disturbed(accounts) => Event::Disturbed(accounts),
                    },
                };
                if events.send(event).await.is_err() {
                    return;
                }
            }
        };
        let pass = async {
            if let Ok(report) = first_pass.await
                && let Some(first) = first.take()
            {
                let _ = first.send(report);
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = reconciler.run(told, passed) => {}
            () = follow => {}
            () = pass => {}
        }
    }
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
