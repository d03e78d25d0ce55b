//! Generated from `proto/` by the build; by hand only the codec.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]

mod codec;

pub(crate) use codec::Codec;

/// What the authority serves, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
/// What the agent serves on its socket, for reflection.
pub const LOCAL_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/local_descriptors.bin"));

pub mod google {
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
}

pub mod grpc {
    pub mod health {
        pub mod v1 {
            tonic::include_proto!("grpc.health.v1");
        }
    }
}

pub mod istio {
    pub mod v1 {
        pub mod auth {
            tonic::include_proto!("istio.v1.auth");
        }
    }
}

pub mod mica {
    pub mod v1 {
        tonic::include_proto!("mica.v1");
    }
}

pub mod opentelemetry {
    pub mod proto {
        pub mod collector {
            pub mod trace {
                pub mod v1 {
                    tonic::include_proto!("opentelemetry.proto.collector.trace.v1");
                }
            }
        }
        pub mod common {
            pub mod v1 {
                tonic::include_proto!("opentelemetry.proto.common.v1");
            }
        }
        pub mod resource {
            pub mod v1 {
                tonic::include_proto!("opentelemetry.proto.resource.v1");
            }
        }
        pub mod trace {
            pub mod v1 {
                tonic::include_proto!("opentelemetry.proto.trace.v1");
            }
        }
    }
}

pub mod spiffe {
    tonic::include_proto!("_");
}

/// Envoy's protocols. Their `Any` is not the library's.
pub mod xds {
    macro_rules! generated {
        ($package:literal) => {
            include!(concat!(env!("OUT_DIR"), "/xds/", $package, ".rs"));
        };
    }

    pub mod google {
        pub mod protobuf {
            generated!("google.protobuf");
        }
        pub mod rpc {
            generated!("google.rpc");
        }
    }

    pub mod envoy {
        pub mod config {
            pub mod core {
                pub mod v3 {
                    generated!("envoy.config.core.v3");
                }
            }
        }
        pub mod extensions {
            pub mod transport_sockets {
                pub mod tls {
                    pub mod v3 {
                        generated!("envoy.extensions.transport_sockets.tls.v3");
                    }
                }
            }
        }
        pub mod service {
            pub mod discovery {
                pub mod v3 {
                    generated!("envoy.service.discovery.v3");
                }
            }
            pub mod secret {
                pub mod v3 {
                    generated!("envoy.service.secret.v3");
                }
            }
        }
    }
}
