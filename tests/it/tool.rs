//! The offline tools, as a user runs them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use crate::fixtures::{OpensslCa, deliver};
use crate::mica::{Done, ID, Place};

const FOUR: [&str; 4] = ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"];

fn mode(place: &Place, name: &str) -> u32 {
    fs::metadata(place.path(name)).expect("it is there").permissions().mode() & 0o7777
}

fn names(place: &Place, folder: &str) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(place.path(folder))
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn from_nothing_to_a_verified_certificate() {
    let place = Place::with_ca();
    for folder in ["root", "ca"] {
        assert_eq!(names(&place, folder), FOUR);
        assert_eq!((mode(&place, folder), mode(&place, &format!("{folder}/ca-key.pem"))), (0o700, 0o600));
    }
    assert_eq!(names(&place, "web"), ["cert-chain.pem", "csr.pem", "key.pem"]);
    assert_eq!(mode(&place, "web/key.pem"), 0o600);
    assert!(place.read("web/key.pem").starts_with("-----BEGIN PRIVATE KEY-----"), "PKCS#8");
    let good = place.ok(&[
        "verify",
        "web/cert-chain.pem",
        "--roots",
        "root/root-cert.pem",
        "--identity",
        ID,
        "--key",
        "web/key.pem",
    ]);
    assert!(good.starts_with(&format!("good: {ID}, until ")), "{good}");
    assert!(good.ends_with("and the key belongs to it\n"), "{good}");
    // The leaf and its intermediate, not the root.
    assert_eq!(place.read("web/cert-chain.pem").matches("BEGIN CERTIFICATE").count(), 2);
    // The CA, and the root above it.
    assert_eq!(
        place.read("ca/cert-chain.pem"),
        place.read("ca/ca-cert.pem") + &place.read("root/ca-cert.pem")
    );
    assert_eq!(place.read("root/cert-chain.pem"), place.read("root/root-cert.pem"));
    let facts = place.json(&["inspect", "ca", "root", "web/cert-chain.pem"]);
    assert_eq!(facts["sound"], true, "{facts:#}");
}

#[test]
fn every_kind_of_key_makes_a_ca_and_a_certificate() {
    for kind in ["p256", "p384", "ed25519"] {
        let place = Place::new();
        place.ok(&["root", "new", "--out", "root", "--key-kind", kind]);
        place.ok(&[
            "csr",
            "new",
            "--identity",
            ID,
            "--out",
            "web",
            "--key-kind",
            kind,
            "--dns",
            "web.default",
        ]);
        let sign = ["sign", "web/csr.pem", "--authority", "root", "--identity", ID, "--out", "web/chain.pem"];
        place.ok(&[&sign[..], &["--dns", "web.default", "--ttl", "10s"]].concat());
        let facts = place.json(&["inspect", "web/chain.pem"]);
        assert_eq!(facts["items"][0]["key"], kind);
        assert_eq!(facts["items"][0]["dns"], serde_json::json!(["web.default"]));
        assert_eq!(facts["items"].as_array().map(Vec::len), Some(1), "a root delivers no chain");
        place.ok(&["verify", "web/chain.pem", "--roots", "root/root-cert.pem", "--key", "web/key.pem"]);
    }
}

#[test]
fn options_of_a_root_are_in_it() {
    let place = Place::new();
    place.ok(&[
        "root",
        "new",
        "--out",
        "r",
        "--lifetime",
        "90d",
        "--organization",
        "Acme, Inc.",
        "--trust-domain",
        "example.org",
    ]);
    let root = &place.json(&["inspect", "r/ca-cert.pem"])["items"][0];
    assert_eq!(root["spiffe_id"], "spiffe://example.org");
    assert!(root["subject"].as_str().is_some_and(|s| s.contains("Acme, Inc.")), "{root}");
    let seconds = root["expires_in_seconds"].as_i64().expect("a number");
    assert!((89 * 86_400..=90 * 86_400).contains(&seconds), "{seconds}");
}

