"""How busy a node is: told by the clock, GPUs by NVIDIA's management library alone."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from pipeline import system
from pipeline.system import SystemWatch
from tests.shared_data import ROOT


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of a node with three GPUs: 0 and 1 of one's own numbers, MIG-7, a part without utilization."""

    def usage(gpu: Any) -> Any:
        if gpu == "MIG-7":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=90 + gpu)

    for name, used in {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": lambda name: name,
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=20, total=80),
        "nvmlDeviceGetUtilizationRates": usage,
    }.items():
        assert hasattr(pynvml, name)
        monkeypatch.setattr(pynvml, name, used)


def told(watch: SystemWatch) -> dict[str, float]:
    return {name.removeprefix("system/node3/gpu_"): value for name, value in watch.look().items() if "/gpu_" in name}


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, {"0_memory": 25, "0": 90, "1_memory": 25, "1": 91}),
        ("1,MIG-7", {"0_memory": 25, "0": 91, "1_memory": 25}),
        ("", {}),
    ],
)
def test_gpus_that_the_process_may_use(
    visible: str | None, expected: dict[str, float], gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    names = {
        f"{key}_usage_percentage" if "_" in key else f"{key}_utilization_percentage": value
        for key, value in expected.items()
    }
    assert told(SystemWatch(3)) == names


def test_the_clock_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(system.time, "monotonic", lambda: now)
    watch = SystemWatch(0)
    assert "system/node0/cpu_utilization_percentage" in watch.look()
    now += 59
    assert watch.look() == {}
    now += 1
    assert watch.look()


def test_no_driver_is_no_gpu_and_no_cuda_context_is_opened() -> None:
    """In a process of its own: torch, which would open one, is not even imported."""
    code = "import sys, pipeline.system as s; w = s.SystemWatch(0); assert w.look(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
