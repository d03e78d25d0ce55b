//! What a pod lacks. Everything is decided here, for manifests and for admission alike.

use core::net::SocketAddr;
use std::fmt;

use serde_json::Value;

use super::part::Part;
use crate::core::inspect::one_line;
use crate::core::spiffe::ServiceAccount;
use crate::core::url::Collector;

/// Label or annotation of a pod: `"false"` keeps everything out of it.
pub const SWITCH: &str = "mica.dev/inject";
/// The volume with the account's Secret, named as Istio named it.
pub const CERTIFICATES: &str = "istio-certs";
/// Where it is mounted, as Istio mounted it.
pub const CERTIFICATES_PATH: &str = "/etc/certs";
/// The container of the agent.
pub const AGENT: &str = "mica-agent";
/// The volume with the agent's socket, and where it is mounted.
pub const SOCKET: &str = "mica-socket";
/// Where the volume with the socket is mounted.
pub const SOCKET_PATH: &str = "/run/mica";
/// The volume with the files that the agent keeps.
pub const FILES: &str = "mica-certs";
/// The volume with what the agent needs to ask: its token, and the roots of the authority.
pub const CREDENTIALS: &str = "mica-credentials";
/// Where the agent has it.
pub const CREDENTIALS_PATH: &str = "/var/run/secrets/mica";
/// The port of the agent's metrics, for those who find it by its name.
pub const METRICS: &str = "mica-metrics";
/// Of the tokens. A kubelet renews them in time.
const TOKEN_SECONDS: u64 = 3600;
/// Who runs the agent where the pod would have it run by root, as in Mica's image.
const AGENT_USER: u64 = 65532;

/// What a pod is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The container that it is for.
    pub container: String,
    /// What that is.
    pub what: What,
}

/// What a pod is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// The Secret `istio.<account>`, mounted.
    Secret,
    /// An agent beside the container, which shares its socket with it.
    Agent(Box<Agent>),
    /// A token and the roots for an agent that is there already, in its container.
    Token {
        /// Whom the token is for.
        audience: String,
    },
}

/// The agent that is put beside a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// Its image.
    pub image: String,
    /// Whom it asks, as host and port.
    pub authority: String,
    /// Whom its token is for.
    pub audience: String,
    /// Where it keeps files for the container, if it is to.
    pub files: Option<String>,
    /// Where `/livez`, `/readyz` and `/metrics` are, if not for itself alone.
    pub metrics: Option<SocketAddr>,
    /// Where it sends spans by OTLP.
    pub otlp: Option<Collector>,
    /// Where it sends spans to Zipkin.
    pub zipkin: Option<Collector>,
}

/// Something to put into a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addition {
    /// Where to.
    pub place: Place,
    /// What.
    pub value: Part,
}

/// Where something is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// To the end of a container's `volumeMounts`.
    Mounts {
        /// `containers` or `initContainers`.
        list: &'static str,
        /// Which of them.
        index: usize,
    },
    /// Before all `initContainers`, since those that are there may need what it gives.
    InitContainers,
    /// To the end of `volumes`.
    Volumes,
}

impl Place {
    /// The way from the pod's spec to what has the list, and the list's name.
    pub(super) fn holder(self) -> (Vec<Step>, &'static str) {
        match self {
            Self::Mounts { list, index } => (vec![Step::Key(list), Step::Index(index)], "volumeMounts"),
            Self::InitContainers => (Vec::new(), "initContainers"),
            Self::Volumes => (Vec::new(), "volumes"),
        }
    }
}

impl fmt::Display for Addition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Part::Map(fields) = &self.value else { return Ok(()) };
        let text = |wanted: &str| {
            fields.iter().find_map(|(name, value)| match value {
                Part::Text(text) if *name == wanted => Some(text.as_str()),
                _ => None,
            })
        };
        let name = text("name").unwrap_or_default();
        match self.place {
            Place::Volumes => write!(f, "volume {name}"),
            Place::InitContainers => write!(f, "init container {name}"),
            Place::Mounts { .. } => {
                write!(f, "mount of {name} at {}", text("mountPath").unwrap_or_default())
            }
        }
    }
}

/// One step on the way to a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Into a field.
    Key(&'static str),
    /// Into a list.
    Index(usize),
}

