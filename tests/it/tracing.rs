//! Spans, as those see them who look for them: a real Zipkin, a real OpenTelemetry collector, and nobody at all.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mica::proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use mica::proto::xds::envoy::service::discovery::v3::DiscoveryRequest;
use mica::proto::xds::envoy::service::secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient;
use serde_json::Value;

use crate::serve::{Place, mtls, page, wait_for};
use crate::{agent, parts};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Zipkin {
    address: String,
    _running: Running,
}

impl Zipkin {
    fn start() -> Self {
        let port = crate::serve::free_port();
        let running = Command::new(parts::zipkin())
            .env("QUERY_PORT", port.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (running, address) = (Running(running), format!("127.0.0.1:{port}"));
        wait_for(Duration::from_secs(120), "Zipkin", || {
            std::net::TcpStream::connect(&address).ok()?;
            (page(&address, "/health").0 == 200).then_some(())
        });
        Self { address, _running: running }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The spans of a trace, once there are those of these names.
    fn trace(&self, id: &str, names: &[&str]) -> Vec<Value> {
        wait_for(Duration::from_secs(30), &format!("spans {names:?} in the trace {id}"), || {
            let (status, text) = page(&self.address, &format!("/api/v2/trace/{id}"));
            let spans: Vec<Value> = serde_json::from_str(&text).ok().filter(|_| status == 200)?;
            names.iter().all(|name| spans.iter().any(|span| span["name"] == *name)).then_some(spans)
        })
    }

    /// All traces of a service.
    fn traces(&self, service: &str) -> Vec<Vec<Value>> {
        let path = format!("/api/v2/traces?serviceName={service}&limit=100");
        serde_json::from_str(&page(&self.address, &path).1).unwrap()
    }
}

/// The one span of a name.
fn one<'a>(spans: &'a [Value], name: &str) -> &'a Value {
    let found: Vec<_> = spans.iter().filter(|span| span["name"] == name).collect();
    assert_eq!(found.len(), 1, "{name}: {spans:#?}");
    found[0]
}

/// That each span is a part of the one named beside it, and within its time.
fn assert_parents(spans: &[Value], parents: &[(&str, &str)]) {
    for (child, parent) in parents {
        let (child, parent) = (one(spans, child), one(spans, parent));
        assert_eq!(child["parentId"], parent["id"], "{spans:#?}");
        assert!(child["timestamp"].as_u64() >= parent["timestamp"].as_u64(), "{spans:#?}");
    }
}

