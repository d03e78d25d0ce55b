//! The keys of JWT-SVIDs, shared by replicas, and the number of the bundle that they are in.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, DeleteParams, PostParams};
use mica::proto::mica::v1::agent_service_client::AgentServiceClient;
use mica::proto::mica::v1::{Bundle, CreateJwtSvidRequest, WatchBundlesRequest};
use serde_json::Value;
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::control_plane::{ControlPlane, HOME, runtime};
use super::served::start;
use crate::serve::agent::judged;
use crate::serve::mtls::connect;
use crate::serve::{Mica, Place, wait_for};

const NAME: &str = "mica-jwt-keys";
/// Each replica looks this often, and a lease is good for 15 s.
const SOON: Duration = Duration::from_secs(40);

struct Agent<'a> {
    client: AgentServiceClient<Channel>,
    token: &'a str,
}

impl<'a> Agent<'a> {
    fn new(mica: &Mica, place: &Place, token: &'a str) -> Self {
        Self { client: AgentServiceClient::new(runtime().block_on(connect(mica, place, None))), token }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.token).parse().unwrap());
        request
    }

    fn bundle(&mut self) -> Result<Bundle, Status> {
        let request = self.request(WatchBundlesRequest {});
        runtime().block_on(async {
            let mut stream = self.client.watch_bundles(request).await?.into_inner();
            Ok(stream.message().await?.unwrap().bundles.remove(0))
        })
    }

    fn svid(&mut self) -> String {
        let message =
            CreateJwtSvidRequest { audience: vec!["db".to_owned()], impersonated_identity: String::new() };
        let request = self.request(message);
        runtime().block_on(self.client.create_jwt_svid(request)).unwrap().into_inner().svid
    }
}

fn secrets(plane: &ControlPlane) -> Api<Secret> {
    Api::namespaced(plane.client(), HOME)
}

fn kids(bundle: &Bundle) -> Vec<String> {
    let set: Value = serde_json::from_slice(&bundle.jwt_authorities).unwrap();
    set["keys"].as_array().unwrap().iter().map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn replicas_publish_one_number_and_take_each_others_tokens_over_leaders_and_restores() {
    let plane = ControlPlane::start();
    let namespace = plane.namespace();
    namespace.account("web");
    let token = namespace.token("web", "istio-ca", None);
    let places = [Place::new(), Place::new(), Place::new()];
    let start = |at: usize| start(&places[at], &plane, &[]);
    let mut micas = vec![start(0), start(1)];
    let same = |micas: &[Mica], above: u64| {
        wait_for(SOON, "one number", || {
            let all: Vec<_> = micas
                .iter()
                .map(|mica| {
                    let place = places.iter().find(|place| place.data() == mica.data()).unwrap();
                    Agent::new(mica, place, &token).bundle().ok()
                })
                .collect::<Option<_>>()?;
            let first: &Bundle = &all[0];
            let agree = all.iter().all(|bundle| bundle.sequence == first.sequence);
            // What has one number is one bundle.
            assert!(!agree || all.iter().all(|bundle| bundle == first), "{all:?}");
            (agree && first.sequence > above).then(|| first.clone())
        })
    };
    let first = same(&micas, 0);
    let [one, other] = [0, 1].map(|at| Agent::new(&micas[at], &places[at], &token).svid());
    for svid in [&one, &other] {
        judged(&first.jwt_authorities, svid, "db").unwrap();
    }
    let kept = runtime().block_on(secrets(&plane).get(NAME)).unwrap();
    assert_eq!(kept.type_.as_deref(), Some("mica.dev/jwt-keys"));
    let leases: Api<Lease> = Api::namespaced(plane.client(), HOME);
    let lease = runtime().block_on(leases.get("mica")).unwrap();

    // Another leader, and another replica, which finds what is there.
    let leads = |mica: &Mica| mica.metric("mica_leader") == 1.0;
    wait_for(SOON, "a leader", || micas.iter().any(leads).then_some(()));
    let second = same(&micas, first.sequence.saturating_sub(1));
    let leader = micas.iter().position(leads).unwrap();
    micas.remove(leader).kill();
    micas.push(start(2));
    wait_for(SOON, "another leader", || micas.iter().any(leads).then_some(()));
    let third = same(&micas, second.sequence);
    assert_eq!(kids(&third), kids(&first));
    let now = runtime().block_on(secrets(&plane).get(NAME)).unwrap();
    assert_eq!(
        now.metadata.resource_version, kept.metadata.resource_version,
        "who begins to lead writes none"
    );

    // All as it was before, as a backup of the cluster would bring it back, and nobody who knows better.
    for mica in micas.drain(..) {
        mica.kill();
    }
    let mut restored = kept.clone();
    restored.metadata.resource_version = None;
    runtime().block_on(secrets(&plane).replace(NAME, &PostParams::default(), &restored)).unwrap();
    let mut restored = lease;
    let now = runtime().block_on(leases.get("mica")).unwrap();
    restored.metadata.resource_version = now.metadata.resource_version;
    runtime().block_on(leases.replace("mica", &PostParams::default(), &restored)).unwrap();
    micas.extend([start(0), start(1)]);
    let fourth = same(&micas, third.sequence);
    assert_eq!(kids(&fourth), kids(&first));

    runtime().block_on(secrets(&plane).delete(NAME, &DeleteParams::default())).unwrap();
    let fifth = same(&micas, fourth.sequence);
    assert_ne!(kids(&fifth), kids(&first));
    assert!(judged(&fifth.jwt_authorities, &one, "db").is_err());

    // The secret alone as it was before, under those who know better.
    let mut restored = kept;
    restored.metadata.resource_version = None;
    restored.metadata.uid = None;
    runtime().block_on(secrets(&plane).replace(NAME, &PostParams::default(), &restored)).unwrap();
    let sixth = same(&micas, fifth.sequence);
    assert_eq!(kids(&sixth), kids(&first));
    for mica in micas {
        mica.stop();
    }
}