/// Why a pod cannot have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where, from the pod on.
    pub path: Vec<Step>,
    /// In words.
    pub reason: String,
}

/// What is to be done with a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing: its label or annotation says so.
    OptedOut,
    /// It has no spec.
    NoPod,
    /// It has no container of the name.
    NoContainer(Fault),
    /// It lacks this, or nothing.
    Lacks(Vec<Addition>),
}

/// Whether a pod's label or annotation [`SWITCH`] says yes or no, if it is there.
pub fn switch(pod: &Value) -> Result<Option<bool>, Fault> {
    let mut said = None;
    for map in ["labels", "annotations"] {
        let path = || vec![Step::Key("metadata"), Step::Key(map), Step::Key(SWITCH)];
        match pod.get("metadata").and_then(|metadata| metadata.get(map)).and_then(|map| map.get(SWITCH)) {
            None => {}
            Some(Value::String(text)) if text == "false" => return Ok(Some(false)),
            Some(Value::String(text)) if text == "true" => said = Some(true),
            Some(other) => {
                let reason =
                    format!("{SWITCH} is {}; write \"true\" or \"false\", with the quotes", told(other));
                return Err(Fault { path: path(), reason });
            }
        }
    }
    Ok(said)
}

/// What a pod, or a pod template, lacks: a value with `metadata` and `spec`.
pub fn lacks(pod: &Value, wish: &Wish) -> Result<Decision, Fault> {
    if switch(pod)? == Some(false) {
        return Ok(Decision::OptedOut);
    }
    let at = |steps: &[Step]| [&[Step::Key("spec")], steps].concat();
    let spec = match pod.get("spec") {
        None | Some(Value::Null) => return Ok(Decision::NoPod),
        Some(spec) => spec,
    };
    if !spec.is_object() {
        return Err(Fault {
            path: at(&[]),
            reason: format!("the pod's spec is {}, not a mapping", told(spec)),
        });
    }
    let pod = Pod { spec };
    let (list, index, container) = match pod.container(&wish.container)? {
        Ok(found) => found,
        Err(missing) => return Ok(Decision::NoContainer(missing)),
    };
    let mut additions = Vec::new();
    let mut mount = |volume: &str, path: &str, writable: bool| -> Result<(), Fault> {
        if !has_mount(container, volume, path, &at(&[Step::Key(list), Step::Index(index)]))? {
            additions.push(Addition {
                place: Place::Mounts { list, index },
                value: mount_of(volume, path, writable),
            });
        }
        Ok(())
    };
    let mut volumes = Vec::new();
    match &wish.what {
        What::Secret => {
            mount(CERTIFICATES, CERTIFICATES_PATH, false)?;
            let name = format!("istio.{}", pod.account()?);
            volumes.push(volume(CERTIFICATES, "secret", vec![("secretName", Part::Text(name))]));
        }
        What::Token { audience } => {
            mount(CREDENTIALS, CREDENTIALS_PATH, false)?;
            volumes.push(credentials(audience));
        }
        What::Agent(agent) => {
            mount(SOCKET, SOCKET_PATH, false)?;
            if let Some(files) = &agent.files {
                mount(FILES, files, false)?;
            }
            if let Some(address) = agent.metrics {
                pod.has_room_for(address.port())?;
            }
            let sidecar = pod.agent(agent, container);
            if !pod.has_agent(&sidecar)? {
                additions.push(Addition { place: Place::InitContainers, value: sidecar });
            }
            let memory = || vec![("medium", Part::text("Memory"))];
            volumes.push(credentials(&agent.audience));
            volumes.push(volume(SOCKET, "emptyDir", memory()));
            if agent.files.is_some() {
                volumes.push(volume(FILES, "emptyDir", memory()));
            }
        }
    }
    for value in volumes {
        if !pod.has_volume(&value)? {
            additions.push(Addition { place: Place::Volumes, value });
        }
    }
    Ok(Decision::Lacks(additions))
}

struct Pod<'a> {
    spec: &'a Value,
}

