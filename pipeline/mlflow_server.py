"""Whether an MLflow server answers, asked as MLflow itself asks (login, token, certificates, path), and if not, why."""

import json
import os
import socket
import ssl
from collections.abc import Iterator
from typing import TypeVar
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

import requests
import urllib3.exceptions
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from data_prep.redact import without_secrets
from pipeline.patient import TrackingError

USER, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
CA, CLIENT_CERT, INSECURE = (
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_TRACKING_INSECURE_TLS",
)
Kind = TypeVar("Kind", bound=BaseException)
_ENDPOINT = "/api/2.0/mlflow/experiments/search"
_TIMEOUT_S = 10  # for an answer to the first question of all; no second try
_ASKS_FOR_CERTIFICATE = f"if it asks for a certificate, set {CLIENT_CERT} to yours with its key"
_HOST_REFUSED = "Invalid Host header"  # MLflow's own words: only they tell its host check from a proxy's 403


def is_server(uri: str) -> bool:
    """Whether a tracking URI is the address of a server rather than of a database."""
    return uri.lower().startswith(("http://", "https://"))


def sign_in(uri: str) -> str:
    """The address of a server without the login in it, which is handed to MLflow as it wants it: by the environment.

    So no message, log or record of MLflow's can hold it. TrackingError for an address that MLflow cannot use.
    """
    parts = _split(uri)
    login, _, host = parts.netloc.rpartition("@")
    if login:
        user, _, password = login.partition(":")
        for name, value in ((USER, user), (PASSWORD, password)):
            if value:
                os.environ[name] = unquote(value)
    return urlunsplit(parts._replace(netloc=host))


def _split(uri: str) -> SplitResult:
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError:  # whose words may hold a part of a password
        raise TrackingError(
            f"MLflow at {without_secrets(uri)} is no address as it is given: write http://host:5000 and set {USER} and "
            f"{PASSWORD}, or write / ? # @ in a login as %2F %3F %23 %40"
        ) from None
    if parts.query or parts.fragment or not parts.hostname:
        raise TrackingError(f"MLflow at {without_secrets(uri)}: write http://host:5000/prefix, without ? and #")
    return parts


def check_answers(uri: str) -> None:
    """TrackingError, in one line with the remedy, where no MLflow server answers at an address without a login."""
    try:
        answer = http_request(
            get_default_host_creds(uri),
            _ENDPOINT,
            "POST",
            json={"max_results": 1},
            max_retries=0,
            timeout=_TIMEOUT_S,
            raise_on_status=False,
        )
    except (MlflowException, requests.RequestException, OSError) as error:
        raise TrackingError(f"MLflow at {uri} {_why_unreachable(error, uri)}") from error
    if (fault := _fault_of(answer, uri)) is not None:
        raise TrackingError(f"MLflow at {uri} {fault}")


def _fault_of(answer: requests.Response, uri: str) -> str | None:
    """What is wrong with the answer to a question that every MLflow server can answer, and the remedy."""
    status, said = answer.status_code, _first_words(answer)
    if answer.request.method != "POST":  # sent on as a GET, which would do for no later call
        there = urlunsplit(urlsplit(answer.url)._replace(query="", fragment="")).removesuffix(_ENDPOINT)
        return f"sends on to {without_secrets(there)}: make that tracking.uri, if it is MLflow and no login page"
    if status == 401:
        return f"wants a login (401): set {USER} and {PASSWORD}, or {TOKEN}, to right ones"
    if status == 403 and _HOST_REFUSED in answer.text:
        host = urlsplit(uri).netloc
        return f"refuses the Host {host!r} (403): start it with --allowed-hosts {host} (which replaces its own list)"
    if status == 403:
        return f"refuses access (403{said}): ask for the right to it, or log in as another ({USER}, {TOKEN})"
    if status in (404, 405):
        return f"has no MLflow there ({status}): correct tracking.uri; a path that MLflow has before /api belongs to it"
    if status == 400 and uri.lower().startswith("http://"):
        return f"refuses the question (400{said}): write https:// if it speaks TLS, else correct tracking.uri"
    if status == 429:
        return "has too much to do (429): try again later"
    if status >= 500:
        return f"answers with an error ({status}{said}): see its log, or wait until it has started, and try again"
    if status != 200 or not _is_mlflows(answer):
        return f"is no MLflow server (it answers {status}{said}): correct tracking.uri"
    return None


