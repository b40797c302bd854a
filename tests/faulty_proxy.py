"""A proxy before a real S3 server that breaks answers as networks and busy servers do."""

import contextlib
import http.client
import http.server
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

FAULTS = ("reset", "unavailable", "short")


class Faults:
    """Which answers to break: a share of the GETs, drawn from a seed; `seen` counts what was done.

    `delay_s`: how long every answer is kept back, as by a distant server.
    """

    def __init__(self, share: float, seed: int = 0, delay_s: float = 0.0) -> None:
        self.share = share
        self.delay_s = delay_s
        self.seen: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def draw(self, method: str) -> str:
        with self._lock:
            broken = method == "GET" and self._random.random() < self.share
            fault = self._random.choice(FAULTS) if broken else "none"
            self.seen[fault] += 1
            return fault


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream = ""
    faults = Faults(0)

    def forward(self) -> None:
        fault = self.faults.draw(self.command)
        time.sleep(self.faults.delay_s)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "unavailable":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection(self.upstream, timeout=30)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(body)
        answer = upstream.getresponse()
        data = b"" if self.command == "HEAD" else answer.read()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        upstream.close()
        if fault == "none":
            self.wfile.write(data)
            return
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.close_connection = True
        if fault == "reset":  # closing without lingering sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

    def log_message(self, *args: object) -> None:
        pass

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()


@contextlib.contextmanager
def faulty_proxy(endpoint: str, faults: Faults) -> Iterator[str]:
    """Run the proxy and point AWS_ENDPOINT_URL at it meanwhile; its URL."""
    handler = type("Handler", (_Handler,), {"upstream": urlsplit(endpoint).netloc, "faults": faults})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = os.environ.get("AWS_ENDPOINT_URL")
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
    try:
        yield os.environ["AWS_ENDPOINT_URL"]
    finally:
        if before is None:
            del os.environ["AWS_ENDPOINT_URL"]
        else:
            os.environ["AWS_ENDPOINT_URL"] = before
        server.shutdown()
        server.server_close()