impl<'a> Pod<'a> {
    fn list(&self, name: &'static str) -> Result<&'a [Value], Fault> {
        list_of(self.spec, name, &[Step::Key("spec")])
    }

    fn container(&self, name: &str) -> Result<Result<(&'static str, usize, &'a Value), Fault>, Fault> {
        let mut names = Vec::new();
        for list in ["containers", "initContainers"] {
            for (index, container) in self.list(list)?.iter().enumerate() {
                match text_of(container, "name") {
                    Some(found) if found == name => return Ok(Ok((list, index, container))),
                    Some(found) => names.push(shown(found)),
                    None => {}
                }
            }
        }
        let there_are = match names.as_slice() {
            [] => "there is none".to_owned(),
            [one] => format!("there is {one}"),
            [some @ .., last] => format!("there are {} and {last}", some.join(", ")),
        };
        Ok(Err(Fault {
            path: vec![Step::Key("spec"), Step::Key("containers")],
            reason: format!("no container is called {}, {there_are}", shown(name)),
        }))
    }

    fn account(&self) -> Result<String, Fault> {
        for field in ["serviceAccountName", "serviceAccount"] {
            let path = || vec![Step::Key("spec"), Step::Key(field)];
            match self.spec.get(field) {
                None | Some(Value::Null) => {}
                Some(Value::String(name)) if name.is_empty() => {}
                Some(Value::String(name)) => {
                    return match ServiceAccount::new("default", name) {
                        Ok(account) => Ok(account.name().to_owned()),
                        Err(fault) => Err(Fault { path: path(), reason: fault.to_string() }),
                    };
                }
                Some(other) => {
                    let reason = format!("{field} is {}, not text; put it in quotes", told(other));
                    return Err(Fault { path: path(), reason });
                }
            }
        }
        Ok("default".to_owned())
    }

    fn has_volume(&self, wanted: &Part) -> Result<bool, Fault> {
        let wanted = wanted.json();
        for (index, volume) in self.list("volumes")?.iter().enumerate() {
            if volume.get("name") != wanted.get("name") {
                continue;
            }
            if covers(volume, &wanted) {
                return Ok(true);
            }
            let name = wanted.get("name").and_then(Value::as_str).unwrap_or_default();
            let reason = format!(
                "the volume {name} is there, and is not {wanted}; give it another name, or take it out to have it put in"
            );
            return Err(Fault {
                path: vec![Step::Key("spec"), Step::Key("volumes"), Step::Index(index)],
                reason,
            });
        }
        Ok(false)
    }

    fn has_agent(&self, wanted: &Part) -> Result<bool, Fault> {
        let wanted = wanted.json();
        for list in ["containers", "initContainers"] {
            for (index, container) in self.list(list)?.iter().enumerate() {
                if text_of(container, "name") != Some(AGENT) {
                    continue;
                }
                if list == "initContainers" && covers(container, &wanted) {
                    return Ok(true);
                }
                let reason = format!(
                    "a container {AGENT} is there, and is not the one that would be put in; take it out to have it put in"
                );
                return Err(Fault {
                    path: vec![Step::Key("spec"), Step::Key(list), Step::Index(index)],
                    reason,
                });
            }
        }
        Ok(false)
    }

    /// The agent begins before the others, and would have their port.
    fn has_room_for(&self, port: u16) -> Result<(), Fault> {
        for list in ["containers", "initContainers"] {
            for (index, container) in self.list(list)?.iter().enumerate() {
                let name = text_of(container, "name").unwrap_or_default();
                let at = [Step::Key("spec"), Step::Key(list), Step::Index(index)];
                let ports = list_of(container, "ports", &at)?;
                let taken = ports.iter().position(|one| {
                    one.get("containerPort").and_then(Value::as_u64) == Some(port.into())
                        && text_of(one, "protocol").is_none_or(|protocol| protocol == "TCP")
                });
                if let Some(taken) = taken.filter(|_| name != AGENT) {
                    let reason = format!(
                        "the port {port} is that of the container {}, and cannot be the agent's too; choose another one for its metrics",
                        shown(name)
                    );
                    return Err(Fault {
                        path: [&at[..], &[Step::Key("ports"), Step::Index(taken)]].concat(),
                        reason,
                    });
                }
            }
        }
        Ok(())
    }

    fn agent(&self, agent: &Agent, beside: &Value) -> Part {
        let mut args = vec![
            Part::text("agent"),
            Part::Text(format!("--authority-address={}", agent.authority)),
            Part::Text(format!("--authority-roots={CREDENTIALS_PATH}/root-cert.pem")),
            Part::Text(format!("--token-file={CREDENTIALS_PATH}/token")),
            Part::Text(format!("--socket={SOCKET_PATH}/agent.sock")),
            Part::Text(match agent.metrics {
                Some(address) => format!("--http-address={address}"),
                // Istio's agent has the port that is usual, in the same pod.
                None => "--http-address=127.0.0.1:0".to_owned(),
            }),
        ];
        for (flag, collector) in [("--trace-otlp", &agent.otlp), ("--trace-zipkin", &agent.zipkin)] {
            args.extend(collector.iter().map(|collector| Part::Text(format!("{flag}={}", collector.url()))));
        }
        let mut mounts =
            vec![mount_of(CREDENTIALS, CREDENTIALS_PATH, false), mount_of(SOCKET, SOCKET_PATH, true)];
        let mut probe = None;
        if let Some(files) = &agent.files {
            args.push(Part::Text(format!("--files={files}")));
            mounts.push(mount_of(FILES, files, true));
            // The containers behind it begin once there is something to read.
            let command = ["/usr/local/bin/mica", "verify", files].map(Part::text).to_vec();
            probe = Some(Part::Map(vec![
                ("exec", Part::Map(vec![("command", Part::List(command))])),
                ("periodSeconds", Part::Number(1)),
                ("timeoutSeconds", Part::Number(5)),
                ("failureThreshold", Part::Number(300)),
            ]));
        }
        let mut security = self.user(beside);
        security.extend([
            ("runAsNonRoot", Part::Flag(true)),
            ("allowPrivilegeEscalation", Part::Flag(false)),
            ("readOnlyRootFilesystem", Part::Flag(true)),
            ("capabilities", Part::Map(vec![("drop", Part::List(vec![Part::text("ALL")]))])),
            ("seccompProfile", Part::Map(vec![("type", Part::text("RuntimeDefault"))])),
        ]);
        let mut fields = vec![
            ("name", Part::text(AGENT)),
            ("image", Part::Text(agent.image.clone())),
            ("restartPolicy", Part::text("Always")),
            ("args", Part::List(args)),
        ];
        fields.extend(agent.metrics.map(|address| {
            let port =
                vec![("name", Part::text(METRICS)), ("containerPort", Part::Number(address.port().into()))];
            ("ports", Part::List(vec![Part::Map(port)]))
        }));
        fields.extend(probe.map(|probe| ("startupProbe", probe)));
        fields.push(("securityContext", Part::Map(security)));
        fields.push(("volumeMounts", Part::List(mounts)));
        Part::Map(fields)
    }

    /// The agent knows the container by its user, and its files are its own: it runs as the container does, but never
    /// as root.
    fn user(&self, beside: &Value) -> Vec<(&'static str, Part)> {
        let of = |holder: &Value, field| holder.get("securityContext")?.get(field)?.as_u64();
        let [user, group] = ["runAsUser", "runAsGroup"].map(|field| of(beside, field));
        match (user, of(self.spec, "runAsUser")) {
            (Some(0), _) | (None, Some(0)) => {
                vec![("runAsUser", Part::Number(AGENT_USER)), ("runAsGroup", Part::Number(AGENT_USER))]
            }
            _ => [("runAsUser", user), ("runAsGroup", group)]
                .into_iter()
                .filter_map(|(field, number)| Some((field, Part::Number(number?))))
                .collect(),
        }
    }
}

fn volume(name: &str, kind: &'static str, source: Vec<(&'static str, Part)>) -> Part {
    Part::Map(vec![("name", Part::text(name)), (kind, Part::Map(source))])
}

