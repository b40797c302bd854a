"""Which places a run may keep its results at: none that the nodes of its cluster do not share."""

import time
import uuid

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_prep import storage


def check_shared(uri: str) -> None:
    """ValueError where storage.uri is another place on some node of the cluster than here, or is out of its reach."""
    here = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if storage.is_local(uri):
        nodes.pop(here, None)  # a bucket is asked for here, too: Ray's processes need not have our variables
    if not nodes:
        return
    probe = storage.join(uri, f"probe-{uuid.uuid4().hex}")
    storage.write_bytes(probe, b"")
    try:
        answers = {address: _on(node).remote(probe) for node, address in nodes.items()}
        blind = {address: why for address, answer in answers.items() if (why := _answer(answer))}
    finally:
        storage.delete(probe)
    if not blind:
        return
    if storage.is_local(uri):
        raise ValueError(
            f"storage.uri {uri!r} is not the same folder on {', '.join(blind)} as on the driver's node: "
            f"use s3://bucket/prefix, or a folder that all nodes share"
        )
    raise ValueError(
        f"storage.uri {uri!r} is not seen from {', '.join(blind)} as from here ({next(iter(blind.values()))}): give "
        f"the nodes the same S3, by the AWS_* variables of `ray job submit --runtime-env-json` or a profile on each"
    )


def _on(node: str) -> "ray.remote_function.RemoteFunction":
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(_fault)


def _fault(uri: str, patience_s: float = 5) -> str:
    """Why a file is not seen, empty where it is; network file systems may take a moment."""
    deadline = time.monotonic() + patience_s
    try:
        while not storage.exists(uri):
            if time.monotonic() > deadline:
                return "it is not there"
            time.sleep(0.2)
    except storage.StorageError as error:
        return str(error)
    return ""


def _answer(reference: "ray.ObjectRef[str]") -> str:
    try:
        return str(ray.get(reference, timeout=300))
    except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
        return ""  # gone in the meantime: nothing will run there
