//! Generated from `proto/` by the build; nothing here is written by hand.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]

pub mod grpc {
    pub mod health {
        pub mod v1 {
            tonic::include_proto!("grpc.health.v1");
        }
    }
}
