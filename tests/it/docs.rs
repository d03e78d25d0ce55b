//! What the documents say, compared with what is there, so that they cannot rot.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::CommandFactory as _;
use mica::cluster::EventReason;
use mica::config::cli::Cli;
use mica::core::refusal::{Code, Reason};
use mica::proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;

use crate::serve::{self, mtls, wait_for};
use crate::{agent, cluster, parts};

pub(crate) fn checkout() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn read(path: &str) -> String {
    fs::read_to_string(checkout().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The cells of a document's tables whose first cell is code, by that code.
fn rows(document: &str) -> BTreeMap<String, Vec<String>> {
    let mut rows = BTreeMap::new();
    for line in document.lines() {
        let Some(line) = line.strip_prefix("| `") else { continue };
        let cells: Vec<_> = format!("`{line}").split('|').map(|cell| cell.trim().to_owned()).collect();
        let name = code(&cells[0]).first().cloned().unwrap_or_default();
        assert!(rows.insert(name.clone(), cells).is_none(), "{name} has two rows");
    }
    rows
}

/// What stands in backticks.
fn code(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn every_flag_is_documented_as_it_is() {
    flags_are_documented("serve", "docs/configuration.md", true);
    flags_are_documented("agent", "docs/agent.md", false);
}

fn flags_are_documented(name: &str, document: &str, reports: bool) {
    let mut rows = rows(&read(document));
    let command = Cli::command();
    let output = command.get_arguments().find(|argument| argument.get_long() == Some("output"));
    let subcommand = command.find_subcommand(name).unwrap();
    for argument in subcommand.get_arguments().chain(output.filter(|_| reports)) {
        let name = match argument.get_long() {
            Some(long) => format!("--{long}"),
            None => argument.get_value_names().unwrap()[0].to_string(),
        };
        let row = rows.remove(&name).unwrap_or_else(|| panic!("{name} is not in {document}"));
        let variable = argument.get_env().map(|variable| variable.to_string_lossy().into_owned());
        assert_eq!(code(&row[1]).first(), variable.as_ref(), "{name}: its variable");
        let defaults: Vec<_> =
            argument.get_default_values().iter().map(|value| value.to_string_lossy().into_owned()).collect();
        if defaults.is_empty() {
            assert!(!row[2].is_empty(), "{name}: its default");
        } else {
            assert_eq!(code(&row[2]), defaults, "{name}: its default");
        }
        for value in argument.get_possible_values().iter().filter(|_| argument.get_long() != Some("output")) {
            let named = code(&row[3]).iter().any(|code| code == value.get_name());
            assert!(named, "{name}: its value {}", value.get_name());
        }
    }
    // Tables of other things begin with other words.
    rows.retain(|name, _| name.starts_with("--"));
    assert!(rows.is_empty(), "documented, and no flag of {name}: {:?}", rows.keys());
}

#[test]
fn the_help_of_serve_names_the_documented_flags() {
    let help = Command::new(env!("CARGO_BIN_EXE_mica")).args(["serve", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let shown: BTreeSet<_> = help
        .lines()
        .map(|line| line.trim_start().trim_start_matches("-h, ").trim_start_matches("-V, "))
        .filter(|line| line.starts_with("--"))
        .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
        .collect();
    let documented: BTreeSet<_> = rows(&read("docs/configuration.md"))
        .into_keys()
        .filter(|name| name.starts_with("--"))
        .chain(["--help", "--version"].map(str::to_owned))
        .collect();
    assert_eq!(shown, documented);
}

/// The families of a page: the type and the labels of each.
pub(crate) fn families(page: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let mut families = BTreeMap::new();
    let mut current = String::new();
    for line in page.lines() {
        if let Some(declared) = line.strip_prefix("# TYPE ") {
            let (name, kind) = declared.split_once(' ').unwrap();
            current = name.to_owned();
            families.insert(current.clone(), (kind.to_owned(), BTreeSet::new()));
        } else if !line.starts_with('#') {
            let sample = line.split([' ', '{']).next().unwrap();
            let suffix = sample.strip_prefix(&current).unwrap_or(sample);
            assert!(["", "_total", "_bucket", "_sum", "_count"].contains(&suffix), "{line}");
            let labels = line.split_once('{').map(|(_, rest)| rest.split_once('}').unwrap().0);
            let labels = labels.unwrap_or_default().split(',').filter_map(|label| label.split_once('='));
            let family = families.get_mut(&current).unwrap();
            // A bucket's bound is not a label that somebody chose.
            family.1.extend(labels.map(|(name, _)| name.to_owned()).filter(|name| name != "le"));
        }
    }
    families
}

#[test]
fn every_metric_is_documented_as_it_is() {
    let place = serve::Place::new();
    place.account("web");
    let mica = place.start(&["--trial-tokens", "--trace-otlp", "http://127.0.0.1:1"]);
    // One request that is granted, and one that is not.
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        place.leaf("web");
        let folder = place.folder("shop", "web");
        for folder in [Some(folder.as_path()), None] {
            let channel = mtls::connect(&mica, &place, folder).await;
            let request = mtls::ask(mtls::csr("spiffe://cluster.local/ns/shop/sa/web"));
            let answer = IstioCertificateServiceClient::new(channel).create_certificate(request).await;
            assert_eq!(answer.is_ok(), folder.is_some());
        }
    });
    let mut found = families(&mica.page("/metrics").1);
    mica.stop();
    // Failures show themselves once there are some: of an issuer whose second is over.
    let other = serve::Place::new();
    other.account("web");
    let [root, ca] = ["root", "ca"].map(|name| other.root.path().join(name));
    for arguments in [
        vec!["root".as_ref(), "new".as_ref(), "--out".as_ref(), root.as_os_str()],
        vec![
            "intermediate".as_ref(),
            "new".as_ref(),
            "--root".as_ref(),
            root.as_os_str(),
            "--out".as_ref(),
            ca.as_os_str(),
            "--lifetime".as_ref(),
            "1s".as_ref(),
        ],
    ] {
        assert!(Command::new(env!("CARGO_BIN_EXE_mica")).args(arguments).output().unwrap().status.success());
    }
    std::thread::sleep(Duration::from_millis(2_100));
    let mica = other.start(&["--authority", ca.to_str().unwrap()]);
    let page = wait_for(Duration::from_secs(5), "a failure to issue", || {
        Some(mica.page("/metrics").1).filter(|page| page.contains("mica_issue_failures"))
    });
    for (name, family) in families(&page) {
        found.entry(name).or_insert(family);
    }
    mica.stop();
    for (name, family) in families(&serve::federation::metrics_page()) {
        found.entry(name).or_insert(family);
    }
    for (name, family) in families(&cluster::metrics_page()) {
        found.entry(name).or_insert(family);
    }
    assert_eq!(found, documented_metrics("docs/metrics.md"));
}

pub(crate) fn documented_metrics(document: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
    rows(&read(document))
        .into_iter()
        .filter(|(_, cells)| cells.len() > 6)
        .map(|(name, cells)| (name, (cells[1].clone(), code(&cells[2]).into_iter().collect())))
        .collect()
}

/// One that is refused until its token is there.
#[test]
fn every_metric_of_the_agent_is_documented_as_it_is() {
    let place = serve::Place::new();
    place.account("web");
    let mica = place.start(&["--trial-tokens"]);
    let mut command = agent::command(&place, &mica);
    let path = place.root.path().join("token-shop-web");
    fs::write(&path, "none").unwrap();
    command.arg("--token-file").arg(&path).arg("--files").arg(place.root.path().join("certs"));
    command.args(["--trace-otlp", "http://127.0.0.1:1"]);
    let agent = agent::start(&place, "web", &mut command);
    let page = |wanted: &str| {
        wait_for(Duration::from_secs(10), wanted, || {
            Some(agent.page("/metrics").1).filter(|page| page.contains(wanted))
        })
    };
    page("mica_agent_failures_total{");
    agent::token(&place, "shop/web");
    let page = page("mica_agent_watchers{");
    assert_eq!(families(&page), documented_metrics("docs/agent.md"));
    agent.stop();
    mica.stop();
}

#[test]
fn every_reason_is_documented_with_its_code() {
    let ours: BTreeMap<_, _> = Reason::ALL
        .iter()
        .map(|reason| (reason.name().to_owned(), code_name(reason.code()).to_owned()))
        .collect();
    let document = read("docs/csr-api.md");
    let documented: BTreeMap<_, _> = rows(document.split_once("## Reasons").unwrap().1)
        .into_iter()
        .map(|(name, cells)| {
            // The sources in short, and a way out.
            assert!(cells.len() > 4 && !cells[2].is_empty() && !cells[3].is_empty(), "{name}: {cells:?}");
            (name, code(&cells[1]).remove(0))
        })
        .collect();
    assert_eq!(documented, ours);
}

#[test]
fn every_reason_of_an_event_is_documented() {
    let document = read("docs/operations.md");
    let section = document.split_once("## Kubernetes Events").unwrap().1.split("\n## ").next().unwrap();
    let documented: BTreeSet<_> = rows(section).into_keys().collect();
    let ours: BTreeSet<_> = EventReason::ALL.iter().map(|reason| reason.name().to_owned()).collect();
    assert_eq!(documented, ours);
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Unauthenticated => "UNAUTHENTICATED",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::Unavailable => "UNAVAILABLE",
    }
}

/// The documents, with their text.
fn documents() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for folder in ["", "docs", "docs/decisions", "examples/bookinfo", "proto"] {
        for entry in fs::read_dir(checkout().join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.ends_with(".md") {
                let path = Path::new(folder).join(name).display().to_string();
                let text = read(&path);
                found.push((path, text));
            }
        }
    }
    assert!(found.len() > 15, "{found:?}");
    found
}

fn sources(folder: &Path, into: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn every_link_file_and_test_that_a_document_names_is_there() {
    let mut code_of_ours = String::new();
    for folder in ["src", "tests", "benches", "fuzz/fuzz_targets"] {
        sources(&checkout().join(folder), &mut code_of_ours);
    }
    let mut missing = Vec::new();
    for (path, text) in documents() {
        let folder = checkout().join(&path).parent().unwrap().to_owned();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (file, section) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { checkout().join(&path) } else { folder.join(file) };
            if !target.exists() {
                missing.push(format!("{path}: {link}"));
            } else if !section.is_empty() {
                let heading = |line: &str| line.starts_with('#') && anchor(line) == section;
                if !fs::read_to_string(&target).unwrap().lines().any(heading) {
                    missing.push(format!("{path}: no section {link}"));
                }
            }
        }
        // Blocks of code are what somebody typed or saw.
        let prose: String = text.split("```").step_by(2).collect();
        for word in code(&prose) {
            let is_path = ["src/", "tests/", "docs/", "benches/", "fuzz/", "proto/", "examples/"]
                .iter()
                .any(|start| word.starts_with(start))
                && !word.contains([' ', '<', '*']);
            // Names of tests are sentences.
            let is_test = word.matches('_').count() >= 3
                && word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
                && !word.starts_with("citadel_")
                && !word.starts_with("mica_");
            let is_known = || {
                [format!("fn {word}("), format!("\"{word}\"")].iter().any(|text| code_of_ours.contains(text))
            };
            if is_path && !checkout().join(&word).exists() || is_test && !is_known() {
                missing.push(format!("{path}: {word}"));
            }
        }
    }
    assert!(missing.is_empty(), "named, and not there:\n{}", missing.join("\n"));
}

#[test]
fn every_message_that_operations_explains_is_one_of_ours() {
    let mut code_of_ours = String::new();
    sources(&checkout().join("src"), &mut code_of_ours);
    let mut explained = 0;
    for line in read("docs/operations.md").lines() {
        let Some(cell) = line.strip_prefix("| ").and_then(|line| line.split(" | ").next()) else { continue };
        if !["info ", "warn ", "error "].iter().any(|level| cell.starts_with(level)) {
            continue;
        }
        for message in code(cell) {
            explained += 1;
            for part in message.split('…').map(str::trim).filter(|part| !part.is_empty()) {
                assert!(code_of_ours.contains(part), "{part:?} is said nowhere");
            }
        }
    }
    // Each warning and error is explained, and some of the others are.
    let said = ["tracing::warn!(", "tracing::error!("].iter().map(|call| code_of_ours.matches(call).count());
    let said: usize = said.sum();
    assert!(explained >= said, "{explained} messages are explained, and at least {said} are said");
}

/// The name that a heading gets in a link.
fn anchor(heading: &str) -> String {
    heading
        .trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter_map(|c| match c {
            ' ' => Some('-'),
            c if c.is_alphanumeric() || matches!(c, '-' | '_') => Some(c),
            _ => None,
        })
        .collect()
}

/// An Envoy that ends with the test.
pub(crate) struct Running(pub(crate) std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What an Envoy answers to an account of Bookinfo, by mutual TLS.
pub(crate) fn ask(place: &serve::Place, port: u16, account: &str) -> String {
    let folder = place.folder("bookinfo", account);
    let mut openssl = parts::openssl()
        .args(["s_client", "-quiet", "-verify_return_error", "-connect", &format!("127.0.0.1:{port}")])
        .arg("-CAfile")
        .arg(place.data().join("root-cert.pem"))
        .arg("-cert")
        .arg(folder.join("cert-chain.pem"))
        .arg("-key")
        .arg(folder.join("key.pem"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: reviews\r\nconnection: close\r\n\r\n";
    // Whom Envoy refuses may find the connection closed already.
    let _ = openssl.stdin.take().unwrap().write_all(request);
    String::from_utf8(openssl.wait_with_output().unwrap().stdout).unwrap()
}

#[test]
fn the_envoy_of_the_readme_lets_in_productpage_alone() {
    let place = serve::Place::new();
    let home = place.root.path();
    let port = crate::serve::free_port();
    fs::create_dir_all(home.join("examples/envoy")).unwrap();
    for name in ["server.yaml", "identity.yaml", "roots.yaml"] {
        let text = read(&format!("examples/envoy/{name}")).replace("8443", &port.to_string());
        fs::write(home.join("examples/envoy").join(name), text).unwrap();
    }
    // The README's command, but for the ports and the data folder's place.
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    command.arg("serve").arg(checkout().join("examples/bookinfo")).arg("--data-dir").arg(place.data());
    command.args(["--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"]);
    let mica = place.start_command(command.stdin(Stdio::null()));
    std::os::unix::fs::symlink(place.data(), home.join(".mica")).unwrap();
    let envoy = Command::new(parts::envoy())
        .args(["-c", "examples/envoy/server.yaml", "--disable-hot-restart", "--concurrency", "1"])
        .current_dir(home)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(home.join("envoy.log")).unwrap())
        .spawn()
        .unwrap();
    let _envoy = Running(envoy);
    wait_for(Duration::from_secs(10), "an answer of Envoy's", || {
        ask(&place, port, "productpage").ends_with("hello from reviews-v1\n").then_some(())
    });
    assert_eq!(ask(&place, port, "ratings"), "");
    mica.stop();
}

#[test]
fn the_readme_shows_what_the_files_and_the_report_hold() {
    let readme = read("README.md");
    let identity = read("examples/envoy/identity.yaml");
    let shown: Vec<_> = identity.lines().filter(|line| !line.starts_with('#')).collect();
    assert!(readme.contains(&shown.join("\n")), "examples/envoy/identity.yaml");
    let place = serve::Place::new();
    place.account("web");
    let mica = place.start(&[]);
    // Numbers, names and paths differ; the words are the same.
    for line in mica.report().lines().filter(|line| line.starts_with(|c: char| c.is_ascii_alphabetic())) {
        let words = line.split("  ").next().unwrap().split([',', '/']).next().unwrap();
        assert!(readme.contains(words), "the README does not show {line:?}");
    }
    mica.stop();
}

/// What a document shows of a shell: each command with the lines that it answers.
fn shown(text: &str) -> Vec<(String, Vec<String>)> {
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    for block in text.split("```").skip(1).step_by(2) {
        let (begun, mut continues) = (found.len(), false);
        for line in block.lines().skip(1).filter(|line| !line.is_empty()) {
            if let Some(command) = line.strip_prefix("$ ") {
                found.push((command.to_owned(), Vec::new()));
            } else if let Some((command, answer)) = found[begun..].last_mut() {
                if continues {
                    *command += &format!("\n{line}");
                } else {
                    answer.push(line.to_owned());
                }
            }
            continues = line.ends_with('\\');
        }
    }
    found
}

/// Whether a line is the one that was shown, but for numbers: words with a digit in them. `…` stands for any rest.
pub(crate) fn is_shown(line: &str, shown: &str) -> bool {
    let words = |text: &str| -> Vec<String> {
        let word = |word: &str| {
            if word.contains(|c: char| c.is_ascii_digit()) { "#".to_owned() } else { word.to_owned() }
        };
        text.split_whitespace().map(word).collect()
    };
    match shown.split_once('…') {
        Some((start, _)) => line.starts_with(start) || words(line).starts_with(&words(start)),
        None => words(line) == words(shown),
    }
}

#[test]
fn every_command_of_the_readme_about_the_csr_api_answers_as_shown() {
    const SERVE: &str = "mica serve examples/bookinfo --trial-tokens";
    let readme = read("README.md");
    let section = readme.split_once("\n## The CSR API\n").unwrap().1.split_once("\n## ").unwrap().0;
    assert!(section.contains(&format!("```\n{SERVE}\n```")), "{section}");
    let place = serve::Place::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    command.arg("serve").arg(checkout().join("examples/bookinfo")).arg("--trial-tokens");
    command.args(["--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0", "--data-dir"]);
    let mica = place.start_command(command.arg(place.data()).stdin(Stdio::null()));
    let home = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(place.data(), home.path().join(".mica")).unwrap();
    let programs = [PathBuf::from(env!("CARGO_BIN_EXE_mica")), parts::grpcurl()];
    let mut path: Vec<_> = programs.iter().map(|program| program.parent().unwrap().to_owned()).collect();
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
    let path = std::env::join_paths(path).unwrap();

    let commands = shown(section);
    for (command, expected) in &commands {
        assert!(!expected.is_empty(), "{command} shows no answer");
        let typed = format!("exec 2>&1\n{}", command.replace("127.0.0.1:15012", &mica.address("grpc")));
        let mut bash = Command::new("bash");
        bash.args(["-c", &typed]).current_dir(home.path()).env("PATH", &path).stdin(Stdio::null());
        let output = serve::output_within(&mut bash, Duration::from_secs(30));
        let answer = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<_> = answer.lines().filter(|line| !line.is_empty()).collect();
        let same = lines.len() == expected.len()
            && lines.iter().zip(expected).all(|(line, shown)| is_shown(line, shown));
        assert!(same, "{command}\nanswered\n{answer}\nand the README shows\n{}", expected.join("\n"));
    }
    assert!(commands.len() >= 8, "{commands:?}");
    mica.stop();
}

#[test]
fn the_reader_of_the_readme_sees_differences() {
    let shown = shown("a\n```\n$ a \\\n  b\n1\n\n$ c\n```\nd\n```yaml\nx\n```\n");
    let two = [("a \\\n  b".to_owned(), vec!["1".to_owned()]), ("c".to_owned(), Vec::new())];
    assert_eq!(shown, two);
    for (line, shown, same) in [
        ("serial  0ab1", "serial       5cd2", true),
        ("for 24 h", "for 21 h", true),
        ("no (A): b c", "no (A): …", true),
        ("no (B): b c", "no (A): …", false),
        ("good: a", "good: b", false),
        ("good: a b", "good: a", false),
    ] {
        assert_eq!(is_shown(line, shown), same, "{line}, {shown}");
    }
}
