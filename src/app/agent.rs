//! `mica agent`.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::serve::{Error, GRACE, Signals, bind, fault, stopping, unexpected, until, usage};
use crate::admin;
use crate::agent::files::{Folder, Options, Told};
use crate::agent::{self, Agent, Asker, Authority, Credentials, Wishes};
use crate::attest::{Attestor, OfPods, OwnUser, WorkloadsFile};
use crate::cluster::{Cluster, NodePods};
use crate::config::agent::{Args, SOCKET};
use crate::core::inspect::distance;
use crate::core::lifetime::shown;
use crate::core::spiffe::{ServiceAccount, SpiffeId};
use crate::endpoint::{self, Endpoint, sds};
use crate::sys::dir::{self, Access};
use crate::sys::socket::Socket;
use crate::sys::{self, clock, listen};
use crate::{telemetry, trace};

/// In traces.
const SERVICE: &str = "mica-agent";
/// Everyone may connect: what a caller gets depends on who it is.
const SOCKET_MODE: u32 = 0o777;

/// Runs until SIGTERM or SIGINT.
pub fn run(args: Args) -> Result<(), Error> {
    telemetry::start(args.log_format, args.log_level);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::Fault(format!("cannot start the runtime: {e}")))?;
    let ended = runtime.block_on(start(args));
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    ended
}

async fn start(args: Args) -> Result<(), Error> {
    let mut signals = Signals::new()?;
    let authority = Authority {
        address: args.authority_address.parse().map_err(usage)?,
        name: args.authority_name.clone(),
        roots: args.authority_roots.clone(),
    };
    let asker = Asker::new(authority, args.ttl, args.key_kind.into());
    asker.check().map_err(usage)?;
    let credentials = Credentials { token: args.token_file.clone(), certificate: args.certificate.clone() };
    let workloads = args.workloads.as_deref().map(WorkloadsFile::open).transpose().map_err(usage)?;
    let workloads = workloads.map(Arc::new);
    let others = workloads.as_ref().map(|workloads| workloads.current().credentials()).unwrap_or_default();
    let others = others
        .into_iter()
        .map(|(id, given)| (id, Credentials { token: given.token, certificate: given.certificate }));
    let pods = match args.node {
        true => {
            let node = args.node_name.clone().unwrap_or_else(sys::host_name);
            Some(Arc::new(NodePods::new(&Cluster::find().await.map_err(usage)?, &node)))
        }
        false => None,
    };
    let wishes = Wishes { own: Some(args.identity.clone()), credentials, others: others.collect() };
    let names = <[String; 3]>::try_from(args.file_names.clone()).map_err(|names| {
        let names = names.join(",");
        usage(format_args!("--file-names {names} are not three names, of chain, key and trust bundle"))
    })?;
    let http = bind(args.http_address, "--http-address").await?;
    let open_files = listen::raise_open_files();

    let mut registry = Registry::default();
    let (mut agent, wanted) = Agent::new(asker, wishes);
    let (tracer, exporters) = trace::start(&args.trace.options(), SERVICE, &mut registry);
    agent.tracer = tracer;
    let agent = Arc::new(agent);
    let socket = match (&args.socket, &args.files) {
        (Some(path), _) => Some(path.as_path()),
        (None, Some(_)) if workloads.is_none() && !args.node => None,
        (None, _) => Some(Path::new(SOCKET)),
    };
    let socket = socket.map(bind_socket).transpose()?;
    let mut folders = Vec::new();
    let paths = folders_of(&args, workloads.as_deref())?;
    let count = u32::try_from(paths.len()).unwrap_or(u32::MAX);
    let options = files(&args, names, count);
    for (id, path) in paths {
        let folder = Folder::open(path, options.clone()).map_err(usage)?;
        let taken = folder.take_over(&agent, id.as_ref().or(args.identity.as_ref()));
        if let (None, Some(own)) = (&id, taken) {
            agent.is(&own);
        }
        folders.push((folder, id));
    }
    agent.register(&mut registry);

    let (stop, stopped) = watch::channel(false);
    let stopping = || stopping(&stopped);
    let mut tasks = JoinSet::new();
    tasks.spawn(until(stopping(), agent::keep(agent.clone(), wanted)));
    tasks.spawn(until(stopping(), agent::holders::report(agent.clone())));
    for (folder, id) in folders {
        tasks.spawn(until(stopping(), folder.keep(agent.clone(), id)));
    }
    for exporter in exporters {
        let ends = stopping();
        tasks.spawn(async move {
            exporter.run(ends).await;
            Ok(())
        });
    }
    // There for as long as it is held.
    let mut _bound = None;
    if let Some((bound, listener)) = socket {
        _bound = Some(bound);
        let attestor: Arc<dyn Attestor> = match (workloads, pods) {
            (None, Some(pods)) => {
                let followed = pods.clone();
                let stops = stopping();
                tasks.spawn(async move { until(stops, followed.follow()).await });
                Arc::new(OfPods::new(pods, agent.own()))
            }
            (Some(workloads), _) => {
                let followed = workloads.clone();
                let stops = stopping();
                tasks.spawn(async move { until(stops, followed.follow()).await });
                workloads
            }
            (None, None) => Arc::new(OwnUser::new(agent.own())),
        };
        let endpoint = Endpoint { agent: agent.clone(), attestor };
        let sds = sds::service(endpoint.clone(), &mut registry);
        let ends = stopping();
        tasks.spawn(async move {
            endpoint::serve(listener, open_files, endpoint, sds, ends).await.map_err(fault)
        });
    }
    let (ready, ends) = (readiness(agent.clone(), args.node), stopping());
    let address = http.local_addr().map_err(fault)?;
    tasks.spawn(async move {
        admin::serve(http, open_files, Arc::new(registry), ready, ends).await.map_err(fault)
    });
    tracing::info!(http = %address, authority = args.authority_address, "agent runs");

    let ended = tokio::select! {
        () = signals.next() => Ok(()),
        ended = tasks.join_next() => Err(unexpected(ended)),
    };
    stop.send_replace(true);
    tokio::select! {
        () = async { while tasks.join_next().await.is_some() {} } => {}
        () = tokio::time::sleep(GRACE) => tracing::warn!("stopping without waiting any longer"),
        () = signals.next() => {}
    }
    tracing::info!("stopped");
    ended
}

