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
    let served = [
        "grpc/health/v1/health.proto",
        "istio/v1/auth/ca.proto",
        "istio/v1/auth/istio_ca.proto",
        "mica/v1/agent.proto",
        "mica/v1/identity.proto",
        "google/rpc/error_details.proto",
    ];
    let local = ["spiffe/workload.proto"];
    // What reflection tells those who ask, of the authority and of the agent.
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), compiled(&served)?.encode_file_descriptor_set())?;
    std::fs::write(out.join("local_descriptors.bin"), compiled(&local)?.encode_file_descriptor_set())?;
    let all = compiled(&[&served[..], &local].concat())?.file_descriptor_set();
    tonic_prost_build::configure().compile_fds(all)?;
    Ok(())
}

fn compiled(files: &[&str]) -> Result<protox::Compiler, protox::Error> {
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).open_files(files)?;
    Ok(compiler)
}
