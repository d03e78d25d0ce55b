//! `mica serve DIR` and `mica serve --kube`.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::addresses::Addresses;
use super::subjects::{Followed, Subjects};
use super::{report, tokens};
use crate::admin;
use crate::auth::token::Tokens;
use crate::auth::{CertificateAuthenticator, ForwardedAuthenticator, LivingPolicy, trial};
use crate::authority::{Authority, Keeper};
use crate::cluster::{self, AsIstioCa, Cluster, ClusterMemory, ClusterStore, Events};
use crate::config::cli::Output;
use crate::config::istio_ca::DIFFERENCES;
use crate::config::serve::{Args, Origin, ServingName};
use crate::core::inject::Rules;
use crate::core::issuer::{self, Issuer};
use crate::core::policy::{Limits, SHORTEST};
use crate::federation::{self, Endpoint, Fetched, Fetcher};
use crate::reconcile::Event;
use crate::serve::queue::{self, Queue};
use crate::serve::tls::{Names, ServingCertificate};
use crate::serve::webhook::{self, Injector};
use crate::serve::{self, Agents, Requests};
use crate::sink::folder::FolderSink;
use crate::source::folder::FolderSource;
use crate::store::{AuthorityStore, BroughtStore, FolderKeyring, OwnStore, Place};
use crate::sys::dir::Dir;
use crate::sys::{self, clock, files, listen};
use crate::{telemetry, trace};

/// Why Mica does not run, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was typed or brought cannot be used.
    #[error("{0}")]
    Usage(String),
    /// Mica, or the machine below it, is at fault.
    #[error("{0}")]
    Fault(String),
}

/// A brought issuer whose time has not come is tried this often.
const EARLY: Duration = Duration::from_secs(15);
/// In traces.
const SERVICE: &str = "mica";
/// Who holds the data folder.
const LOCK: &str = "lock";
/// The delivered folders, in the data folder unless they are elsewhere.
const SECRETS: &str = "secrets";
/// What is under way when a signal comes has this long to end.
pub(super) const GRACE: Duration = Duration::from_secs(10);
/// And calls of clients this long.
const HANG_UP: Duration = Duration::from_secs(2);

