//! Bundles of this and of other trust domains over HTTPS: go-spiffe fetches Mica's, Mica fetches go-spiffe's, and two Micas
//! fetch each other's.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use mica::proto::mica::v1::agent_service_client::AgentServiceClient;
use mica::proto::mica::v1::{Bundle, WatchBundlesRequest};
use serde_json::{Value, json};

use super::mtls::connect;
use super::{Mica, Place, output_within, wait_for};
use crate::fixtures::run;
use crate::parts;

const ENDPOINT: &str = "spiffe://cluster.local/mica/bundle-endpoint";
const FOREIGN: &str = "spiffe://example.org/ns/a/sa/b";
const SOON: Duration = Duration::from_secs(20);

fn start(place: &Place, arguments: &[&str]) -> Mica {
    place.account("web");
    place.start(&[&["--bundle-address", "127.0.0.1:0"], arguments].concat())
}

fn url(mica: &Mica) -> String {
    let address = mica.address("bundle");
    format!("https://localhost:{}/", address.rsplit(':').next().unwrap())
}

/// go-spiffe's client.
fn fetched(url: &str, arguments: &[&str]) -> Result<Value, String> {
    let mut command = Command::new(parts::go_spiffe());
    command.args(["federate", "--trust-domain", "cluster.local", url]).args(arguments);
    let output = output_within(&mut command, Duration::from_secs(20));
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// What every agent of a Mica hears of.
fn bundles(mica: &Mica, place: &Place) -> Vec<Bundle> {
    let folder = place.folder("shop", "web");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut client = AgentServiceClient::new(connect(mica, place, Some(&folder)).await);
        let mut stream = client.watch_bundles(WatchBundlesRequest {}).await.unwrap().into_inner();
        stream.message().await.unwrap().unwrap().bundles
    })
}

fn wait_for_bundle(mica: &Mica, place: &Place, is_it: impl Fn(&Bundle) -> bool) -> Bundle {
    wait_for(SOON, "the other bundle", || bundles(mica, place).into_iter().skip(1).find(&is_it))
}

/// A web server's certificate for localhost below a root of its own.
fn web_certificate(folder: &Path) -> [PathBuf; 3] {
    fs::create_dir_all(folder).unwrap();
    let [root, root_key, chain, key] =
        ["root.pem", "root-key.pem", "chain.pem", "key.pem"].map(|name| folder.join(name));
    let openssl = |arguments: &[&str], paths: &[(&str, &Path)]| {
        let mut command = parts::openssl();
        command.args(arguments);
        for (flag, path) in paths {
            command.arg(flag).arg(path);
        }
        run(&mut command);
    };
    let new =
        ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "9"];
    openssl(&[&new[..], &["-subj", "/CN=web root"]].concat(), &[("-keyout", &root_key), ("-out", &root)]);
    let leaf = [
        &new[..],
        &["-subj", "/CN=web", "-addext", "subjectAltName=DNS:localhost", "-addext"],
        &["basicConstraints=critical,CA:FALSE"],
    ];
    let paths = [("-CA", &*root), ("-CAkey", &*root_key), ("-keyout", &*key), ("-out", &*chain)];
    openssl(&leaf.concat(), &paths);
    [root, chain, key]
}

/// go-spiffe's bundle endpoint for example.org; it ends with this value.
struct Foreign {
    child: Child,
    url: String,
    file: PathBuf,
}

impl Foreign {
    fn start(file: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(parts::go_spiffe());
        command.args(["serve-bundle", "--trust-domain", "example.org"]).arg(file).args(arguments);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut url = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut url).unwrap();
        Self { child, url: format!("{}/", url.trim()), file: file.to_owned() }
    }

    fn publish(&self, bundle: &Value) {
        let next = self.file.with_extension("next");
        fs::write(&next, bundle.to_string()).unwrap();
        fs::rename(next, &self.file).unwrap();
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A Mica for example.org, of which the bundle and a delivered folder are taken.
struct Other {
    place: Place,
    bundle: Value,
}

impl Other {
    fn new() -> Self {
        let place = Place::new();
        let account = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: b, namespace: a}\n";
        fs::write(place.source().join("b.yaml"), account).unwrap();
        let mica = place.start(&["--trust-domain", "example.org", "--bundle-address", "127.0.0.1:0"]);
        wait_for(SOON, "a folder", || place.folder("a", "b").join("..data").exists().then_some(()));
        let roots = place.data().join("root-cert.pem");
        let output = bundle_page(&mica, &roots);
        mica.stop();
        Self { place, bundle: serde_json::from_str(&output).unwrap() }
    }

    fn with(&self, sequence: u64, hint: u64) -> Value {
        let mut bundle = self.bundle.clone();
        bundle["spiffe_sequence"] = sequence.into();
        bundle["spiffe_refresh_hint"] = hint.into();
        bundle
    }
}