fn mount_of(volume: &str, path: &str, writable: bool) -> Part {
    let mut fields = vec![("name", Part::text(volume)), ("mountPath", Part::text(path))];
    if !writable {
        fields.push(("readOnly", Part::Flag(true)));
    }
    Part::Map(fields)
}

fn credentials(audience: &str) -> Part {
    let token = Part::Map(vec![
        ("audience", Part::text(audience)),
        ("expirationSeconds", Part::Number(TOKEN_SECONDS)),
        ("path", Part::text("token")),
    ]);
    let roots = Part::Map(vec![("name", Part::text("istio-ca-root-cert"))]);
    let sources =
        vec![Part::Map(vec![("serviceAccountToken", token)]), Part::Map(vec![("configMap", roots)])];
    volume(CREDENTIALS, "projected", vec![("sources", Part::List(sources))])
}

/// Whether a container mounts a volume at a path already.
fn has_mount(container: &Value, volume: &str, path: &str, at: &[Step]) -> Result<bool, Fault> {
    let mut elsewhere = None;
    let mut found = false;
    for (index, mount) in list_of(container, "volumeMounts", at)?.iter().enumerate() {
        let fault = move |reason: String| {
            let steps = [Step::Key("volumeMounts"), Step::Index(index)];
            Fault { path: [at, &steps].concat(), reason }
        };
        let (name, place) = (text_of(mount, "name"), text_of(mount, "mountPath").map(trimmed));
        let below = place.is_some_and(|place| {
            place.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        match (name == Some(volume), below) {
            (true, true) if place == Some(path) => {
                if mount.get("readOnly") != Some(&Value::Bool(true)) {
                    return Err(fault(format!(
                        "{volume} is mounted at {path} and not read-only; add readOnly: true"
                    )));
                }
                if ["subPath", "subPathExpr"].iter().any(|part| text_of(mount, part).is_some()) {
                    return Err(fault(format!(
                        "{volume} is mounted at {path} in part (subPath), and would not change there; take subPath out"
                    )));
                }
                found = true;
            }
            (_, true) => {
                return Err(fault(format!(
                    "{} is mounted at {} already, where {volume} belongs; take that mount out",
                    shown(name.unwrap_or("something")),
                    shown(place.unwrap_or_default()),
                )));
            }
            (true, false) => elsewhere = Some((fault, place)),
            (false, false) => {}
        }
    }
    match elsewhere {
        Some((fault, place)) if !found => Err(fault(format!(
            "{volume} is mounted at {}, and belongs at {path}; take that mount out, or put it there",
            shown(place.unwrap_or_default())
        ))),
        _ => Ok(found),
    }
}

/// As the kubelet takes it: `/etc/certs/` is `/etc/certs`.
fn trimmed(path: &str) -> &str {
    path.trim_end_matches('/')
}

/// Whether something that is there says at least what is wanted, as it does when an API server has added its defaults.
fn covers(found: &Value, wanted: &Value) -> bool {
    /// These take something away from what is wanted.
    const LESS: [&str; 3] = ["items", "subPath", "subPathExpr"];
    match (found, wanted) {
        (Value::Object(found), Value::Object(wanted)) => {
            !LESS.iter().any(|name| found.contains_key(*name))
                && wanted.iter().all(|(name, wanted)| {
                    found.get(name).is_some_and(|found| match (name.as_str(), found, wanted) {
                        ("mountPath", Value::String(found), Value::String(wanted)) => {
                            trimmed(found) == trimmed(wanted)
                        }
                        _ => covers(found, wanted),
                    })
                })
        }
        (Value::Array(found), Value::Array(wanted)) if wanted.iter().all(Value::is_object) => {
            wanted.iter().all(|wanted| found.iter().any(|found| covers(found, wanted)))
        }
        (found, wanted) => found == wanted,
    }
}

fn list_of<'a>(holder: &'a Value, name: &'static str, at: &[Step]) -> Result<&'a [Value], Fault> {
    match holder.get(name) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(items)) => Ok(items),
        Some(other) => Err(Fault {
            path: [at, &[Step::Key(name)]].concat(),
            reason: format!("{name} is {}, not a list", told(other)),
        }),
    }
}

fn text_of<'a>(holder: &'a Value, name: &str) -> Option<&'a str> {
    holder.get(name)?.as_str()
}

/// What something is, without telling what it says unless that is harmless.
fn told(value: &Value) -> String {
    match value {
        Value::Null => "empty".to_owned(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => format!("the number {number}"),
        Value::String(_) => "another text".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a mapping".to_owned(),
    }
}

/// A name that others chose, in a line of bounded length.
fn shown(name: &str) -> String {
    let line = one_line(name);
    match line.char_indices().nth(63) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
