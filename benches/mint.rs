//! What a certificate costs beside its floor, the signature: CPU time, in turns within one run, so that a
//! noisy machine disturbs both alike. `cargo bench --bench mint`.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

mod floor;

use std::hint::black_box;
use std::sync::Arc;

use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;
use mica::core::csr::CheckedCsr;
use mica::core::issuer::{self, Issuer, Order};
use mica::core::key::{KeyKind, PublicKey};
use mica::core::lifetime::Lifetime;
use mica::core::pem;
use mica::core::profile::Profile;
use mica::core::spiffe::{ServiceAccount, TrustDomain};
use mica::sys::{clock, keys};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
};

const ROUNDS: usize = 41;
const EACH: u32 = 200;

fn main() {
    let trust_domain = TrustDomain::parse("cluster.local").unwrap();
    let id = ServiceAccount::new("bookinfo", "productpage").unwrap().spiffe_id(&trust_domain);
    let root_key = keys::generate(KeyKind::P256).unwrap();
    let signing = root_key.signing().unwrap();
    let organization = "cluster.local".parse().unwrap();
    let root = issuer::root(
        &signing,
        &Profile::Root { organization: &organization, trust_domain: &trust_domain },
        "10y".parse().unwrap(),
        clock::now(),
        keys::serial_number().unwrap(),
    )
    .unwrap();
    let root = Certificate::from_der(root.der()).unwrap();
    let issuer = Issuer::new(
        Arc::new(signing),
        std::slice::from_ref(&root),
        TrustBundle::new([root.clone()]).unwrap(),
        &trust_domain,
    )
    .unwrap();
    let workload = keys::generate(KeyKind::P256).unwrap();
    let csr = rcgen::CertificateParams::default().serialize_request(&workload.signing().unwrap()).unwrap();
    let csr_pem = pem::encode(pem::CSR, csr.der());
    let day: Lifetime = "24h".parse().unwrap();
    let issue = |key: &PublicKey| {
        let order =
            Order { profile: Profile::Workload { id: &id, dns: &[], proved_at: None }, key, lifetime: day };
        let issued = issuer.issue(&order, clock::now(), keys::serial_number().unwrap()).unwrap();
        issuer.chain_pem(&issued)
    };

    let random = SystemRandom::new();
    let floor_key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
    let floor_key =
        EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, floor_key.as_ref(), &random).unwrap();
    let message = [7; 300];
    let signature = floor_key.sign(&random, &message).unwrap();
    let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, floor_key.public_key().as_ref());
    let sign = || {
        let _ = black_box(floor_key.sign(&random, &message));
    };
    let verify = || public.verify(&message, signature.as_ref()).unwrap();
    let generate = || {
        let _ = black_box(EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random));
    };

    report(
        "a leaf from a P-256 CSR in PEM, re-check and PEM included, against verify + sign",
        1.2,
        &mut || {
            verify();
            sign();
        },
        &mut || {
            let csr = CheckedCsr::from_pem(csr_pem.as_bytes()).unwrap();
            black_box(issue(csr.key()));
        },
    );
    report(
        "a leaf with a key of Mica's making, both as PEM, against generate + sign",
        1.8,
        &mut || {
            generate();
            sign();
        },
        &mut || {
            let key = keys::generate(KeyKind::P256).unwrap();
            black_box((issue(key.public()), key.to_pem()));
        },
    );
}

fn report(what: &str, bound: f64, floor: &mut dyn FnMut(), subject: &mut dyn FnMut()) {
    let mut ratios = Vec::new();
    let mut floors = Vec::new();
    for _ in 0..ROUNDS {
        let floor = floor::cpu(|| (0..EACH).for_each(|_| floor()));
        let subject = floor::cpu(|| (0..EACH).for_each(|_| subject()));
        floors.push(floor.as_secs_f64() * 1e6 / f64::from(EACH));
        ratios.push(subject.as_secs_f64() / floor.as_secs_f64());
    }
    ratios.sort_by(f64::total_cmp);
    floors.sort_by(f64::total_cmp);
    println!(
        "{what}: {:.2} times (min {:.2}, max {:.2}; at most {bound}); floor {:.1} us",
        ratios[ROUNDS / 2],
        ratios[0],
        ratios[ROUNDS - 1],
        floors[ROUNDS / 2],
    );
}
