//! What agents need beyond certificates: JWT-SVIDs that go-spiffe takes, bundles as they change, and reports.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mica::core::certificate::Certificate;
use mica::core::csr::CheckedCsr;
use mica::core::published::Published;
use mica::proto::mica::v1::agent_service_client::AgentServiceClient;
use mica::proto::mica::v1::certificate_answer::Answer;
use mica::proto::mica::v1::{
    Bundle, CertificateRequest, CreateCertificatesRequest, CreateJwtSvidRequest, CreateJwtSvidResponse,
    Holder, ReportHoldersRequest, WatchBundlesRequest, WatchBundlesResponse,
};
use prost::Message as _;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::authority::{Brought, P256};
use super::mtls::{ask, connect, csr, reason};
use super::{Mica, Place, wait_for};
use crate::parts;

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const FILE: &str = "jwt-keys.json";

async fn as_web(mica: &Mica, place: &Place) -> AgentServiceClient<Channel> {
    place.leaf("web");
    AgentServiceClient::new(connect(mica, place, Some(&place.folder("shop", "web"))).await)
}

fn start(arguments: &[&str]) -> (Place, Mica) {
    let place = Place::new();
    place.account("web");
    let mica = place.start(arguments);
    (place, mica)
}

async fn token(
    client: &mut AgentServiceClient<Channel>,
    audience: &[&str],
) -> Result<CreateJwtSvidResponse, Status> {
    let audience = audience.iter().map(|one| (*one).to_owned()).collect();
    let request = CreateJwtSvidRequest { audience, impersonated_identity: String::new() };
    Ok(client.create_jwt_svid(request).await?.into_inner())
}

async fn watch(client: &mut AgentServiceClient<Channel>) -> Streaming<WatchBundlesResponse> {
    client.watch_bundles(WatchBundlesRequest {}).await.unwrap().into_inner()
}

async fn next(stream: &mut Streaming<WatchBundlesResponse>) -> Result<Option<WatchBundlesResponse>, Status> {
    tokio::time::timeout(Duration::from_secs(30), stream.message()).await.expect("a message, or the end")
}

/// The authority's own bundle, as it is now.
async fn bundle(client: &mut AgentServiceClient<Channel>) -> Bundle {
    let mut told = next(&mut watch(client).await).await.unwrap().unwrap();
    assert_eq!(told.bundles[0].trust_domain, "cluster.local");
    told.bundles.remove(0)
}

fn keys(bundle: &Bundle) -> Vec<Value> {
    let set: Value = serde_json::from_slice(&bundle.jwt_authorities).unwrap();
    set["keys"].as_array().unwrap().clone()
}

fn kids(bundle: &Bundle) -> Vec<String> {
    keys(bundle).iter().map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
}