def _is_mlflows(answer: requests.Response) -> bool:
    """Whether this is MLflow's list of experiments; one with none is an empty object."""
    try:
        found = json.loads(answer.text)
    except ValueError:
        return False
    return isinstance(found, dict) and (not found or "experiments" in found)


def _first_words(answer: requests.Response) -> str:
    """`: ` and what the server says, in short; nothing for a web page."""
    if "html" in answer.headers.get("Content-Type", ""):
        return ", a web page"
    try:
        text = str(json.loads(answer.text)["message"])
    except (ValueError, KeyError, TypeError):
        text = answer.text
    text = without_secrets(" ".join(text.split()))[:120]
    return f": {text}" if text else ""


def _why_unreachable(error: BaseException, uri: str) -> str:
    """Why there was no answer at all, told by the kinds of errors behind an error of MLflow's, and the remedy."""
    chain = list(_behind(error))
    if (tls := _first(chain, ssl.SSLError)) is not None:
        return _tls_fault(tls)
    if _first(chain, urllib3.exceptions.ProxyError) or _first(chain, requests.exceptions.ProxyError):
        return "is not reached through the proxy of HTTP_PROXY or HTTPS_PROXY: correct it, or name the host in NO_PROXY"
    if _first(chain, urllib3.exceptions.NameResolutionError) or _first(chain, socket.gaierror):
        return "is not found, its name is unknown: correct tracking.uri"
    if _first(chain, ConnectionRefusedError):
        return "does not answer (nothing listens there): start the server or correct tracking.uri"
    if _first(chain, requests.Timeout) or _first(chain, urllib3.exceptions.TimeoutError):
        return f"does not answer within {_TIMEOUT_S} s: start the server, open the way to it, or correct tracking.uri"
    if _first(chain, requests.ConnectionError):
        remedy = "write https:// if that is what it speaks" if uri[:5].lower() == "http:" else _ASKS_FOR_CERTIFICATE
        return f"breaks off without an answer: see its log; {remedy}"
    text = without_secrets(" ".join(str(chain[-1]).split()))[:300]
    return f"cannot be asked: {text}; correct {_settings_at_fault(text)}"


def _settings_at_fault(text: str) -> str:
    """The variables whose values a message names, else what else may be wrong."""
    named = [name for name in (CA, CLIENT_CERT) if (value := os.environ.get(name)) and value in text]
    return " or ".join(named) or f"tracking.uri and the variables {CA}, {CLIENT_CERT}, {INSECURE}, if they are set"


def _tls_fault(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message
        return f"has a certificate that is not trusted ({why}): set {CA} to its CA's file, or {INSECURE}=true"
    code = (getattr(error, "reason", None) or str(error)).replace("_", " ").lower()
    if "wrong version number" in code or "http request" in code or "record layer" in code:
        return "does not speak TLS: write http://"
    return f"breaks off TLS ({code}): {_ASKS_FOR_CERTIFICATE}; {CA} must be a PEM file"


def _behind(error: BaseException) -> Iterator[BaseException]:
    """An error and all those that led to it: urllib3 and requests keep theirs in `args` and `reason`."""
    waiting, seen = [error], set[int]()
    while waiting:
        found = waiting.pop(0)
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        others = (found.__cause__, found.__context__, getattr(found, "reason", None), *found.args)
        waiting += [other for other in others if isinstance(other, BaseException)]


def _first(chain: list[BaseException], kind: type[Kind]) -> Kind | None:
    return next((error for error in chain if isinstance(error, kind)), None)
