use std::fmt::Write as _;

use proptest::prelude::*;

use super::*;
use crate::core::url::Collector;

fn secret() -> Wish {
    Wish { container: "istio-proxy".to_owned(), what: What::Secret }
}

fn agent(files: Option<&str>) -> Wish {
    with_agent(Agent {
        image: "registry.example.org/mica:1".to_owned(),
        authority: "mica.istio-system.svc:15012".to_owned(),
        audience: "istio-ca".to_owned(),
        files: files.map(str::to_owned),
        metrics: None,
        otlp: None,
        zipkin: None,
    })
}

/// One that others look at.
fn observed() -> Wish {
    let What::Agent(agent) = agent(None).what else { panic!() };
    let collector = |text: &str, path: &str| Some(Collector::new(text, path).unwrap());
    with_agent(Agent {
        metrics: Some("0.0.0.0:15020".parse().unwrap()),
        otlp: collector("http://otel:4318", "/v1/traces"),
        zipkin: collector("https://zipkin.example.org/spans?a=b", "/api/v2/spans"),
        ..*agent
    })
}

fn with_agent(agent: Agent) -> Wish {
    Wish { container: "istio-proxy".to_owned(), what: What::Agent(Box::new(agent)) }
}

fn token() -> Wish {
    Wish { container: "istio-proxy".to_owned(), what: What::Token { audience: "istio-ca".to_owned() } }
}

fn done(text: &str) -> String {
    let done = into_manifests(text.as_bytes(), &secret()).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let again = into_manifests(done.text.as_bytes(), &secret()).unwrap();
    assert_eq!(again.text, done.text);
    assert!(
        again.objects.iter().all(|object| !matches!(object.outcome, Outcome::Changed(_))),
        "{:?}",
        again.objects
    );
    done.text
}

fn refused(text: &str) -> String {
    match into_manifests(text.as_bytes(), &secret()) {
        Ok(done) => panic!("{text}\ngave\n{}", done.text),
        Err(error) => error.to_string(),
    }
}

fn pod(spec: &str) -> String {
    let spec: String = spec.lines().map(|line| format!("  {line}\n")).collect();
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: web}}\nspec:\n{spec}")
}

#[test]
fn a_block_style_deployment_gets_lines_and_keeps_its_own() {
    let text = "\
# The web.
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  template:
    spec:
      serviceAccountName: \"web\" # not 'default'
      containers:
      - name: web   # first
        image: web:1

      # the proxy
      - name: istio-proxy
        volumeMounts:
          - {name: tmp, mountPath: /tmp}
          # of the proxy
        image: envoy
      volumes:
      - name: tmp
        emptyDir: {}
";
    let wanted = "\
# The web.
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  template:
    spec:
      serviceAccountName: \"web\" # not 'default'
      containers:
      - name: web   # first
        image: web:1

      # the proxy
      - name: istio-proxy
        volumeMounts:
          - {name: tmp, mountPath: /tmp}
          - name: istio-certs
            mountPath: /etc/certs
            readOnly: true
          # of the proxy
        image: envoy
      volumes:
      - name: tmp
        emptyDir: {}
      - name: istio-certs
        secret:
          secretName: istio.web
";
    assert_eq!(done(text), wanted);
}

#[test]
fn json_stays_json_in_its_own_layout() {
    let text = r#"{
	"apiVersion": "v1",
	"kind": "Pod",
	"spec": {
		"containers": [
			{
				"name": "istio-proxy"
			}
		]
	}
}
"#;
    let wanted = r#"{
	"apiVersion": "v1",
	"kind": "Pod",
	"spec": {
		"containers": [
			{
				"name": "istio-proxy",
				"volumeMounts": [
					{
						"name": "istio-certs",
						"mountPath": "/etc/certs",
						"readOnly": true
					}
				]
			}
		],
		"volumes": [
			{
				"name": "istio-certs",
				"secret": {
					"secretName": "istio.default"
				}
			}
		]
	}
}
"#;
    assert_eq!(done(text), wanted);
    let text =
        r#"{"apiVersion":"v1","kind":"Pod","spec":{"containers":[{"name":"istio-proxy"}],"volumes":null}}"#;
    let wanted = r#"{"apiVersion":"v1","kind":"Pod","spec":{"containers":[{"name":"istio-proxy", "volumeMounts": [{"name": "istio-certs", "mountPath": "/etc/certs", "readOnly": true}]}],"volumes":[{"name": "istio-certs", "secret": {"secretName": "istio.default"}}]}}"#;
    assert_eq!(done(text), wanted);
    // Values that follow each other, as `jq` prints them.
    let two = done(&format!("{text}\n{text}"));
    assert_eq!(two, format!("{wanted}\n{wanted}"));
}

