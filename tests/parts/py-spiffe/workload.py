"""A workload as the users of py-spiffe write it: it makes requests to itself all the time, until standard input ends.

Each request is a connection of its own, under mutual TLS; the first that fails ends the program, and so does a token that
is not good. A token that cannot be fetched because nobody answers is counted. A line of standard input is answered with what
there was so far.
"""

import argparse
import pathlib
import queue
import socket
import ssl
import sys
import tempfile
import threading
import time

import grpc
from cryptography.hazmat.primitives.serialization import Encoding
from spiffe import JwtSource, JwtSvid, X509Source
from spiffe.workloadapi.errors import FetchJwtSvidError

# What gRPC says while nobody is at the socket.
AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def main():
    parser = argparse.ArgumentParser(prog="py-spiffe", description=__doc__)
    parser.add_argument("socket", type=pathlib.Path)
    parser.add_argument("--audience", required=True, help="whom tokens are fetched for")
    arguments = parser.parse_args()
    path = f"unix://{arguments.socket.resolve()}"
    with (
        X509Source(socket_path=path, timeout_in_seconds=30) as x509_source,
        JwtSource(socket_path=path, timeout_in_seconds=30) as jwt_source,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        threading.Thread(target=serve, args=(listener, x509_source), daemon=True).start()
        work(x509_source, jwt_source, listener.getsockname(), arguments.audience)


def work(x509_source, jwt_source, address, audience):
    asked = queue.Queue()
    threading.Thread(target=listen, args=(asked,), daemon=True).start()
    identity = x509_source.get_x509_context().default_svid.spiffe_id
    serials = set()
    requests = tokens = missed = 0
    while True:
        while not asked.empty():
            if asked.get() is None:
                return
            counted = f"requests={requests} serials={len(serials)} tokens={tokens} missed={missed}"
            print(f"id={identity} {counted}", flush=True)
        serials.add(request(x509_source, address))
        requests += 1
        if token_is_good(jwt_source, identity, audience):
            tokens += 1
        else:
            missed += 1
        time.sleep(0.05)


def listen(asked):
    for line in sys.stdin:
        asked.put(line)
    asked.put(None)


def serve(listener, source):
    while True:
        plain, _ = listener.accept()
        try:
            plain.settimeout(10)
            with context(source, ssl.PROTOCOL_TLS_SERVER).wrap_socket(plain, server_side=True) as stream:
                peer(stream, source)
                stream.sendall(b"hello")
        except (OSError, ValueError) as fault:
            # The client misses its answer, and ends.
            print(f"server: {fault}", file=sys.stderr, flush=True)


def request(source, address):
    """The serial number of the certificate that the server had."""
    with socket.create_connection(address, timeout=10) as plain:
        with context(source, ssl.PROTOCOL_TLS_CLIENT).wrap_socket(plain) as stream:
            serial = peer(stream, source)
            answer = stream.recv(16)
            if answer != b"hello":
                raise ValueError(f"the answer is {answer}")
            return serial


def context(source, side):
    """Python's own TLS with what the source has now; it takes its key only from a file."""
    held = source.get_x509_context()
    svid = held.default_svid
    bundle = held.x509_bundle_set.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
    made = ssl.SSLContext(side)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    authorities = [authority.public_bytes(Encoding.PEM).decode() for authority in bundle.x509_authorities]
    made.load_verify_locations(cadata="".join(authorities))
    with tempfile.TemporaryDirectory() as folder:
        chain, key = pathlib.Path(folder, "chain.pem"), pathlib.Path(folder, "key.pem")
        svid.save(chain, key, Encoding.PEM)
        made.load_cert_chain(chain, key)
    return made


def peer(stream, source):
    """Both ends are the same workload."""
    certificate = stream.getpeercert()
    names = certificate["subjectAltName"]
    expected = str(source.get_x509_context().default_svid.spiffe_id)
    if names != (("URI", expected),):
        raise ValueError(f"the peer is {names}, not {expected}")
    return certificate["serialNumber"]


def token_is_good(source, identity, audience):
    """False where it cannot be fetched now; what is fetched is judged with the bundle of the source."""
    try:
        fetched = source.fetch_svid({audience}, timeout=5)
    except FetchJwtSvidError as fault:
        cause = fault.__cause__
        if isinstance(cause, grpc.Call) and cause.code() in AWAY:
            return False
        raise
    bundle = source.get_bundle_for_trust_domain(fetched.spiffe_id.trust_domain)
    judged = JwtSvid.parse_and_validate(fetched.token, bundle, {audience})
    if judged.spiffe_id != identity:
        raise ValueError(f"the token is {judged.spiffe_id}'s, not {identity}'s")
    return True


if __name__ == "__main__":
    main()