fn part(token: &str, at: usize) -> Value {
    let part = token.split('.').nth(at).unwrap();
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

/// go-spiffe's word on a token: what it says, or why it is refused.
pub(crate) fn judged(keys: &[u8], token: &str, audience: &str) -> Result<String, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bundle.json");
    fs::write(&file, keys).unwrap();
    let mut command = Command::new(parts::go_spiffe());
    command.args(["jwt", "--trust-domain", "cluster.local", "--audience", audience]).arg(&file);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    writeln!(child.stdin.take().unwrap(), "{token}").unwrap();
    let output = child.wait_with_output().unwrap();
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_certificates_in_one_call_are_each_granted_or_refused_by_themselves() {
    let (place, mica) = start(&["--log-format", "json"]);
    let mut client = as_web(&mica, &place).await;
    let alone = |csr: &str| CertificateRequest { request: Some(ask(csr.to_owned())), ..Default::default() };
    let [first, last] = [(); 2].map(|()| csr("spiffe://cluster.local/ns/some/sa/body"));
    let key = |csr: &str| CheckedCsr::from_pem(csr.as_bytes()).unwrap().key().spki().to_vec();
    let good = alone(&first);
    let mut other = good.clone();
    let wanted = prost_types::value::Kind::StringValue("spiffe://cluster.local/ns/shop/sa/db".to_owned());
    let fields = [("ImpersonatedIdentity".to_owned(), prost_types::Value { kind: Some(wanted) })].into();
    other.request.as_mut().unwrap().metadata = Some(prost_types::Struct { fields });
    let traced = CertificateRequest {
        traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned(),
        ..alone(&last)
    };
    let asked = [&good, &alone("no CSR"), &other, &CertificateRequest::default(), &traced];
    let requests = CreateCertificatesRequest { requests: asked.into_iter().cloned().collect() };
    let answers = client.create_certificates(requests).await.unwrap().into_inner().answers;
    let told: Vec<_> = answers
        .into_iter()
        .map(|one| match one.answer.unwrap() {
            Answer::Granted(granted) => {
                let leaf = Certificate::all_from_pem(granted.cert_chain[0].as_bytes()).unwrap().remove(0);
                assert_eq!((granted.cert_chain.len(), leaf.uris[0].as_str()), (2, WEB));
                Ok(leaf.spki)
            }
            Answer::Refused(refused) => {
                let details = refused.encode_to_vec().into();
                Err(reason(&Status::with_details(refused.code.into(), refused.message, details)))
            }
        })
        .collect();
    let malformed = || Err("CSR_MALFORMED".to_owned());
    let denied = Err("IMPERSONATOR_UNKNOWN".to_owned());
    assert_eq!(told, [Ok(key(&first)), malformed(), denied, malformed(), Ok(key(&last))]);
    // Each has its line, and its place in the numbers.
    let log = mica.log();
    assert_eq!(log.matches("request refused").count(), 3, "{log}");
    assert_eq!(log.matches("4bf92f3577b34da6a3ce929d0e0e4736").count(), 1, "{log}");
    let granted = "mica_requests_granted_total{method=\"CreateCertificates\",authenticator=\"certificate\"}";
    assert_eq!((mica.metric(granted), mica.metric("citadel_server_csr_count")), (2.0, 5.0));

    let none = client.create_certificates(CreateCertificatesRequest::default()).await.unwrap().into_inner();
    assert_eq!(none.answers, []);
    let requests = CreateCertificatesRequest { requests: vec![good.clone(); 16] };
    let all = client.create_certificates(requests).await.unwrap().into_inner();
    assert!(all.answers.iter().all(|one| matches!(one.answer, Some(Answer::Granted(_)))), "{all:?}");
    let requests = CreateCertificatesRequest { requests: vec![good.clone(); 17] };
    let refused = client.create_certificates(requests).await.unwrap_err();
    assert!(refused.message().contains("17"), "{refused}");
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::InvalidArgument, "CSR_MALFORMED"));

    let mut nobody = AgentServiceClient::new(connect(&mica, &place, None).await);
    let before = mica.log().matches("NO_CREDENTIAL").count();
    let requests = CreateCertificatesRequest { requests: vec![good; 16] };
    let refused = nobody.create_certificates(requests).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unauthenticated, "NO_CREDENTIAL"));
    assert_eq!(mica.log().matches("NO_CREDENTIAL").count(), before + 1, "nobody is looked at sixteen times");
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_taken_by_go_spiffe_for_its_audience_and_until_it_expires() {
    let (place, mica) = start(&["--log-format", "json"]);
    let mut client = as_web(&mica, &place).await;
    let bundle = bundle(&mut client).await;
    let before = OffsetDateTime::now_utc().unix_timestamp();
    let granted = token(&mut client, &["db", "https://cache.example.org"]).await.unwrap();
    assert_eq!(granted.spiffe_id, WEB);
    let expires = granted.expires_at.unwrap().seconds;
    assert!((before + 300..=before + 360).contains(&expires), "{expires} {before}");

    let said = judged(&bundle.jwt_authorities, &granted.svid, "db").unwrap();
    assert_eq!(said, format!("id={WEB} audience=db,https://cache.example.org expiry={expires}"));
    let other = judged(&bundle.jwt_authorities, &granted.svid, "web").unwrap_err();
    assert!(other.contains("audience"), "{other}");
    let mut strange = keys(&bundle)[0].clone();
    strange["kid"] = "strange".into();
    let strange = json!({ "keys": [strange] }).to_string();
    assert!(judged(strange.as_bytes(), &granted.svid, "db").unwrap_err().contains("no JWT authority"));
    let mut cut = granted.svid.clone();
    cut.truncate(cut.len() - 4);
    assert!(judged(&bundle.jwt_authorities, &cut, "db").is_err());

    let header = part(&granted.svid, 0);
    assert_eq!(header, json!({"alg": "ES256", "kid": kids(&bundle)[0], "typ": "JWT"}));
    let claims = part(&granted.svid, 1);
    assert_eq!(claims["aud"], json!(["db", "https://cache.example.org"]));
    assert_eq!((&claims["sub"], &claims["exp"]), (&json!(WEB), &json!(expires)));

    // The log has all of it but the token.
    let log = mica.log();
    let line = log.lines().find(|line| line.contains("JWT-SVID issued")).expect("a line");
    let line: Value = serde_json::from_str(line).unwrap();
    let line = if line["fields"].is_object() { line["fields"].clone() } else { line };
    assert_eq!((&line["identity"], &line["audiences"]), (&json!(WEB), &json!(2)));
    assert_eq!((&line["kid"], &line["jti"]), (&header["kid"], &claims["jti"]));
    let signature = granted.svid.rsplit('.').next().unwrap();
    assert!(!log.contains(signature), "{log}");
    assert!(mica.metric("mica_jwt_svids_issued_total") >= 1.0);
    let one = "mica_requests_granted_total{method=\"CreateJwtSvid\",authenticator=\"certificate\"}";
    assert!(mica.metric(one) >= 1.0);
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ca_signs_no_token_and_the_keys_are_nobody_elses() {
    let (place, mica) = start(&[]);
    let mut client = as_web(&mica, &place).await;
    let bundle = bundle(&mut client).await;
    let root = Certificate::all_from_pem(place.root_pem().as_bytes()).unwrap().remove(0);
    assert_eq!(bundle.x509_authorities, [root.der().to_vec()]);
    for key in keys(&bundle) {
        assert_eq!(
            (&key["use"], &key["kty"], &key["crv"]),
            (&"jwt-svid".into(), &"EC".into(), &"P-256".into())
        );
        let point =
            ["x", "y"].map(|name| URL_SAFE_NO_PAD.decode(key[name].as_str().unwrap()).unwrap()).concat();
        assert!(!root.key().unwrap().bits().ends_with(&point));
        assert!(key.get("d").is_none());
    }
    let facts = fs::metadata(place.data().join(FILE)).unwrap();
    assert_eq!(facts.permissions().mode() & 0o777, 0o600);
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_refused_a_certificate_is_refused_the_rest() {
    let place = Place::new();
    for account in ["web", "db", "mute"] {
        place.account(account);
    }
    let file = place.root.path().join("policy.yaml");
    let policy =
        "accounts:\n  shop/db: {jwt: false}\n  shop/mute: {deny: true}\n  shop/web: {jwt_lifetime: 30s}\n";
    fs::write(&file, policy).unwrap();
    let mica = place.start(&["--policy", file.to_str().unwrap()]);
    let mut nobody = AgentServiceClient::new(connect(&mica, &place, None).await);
    let refusal = |status: Status, code: Code, wanted: &str| {
        assert_eq!((status.code(), reason(&status).as_str()), (code, wanted), "{status:?}");
    };
    refusal(token(&mut nobody, &["a"]).await.unwrap_err(), Code::Unauthenticated, "NO_CREDENTIAL");
    let unknown = nobody.watch_bundles(WatchBundlesRequest {}).await.unwrap_err();
    refusal(unknown, Code::Unauthenticated, "NO_CREDENTIAL");
    let unknown = nobody.report_holders(ReportHoldersRequest::default()).await.unwrap_err();
    refusal(unknown, Code::Unauthenticated, "NO_CREDENTIAL");

    let mut web = as_web(&mica, &place).await;
    let granted = token(&mut web, &["a"]).await.unwrap();
    let good = granted.expires_at.unwrap().seconds - OffsetDateTime::now_utc().unix_timestamp();
    assert!((20..=30).contains(&good), "{good}");
    for (audience, _why) in [
        (&[][..], "none"),
        (&["", "a"][..], "empty"),
        (&["spiffe://cluster.local"][..], "all"),
        (&["a"; 17][..], "many"),
    ] {
        let refused = token(&mut web, audience).await.unwrap_err();
        refusal(refused, Code::InvalidArgument, "AUDIENCE_REFUSED");
    }
    let request = CreateJwtSvidRequest {
        audience: vec!["a".to_owned()],
        impersonated_identity: "spiffe://cluster.local/ns/shop/sa/db".to_owned(),
    };
    let refused = web.create_jwt_svid(request).await.unwrap_err();
    refusal(refused, Code::Unauthenticated, "IMPERSONATOR_UNKNOWN");

    place.leaf("db");
    let mut db = AgentServiceClient::new(connect(&mica, &place, Some(&place.folder("shop", "db"))).await);
    refusal(token(&mut db, &["a"]).await.unwrap_err(), Code::PermissionDenied, "IDENTITY_DENIED");
    bundle(&mut db).await;
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_follows_the_bundles_hears_of_each_change_and_of_the_end() {
    let (place, brought) = (Place::new(), Brought::new());
    place.account("web");
    let folder = brought.intermediate("one", &P256, "30");
    let mica = place.start(&["--authority", folder.to_str().unwrap()]);
    let mut client = as_web(&mica, &place).await;
    let mut stream = watch(&mut client).await;
    let first = next(&mut stream).await.unwrap().unwrap();
    assert_eq!((first.bundles.len(), &first.renew_issued_before), (1, &None));
    assert_eq!(mica.metric("mica_bundle_watches"), 1.0);

    let before = OffsetDateTime::now_utc().unix_timestamp();
    brought.intermediate("two", &P256, "30");
    brought.put("two", &folder);
    let second = next(&mut stream).await.unwrap().unwrap();
    assert_eq!(second.bundles, first.bundles);
    let renew = second.renew_issued_before.unwrap().seconds;
    assert!((before..=OffsetDateTime::now_utc().unix_timestamp()).contains(&renew));

    // A stream is no request that has to be answered in time, and says that it ends.
    tokio::time::sleep(Duration::from_secs(32)).await;
    token(&mut client, &["a"]).await.unwrap();
    mica.signal("-TERM");
    assert_eq!(next(&mut stream).await.unwrap_err().code(), Code::Unavailable);
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_gone_hears_no_more_and_nobody_follows_too_often() {
    let (place, mica) = start(&[]);
    place.account("other");
    let mut client = as_web(&mica, &place).await;
    let mut streams = Vec::new();
    for _ in 0..64 {
        let mut stream = watch(&mut client).await;
        next(&mut stream).await.unwrap().unwrap();
        streams.push(stream);
    }
    let refused = client.watch_bundles(WatchBundlesRequest {}).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::ResourceExhausted, "TOO_MANY_WATCHES"));
    place.wait_for_account("other", Duration::from_secs(2));
    let folder = place.folder("shop", "other");
    let mut other = AgentServiceClient::new(connect(&mica, &place, Some(&folder)).await);
    bundle(&mut other).await;
    streams.truncate(1);
    wait_for(Duration::from_secs(10), "room again", || {
        (mica.metric("mica_bundle_watches") <= 2.0).then_some(())
    });

    fs::remove_file(place.source().join("web.yaml")).unwrap();
    let ended = async {
        while streams[0].message().await?.is_some() {}
        Ok::<_, Status>(())
    };
    let ended = tokio::time::timeout(Duration::from_secs(90), ended).await.expect("it ends").unwrap_err();
    assert_eq!((ended.code(), reason(&ended).as_str()), (Code::Unauthenticated, "ACCOUNT_GONE"));
    mica.stop();
}

/// Every number that is seen, each greater than the one before if something has changed, and never a smaller one.
#[tokio::test(flavor = "multi_thread")]
async fn the_bundles_number_grows_over_kills_restored_and_lost_states() {
    let (place, mica) = start(&[]);
    let file = place.data().join(FILE);
    let at = |mica: Mica| async {
        let bundle = bundle(&mut as_web(&mica, &place).await).await;
        (mica, bundle.sequence, kids(&bundle))
    };
    let (mica, first, kid) = at(mica).await;
    let now = u64::try_from(OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000).unwrap();
    assert!((now - 60_000..=now).contains(&first), "{first}");
    let backup = fs::read(&file).unwrap();
    mica.kill();
    let (mica, second, same) = at(place.start(&[])).await;
    assert!(second > first && kid == same, "{second} {first}");
    mica.kill();

    // What was restored is older than what was seen, and its number would be, too.
    fs::write(&file, &backup).unwrap();
    let (mica, third, same) = at(place.start(&[])).await;
    assert!(third > second && kid == same, "{third} {second}");
    mica.kill();

    for damage in ["", "garbage", "{}"] {
        fs::write(&file, damage).unwrap();
        let (mica, more, other) = at(place.start(&[])).await;
        assert!(more > third && other != kid, "{damage:?}");
        assert!(mica.log().contains("cannot be read: new ones are made"), "{}", mica.log());
        mica.kill();
    }
    // Keys that others may have read are not used again.
    let (mica, before, exposed) = at(place.start(&[])).await;
    mica.kill();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let (mica, after, other) = at(place.start(&[])).await;
    assert!(after > before && other != exposed);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    mica.stop();
}

fn edit(file: &Path, change: impl Fn(&mut Value)) {
    let mut state: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    change(&mut state);
    fs::write(file, state.to_string()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_published_before_it_signs_and_after() {
    let (place, mica) = start(&[]);
    let file = place.data().join(FILE);
    let mut client = as_web(&mica, &place).await;
    let old = kids(&bundle(&mut client).await);
    let signed = token(&mut client, &["a"]).await.unwrap().svid;
    mica.stop();
    let set_back = |hours: i64| {
        edit(&file, |state| {
            for key in state["keys"].as_array_mut().unwrap() {
                key["from"] = (key["from"].as_i64().unwrap() - hours * 3_600).into();
            }
        });
    };
    // Less than an hour before its day is over, the next one is published, and the one before signs.
    set_back(24);
    let mica = place.start(&[]);
    let mut client = as_web(&mica, &place).await;
    let prepared = bundle(&mut client).await;
    assert_eq!((kids(&prepared).len(), &kids(&prepared)[0]), (2, &old[0]));
    let kid = |token: &str| part(token, 0)["kid"].as_str().unwrap().to_owned();
    assert_eq!(kid(&token(&mut client, &["a"]).await.unwrap().svid), old[0]);
    mica.stop();
    // An hour later it signs, and what the one before has signed is still taken.
    set_back(1);
    let mica = place.start(&[]);
    let mut client = as_web(&mica, &place).await;
    let active = bundle(&mut client).await;
    assert_eq!(kids(&active), kids(&prepared));
    let new = token(&mut client, &["a"]).await.unwrap().svid;
    assert_eq!(kid(&new), kids(&prepared)[1]);
    for token in [&signed, &new] {
        judged(&active.jwt_authorities, token, "a").unwrap();
    }
    mica.stop();
    // When nothing of it can be good any more, it goes.
    set_back(48);
    let mica = place.start(&[]);
    let mut client = as_web(&mica, &place).await;
    let later = bundle(&mut client).await;
    assert!(!kids(&later).contains(&old[0]) && later.sequence > active.sequence);
    assert!(judged(&later.jwt_authorities, &signed, "a").is_err());
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn reports_say_who_holds_which_bundle() {
    let (place, mica) = start(&[]);
    let mut client = as_web(&mica, &place).await;
    let own = bundle(&mut client).await;
    let roots = own.x509_authorities.iter().map(|der| Certificate::from_der(der).unwrap()).collect();
    let current = Published { x509: roots, ..Published::default() }.x509_digest();
    let line = |identity: &str, bundle: &[u8], acknowledged, given| Holder {
        identity: identity.to_owned(),
        trust_domain: "cluster.local".to_owned(),
        bundle: bundle.to_vec(),
        acknowledged,
        given,
    };
    let report = |reporter: &str, holders: Vec<Holder>| ReportHoldersRequest {
        holders,
        reporter: reporter.to_owned(),
    };
    let count = |holds: &str, how: &str| {
        mica.metric(&format!("mica_bundle_holders{{holds=\"{holds}\",how=\"{how}\"}}"))
    };
    client
        .report_holders(report("a", vec![line(WEB, &current, 2, 1), line(WEB, &[7; 32], 1, 0)]))
        .await
        .unwrap();
    client.report_holders(report("b", vec![line(WEB, &current, 3, 0)])).await.unwrap();
    assert_eq!((count("current", "acknowledged"), count("current", "given")), (5.0, 1.0));
    assert_eq!((count("other", "acknowledged"), mica.metric("mica_bundle_reporters")), (1.0, 2.0));
    // It replaces.
    client.report_holders(report("a", vec![line(WEB, &current, 3, 1)])).await.unwrap();
    assert_eq!((count("current", "acknowledged"), count("other", "acknowledged")), (6.0, 0.0));
    // Bundles of others are theirs to follow.
    let foreign = Holder { trust_domain: "example.org".to_owned(), ..line(WEB, &[1], 9, 9) };
    client.report_holders(report("b", vec![foreign])).await.unwrap();
    assert_eq!(count("current", "acknowledged"), 3.0);
    for (bad, code) in [
        (
            report("c", vec![line("spiffe://cluster.local/ns/shop/sa/db", &current, 1, 1)]),
            "IMPERSONATOR_UNKNOWN",
        ),
        (report("c", vec![line("spiffe://cluster.local/x", &current, 1, 1)]), "REPORT_MALFORMED"),
        (report("c", vec![line(WEB, &[1], 1, 1)]), "REPORT_MALFORMED"),
        (report("c", vec![line(WEB, &current, 1, 1); 17]), "REPORT_MALFORMED"),
        (report(&"c".repeat(65), Vec::new()), "REPORT_MALFORMED"),
    ] {
        assert_eq!(reason(&client.report_holders(bad).await.unwrap_err()), code);
    }
    assert_eq!(mica.metric("mica_bundle_reporters"), 1.0);
    mica.stop();
}
