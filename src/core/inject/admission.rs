//! The same for a pod that is being made: an AdmissionReview in, an AdmissionReview with a JSON patch out.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Decision, SWITCH, Wish, lacks, patch, switch};

/// Where nothing is ever put in, beside Mica's own namespace: without its pods there is no cluster.
const NEVER: &str = "kube-system";

/// What pods get, and where they do not.
#[derive(Clone, Debug)]
pub struct Rules {
    /// What they get.
    pub wish: Wish,
    /// Mica's own namespace, whose pods cannot wait for Mica.
    pub own: String,
}

/// What became of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Became {
    /// What it lacked was put in.
    Changed,
    /// It had everything.
    Complete,
    /// It says that it is to be left alone, or is in a namespace that is.
    LeftAlone,
    /// It has no container of the name.
    NoContainer,
    /// It says something that contradicts what it is to have, and is refused.
    Refused,
}

impl Became {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Changed, Self::Complete, Self::LeftAlone, Self::NoContainer, Self::Refused];

    /// For metrics and the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Changed => "changed",
            Self::Complete => "complete",
            Self::LeftAlone => "left_alone",
            Self::NoContainer => "no_container",
            Self::Refused => "refused",
        }
    }
}

/// What is answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// The AdmissionReview.
    pub answer: Value,
    /// What became of the pod.
    pub became: Became,
    /// Why it is refused.
    pub fault: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Review {
    api_version: String,
    kind: String,
    request: Request,
}

#[derive(Deserialize)]
struct Request {
    uid: String,
    #[serde(default)]
    kind: Kind,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    operation: String,
    #[serde(default)]
    object: Value,
}

#[derive(Default, Deserialize)]
struct Kind {
    #[serde(default)]
    group: String,
    #[serde(default)]
    version: String,
    #[serde(default)]
    kind: String,
}

/// Answers an AdmissionReview; what is none is an error.
pub fn review(body: &[u8], rules: &Rules) -> Result<Verdict, String> {
    // What serde says may show what stands there.
    let Review { api_version, kind, request } = serde_json::from_slice(body).map_err(|fault| {
        let (line, column) = (fault.line(), fault.column());
        format!("this is no AdmissionReview: line {line}, column {column}")
    })?;
    if (api_version.as_str(), kind.as_str()) != ("admission.k8s.io/v1", "AdmissionReview") {
        return Err("this is no AdmissionReview of admission.k8s.io/v1".to_owned());
    }
    let Kind { group, version, kind } = &request.kind;
    let is_new_pod = (group.as_str(), version.as_str(), kind.as_str()) == ("", "v1", "Pod")
        && request.operation == "CREATE";
    let is_excluded = request.namespace == NEVER || request.namespace == rules.own;
    if !is_new_pod || is_excluded {
        return Ok(answered(&request.uid, Became::LeftAlone, json!({})));
    }
    let pod = &request.object;
    let decision = match lacks(pod, &rules.wish) {
        Ok(decision) => decision,
        Err(fault) => {
            let message = format!("mica cannot put into this pod what it lacks: {}", fault.reason);
            let status = json!({ "code": 422, "reason": "Invalid", "message": message });
            let said = json!({ "allowed": false, "status": status });
            return Ok(Verdict {
                fault: Some(fault.reason),
                ..answered(&request.uid, Became::Refused, said)
            });
        }
    };
    Ok(match decision {
        Decision::OptedOut | Decision::NoPod => answered(&request.uid, Became::LeftAlone, json!({})),
        Decision::NoContainer(fault) => {
            // Of a namespace some pods have no proxy; one that asks by itself is to hear of it.
            let asked = switch(pod).is_ok_and(|said| said == Some(true));
            let warnings = if asked {
                json!({ "warnings": [format!("{SWITCH} is true, and nothing was put in: {}", fault.reason)] })
            } else {
                json!({})
            };
            answered(&request.uid, Became::NoContainer, warnings)
        }
        Decision::Lacks(additions) if additions.is_empty() => {
            answered(&request.uid, Became::Complete, json!({}))
        }
        Decision::Lacks(additions) => {
            let patch = STANDARD.encode(patch(pod, &additions).to_string());
            let said = json!({ "patchType": "JSONPatch", "patch": patch });
            answered(&request.uid, Became::Changed, said)
        }
    })
}

