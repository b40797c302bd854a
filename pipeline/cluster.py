"""The Ray cluster that runs the stages: the one given, the one a job runs on, or a local one of this process."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions
from botocore.exceptions import BotoCoreError

from data_prep import s3
from data_prep.private_folder import folder_for_sockets
from model import limits
from pipeline import ray_address, signals
from pipeline.artifact import PACKAGES, ROOT
from pipeline.config import ComputeConfig
from pipeline.lasting import IN_RAY_JOB

WORKER_BYTES = 400 * 10**6
"""What a process of Ray's takes that has imported torch and works on an image of common size, roughly."""

_LONGEST_SOCKET = "/ray/session_2026-11-30_23-59-59_999999_4194304/sockets/plasma_store.1"  # of Ray 2.60

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
    origin = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {
        "log_to_driver": debug,
        "logging_level": logging.INFO if debug else logging.WARNING,
    }
    if address and address != "local":
        ray_address.check_cluster(address, origin)
        options |= {"address": address, "runtime_env": {"env_vars": _view_of_s3(), **_project()}}
    else:
        ray_address.check_mode()
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster of this process alone, on loopback
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less to wait for
        # Ray gives its workers niceness 15, at which two of them on two CPUs get a tenth less done
        os.environ.setdefault("RAY_worker_niceness", "0")
        options |= {"address": "local", "include_dashboard": False, "num_cpus": _local_cpus(compute)}
        options |= {"_temp_dir": _short_folder()}
    try:
        with signals.kept():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"no Ray cluster at {address or 'local'!r} ({said}): {ray_address.NO_ANSWER}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _short_folder() -> str | None:
    """Where Ray's sessions lie where its own choice is too long for their sockets; None for its own choice."""
    usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return folder_for_sockets(len(_LONGEST_SOCKET), "hatchery-ray", usual)


def _local_cpus(compute: ComputeConfig) -> int:
    """Processes that a local cluster runs side by side: as many as there are CPUs and memory for, or as asked for."""
    fitting = min(limits.usable_cpus(), limits.free_memory_bytes() // WORKER_BYTES)
    return max(1, fitting, compute.max_workers * compute.cpus_per_worker)


def _view_of_s3() -> dict[str, str]:
    """Variables by which the nodes of another cluster see the S3 that this process sees; a job's own ones win."""
    job = json.loads(os.environ.get(IN_RAY_JOB) or "{}")
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    try:
        found = s3.for_other_machines()
    except (BotoCoreError, ValueError):
        return {}  # said where S3 is used, if it is
    return {name: value for name, value in found.items() if name not in given}


def _project() -> dict[str, Any]:
    """This project's packages, for nodes that need not have it; nothing in a job, whose folder Ray has given them.

    Not `working_dir`: that would move the processes to another folder, and upload whatever lies in this one.
    """
    if IN_RAY_JOB in os.environ:
        return {}
    return {"py_modules": [str(ROOT / name) for name in PACKAGES], "excludes": ["__pycache__"]}


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
