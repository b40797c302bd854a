"""The way of records from the training to the driver, where one of them cannot be handled."""

import itertools
import types

import pytest
import ray

from pipeline.monitor import Monitor, Record


@pytest.mark.integration
def test_a_record_that_cannot_be_handled_is_shown_and_takes_no_other_with_it(ray_local: types.ModuleType) -> None:
    handled: list[Record] = []

    def handle(record: Record) -> None:
        if record.get("metrics") == "bad":
            raise OSError("the disk is full")
        handled.append(record)

    with Monitor(handle) as monitor:
        for step, metrics in enumerate(("good", "bad", "good")):
            ray.get(monitor.mailbox.post.remote({"step": step, "metrics": metrics}))
    warning = "a record of step 1 got lost: OSError('the disk is full')"
    assert handled == [
        {"step": 0, "metrics": "good"},
        {"step": 1, "warning": warning},
        {"step": 2, "metrics": "good"},
    ]
    assert monitor.last_step == 2


@pytest.mark.integration
@pytest.mark.parametrize("lost", [{0, 1}, {2, 3}])
def test_an_error_that_passes_loses_no_record_and_fails_nothing(
    ray_local: types.ModuleType, monkeypatch: pytest.MonkeyPatch, lost: set[int]
) -> None:
    """Also at the very end, and where it is the answer that gets lost: the mailbox has handed it out then."""
    asked, handled, working = itertools.count(), [], ray.get

    def get(reference: object) -> object:
        answer = working(reference)
        if next(asked) in lost:
            raise ray.exceptions.ActorUnavailableError("the connection was reset", None)
        return answer

    with Monitor(handled.append, interval_s=0.05) as monitor:
        working(monitor.mailbox.post.remote({"step": 0}))
        monkeypatch.setattr(ray, "get", get)
        while next(asked) < 2:
            monitor.stopped.wait(0.05)
        working(monitor.mailbox.post.remote({"step": 1}))
    assert [record for record in handled if "warning" not in record] == [{"step": 0}, {"step": 1}]


@pytest.mark.integration
def test_a_lost_mailbox_is_shown_once_and_raised(ray_local: types.ModuleType) -> None:
    shown: list[Record] = []
    monitor = Monitor(shown.append, interval_s=0.05)
    ray.kill(monitor.mailbox)
    with pytest.raises(ray.exceptions.RayActorError), monitor:
        monitor.stopped.wait(1)
    (record,) = shown
    assert record["warning"].startswith("the training's records cannot be had: ")