#[test]
fn all_kinds_and_lists_are_known_and_nothing_else() {
    let pod = "{metadata: {}, spec: {containers: [{name: istio-proxy}]}}";
    for (kind, version, text) in [
        ("Pod", "v1", "spec: {containers: [{name: istio-proxy}]}".to_owned()),
        ("PodTemplate", "v1", format!("template: {pod}")),
        ("ReplicationController", "v1", format!("spec: {{template: {pod}}}")),
        ("Deployment", "apps/v1", format!("spec: {{template: {pod}}}")),
        ("Deployment", "extensions/v1beta1", format!("spec: {{template: {pod}}}")),
        ("ReplicaSet", "apps/v1", format!("spec: {{template: {pod}}}")),
        ("StatefulSet", "apps/v1", format!("spec: {{template: {pod}}}")),
        ("DaemonSet", "apps/v1", format!("spec: {{template: {pod}}}")),
        ("Job", "batch/v1", format!("spec: {{template: {pod}}}")),
        ("CronJob", "batch/v1", format!("spec: {{jobTemplate: {{spec: {{template: {pod}}}}}}}")),
    ] {
        let own = format!("apiVersion: {version}\nkind: {kind}\n{text}\n");
        assert!(done(&own).contains("secretName: istio.default"), "{kind}");
        let listed = format!(
            "apiVersion: v1\nkind: List\nitems:\n- {{apiVersion: {version}, kind: {kind}, {text}}}\n"
        );
        assert!(done(&listed).contains("secretName: istio.default"), "{kind}");
        let typed = format!("apiVersion: {version}\nkind: {kind}List\nitems:\n- {{{text}}}\n");
        assert!(done(&typed).contains("secretName: istio.default"), "{kind}");
        for other in [
            format!("apiVersion: example.org/v1\nkind: {kind}\n{text}\n"),
            format!("apiVersion: {version}\nkind: {kind}s\n{text}\n"),
            format!("kind: {kind}\n{text}\n"),
            format!("- apiVersion: {version}\n  kind: {kind}\n"),
        ] {
            let left = into_manifests(other.as_bytes(), &secret()).unwrap();
            assert_eq!((left.text, left.objects), (other, Vec::new()));
        }
    }
}

#[test]
fn the_secret_is_that_of_the_pods_account() {
    for (said, name) in [
        ("serviceAccountName: web", "istio.web"),
        ("serviceAccount: web", "istio.web"),
        ("serviceAccountName: web\nserviceAccount: other", "istio.web"),
        ("serviceAccountName: ''\nserviceAccount: web", "istio.web"),
        ("serviceAccountName:", "istio.default"),
        ("hostNetwork: false", "istio.default"),
    ] {
        let text = pod(&format!("{said}\ncontainers: [{{name: istio-proxy}}]"));
        assert!(done(&text).ends_with(&format!("secretName: {name}\n")), "{said}");
    }
    let said = refused(&pod("serviceAccountName: 1\ncontainers: [{name: istio-proxy}]"));
    assert!(said.contains("line 5: Pod web: serviceAccountName is the number 1, not text"), "{said}");
    let said = refused(&pod("serviceAccountName: A/b\ncontainers: [{name: istio-proxy}]"));
    assert!(said.starts_with("document 1, line 5: Pod web: "), "{said}");
}

#[test]
fn a_proxy_that_is_a_native_sidecar_is_found_and_the_agent_comes_before_it() {
    let text = pod(
        "containers:\n- name: web\ninitContainers:\n# first\n- name: istio-proxy\n  restartPolicy: Always",
    );
    assert!(done(&text).contains("restartPolicy: Always\n    volumeMounts:\n    - name: istio-certs"));
    let with = into_manifests(text.as_bytes(), &agent(Some("/etc/certs"))).unwrap().text;
    let place = |what: &str| with.find(what).unwrap_or_else(|| panic!("{what} is not in {with}"));
    assert!(place("initContainers:\n  - name: mica-agent") < place("# first\n  - name: istio-proxy"));
}

