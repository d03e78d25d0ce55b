//! The rules of the SPIFFE standards that an agent has to keep, by the numbers of Mica's checklist of them: JWT-SVID (30
//! to 37, on the side that validates), Workload Endpoint (50 to 55), Workload API (56 to 69). The section of the standard
//! stands with each. Asked over the socket of a real agent, beside a real authority.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;
use mica::core::chain;
use mica::core::key::PrivateKey;
use mica::core::token::jwks::KeySet;
use mica::proto::spiffe::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use mica::proto::spiffe::{
    JwtBundlesRequest, Jwtsvid, JwtsvidRequest, ValidateJwtsvidRequest, ValidateJwtsvidResponse,
    WitBundlesRequest, WitsvidRequest, X509BundlesRequest, X509svidRequest, X509svidResponse,
};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use super::{Agent, command, start, token};
use crate::parts;
use crate::serve::{Mica, Place, wait_for};

const ONE: &str = "spiffe://cluster.local/ns/shop/sa/server";
const OTHER: &str = "spiffe://cluster.local/ns/shop/sa/client";
const THEIRS: &str = "spiffe://cluster.local/ns/shop/sa/theirs";
const DOMAIN: &str = "spiffe://cluster.local";
const SOON: Duration = Duration::from_secs(20);

const NUMBERS: [&str; 34] = [
    "30", "31", "32", "33", "34", "35", "36", "36b", "37", "50", "51", "52", "53", "54", "54b", "55", "56",
    "57", "58", "59", "59b", "60", "61", "62", "63", "64", "65", "66", "67a", "67b", "67c", "68", "69a",
    "69b",
];

type Rule = (&'static str, &'static str, fn(&World));