fn s_client(mica: &Mica, arguments: &[&str], request: &[u8]) -> Output {
    let mut openssl = parts::openssl();
    openssl.args(["s_client", "-quiet", "-ign_eof", "-connect", &mica.address("bundle")]).args(arguments);
    let mut child =
        openssl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let _ = child.stdin.as_mut().unwrap().write_all(request);
    child.wait_with_output().unwrap()
}

fn bundle_page(mica: &Mica, roots: &Path) -> String {
    let arguments = ["-CAfile", roots.to_str().unwrap(), "-verify_return_error"];
    let output = s_client(mica, &arguments, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n");
    let text = String::from_utf8(output.stdout).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text} {:?}", output.stderr));
    assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("application/json"), "{head}");
    body.to_owned()
}

#[test]
fn go_spiffe_fetches_the_bundle_from_an_endpoint_known_by_its_svid() {
    let place = Place::new();
    let mica = start(&place, &[]);
    let own = bundles(&mica, &place).remove(0);
    let bootstrap = place.root.path().join("bootstrap.json");
    fs::write(&bootstrap, bundle_page(&mica, &place.data().join("root-cert.pem"))).unwrap();
    let bootstrap = bootstrap.to_str().unwrap();
    let found = fetched(&url(&mica), &["--endpoint-id", ENDPOINT, "--bundle", bootstrap]).unwrap();
    assert_eq!(found["spiffe_sequence"], json!(own.sequence));
    assert_eq!(found["spiffe_refresh_hint"], json!(300));
    let uses: Vec<_> =
        found["keys"].as_array().unwrap().iter().map(|key| key["use"].as_str().unwrap()).collect();
    assert_eq!(uses, ["x509-svid", "jwt-svid"]);
    let other = "spiffe://cluster.local/ns/shop/sa/web";
    let refused = fetched(&url(&mica), &["--endpoint-id", other, "--bundle", bootstrap]).unwrap_err();
    assert!(refused.contains("unexpected ID"), "{refused}");
    assert!(mica.metric("mica_bundle_endpoint_served_total") >= 2.0);
    // The endpoint's own certificate is nobody's who could ask for more with it.
    assert!(mica.log().contains(ENDPOINT));
    mica.stop();
}

#[test]
fn go_spiffe_fetches_the_bundle_by_web_pki_and_the_certificate_may_change() {
    let place = Place::new();
    let folder = place.root.path().join("web");
    let [root, chain, key] = web_certificate(&folder);
    let flags = ["--bundle-certificate", chain.to_str().unwrap(), "--bundle-key", key.to_str().unwrap()];
    let mica = start(&place, &flags);
    let with = |root: &Path| fetched(&url(&mica), &["--roots", root.to_str().unwrap()]);
    assert!(with(&root).unwrap()["keys"].is_array());
    assert!(with(&place.data().join("root-cert.pem")).is_err());
    let before = fs::read(&root).unwrap();
    // What cannot be used is not taken.
    fs::write(&chain, "garbage").unwrap();
    wait_for(SOON, "a warning", || mica.log().contains("has no new certificate").then_some(()));
    with(&root).unwrap();
    web_certificate(&folder);
    wait_for(SOON, "the new one", || with(&root).ok());
    fs::write(&root, before).unwrap();
    assert!(with(&root).is_err());
    mica.stop();

    let refused = place.refused(&["--bundle-address", "127.0.0.1:0", "--bundle-certificate", "x"]);
    assert!(refused.contains("--bundle-key"), "{refused}");
    fs::write(&chain, "garbage").unwrap();
    let refused = place.refused(&[&["--bundle-address", "127.0.0.1:0"], &flags[..]].concat());
    assert!(refused.contains("--bundle-certificate") && refused.contains("chain.pem"), "{refused}");
}