/// Runs until SIGTERM or SIGINT.
pub fn run(args: Args, output: Output) -> Result<(), Error> {
    if args.ttl < SHORTEST || args.ttl > args.max_ttl {
        let (ttl, longest) = (args.ttl, args.max_ttl);
        return Err(usage(format_args!("--ttl {ttl} is not between {SHORTEST} and --max-ttl {longest}")));
    }
    FolderSink::check_mode(args.secrets_mode).map_err(usage)?;
    args.origin().map_err(usage)?;
    args.injection("").map_err(usage)?;
    let own_names = args.dns_names.iter().map(ToString::to_string).collect();
    let limits = Limits { lifetime: args.ttl, longest: args.max_ttl, own_names };
    let policy = LivingPolicy::open(args.policy.as_deref(), limits).map_err(usage)?;
    telemetry::start(args.log_format, args.log_level);
    if let Some(ours) = &args.istio_ca {
        tracing::info!(
            differs = DIFFERENCES.join("; "),
            "runs with the flags of istio-ca 0.2.10, and differs"
        );
        if !ours.ignored.is_empty() {
            let flags = ours.ignored.join(", ");
            tracing::warn!(%flags, "these flags are of no effect with --self-signed-ca");
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::Fault(format!("cannot start the runtime: {e}")))?;
    let ended = runtime.block_on(start(Typed { args, policy: Arc::new(policy), output }));
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

/// What was typed, and what it names.
struct Typed {
    args: Args,
    policy: Arc<LivingPolicy>,
    output: Output,
}

async fn start(typed: Typed) -> Result<(), Error> {
    let args = &typed.args;
    // First of all, so that a signal never finds the default, which is to die on the spot.
    let signals = Signals::new()?;
    let (subjects, what) = match args.origin().map_err(usage)? {
        Origin::Folder(folder) => {
            let secrets = args.secrets.clone().unwrap_or_else(|| args.data_dir.join(SECRETS));
            let excluded = [args.data_dir.clone(), secrets.clone()];
            let source = FolderSource::open(folder, &excluded).map_err(usage)?;
            (Subjects::Folder { source: Box::new(source), secrets }, folder.display().to_string())
        }
        Origin::Cluster => {
            let named = args.istio_ca.as_ref().and_then(|ours| ours.kubeconfig.as_deref());
            let found = match named {
                Some(kubeconfig) => Cluster::named(kubeconfig).await,
                None => Cluster::find().await,
            };
            let mut cluster = found.map_err(usage)?;
            if let Some(namespace) = &args.namespace {
                cluster = cluster.within(namespace);
            }
            // Of one alone nothing has to be known about the others, nor may be.
            if let [only] = args.watch_namespaces.as_slice() {
                cluster = cluster.only(only);
            }
            let tellings = Arc::new(Events::new(&cluster, &sys::host_name()));
            (Subjects::Cluster { cluster, tellings }, "--kube".to_owned())
        }
    };
    let data = Dir::open_trusted(&args.data_dir, Some(0o700)).map_err(usage)?;
    let since = report::moment(clock::now());
    let holder = format!("mica serve {what}, process {}, since {since}", std::process::id());
    let _lock = data.lock(LOCK, &holder).map_err(usage)?;
    data.clear_leftovers().map_err(fault)?;
    Addresses::withdraw(&data).map_err(fault)?;
    let istio_ca = args.istio_ca.as_deref();
    let place = match istio_ca.and_then(|ours| ours.authority.clone()) {
        Some(files) => Some(Place::Files(files)),
        None => args.authority.clone().map(Place::Folder),
    };
    match (place, &subjects) {
        (None, Subjects::Cluster { cluster, tellings }) => {
            let mut store = ClusterStore::new(cluster, tellings.clone(), data.try_clone().map_err(fault)?);
            if let Some(ours) = istio_ca {
                store = store.as_istio_ca(AsIstioCa {
                    organization: ours.organization.clone(),
                    lifetime: ours.root_lifetime,
                });
            }
            run_with(typed, data, subjects, store, signals).await
        }
        (None, Subjects::Folder { .. }) => {
            let store = OwnStore::new(data.try_clone().map_err(fault)?);
            run_with(typed, data, subjects, store, signals).await
        }
        (Some(place), _) => {
            let passphrase =
                args.passphrase_file.as_deref().map(files::read_passphrase).transpose().map_err(usage)?;
            let mut store = BroughtStore::new(data.try_clone().map_err(fault)?, place, passphrase);
            // istio-ca's rights know no ConfigMaps.
            if let (Subjects::Cluster { cluster, tellings }, None) = (&subjects, istio_ca) {
                store = store.remembered_by(Box::new(ClusterMemory::new(cluster, tellings.clone())));
            }
            run_with(typed, data, subjects, store, signals).await
        }
    }
}

async fn run_with(
    Typed { args, policy, output }: Typed,
    data: Dir,
    subjects: Subjects,
    mut store: impl AuthorityStore + 'static,
    mut signals: Signals,
) -> Result<(), Error> {
    let grpc = match args.istio_ca.as_ref().is_none_or(|ours| ours.grpc) {
        true => Some(bind(args.grpc_address, "--grpc-address").await?),
        false => None,
    };
    let inject = match args.inject_address {
        Some(address) => Some(bind(address, "--inject-address").await?),
        None => None,
    };
    let (http, early) = twins(bind(args.http_address, "--http-address").await?).map_err(fault)?;
    let bundle = match args.bundle_address {
        Some(address) => Some(bind(address, "--bundle-address").await?),
        None => None,
    };
    // Before the sink, whose record shows that there was an authority.
    let open_files = listen::raise_open_files();
    let loaded = tokio::select! {
        // What is there at once needs nobody who says that it is not.
        biased;
        loaded = store.load(&args.trust_domain) => loaded,
        served = not_ready(early, open_files) => return served,
        () = signals.next() => return Ok(()),
    };
    let issuer = loaded.map_err(|e| if e.is_usage() { usage(e) } else { fault(e) })?;
    let authority = Arc::new(Authority::new(args.trust_domain.clone(), issuer));
    let mut registry = Registry::default();
    authority.register(&mut registry);
    let csr_metrics = serve::Metrics::register(&mut registry);
    let (tracer, exporters) = trace::start(&args.trace.options(), SERVICE, &mut registry);
    policy.register(&mut registry);
    let queue = Queue::new(Handle::current().metrics().num_workers(), queue::MOST);
    queue.register(&mut registry);

    let (stop, stopped) = watch::channel(false);
    let tokens =
        Tokens::new(subjects.cluster().map(|cluster| tokens::review(&args, cluster, policy.clone())));
    tokens.register(&mut registry);
    if subjects.cluster().is_none() {
        tokens.take(tokens::issuers(&args, &data).await?);
    }
    let wish = match subjects.cluster() {
        Some(cluster) => {
            let own = cluster.namespace().to_owned();
            args.injection(&own).map_err(usage)?.map(|wish| (wish, own))
        }
        None => None,
    };
    // Before whoever tells the cluster what is known.
    let fetcher = match &args.federation {
        Some(file) => {
            let fetched = Arc::new(Fetched::default());
            fetched.register(&mut registry);
            let data = data.try_clone().map_err(fault)?;
            let others = federated_bundles(&args, subjects.cluster()).await;
            let fetcher = Fetcher::open(authority.clone(), data, file.clone(), fetched, &others);
            Some(fetcher.map_err(|e| usage(format_args!("--federation: {e}")))?)
        }
        None => None,
    };
    let mut tasks = JoinSet::new();
    // Whoever has istio-ca's rights has no place in the cluster for more than istio-ca kept there.
    let is_shared = subjects.cluster().is_some() && args.istio_ca.is_none();
    let Followed { liveness, nodes, first, reported, events } =
        subjects.follow(&args, &data, &policy, &tokens, &authority, &mut registry, &stopped, &mut tasks)?;
    let stopping = || stopping(&stopped);
    let injector = match wish {
        Some((wish, own)) => {
            let injector = Arc::new(Injector::new(Rules { wish, own: own.clone() }));
            injector.register(&mut registry);
            let names = names(&args.inject_names(&own));
            Some((injector, Arc::new(ServingCertificate::new(authority.clone(), names))))
        }
        None => None,
    };
    let started = Arc::new(AtomicBool::new(false));
    let ready: admin::Ready = {
        let (authority, started, data) =
            (authority.clone(), started.clone(), data.try_clone().map_err(fault)?);
        Arc::new(move || {
            if !data.is_in_its_place() {
                let place = data.path().display();
                return Err(format!(
                    "the data folder {place} is gone: put it back and start mica again; without it the next start makes another root"
                ));
            }
            authority.issuer().usable(clock::now()).map_err(|e| e.to_string())?;
            if started.load(Ordering::Relaxed) {
                Ok(())
            } else {
                Err("the first pass is not done".to_owned())
            }
        })
    };
    let by_certificate = Arc::new(CertificateAuthenticator::new(authority.clone()));
    let forwarders = policy.clone();
    let forwarded = ForwardedAuthenticator::new(
        by_certificate.clone(),
        Box::new(move |proxy| forwarders.current().is_forwarder(proxy)),
        authority.trust_domain().clone(),
    );
    let requests = Requests::new(
        authority.clone(),
        vec![Box::new(tokens.clone()), Box::new(forwarded), Box::new(by_certificate)],
        liveness,
        nodes,
        policy.clone(),
        queue,
        csr_metrics,
    );
    let requests = Arc::new(requests.traced(tracer));
    let agents = Agents::new(requests.clone());
    agents.register(&mut registry);
    let certificate = Arc::new(ServingCertificate::new(authority.clone(), names(&args.dns_names)));
    certificate.begin();

    if !is_shared {
        let keyring = FolderKeyring::new(data.try_clone().map_err(fault)?);
        let mut keeper = Keeper::new(authority.clone(), keyring);
        keeper.look().await;
        tasks.spawn(until(stopping(), keeper.keep()));
    }
    // Clients may hang on for ever, as those do that watch the health.
    let cut_off = || {
        let stopping = stopping();
        async move {
            stopping.await;
            tokio::time::sleep(HANG_UP).await;
        }
    };
    if let Some(fetcher) = fetcher {
        tasks.spawn(until(stopping(), fetcher.keep()));
    }
    let bundle_address = bundle.as_ref().map(TcpListener::local_addr).transpose().map_err(fault)?;
    if let Some(listener) = bundle {
        let files = args.bundle_certificate.clone().zip(args.bundle_key.clone());
        let files = files.map(|(chain, key)| federation::Files { chain, key });
        let certificate = federation::Certificate::new(authority.clone(), files).map_err(fault)?;
        certificate.begin().map_err(|e| usage(format_args!("--bundle-certificate: {e}")))?;
        let certificate = Arc::new(certificate);
        let metrics = federation::Metrics::default();
        metrics.register(&mut registry);
        let address = listener.local_addr().map_err(fault)?;
        let id = certificate.id().map(tracing::field::display);
        tracing::info!(%address, id, "the trust bundle is served to other trust domains");
        let kept = certificate.clone();
        tasks.spawn(until(stopping(), async move { kept.keep().await }));
        let endpoint = Endpoint { authority: authority.clone(), certificate, metrics };
        let (ends, cut) = (stopping(), cut_off());
        tasks.spawn(async move {
            tokio::select! {
                served = federation::serve(listener, open_files, endpoint, ends) => served.map_err(fault),
                () = cut => Ok(()),
            }
        });
    }
    tasks.spawn(until(stopping(), follow(store, authority.clone(), events)));
    for exporter in exporters {
        let ends = stopping();
        tasks.spawn(async move {
            exporter.run(ends).await;
            Ok(())
        });
    }
    let watched = authority.clone();
    tasks.spawn(until(stopping(), async move { watched.watch_over().await }));
    let (said, taken) = (policy.clone(), tokens.clone());
    tasks.spawn(until(stopping(), async move { tokens::follow_policy(&said, &taken).await }));
    tasks.spawn(until(stopping(), async move { policy.follow().await }));
    tasks.spawn(until(stopping(), async move { tokens.keep().await }));
    let kept = certificate.clone();
    tasks.spawn(until(stopping(), async move { kept.keep().await }));
    let addresses = Addresses {
        grpc: grpc.as_ref().map(TcpListener::local_addr).transpose().map_err(fault)?,
        http: http.local_addr().map_err(fault)?,
        inject: inject.as_ref().map(TcpListener::local_addr).transpose().map_err(fault)?,
        bundle: bundle_address,
    };
    let (ends, cut, asked) = (stopping(), cut_off(), ready.clone());
    tasks.spawn(async move {
        tokio::select! {
            served = admin::serve(http, open_files, Arc::new(registry), asked, ends) => served.map_err(fault),
            () = cut => Ok(()),
        }
    });
    let (ends, cut) = (stopping(), cut_off());
    if let Some(grpc) = grpc {
        tasks.spawn(async move {
        tokio::select! {
            served = serve::serve(grpc, open_files, certificate, ready, requests, agents, ends) => served.map_err(fault),
            () = cut => Ok(()),
        }
    });
    }

    if let (Some(listener), Some((injector, certificate))) = (inject, injector) {
        certificate.begin();
        let kept = certificate.clone();
        tasks.spawn(until(stopping(), async move { kept.keep().await }));
        let (ends, cut) = (stopping(), cut_off());
        tasks.spawn(async move {
            tokio::select! {
                served = webhook::serve(listener, open_files, &certificate, injector, ends) => served.map_err(fault),
                () = cut => Ok(()),
            }
        });
    }

    let announced = async {
        let Ok(first) = first.await else { return std::future::pending().await };
        started.store(true, Ordering::Relaxed);
        addresses.publish(&data).map_err(fault)?;
        report::print(&args, output, &authority, &addresses, first);
        // The task that waits for it has ended only if everything has.
        let _ = reported.send(());
        std::future::pending().await
    };
    let ended = tokio::select! {
        () = signals.next() => Ok(()),
        ended = tasks.join_next() => Err(unexpected(ended)),
        failed = announced => failed,
    };
    stop.send_replace(true);
    Addresses::withdraw(&data).map_err(fault)?;
    trial::withdraw(&data).map_err(fault)?;
    tokio::select! {
        () = async { while tasks.join_next().await.is_some() {} } => {}
        () = tokio::time::sleep(GRACE) => tracing::warn!("stopping without waiting any longer"),
        () = signals.next() => {}
    }
    tracing::info!("stopped");
    ended
}

/// SIGTERM and SIGINT, which both ask Mica to stop.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Takes them over.
    pub(super) fn new() -> Result<Self, Error> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(fault)?,
            interrupt: signal(SignalKind::interrupt()).map_err(fault)?,
        })
    }

    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Takes what the store has when it changes. What cannot be used changes nothing, and what cannot be used yet waits.