#[test]
fn passphrases_protect_keys_and_are_asked_for() {
    let place = Place::new();
    place.write("secret", "correct horse\n");
    place.write("wrong", "battery staple\n");
    place.ok(&["root", "new", "--out", "root", "--passphrase-file", "secret"]);
    assert!(place.read("root/ca-key.pem").starts_with("-----BEGIN ENCRYPTED PRIVATE KEY-----"));
    let new = ["intermediate", "new", "--root", "root", "--out", "ca", "--passphrase-file", "secret"];
    let said = place.refused(&new);
    assert!(said.contains("ca-key.pem") && said.contains("--root-passphrase-file"), "{said}");
    let said = place.refused(&[&new[..], &["--root-passphrase-file", "wrong"]].concat());
    assert!(said.contains("the passphrase is wrong"), "{said}");
    place.ok(&[&new[..], &["--root-passphrase-file", "secret"]].concat());
    place.ok(&["csr", "new", "--identity", ID, "--out", "web"]);
    let sign = ["sign", "web/csr.pem", "--authority", "ca", "--identity", ID, "--out", "-"];
    let said = place.refused(&sign);
    assert!(said.contains("ca-key.pem") && said.contains("--passphrase-file"), "{said}");
    place.ok(&[&sign[..], &["--passphrase-file", "secret"]].concat());
    place.write("empty", "\n");
    assert!(place.refused(&["root", "new", "--out", "x", "--passphrase-file", "empty"]).contains("empty"));
}

#[test]
fn a_csr_for_somebody_elses_root() {
    let place = Place::new();
    place.ok(&["intermediate", "new", "--csr-only", "--out", "ca", "--trust-domain", "example.org"]);
    assert_eq!(names(&place, "ca"), ["ca-csr.pem", "ca-key.pem"]);
    assert_eq!(mode(&place, "ca/ca-key.pem"), 0o600);
    let csr = &place.json(&["inspect", "ca/ca-csr.pem"])["items"][0];
    assert_eq!((&csr["ca"], &csr["uris"][0]), (&true.into(), &"spiffe://example.org".into()));
    // It is none for a workload.
    place.ok(&["root", "new", "--out", "root", "--trust-domain", "example.org"]);
    let said = place.refused(&[
        "sign",
        "ca/ca-csr.pem",
        "--authority",
        "root",
        "--identity",
        "spiffe://example.org/a",
        "--out",
        "x",
    ]);
    assert!(said.contains("asks to be a CA"), "{said}");
}

#[test]
fn nothing_is_overwritten() {
    let place = Place::with_ca();
    assert!(place.refused(&["root", "new", "--out", "root"]).starts_with("root is not empty"));
    assert!(
        place
            .refused(&["intermediate", "new", "--root", "root", "--out", "ca"])
            .starts_with("ca is not empty")
    );
    assert!(
        place
            .refused(&["csr", "new", "--identity", ID, "--out", "web"])
            .contains("web/csr.pem is there already")
    );
    let sign = ["sign", "web/csr.pem", "--authority", "ca", "--identity", ID, "--out", "web/cert-chain.pem"];
    assert!(place.refused(&sign).contains("--force"));
    let before = place.read("web/cert-chain.pem");
    place.ok(&[&sign[..], &["--force"]].concat());
    assert_ne!(place.read("web/cert-chain.pem"), before);
    let merge = ["bundle", "merge", "root/root-cert.pem", "--out", "ca/root-cert.pem"];
    assert!(place.refused(&merge).contains("--force"));
    place.ok(&["man", "--out", "man"]);
    assert!(place.refused(&["man", "--out", "man"]).contains("--force"));
    place.ok(&["man", "--out", "man", "--force"]);
}