#[test]
fn what_is_there_is_taken_as_it_is() {
    let whole = "serviceAccountName: web\ncontainers:\n- name: istio-proxy\n  volumeMounts:\n  - {name: istio-certs, mountPath: /etc/certs/, readOnly: true}\nvolumes:\n- name: istio-certs\n  secret: {secretName: istio.web, optional: true, defaultMode: 0440}";
    assert_eq!(done(&pod(whole)), pod(whole));
    for (old, new, wanted) in [
        (
            "secretName: istio.web",
            "secretName: istio.other",
            "line 11: Pod web: the volume istio-certs is there, and is not {",
        ),
        ("optional: true", "items: [{key: a, path: b}]", "the volume istio-certs is there"),
        ("secret: {secretName", "configMap: {name", "the volume istio-certs is there"),
        (
            "readOnly: true",
            "readOnly: false",
            "line 9: Pod web: istio-certs is mounted at /etc/certs and not read-only",
        ),
        (
            "readOnly: true",
            "readOnly: true, subPath: a",
            "istio-certs is mounted at /etc/certs in part (subPath)",
        ),
        (
            "{name: istio-certs,",
            "{name: other,",
            "line 9: Pod web: other is mounted at /etc/certs already, where istio-certs belongs",
        ),
        ("/etc/certs/", "/etc/certs/mine", "istio-certs is mounted at /etc/certs/mine already"),
        ("/etc/certs/", "/certs", "istio-certs is mounted at /certs, and belongs at /etc/certs"),
        (
            "- name: istio-proxy",
            "- name: envoy",
            "line 6: Pod web: no container is called istio-proxy, there is envoy; name the one",
        ),
        ("- name: istio-proxy", "- name: a\n- name: b\n- name: envoy", "there are a, b and envoy"),
        (
            "volumes:\n- name: istio-certs\n  secret:",
            "volumes:\n  name: istio-certs\n  secret:",
            "volumes is a mapping, not a list",
        ),
    ] {
        let said = refused(&pod(&whole.replace(old, new)));
        assert!(said.contains(wanted), "{said}");
    }
    let twice = whole.replace(
        "  - {name: istio-certs",
        "  - {name: istio-certs, mountPath: /certs}\n  - {name: istio-certs",
    );
    assert_eq!(done(&pod(&twice)), pod(&twice));
}

#[test]
fn a_switch_on_the_pod_keeps_everything_out() {
    for map in ["labels", "annotations"] {
        for (said, out) in [("\"false\"", true), ("'true'", false), ("other", false)] {
            let text = format!(
                "apiVersion: batch/v1\nkind: Job\nmetadata: {{name: a, {map}: {{mica.dev/inject: \"true\"}}}}\nspec:\n  template:\n    metadata:\n      {map}: {{mica.dev/inject: {said}}}\n    spec: {{containers: [{{name: istio-proxy}}]}}\n"
            );
            match into_manifests(text.as_bytes(), &secret()) {
                Ok(left) if out => {
                    assert_eq!(left.objects[0].outcome, Outcome::OptedOut);
                    assert_eq!(left.text, text);
                }
                Ok(changed) => assert!(matches!(changed.objects[0].outcome, Outcome::Changed(_))),
                Err(error) => assert!(
                    said == "other"
                        && error.to_string().contains(
                            "line 7: Job a: mica.dev/inject is another text; write \"true\" or \"false\""
                        ),
                    "{error}"
                ),
            }
        }
    }
    let unquoted = pod("containers: [{name: istio-proxy}]")
        .replace("name: web", "name: web, labels: {mica.dev/inject: false}");
    assert!(
        refused(&unquoted).contains("mica.dev/inject is false; write \"true\" or \"false\", with the quotes")
    );
}

#[test]
fn what_cannot_be_edited_alone_is_refused_with_its_line() {
    for (spec, wanted) in [
        (
            "<<: {volumes: [{name: a}]}\ncontainers: [{name: istio-proxy}]",
            "line 5: Pod web: volumes comes by a merge key",
        ),
        (
            "<<: {containers: [{name: istio-proxy}]}",
            "line 5: Pod web: what is to be changed comes by a merge key",
        ),
        (
            "containers:\n- &c {name: istio-proxy}\ninitContainers:\n- *c",
            "line 6: Pod web: what is to be changed has an anchor",
        ),
        (
            "containers: &c [{name: istio-proxy}]\nx: *c",
            "has an anchor, and an alias elsewhere would change with it",
        ),
        ("x: &c [{name: istio-proxy}]\ncontainers: *c", "line 6: Pod web: an alias stands here"),
        (
            "volumes: !!seq []\ncontainers: [{name: istio-proxy}]",
            "line 5: Pod web: what is to be changed has a tag",
        ),
        (
            "volumes: []\nvolumes: []\ncontainers: [{name: istio-proxy}]",
            "line 6: Pod web: volumes stands here for the second time",
        ),
        ("containers: 1", "line 5: Pod web: containers is the number 1, not a list"),
    ] {
        let said = refused(&pod(spec));
        assert!(said.contains(wanted), "{spec}: {said}");
    }
    let said = refused(&format!("a: b\n---\n{}", pod("containers: [").trim_end()));
    assert!(said.starts_with("document 2, line "), "{said}");
    let said = refused("kind: Pod\nmetadata: {name: {{ .Name }}-x}\nspec: {}\n");
    assert!(said.contains("render it first"), "{said}");
    assert!(refused("\u{0}kind: Pod").starts_with("document 1, line 1: "));
    let bytes = into_manifests(b"a: b\n---\nc: \xff\n", &secret()).unwrap_err();
    assert_eq!(bytes.to_string(), "document 2, line 3: this is no UTF-8 text");
}