#[test]
fn the_endpoint_asks_nobody_for_a_certificate_and_serves_nothing_else() {
    let place = Place::new();
    let mica = start(&place, &[]);
    let asked = s_client(&mica, &[], b"GET / HTTP/1.1\r\nhost: x\r\n\r\n");
    assert!(!String::from_utf8_lossy(&asked.stderr).contains("Acceptable client certificate"), "{asked:?}");
    let page = |request: &[u8]| String::from_utf8(s_client(&mica, &[], request).stdout).unwrap();
    assert!(page(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n").starts_with("HTTP/1.1 404 "));
    assert!(page(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").starts_with("HTTP/1.1 405 "));
    assert!(page(b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n").starts_with("HTTP/1.1 200 "));
    let old = s_client(&mica, &["-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"], b"GET / HTTP/1.1\r\n\r\n");
    assert!(old.stdout.is_empty(), "{old:?}");
    let weak = s_client(&mica, &["-tls1_2", "-cipher", "AES128-SHA:@SECLEVEL=0"], b"GET / HTTP/1.1\r\n\r\n");
    assert!(weak.stdout.is_empty(), "{weak:?}");
    // A crowd of silent ones keeps nobody out.
    let address = mica.address("bundle");
    let crowd: Vec<_> = (0..400).map(|_| TcpStream::connect(&address).unwrap()).collect();
    let roots = place.data().join("root-cert.pem");
    wait_for(SOON, "an answer", || {
        let arguments = ["-CAfile", roots.to_str().unwrap()];
        let output = s_client(&mica, &arguments, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n");
        output.stdout.starts_with(b"HTTP/1.1 200 ").then_some(())
    });
    drop(crowd);
    mica.stop();
}

/// A file that says whose bundles to fetch.
pub(crate) fn federation(place: &Place, text: &str) -> String {
    let file = place.root.path().join("federation.yaml");
    let next = place.root.path().join("next.yaml");
    fs::write(&next, text).unwrap();
    fs::rename(next, &file).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn a_bundle_of_go_spiffes_is_fetched_by_web_pki_newer_ones_alone_and_is_there_after_a_restart() {
    let place = Place::new();
    let foreign = Fetchable::start(&place, 7);
    let text = foreign.text();
    let flags = ["--federation", &federation(&place, &text)];
    let mica = start(&place, &flags);
    let first = wait_for_bundle(&mica, &place, |bundle| bundle.sequence == 7);
    assert_eq!((first.trust_domain.as_str(), first.x509_authorities.len()), ("example.org", 1));
    let root_of = fs::read_to_string(foreign.other.place.data().join("root-cert.pem")).unwrap();
    let root_of = mica::core::certificate::Certificate::all_from_pem(root_of.as_bytes()).unwrap().remove(0);
    assert_eq!(first.x509_authorities[0], root_of.der());
    assert_eq!(first.refresh_hint.unwrap().seconds, 10);
    // Never merged.
    assert_eq!(bundles(&mica, &place)[0].x509_authorities.len(), 1);

    foreign.publish(9);
    wait_for_bundle(&mica, &place, |bundle| bundle.sequence == 9);
    foreign.publish(8);
    let older = "mica_federation_fetches_total{trust_domain=\"example.org\",outcome=\"older\"}";
    wait_for(SOON, "a refusal", || mica.page("/metrics").1.contains(older).then_some(()));
    assert_eq!(bundles(&mica, &place)[1].sequence, 9);
    mica.kill();
    drop(foreign);

    // What was fetched last is there although nobody answers any more.
    let mica = start(&place, &flags);
    assert_eq!(bundles(&mica, &place)[1].sequence, 9);
    wait_for(SOON, "a warning", || {
        mica.log().contains("cannot be fetched, the last one stays").then_some(())
    });
    assert_eq!(bundles(&mica, &place)[1].sequence, 9);
    // Whom nobody federates with any more is gone, and its bundle too.
    federation(&place, "trust_domains: {}");
    wait_for(SOON, "its end", || (bundles(&mica, &place).len() == 1).then_some(()));
    assert_eq!(fs::read_dir(place.data().join("federation")).unwrap().count(), 0);
    // A file that has become bad changes nothing.
    federation(&place, &text);
    federation(&place, "trust_domains: {cluster.local: {url: 'https://x/', profile: https_web}}");
    wait_for(SOON, "an error", || mica.log().contains("is not taken, the one before stays").then_some(()));
    mica.stop();
    let refused = place.refused(&flags);
    assert!(refused.contains("cluster.local") && refused.contains("own"), "{refused}");
}

#[test]
fn a_bundle_of_go_spiffes_is_fetched_by_its_svid_and_later_by_what_was_fetched() {
    let (place, other) = (Place::new(), Other::new());
    let folder = other.place.folder("a", "b");
    let file = place.root.path().join("bundle.json");
    fs::write(&file, other.with(1, 10).to_string()).unwrap();
    let foreign = Foreign::start(&file, &["--svid", folder.to_str().unwrap()]);
    let bootstrap = other.place.data().join("root-cert.pem");
    let text = |id: &str, bootstrap: &Path| {
        format!(
            "trust_domains:\n  example.org: {{url: '{}', profile: https_spiffe, endpoint: '{id}', bundle: {}}}\n",
            foreign.url,
            bootstrap.display()
        )
    };
    let flags = ["--federation", &federation(&place, &text("spiffe://example.org/x", &bootstrap))];
    let mica = start(&place, &flags);
    wait_for(SOON, "a warning", || mica.log().contains("the endpoint's X509-SVID").then_some(()));
    assert_eq!(bundles(&mica, &place).len(), 1);
    // A bootstrap of somebody else's is of no use,
    let own = place.data().join("root-cert.pem");
    federation(&place, &text(FOREIGN, &own));
    wait_for(SOON, "the file", || mica.log().contains("the changed file of trust domains").then_some(()));
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(bundles(&mica, &place).len(), 1);
    // nor is it needed once there is a bundle.
    federation(&place, &text(FOREIGN, &bootstrap));
    wait_for_bundle(&mica, &place, |bundle| bundle.sequence == 1);
    federation(&place, &text(FOREIGN, &own));
    foreign.publish(&other.with(2, 10));
    wait_for_bundle(&mica, &place, |bundle| bundle.sequence == 2);
    mica.stop();
}

/// A bundle of example.org's, at go-spiffe's endpoint.
pub(crate) struct Fetchable {
    other: Other,
    foreign: Foreign,
    root: PathBuf,
}

impl Fetchable {
    pub(crate) fn start(place: &Place, sequence: u64) -> Self {
        let other = Other::new();
        let [root, chain, key] = web_certificate(&place.root.path().join("web"));
        let file = place.root.path().join("bundle.json");
        fs::write(&file, other.with(sequence, 10).to_string()).unwrap();
        let flags = ["--certificate", chain.to_str().unwrap(), "--key", key.to_str().unwrap()];
        Self { foreign: Foreign::start(&file, &flags), other, root }
    }

    /// What a file says of it.
    pub(crate) fn text(&self) -> String {
        let (url, root) = (&self.foreign.url, self.root.display());
        format!("trust_domains:\n  example.org: {{url: '{url}', profile: https_web, roots: {root}}}\n")
    }

    pub(crate) fn publish(&self, sequence: u64) {
        self.foreign.publish(&self.other.with(sequence, 10));
    }
}

/// The metrics of one that serves its bundle, and has fetched one and failed to fetch another.
pub(crate) fn metrics_page() -> String {
    let (one, other) = (Place::new(), Place::new());
    let first = start(&one, &[]);
    let text = format!(
        "trust_domains:\n  cluster.local: {{url: '{}', profile: https_spiffe, endpoint: '{ENDPOINT}', bundle: {}}}\n  nobody: {{url: 'https://127.0.0.1:1/', profile: https_web, roots: {1}}}\n",
        url(&first),
        one.data().join("root-cert.pem").display()
    );
    let flags = ["--trust-domain", "example.org", "--federation", &federation(&other, &text)];
    let second = start(&other, &flags);
    let page = wait_for(SOON, "an age", || {
        Some(second.page("/metrics").1).filter(|page| page.contains("mica_federation_age_seconds{"))
    });
    first.stop();
    second.stop();
    page
}

/// OpenSSL's server, which sends the files of a folder as the answers that they are.
struct Answering(Child);

impl Drop for Answering {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_empty_bundle_is_taken_at_its_word_and_no_other_odd_answer_is() {
    let (place, other) = (Place::new(), Other::new());
    let [root, chain, key] = web_certificate(&place.root.path().join("web"));
    let folder = place.root.path().join("answers");
    fs::create_dir(&folder).unwrap();
    let answer = |head: &str, body: &str| {
        fs::write(folder.join("next"), format!("{head}\r\n\r\n{body}")).unwrap();
        fs::rename(folder.join("next"), folder.join("bundle")).unwrap();
    };
    let good = "HTTP/1.0 200 OK\r\ncontent-type: application/json";
    answer(good, &other.with(1, 10).to_string());
    let port = crate::serve::free_port();
    let mut server = parts::openssl();
    server.args(["s_server", "-HTTP", "-quiet", "-accept", &format!("127.0.0.1:{port}")]);
    server.arg("-cert").arg(&chain).arg("-key").arg(&key).current_dir(&folder);
    let silent = server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Answering(silent.spawn().unwrap());
    let text = format!(
        "trust_domains: {{example.org: {{url: 'https://localhost:{port}/bundle', profile: https_web, roots: {}}}}}\n",
        root.display()
    );
    let mica = start(&place, &["--federation", &federation(&place, &text)]);
    wait_for_bundle(&mica, &place, |bundle| bundle.sequence == 1);
    let mut twice = other.with(2, 10);
    let first = twice["keys"][0].clone();
    twice["keys"].as_array_mut().unwrap().push(first);
    let long = " ".repeat(1_100_000);
    for (head, body, said) in [
        ("HTTP/1.0 302 Found\r\nlocation: https://localhost/other", "", "mica follows nobody"),
        ("HTTP/1.0 500 No", "", "the server answered 500"),
        (good, &*long, "longer than"),
        (good, "{\"keys\": null}", "no list of keys"),
        (good, "{\"keys\": [], \"keys\": []}", "stands twice"),
        (good, &twice.to_string(), "it is there twice"),
    ] {
        answer(head, body);
        wait_for(SOON, said, || mica.log().contains(said).then_some(()));
        assert_eq!(bundles(&mica, &place)[1].sequence, 1, "{said}");
    }
    answer(good, "{\"keys\": [], \"spiffe_sequence\": 3, \"spiffe_refresh_hint\": 10}");
    let empty = wait_for_bundle(&mica, &place, |bundle| bundle.sequence == 3);
    assert!(empty.x509_authorities.is_empty() && empty.jwt_authorities.is_empty());
    mica.stop();
}

#[test]
fn two_micas_fetch_each_others_and_follow_over_kills_and_restores() {
    let (one, other) = (Place::new(), Place::new());
    let free = || crate::serve::free_port();
    let ports = [free(), free()];
    for place in [&one, &other] {
        place.account("web");
    }
    let address = |at: usize| format!("127.0.0.1:{}", ports[at]);
    let mut first = one.start(&["--bundle-address", &address(0)]);
    let mut state = Vec::new();
    fs::File::open(one.data().join("jwt-keys.json")).unwrap().read_to_end(&mut state).unwrap();
    let text = format!(
        "trust_domains:\n  cluster.local: {{url: 'https://localhost:{}/', profile: https_spiffe, endpoint: '{ENDPOINT}', bundle: {}}}\n",
        ports[0],
        one.data().join("root-cert.pem").display()
    );
    let flags = ["--trust-domain", "example.org", "--federation", &federation(&other, &text)];
    let start = || other.start(&flags);
    let sequence = |mica: &Mica| bundles(mica, &one)[0].sequence;
    let seen = |mica: &Mica, place: &Place, at: u64| {
        // Delivered as example.org's.
        wait_for(SOON, "its number", || {
            let kept = fs::read_dir(place.data().join("federation")).ok()?.flatten().next()?;
            let kept: Value = serde_json::from_slice(&fs::read(kept.path()).ok()?).ok()?;
            let bundle: Value = serde_json::from_str(kept["bundle"].as_str()?).ok()?;
            assert!(bundle["spiffe_sequence"].as_u64()? <= at, "{}", mica.log());
            (bundle["spiffe_sequence"].as_u64()? == at).then_some(())
        });
    };
    let second = start();
    let begun = sequence(&first);
    seen(&second, &other, begun);
    second.stop();
    for restore in [false, true] {
        let before = sequence(&first);
        first.kill();
        if restore {
            fs::write(one.data().join("jwt-keys.json"), &state).unwrap();
        }
        first = one.start(&["--bundle-address", &address(0)]);
        let now = sequence(&first);
        assert!(now > before, "{now} {before}");
        let second = start();
        seen(&second, &other, now);
        assert!(!second.page("/metrics").1.contains("outcome=\"older\""));
        second.stop();
    }
    first.stop();
}