#[test]
fn a_link_is_never_written_through() {
    let place = Place::with_ca();
    place.write("victim", "precious");
    std::os::unix::fs::symlink(place.path("victim"), place.path("link")).expect("a link");
    let sign = ["sign", "web/csr.pem", "--authority", "ca", "--identity", ID, "--out", "link"];
    place.refused(&sign);
    place.ok(&[&sign[..], &["--force"]].concat());
    assert_eq!(place.read("victim"), "precious");
    std::os::unix::fs::symlink(place.path("victim"), place.path("web2.pem")).expect("a link");
    fs::create_dir(place.path("w")).expect("a folder");
    std::os::unix::fs::symlink(place.path("victim"), place.path("w/key.pem")).expect("a link");
    place.refused(&["csr", "new", "--identity", ID, "--out", "w"]);
    assert_eq!(place.read("victim"), "precious");
}

#[test]
fn a_folder_that_others_may_write_to_takes_no_key() {
    let place = Place::new();
    fs::create_dir(place.path("open")).expect("a folder");
    fs::set_permissions(place.path("open"), fs::Permissions::from_mode(0o777)).expect("its mode is set");
    for arguments in [
        &["root", "new", "--out", "open"][..],
        &["root", "new", "--out", "open/below"],
        &["csr", "new", "--identity", ID, "--out", "open"],
    ] {
        assert!(place.refused(arguments).contains("cannot be trusted"));
    }
}

#[test]
fn what_a_csr_asked_for_and_did_not_get_is_said() {
    let place = Place::with_ca();
    let asked = "spiffe://cluster.local/ns/kube-system/sa/admin";
    place.ok(&["csr", "new", "--identity", asked, "--dns", "a.b", "--dns", "c.d", "--out", "w"]);
    let done = place.run(&[
        "sign",
        "w/csr.pem",
        "--authority",
        "ca",
        "--identity",
        ID,
        "--dns",
        "c.d",
        "--ttl",
        "10y",
        "--out",
        "w/chain.pem",
    ]);
    assert_eq!(done.code, 0, "{done:?}");
    for said in [
        &format!("mica: note: the CSR asked for the URI {asked}, which was not given\n")[..],
        "mica: note: the CSR asked for the DNS name a.b, which was not given\n",
        "mica: note: shortened from 10y to end with the CA, at ",
    ] {
        assert!(done.stderr.contains(said), "{said:?} is not in {}", done.stderr);
    }
    assert!(!done.stderr.contains("c.d"));
    let leaf = &place.json(&["inspect", "w/chain.pem"])["items"][0];
    assert_eq!(leaf["spiffe_id"], ID);
    assert_eq!(leaf["dns"], serde_json::json!(["c.d"]));
}

#[test]
fn standard_input_and_output_are_files_too() {
    let place = Place::with_ca();
    let csr = place.read("web/csr.pem");
    let sign = ["sign", "-", "--authority", "ca", "--identity", ID, "--out", "-"];
    let done = place.run_with(csr.as_bytes(), &sign);
    assert!(done.code == 0 && done.stdout.starts_with("-----BEGIN CERTIFICATE-----"), "{done:?}");
    let verify = ["verify", "-", "--roots", "root/root-cert.pem"];
    assert_eq!(place.run_with(done.stdout.as_bytes(), &verify).code, 0);
    for arguments in [&["inspect"][..], &["inspect", "-"]] {
        let seen = place.run_with(done.stdout.as_bytes(), arguments);
        assert!(
            seen.stdout.contains(&format!("standard input, certificate 1: certificate of {ID}")),
            "{seen:?}"
        );
    }
    let refused = place.run_with(b"", &["verify", "-", "--roots", "-"]);
    assert!(refused.code == 2 && refused.one_line().contains("named twice"));
}