#[test]
fn anchors_and_merge_keys_that_are_not_changed_are_followed() {
    let text = pod(
        "x: &c {image: envoy, resources: &r {limits: {cpu: 1}}}\ny: &n istio-proxy\nserviceAccountName: &s web\ncontainers:\n- <<: *c\n  name: *n\n- &other\n  name: web\n  resources: *r\nz: [*s, *other]",
    );
    let after = done(&text);
    assert!(after.contains("secretName: istio.web"), "{after}");
    assert!(after.contains("    name: *n\n    volumeMounts:\n    - name: istio-certs\n"), "{after}");
}

#[test]
fn bombs_and_depths_end_soon() {
    let mut bomb = String::from("containers: [{name: istio-proxy}]\na0: &a0 [x]\n");
    for level in 1..60 {
        let _ = writeln!(bomb, "a{level}: &a{level} [*a{0}, *a{0}, *a{0}]", level - 1);
    }
    assert!(refused(&pod(&bomb)).contains("with its aliases followed"));
    let mut merges = String::from("x0: &x0 {a: b}\n");
    for level in 1..60 {
        let _ = writeln!(merges, "x{level}: &x{level} {{<<: [*x{0}, *x{0}]}}", level - 1);
    }
    let _ = into_manifests(format!("{merges}<<: *x59\n").as_bytes(), &secret());
    for (open, close) in [("[", "]"), ("{a: ", "}"), ("- ", "")] {
        let deep = format!("{}{}", open.repeat(5000), close.repeat(5000));
        assert!(into_manifests(deep.as_bytes(), &secret()).is_err());
    }
    // An alias within what it stands for.
    let _ = into_manifests(pod("containers: &c [*c, {name: istio-proxy}]").as_bytes(), &secret());
}

#[test]
fn comments_within_an_empty_list_stay() {
    for list in ["volumes: [ # none", "volumes: [\n  # none"] {
        let after = done(&pod(&format!("{list}\n  ]\ncontainers: [{{name: istio-proxy}}]")));
        assert!(
            after.contains("# none\n    {name: istio-certs, secret: {secretName: istio.default}}]\n"),
            "{after}"
        );
    }
}

#[test]
fn the_agent_runs_as_its_container_does_and_never_as_root() {
    let users = |spec: &str| {
        let text = pod(spec);
        let with = into_manifests(text.as_bytes(), &agent(None)).unwrap().text;
        let value: Value = serde_saphyr::from_str(&with).unwrap();
        let security = value.pointer("/spec/initContainers/0/securityContext").unwrap().clone();
        assert_eq!(security["runAsNonRoot"], true);
        (security["runAsUser"].as_u64(), security["runAsGroup"].as_u64())
    };
    assert_eq!(users("containers: [{name: istio-proxy}]"), (None, None));
    let own = "containers: [{name: istio-proxy, securityContext: {runAsUser: 1337, runAsGroup: 1338}}]";
    assert_eq!(users(own), (Some(1337), Some(1338)));
    let pods = "securityContext: {runAsUser: 5}\ncontainers: [{name: istio-proxy}]";
    assert_eq!(users(pods), (None, None));
    let root = "securityContext: {runAsUser: 0}\ncontainers: [{name: istio-proxy}]";
    assert_eq!(users(root), (Some(65532), Some(65532)));
    assert_eq!(users(&own.replace("1337", "0")), (Some(65532), Some(65532)));
}

