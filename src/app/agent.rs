//! `mica agent`.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::serve::{Error, GRACE, Signals, bind, fault, stopping, unexpected, until, usage};
use crate::admin;
use crate::agent::files::{Folder, Options, Told};
use crate::agent::{self, Agent, Asker, Authority, Credentials, Wishes};
use crate::attest::{Attestor, OwnUser, WorkloadsFile};
use crate::config::agent::{Args, SOCKET};
use crate::core::inspect::distance;
use crate::endpoint::{self, Endpoint, sds};
use crate::sys::dir::{self, Access};
use crate::sys::socket::Socket;
use crate::sys::{clock, listen};
use crate::telemetry;

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
    let wishes = Wishes { own: Some(args.identity.clone()), credentials, others: others.collect() };
    let names = <[String; 3]>::try_from(args.file_names.clone()).map_err(|names| {
        let names = names.join(",");
        usage(format_args!("--file-names {names} are not three names, of chain, key and trust bundle"))
    })?;
    let http = bind(args.http_address, "--http-address").await?;
    let open_files = listen::raise_open_files();

    let (agent, wanted) = Agent::new(asker, wishes);
    let agent = Arc::new(agent);
    let socket = match (&args.socket, &args.files) {
        (Some(path), _) => Some(path.as_path()),
        (None, Some(_)) if workloads.is_none() => None,
        (None, _) => Some(Path::new(SOCKET)),
    };
    let socket = socket.map(bind_socket).transpose()?;
    let folder = args.files.clone().map(|path| Folder::open(path, files(&args, names))).transpose();
    let folder = folder.map_err(usage)?;
    if let Some(id) = folder.as_ref().and_then(|folder| folder.take_over(&agent, args.identity.as_ref())) {
        agent.is(&id);
    }
    let mut registry = Registry::default();
    agent.register(&mut registry);

    let (stop, stopped) = watch::channel(false);
    let stopping = || stopping(&stopped);
    let mut tasks = JoinSet::new();
    tasks.spawn(until(stopping(), agent::keep(agent.clone(), wanted)));
    tasks.spawn(until(stopping(), agent::holders::report(agent.clone())));
    if let Some(folder) = folder {
        tasks.spawn(until(stopping(), folder.keep(agent.clone(), None)));
    }
    // There for as long as it is held.
    let mut _bound = None;
    if let Some((bound, listener)) = socket {
        _bound = Some(bound);
        let attestor: Arc<dyn Attestor> = match workloads {
            Some(workloads) => {
                let followed = workloads.clone();
                let stops = stopping();
                tasks.spawn(async move { until(stops, followed.follow()).await });
                workloads
            }
            None => Arc::new(OwnUser::new(agent.own())),
        };
        let endpoint = Endpoint { agent: agent.clone(), attestor };
        let sds = sds::service(endpoint.clone(), &mut registry);
        let ends = stopping();
        tasks.spawn(async move {
            endpoint::serve(listener, open_files, endpoint, sds, ends).await.map_err(fault)
        });
    }
    let (ready, ends) = (readiness(agent.clone()), stopping());
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

fn bind_socket(path: &Path) -> Result<(Socket, UnixListener), Error> {
    let holder = format!("the mica agent of process {}", std::process::id());
    let (socket, listener) = Socket::bind(path, SOCKET_MODE, &holder).map_err(usage)?;
    if let Some(why) = socket.exposed() {
        tracing::warn!(socket = %path.display(), why, "whoever else may write to the socket's folder may replace it");
    }
    Ok((socket, listener))
}

/// Ready is an agent all of whose identities are good.
fn readiness(agent: Arc<Agent>) -> admin::Ready {
    Arc::new(move || {
        let (all, now) = (agent.held.all(), clock::now());
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
        }
        Ok(())
    })
}

fn files(args: &Args, names: [String; 3]) -> Options {
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
    Options { access, names: Some(names), told }
}