/// Number, what it asks, and how Mica keeps it.
const RULES: &[Rule] = &[
    ("30", "a JWT-SVID is in the compact form [JWT-SVID 1, 5.1]", |world| {
        let svid = world.token(&["me"]);
        let parts: Vec<&str> = svid.svid.split('.').collect();
        let [header, payload, signature] = parts[..] else { panic!("{} parts", parts.len()) };
        let json = json!({"protected": header, "payload": payload, "signature": signature}).to_string();
        for other in
            [json, format!("{}.", svid.svid), format!("{header}.{payload}"), format!("{header}.{payload}.")]
        {
            assert_eq!(world.validated("me", &other).unwrap_err().code(), Code::InvalidArgument, "{other}");
        }
    }),
    ("31", "of the algorithms RS, ES and PS, before anything else [JWT-SVID 2.1, 4]", |world| {
        let svid = world.token(&["me"]).svid;
        assert_eq!(part(&svid, 0)["alg"], "ES256");
        for algorithm in ["none", "HS256", "HS512", "EdDSA", "es256", "ES256K", ""] {
            let fault = world.refused_with(&svid, 0, "alg", json!(algorithm));
            assert!(fault.contains("algorithm"), "{algorithm}: {fault}");
        }
        assert!(world.refused_with(&svid, 0, "alg", Value::Null).contains("no alg"));
    }),
    ("32", "no header but alg, kid and typ, which is JWT or JOSE [JWT-SVID 2]", |world| {
        let svid = world.token(&["me"]).svid;
        for (name, value) in [
            ("jku", json!("https://example.org")),
            ("x5c", json!([])),
            ("crit", json!(["exp"])),
            ("cty", json!("JWT")),
            ("typ", json!("jwt")),
            ("typ", json!("at+jwt")),
        ] {
            let fault = world.refused_with(&svid, 0, name, value);
            assert!(fault.contains("header"), "{name}: {fault}");
        }
    }),
    ("33", "sub is the SPIFFE ID [JWT-SVID 3.1]", |world| {
        let svid = world.token(&["me"]);
        assert_eq!(part(&svid.svid, 1)["sub"], ONE);
        assert_eq!(svid.spiffe_id, ONE);
        for sub in [json!("me"), json!(DOMAIN), json!([ONE]), Value::Null] {
            assert!(world.refused_with(&svid.svid, 1, "sub", sub.clone()).contains("sub"), "{sub}");
        }
    }),
    ("34", "aud has a value, and the validator's own one [JWT-SVID 3.2]", |world| {
        let svid = world.token(&["me", "you"]).svid;
        let audience = part(&svid, 1)["aud"].clone();
        assert_eq!(audience, json!(["me", "you"]));
        assert!(world.validated("me", &svid).is_ok() && world.validated("you", &svid).is_ok());
        assert!(world.validated("them", &svid).unwrap_err().message().contains("them"));
        assert!(world.validated("Me", &svid).is_err());
    }),
    ("35", "exp is there, and not over [JWT-SVID 3.3, 4]", |world| {
        let svid = world.token(&["me"]).svid;
        let exp = part(&svid, 1)["exp"].as_i64().expect("a number");
        assert!(exp > OffsetDateTime::now_utc().unix_timestamp());
        // What is changed in it does not fit the signature any more; core::jwt_svid::validate has tables of what does.
        for exp in [Value::Null, json!("later"), json!(1)] {
            assert!(world.refused_with(&svid, 1, "exp", exp).contains("signature"));
        }
    }),
    (
        "36",
        "keys of JWT-SVIDs are of use jwt-svid and have a kid; others are passed over [JWT-SVID 6]",
        |world| {
            let svid = world.token(&["me"]).svid;
            for (domain, set) in world.jwt_bundles() {
                let keys: Value = serde_json::from_slice(&set).expect("JSON");
                for key in keys["keys"].as_array().expect("keys") {
                    assert_eq!(key["use"], "jwt-svid", "{domain}");
                    assert!(key["kid"].is_string(), "{domain}");
                }
            }
            let kid = part(&svid, 0)["kid"].clone();
            let own = String::from_utf8(world.jwt_bundles().remove(DOMAIN).expect("its own")).expect("text");
            assert!(own.contains(kid.as_str().expect("a text")));
            for other in ["x509-svid", "wit-svid", "sig"] {
                let set = own.replace("jwt-svid", other);
                assert!(KeySet::of_svids(set.as_bytes()).is_err(), "{other}");
            }
        },
    ),
    ("36b", "no audience as wide as the trust domain [JWT-SVID 3.2]", |world| {
        let refused = world.tokens(&[DOMAIN], "").unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }),
    ("37", "a token is for a header of one line [JWT-SVID 5.2, 5.3]", |world| {
        let svid = world.token(&["me"]).svid;
        assert!(svid.bytes().all(|byte| byte.is_ascii_graphic()));
        assert!(format!("Bearer {svid}").parse::<tonic::metadata::AsciiMetadataValue>().is_ok());
    }),
    ("50", "gRPC, local only [SPIFFE_Workload_Endpoint 2, 3]", |world| {
        assert!(fs::metadata(&world.socket).expect("it is there").file_type().is_socket());
        let (status, _) = world.agent.page("/SpiffeWorkloadAPI/FetchX509SVID");
        assert_eq!(status, 404, "the HTTP port knows nothing of it");
    }),
    ("51", "workload.spiffe.io: true, or InvalidArgument [SPIFFE_Workload_Endpoint 3, 6]", |world| {
        for values in [
            &[][..],
            &["True"],
            &["TRUE"],
            &["1"],
            &[""],
            &["false"],
            &["true", "true"],
            &["true", "x"],
            &["true,true"],
        ] {
            for (method, code) in world.all(&world.socket, values) {
                assert_eq!(code, Code::InvalidArgument, "{method} with {values:?}");
            }
        }
        let right = world.all(&world.socket, &["true"]);
        assert!(right.values().all(|code| *code != Code::InvalidArgument), "{right:?}");
    }),
    ("52", "neither TLS nor a credential is needed [SPIFFE_Workload_Endpoint 3.1, 5]", |world| {
        assert_eq!(world.svids().svids.len(), 2, "over a plain connection, without anything");
    }),
    ("53", "found by SPIFFE_ENDPOINT_SOCKET=unix:///path [SPIFFE_Workload_Endpoint 4]", |world| {
        let mut asked = Command::new(parts::go_spiffe())
            .args(["workload", "--audience", "me"])
            .arg(&world.socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("go-spiffe runs");
        let status = wait_for(SOON, "go-spiffe's end", || asked.try_wait().expect("it runs"));
        assert!(status.success(), "go-spiffe takes the address");
    }),
    ("54", "Unavailable, PermissionDenied or Unimplemented [SPIFFE_Workload_Endpoint 6]", |world| {
        // An authority that does not answer.
        let mut early = world.command("early");
        early.args(["--authority-address", "127.0.0.1:1"]).arg("--token-file").arg(&world.token_file);
        let _early = start(&world.place, "early", &mut early);
        for (method, code) in world.all(&world.socket_of("early"), &["true"]) {
            let wanted = if method.contains("WIT") { Code::Unimplemented } else { Code::Unavailable };
            assert_eq!(code, wanted, "{method}");
        }
        let unknown = world.run(async {
            let mut client = tonic::client::Grpc::new(channel(&world.socket).await);
            client.ready().await.expect("a connection");
            let codec = tonic_prost::ProstCodec::<X509svidRequest, X509svidResponse>::default();
            let path = http::uri::PathAndQuery::from_static("/SpiffeWorkloadAPI/FetchMore");
            client.unary(with_header(X509svidRequest {}, &["true"]), path, codec).await.map(drop)
        });
        assert_eq!(unknown.unwrap_err().code(), Code::Unimplemented);
    }),
    ("54b", "the Workload API is on the endpoint [SPIFFE_Workload_Endpoint 7]", |world| {
        assert_eq!(world.first(&world.socket).expect("an answer").svids[0].spiffe_id, ONE);
    }),
    (
        "55",
        "no methods of one's own in it; reflection tells what there is [SPIFFE_Workload_Endpoint 7]",
        |world| {
            assert_eq!(methods().len(), 7);
            let output = Command::new(parts::grpcurl())
                .args(["-plaintext", "-unix"])
                .arg(&world.socket)
                .args(["list", "SpiffeWorkloadAPI"])
                .output()
                .expect("grpcurl runs");
            let told = String::from_utf8_lossy(&output.stdout).into_owned();
            let mut told: Vec<&str> =
                told.lines().filter_map(|line| line.strip_prefix("SpiffeWorkloadAPI.")).collect();
            told.sort_unstable();
            let mut known: Vec<String> = methods().into_keys().collect();
            known.sort();
            assert_eq!(told, known, "{}", String::from_utf8_lossy(&output.stderr));
        },
    ),
    ("56", "the service has no package, and these methods [SPIFFE_Workload_API, workloadapi.proto]", |_| {
        let wanted = [
            ("FetchX509SVID", true),
            ("FetchX509Bundles", true),
            ("FetchJWTSVID", false),
            ("FetchJWTBundles", true),
            ("ValidateJWTSVID", false),
            ("FetchWITSVID", true),
            ("FetchWITBundles", true),
        ];
        let wanted = wanted.into_iter().map(|(name, streams)| (name.to_owned(), streams));
        assert_eq!(methods(), wanted.collect());
    }),
    ("57", "X.509 and JWT; WIT is Unimplemented [SPIFFE_Workload_API 1, 7]", |world| {
        for (method, code) in world.all(&world.socket, &["true"]) {
            let wanted = if method.contains("WIT") { Code::Unimplemented } else { Code::Ok };
            assert_eq!(code, wanted, "{method}");
        }
    }),
    ("58", "each response is all that there is, the first at once [SPIFFE_Workload_API 4.3]", |world| {
        // What is held is there in much less time than anything could be asked for; the bound is a generous one.
        let begun = std::time::Instant::now();
        let mut stream = world.stream(&world.socket);
        let first = world.next(&mut stream).expect("a response").expect("the stream goes on");
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        let second = world.next(&mut stream).expect("a response").expect("the stream goes on");
        let ids = |response: &X509svidResponse| -> Vec<String> {
            response.svids.iter().map(|svid| svid.spiffe_id.clone()).collect()
        };
        assert_eq!(ids(&first), ids(&second), "both, though only one of them was renewed");
        assert_ne!(first, second);
        for svid in second.svids {
            assert!(!svid.x509_svid.is_empty() && !svid.x509_svid_key.is_empty() && !svid.bundle.is_empty());
        }
    }),
    ("59", "what is not in a response is taken back; all of it by PermissionDenied [4.4, 5.2.1]", |world| {
        let mut agent = world.command("redacted");
        let file = world.place.root.path().join("redacted.yaml");
        fs::write(&file, world.workloads()).expect("it is written");
        agent.arg("--token-file").arg(&world.token_file).arg("--workloads").arg(&file);
        let _agent = start(&world.place, "redacted", &mut agent);
        let socket = world.socket_of("redacted");
        let mut stream = world.stream(&socket);
        let both = world.next(&mut stream).expect("a response").expect("the stream goes on");
        assert_eq!(both.svids.len(), 2);
        let mut bundles = world.run(async {
            let request = with_header(X509BundlesRequest {}, &["true"]);
            client(&socket).await.fetch_x509_bundles(request).await.expect("a stream").into_inner()
        });
        assert!(world.next(&mut bundles).expect("a response").is_some());

        let one = format!("workloads:\n- identity: {OTHER}\n  match: {{ uid: {} }}\n", ours());
        fs::write(&file, one).expect("it is written");
        loop {
            let less = world.next(&mut stream).expect("a response").expect("the stream goes on");
            if less.svids.len() == 1 {
                assert_eq!(less.svids[0].spiffe_id, OTHER);
                break;
            }
        }
        fs::write(&file, "workloads: []").expect("it is written");
        let ended = loop {
            match world.next(&mut stream) {
                Ok(more) => assert!(more.is_some(), "it ends with a reason"),
                Err(status) => break status,
            }
        };
        assert_eq!(ended.code(), Code::PermissionDenied);
        let ended = loop {
            match world.next(&mut bundles) {
                Ok(more) => assert!(more.is_some(), "it ends with a reason"),
                Err(status) => break status,
            }
        };
        assert_eq!(ended.code(), Code::PermissionDenied);
    }),
    ("59b", "no mandatory field is empty [SPIFFE_Workload_API 4.4, 4.5]", |world| {
        for svid in world.svids().svids {
            assert!(!svid.spiffe_id.is_empty() && !svid.x509_svid.is_empty());
            assert!(!svid.x509_svid_key.is_empty() && !svid.bundle.is_empty());
        }
        for svid in world.tokens(&["me"], "").expect("tokens") {
            assert!(!svid.spiffe_id.is_empty() && !svid.svid.is_empty());
        }
        assert!(world.x509_bundles().values().chain(world.jwt_bundles().values()).all(|it| !it.is_empty()));
    }),
    (
        "60",
        "a request without what it has to have is an InvalidArgument [SPIFFE_Workload_API 4.5]",
        |world| {
            for audience in [&[][..], &[""], &["me", ""]] {
                assert_eq!(
                    world.tokens(audience, "").unwrap_err().code(),
                    Code::InvalidArgument,
                    "{audience:?}"
                );
            }
            let svid = world.token(&["me"]).svid;
            for (audience, svid) in [("", svid.as_str()), ("me", ""), ("", "")] {
                assert_eq!(world.validated(audience, svid).unwrap_err().code(), Code::InvalidArgument);
            }
        },
    ),
    (
        "61",
        "each X509-SVID with its chain, its key and what it leads to, the default one first [5.2.1, 8]",
        |world| {
            let response = world.svids();
            assert_eq!(
                response.svids.iter().map(|svid| svid.spiffe_id.as_str()).collect::<Vec<_>>(),
                [ONE, OTHER]
            );
            assert!(response.crl.is_empty());
            assert!(!response.federated_bundles.contains_key(DOMAIN), "its own is with each SVID");
            for svid in response.svids {
                let chain = certificates(&svid.x509_svid);
                let roots = TrustBundle::new(certificates(&svid.bundle)).expect("roots");
                chain::verify(&chain, &roots, None, OffsetDateTime::now_utc()).expect("it leads to a root");
                assert_eq!(chain[0].spiffe_id().expect("an ID").as_str(), svid.spiffe_id);
                let key = PrivateKey::from_pkcs8(&svid.x509_svid_key, None).expect("PKCS#8, in the clear");
                assert_eq!(key.public().spki(), chain[0].spki, "its own key");
            }
        },
    ),
    ("62", "hints are unique, and short [SPIFFE_Workload_API 5.2.1, 8]", |world| {
        let hints: Vec<String> = world.svids().svids.into_iter().map(|svid| svid.hint).collect();
        assert_eq!(hints, ["internal", "external"]);
        let hints: Vec<String> =
            world.tokens(&["me"], "").expect("tokens").into_iter().map(|it| it.hint).collect();
        assert_eq!(hints, ["internal", "external"]);
    }),
    ("63", "bundles by SPIFFE ID, its own among them [SPIFFE_Workload_API 5.2.2]", |world| {
        let bundles = world.x509_bundles();
        let own = TrustBundle::new(certificates(&bundles[DOMAIN])).expect("roots");
        let given = TrustBundle::from_pem(world.place.root_pem().as_bytes()).expect("roots");
        assert!(own.same_roots(&given));
        assert!(bundles.keys().all(|id| id.starts_with("spiffe://")));
    }),
    ("64", "PermissionDenied for whoever is not entitled, by each method [5.2.1 to 6.2.2]", |world| {
        let mut agent = world.command("strangers");
        let file = world.place.root.path().join("strangers.yaml");
        let text = format!("workloads:\n- identity: {THEIRS}\n  match: {{ uid: {} }}\n", ours() + 4711);
        fs::write(&file, text).expect("it is written");
        agent.arg("--token-file").arg(&world.token_file).arg("--workloads").arg(&file);
        let agent = start(&world.place, "strangers", &mut agent);
        for (method, code) in world.all(&world.socket_of("strangers"), &["true"]) {
            let wanted = if method.contains("WIT") { Code::Unimplemented } else { Code::PermissionDenied };
            assert_eq!(code, wanted, "{method}");
        }
        assert!(agent.log().contains("caller refused"), "and the log says why");
    }),
    ("65", "a JWT-SVID for each identity, or for the one that is asked for [6.2.1]", |world| {
        let ids = |svids: Vec<Jwtsvid>| svids.into_iter().map(|it| it.spiffe_id).collect::<Vec<_>>();
        assert_eq!(ids(world.tokens(&["me"], "").expect("tokens")), [ONE, OTHER]);
        assert_eq!(ids(world.tokens(&["me"], OTHER).expect("a token")), [OTHER]);
        assert_eq!(world.tokens(&["me"], THEIRS).unwrap_err().code(), Code::PermissionDenied);
        assert_eq!(world.tokens(&["me"], "theirs").unwrap_err().code(), Code::InvalidArgument);
    }),
    ("66", "JWT bundles by SPIFFE ID, its own among them [SPIFFE_Workload_API 6.2.2]", |world| {
        let bundles = world.jwt_bundles();
        assert!(KeySet::of_svids(&bundles[DOMAIN]).is_ok());
        assert!(bundles.keys().all(|id| id.starts_with("spiffe://")));
    }),
    ("67a", "a validated JWT-SVID says whose it is, and its claims [6.2.3]", |world| {
        let svid = world.token(&["me"]);
        let told = world.validated("me", &svid.svid).expect("it is sound");
        assert_eq!(told.spiffe_id, ONE);
        let claims = told.claims.expect("claims").fields;
        let names: Vec<&str> = claims.keys().map(String::as_str).collect();
        for name in ["aud", "exp", "sub"] {
            assert!(names.contains(&name), "{names:?}");
        }
    }),
    ("67b", "and one that is none is refused [6.2.3]", |world| {
        let svid = world.token(&["me"]).svid;
        let (message, signature) = svid.rsplit_once('.').expect("three parts");
        let mut bytes = URL_SAFE_NO_PAD.decode(signature).expect("base64url");
        bytes[10] ^= 1;
        let broken = format!("{message}.{}", URL_SAFE_NO_PAD.encode(bytes));
        let refused = world.validated("me", &broken).unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains("signature"), "{refused}");
    }),
    ("67c", "with the bundle of its subject's trust domain [6.3]", |world| {
        let svid = world.token(&["me"]).svid;
        let fault = world.refused_with(&svid, 1, "sub", json!("spiffe://example.org/a"));
        assert!(fault.contains("example.org"), "{fault}");
    }),
    ("68", "bundles of one type have nothing of another [5.2.2, 6.2.2]", |world| {
        for (domain, roots) in world.x509_bundles() {
            assert!(certificates(&roots).iter().all(|root| root.signing_faults().is_empty()), "{domain}");
        }
        for (domain, set) in world.jwt_bundles() {
            let set: Value = serde_json::from_slice(&set).expect("JSON");
            let keys = set["keys"].as_array().expect("keys");
            assert!(keys.iter().all(|key| key.get("x5c").is_none()), "{domain}");
        }
    }),
    ("69a", "a stream that stays open stays served [4.2]", |world| {
        let mut stream = world.stream(&world.socket);
        for _ in 0..3 {
            assert!(world.next(&mut stream).expect("a response").is_some());
        }
    }),
    ("69b", "whoever comes back at once is served at once [4.2]", |world| {
        for _ in 0..20 {
            assert_eq!(world.first(&world.socket).expect("an answer").svids.len(), 2);
        }
    }),
];

