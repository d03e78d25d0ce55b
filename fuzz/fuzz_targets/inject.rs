//! Manifests that something is put into: what comes out has everything, and stays so.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mica::core::inject::{Agent, Outcome, What, Wish, into_manifests};
use mica::core::url::Collector;

const POD: &[u8] = b"apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - name: istio-proxy\n    x: ";

fuzz_target!(|data: &[u8]| {
    let agent = Agent {
        image: "mica".to_owned(),
        authority: "mica.istio-system.svc:15012".to_owned(),
        audience: "istio-ca".to_owned(),
        files: Some("/etc/certs".to_owned()),
        metrics: "0.0.0.0:15020".parse().ok(),
        otlp: None,
        zipkin: Collector::new("http://zipkin:9411", "/api/v2/spans").ok(),
    };
    for what in [What::Secret, What::Agent(Box::new(agent))] {
        let wish = Wish { container: "istio-proxy".to_owned(), what };
        let within = [POD, data].concat();
        for text in [data, within.as_slice()] {
            match into_manifests(text, &wish) {
                Ok(done) => {
                    let again = into_manifests(done.text.as_bytes(), &wish).expect("what came out goes in");
                    assert_eq!(again.text, done.text);
                    let left =
                        |object: &mica::core::inject::Object| !matches!(object.outcome, Outcome::Changed(_));
                    assert!(again.objects.iter().all(left));
                    if done.objects.iter().all(left) {
                        assert_eq!(done.text.as_bytes(), text);
                    }
                }
                Err(error) => {
                    assert!(error.document >= 1 && error.line >= 1 && !error.to_string().contains('\n'));
                }
            }
        }
    }
});
