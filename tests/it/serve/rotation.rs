//! The whole way: Mica keeps the folders fresh, two real Envoys mount them and talk mutual TLS.

use std::time::Duration;

use super::{Place, wait_for};
use crate::envoy::Mesh;

const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";
const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";

#[test]
fn ten_rotations_by_mica_fail_no_request_of_envoys() {
    let place = Place::new();
    place.account("server");
    place.account("client");
    // From five seconds on, so ten rotations take about a minute; in the middle Mica itself is killed and comes back.
    let mut mica = place.start(&["--ttl", "10s"]);
    let (server, client) = (place.folder("shop", "server"), place.folder("shop", "client"));
    let mut mesh = Mesh::start((&server, SERVER), (&client, CLIENT));
    let pids = (mesh.server.pid(), mesh.client.pid());
    let load = mesh.load();
    let mut serial = place.serial("server");
    for rotation in 0..10 {
        if rotation == 5 {
            mica.kill();
            mica = place.start(&["--ttl", "10s"]);
        }
        // Mica may already be one ahead of a busy Envoy.
        serial = wait_for(Duration::from_secs(8), "a connection with a new certificate", || {
            let served = mesh.served_serial(&client);
            (served != serial).then_some(served)
        });
        load.wait_for(50);
    }
    let report = load.stop();
    assert_eq!(report.failed, Vec::<String>::new());
    eprintln!("{} requests over {} connections, none failed", report.answered, report.connections);
    assert!(mesh.server.runs() && mesh.client.runs());
    assert_eq!(pids, (mesh.server.pid(), mesh.client.pid()));
    assert!(mesh.client.stat(".ssl_context_update_by_sds").0 >= 10);
    mica.stop();
}