#[test]
fn delivered_folders_are_inspected_and_verified_as_one_set() {
    let place = Place::new();
    let ca = OpensslCa::new();
    fs::create_dir(place.path("d")).expect("a folder");
    let set = ca.issue("spiffe://fixture/ns/a/sa/b");
    deliver(&place.path("d"), &set);
    let seen = place.json(&["inspect", "d"]);
    assert_eq!(seen["sound"], true, "{seen:#}");
    assert_eq!(seen["items"].as_array().map(Vec::len), Some(3), "each file once");
    let good = place.ok(&["verify", "d"]);
    assert!(good.contains("and the key belongs to it"), "{good}");
    // The key of another set: the names are right, the whole is not.
    let other = ca.issue("spiffe://fixture/ns/a/sa/b");
    deliver(&place.path("d"), &crate::fixtures::Set { key: other.key, ..set });
    let seen = place.run(&["inspect", "d"]);
    assert!(seen.code == 0 && seen.stdout.contains("it belongs to none of the certificates"), "{seen:?}");
    let no = place.run(&["verify", "d"]);
    assert!(no.code == 1 && no.stdout.contains("does not belong to the leaf"), "{no:?}");
}

#[test]
fn verify_says_no_with_the_way_out() {
    let place = Place::with_ca();
    place.ok(&["root", "new", "--out", "other"]);
    let base = ["verify", "web/cert-chain.pem", "--roots", "root/root-cert.pem"];
    let leaf = place.read("web/cert-chain.pem");
    let end = "-----END CERTIFICATE-----\n";
    let (leaf, ca) = leaf.split_at(leaf.find(end).expect("an end") + end.len());
    place.write("alone.pem", leaf);
    place.write("turned.pem", [ca, leaf].concat());
    for (arguments, said) in [
        (
            &["verify", "web/cert-chain.pem", "--roots", "other/root-cert.pem"][..],
            "neither in the chain nor among",
        ),
        (&["verify", "alone.pem", "--roots", "root/root-cert.pem"], "neither in the chain nor among"),
        (&["verify", "turned.pem", "--roots", "root/root-cert.pem"], "put the workload's certificate first"),
        (&[&base[..], &["--identity", "spiffe://cluster.local/x"]].concat(), "not spiffe://cluster.local/x"),
        (&[&base[..], &["--key", "ca/ca-key.pem"]].concat(), "does not belong to the leaf"),
        (&[&base[..], &["--at", "2040-01-01T00:00:00Z"]].concat(), "expired at"),
        (&[&base[..], &["--at", "2020-01-01T00:00:00+02:00"]].concat(), "not valid before"),
    ] {
        let no = place.run(arguments);
        assert_eq!((no.code, no.stderr.as_str()), (1, ""), "{arguments:?}: {no:?}");
        assert!(
            no.stdout.starts_with("not good: ") && no.stdout.contains(said),
            "{arguments:?}: {}",
            no.stdout
        );
        let json = place.run(&[arguments, &["--output", "json"]].concat());
        let json: serde_json::Value = serde_json::from_str(&json.stdout).expect("JSON");
        assert_eq!(json["good"], false);
        let faults = json["faults"].as_array().expect("a list");
        assert!(faults.iter().all(|fault| fault["advice"].as_str().is_some_and(|a| a.len() > 10)), "{json}");
    }
    // Any order above the leaf is one that peers accept.
    place.ok(&base);
}

