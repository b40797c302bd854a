"""Which places a run may keep its results at: none that the nodes of its cluster do not share."""

import time
import uuid

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_prep import storage


def check_shared(uri: str) -> None:
    """ValueError where a local storage URI is another folder on some node of the cluster than here."""
    here = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here}
    if not others or not storage.is_local(uri):
        return
    probe = storage.join(uri, f"probe-{uuid.uuid4().hex}")
    storage.write_bytes(probe, b"")
    try:
        answers = {node: _on(node).remote(probe) for node in others}
        blind = [others[node]["NodeManagerAddress"] for node, answer in answers.items() if not _answer(answer)]
    finally:
        storage.delete(probe)
    if blind:
        raise ValueError(
            f"storage.uri {uri!r} is not the same folder on {', '.join(blind)} as on the driver's node: "
            f"use s3://bucket/prefix, or a folder that all nodes share"
        )


def _on(node: str) -> "ray.remote_function.RemoteFunction":
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(_sees)


def _sees(uri: str, patience_s: float = 5) -> bool:
    """Whether a file is there; network file systems may take a moment."""
    deadline = time.monotonic() + patience_s
    while not storage.exists(uri):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _answer(reference: "ray.ObjectRef[bool]") -> bool:
    try:
        return bool(ray.get(reference, timeout=300))
    except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
        return True  # gone in the meantime: nothing will run there
