//! The services of Bookinfo, one small program for all of them, and what asks them. The standard library alone: `rustc`
//! compiles it in a moment.
//!
//! ```text
//! bookinfo productpage|details|reviews|ratings   one service, plain HTTP on $LISTEN
//! bookinfo ask ADDRESS HOST/PATH...              a request for each; prints the status, then the answer
//! bookinfo load ADDRESS HOST/PATH                requests until standard input ends; then how many, and what failed
//! ```
//!
//! A service knows of others by name alone (`$DETAILS`, `$REVIEWS`, `$RATINGS`) and hands all requests to its own proxy,
//! `$OUTBOUND`. Certificates, encryption and who may call whom are the proxies' affair. What a service does for tracing
//! is to pass on the headers that tie its requests to the one that it answers.

// An example asks the machine directly; what must not is src/.
#![allow(clippy::disallowed_methods)]

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);
const MAX_HEAD: usize = 64 * 1024;
const MAX_BODY: usize = 1024 * 1024;

/// B3 in both spellings, W3C's trace context, and the name that Envoy gives a request; and what the reader asks for.
const PASSED_ON: [&str; 10] = [
    "x-request-id",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
    "b3",
    "traceparent",
    "tracestate",
    "accept",
];

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["productpage"] => serve(productpage),
        ["details"] => serve(details),
        ["reviews"] => serve(reviews),
        ["ratings"] => serve(ratings),
        ["ask", address, ref pages @ ..] if !pages.is_empty() => ask(address, pages),
        ["load", address, page] => load(address, page),
        _ => Err(io::Error::other(
            "name a service (productpage, details, reviews or ratings), or: ask|load ADDRESS HOST/PATH",
        )),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bookinfo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn setting(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

// The services.

/// The page that a reader opens, put together of what the others answer. Without one of them there is none.
fn productpage(request: &Request) -> Answer {
    if !matches!(request.path.as_str(), "/" | "/productpage") {
        return Answer::not_found();
    }
    let details = call(request, &setting("DETAILS", "details"), "/details");
    let reviews = call(request, &setting("REVIEWS", "reviews"), "/reviews");
    let (details, reviews) = match (details, reviews) {
        (Ok(details), Ok(reviews)) => (details, reviews),
        (details, reviews) => {
            let faults: Vec<_> = [details.err(), reviews.err()].into_iter().flatten().collect();
            return Answer::unavailable(&faults.join("; "));
        }
    };
    Answer::either(
        request,
        format!("{{\"title\": \"The Comedy of Errors\", \"details\": {details}, \"reviews\": {reviews}}}"),
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>The Comedy of Errors</title>\n\
             <h1>The Comedy of Errors</h1>\n{details}{reviews}</html>"
        ),
    )
}

fn details(request: &Request) -> Answer {
    if request.path != "/details" {
        return Answer::not_found();
    }
    let (author, year, pages) = ("William Shakespeare", 1595, 200);
    Answer::either(
        request,
        format!("{{\"author\": \"{author}\", \"year\": {year}, \"pages\": {pages}}}"),
        format!("<p>{author}, {year}. {pages} pages.</p>\n"),
    )
}

/// Three versions: with no stars, with black ones, with red ones.
fn reviews(request: &Request) -> Answer {
    if request.path != "/reviews" {
        return Answer::not_found();
    }
    let (version, stars) = (setting("VERSION", "v1"), setting("STARS", "none"));
    let texts =
        ["Twins, twice, and nobody notices. I laughed out loud.", "Short, fast and silly; no Hamlet."];
    let mut given = vec![None; texts.len()];
    if stars != "none" {
        match call(request, &setting("RATINGS", "ratings"), "/ratings") {
            // A list of numbers, such as [5, 4].
            Ok(list) => {
                let numbers = list.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok());
                for (place, number) in given.iter_mut().zip(numbers) {
                    *place = Some(number);
                }
            }
            Err(fault) => return Answer::unavailable(&fault),
        }
    }
    let (mut json, mut html) = (Vec::new(), String::new());
    for (text, number) in texts.iter().zip(given) {
        let number: Option<usize> = number;
        let rated = number.map(|n| format!(", \"stars\": {n}, \"colour\": \"{stars}\"")).unwrap_or_default();
        json.push(format!("{{\"text\": \"{text}\"{rated}}}"));
        let drawn = number
            .map(|n| format!(" <span style=\"color: {stars}\">{}</span>", "\u{2605}".repeat(n.min(5))))
            .unwrap_or_default();
        html += &format!("<blockquote>{text}{drawn}</blockquote>\n");
    }
    Answer::either(
        request,
        format!("{{\"version\": \"{version}\", \"reviews\": [{}]}}", json.join(", ")),
        format!("{html}<p><small>reviews {version}</small></p>\n"),
    )
}

fn ratings(request: &Request) -> Answer {
    match request.path.as_str() {
        "/ratings" => Answer::json(200, "[5, 4]".to_owned()),
        _ => Answer::not_found(),
    }
}

/// Asks another service, through the proxy beside this one, on behalf of a request.
fn call(request: &Request, host: &str, path: &str) -> Result<String, String> {
    let headers: String = PASSED_ON
        .iter()
        .filter_map(|name| Some(format!("{name}: {}\r\n", request.headers.get(*name)?)))
        .collect();
    match get(&setting("OUTBOUND", "127.0.0.1:8080"), host, path, &headers) {
        Ok((200, body)) => Ok(body.trim_end().to_owned()),
        Ok((status, body)) => Err(format!("{host} answers {status} {}", body.trim())),
        Err(error) => Err(format!("{host}: {error}")),
    }
}

// HTTP/1.1, as much of it as a proxy on the same machine speaks with a service.

