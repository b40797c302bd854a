"""An S3 server in memory, for what real ones at hand cannot show: keys with empty parts, as AWS and Ceph keep them
(SeaweedFS folds `a//b` into `a/b`), chosen error codes, a certificate of one's own; it writes down every request."""

import contextlib
import hashlib
import http.server
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass
class LiteralS3:
    """`objects` by bucket/key; `requests` as (method and operation, headers).

    `refusal` (status, code) is the answer to everything, with the bucket's `region` where it is a redirection.
    """

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, Message]] = field(default_factory=list)
    refusal: tuple[int, str] | None = None
    region: str = "eu-west-1"


def tag(data: bytes) -> str:
    """An ETag."""
    return hashlib.md5(data).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state = LiteralS3()

    def answer(self) -> None:
        state, parts = self.server_state, urlsplit(self.path)
        name, query = unquote(parts.path)[1:], parse_qs(parts.query, keep_blank_values=True)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        operation = next((word for word in ("list-type", "uploads", "partNumber", "uploadId") if word in query), "")
        state.requests.append((f"{self.command} {operation}".strip(), self.headers))
        if state.refusal:
            return self.send(state.refusal[0], f"<Error><Code>{state.refusal[1]}</Code></Error>".encode())
        getattr(self, f"on_{self.command.lower()}")(name, query, body)

    def on_get(self, name: str, query: dict[str, list[str]], body: bytes) -> None:
        if "list-type" in query:
            return self.send(200, self.listing(name, query["prefix"][0]))
        if name not in self.server_state.objects:
            return self.send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        data = self.server_state.objects[name]
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            return self.send(206, data[int(first) : int(last or len(data)) + 1], tag(data))
        return self.send(200, data)

    def on_head(self, name: str, query: dict[str, list[str]], body: bytes) -> None:
        found = self.server_state.objects.get(name)
        self.send(404 if found is None else 200, found or b"")

    def on_put(self, name: str, query: dict[str, list[str]], body: bytes) -> None:
        if self.headers.get("x-amz-copy-source"):
            body = self.server_state.objects[unquote(self.headers["x-amz-copy-source"])]
            self.server_state.objects[name] = body
            return self.send(200, b"<CopyObjectResult><ETag>1</ETag></CopyObjectResult>")
        if "aws-chunked" in (self.headers.get("Content-Encoding") or ""):
            size, _, rest = body.partition(b"\r\n")
            body = rest[: int(size.split(b";")[0], 16)]
        self.server_state.objects[name] = body
        return self.send(200, b"")

    def on_post(self, name: str, query: dict[str, list[str]], body: bytes) -> None:
        self.send(200, b"<X><UploadId>1</UploadId><ETag>1</ETag></X>")

    def on_delete(self, name: str, query: dict[str, list[str]], body: bytes) -> None:
        self.server_state.objects.pop(name, None)
        self.send(204, b"")

    def listing(self, bucket: str, prefix: str) -> bytes:
        begin = f"{bucket.rstrip('/')}/"
        entries = "".join(
            f"<Contents><Key>{escape(name.removeprefix(begin))}</Key><Size>{len(data)}</Size><ETag>{tag(data)}</ETag>"
            "</Contents>"
            for name, data in sorted(self.server_state.objects.items())
            if name.startswith(begin + prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()

    def send(self, status: int, data: bytes, its_tag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{its_tag or tag(data)}"')
        if status == 301 and self.server_state.region:
            self.send_header("x-amz-bucket-region", self.server_state.region)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def literal_s3(monkeypatch: pytest.MonkeyPatch, certificate: Path | None = None) -> Iterator[LiteralS3]:
    """A running server, with the credentials in the environment, but not its URL; by TLS with a certificate."""
    state = LiteralS3()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_state": state}))
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    state.url = f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
