//! `mica bench`.

use std::time::Duration;

use serde_json::json;

use super::{Error, Report, connect};
use crate::client::bench::{Load, Outcome};
use crate::client::{self, Wanted};
use crate::config::cli::Bench;
use crate::core::csr::nameless;
use crate::core::inspect::one_line;
use crate::core::key::{IssuerKey as _, KeyKind, SigningKey};
use crate::core::pem;
use crate::sys::{clock, keys};

/// Different keys, so that no answer can be had from memory.
const CSRS: usize = 64;
/// Enough for a floor that is good to a per cent or two.
const ROUNDS: u32 = 2_000;

pub(super) fn bench(arguments: &Bench) -> Result<Report, Error> {
    let Bench { connections, in_flight, duration, rate, new_connections, .. } = arguments;
    let (target, _) = connect::target(&arguments.connect)?;
    let signing = || Ok::<_, Error>(keys::generate(KeyKind::P256)?.signing()?);
    let wanted = || {
        let csr = pem::encode(pem::CSR, &nameless(&signing()?)?);
        Ok(Wanted { csr, ..Wanted::default() })
    };
    let wanted = (0..CSRS).map(|_| wanted()).collect::<Result<Vec<_>, Error>>()?;
    let floor = floor(&signing()?)?;
    let load = Load {
        connections: usize::from(*connections),
        in_flight: usize::from(*in_flight),
        duration: duration.duration(),
        requests: u64::MAX,
        rate: rate.map(f64::from),
        new_connections: *new_connections,
    };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
    let outcome = runtime.block_on(client::load(&target, &wanted, &[], &load))?;
    Ok(report(&outcome, floor))
}

/// What every certificate costs: the CSR's signature is verified, and its own is made. In CPU time.
fn floor(key: &SigningKey) -> Result<Duration, Error> {
    let message = [7; 512];
    let began = clock::worked();
    for _ in 0..ROUNDS {
        let signature = key.sign(&message)?;
        let algorithm = key.public().kind().signature_algorithm();
        if key.public().verify(algorithm, &message, &signature).is_err() {
            unreachable!("a key verifies what it signed");
        }
    }
    Ok((clock::worked() - began) / ROUNDS)
}

fn report(outcome: &Outcome, floor: Duration) -> Report {
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let throughput = outcome.throughput();
    let each = if throughput > 0.0 { 1e6 / throughput } else { 0.0 };
    let quantiles = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)]
        .map(|(name, part)| (name, outcome.latency.quantile(part).unwrap_or_default()));
    let mut text = format!(
        "{} granted, {} not, in {:.1} s\n  throughput  {throughput:.0} a second\n  latency    ",
        outcome.granted,
        outcome.failures(),
        outcome.elapsed.as_secs_f64()
    );
    for (name, time) in quantiles {
        text.push_str(&format!(" {name} {}", shown(time)));
    }
    text.push_str(&format!(" max {}\n", shown(outcome.latency.longest())));
    text.push_str(&format!(
        "  floor       {:.1} us of CPU here (one verified and one made signature)\n",
        micros(floor)
    ));
    if each > 0.0 {
        let ratio = each / micros(floor);
        text.push_str(&format!(
            "  ratio       one certificate in {each:.1} us, {ratio:.2} times the floor\n"
        ));
    }
    for (why, count) in &outcome.failed {
        text.push_str(&format!("  not granted {count} times: {}\n", one_line(why)));
    }
    let json = json!({
        "granted": outcome.granted,
        "not_granted": outcome.failed,
        "seconds": outcome.elapsed.as_secs_f64(),
        "throughput": throughput,
        "latency_us": {
            "p50": micros(quantiles[0].1),
            "p90": micros(quantiles[1].1),
            "p99": micros(quantiles[2].1),
            "max": micros(outcome.latency.longest()),
        },
        "floor_us": micros(floor),
        "ratio": if each > 0.0 { Some(each / micros(floor)) } else { None },
    });
    Report { good: outcome.granted > 0, ..Report::new(text, json) }
}

fn shown(time: Duration) -> String {
    let micros = time.as_secs_f64() * 1e6;
    if micros < 1_000.0 { format!("{micros:.0} us") } else { format!("{:.1} ms", micros / 1e3) }
}
