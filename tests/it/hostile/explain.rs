//! Questions: what a request would be answered. Whatever is asked, nothing is issued, and nobody is told of others.

use mica::proto::mica::v1::ExplainRequest;
use mica::proto::mica::v1::identity_service_client::IdentityServiceClient;
use tonic::{Code, Request};

use super::Expected::{Denied, Granted, Status};
use super::forge::{BASIC_CONSTRAINTS, Csr, DNS, URI, asking, csr, extension, names, sequence, tlv};
use super::{Answer, DB, Identity, LONGEST, Row, Stage, TOO_LARGE, WEB, answer_of, wire};
use crate::serve::mtls;

const PATH: &str = "/mica.v1.IdentityService/Explain";
const GONE: &str = "spiffe://cluster.local/ns/shop/sa/gone";
const DENIED: &str = "spiffe://cluster.local/ns/shop/sa/denied";
const NOBODY: &str = "";

#[rustfmt::skip]
pub(super) const ROWS: &[Row] = &[
    // What the others differ from.
    ("a question", |s| ask(s, |_| ()), Granted(WEB)),
    ("a question with a token", |s| ask(s, |q| q.by_token(&s.issuer.token("db"))), Granted(DB)),
    ("a question of a proxy", |s| ask(s, |q| { q.identity = Some(s.gateway.clone()); q.said(DB) }), Granted(DB)),

    // Who asks.
    ("a question without a credential", |s| ask(s, |q| q.identity = None), Denied("NO_CREDENTIAL", NOBODY)),
    ("a question with a token that is none", |s| ask(s, |q| q.by_token("a.b.c")), Denied("TOKEN_MALFORMED", NOBODY)),
    ("a question with a bad token beside a good certificate", |s| ask(s, |q| q.headers.push(("authorization", "Bearer x".to_owned()))), Denied("TOKEN_MALFORMED", NOBODY)),
    ("a question with a password", |s| ask(s, |q| q.headers.push(("authorization", "Basic d2ViOndlYg==".to_owned()))), Denied("CREDENTIAL_MALFORMED", NOBODY)),
    ("a question with a token of an account that is gone", |s| ask(s, |q| q.by_token(&s.gone_token)), Denied("ACCOUNT_GONE", GONE)),
    ("a question with a certificate of an account that is gone", |s| ask(s, |q| q.identity = Some(s.gone.clone())), Denied("ACCOUNT_GONE", GONE)),
    ("a question with a stranger's certificate", |s| ask(s, |q| q.identity = Some(super::forge::self_signed())), Denied("CERTIFICATE_FOREIGN", NOBODY)),
    ("a question of an account that policy denies", |s| ask(s, |q| q.by_token(&s.issuer.token("denied"))), Denied("IDENTITY_DENIED", DENIED)),
    ("a question of web, which is no proxy, about db", |s| ask(s, |q| q.said(DB)), Denied("FORWARDER_UNKNOWN", NOBODY)),
    ("a question of nobody about db", |s| ask(s, |q| { q.identity = None; q.said(DB) }), Denied("FORWARDER_UNKNOWN", NOBODY)),

    // For whom.
    ("a question about another identity", |s| ask(s, |q| q.message.impersonated_identity = DB.to_owned()), Denied("IMPERSONATOR_UNKNOWN", WEB)),
    ("a question about an identity that is none", |s| ask(s, |q| q.message.impersonated_identity = "../../etc".to_owned()), Denied("IMPERSONATOR_UNKNOWN", WEB)),
    ("a question about an identity of 60 kB", |s| ask(s, |q| q.message.impersonated_identity = "a".repeat(60_000)), Denied("IMPERSONATOR_UNKNOWN", WEB)),
    ("a question with a CSR for another identity", |s| ask(s, |q| q.message.csr = mtls::csr(DB)), Granted(WEB)),

    // With what.
    ("a question without a CSR", |s| ask(s, |q| q.message.csr.clear()), Granted(WEB)),
    ("a question with a CSR that is none", |s| ask(s, |q| q.message.csr = "-----BEGIN ".repeat(5_000)), Denied("CSR_MALFORMED", WEB)),
    ("a question with a CSR signed with another key", |s| ask(s, |q| q.message.csr = csr(|c| c.spki = Csr::new().spki)), Denied("CSR_SIGNATURE", WEB)),
    ("a question with a CSR for a CA", |s| ask(s, |q| q.message.csr = asking(&[extension(BASIC_CONSTRAINTS, true, &sequence(&[tlv(1, &[0xff])]))])), Denied("CSR_CA", WEB)),
    ("a question with a CSR for two URIs", |s| ask(s, |q| q.message.csr = asking(&[names(&[(URI, WEB.as_bytes()), (URI, DB.as_bytes())])])), Denied("CSR_URIS", WEB)),
    ("a question with a CSR for Mica's own DNS name", |s| ask(s, |q| q.message.csr = asking(&[names(&[(DNS, b"istiod.istio-system.svc")])])), Granted(WEB)),
    ("a question with a key of 65,536 bits", |s| ask(s, |q| q.message.csr = csr(|c| c.spki = super::csrs::rsa(&[0xff; 8_192], &[1, 0, 1]))), Denied("KEY_REFUSED", WEB)),
    ("a question for the least lifetime there is", |s| ask(s, |q| q.message.validity_duration = i64::MIN), Granted(WEB)),
    ("a question for a second more than the longest lifetime", |s| ask(s, |q| q.message.validity_duration = LONGEST + 1), Denied("LIFETIME_TOO_LONG", WEB)),
    ("a question for the most lifetime there is", |s| ask(s, |q| q.message.validity_duration = i64::MAX), Denied("LIFETIME_TOO_LONG", WEB)),

    // What is no question.
    ("a question of 1 MB", |s| ask(s, |q| q.message.csr = "a".repeat(1_000_000)), TOO_LARGE),
    ("a question of garbage", |s| wire::message_to(s, PATH, &[0xff; 100]), Status(Code::Internal)),
    ("a question whose identity is no text", |s| wire::message_to(s, PATH, &[0x1a, 2, 0xff, 0xfe]), Status(Code::Internal)),
    ("a question to a method that does not exist", |s| wire::message_to(s, "/mica.v1.IdentityService/Issue", &[]), Status(Code::Unimplemented)),
];

/// By web's certificate about web's identity, until a row changes it.
struct Question {
    identity: Option<Identity>,
    headers: Vec<(&'static str, String)>,
    message: ExplainRequest,
}

impl Question {
    fn by_token(&mut self, token: &str) {
        self.identity = None;
        self.headers.push(("authorization", format!("Bearer {token}")));
    }

    fn said(&mut self, id: &str) {
        self.headers.push(("x-forwarded-client-cert", format!("URI={id}")));
    }
}

fn ask(stage: &Stage, change: impl FnOnce(&mut Question)) -> Answer {
    let message =
        ExplainRequest { csr: mtls::csr(WEB), validity_duration: 3_600, ..ExplainRequest::default() };
    let mut question = Question { identity: Some(stage.web.clone()), headers: Vec::new(), message };
    change(&mut question);
    let mut request = Request::new(question.message);
    for (name, value) in &question.headers {
        request.metadata_mut().append(*name, value.parse().unwrap());
    }
    stage.runtime.block_on(async {
        let channel = stage.connect(question.identity.as_ref(), &[b"h2"]).await.unwrap();
        match IdentityServiceClient::new(channel).explain(request).await {
            Ok(answer) => Answer::Explained(answer.into_inner()),
            Err(status) => answer_of(status),
        }
    })
}
