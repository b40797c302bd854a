"""What a person is told of a server that is none, or that does not let them in: one line each, with the remedy."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import mlflow_server
from pipeline.mlflow_server import CA, CLIENT_CERT, INSECURE, PASSWORD, TOKEN, USER, check_answers, sign_in
from pipeline.patient import TrackingError
from tests.reverse_proxy import Certificates, Front, basic, make_certificates, reverse_proxy

EMPTY_SERVER = b'{"experiments": []}'


@pytest.fixture(autouse=True)
def without_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (USER, PASSWORD, TOKEN, CA, CLIENT_CERT, INSECURE):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def front() -> Front:
    return Front("http://127.0.0.1:9")


@pytest.fixture(scope="module")
def plain(front: Front) -> Iterator[str]:
    with reverse_proxy(front) as address:
        yield address


@pytest.fixture(scope="module")
def tls(front: Front, certificates: Certificates) -> Iterator[str]:
    with reverse_proxy(front, certificates.context()) as address:
        yield address


@pytest.fixture(autouse=True)
def answers_as_mlflow_does(front: Front) -> None:
    front.status, front.body, front.content_type, front.location = 200, EMPTY_SERVER, "application/json", None


def told(uri: str) -> str:
    with pytest.raises(TrackingError) as refused:
        check_answers(uri)
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith(f"MLflow at {uri} ")
    return line.removeprefix(f"MLflow at {uri} ")


def test_a_server_without_experiments_is_one(front: Front, plain: str) -> None:
    check_answers(plain)
    front.body = b"{}"
    check_answers(f"{plain}/")


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (401, b"", "text/plain", f"wants a login (401): set {USER} and {PASSWORD}, or {TOKEN}"),
        (403, b'{"message": "Permission denied"}', "application/json", "refuses access (403: Permission denied): ask"),
        (403, b"<html>no</html>", "text/html", "refuses access (403, a web page): "),
        (404, b"", "text/plain", "has no MLflow there (404): correct tracking.uri; a path that MLflow has before /api"),
        (405, b"", "text/plain", "has no MLflow there (405): correct tracking.uri"),
        (400, b"The plain HTTP request was sent to HTTPS port", "text/plain", "write https:// if it speaks TLS"),
        (429, b"", "text/plain", "has too much to do (429): try again later"),
        (500, b"boom\nat line 1", "text/plain", "answers with an error (500: boom at line 1): see its log"),
        (502, b"<html>", "text/html", "answers with an error (502, a web page): see its log, or wait"),
        (503, b"", "text/plain", "answers with an error (503): see its log, or wait until it has started"),
        (200, b"<html>login</html>", "text/html", "is no MLflow server (it answers 200, a web page): correct"),
        (200, b"OK", "text/plain", "is no MLflow server (it answers 200: OK): correct tracking.uri"),
        (200, b'{"status": "fine"}', "application/json", "is no MLflow server (it answers 200"),
        (200, b"[]", "application/json", "is no MLflow server (it answers 200"),
        (418, b"http://u:hunter2@host", "text/plain", "is no MLflow server (it answers 418: http://host): correct"),
    ],
)
def test_answers_of_every_kind(front: Front, plain: str, status: int, body: bytes, kind: str, words: str) -> None:
    front.status, front.body, front.content_type = status, body, kind
    assert words in told(plain)


def test_a_server_that_sends_on(front: Front, plain: str, tls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INSECURE, "true")
    with reverse_proxy(Front("", status=302, location=f"{tls}{mlflow_server._ENDPOINT}?max_results=1")) as address:
        assert told(address).startswith(f"sends on to {tls}: make that tracking.uri")
    with reverse_proxy(Front("", status=308, location=f"{tls}{mlflow_server._ENDPOINT}")) as address:
        check_answers(address)  # which keeps the method: MLflow's client goes along


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told("http://127.0.0.1:9") == (
        "does not answer (nothing listens there): start the server or correct tracking.uri"
    )
    assert told("http://nowhere.invalid:5000").startswith("is not found, its name is unknown: correct")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert told("http://mlflow.example:5000").startswith("is not reached through the proxy of HTTP_PROXY")


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_server, "_TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert told(f"http://127.0.0.1:{silent.getsockname()[1]}").startswith("does not answer within 1 s: start")


def test_a_server_that_hangs_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang_up(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection = server.accept()[0]
            connection.recv(10)
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=hang_up, args=(server,), daemon=True).start()
        assert told(f"http://127.0.0.1:{server.getsockname()[1]}").startswith("breaks off without an answer: see its")


def test_a_private_ca(tls: str, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = told(tls)
    assert line.startswith("has a certificate that is not trusted (")
    assert f"set {CA} to its CA's file, or {INSECURE}=true" in line
    monkeypatch.setenv(CA, str(certificates.ca))
    check_answers(tls)
    monkeypatch.setenv(CA, str(tmp_path / "absent.pem"))
    line = told(tls)
    assert "absent.pem" in line
    assert line.endswith(f"correct {CA}")
    (tmp_path / "no.pem").write_text("no certificate")
    monkeypatch.setenv(CA, str(tmp_path / "no.pem"))
    assert CA in told(tls)
    monkeypatch.setenv(INSECURE, "true")
    assert f"{INSECURE}' and" in told(tls)  # both: MLflow takes one of them
    monkeypatch.delenv(CA)
    check_answers(tls)


def test_another_hosts_certificate(front: Front, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CA, str(certificates.ca))
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **options: real("127.0.0.1", *more, **options))
    with reverse_proxy(front, certificates.context()) as address:
        line = told(address.replace("127.0.0.1", "mlflow.internal"))
    assert "has a certificate that is not trusted (Hostname mismatch" in line


def test_a_server_that_asks_for_a_certificate(
    front: Front, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CA, str(certificates.ca))
    with reverse_proxy(front, certificates.context(asks_for_client=True)) as address:
        assert f"set {CLIENT_CERT} to yours with its key" in told(address)
        monkeypatch.setenv(CLIENT_CERT, str(certificates.client))
        check_answers(address)
        monkeypatch.setenv(CLIENT_CERT, str(tmp_path / "absent.pem"))
        assert told(address).endswith(f"correct {CLIENT_CERT}")


def test_http_to_a_server_of_tls_and_the_other_way_round(plain: str, tls: str) -> None:
    assert told(plain.replace("http:", "https:")) == "does not speak TLS: write http://"
    assert "write https://" in told(tls.replace("https:", "http:"))


@pytest.mark.parametrize(
    ("variables", "header"),
    [({USER: "me", PASSWORD: "pass:word"}, basic("me", "pass:word")), ({TOKEN: "abc"}, "Bearer abc")],
)
def test_logins_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], header: str, front: Front
) -> None:
    with reverse_proxy(front) as behind, reverse_proxy(Front(behind, "/ml/flow", header)) as address:
        assert "wants a login (401)" in told(address)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        check_answers(address)
        assert "has no MLflow there (404)" in told(address.removesuffix("/flow"))


def test_a_login_in_the_address_goes_into_the_environment(front: Front) -> None:
    with reverse_proxy(front) as behind, reverse_proxy(Front(behind, "/ml", basic("m e", "p@ss/w:rd"))) as address:
        clean = sign_in(address.replace("://", "://m%20e:p%40ss%2Fw:rd@"))
        assert clean == address
        check_answers(clean)
    assert sign_in("HTTPS://[::1]:5000/x/") == "https://[::1]:5000/x/"


@pytest.mark.parametrize(
    "uri",
    ["http://u:hunt/er2@host:5000", "http://u:hunter2@host/?x=1", "http://host/#x", "http://:5000", "http://h:70000",
     "http://u:hunter2@", "http://[::1"],
)  # fmt: skip
def test_an_address_that_mlflow_cannot_use_is_refused_without_its_login(uri: str) -> None:
    with pytest.raises(TrackingError) as refused:
        sign_in(uri)
    assert "hunt" not in str(refused.value)
    assert "http://host:5000" in str(refused.value)


def test_tls_that_breaks_off_names_what_may_be_wrong() -> None:
    told = mlflow_server._tls_fault(ssl.SSLError(1, "unexpected eof"))
    assert told.startswith("breaks off TLS (unexpected eof): ")
    assert CA in told
    assert CLIENT_CERT in told