#[test]
fn bundles_are_merged_converted_and_listed() {
    let place = Place::new();
    for (name, domain) in [("a", "cluster.local"), ("b", "cluster.local"), ("c", "example.org")] {
        place.ok(&["root", "new", "--out", name, "--trust-domain", domain]);
    }
    place.ok(&[
        "bundle",
        "merge",
        "a/root-cert.pem",
        "b/root-cert.pem",
        "a/root-cert.pem",
        "--out",
        "ab.pem",
    ]);
    assert_eq!(place.read("ab.pem"), place.read("a/root-cert.pem") + &place.read("b/root-cert.pem"));
    place.ok(&["bundle", "convert", "ab.pem", "--form", "spiffe", "--sequence", "7", "--out", "ab.json"]);
    let json: serde_json::Value = serde_json::from_str(&place.read("ab.json")).expect("JSON");
    assert_eq!((&json["spiffe_sequence"], json["keys"].as_array().map(Vec::len)), (&7.into(), Some(2)));
    assert_eq!(place.ok(&["bundle", "convert", "ab.json"]), place.read("ab.pem"));
    let again = place.ok(&["bundle", "convert", "ab.json", "--form", "spiffe", "--refresh-hint", "5m"]);
    let again: serde_json::Value = serde_json::from_str(&again).expect("JSON");
    assert_eq!((&again["spiffe_sequence"], &again["spiffe_refresh_hint"]), (&7.into(), &300.into()));
    let merged = place.run(&["bundle", "merge", "ab.json", "a/root-cert.pem", "--form", "spiffe"]);
    assert!(!merged.stdout.contains("spiffe_sequence") && merged.stderr.contains("--sequence"), "{merged:?}");
    let listed = place.json(&["bundle", "list", "ab.json", "c/root-cert.pem"]);
    assert_eq!(listed["roots"][2]["trust_domain"], "example.org");
    let said = place.refused(&["bundle", "merge", "a/root-cert.pem", "c/root-cert.pem", "--out", "x"]);
    assert!(said.contains("example.org") && said.contains("cluster.local"), "{said}");
    place.write("map.json", format!("{{\"trust_domains\": {{\"cluster.local\": {json}}}}}"));
    let said = place.refused(&["bundle", "convert", "map.json"]);
    assert!(said.contains("--trust-domain: cluster.local"), "{said}");
    let taken = ["bundle", "convert", "map.json", "--trust-domain", "cluster.local"];
    assert_eq!(place.ok(&taken), place.read("ab.pem"));
    for (name, text) in [
        ("none.json", "{\"keys\": []}"),
        ("other.json", "{\"keys\": [{\"use\": \"jwt-svid\", \"kty\": \"EC\"}]}"),
        ("none.pem", ""),
        ("twice.json", "{\"trust_domains\": {\"a\": {\"keys\": []}, \"a\": {\"keys\": []}}}"),
    ] {
        place.write(name, text);
        place.refused(&["bundle", "convert", name, "--trust-domain", "a", "--out", "x"]);
        place.refused(&["bundle", "merge", name, "--trust-domain", "a", "--out", "x"]);
    }
    assert!(place.refused(&["bundle", "convert", "ab.pem", "--sequence", "1"]).contains("--form spiffe"));
}

#[test]
fn roots_that_name_no_trust_domain_need_to_be_told() {
    let place = Place::new();
    // As Istio's self-signed root is: an O and nothing else.
    let ca = OpensslCa::new();
    place.write("old.pem", ca.issue("spiffe://fixture/a").roots);
    place.ok(&["root", "new", "--out", "new"]);
    let merge = ["bundle", "merge", "old.pem", "new/root-cert.pem"];
    assert!(place.refused(&merge).contains("--trust-domain"));
    let merged = place.ok(&[&merge[..], &["--trust-domain", "cluster.local"]].concat());
    assert_eq!(merged.matches("BEGIN CERTIFICATE").count(), 2);
    assert!(
        place.refused(&[&merge[..], &["--trust-domain", "example.org"]].concat()).contains("cluster.local")
    );
}

#[test]
fn a_ca_is_taken_as_a_tls_secret_too() {
    let place = Place::with_ca();
    place.write("tls/tls.crt", place.read("ca/cert-chain.pem"));
    place.write("tls/tls.key", place.read("ca/ca-key.pem"));
    place.write("tls/ca.crt", place.read("ca/root-cert.pem"));
    let sign = ["sign", "web/csr.pem", "--authority", "tls", "--identity", ID, "--out", "chain.pem"];
    place.ok(&sign);
    assert_eq!(place.read("chain.pem").matches("BEGIN CERTIFICATE").count(), 2, "the root is stripped");
    place.write("tls/ca-key.pem", place.read("ca/ca-key.pem"));
    assert!(place.refused(&sign).contains("both ca-key.pem and tls.crt"));
}

