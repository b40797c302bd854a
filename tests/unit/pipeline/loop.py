"""The training loop with stand-ins for all but its decisions."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import train
from pipeline.budget import Budget
from pipeline.config import ComputeConfig, PhaseConfig, ValidationConfig


def run_of(phase: PhaseConfig, compute: ComputeConfig, meta: dict[str, Any], **more: Any) -> Any:
    """What `train._train` is given, resumed from the meta data of a checkpoint."""
    return SimpleNamespace(
        job=SimpleNamespace(phase=phase, compute=compute, validation=ValidationConfig()),
        optimizer=SimpleNamespace(applied=True, stop_wanted=False, save_wanted=False, settle_wanted=False),
        budget=Budget(phase, meta),
        **{"device": "cpu", "rank": 0, "step": meta.get("step", 0), "data_offset": 0, "saved": None},
        **{"validator": None, "mailbox": None, **more},
    )


def stand_in(monkeypatch: pytest.MonkeyPatch, **own: Callable[..., Any]) -> None:
    """Put stand-ins in place of what the loop calls; `own` are the test's."""
    for name, used in {
        "Window": lambda device: None,
        "StopWatch": lambda mailbox: SimpleNamespace(poll=lambda: False),
        "SaveWatch": lambda every_s: SimpleNamespace(poll=lambda: False, saved=lambda uploaded: None, preempted=False),
        "CommunicationProbe": lambda: SimpleNamespace(begin=lambda: None, end=lambda: 0.0),
        "_Trace": lambda run: SimpleNamespace(before_step=lambda: None, after_step=lambda: None),
        "_log": lambda *arguments: {},
        **own,
    }.items():
        monkeypatch.setattr(train, name, used)
