//! Clients that ask for streams and never read from their sockets.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use mica::proto::xds::envoy::service::discovery::v3::DiscoveryRequest;
use prost::Message as _;

use super::{Follower, command, resident, start, token};
use crate::serve::{Place, wait_for};

const WATCHERS: &str = "mica_agent_watchers{identity=\"spiffe://cluster.local/ns/shop/sa/web\"}";
const WORKLOAD_API: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
const SDS: &str = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";
const CLIENTS: usize = 200;
/// Those of the Workload API open so many streams each, those of SDS one.
const STREAMS: usize = 4;
/// And so many as a connection may have, of which the answers soon have no room in its socket.
const GREEDY: usize = 10;
const MANY: usize = 120;
const ROTATIONS: usize = 4;
/// What they may cost together, with all that a debug build and its allocator keep.
const GROWTH: u64 = 48 << 20;
/// And what a rotation may add once they are all there.
const GROWTH_OF_ROTATIONS: u64 = 8 << 20;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const INITIAL_WINDOW_SIZE: [u8; 2] = [0, 4];
/// RFC 9113 6.9.1.
const LARGEST_WINDOW: u32 = (1 << 31) - 1;

#[test]
fn two_hundred_clients_that_never_read_cost_little_and_keep_nobody_waiting() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&["--ttl", "10s", "--trial-tokens"]);
    let socket = place.root.path().join("agent.sock");
    let mut agent = command(&place, &mica);
    agent.arg("--token-file").arg(token(&place, "shop/web")).arg("--socket").arg(&socket);
    let agent = start(&place, "web", &mut agent);
    let workload = Follower::of(&socket);
    let mut serial = workload.wait_for_another("", Duration::from_secs(5));
    let honest = agent.metric(WATCHERS);
    let before = resident(agent.pid());

    // Half of them would take all that there ever is, half of them nothing.
    let windows = [LARGEST_WINDOW, 0];
    let both = |n| {
        let window = windows[n % windows.len()];
        [x509(&socket, window, STREAMS), sds(&socket, window)]
    };
    let mut held: Vec<UnixStream> = (0..CLIENTS / 2).flat_map(both).collect();
    held.extend((0..GREEDY).map(|_| x509(&socket, LARGEST_WINDOW, MANY)));
    let streams = CLIENTS / 2 * (STREAMS + 1) + GREEDY * MANY;
    wait_for(Duration::from_secs(20), "their streams", || {
        (agent.metric(WATCHERS) >= honest + streams as f64).then_some(())
    });
    serial = workload.wait_for_another(&serial, Duration::from_secs(15));
    let all_there = resident(agent.pid());
    for _ in 0..ROTATIONS {
        serial = workload.wait_for_another(&serial, Duration::from_secs(15));
        // So do those that come now.
        let late = Follower::of(&socket).wait_for_another("", Duration::from_secs(5));
        assert!(late == serial || Some(late) == workload.serial());
    }
    let after = resident(agent.pid());
    eprintln!("{before} bytes before, {all_there} with all of them, {after} after {ROTATIONS} rotations");
    assert!(all_there < before + GROWTH, "{all_there} bytes, before {before}");
    assert!(after < all_there + GROWTH_OF_ROTATIONS, "{after} bytes, at first {all_there}");
    // They answer no ping, so they are sent away, though they hold on.
    wait_for(Duration::from_secs(90), "the end of their streams", || {
        (agent.metric(WATCHERS) <= honest + 1.0).then_some(())
    });
    drop(held);
    assert!(!agent.log().contains("panic"), "{}", agent.log());
    agent.stop();
}

/// A connection with streams of certificates.
fn x509(socket: &Path, window: u32, streams: usize) -> UnixStream {
    let mut stream = hello(socket, window);
    for id in (1..).step_by(2).take(streams) {
        let header = header(WORKLOAD_API, &[("workload.spiffe.io", "true")]);
        stream.write_all(&frame(HEADERS, END_HEADERS, id, &header)).unwrap();
        stream.write_all(&frame(DATA, END_STREAM, id, &[0; 5])).unwrap();
    }
    stream
}

/// A connection with a stream of secrets.
fn sds(socket: &Path, window: u32) -> UnixStream {
    let mut stream = hello(socket, window);
    let names = ["default", "ROOTCA"].map(str::to_owned).to_vec();
    let request = DiscoveryRequest { resource_names: names, ..Default::default() }.encode_to_vec();
    let length = u32::try_from(request.len()).unwrap().to_be_bytes();
    stream.write_all(&frame(HEADERS, END_HEADERS, 1, &header(SDS, &[]))).unwrap();
    stream.write_all(&frame(DATA, 0, 1, &[&[0], &length[..], &request].concat())).unwrap();
    stream
}

fn hello(socket: &Path, window: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    let setting = [&INITIAL_WINDOW_SIZE[..], &window.to_be_bytes()].concat();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, &setting)).unwrap();
    if window > 0 {
        stream.write_all(&frame(WINDOW_UPDATE, 0, 0, &(window - 65_535).to_be_bytes())).unwrap();
    }
    stream
}

/// RFC 9113 4.1.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A gRPC call's header, in HPACK without compression.
fn header(path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let pairs = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    let mut block = Vec::new();
    for (name, value) in pairs.iter().chain(more) {
        block.extend([0, u8::try_from(name.len()).unwrap()]);
        block.extend(name.as_bytes());
        block.push(u8::try_from(value.len()).unwrap());
        block.extend(value.as_bytes());
    }
    block
}