fn answered(uid: &str, became: Became, said: Value) -> Verdict {
    let mut response = json!({ "uid": uid, "allowed": true });
    if let (Value::Object(response), Value::Object(said)) = (&mut response, said) {
        response.extend(said);
    }
    let answer = json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response,
    });
    Verdict { answer, became, fault: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::inject::What;

    fn rules() -> Rules {
        Rules {
            wish: Wish { container: "istio-proxy".to_owned(), what: What::Secret },
            own: "istio-system".to_owned(),
        }
    }

    fn asked(change: impl FnOnce(&mut Value)) -> Verdict {
        let mut review = json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {
                "uid": "u", "kind": {"group": "", "version": "v1", "kind": "Pod"}, "namespace": "shop",
                "operation": "CREATE",
                "object": {
                    "metadata": {"labels": {}},
                    "spec": {"serviceAccountName": "web", "containers": [{"name": "istio-proxy"}]},
                },
            },
        });
        change(&mut review);
        let verdict = super::review(review.to_string().as_bytes(), &rules()).unwrap();
        assert_eq!(verdict.answer["response"]["uid"], "u");
        assert_eq!(verdict.answer["response"]["allowed"], verdict.became != Became::Refused);
        let patched = verdict.answer["response"].get("patch").is_some();
        assert_eq!(patched, verdict.became == Became::Changed);
        verdict
    }

    #[test]
    fn a_pod_that_is_made_gets_what_it_lacks() {
        let verdict = asked(|_| {});
        let patch = verdict.answer["response"]["patch"].as_str().unwrap();
        let patch: Value = serde_json::from_slice(&STANDARD.decode(patch).unwrap()).unwrap();
        assert_eq!(patch[0]["path"], "/spec/containers/0/volumeMounts");
        assert_eq!(patch[1]["value"][0]["secret"]["secretName"], "istio.web");
        assert_eq!(verdict.answer["response"]["patchType"], "JSONPatch");
    }

    #[test]
    fn what_is_no_new_pod_or_in_a_namespace_that_is_never_changed_is_left_alone() {
        for change in [
            (|review| review["request"]["namespace"] = "kube-system".into()) as fn(&mut Value),
            |review| review["request"]["namespace"] = "istio-system".into(),
            |review| review["request"]["operation"] = "UPDATE".into(),
            |review| review["request"]["kind"]["kind"] = "Deployment".into(),
            |review| review["request"]["kind"]["group"] = "example.org".into(),
            |review| review["request"]["object"]["metadata"]["labels"][SWITCH] = "false".into(),
        ] {
            assert_eq!(asked(change).became, Became::LeftAlone);
        }
    }

    #[test]
    fn a_pod_without_the_container_is_let_through_and_one_that_contradicts_is_not() {
        let bare = |review: &mut Value| {
            review["request"]["object"]["spec"]["containers"] = json!([{"name": "web"}]);
        };
        let verdict = asked(bare);
        assert_eq!(verdict.became, Became::NoContainer);
        assert!(verdict.answer["response"].get("warnings").is_none());
        let verdict = asked(|review| {
            bare(review);
            review["request"]["object"]["metadata"]["labels"][SWITCH] = "true".into();
        });
        assert!(verdict.answer["response"]["warnings"][0].as_str().unwrap().contains("there is web"));
        let verdict = asked(|review| {
            review["request"]["object"]["spec"]["volumes"] = json!([{"name": "istio-certs", "emptyDir": {}}]);
        });
        assert_eq!(verdict.became, Became::Refused);
        let said = verdict.answer["response"]["status"]["message"].as_str().unwrap();
        assert!(said.contains("the volume istio-certs is there"), "{said}");
    }

    #[test]
    fn what_is_no_review_is_refused_without_showing_it() {
        for body in [
            "",
            "{}",
            "[1]",
            "{\"secret\": 1",
            "{\"apiVersion\": \"v1\", \"kind\": \"Pod\", \"request\": {\"uid\": \"\"}}",
        ] {
            let said = super::review(body.as_bytes(), &rules()).unwrap_err();
            assert!(said.starts_with("this is no AdmissionReview") && !said.contains("secret"), "{said}");
        }
        let deep = format!("{{\"request\": {}", "[".repeat(100_000));
        assert!(super::review(deep.as_bytes(), &rules()).is_err());
    }
}