#[test]
fn the_token_is_for_the_agent_alone() {
    let text = pod("containers: [{name: istio-proxy}, {name: web}]\ninitContainers: [{name: setup}]");
    let with = into_manifests(text.as_bytes(), &agent(Some("/etc/certs"))).unwrap().text;
    let value: Value = serde_saphyr::from_str(&with).unwrap();
    let mounting = |volume: &str| {
        let mut names = Vec::new();
        for list in ["containers", "initContainers"] {
            for container in value["spec"][list].as_array().unwrap() {
                let mounts = container["volumeMounts"].as_array().map_or(&[][..], Vec::as_slice);
                if mounts.iter().any(|mount| mount["name"] == volume) {
                    names.push(container["name"].as_str().unwrap().to_owned());
                }
            }
        }
        names
    };
    assert_eq!(mounting(CREDENTIALS), [AGENT]);
    assert_eq!(mounting(SOCKET), ["istio-proxy", AGENT]);
    assert_eq!(mounting(FILES), ["istio-proxy", AGENT]);
    // Another agent of that name is nobody to share a token with.
    let other = with.replace("image: registry.example.org/mica:1", "image: other");
    let said = into_manifests(other.as_bytes(), &agent(Some("/etc/certs"))).unwrap_err().to_string();
    assert!(said.contains("a container mica-agent is there, and is not the one"), "{said}");
}

#[test]
fn an_agent_sends_spans_and_shows_metrics_where_it_is_told_to() {
    let text = pod("containers: [{name: istio-proxy}]");
    let agent_of = |wish: &Wish| {
        let with = into_manifests(text.as_bytes(), wish).unwrap().text;
        assert_eq!(into_manifests(with.as_bytes(), wish).unwrap().text, with);
        let value: Value = serde_saphyr::from_str(&with).unwrap();
        (with, value.pointer("/spec/initContainers/0").unwrap().clone())
    };
    let (quiet, container) = agent_of(&agent(None));
    assert!(container.get("ports").is_none());
    assert!(container["args"].as_array().unwrap().contains(&json!("--http-address=127.0.0.1:0")));
    let (loud, container) = agent_of(&observed());
    assert_eq!(container["ports"], json!([{"name": METRICS, "containerPort": 15020}]));
    let flags = &container["args"].as_array().unwrap()[5..];
    let wanted = [
        "--http-address=0.0.0.0:15020",
        "--trace-otlp=http://otel:4318/v1/traces",
        "--trace-zipkin=https://zipkin.example.org/spans?a=b",
    ];
    assert_eq!(flags, wanted);
    // An API server adds the protocol.
    let stored = loud.replace("containerPort: 15020", "containerPort: 15020\n      protocol: TCP");
    assert_eq!(into_manifests(stored.as_bytes(), &observed()).unwrap().text, stored);
    // One that is there and does otherwise is none of the two.
    for (there, wish) in [(&quiet, observed()), (&loud, agent(None))] {
        let said = into_manifests(there.as_bytes(), &wish).unwrap_err().to_string();
        assert!(said.contains("a container mica-agent is there, and is not the one"), "{said}");
    }
}

#[test]
fn a_port_of_another_container_is_not_taken_from_it() {
    for (ports, is_taken) in [
        ("[{containerPort: 8080}, {containerPort: 15020}]", true),
        ("[{containerPort: 15020, protocol: TCP}]", true),
        ("[{containerPort: 15020, protocol: UDP}]", false),
        ("[{containerPort: 8080, hostPort: 15020}]", false),
    ] {
        for list in ["containers", "initContainers"] {
            let other = format!("{{name: web, ports: {ports}}}");
            let text = match list {
                "containers" => pod(&format!("containers:\n- name: istio-proxy\n- {other}")),
                _ => pod(&format!("containers: [{{name: istio-proxy}}]\ninitContainers:\n- {other}")),
            };
            match into_manifests(text.as_bytes(), &observed()) {
                Ok(_) => assert!(!is_taken, "{text}"),
                Err(error) => {
                    let said = error.to_string();
                    let wanted = ", line 7: Pod web: the port 15020 is that of the container web, and cannot";
                    assert!(is_taken && said.contains(wanted), "{said}");
                }
            }
            into_manifests(text.as_bytes(), &agent(None)).unwrap();
        }
    }
}

