"""What a training is given of a cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from data_prep import s3
from pipeline import cluster
from pipeline.config import ComputeConfig
from tests.shared_data import ROOT


def having(monkeypatch: pytest.MonkeyPatch, **resources: float) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)


@pytest.mark.parametrize(
    ("use_gpu", "gpus", "expected"),
    [
        ("auto", 16, True),
        ("auto", 8, True),  # a node is down: wait for it, do not train on CPUs
        ("auto", None, False),
        (True, None, True),
        (False, 16, False),
    ],
)
def test_auto_takes_gpus_where_there_is_any(
    monkeypatch: pytest.MonkeyPatch, use_gpu: object, gpus: int | None, expected: bool
) -> None:
    having(monkeypatch, CPU=64, **({"GPU": gpus} if gpus else {}))
    compute = ComputeConfig.model_validate({"num_workers": 16, "use_gpu": use_gpu})
    assert cluster.has_gpus(compute) is expected


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = ComputeConfig(num_workers=(4, 16))
    having(monkeypatch, CPU=2)
    assert cluster.shortage(compute) == "training needs 4 CPUs, the cluster has 2: waiting for nodes"
    having(monkeypatch, CPU=64, GPU=3)
    assert cluster.shortage(compute) == "training needs 4 GPUs, the cluster has 3: waiting for nodes"
    having(monkeypatch, CPU=64, GPU=4)
    assert cluster.shortage(compute) is None
    having(monkeypatch, CPU=64)
    assert cluster.shortage(compute) is None


def test_a_local_cluster_has_the_cpus_and_the_memory_that_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits decide, unless more processes are asked for."""
    for cpus, memory, workers, expected in ((16, 64e9, 1, 16), (3, 64e9, 1, 3), (16, 2e9, 1, 5), (16, 1e8, 2, 2)):
        monkeypatch.setattr(cluster.limits, "usable_cpus", lambda cpus=cpus: cpus)
        monkeypatch.setattr(cluster.limits, "free_memory_bytes", lambda memory=memory: int(memory))
        assert cluster._local_cpus(ComputeConfig(num_workers=workers)) == expected


NICENESS = """
import os, ray
from pipeline.cluster import connected
from pipeline.config import ComputeConfig
with connected(ComputeConfig(), "local", debug=False):
    print(ray.get(ray.remote(lambda: os.nice(0)).remote()), ray.cluster_resources()["CPU"])
"""


def test_workers_of_a_local_cluster_run_at_full_priority_on_the_cpus_it_was_given(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_worker_niceness"}
    env["TMPDIR"] = str(tmp_path / ("x" * 90))  # too long for the sockets of Ray's sessions
    command = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), sys.executable, "-c", NICENESS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "0 1.0\n", done.stderr


def test_other_nodes_are_given_this_machines_view_of_s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in s3.environment():
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text("[profile lab]\nendpoint_url = http://lab:9000\nregion = eu-central-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv(s3.ANONYMOUS, "public")
    monkeypatch.delenv(cluster.IN_RAY_JOB, raising=False)
    everything = {
        "AWS_ENDPOINT_URL_S3": "http://lab:9000",
        "AWS_DEFAULT_REGION": "eu-central-1",
        s3.ANONYMOUS: "public",
    }
    assert cluster._view_of_s3() == everything
    job = {"runtime_env": {"env_vars": {"AWS_DEFAULT_REGION": "us-west-2"}}, "metadata": {}}
    monkeypatch.setenv(cluster.IN_RAY_JOB, json.dumps(job))
    del everything["AWS_DEFAULT_REGION"]  # Ray refuses a variable that is given twice
    assert cluster._view_of_s3() == everything
    monkeypatch.setenv("AWS_PROFILE", "absent")
    assert cluster._view_of_s3() == {}  # named where S3 is used
