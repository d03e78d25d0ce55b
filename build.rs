//! Compiles the protocols in `proto/`, without `protoc`.

// A build script reads its environment and writes files; the ban is for the program.
#![allow(clippy::disallowed_methods)]

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    // The unwinder from the C compiler's archive: the program then needs the C library and nothing else.
    println!("cargo::rustc-link-arg-bins=-Wl,--whole-archive,-l:libgcc_eh.a,--no-whole-archive");
    // A tenth of the space for the addresses that are set at the start (needs glibc 2.36, of 2022).
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    // What runs at the start in one place, and not in the pages around all else.
    println!("cargo::rerun-if-changed=packaging/start-order.ld");
    if std::env::var("PROFILE")? == "release" {
        let order = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("packaging/start-order.ld");
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", order.display());
    }
    let served = [
        "grpc/health/v1/health.proto",
        "istio/v1/auth/ca.proto",
        "istio/v1/auth/istio_ca.proto",
        "mica/v1/agent.proto",
        "mica/v1/identity.proto",
        "google/rpc/error_details.proto",
    ];
    let local = ["spiffe/workload.proto"];
    let sent = ["opentelemetry/proto/collector/trace/v1/trace_service.proto"];
    let xds = [
        "envoy/extensions/transport_sockets/tls/v3/secret.proto",
        "envoy/extensions/transport_sockets/tls/v3/tls_spiffe_validator_config.proto",
        "envoy/service/secret/v3/sds.proto",
    ];
    // What reflection tells those who ask, of the authority and of the agent.
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), compiled(&served)?.encode_file_descriptor_set())?;
    let reflected = compiled(&[&local[..], &xds].concat())?;
    std::fs::write(out.join("local_descriptors.bin"), reflected.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        .codec_path("crate::proto::Codec")
        .compile_fds(compiled(&served)?.file_descriptor_set())?;
    // Answers of streams that wait unread share one of tonic's larger buffers.
    let others = compiled(&[&local[..], &sent].concat())?.file_descriptor_set();
    tonic_prost_build::configure().compile_fds(others)?;
    // With an Any of their own, whose bytes many responses share. What may hold a key is not shown.
    let own = out.join("xds");
    std::fs::create_dir_all(&own)?;
    tonic_prost_build::configure()
        .out_dir(own)
        .compile_well_known_types(true)
        .bytes(".google.protobuf.Any")
        .skip_debug(["google.protobuf.Any", "envoy.config.core.v3.DataSource"])
        .compile_fds(compiled(&xds)?.file_descriptor_set())?;
    Ok(())
}

fn compiled(files: &[&str]) -> Result<protox::Compiler, protox::Error> {
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).open_files(files)?;
    Ok(compiler)
}
