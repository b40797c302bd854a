"""A reverse proxy as people put before a server: a path prefix, a login, TLS, faults, answers that take their time."""

import base64
import contextlib
import datetime
import http.client
import http.server
import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass
class Front:
    """What the proxy does; may be changed while it runs."""

    upstream: str
    prefix: str = ""
    authorization: str | None = None  # the header that lets in
    status: int | None = None  # the answer to everything
    body: bytes = b""
    content_type: str = "text/plain"
    location: str | None = None
    silent_s: float = 0  # before anything
    slow_put_s: float = 0  # between an upload's last byte and the answer to it
    seen: list[str] = field(default_factory=list)


def basic(user: str, password: str) -> str:
    """The header of a Basic login."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    front: Front

    def forward(self) -> None:
        front = self.front
        time.sleep(front.silent_s)
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        front.seen.append(f"{self.command} {self.path}")
        if front.status is not None:
            extra = {"Location": front.location} if front.location else {}
            return self._answer(front.status, {"Content-Type": front.content_type, **extra}, front.body)
        if front.authorization and self.headers.get("Authorization") != front.authorization:
            return self._answer(401, {"WWW-Authenticate": "Basic"}, b"Unauthorized")
        if not self.path.startswith(front.prefix + "/"):
            return self._answer(404, {}, b"not here")
        upstream = http.client.HTTPConnection(urlsplit(front.upstream).netloc, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "transfer-encoding")}
        upstream.request(self.command, self.path.removeprefix(front.prefix), body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        if self.command == "PUT":
            time.sleep(front.slow_put_s)
        left_out = ("transfer-encoding", "connection", "content-length")
        self._answer(answer.status, {k: v for k, v in answer.getheaders() if k.lower() not in left_out}, data)
        upstream.close()

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = do_HEAD = forward

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def reverse_proxy(front: Front, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Run the proxy; the address of what is behind it."""
    handler = type("Handler", (_Handler,), {"front": front})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}{front.prefix}"
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Certificates:
    """Files of a private CA: its certificate, a server's for 127.0.0.1 and a client's, each with its key."""

    ca: Path
    server: Path
    client: Path

    def context(self, asks_for_client: bool = False) -> ssl.SSLContext:
        """What a server of this CA speaks TLS with."""
        found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        found.load_cert_chain(self.server)
        if asks_for_client:
            found.verify_mode = ssl.CERT_REQUIRED
            found.load_verify_locations(self.ca)
        return found


def make_certificates(folder: Path) -> Certificates:
    """A private CA and what it signed, valid for a day."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _certificate("test ca", ca_key, "test ca", ca_key, is_ca=True)
    files = Certificates(folder / "ca.pem", folder / "server.pem", folder / "client.pem")
    files.ca.write_bytes(_pem(ca))
    for name, file in (("server", files.server), ("client", files.client)):
        key = ec.generate_private_key(ec.SECP256R1())
        file.write_bytes(_pem(_certificate(name, key, "test ca", ca_key)) + _key_pem(key))
    return files


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey, is_ca: bool = False
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")])
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(hosts, critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
