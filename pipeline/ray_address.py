"""Addresses of Ray clusters: what each form means, and whether a cluster answers there, before Ray is asked.

Ray itself tries for half a minute, prints a line for each try, and ends the process where it meets what it did not
expect.
"""

import os
import re
import time

import grpc
from ray._private.gcs_utils import create_gcs_channel
from ray._private.services import find_node_ids
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

_TIMEOUT_S = 10
_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.%\w]+\]|[^:\[\]/\s]+):(?P<port>\d{1,5})")
_TOKEN = "RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"
_REMEDY = "give HOST:PORT of its head (PORT is 6379 unless it was chosen), or --address local"
NO_ANSWER = "start one, or give --address local"
"""What to do where there is no cluster."""
_MODES = ("disabled", "token")


def check_cluster(address: str, origin: str) -> None:
    """ValueError, one line, where no cluster can be reached at an address that was given by `origin`.

    "auto" is Ray's to look for.
    """
    named = f"{origin} {address!r}"
    if address == "auto":
        return
    _check_form(address, named)
    check_mode()
    try:
        code, said = _ask(address)
    except AuthenticationError as error:
        raise ValueError(f"{named}: RAY_AUTH_MODE is token, but there is no token: set {_TOKEN}") from error
    if code is grpc.StatusCode.UNAUTHENTICATED:
        has_token = _mode() == "token"
        fault = (
            "the token is not the cluster's: set" if has_token else "it asks for a token: set RAY_AUTH_MODE=token and"
        )
        raise ValueError(f"{named}: {fault} {_TOKEN}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        raise ValueError(f"{named}: another service answers there than the head of a Ray cluster: {_REMEDY}")
    if code is not None:
        raise ValueError(f"no Ray cluster at {address!r} ({said}): {NO_ANSWER}")
    if not _is_node():
        raise ValueError(
            f"{named}: this machine is not a node of the cluster: run on one, or submit a job to http://HEAD:8265 "
            f"(`ray job submit`)"
        )


def _is_node() -> bool:
    """Whether some node of a cluster runs on this machine, or is about to; Ray looks for a minute."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not find_node_ids():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def check_mode() -> None:
    """ValueError where RAY_AUTH_MODE is a word that Ray would silently take for no authentication."""
    if _mode() not in (*_MODES, ""):
        raise ValueError(f"RAY_AUTH_MODE {os.environ['RAY_AUTH_MODE']!r} is unknown: set {' or '.join(_MODES)}")


def _mode() -> str:
    return os.environ.get("RAY_AUTH_MODE", "disabled").lower()


def _check_form(address: str, named: str) -> None:
    scheme = address.partition("://")[0].lower() if "://" in address else ""
    if scheme in ("http", "https"):
        raise ValueError(
            f"{named} is where jobs are submitted (`ray job submit --address {address} -- python pipeline/pretrain.py "
            f"...`), not a cluster to connect to: submit, or {_REMEDY}"
        )
    if scheme == "ray":
        raise ValueError(
            f"{named} is for Ray's client, whose trainings end with its connection: run on a node of the cluster and "
            f"{_REMEDY}, or submit a job to http://HEAD:8265 (`ray job submit`)"
        )
    if scheme:
        raise ValueError(f"{named}: scheme {scheme}:// is unknown: {_REMEDY}")
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 2**16:
        raise ValueError(f"{named} is not of the form HOST:PORT (IPv6: [::1]:PORT): {_REMEDY}")


def _ask(address: str) -> tuple[grpc.StatusCode | None, str]:
    """(None, "") where a cluster's head answers, else gRPC's code and words. AuthenticationError without a token."""
    try:
        with create_gcs_channel(address) as channel:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=_TIMEOUT_S)
    except grpc.RpcError as error:
        return error.code(), " ".join(str(error.details()).split())
    return None, ""