struct Request {
    path: String,
    /// By name in small letters.
    headers: BTreeMap<String, String>,
}

struct Answer {
    status: u16,
    kind: &'static str,
    body: String,
}

impl Answer {
    fn json(status: u16, body: String) -> Self {
        Self { status, kind: "application/json", body: body + "\n" }
    }

    /// For programs and for people.
    fn either(request: &Request, json: String, html: String) -> Self {
        let accepts = request.headers.get("accept").map(String::as_str).unwrap_or_default();
        match accepts.contains("text/html") {
            true => Self { status: 200, kind: "text/html; charset=utf-8", body: html },
            false => Self::json(200, json),
        }
    }

    fn not_found() -> Self {
        Self { status: 404, kind: "text/plain", body: "there is nothing here\n".to_owned() }
    }

    fn unavailable(why: &str) -> Self {
        Self { status: 503, kind: "text/plain; charset=utf-8", body: format!("{why}\n") }
    }
}

fn serve(service: fn(&Request) -> Answer) -> io::Result<ExitCode> {
    let address = setting("LISTEN", "127.0.0.1:9080");
    let listener =
        TcpListener::bind(&address).map_err(|error| io::Error::other(format!("{address}: {error}")))?;
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        std::thread::spawn(move || converse(stream, service));
    }
    Ok(ExitCode::SUCCESS)
}

/// Answers what comes over one connection until the other side closes it.
fn converse(mut stream: TcpStream, service: fn(&Request) -> Answer) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut bytes = Vec::new();
    while let Some(head) = read_head(&mut stream, &mut bytes)? {
        let answer = match head.lines().next().map(|line| line.split(' ').collect::<Vec<_>>()).as_deref() {
            Some(["GET", target, _]) => {
                let path = target.split('?').next().unwrap_or_default().to_owned();
                service(&Request { path, headers: headers(&head) })
            }
            // With a body perhaps, which nobody here reads.
            _ => {
                let refused =
                    "HTTP/1.1 405 Method Not Allowed\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
                return stream.write_all(refused.as_bytes());
            }
        };
        let Answer { status, kind, body } = answer;
        let length = body.len();
        stream.write_all(
            format!("HTTP/1.1 {status} \r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n{body}")
                .as_bytes(),
        )?;
    }
    Ok(())
}

/// One request over a connection of its own: the status and the body.
fn get(address: &str, host: &str, path: &str, headers: &str) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {host}\r\n{headers}connection: close\r\n\r\n")?;
    let mut bytes = Vec::new();
    let head = read_head(&mut stream, &mut bytes)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| io::Error::other("an answer without a status"))?;
    let headers = self::headers(&head);
    let whole = match headers.get("content-length").and_then(|length| length.parse::<usize>().ok()) {
        Some(length) if length <= MAX_BODY => length,
        None if !headers.contains_key("transfer-encoding") => MAX_BODY,
        _ => return Err(io::Error::other("an answer of unknown length")),
    };
    let mut buffer = [0; 16 * 1024];
    while bytes.len() < whole {
        match stream.read(&mut buffer)? {
            0 if whole == MAX_BODY => break,
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => bytes.extend_from_slice(&buffer[..count]),
        }
    }
    Ok((status, String::from_utf8_lossy(&bytes).into_owned()))
}

/// Up to the empty line; none if the connection ends before it begins. What came after it stays in `bytes`.
fn read_head(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> io::Result<Option<String>> {
    let mut buffer = [0; 16 * 1024];
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            let head = String::from_utf8_lossy(bytes).into_owned();
            *bytes = rest;
            return Ok(Some(head));
        }
        if bytes.len() > MAX_HEAD {
            return Err(io::Error::other("a head without an end"));
        }
        match stream.read(&mut buffer)? {
            0 if bytes.is_empty() => return Ok(None),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => bytes.extend_from_slice(&buffer[..count]),
        }
    }
}

fn headers(head: &str) -> BTreeMap<String, String> {
    let fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    fields.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect()
}

// What asks.

fn ask(address: &str, pages: &[&str]) -> io::Result<ExitCode> {
    for page in pages {
        let (host, path) = split(page);
        let (status, body) = get(address, host, path, "")?;
        print!("{status} {page}\n{body}");
        if !body.ends_with('\n') {
            println!();
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn split(page: &str) -> (&str, &str) {
    page.split_at(page.find('/').unwrap_or(page.len()))
}

/// Four at a time, each over a new connection and without spans. Not one may fail.
fn load(address: &str, page: &str) -> io::Result<ExitCode> {
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let stop = Arc::clone(&stop);
            let [address, page] = [address, page].map(str::to_owned);
            std::thread::spawn(move || {
                let (host, path) = split(&page);
                let (mut answered, mut failed) = (0_u64, Vec::new());
                while !stop.load(Ordering::Relaxed) {
                    match get(&address, host, path, "x-b3-sampled: 0\r\n") {
                        Ok((200, _)) => answered += 1,
                        Ok((status, body)) => failed.push(format!("{status} {}", body.trim())),
                        Err(error) => failed.push(error.to_string()),
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
                (answered, failed)
            })
        })
        .collect();
    io::copy(&mut io::stdin(), &mut io::sink())?;
    stop.store(true, Ordering::Relaxed);
    let (mut answered, mut failed) = (0, Vec::new());
    for thread in threads {
        let (some, others) = thread.join().map_err(|_| io::Error::other("a thread of the load is gone"))?;
        answered += some;
        failed.extend(others);
    }
    println!("{answered} answered, {} failed", failed.len());
    for failure in failed.iter().take(5) {
        println!("  {failure}");
    }
    Ok(if answered > 0 && failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