async fn follow(mut store: impl AuthorityStore, authority: Arc<Authority>, events: mpsc::Sender<Event>) {
    let mut early: Option<Issuer> = None;
    loop {
        let issuer = tokio::select! {
            () = store.changed() => {
                early = None;
                store.load(authority.trust_domain()).await.map_err(|fault| fault.to_string())
            }
            () = tokio::time::sleep(EARLY), if early.is_some() => {
                match early.take_if(|issuer| issuer.usable(clock::now()).is_ok()) {
                    Some(issuer) => Ok(issuer),
                    None => continue,
                }
            }
        };
        let now = clock::now();
        let refused = match issuer {
            Ok(issuer) if issuer.is_same(&authority.issuer()) => {
                authority.metrics().reloaded();
                continue;
            }
            Ok(issuer) => match issuer.usable(now) {
                // One that issues is not given up for one that does not.
                Err(fault) if authority.issuer().usable(now).is_ok() => {
                    let waits = matches!(fault, issuer::Error::NotYetValid(_));
                    early = waits.then_some(issuer);
                    fault.to_string()
                }
                _ => {
                    let serial = issuer.certificate().serial_text();
                    tracing::info!(%serial, "the authority has a new issuer below the same root");
                    authority.replace(issuer);
                    authority.metrics().reloaded();
                    if events.send(Event::Issuer).await.is_err() {
                        return;
                    }
                    continue;
                }
            },
            Err(fault) => fault,
        };
        authority.metrics().reload_failed();
        tracing::error!(fault = refused, "the changed authority is not taken, the one before stays");
    }
}