#[test]
fn every_rule_is_kept() {
    let numbers: Vec<&str> = RULES.iter().map(|(number, ..)| *number).collect();
    assert_eq!(numbers, NUMBERS, "a rule is missing, or there twice");
    let world = World::begin();
    let mut broken = Vec::new();
    for (number, what, check) in RULES {
        if catch_unwind(AssertUnwindSafe(|| check(&world))).is_err() {
            broken.push(format!("{number}: {what}"));
        }
    }
    assert!(broken.is_empty(), "broken, see above:\n{}\n{}", broken.join("\n"), world.agent.log());
}

/// An authority, and an agent that has two identities for us and one for somebody else.
struct World {
    runtime: RefCell<Runtime>,
    agent: Agent,
    socket: PathBuf,
    token_file: PathBuf,
    other_token_file: PathBuf,
    mica: Mica,
    place: Place,
}

impl World {
    fn begin() -> Self {
        let place = Place::new();
        for name in ["server", "client", "theirs"] {
            place.account(name);
        }
        let mica = place.start(&["--ttl", "10s", "--trial-tokens"]);
        let (token_file, other_token_file) = (token(&place, "shop/server"), token(&place, "shop/client"));
        let socket = place.root.path().join("agent.sock");
        let file = place.root.path().join("workloads.yaml");
        fs::write(&file, workloads(&other_token_file)).expect("it is written");
        let mut command = command(&place, &mica);
        command
            .arg("--socket")
            .arg(&socket)
            .arg("--token-file")
            .arg(&token_file)
            .arg("--workloads")
            .arg(&file);
        let agent = start(&place, "agent", &mut command);
        let runtime = RefCell::new(Runtime::new().expect("a runtime"));
        Self { runtime, agent, socket, token_file, other_token_file, mica, place }
    }

