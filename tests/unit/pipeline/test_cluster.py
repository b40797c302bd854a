"""What a training is given of a cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

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


NICENESS = """
import os, ray
from pipeline.cluster import connected
from pipeline.config import ComputeConfig
with connected(ComputeConfig(), "local", debug=False):
    print(ray.get(ray.remote(lambda: os.nice(0)).remote()))
"""


def test_a_local_cluster_starts_below_a_long_temporary_folder_with_workers_at_full_priority(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_worker_niceness"}
    env["TMPDIR"] = str(tmp_path / ("x" * 90))  # too long for the sockets of Ray's sessions
    done = subprocess.run([sys.executable, "-c", NICENESS], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
