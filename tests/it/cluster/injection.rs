//! What `mica inject` makes, on a real API server.

use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::control_plane::ControlPlane;
use super::manifests::good;

/// Manifests with what their pods lack, as `mica inject` writes them.
pub(super) fn injected(manifests: &str, arguments: &[&str]) -> String {
    let mut child = Command::new(env!("CARGO_BIN_EXE_mica"))
        .args(["inject", "-f", "-"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(manifests.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Each kind as its pods are mostly written, one after the other in block style, flow style and JSON.
fn workloads() -> Vec<String> {
    const SPEC: &str = "\
automountServiceAccountToken: false
serviceAccountName: web # its own
securityContext:
  runAsNonRoot: true
  seccompProfile: {type: RuntimeDefault}
containers:
- name: web
  image: \"web:1\"
  securityContext: &confined
    allowPrivilegeEscalation: false
    capabilities: {drop: [ALL]}
- name: istio-proxy
  image: envoy:1
  securityContext: *confined
";
    let indented = |spec: &str, margin: usize| -> String {
        spec.lines().map(|line| format!("{:margin$}{line}\n", "")).collect()
    };
    let once = SPEC.replace("containers:", "restartPolicy: Never\ncontainers:");
    let meta = "metadata: {name: web}";
    let template = |spec: &str, margin: usize| {
        let text = format!("metadata:\n  labels: {{app: web}}\nspec:\n{}", indented(spec, 2));
        format!("{:margin$}template:\n{}", "", indented(&text, margin + 2))
    };
    let selector = "spec:\n  selector: {matchLabels: {app: web}}\n";
    let block = [
        format!("apiVersion: v1\nkind: Pod\n{meta}\nspec:\n{}", indented(SPEC, 2)),
        format!("apiVersion: v1\nkind: PodTemplate\n{meta}\n{}", template(SPEC, 0)),
        format!(
            "apiVersion: v1\nkind: ReplicationController\n{meta}\nspec:\n  selector: {{app: web}}\n{}",
            template(SPEC, 2)
        ),
        format!("apiVersion: apps/v1\nkind: Deployment\n{meta}\n{selector}{}", template(SPEC, 2)),
        format!("apiVersion: apps/v1\nkind: ReplicaSet\n{meta}\n{selector}{}", template(SPEC, 2)),
        format!("apiVersion: apps/v1\nkind: StatefulSet\n{meta}\n{selector}{}", template(SPEC, 2)),
        format!("apiVersion: apps/v1\nkind: DaemonSet\n{meta}\n{selector}{}", template(SPEC, 2)),
        format!("apiVersion: batch/v1\nkind: Job\n{meta}\nspec:\n{}", template(&once, 2)),
        format!(
            "apiVersion: batch/v1\nkind: CronJob\n{meta}\nspec:\n  schedule: '0 3 * * *'\n  jobTemplate:\n    spec:\n{}",
            template(&once, 6)
        ),
    ];
    let values: Vec<Value> = block.iter().map(|text| serde_saphyr::from_str(text).unwrap()).collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": values});
    vec![
        block.join("---\n"),
        // Flow style, and what `kubectl get --output=json` prints.
        values.iter().map(|value| format!("{value}\n---\n")).collect(),
        format!("{list:#}\n"),
    ]
}

/// The objects as the API server would have them.
fn as_stored(plane: &ControlPlane, namespace: &str, manifests: &str) -> Vec<Value> {
    let file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
    std::fs::write(file.path(), manifests).unwrap();
    let arguments = [
        "create",
        "--dry-run=server",
        "--validate=strict",
        "--output=json",
        &format!("--namespace={namespace}"),
        &format!("--filename={}", file.path().display()),
    ];
    let said = good(plane, &arguments);
    let objects: Vec<Value> =
        serde_json::Deserializer::from_str(&said).into_iter().map(Result::unwrap).collect();
    let mut items: Vec<Value> = objects
        .into_iter()
        .flat_map(|object| match object["items"].as_array() {
            Some(items) => items.clone(),
            None => vec![object],
        })
        .collect();
    items.iter_mut().for_each(forget_who);
    items
}

/// What is different each time.
fn forget_who(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| {
                !matches!(name.as_str(), "uid" | "creationTimestamp") && !name.ends_with("controller-uid")
            });
            fields.values_mut().for_each(forget_who);
        }
        Value::Array(items) => items.iter_mut().for_each(forget_who),
        _ => {}
    }
}

fn pod_of(object: &mut Value) -> &mut Value {
    let path = match object["kind"].as_str().unwrap() {
        "Pod" => "/spec",
        "PodTemplate" => "/template/spec",
        "CronJob" => "/spec/jobTemplate/spec/template/spec",
        _ => "/spec/template/spec",
    };
    object.pointer_mut(path).unwrap()
}

/// Takes out of a list what has one of the names, and the list if nothing is left. What was taken.
fn take(holder: &mut Value, list: &str, names: &[&str]) -> Vec<Value> {
    let Some(items) = holder.get_mut(list).and_then(Value::as_array_mut) else { return Vec::new() };
    let taken: Vec<Value> =
        items.extract_if(.., |item| names.contains(&item["name"].as_str().unwrap())).collect();
    if items.is_empty() {
        holder.as_object_mut().unwrap().remove(list);
    }
    taken
}

fn names(items: &[Value]) -> Vec<&str> {
    items.iter().map(|item| item["name"].as_str().unwrap()).collect()
}

#[test]
fn an_api_server_takes_every_kind_and_finds_nothing_else_changed() {
    let plane = ControlPlane::shared();
    let namespace = plane.namespace();
    let name = &namespace.name;
    namespace.account("web");
    let enforce = "pod-security.kubernetes.io/enforce=restricted";
    good(plane, &["label", "namespace", name, enforce, "pod-security.kubernetes.io/warn=restricted"]);
    let agent = ["--mode", "agent", "--files", "/etc/certs"];
    let observed = [
        "--mode=agent",
        "--metrics-address=0.0.0.0:15020",
        "--trace-otlp=http://otel-collector.observability:4318",
        "--trace-zipkin=http://zipkin.observability:9411",
    ];
    for text in workloads() {
        let before = as_stored(plane, name, &text);
        assert_eq!(before.len(), 9);
        for (arguments, volumes, mounts, containers) in [
            (&[][..], &["istio-certs"][..], &["istio-certs"][..], &[][..]),
            (
                &["--mode", "token", "--container", "istio-proxy"],
                &["mica-credentials"],
                &["mica-credentials"],
                &[],
            ),
            (
                &agent,
                &["mica-credentials", "mica-socket", "mica-certs"],
                &["mica-socket", "mica-certs"],
                &["mica-agent"],
            ),
            (&observed, &["mica-credentials", "mica-socket"], &["mica-socket"], &["mica-agent"]),
        ] {
            let after_text = injected(&text, arguments);
            assert_eq!(injected(&after_text, arguments), after_text);
            let mut after = as_stored(plane, name, &after_text);
            for object in &mut after {
                let pod = pod_of(object);
                let taken = take(pod, "volumes", volumes);
                assert_eq!(names(&taken), volumes);
                if volumes == ["istio-certs"] {
                    assert_eq!(taken[0]["secret"]["secretName"], "istio.web");
                    assert_ne!(taken[0]["secret"]["optional"], true);
                }
                assert_eq!(names(&take(&mut pod["containers"][1], "volumeMounts", mounts)), mounts);
                assert_eq!(names(&take(pod, "initContainers", containers)), containers);
            }
            assert_eq!(after, before, "{arguments:?}");
        }
    }
}
