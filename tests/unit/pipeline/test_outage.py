"""A real S3 server that is away for a while: what a training uploads meanwhile arrives when it is back."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_prep import storage
from pipeline import validate
from pipeline.validate import Best
from tests.s3_server import S3Server


def wait_until(reached: Callable[[], object], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.integration
def test_the_best_weights_arrive_after_an_outage(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, working = [], storage.upload

    def upload(*arguments: Any) -> None:
        try:
            working(*arguments)
        except storage.StorageError as error:
            failed.append(error)
            raise

    monkeypatch.setattr(storage, "upload", upload)
    best, place = Best(step=3, value=30.0, metric="psnr_y"), f"{s3.uri}/best"
    publishing = threading.Thread(target=validate._publish, args=({"a": torch.ones(2)}, best, place))
    with s3.away():
        publishing.start()
        wait_until(lambda: failed)
    publishing.join(timeout=60)
    found = validate.read_best(place, tmp_path)
    assert found is not None
    assert found[1] == best
    assert torch.equal(found[0]["a"], torch.ones(2))


def test_a_trace_that_cannot_be_uploaded_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import train

    monkeypatch.setattr(train, "TRACE_PATIENCE_S", 0)
    (tmp_path / "file").write_bytes(b"")
    job = SimpleNamespace(compute=SimpleNamespace(profile_steps=(1, 1)), checkpoints_uri=f"{tmp_path}/file/checkpoints")
    told: list[dict[str, Any]] = []
    trace = train._Trace(SimpleNamespace(job=job, rank=0, step=0, report=told.append))
    trace.before_step()
    trace.run.step = 1
    trace.after_step()
    (record,) = told
    assert record["warning"].startswith("the trace profile-steps-1-1.json.gz is lost: ")
    assert "a part of the path is a file" in record["warning"]