#[test]
fn a_folder_that_is_no_ca_is_refused_with_the_file_and_the_way_out() {
    let place = Place::with_ca();
    place.ok(&["root", "new", "--out", "other"]);
    let sign = |place: &Place| {
        place.refused(&["sign", "web/csr.pem", "--authority", "bad", "--identity", ID, "--out", "x"])
    };
    for (name, bytes, said) in [
        ("ca-key.pem", place.read("other/ca-key.pem"), "ca-key.pem does not belong to ca-cert.pem"),
        ("ca-key.pem", "".to_owned(), "ca-key.pem: expected one private key, found 0"),
        (
            "root-cert.pem",
            place.read("other/root-cert.pem"),
            "neither in cert-chain.pem nor in root-cert.pem",
        ),
        ("root-cert.pem", "".to_owned(), "root-cert.pem: "),
        (
            "cert-chain.pem",
            place.read("ca/cert-chain.pem")[..99].to_owned(),
            "cert-chain.pem: the CERTIFICATE",
        ),
        ("ca-cert.pem", place.read("web/cert-chain.pem"), "ca-key.pem does not belong to ca-cert.pem"),
    ] {
        for file in FOUR {
            place.write(&format!("bad/{file}"), place.read(&format!("ca/{file}")));
        }
        place.write(&format!("bad/{name}"), bytes);
        let line = sign(&place);
        assert!(line.starts_with("bad: ") && line.contains(said), "{name}: {line}");
    }
    for file in FOUR {
        place.write(&format!("bad/{file}"), place.read(&format!("ca/{file}")));
    }
    for file in FOUR {
        fs::remove_file(place.path("bad").join(file)).expect("it is removed");
        let line = sign(&place);
        assert!(line.contains(file) && line.contains("missing; an authority is ca-cert.pem"), "{line}");
    }
}

#[test]
fn identities_that_are_none_are_refused() {
    let place = Place::with_ca();
    let long = format!("spiffe://cluster.local/{}", "a".repeat(2049 - 23));
    assert_eq!(long.len(), 2049);
    for (identity, said) in [
        ("spiffe://cluster.local/ns/../sa/b", "\"..\""),
        ("spiffe://cluster.local/ns/%2e%2e/sa/b", "'%'"),
        ("spiffe://Cluster.local/a", "'C'"),
        ("SPIFFE://cluster.local/a", "lower case"),
        ("spiffe://cluster.local", "names a trust domain"),
        ("spiffe://cluster.local/", "\"\""),
        ("spiffe://cluster.local/a/", "\"\""),
        ("spiffe://cluster.local//a", "\"\""),
        ("spiffe://cluster.local:443/a", "':'"),
        ("spiffe://u@cluster.local/a", "'@'"),
        ("spiffe://cluster.local/a?b", "'?'"),
        ("spiffe://cluster.local/a#", "'#'"),
        ("spiffe:///a", "empty"),
        ("https://cluster.local/a", "spiffe://"),
        ("", "spiffe://"),
        (&long, "2049 bytes"),
    ] {
        for arguments in [
            &["sign", "web/csr.pem", "--authority", "ca", "--out", "x", "--identity", identity][..],
            &["csr", "new", "--out", "x", "--identity", identity],
            &["verify", "web/cert-chain.pem", "--roots", "ca/root-cert.pem", "--identity", identity],
        ] {
            let line = place.refused(arguments);
            assert!(line.contains(said), "{identity:?}: {line}");
        }
    }
    let longest = &long[..2048];
    place.ok(&["csr", "new", "--out", "longest", "--identity", longest]);
    place.ok(&[
        "sign",
        "longest/csr.pem",
        "--authority",
        "ca",
        "--identity",
        longest,
        "--out",
        "longest.pem",
    ]);
    place.ok(&["verify", "longest.pem", "--roots", "ca/root-cert.pem", "--identity", longest]);
}