/// The folder of the agent's own identity, or one for each of many.
fn folders_of(
    args: &Args,
    workloads: Option<&WorkloadsFile>,
) -> Result<Vec<(Option<SpiffeId>, PathBuf)>, Error> {
    let Some(folder) = &args.files else { return Ok(Vec::new()) };
    let Some(workloads) = workloads else { return Ok(vec![(None, folder.clone())]) };
    let workloads = workloads.current();
    let placed = workloads.identities().into_iter().map(|id| {
        let account = ServiceAccount::of(id).ok_or_else(|| {
            usage(format_args!(
                "--files has folders <namespace>/istio.<account>, and {id} is no service account; leave it out of --workloads, or --files"
            ))
        })?;
        let path = folder.join(account.namespace()).join(format!("istio.{}", account.name()));
        Ok((Some(id.clone()), path))
    });
    placed.collect()
}

fn bind_socket(path: &Path) -> Result<(Socket, UnixListener), Error> {
    let holder = format!("the mica agent of process {}", std::process::id());
    let (socket, listener) = Socket::bind(path, SOCKET_MODE, &holder).map_err(usage)?;
    if let Some(why) = socket.exposed() {
        tracing::warn!(socket = %path.display(), why, "whoever else may write to the socket's folder may replace it");
    }
    Ok((socket, listener))
}

/// Ready is an agent all of whose identities are good. One for a node answers for its own: which pods come, and whether
/// policy denies one of them, says nothing of the agent.
fn readiness(agent: Arc<Agent>, for_a_node: bool) -> admin::Ready {
    Arc::new(move || {
        let (mut all, now) = (agent.held.all(), clock::now());
        if for_a_node {
            let own = agent.own();
            let own = own.borrow();
            all.retain(|(id, ..)| own.as_ref() == Some(id));
        }
        if all.is_empty() {
            return Err("the agent's own identity is not known yet; the log says why".to_owned());
        }
        for (id, svid, _) in all {
            let Some(svid) = svid else {
                return Err(format!("{id} has no certificate yet; the log says why"));
            };
            let left = (svid.not_after() - now).whole_seconds();
            if left <= 0 {
                return Err(format!(
                    "the certificate of {id} expired {} ago; the log says why",
                    distance(-left)
                ));
            }
            let begins = svid.chain[0].validity.not_before;
            if begins > now {
                return Err(format!(
                    "the certificate of {id} is not valid before {}; check the clock",
                    shown(begins)
                ));
            }
        }
        Ok(())
    })
}

fn files(args: &Args, names: [String; 3], folders: u32) -> Options {
    let access = Access {
        mode: args.files_mode,
        owner: Some(args.files_owner.unwrap_or(dir::our_user())),
        group: Some(args.files_group.unwrap_or(dir::our_group())),
    };
    let told = match (&args.program[..], args.signal, &args.pid_file) {
        ([], Some(signal), Some(file)) => Some(Told::Process(file.clone(), signal)),
        ([], ..) => None,
        (words, ..) => Some(Told::Program(words.to_vec())),
    };
    Options { folders, since: Instant::now(), access, names: Some(names), told }
}
