"""The Ray cluster that runs the stages: the one given, the one a job runs on, or a local one of this process."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from model import limits
from pipeline.config import ComputeConfig

WORKER_BYTES = 400 * 10**6
"""What a process of Ray's takes that has imported torch and works on an image of common size, roughly."""

# Read by Ray when it starts processes; the user's own values win.
_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; silences a warning per worker
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextmanager
def connected(compute: ComputeConfig, address: str | None, debug: bool) -> Iterator[None]:
    """A Ray connection for the time of a run.

    address: as ray.init takes it; None: $RAY_ADDRESS (which a Ray job sets), else a local cluster of this process.
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if ray.is_initialized() and address in (None, "local"):  # a notebook's or a test's: used, and left as it is
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {
        "log_to_driver": debug,
        "logging_level": logging.INFO if debug else logging.WARNING,
    }
    if address and address != "local":
        _check_answers(address)
        options |= {"address": address}
    else:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of this process alone, on loopback
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less to wait for
        # Ray gives its workers niceness 15, at which two of them on two CPUs get a tenth less done
        os.environ.setdefault("RAY_worker_niceness", "0")
        options |= {"address": "local", "include_dashboard": False, "num_cpus": _local_cpus(compute)}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"no Ray cluster at {address!r} ({error}): start one, or leave --address out") from error
    try:
        yield
    finally:
        ray.shutdown()


def _local_cpus(compute: ComputeConfig) -> int:
    """Processes that a local cluster runs side by side: as many as there are CPUs and memory for, or as asked for."""
    fitting = min(limits.usable_cpus(), limits.free_memory_bytes() // WORKER_BYTES)
    return max(1, fitting, compute.max_workers * compute.cpus_per_worker)


def _check_answers(address: str) -> None:
    """ValueError where nothing listens at host:port; Ray itself would try for minutes and then end the process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # "auto": Ray looks for a cluster of this machine by itself
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(f"no Ray cluster at {address!r} ({error}): start one, or leave --address out") from error


def has_gpus(compute: ComputeConfig) -> bool:
    """Whether each training process gets a GPU; auto: where the cluster has any, even if too few for now."""
    if compute.use_gpu == "auto":
        return bool(ray.cluster_resources().get("GPU", 0) > 0)
    return compute.use_gpu


def shortage(compute: ComputeConfig) -> str | None:
    """What the cluster lacks now for the training processes, in words, or None."""
    resources = ray.cluster_resources()
    cpus = compute.min_workers * compute.cpus_per_worker
    if resources.get("CPU", 0) < cpus:
        return f"training needs {cpus} CPUs, the cluster has {resources.get('CPU', 0):.0f}: waiting for nodes"
    if has_gpus(compute) and resources.get("GPU", 0) < compute.min_workers:
        gpus = resources.get("GPU", 0)
        return f"training needs {compute.min_workers} GPUs, the cluster has {gpus:.0f}: waiting for nodes"
    return None
