//! Which of several Micas writes.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::rbac::v1::RoleBinding;
use kube::api::{Api, DeleteParams, PostParams};
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};

use super::control_plane::{ControlPlane, HOME, runtime};
use super::events::events_about;
use super::served::{Client, command, start};
use crate::serve::mtls::reason;
use crate::serve::{Mica, Place, SLACK, wait_for};

/// For how long a lease is good.
const LASTS: Duration = Duration::from_secs(15);
/// For how long its holder writes after each renewal.
const WRITES: Duration = Duration::from_secs(12);
/// It is looked at this often, or more often.
const TURN: Duration = Duration::from_millis(2500);

fn lease(plane: &ControlPlane) -> LeaseSpec {
    let leases: Api<Lease> = Api::namespaced(plane.client(), HOME);
    runtime().block_on(leases.get("mica")).unwrap().spec.unwrap()
}

fn leads(mica: &Mica) -> bool {
    mica.metric("mica_leader") == 1.0
}

fn wait_until_it_leads(mica: &Mica, within: Duration) {
    wait_for(within, "another leader", || leads(mica).then_some(()));
}

#[test]
fn a_leader_that_dies_is_replaced_within_its_lease_and_one_that_stops_at_once() {
    let plane = ControlPlane::start();
    let places = [(); 5].map(|()| Place::new());
    let first = start(&places[0], &plane, &[]);
    wait_until_it_leads(&first, TURN);
    wait_for(TURN, "an Event", || {
        let told = events_about(&plane, HOME, "mica");
        told.into_iter().find(|event| event.reason.as_deref() == Some("LeaderElected"))
    });
    let mut others: Vec<_> = places[1..].iter().map(|place| start(place, &plane, &[])).collect();
    std::thread::sleep(2 * TURN);
    assert!(leads(&first) && !others.iter().any(leads));
    let before = lease(&plane);
    assert_eq!((before.lease_duration_seconds, before.lease_transitions), (Some(15), Some(0)));

    let mut leader = first;
    for kill in 1..=3 {
        // Right after a renewal, which is when it takes longest.
        let before = lease(&plane);
        let last = wait_for(TURN, "a renewal", || {
            Some(lease(&plane)).filter(|lease| lease.renew_time != before.renew_time)
        });
        leader.kill();
        let died = Instant::now();
        let next = wait_for(LASTS, "another leader", || {
            let leading: Vec<_> = (0..others.len()).filter(|n| leads(&others[*n])).collect();
            assert!(leading.len() < 2);
            leading.first().copied()
        });
        let replaced = died.elapsed();
        eprintln!("replaced after {replaced:?}");
        assert!(replaced < LASTS, "{replaced:?}");
        let taken = lease(&plane);
        assert_eq!(taken.lease_transitions, Some(kill));
        // Those who died are given their time.
        let waited = taken.acquire_time.unwrap().0.duration_since(last.renew_time.unwrap().0).as_secs_f64();
        assert!(waited >= WRITES.as_secs_f64(), "{waited}");
        leader = others.remove(next);
    }

    let follower = others.remove(0);
    let begun = Instant::now();
    leader.stop();
    wait_until_it_leads(&follower, TURN);
    eprintln!("after a stop: {:?}", begun.elapsed());
    assert!(begun.elapsed() < LASTS / 2, "{:?}", begun.elapsed());
    assert_eq!(lease(&plane).lease_transitions, Some(4));
    follower.stop();
    assert_eq!(lease(&plane).holder_identity.as_deref(), Some(""));
}