/// Resolves when Mica is to stop.
pub(super) fn stopping(stopped: &watch::Receiver<bool>) -> impl Future<Output = ()> + use<> {
    let mut stopped = stopped.clone();
    async move {
        // An error means that the sender is gone, which is an end too.
        let _ = stopped.wait_for(|stop| *stop).await;
    }
}

/// Lives, and says so, while the store waits for what it needs.
async fn not_ready(http: TcpListener, open_files: usize) -> Result<(), Error> {
    let ready: admin::Ready =
        Arc::new(|| Err("the authority is not loaded yet; the log says why".to_owned()));
    admin::serve(http, open_files, Arc::default(), ready, std::future::pending()).await.map_err(fault)
}

/// The same twice, of which one can be given up without the other.
fn twins(listener: TcpListener) -> std::io::Result<(TcpListener, TcpListener)> {
    let listener = listener.into_std()?;
    Ok((TcpListener::from_std(listener.try_clone()?)?, TcpListener::from_std(listener)?))
}

pub(super) async fn bind(address: SocketAddr, flag: &str) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|e| {
        usage(format_args!("cannot listen on {flag} {address}: {}; port 0 picks a free one", sys::reason(&e)))
    })
}

pub(super) async fn until(
    stop: impl Future<Output = ()>,
    work: impl Future<Output = ()>,
) -> Result<(), Error> {
    tokio::select! {
        () = stop => {}
        () = work => {}
    }
    Ok(())
}