    fn workloads(&self) -> String {
        workloads(&self.other_token_file)
    }

    fn socket_of(&self, name: &str) -> PathBuf {
        self.place.root.path().join(format!("{name}.sock"))
    }

    /// Another agent, with a socket of its own.
    fn command(&self, name: &str) -> Command {
        let mut command = command(&self.place, &self.mica);
        if name == "early" {
            command = Command::new(env!("CARGO_BIN_EXE_mica"));
            command.args(["agent", "--http-address", "127.0.0.1:0", "--log-format", "human"]);
            command
                .arg("--authority-roots")
                .arg(self.place.data().join("root-cert.pem"))
                .stdin(Stdio::null());
        }
        command.arg("--socket").arg(self.socket_of(name));
        command
    }

    fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.borrow().block_on(async { timeout(SOON * 3, work).await.expect("an end") })
    }

    fn stream(&self, socket: &Path) -> Streaming<X509svidResponse> {
        self.run(async {
            let request = with_header(X509svidRequest {}, &["true"]);
            client(socket).await.fetch_x509svid(request).await.expect("a stream").into_inner()
        })
    }

    fn next<T>(&self, stream: &mut Streaming<T>) -> Result<Option<T>, Status> {
        self.run(async { timeout(SOON, stream.message()).await.expect("a response in time") })
    }

    fn first(&self, socket: &Path) -> Result<X509svidResponse, Status> {
        let mut stream = self.stream(socket);
        self.next(&mut stream).map(|response| response.expect("the stream goes on"))
    }

    fn svids(&self) -> X509svidResponse {
        self.first(&self.socket).expect("an answer")
    }

    fn tokens(&self, audience: &[&str], spiffe_id: &str) -> Result<Vec<Jwtsvid>, Status> {
        let audience = audience.iter().map(|one| (*one).to_owned()).collect();
        let request = with_header(JwtsvidRequest { audience, spiffe_id: spiffe_id.to_owned() }, &["true"]);
        self.run(async { Ok(client(&self.socket).await.fetch_jwtsvid(request).await?.into_inner().svids) })
    }

    fn token(&self, audience: &[&str]) -> Jwtsvid {
        self.tokens(audience, ONE).expect("a token").remove(0)
    }

    fn validated(&self, audience: &str, svid: &str) -> Result<ValidateJwtsvidResponse, Status> {
        let request = ValidateJwtsvidRequest { audience: audience.to_owned(), svid: svid.to_owned() };
        let request = with_header(request, &["true"]);
        self.run(async { Ok(client(&self.socket).await.validate_jwtsvid(request).await?.into_inner()) })
    }

    /// Why a token is refused of which one member was changed.
    fn refused_with(&self, svid: &str, at: usize, name: &str, value: Value) -> String {
        let mut changed = part(svid, at);
        match value {
            Value::Null => drop(changed.as_object_mut().expect("an object").remove(name)),
            value => changed[name] = value,
        }
        let mut parts: Vec<String> = svid.split('.').map(str::to_owned).collect();
        parts[at] = URL_SAFE_NO_PAD.encode(changed.to_string());
        let refused = self.validated("me", &parts.join(".")).expect_err("it was changed");
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        refused.message().to_owned()
    }

    fn x509_bundles(&self) -> BTreeMap<String, Vec<u8>> {
        self.run(async {
            let request = with_header(X509BundlesRequest {}, &["true"]);
            let stream = client(&self.socket).await.fetch_x509_bundles(request).await;
            let told = stream.expect("a stream").into_inner().message().await.expect("a response");
            told.expect("the stream goes on").bundles.into_iter().collect()
        })
    }

    fn jwt_bundles(&self) -> BTreeMap<String, Vec<u8>> {
        self.run(async {
            let request = with_header(JwtBundlesRequest {}, &["true"]);
            let stream = client(&self.socket).await.fetch_jwt_bundles(request).await;
            let told = stream.expect("a stream").into_inner().message().await.expect("a response");
            told.expect("the stream goes on").bundles.into_iter().collect()
        })
    }

    /// What each method answers.
    fn all(&self, socket: &Path, header: &[&str]) -> BTreeMap<&'static str, Code> {
        async fn first<T>(stream: Result<tonic::Response<Streaming<T>>, Status>) -> Code {
            match stream {
                Ok(stream) => {
                    stream.into_inner().message().await.map_or_else(|fault| fault.code(), |_| Code::Ok)
                }
                Err(fault) => fault.code(),
            }
        }
        let svid = if header == ["true"] && socket == self.socket {
            self.token(&["me"]).svid
        } else {
            "x".to_owned()
        };
        self.run(async {
            let (mut one, mut two, mut three) =
                (client(socket).await, client(socket).await, client(socket).await);
            let (mut four, mut five) = (client(socket).await, client(socket).await);
            let (mut six, mut seven) = (client(socket).await, client(socket).await);
            let token = JwtsvidRequest { audience: vec!["me".to_owned()], spiffe_id: String::new() };
            let judged = ValidateJwtsvidRequest { audience: "me".to_owned(), svid };
            let unary = |answer: Result<(), Status>| answer.map_or_else(|fault| fault.code(), |()| Code::Ok);
            let (a, b, c, d, e, f, g) = tokio::join!(
                async { first(one.fetch_x509svid(with_header(X509svidRequest {}, header)).await).await },
                async {
                    first(two.fetch_x509_bundles(with_header(X509BundlesRequest {}, header)).await).await
                },
                async { unary(three.fetch_jwtsvid(with_header(token, header)).await.map(drop)) },
                async {
                    first(four.fetch_jwt_bundles(with_header(JwtBundlesRequest {}, header)).await).await
                },
                async { unary(five.validate_jwtsvid(with_header(judged, header)).await.map(drop)) },
                async { first(six.fetch_witsvid(with_header(WitsvidRequest {}, header)).await).await },
                async {
                    first(seven.fetch_wit_bundles(with_header(WitBundlesRequest {}, header)).await).await
                },
            );
            BTreeMap::from([
                ("FetchX509SVID", a),
                ("FetchX509Bundles", b),
                ("FetchJWTSVID", c),
                ("FetchJWTBundles", d),
                ("ValidateJWTSVID", e),
                ("FetchWITSVID", f),
                ("FetchWITBundles", g),
            ])
        })
    }
}