#[test]
fn wrong_usage_is_one_line_with_a_hint() {
    let place = Place::new();
    for (arguments, said) in [
        (&[][..], "a command is missing; begin with `mica serve examples/bookinfo`, or see `mica --help`"),
        (&["root"], "a command is missing, or see `mica root --help`"),
        (&["rot"], "unrecognized subcommand 'rot'"),
        (&["root", "new"], "were not provided: --out <DIR>; see `mica root new --help`"),
        (&["root", "new", "--out", "x", "--key-kind", "rsa"], "possible values: p256, p384, ed25519"),
        (&["root", "new", "--out", "x", "--lifetime", "1w"], "90s, 24h or 10y; see `mica root new --help`"),
        (&["root", "new", "--out", "x", "--lifetime", "0d"], "longer than nothing"),
        (&["root", "new", "--out", "x", "--trust-domain", "A.b"], "'A'"),
        (&["root", "new", "--out", "x", "--organization", "\n"], "control characters"),
        (&["root", "new", "--out", "x", "--trust-domain", &"a".repeat(65)], "--organization"),
        (&["csr", "new", "--identity", ID, "--out", "x", "--dns", "*.a"], "no wildcard"),
        (&["inspect", "--at", "yesterday"], "RFC 3339"),
        (&["inspect", "nowhere"], "cannot read nowhere: no such file or directory"),
        (&["inspect", "."], "holds no files"),
        (&["verify", "nowhere"], "--roots"),
        (&["intermediate", "new", "--out", "x"], "--root <DIR>"),
        (&["intermediate", "new", "--out", "x", "--root", "nowhere"], "cannot read nowhere"),
        (&["intermediate", "new", "--out", "x", "--csr-only", "--root", "y"], "cannot be used with"),
        (&["bundle", "merge"], "<FILE>..."),
        (&["completions", "tcsh"], "bash, zsh, fish"),
    ] {
        let line = place.refused(arguments);
        assert!(line.contains(said), "mica {arguments:?}: {line}");
        assert!(line.starts_with(|c: char| !c.is_uppercase()), "{line}");
    }
}

#[test]
fn an_intermediate_signs_no_intermediate() {
    let place = Place::with_ca();
    let said = place.refused(&["intermediate", "new", "--root", "ca", "--out", "x"]);
    assert!(said.starts_with("ca: the CA's path length is 0") && said.contains("--root"), "{said}");
}

#[test]
fn an_intermediate_ends_with_its_root() {
    let place = Place::new();
    place.ok(&["root", "new", "--out", "root", "--lifetime", "30d"]);
    let done = place.run(&["intermediate", "new", "--root", "root", "--out", "ca"]);
    assert!(done.stderr.contains("shortened from 1y to end with the CA above it"), "{done:?}");
    let end = |name| place.json(&["inspect", name])["items"][0]["not_after"].clone();
    assert_eq!(end("ca/ca-cert.pem"), end("root/ca-cert.pem"));
}

#[test]
fn an_expired_ca_issues_nothing() {
    let place = Place::new();
    place.ok(&["root", "new", "--out", "root", "--lifetime", "1s"]);
    place.ok(&["csr", "new", "--identity", ID, "--out", "web"]);
    std::thread::sleep(std::time::Duration::from_millis(2_100));
    let sign = ["sign", "web/csr.pem", "--authority", "root", "--identity", ID, "--out", "x"];
    assert!(place.refused(&sign).contains("expired at"), "it says so");
}