fn ask(
    headers: &[(&'static str, &str)],
) -> tonic::Request<mica::proto::istio::v1::auth::IstioCertificateRequest> {
    let mut request = tonic::Request::new(mtls::ask(mtls::csr(WEB)));
    for (name, value) in headers {
        request.metadata_mut().insert(*name, value.parse().unwrap());
    }
    request
}

const CREATE: &str = "istio.v1.auth.istiocertificateservice/createcertificate";

#[tokio::test(flavor = "multi_thread")]
async fn zipkin_shows_the_parts_of_a_request() {
    let zipkin = Zipkin::start();
    let place = Place::new();
    place.account("web");
    let mica = place.start(&["--trace-zipkin", &zipkin.url()]);
    place.leaf("web");
    let channel = mtls::connect(&mica, &place, Some(&place.folder("shop", "web"))).await;
    let mut client = IstioCertificateServiceClient::new(channel);

    let parent = format!("00-{TRACE}-{PARENT}-01");
    let answer = client.create_certificate(ask(&[("traceparent", &parent)])).await.unwrap().into_inner();
    let leaf = mica::core::certificate::Certificate::all_from_pem(answer.cert_chain[0].as_bytes()).unwrap();
    let spans = zipkin.trace(TRACE, &[CREATE, "authenticate", "liveness", "authorize", "sign"]);
    let request = one(&spans, CREATE);
    assert_eq!((&request["parentId"], &request["kind"]), (&PARENT.into(), &"SERVER".into()));
    assert_eq!(request["localEndpoint"]["serviceName"], "mica");
    let tags: BTreeMap<String, String> = serde_json::from_value(request["tags"].clone()).unwrap();
    for (key, value) in [
        ("rpc.system", "grpc"),
        ("rpc.service", "istio.v1.auth.IstioCertificateService"),
        ("rpc.method", "CreateCertificate"),
        ("rpc.grpc.status_code", "0"),
        ("client.address", "127.0.0.1"),
        ("mica.identity", WEB),
        ("mica.serial", &leaf[0].serial_text()),
        ("mica.authenticator", "certificate"),
    ] {
        assert_eq!(tags.get(key).map(String::as_str), Some(value), "{key}: {tags:?}");
    }
    let parts = ["authenticate", "liveness", "authorize", "sign"].map(|part| (part, CREATE));
    assert_parents(&spans, &parts);
    // The log is found by it, too.
    assert!(mica.log().contains(&format!("\"trace\":\"{TRACE}\"")), "{}", mica.log());

    // As proxies of Istio send it, with a short identifier; and one who wishes not to be recorded.
    let b3 = [("x-b3-traceid", &TRACE[16..]), ("x-b3-spanid", PARENT), ("x-b3-sampled", "1")];
    client.create_certificate(ask(&b3)).await.unwrap();
    assert_eq!(one(&zipkin.trace(&TRACE[16..], &[CREATE]), CREATE)["parentId"], PARENT);
    let quiet = "5af7651916cd43dd8448eb211c80319c";
    client.create_certificate(ask(&[("b3", &format!("{quiet}-{PARENT}-0"))])).await.unwrap();
    // And a trace of its own for who says nothing.
    client.create_certificate(ask(&[])).await.unwrap();
    let traces = wait_for(Duration::from_secs(30), "three traces", || {
        Some(zipkin.traces("mica")).filter(|traces| traces.len() >= 3)
    });
    let of = |id: &str| traces.iter().filter(|spans| spans[0]["traceId"] == id).count();
    assert_eq!((traces.len(), of(quiet)), (3, 0), "{traces:#?}");
    mica.stop();
}

/// The proxy's side of a stream: names what it wants, and takes whatever comes. Ends with the test.
async fn proxy(socket: std::path::PathBuf) -> tokio::task::JoinHandle<()> {
    let address = format!("unix://{}", socket.display());
    let channel = tonic::transport::Endpoint::from_shared(address).unwrap().connect().await.unwrap();
    let (send, requests) = tokio::sync::mpsc::channel(4);
    let asks = |version_info: String, response_nonce: String| DiscoveryRequest {
        resource_names: vec!["default".to_owned()],
        version_info,
        response_nonce,
        ..DiscoveryRequest::default()
    };
    send.send(asks(String::new(), String::new())).await.unwrap();
    let stream = tokio_stream::wrappers::ReceiverStream::new(requests);
    tokio::spawn(async move {
        let mut client = SecretDiscoveryServiceClient::new(channel);
        let mut responses = client.stream_secrets(stream).await.unwrap().into_inner();
        while let Ok(Some(response)) = responses.message().await {
            send.send(asks(response.version_info, response.nonce)).await.unwrap();
        }
    })
}

/// From a proxy that wants what the agent cannot get yet, to the files and the proxy's answer, and once more at the renewal.
#[tokio::test(flavor = "multi_thread")]
async fn one_trace_leads_from_the_need_to_the_delivery() {
    const SDS: &str = "envoy.service.secret.v3.secretdiscoveryservice/streamsecrets";
    let zipkin = Zipkin::start();
    let place = Place::new();
    place.account("web");
    let mica = place.start(&["--trial-tokens", "--ttl", "15s", "--trace-zipkin", &zipkin.url()]);
    let (socket, files) = (place.root.path().join("agent.sock"), place.root.path().join("certs"));
    let mut command = agent::command(&place, &mica);
    command.arg("--token-file").arg(place.root.path().join("token-shop-web"));
    command.arg("--socket").arg(&socket).arg("--files").arg(&files);
    command.args(["--identity", WEB, "--trace-zipkin", &zipkin.url()]);
    let agent = agent::start(&place, "web", &mut command);
    let proxy = proxy(socket).await;
    wait_for(Duration::from_secs(20), "an open stream", || {
        agent.page("/metrics").1.contains("mica_sds_streams{method=\"StreamSecrets\"} 1\n").then_some(())
    });
    agent::token(&place, "shop/web");

    let trace = |why: &str| {
        wait_for(Duration::from_secs(60), &format!("a whole trace: {why}"), || {
            zipkin.traces("mica-agent").into_iter().find(|spans| {
                let has = |name: &str, service: &str| {
                    spans
                        .iter()
                        .any(|span| span["name"] == name && span["localEndpoint"]["serviceName"] == service)
                };
                spans.iter().any(|span| span["name"] == "certificate" && span["tags"]["mica.why"] == why)
                    && has("sign", "mica")
                    && has(SDS, "mica-agent")
                    && has("deliver", "mica-agent")
            })
        })
    };
    for why in ["new", "renewal"] {
        let spans = trace(why);
        let of = |service: &str, name: &str| {
            let is = |span: &&Value| {
                span["localEndpoint"]["serviceName"] == service
                    && span["name"] == name
                    && span["tags"]["error"].is_null()
            };
            let found: Vec<_> = spans.iter().filter(is).collect();
            assert_eq!(found.len(), 1, "{spans:#?}");
            found[0].clone()
        };
        let (call, request) = (of("mica-agent", CREATE), of("mica", CREATE));
        assert_eq!((&call["kind"], &request["kind"]), (&"CLIENT".into(), &"SERVER".into()));
        let sds = of("mica-agent", SDS);
        let root = one(&spans, "certificate");
        assert_eq!(root["parentId"], Value::Null);
        // What came to nothing, as there was no token, is there as well.
        let obtained = spans.iter().find(|span| span["id"] == call["parentId"]).unwrap();
        assert_eq!((&obtained["name"], &obtained["parentId"]), (&"obtain".into(), &root["id"]));
        let failed = |span: &&Value| span["tags"]["error"] == "credential" && span["name"] == "obtain";
        assert_eq!(spans.iter().any(|span| failed(&span)), why == "new", "{spans:#?}");
        assert_eq!(request["parentId"], call["id"]);
        for part in ["authenticate", "liveness", "authorize", "sign"] {
            assert_eq!(one(&spans, part)["parentId"], request["id"], "{part}");
        }
        assert_eq!(one(&spans, "judge")["parentId"], obtained["id"]);
        let deliver = one(&spans, "deliver");
        for delivery in [&sds, deliver] {
            assert_eq!(delivery["parentId"], root["id"]);
            assert_eq!(delivery["tags"]["mica.serial"], request["tags"]["mica.serial"]);
            assert_eq!(delivery["tags"]["mica.identity"], WEB);
        }
        assert_eq!(sds["tags"]["mica.answer"], "acknowledged");
        // The proxy wanted it before it was there.
        let begun = |span: &Value| span["timestamp"].as_u64().unwrap();
        assert_eq!(begun(&sds) < begun(&call), why == "new", "{spans:#?}");
        assert!(!format!("{spans:?}").contains("PRIVATE") && !format!("{spans:?}").contains("eyJ"));
    }
    proxy.abort();
    agent.stop();
    mica.stop();
}

/// At a ratio of 0 nothing is recorded but what somebody wishes who is known.
#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_cannot_have_its_requests_recorded() {
    let zipkin = Zipkin::start();
    let place = Place::new();
    place.account("web");
    let mica = place.start(&["--trace-zipkin", &zipkin.url(), "--trace-sample", "0"]);
    place.leaf("web");
    let stranger = mtls::connect(&mica, &place, None).await;
    for value in ["authorization", "x"] {
        let forced = format!("00-{TRACE}-{PARENT}-01");
        let headers = [("traceparent", forced.as_str()), (value, "Bearer e30.e30.e30")];
        let mut client = IstioCertificateServiceClient::new(stranger.clone());
        let refused = client.create_certificate(ask(&headers)).await;
        assert_eq!(refused.unwrap_err().code(), tonic::Code::Unauthenticated);
    }
    let known = mtls::connect(&mica, &place, Some(&place.folder("shop", "web"))).await;
    let mut known = IstioCertificateServiceClient::new(known);
    known.create_certificate(ask(&[])).await.unwrap();
    let wished = "6af7651916cd43dd8448eb211c80319c";
    known.create_certificate(ask(&[("traceparent", &format!("00-{wished}-{PARENT}-01"))])).await.unwrap();
    zipkin.trace(wished, &[CREATE, "sign"]);
    let traces = zipkin.traces("mica");
    assert_eq!(traces.len(), 1, "{traces:#?}");
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_collector_requests_go_on() {
    let place = Place::new();
    place.account("web");
    let nobody = format!("http://127.0.0.1:{}", crate::serve::free_port());
    let mica = place.start(&["--trace-zipkin", &nobody, "--trace-otlp", &nobody]);
    place.leaf("web");
    let channel = mtls::connect(&mica, &place, Some(&place.folder("shop", "web"))).await;
    let mut client = IstioCertificateServiceClient::new(channel);
    let dropped = |exporter: &str, reason: &str| {
        let labels = format!("exporter=\"{exporter}\",reason=\"{reason}\"");
        mica.metric(&format!("mica_trace_spans_dropped_total{{{labels}}}"))
    };
    // Until a second batch is gone, and more than a queue holds has come.
    let mut asked = 0.0;
    wait_for(Duration::from_secs(60), "spans that are dropped", || {
        tokio::task::block_in_place(|| {
            let runtime = tokio::runtime::Handle::current();
            for _ in 0..50 {
                runtime.block_on(client.create_certificate(ask(&[]))).unwrap();
                asked += 1.0;
            }
        });
        (dropped("zipkin", "not_taken") > 600.0 && dropped("otlp", "not_taken") > 600.0).then_some(())
    });
    // Five of each request.
    let all = |exporter| dropped(exporter, "not_taken") + dropped(exporter, "queue_full");
    wait_for(Duration::from_secs(10), "the rest", || (all("zipkin") >= asked * 5.0).then_some(()));
    assert_eq!(mica.metric("mica_trace_spans_sent_total{exporter=\"zipkin\"}"), 0.0);
    let log = mica.log();
    mica.stop();
    let said: Vec<_> = log.lines().filter(|line| line.contains("spans cannot be sent")).collect();
    assert_eq!(said.len(), 2, "{said:#?}");
    assert!(said[0].contains("connection refused") || said[0].contains("Connection refused"), "{said:#?}");
}

/// What the collector of the OpenTelemetry project prints of what it was sent.
#[tokio::test(flavor = "multi_thread")]
async fn an_opentelemetry_collector_reads_the_spans() {
    let port = crate::serve::free_port();
    let place = Place::new();
    place.account("web");
    let log = place.root.path().join("collector.log");
    let configuration = format!(
        "yaml:{{receivers: {{otlp: {{protocols: {{http: {{endpoint: '127.0.0.1:{port}'}}}}}}}}, \
         exporters: {{debug: {{verbosity: detailed}}}}, \
         service: {{telemetry: {{metrics: {{level: none}}}}, \
         pipelines: {{traces: {{receivers: [otlp], exporters: [debug]}}}}}}}}"
    );
    let collector = Command::new(parts::otel_collector())
        .args(["--config", &configuration])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let _collector = Running(collector);
    let said = || fs::read_to_string(&log).unwrap();
    wait_for(Duration::from_secs(180), "the collector", || {
        std::net::TcpStream::connect(("127.0.0.1", port)).ok()
    });
    let mica = place.start(&["--trace-otlp", &format!("http://127.0.0.1:{port}")]);
    place.leaf("web");
    let channel = mtls::connect(&mica, &place, Some(&place.folder("shop", "web"))).await;
    let mut client = IstioCertificateServiceClient::new(channel.clone());
    let parent = format!("00-{TRACE}-{PARENT}-01");
    client.create_certificate(ask(&[("traceparent", &parent)])).await.unwrap();
    let mut unreadable = ask(&[]);
    unreadable.get_mut().csr = "none".to_owned();
    client.create_certificate(unreadable).await.unwrap_err();
    let text = wait_for(Duration::from_secs(30), "both requests", || {
        Some(said()).filter(|text| text.contains("CSR_MALFORMED") && text.contains(TRACE))
    });
    let fields = |span: &str| -> BTreeMap<String, String> {
        let lines = span.lines().filter_map(|line| line.trim().trim_start_matches("-> ").split_once(':'));
        lines.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned())).collect()
    };
    let spans: Vec<_> = text.split("Span #").skip(1).map(fields).collect();
    let of = |trace: &str, name: &str| {
        let mut found = spans.iter().filter(|span| span["Trace ID"] == trace && span["Name"] == name);
        found.next().unwrap_or_else(|| panic!("{name}: {text}")).clone()
    };
    const NAME: &str = "istio.v1.auth.IstioCertificateService/CreateCertificate";
    let request = of(TRACE, NAME);
    for (key, value) in [
        ("Parent ID", PARENT),
        ("Kind", "Server"),
        ("Status code", "Unset"),
        ("rpc.system", "Str(grpc)"),
        ("rpc.grpc.status_code", "Int(0)"),
        ("mica.identity", &format!("Str({WEB})")),
    ] {
        assert_eq!(request.get(key).map(String::as_str), Some(value), "{key}: {request:?}");
    }
    let sign = of(TRACE, "sign");
    assert_eq!((&sign["Parent ID"], sign["Kind"].as_str()), (&request["ID"], "Internal"));
    let refused = spans.iter().find(|span| span.get("mica.reason").is_some()).unwrap();
    assert_eq!(refused["Status code"], "Error");
    assert_eq!(refused["Parent ID"], "");
    assert!(text.contains("service.name: Str(mica)"), "{text}");
    wait_for(Duration::from_secs(5), "the collector's answer", || {
        (mica.metric("mica_trace_spans_sent_total{exporter=\"otlp\"}") > 5.0).then_some(())
    });
    mica.stop();
}

#[test]
fn what_is_no_collector_is_refused() {
    let place = Place::new();
    for (flag, value, wanted) in [
        ("--trace-otlp", "otel:4317", "--trace-otlp"),
        ("--trace-zipkin", "ftp://zipkin", "--trace-zipkin"),
        ("--trace-sample", "1.1", "no number from 0 to 1"),
        ("--trace-sample", "NaN", "no number from 0 to 1"),
    ] {
        let said = place.refused(&[flag, value]);
        assert!(said.contains(wanted), "{said}");
    }
}
