//! Streams: all that there is at once, and all of it again after each change.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tokio_stream::Stream;
use tonic::Status;

use super::caller::{Caller, Hints, NO_BUNDLES, ders, roots};
use crate::proto::spiffe::{JwtBundlesResponse, X509BundlesResponse, X509svid, X509svidResponse};

/// What is followed.
pub(super) trait Kind: Send + 'static {
    type Response: Clone + PartialEq + Send + Unpin + 'static;

    /// All that there is now, and whether something is still being obtained.
    fn look(caller: &mut Caller) -> Result<(Self::Response, bool), Status>;

    /// A response goes out.
    fn delivered(_: &mut Caller) {}

    /// What a later response is compared with.
    fn kept(response: &Self::Response) -> Self::Response {
        response.clone()
    }
}

/// Certificates with their keys and roots.
pub(super) struct X509Svids;

impl Kind for X509Svids {
    type Response = X509svidResponse;

    fn look(caller: &mut Caller) -> Result<(X509svidResponse, bool), Status> {
        let bundles = caller.bundles().ok_or_else(|| Status::unavailable(NO_BUNDLES))?;
        let mut response = X509svidResponse::default();
        let mut hints = Hints::default();
        let mut waits = false;
        for identity in caller.identities() {
            let id = &identity.entitled.id;
            let of = bundles.domains.get(id.trust_domain()).and_then(|it| it.x509.as_ref());
            // Nobody can use a certificate without what its peers are verified with.
            let (Some(svid), Some(bundle)) = (identity.svid, of) else {
                waits = true;
                continue;
            };
            response.svids.push(X509svid {
                spiffe_id: id.to_string(),
                x509_svid: ders(&svid.chain),
                x509_svid_key: svid.key.pkcs8().to_vec(),
                bundle: roots(bundle),
                hint: hints.of(identity.entitled),
            });
        }
        if response.svids.is_empty() {
            return Err(Status::unavailable(
                "there is no certificate yet, or none that is still good; try again",
            ));
        }
        for (domain, authorities) in &bundles.domains {
            if let Some(x509) = authorities.x509.as_ref().filter(|_| *domain != bundles.own) {
                response.federated_bundles.insert(domain.id().to_string(), roots(x509));
            }
        }
        caller.was_given(&bundles);
        Ok((response, waits))
    }

    fn delivered(caller: &mut Caller) {
        caller.trace("FetchX509SVID");
    }

    /// Without the keys: another certificate has another one.
    fn kept(response: &X509svidResponse) -> X509svidResponse {
        let svid = |svid: &X509svid| X509svid { x509_svid_key: Vec::new(), ..svid.clone() };
        X509svidResponse { svids: response.svids.iter().map(svid).collect(), ..response.clone() }
    }
}

/// Roots by trust domain.
pub(super) struct X509Bundles;

impl Kind for X509Bundles {
    type Response = X509BundlesResponse;

    fn look(caller: &mut Caller) -> Result<(X509BundlesResponse, bool), Status> {
        let bundles = caller.bundles().filter(|bundles| bundles.roots().is_some());
        let bundles = bundles.ok_or_else(|| Status::unavailable(NO_BUNDLES))?;
        let mut response = X509BundlesResponse::default();
        for (domain, authorities) in &bundles.domains {
            if let Some(x509) = &authorities.x509 {
                response.bundles.insert(domain.id().to_string(), roots(x509));
            }
        }
        caller.was_given(&bundles);
        Ok((response, false))
    }
}

/// JWK Sets by trust domain.
pub(super) struct JwtBundles;

impl Kind for JwtBundles {
    type Response = JwtBundlesResponse;

    fn look(caller: &mut Caller) -> Result<(JwtBundlesResponse, bool), Status> {
        let bundles = caller.bundles();
        let own = bundles.as_ref().and_then(|bundles| bundles.domains.get(&bundles.own)?.jwt.as_ref());
        let (Some(bundles), Some(_)) = (&bundles, own) else { return Err(Status::unavailable(NO_BUNDLES)) };
        let mut response = JwtBundlesResponse::default();
        for (domain, authorities) in &bundles.domains {
            if let Some(jwt) = &authorities.jwt {
                response.bundles.insert(domain.id().to_string(), jwt.as_bytes().to_vec());
            }
        }
        Ok((response, false))
    }
}

/// A stream that goes on.
pub(super) struct Following<K: Kind> {
    caller: Caller,
    sent: K::Response,
    first: Option<K::Response>,
}

impl<K: Kind> Following<K> {
    /// The first response is there when this is: whole if all of it was obtained within the time, else as much as there
    /// is then.
    pub(super) async fn begin(mut caller: Caller, within: Duration) -> Result<Self, Status> {
        let deadline = Instant::now() + within;
        loop {
            let looked = K::look(&mut caller);
            if let Ok((response, false)) = &looked {
                return Ok(Self::of(caller, response.clone()));
            }
            if timeout_at(deadline, caller.changed()).await.is_err() {
                let (response, _) = looked?;
                return Ok(Self::of(caller, response));
            }
            caller.attest().await?;
        }
    }

    fn of(caller: Caller, first: K::Response) -> Self {
        Self { caller, sent: K::kept(&first), first: Some(first) }
    }

    /// The next response that differs from the one before.
    async fn next(&mut self) -> Result<K::Response, Status> {
        if let Some(first) = self.first.take() {
            K::delivered(&mut self.caller);
            return Ok(first);
        }
        loop {
            self.caller.changed().await;
            self.caller.attest().await?;
            let (response, _) = K::look(&mut self.caller)?;
            let kept = K::kept(&response);
            if kept != self.sent {
                self.sent = kept;
                K::delivered(&mut self.caller);
                return Ok(response);
            }
        }
    }

    pub(super) fn into_responses(self) -> Responses<K> {
        Responses { next: Some(Self::turn(self)) }
    }

    fn turn(mut self) -> Turn<K> {
        Box::pin(async move {
            let response = self.next().await;
            (self, response)
        })
    }
}

type Turn<K> = Pin<Box<dyn Future<Output = (Following<K>, Result<<K as Kind>::Response, Status>)> + Send>>;

/// The responses of a stream, which ends with the first that cannot be given.
pub(super) struct Responses<K: Kind> {
    next: Option<Turn<K>>,
}

impl<K: Kind> Stream for Responses<K> {
    type Item = Result<K::Response, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(next) = &mut self.next else { return Poll::Ready(None) };
        let Poll::Ready((following, response)) = next.as_mut().poll(cx) else { return Poll::Pending };
        self.next = response.is_ok().then(|| following.turn());
        Poll::Ready(Some(response))
    }
}