#[test]
fn a_reader_that_goes_away_is_no_fault() {
    use std::process::Stdio;
    let place = Place::with_ca();
    for (arguments, code) in [
        (&["completions", "bash"][..], 0),
        (&["inspect", "ca"], 0),
        (&["verify", "ca/ca-cert.pem", "--roots", "ca/root-cert.pem"], 1),
    ] {
        let mut child = place
            .command(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("mica runs");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("mica ends");
        assert_eq!((output.status.code(), &output.stderr[..]), (Some(code), &b""[..]), "{arguments:?}");
    }
}

/// A file-size limit of nothing fails every write, as a full disk does, and needs no privileges.
#[test]
fn a_disk_without_room_leaves_nothing_behind() {
    let place = Place::with_ca();
    let before = place.everything();
    for arguments in [
        &["root", "new", "--out", "x"][..],
        &["intermediate", "new", "--root", "root", "--out", "x"],
        &["intermediate", "new", "--csr-only", "--out", "x"],
        &["csr", "new", "--identity", ID, "--out", "x"],
        &["csr", "new", "--identity", ID, "--out", "ca"],
        &["sign", "web/csr.pem", "--authority", "ca", "--identity", ID, "--out", "x"],
        &["sign", "web/csr.pem", "--authority", "ca", "--identity", ID, "--out", "web/csr.pem", "--force"],
        &["bundle", "convert", "ca/root-cert.pem", "--out", "x"],
    ] {
        let mica = place.command(arguments);
        let done: Done = Command::new("bash")
            .args(["-c", "ulimit -f 0; trap '' XFSZ; exec \"$@\"", "bash"])
            .arg(mica.get_program())
            .args(arguments)
            .current_dir(place.path(""))
            .output()
            .expect("bash runs")
            .into();
        assert_eq!(done.code, 2, "{arguments:?}: {done:?}");
        assert!(done.one_line().contains("file too large"), "{arguments:?}: {done:?}");
        assert!(place.everything() == before, "{arguments:?} left something behind");
    }
}

#[test]
fn output_that_cannot_be_written_is_a_fault() {
    let place = Place::with_ca();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let done: Done = place.command(&["inspect", "ca"]).stdout(full).output().expect("mica runs").into();
    assert!(done.code == 2 && done.one_line().contains("cannot write to standard output"), "{done:?}");
}

#[test]
fn man_pages_and_completions_speak_of_every_command() {
    let place = Place::new();
    place.ok(&["man", "--out", "man"]);
    for page in
        ["mica.1", "mica-serve.1", "mica-root-new.1", "mica-sign.1", "mica-inspect.1", "mica-verify.1"]
    {
        assert!(place.read(&format!("man/{page}")).contains(".TH"), "{page}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = place.ok(&["completions", shell]);
        for word in ["intermediate", "csr-only", "passphrase-file", "ed25519"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
}

#[test]
fn a_huge_file_is_refused_without_being_read() {
    let place = Place::with_ca();
    let file = fs::File::create(place.path("huge")).expect("a file");
    file.set_len(1 << 30).expect("a gigabyte, with holes");
    for arguments in [
        &["inspect", "huge"][..],
        &["verify", "huge", "--roots", "ca/root-cert.pem"],
        &["verify", "web/cert-chain.pem", "--roots", "huge"],
        &["bundle", "list", "huge"],
        &["sign", "huge", "--authority", "ca", "--identity", ID, "--out", "x"],
    ] {
        let done = place.run(arguments);
        assert!(done.code == 2 && done.one_line().contains("huge is longer than"), "{done:?}");
    }
}

#[test]
fn go_spiffe_accepts_what_the_tools_make() {
    let place = Place::with_ca();
    place.write("web/root-cert.pem", place.read("ca/root-cert.pem"));
    crate::go_spiffe::accepts(&place.path("web"), ID);
    place.ok(&["root", "new", "--out", "other", "--key-kind", "p384"]);
    place.ok(&["bundle", "merge", "ca/root-cert.pem", "other/root-cert.pem", "--out", "both.pem"]);
    let pem = crate::go_spiffe::bundle(&place.path("both.pem"), "cluster.local", &["--pem"]);
    assert!(pem.contains("x509_authorities=2"), "{pem}");
    let convert = ["bundle", "convert", "both.pem", "--form", "spiffe", "--out", "both.json"];
    place.ok(&[&convert[..], &["--sequence", "3", "--refresh-hint", "5m"]].concat());
    let json = crate::go_spiffe::bundle(&place.path("both.json"), "cluster.local", &[]);
    for part in ["x509_authorities=2", "sequence=3", "refresh_hint=300"] {
        assert!(json.contains(part), "{json}");
    }
}