#[test]
fn a_leader_that_is_cut_off_stops_before_another_begins_and_serves_on() {
    let plane = ControlPlane::start();
    let (place, other) = (Place::new(), Place::new());
    let proxy = Proxy::start(&plane);
    let first = place.start_command(&mut proxy.command(&place, &plane));
    wait_until_it_leads(&first, TURN);
    let second = start(&other, &plane, &[]);
    let namespace = plane.namespace();
    namespace.account("web");
    let token = namespace.token("web", "istio-ca", None);
    let client = Client::new(&first, &place);
    wait_for(TURN, "the account", || client.identity(&token).ok());

    proxy.cut(true);
    let (mut stopped, mut began) = (None, None);
    let cut = Instant::now();
    while began.is_none() && cut.elapsed() < LASTS + SLACK {
        // This order, so that a change between the two looks like the fault it would be.
        let is_second = leads(&second);
        let is_first = leads(&first);
        assert!(!(is_first && is_second), "two leaders {:?} after the cut", cut.elapsed());
        if !is_first {
            stopped.get_or_insert(cut.elapsed());
        }
        if is_second {
            began = Some(cut.elapsed());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let (stopped, began) = (stopped.unwrap(), began.expect("another leader"));
    // Whoever writes is given as long as a request may take.
    assert!(stopped + Duration::from_secs(3) < began, "{stopped:?} {began:?}");
    client.identity(&token).unwrap();
    assert_eq!(first.page("/readyz").0, 200);

    proxy.cut(false);
    std::thread::sleep(2 * TURN);
    assert!(!leads(&first) && leads(&second));
    assert!(first.log().contains("this replica writes into the cluster no longer"));
    first.stop();
    assert!(leads(&second));
    second.stop();
}

#[test]
fn a_leader_that_slept_through_its_lease_knows_when_it_wakes() {
    let plane = ControlPlane::start();
    let (place, other) = (Place::new(), Place::new());
    let first = start(&place, &plane, &[]);
    wait_until_it_leads(&first, TURN);
    let second = start(&other, &plane, &[]);
    first.signal("-STOP");
    wait_until_it_leads(&second, LASTS + 2 * TURN);
    first.signal("-CONT");
    assert!(!leads(&first));
    std::thread::sleep(2 * TURN);
    assert!(!leads(&first) && leads(&second));
    first.stop();
    second.stop();
}

#[test]
fn a_replica_that_does_not_write_notices_that_the_cluster_is_a_backup() {
    put_back(true);
}

#[test]
fn it_notices_a_backup_that_has_the_lease_as_it_saw_it_last() {
    put_back(false);
}

/// `seen` says whether the replicas look at the lease between the backup and its return.
fn put_back(seen: bool) {
    let plane = ControlPlane::start();
    let (place, other) = (Place::new(), Place::new());
    let first = start(&place, &plane, &[]);
    wait_until_it_leads(&first, TURN);
    let second = start(&other, &plane, &[]);
    let namespace = plane.namespace();
    let bindings: Api<RoleBinding> = Api::namespaced(plane.client(), HOME);
    let mut binding = runtime().block_on(bindings.get("mica")).unwrap();
    let soon = Duration::from_secs(15);
    if !seen {
        runtime().block_on(bindings.delete("mica", &DeleteParams::default())).unwrap();
        for mica in [&first, &second] {
            wait_for(soon, "a look that is denied", || {
                mica.log().contains("the lease can be neither read nor written").then_some(())
            });
        }
    }
    plane.back_up();
    // Versions that the backup does not reach for long.
    for n in 0..100 {
        namespace.account(&format!("filler-{n}"));
    }
    namespace.account("web");
    let token = namespace.token("web", "istio-ca", None);
    let client = Client::new(&second, &other);
    wait_for(soon, "the accounts", || {
        let known = second.metric("mica_kube_objects{resource=\"serviceaccounts\"}");
        (known > 100.0).then_some(())
    });
    client.identity(&token).unwrap();
    if seen {
        let done = |verb: &str| {
            let is_one = |event: &&Value| {
                event["verb"] == verb
                    && event["objectRef"]["resource"] == "leases"
                    && event["responseStatus"]["code"] == 200
            };
            plane.audit("mica").iter().filter(is_one).count()
        };
        for verb in ["update", "get"] {
            let before = done(verb);
            wait_for(soon, "two more looks at the lease", || (done(verb) > before + 1).then_some(()));
        }
    }
    plane.restore();
    if !seen {
        binding.metadata.resource_version = None;
        binding.metadata.uid = None;
        runtime().block_on(bindings.create(&PostParams::default(), &binding)).unwrap();
    }
    // It never was. For being away alone, all is read again once a minute.
    let within = if seen { soon } else { soon + Duration::from_secs(60) };
    wait_for(within, "a refusal", || {
        client.identity(&token).err().filter(|refused| reason(refused) == "ACCOUNT_GONE")
    });
    let word =
        if seen { "has gone back to an older backup" } else { "may have come back as an older backup" };
    wait_for(soon, "a word", || second.log().contains(word).then_some(()));
    // Who has not seen the lease for long may take it.
    assert!(!seen || !leads(&second));
    second.stop();
    first.stop();
}

/// Between a Mica and its API server.
struct Proxy {
    address: SocketAddr,
    is_cut: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    fn start(plane: &ControlPlane) -> Self {
        let to = plane.api_address();
        let is_cut = Arc::new(AtomicBool::new(false));
        let cut = is_cut.clone();
        let listener = runtime().block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let task = runtime().spawn(async move {
            loop {
                let Ok((near, _)) = listener.accept().await else { continue };
                let cut = cut.clone();
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect(to).await else { return };
                    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                    tokio::join!(carry(near_in, far_out, cut.clone()), carry(far_in, near_out, cut));
                });
            }
        });
        Self { address, is_cut, task }
    }

    /// Nothing comes through any more, and nobody is told.
    fn cut(&self, is_cut: bool) {
        self.is_cut.store(is_cut, Ordering::SeqCst);
    }

    /// Mica, with this on its way to the API server.
    fn command(&self, place: &Place, plane: &ControlPlane) -> Command {
        let mut command = command(place, plane);
        let text = std::fs::read(plane.kubeconfig_of("mica")).unwrap();
        let mut kubeconfig: Value = serde_json::from_slice(&text).unwrap();
        kubeconfig["clusters"][0]["cluster"]["server"] = format!("https://{}", self.address).into();
        let path = place.root.path().join("kubeconfig");
        std::fs::write(&path, kubeconfig.to_string()).unwrap();
        command.env("KUBECONFIG", path);
        command
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn carry(
    from: tokio::net::tcp::OwnedReadHalf,
    to: tokio::net::tcp::OwnedWriteHalf,
    is_cut: Arc<AtomicBool>,
) {
    let mut bytes = vec![0; 65536];
    loop {
        let _ = from.readable().await;
        while is_cut.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let count = match from.try_read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => count,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(_) => return,
        };
        let mut rest = &bytes[..count];
        while !rest.is_empty() {
            let _ = to.writable().await;
            match to.try_write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }
}