fn workloads(other: &Path) -> String {
    format!(
        "workloads:
- identity: {ONE}
  hint: internal
  match: {{ uid: {us} }}
- identity: {OTHER}
  hint: external
  match: {{ uid: {us} }}
  tokenFile: {}
- identity: {THEIRS}
  match: {{ uid: {} }}
",
        other.display(),
        ours() + 4711,
        us = ours(),
    )
}

fn ours() -> u32 {
    rustix::process::geteuid().as_raw()
}

async fn channel(socket: &Path) -> Channel {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).expect("an address");
    endpoint.connect().await.expect("a connection")
}

pub(super) async fn client(socket: &Path) -> SpiffeWorkloadApiClient<Channel> {
    SpiffeWorkloadApiClient::new(channel(socket).await)
}

pub(super) fn with_header<T>(message: T, values: &[&str]) -> Request<T> {
    let mut request = Request::new(message);
    for value in values {
        request.metadata_mut().append("workload.spiffe.io", value.parse().expect("a value"));
    }
    request
}

fn part(token: &str, at: usize) -> Value {
    let part = token.split('.').nth(at).expect("three parts");
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).expect("base64url")).expect("JSON")
}

/// One DER behind the other.
pub(super) fn certificates(mut ders: &[u8]) -> Vec<Certificate> {
    let mut all = Vec::new();
    while !ders.is_empty() {
        let (rest, _) = x509_parser::parse_x509_certificate(ders).expect("a certificate");
        all.push(Certificate::from_der(&ders[..ders.len() - rest.len()]).expect("a certificate"));
        ders = rest;
    }
    all
}

/// The service's methods, and whether they answer in streams.
fn methods() -> BTreeMap<String, bool> {
    let set = FileDescriptorSet::decode(mica::proto::LOCAL_DESCRIPTORS).expect("descriptors");
    let file = set.file.iter().find(|file| file.service.iter().any(|it| it.name() == "SpiffeWorkloadAPI"));
    let file = file.expect("the service");
    assert_eq!(file.package(), "");
    let service = file.service.iter().find(|it| it.name() == "SpiffeWorkloadAPI").expect("the service");
    service.method.iter().map(|method| (method.name().to_owned(), method.server_streaming())).collect()
}
