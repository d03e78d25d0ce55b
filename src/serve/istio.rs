//! Istio's two CSR services: `CreateCertificate`, and `HandleCSR` of 0.2.10.

use std::sync::Arc;

use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tonic::{Request, Response, Status};

use super::Connected;
use super::codes::status;
use super::requests::{Ask, Requests, Wishes};
use crate::auth::{Evidence, Peer};
use crate::authority::Grant;
use crate::core::lifetime::Lifetime;
use crate::core::pem;
use crate::core::refusal::{Reason, Refusal};
use crate::proto::istio::v1::auth as istio;
use crate::proto::istio::v1::auth::istio_ca_service_server::IstioCaService;
use crate::proto::istio::v1::auth::istio_certificate_service_server::IstioCertificateService;

/// The methods, as metrics and the log have them.
pub(super) const CREATE_CERTIFICATE: &str = "CreateCertificate";
pub(super) const HANDLE_CSR: &str = "HandleCSR";
/// Mica's own for several at once.
pub(super) const CREATE_CERTIFICATES: &str = "CreateCertificates";
/// Metadata of CreateCertificate: which of several signers. There is one.
const CERT_SIGNER: &str = "CertSigner";
/// Metadata of CreateCertificate: a SPIFFE ID that a node's proxy asks for.
const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
/// Metadata of CreateCertificate, Mica's own: `true` for a lifetime that is not shortened for an even load.
const EXACT_LIFETIME: &str = "ExactLifetime";

/// Answers both.
#[derive(Clone)]
pub(super) struct Istio {
    pub(super) requests: Arc<Requests>,
}

#[tonic::async_trait]
impl IstioCertificateService for Istio {
    async fn create_certificate(
        &self,
        request: Request<istio::IstioCertificateRequest>,
    ) -> Result<Response<istio::IstioCertificateResponse>, Status> {
        let (metadata, extensions, asked) = request.into_parts();
        let evidence = Evidence { peer: peer(&extensions)?, metadata: &metadata };
        let ask = ask(CREATE_CERTIFICATE, &asked);
        let grant = self.requests.grant(&ask, &evidence).await.map_err(|refusal| status(&refusal))?;
        Ok(Response::new(answer(&grant)))
    }
}

#[tonic::async_trait]
impl IstioCaService for Istio {
    async fn handle_csr(
        &self,
        request: Request<istio::Request>,
    ) -> Result<Response<istio::Response>, Status> {
        let (metadata, extensions, asked) = request.into_parts();
        let evidence = Evidence { peer: peer(&extensions)?, metadata: &metadata };
        let ask = Ask {
            method: HANDLE_CSR,
            csr: Some(&asked.csr_pem),
            lifetime: None,
            wishes: Ok(Wishes::default()),
            names_itself: true,
        };
        let grant = self.requests.grant(&ask, &evidence).await.map_err(|refusal| status(&refusal))?;
        Ok(Response::new(istio::Response {
            is_approved: true,
            status: None,
            signed_cert_chain: grant.chain_pem().into_bytes(),
        }))
    }
}

/// What a request for a certificate asks, by whatever method it came.
pub(super) fn ask<'a>(method: &'static str, asked: &'a istio::IstioCertificateRequest) -> Ask<'a> {
    Ask {
        method,
        csr: Some(asked.csr.as_bytes()),
        lifetime: lifetime(asked.validity_duration),
        wishes: wishes(asked.metadata.as_ref()),
        names_itself: false,
    }
}

/// What the metadata of CreateCertificate wishes. Other keys are left alone: agents send them to other authorities.
pub fn wishes(metadata: Option<&Struct>) -> Result<Wishes, Refusal> {
    let mut wishes = Wishes::default();
    let Some(metadata) = metadata else { return Ok(wishes) };
    let kind = |key: &str| metadata.fields.get(key).and_then(|value: &Value| value.kind.as_ref());
    let malformed = |key: &str, wanted: &str| {
        Err(Refusal::new(Reason::MetadataMalformed, format!("the metadata {key} is not {wanted}")))
    };
    match kind(CERT_SIGNER) {
        None | Some(Kind::NullValue(_)) => {}
        Some(Kind::StringValue(signer)) if signer.is_empty() => {}
        Some(Kind::StringValue(_)) => {
            let sentence =
                format!("{CERT_SIGNER} names a signer, and this authority has one only; leave it empty");
            return Err(Refusal::new(Reason::CertSignerUnsupported, sentence));
        }
        Some(_) => return malformed(CERT_SIGNER, "a text"),
    }
    match kind(IMPERSONATED_IDENTITY) {
        None | Some(Kind::NullValue(_)) => {}
        Some(Kind::StringValue(id)) => wishes.impersonated = Some(id.clone()).filter(|id| !id.is_empty()),
        Some(_) => return malformed(IMPERSONATED_IDENTITY, "a text"),
    }
    match kind(EXACT_LIFETIME) {
        None | Some(Kind::NullValue(_)) => {}
        Some(Kind::BoolValue(exact)) => wishes.exact = *exact,
        Some(_) => return malformed(EXACT_LIFETIME, "true or false"),
    }
    Ok(wishes)
}

/// The leaf and each intermediate one PEM each; the last element is the whole trust bundle, which clients split
/// themselves.
pub(super) fn answer(grant: &Grant) -> istio::IstioCertificateResponse {
    let mut elements = Vec::with_capacity(2 + grant.issuer.chain().len());
    elements.push(pem::encode(pem::CERTIFICATE, grant.issued.der()));
    elements.extend(grant.issuer.chain().iter().map(|above| above.to_pem()));
    elements.push(str::to_owned(grant.issuer.bundle().pem()));
    istio::IstioCertificateResponse { cert_chain: elements }
}

/// None, which asks for the default, for 0 or less.
pub(super) fn lifetime(seconds: i64) -> Option<Lifetime> {
    u64::try_from(seconds).ok().filter(|seconds| *seconds > 0).map(Lifetime::from_secs)
}

/// Set by the listener, for every connection.
pub(super) fn peer(extensions: &tonic::Extensions) -> Result<&Arc<Peer>, Status> {
    extensions
        .get::<Connected>()
        .map(|connection| &connection.peer)
        .ok_or_else(|| Status::internal("the connection is unknown; this is a fault of mica's own"))
}
