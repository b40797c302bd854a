"""Devices as people name them."""

import pytest
import torch

from pipeline.devices import choose


def names(wanted: str) -> list[str]:
    return [str(device) for device in choose(wanted)]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with three GPUs, as PyTorch tells of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


@pytest.mark.usefixtures("gpus")
def test_gpus() -> None:
    assert names("auto") == names("cuda") == ["cuda:0", "cuda:1", "cuda:2"]
    assert names("cuda:1") == ["cuda:1"]
    assert names("cuda:2, cpu") == ["cuda:2", "cpu"]
    with pytest.raises(ValueError, match=r"--device cuda:3: there is no such GPU; choose among cuda:0, cuda:1, cuda:2"):
        choose("cuda:3")


def test_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert names("auto") == names("cpu") == ["cpu"]
    assert names("cpu,cpu") == ["cpu", "cpu"]
    for wanted in ("cuda", "cuda:0", "cpu,cuda:1"):
        with pytest.raises(ValueError, match=r"--device cuda.*: PyTorch .*; choose cpu"):
            choose(wanted)


@pytest.mark.parametrize("wanted", ["gpu", "", "cuda:", "cuda:-1", "cuda:x", "mps", "cpu:0", "cpu,,cpu"])
def test_other_names(wanted: str) -> None:
    with pytest.raises(ValueError, match="choose auto, cpu, cuda"):
        choose(wanted)