/// A manifest to be written in many ways.
enum Item {
    /// As it stands.
    Scalar(&'static str),
    /// A block scalar's header and lines.
    Block(&'static str, &'static [&'static str]),
    Map(Vec<(&'static str, Item)>),
    List(Vec<Item>),
}

struct Writer {
    state: u64,
    out: String,
    newline: &'static str,
}

impl Writer {
    fn draw(&mut self, below: u64) -> u64 {
        self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.state >> 33) % below
    }

    fn end_line(&mut self, margin: usize) {
        if self.draw(5) == 0 {
            self.out.push_str(" # aside");
        }
        self.out.push_str(self.newline);
        if self.draw(8) == 0 {
            let margin = margin + self.draw(4) as usize;
            let _ = write!(self.out, "{:margin$}# a line of its own{}", "", self.newline);
        }
        if self.draw(16) == 0 {
            self.out.push_str(self.newline);
        }
    }

    fn block(&mut self, item: &Item, margin: usize, inline: bool) {
        match item {
            Item::Map(fields) if !fields.is_empty() => {
                for (number, (name, value)) in fields.iter().enumerate() {
                    if number > 0 || !inline {
                        let _ = write!(self.out, "{:margin$}", "");
                    }
                    let quote = ["", "", "", "\"", "'"][self.draw(5) as usize];
                    let _ = write!(self.out, "{quote}{name}{quote}:");
                    self.value(value, margin);
                }
            }
            Item::List(items) if !items.is_empty() => {
                for (number, item) in items.iter().enumerate() {
                    if number > 0 || !inline {
                        let _ = write!(self.out, "{:margin$}", "");
                    }
                    self.out.push('-');
                    if matches!(item, Item::Map(fields) if !fields.is_empty()) && self.draw(4) > 0 {
                        let wide = 1 + (self.draw(4) == 0) as usize;
                        let _ = write!(self.out, "{:wide$}", "");
                        self.block(item, margin + 1 + wide, true);
                    } else {
                        self.value(item, margin);
                    }
                }
            }
            _ => {}
        }
    }

    /// Behind a colon or a dash.
    fn value(&mut self, item: &Item, margin: usize) {
        match item {
            Item::Scalar("") => self.end_line(margin),
            Item::Scalar(text) => {
                let _ = write!(self.out, " {text}");
                self.end_line(margin);
            }
            Item::Block(header, lines) => {
                let _ = write!(self.out, " {header}{}", self.newline);
                for line in *lines {
                    let inner = if line.is_empty() { 0 } else { margin + 2 };
                    let _ = write!(self.out, "{:inner$}{line}{}", "", self.newline);
                }
            }
            Item::Map(fields) if fields.is_empty() => {
                self.out.push_str(" {}");
                self.end_line(margin);
            }
            Item::List(items) if items.is_empty() => {
                self.out.push_str(" []");
                self.end_line(margin);
            }
            item if can_flow(item) && self.draw(6) == 0 => {
                self.out.push(' ');
                let lines = self.draw(3) == 0;
                self.flow(item, margin + 2, lines);
                self.end_line(margin);
            }
            item => {
                self.end_line(margin);
                let deeper = match item {
                    Item::List(_) => self.draw(2) as usize * 2,
                    _ => 1 + self.draw(4) as usize,
                };
                // A list may stand below its name, but not below the dash that it belongs to.
                let dash = self.out.trim_end().ends_with('-') || deeper == 0 && self.begins_with_dash(margin);
                self.block(item, margin + if dash { deeper.max(1) } else { deeper }, false);
            }
        }
    }

    fn begins_with_dash(&self, margin: usize) -> bool {
        self.out.lines().rev().any(|line| {
            let text = line.trim_start();
            !text.starts_with('#')
                && !text.is_empty()
                && line.len() - text.len() <= margin
                && text.starts_with('-')
        })
    }

    fn flow(&mut self, item: &Item, margin: usize, lines: bool) {
        let (open, close, count) = match item {
            Item::Scalar("") => return self.out.push('~'),
            Item::Scalar(text) => return self.out.push_str(text),
            Item::Block(..) => return,
            Item::Map(fields) => ('{', '}', fields.len()),
            Item::List(items) => ('[', ']', items.len()),
        };
        self.out.push(open);
        for number in 0..count {
            if number > 0 {
                self.out.push(',');
            }
            if lines {
                let _ = write!(self.out, "{}{:margin$}", self.newline, "");
            } else if self.draw(2) == 0 {
                self.out.push(' ');
            }
            match item {
                Item::Map(fields) => {
                    let (name, value) = &fields[number];
                    let quote = ["", "\""][self.draw(2) as usize];
                    let _ = write!(self.out, "{quote}{name}{quote}: ");
                    self.flow(value, margin + 2, lines);
                }
                Item::List(items) => self.flow(&items[number], margin + 2, lines),
                _ => {}
            }
        }
        if count > 0 && self.draw(6) == 0 {
            self.out.push(',');
        }
        if lines {
            let _ = write!(self.out, "{}{:margin$}", self.newline, "");
        }
        self.out.push(close);
    }
}

fn can_flow(item: &Item) -> bool {
    match item {
        Item::Scalar(_) => true,
        Item::Block(..) => false,
        Item::Map(fields) => fields.iter().all(|(_, value)| can_flow(value)),
        Item::List(items) => items.iter().all(can_flow),
    }
}

/// A pod of any shape, which has the container.
fn any_pod(writer: &mut Writer) -> Item {
    use Item::{Block, List, Map, Scalar};
    let volume = || Map(vec![("name", Scalar("tmp")), ("emptyDir", Map(vec![]))]);
    let mount = || Map(vec![("mountPath", Scalar("/tmp")), ("name", Scalar("\"tmp\""))]);
    let some = |writer: &mut Writer, item: &dyn Fn() -> Item| match writer.draw(4) {
        0 => None,
        1 => Some(Scalar(["", "null", "~"][writer.draw(3) as usize])),
        2 => Some(List(vec![])),
        _ => Some(List((0..=writer.draw(2)).map(|_| item()).collect())),
    };
    let extra = |writer: &mut Writer| match writer.draw(6) {
        0 => Block("|", &["set -e", "", "# no comment", "echo"]),
        1 => Block("|+", &["kept", ""]),
        2 => Block(">-", &["folded", "  more"]),
        3 => Scalar("'it''s, [so]'"),
        4 => Map(vec![("a", Scalar("1")), ("b", List(vec![Scalar("x"), Scalar("")]))]),
        _ => Scalar("plain text"),
    };
    let shuffled = |writer: &mut Writer, mut fields: Vec<(&'static str, Item)>| {
        for last in (1..fields.len()).rev() {
            fields.swap(last, writer.draw(last as u64 + 1) as usize);
        }
        Map(fields)
    };
    let mut containers = Vec::new();
    for name in ["web", "istio-proxy", "log"] {
        if name != "istio-proxy" && writer.draw(2) == 0 {
            continue;
        }
        let mut fields = vec![("name", Scalar(name))];
        if let Some(mounts) = some(writer, &mount) {
            fields.push(("volumeMounts", mounts));
        }
        for key in ["x", "y"] {
            if writer.draw(2) == 0 {
                fields.push((key, extra(writer)));
            }
        }
        containers.push(shuffled(writer, fields));
    }
    let first = containers.len() > 1 && writer.draw(3) == 0;
    let init = if first { containers.split_off(1) } else { Vec::new() };
    let mut spec = vec![("containers", List(containers))];
    if !init.is_empty() {
        spec.push(("initContainers", List(init)));
    } else if let Some(empty) = some(writer, &|| Map(vec![("name", Scalar("setup"))])) {
        spec.push(("initContainers", empty));
    }
    if let Some(volumes) = some(writer, &volume) {
        spec.push(("volumes", volumes));
    }
    for key in ["p", "q", "r"] {
        if writer.draw(3) == 0 {
            spec.push((key, extra(writer)));
        }
    }
    let spec = shuffled(writer, spec);
    let template = [("metadata", Map(vec![("labels", Map(vec![("app", Scalar("web"))]))])), ("spec", spec)];
    let fields = vec![
        ("apiVersion", Scalar("apps/v1")),
        ("kind", Scalar("Deployment")),
        ("metadata", Map(vec![("name", Scalar("web"))])),
        ("spec", Map(vec![("template", Map(template.into()))])),
    ];
    shuffled(writer, fields)
}

/// Every text is made of these letters in this order, with others between them.
fn is_within(text: &str, whole: &str) -> bool {
    let mut letters = whole.chars();
    text.chars().all(|wanted| letters.any(|letter| letter == wanted))
}

/// What is to be there, worked out another way.
fn expected(mut before: Value, additions: &[Addition]) -> Value {
    let spec = before.pointer_mut("/spec/template/spec").unwrap();
    for Addition { place, value } in additions {
        let list = match *place {
            Place::Mounts { list, index } => &mut spec[list][index]["volumeMounts"],
            Place::InitContainers => &mut spec["initContainers"],
            Place::Volumes => &mut spec["volumes"],
        };
        if list.is_null() {
            *list = json!([]);
        }
        let list = list.as_array_mut().unwrap();
        let at = if *place == Place::InitContainers { 0 } else { list.len() };
        list.insert(at, value.json());
    }
    before
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_the_layout_exactly_that_is_put_in(seed in any::<u64>(), way in 0usize..5) {
        let wish = match way {
            0 => secret(),
            1 => agent(None),
            2 => agent(Some("/etc/certs")),
            3 => observed(),
            _ => token(),
        };
        let mut writer = Writer { state: seed, out: String::new(), newline: "\n" };
        if writer.draw(8) == 0 {
            writer.newline = "\r\n";
        }
        let deployment = any_pod(&mut writer);
        if writer.draw(4) == 0 && can_flow(&deployment) {
            let lines = writer.draw(2) == 0;
            writer.flow(&deployment, 2, lines);
        } else {
            writer.block(&deployment, 0, false);
        }
        let mut text = writer.out;
        if seed % 7 == 0 && !text.contains('|') && !text.contains('>') {
            text.truncate(text.trim_end().len());
        }
        let before: Value = serde_saphyr::from_str(&text).map_err(|error| TestCaseError::fail(format!("{error}\n{text}")))?;
        let Decision::Lacks(additions) = lacks(before.pointer("/spec/template").unwrap(), &wish).unwrap() else {
            panic!("{text}");
        };
        prop_assert!(additions.len() >= 2);
        let after = into_manifests(text.as_bytes(), &wish).map_err(|error| TestCaseError::fail(format!("{error}\n{text}")))?.text;
        let read: Value = serde_saphyr::from_str(&after).map_err(|error| TestCaseError::fail(format!("{error}\n{after}")))?;
        prop_assert_eq!(&read, &expected(before.clone(), &additions), "{}\n---\n{}", text, after);
        // Nothing is lost but emptiness.
        let [kept, whole] = [&text, &after].map(|text| text.split_whitespace().collect::<String>());
        let kept = ["[]", "null", "~"].iter().fold(kept, |text, empty| text.replace(empty, ""));
        prop_assert!(is_within(&kept, &whole), "{}\n---\n{}", text, after);
        prop_assert_eq!(text.matches('#').count(), after.matches('#').count());
        if !text.contains("\r\n") {
            prop_assert!(!after.contains('\r'));
        } else {
            prop_assert_eq!(after.matches('\n').count(), after.matches("\r\n").count());
        }
        let again = into_manifests(after.as_bytes(), &wish).unwrap();
        prop_assert_eq!(&again.text, &after);
        // Among other documents it is the same.
        let [among, wanted] = [&text, &after].map(|text| {
            let end = if text.ends_with('\n') { "" } else { "\n" };
            format!("# first\na: b\n---\n{text}{end}---\nc: d\n")
        });
        let among = into_manifests(among.as_bytes(), &wish).unwrap().text;
        let [among, wanted] = [&among, &wanted].map(|text| text.replace("\r\n", "\n"));
        let among_read: Vec<Value> = serde_saphyr::from_multiple(&among).unwrap();
        let wanted_read: Vec<Value> = serde_saphyr::from_multiple(&wanted).unwrap();
        prop_assert_eq!(among_read, wanted_read);
        // As JSON, and as a patch.
        for json in [before.to_string(), format!("{before:#}")] {
            let after = into_manifests(json.as_bytes(), &wish).unwrap().text;
            let read: Value = serde_json::from_str(&after).unwrap();
            prop_assert_eq!(&read, &expected(before.clone(), &additions));
            prop_assert_eq!(after.contains('\n'), json.contains('\n'));
        }
        let pod = before.pointer("/spec/template").unwrap();
        let patched = patched(pod.clone(), &patch(pod, &additions));
        let whole = expected(before.clone(), &additions);
        prop_assert_eq!(&patched, whole.pointer("/spec/template").unwrap());
    }

    #[test]
    fn any_text_is_answered(text in "(kind: (Pod|List)\n|spec:|items:|containers:|name: istio-proxy|[-:&*<>|{}\\[\\],#!%'\" \n\ta-c]){0,40}") {
        let full = format!("apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - name: istio-proxy\n    x: {text}\n");
        for text in [&text, &full] {
            if let Ok(done) = into_manifests(text.as_bytes(), &agent(Some("/c"))) {
                let again = into_manifests(done.text.as_bytes(), &agent(Some("/c"))).unwrap();
                prop_assert_eq!(again.text, done.text);
            }
        }
    }
}

/// Additions of a JSON patch, done as an API server does them.
fn patched(mut value: Value, patch: &Value) -> Value {
    for operation in patch.as_array().unwrap() {
        assert_eq!(operation["op"], "add");
        let (holder, last) = operation["path"].as_str().unwrap().rsplit_once('/').unwrap();
        let added = operation["value"].clone();
        match value.pointer_mut(holder).unwrap() {
            Value::Array(items) if last == "-" => items.push(added),
            Value::Array(items) => items.insert(last.parse().unwrap(), added),
            Value::Object(fields) => drop(fields.insert(last.to_owned(), added)),
            other => panic!("{other}"),
        }
    }
    value
}