pub(super) fn unexpected(ended: Option<Result<Result<(), Error>, tokio::task::JoinError>>) -> Error {
    match ended {
        Some(Ok(Err(error))) => error,
        Some(Err(panic)) => Error::Fault(format!("a task failed: {panic}")),
        Some(Ok(Ok(()))) | None => Error::Fault("a task ended early".to_owned()),
    }
}

/// What other replicas, or this one's last start, have fetched, where the cluster keeps it.
async fn federated_bundles(args: &Args, cluster: Option<&Cluster>) -> BTreeMap<String, String> {
    let (Some(cluster), Some(name)) = (cluster, args.federated_config_map()) else {
        return BTreeMap::new();
    };
    cluster::federated_bundles(cluster, name).await.unwrap_or_else(|fault| {
        tracing::warn!(
            name,
            fault,
            "the bundles of other trust domains that the cluster has cannot be read; they are fetched"
        );
        BTreeMap::new()
    })
}

fn names(typed: &[ServingName]) -> Names {
    let mut names = Names { dns: Vec::new(), addresses: Vec::new() };
    for name in typed {
        match name {
            ServingName::Dns(name) => names.dns.push(name.clone()),
            ServingName::Address(address) => names.addresses.push(*address),
        }
    }
    names
}

pub(super) fn usage(why: impl ToString) -> Error {
    Error::Usage(why.to_string())
}

pub(super) fn fault(why: impl ToString) -> Error {
    Error::Fault(why.to_string())
}
