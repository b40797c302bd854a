"""The training loop's decisions: when it saves, goes back, stops."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import train
from pipeline.config import ComputeConfig, PhaseConfig
from tests.unit.pipeline.loop import run_of, stand_in

OK, BAD, STOP, SAVE = "ok", "bad", "stop", "save"


class Loop:
    """`_train` with steps that go as told, and what it saved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *steps: str, every: int = 2, tolerated: int = 2) -> None:
        self.steps = steps
        self.saved: list[int] = []
        phase = PhaseConfig(data="d", steps=len(steps), checkpoint_every=every, log_every=100)
        compute = ComputeConfig(bad_steps_tolerated=tolerated)
        self.run = run_of(phase, compute, {})
        stand_in(monkeypatch, step=self.step, save=self.save, _tell_of_bad_step=lambda run, keys: None)

    def step(self, run: Any, window: Any, rate: float, **wishes: bool) -> list[str]:
        what = self.steps[run.step]
        run.step += 1
        run.optimizer.applied, run.optimizer.stop_wanted = BAD not in what, STOP in what
        run.optimizer.save_wanted = SAVE in what
        return []

    def save(self, run: Any, metrics: dict[str, float]) -> None:
        self.saved.append(run.step)
        run.saved = f"step-{run.step}"

    def outcome(self) -> dict[str, Any]:
        return train._train(self.run, SimpleNamespace(rearm=lambda: None, started=lambda: None))  # type: ignore[arg-type]


def test_a_save_amid_bad_steps_waits_for_a_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch, OK, OK, OK, BAD, BAD, OK, OK, OK)
    assert loop.outcome() == {"kind": "done", "step": 8}
    assert loop.saved == [2, 6, 8]


def test_a_bad_streak_goes_back_to_what_was_saved_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch, OK, OK, OK, BAD, BAD, BAD, OK, OK)
    outcome = loop.outcome()
    assert (outcome["kind"], outcome["step"], outcome["checkpoint"]) == ("roll_back", 6, "step-2")
    assert outcome["data_offset"] == 6
    assert loop.saved == [2]


def test_a_training_does_not_end_with_a_bad_step(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch, OK, OK, OK, BAD)
    assert loop.outcome()["kind"] == "roll_back"
    assert loop.saved == [2]


def test_a_wish_to_stop_amid_bad_steps_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch, OK, f"{BAD} {STOP}", BAD, OK, OK, OK)
    assert loop.outcome() == {"kind": "stopped", "step": 4}
    assert loop.saved == [4]


def test_a_wish_to_save_is_granted_on_every_rank_and_kept_amid_bad_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch, OK, OK, SAVE, OK, OK, f"{BAD} {SAVE}", OK, OK, every=100)
    assert loop.outcome() == {"kind": "done", "step": 8}
    assert loop.saved == [3, 7, 8]


@pytest.mark.parametrize("rank", [0, 5])
def test_a_bad_step_is_one_record_of_all_ranks_losses_and_samples(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    def gather_object(mine: dict[str, Any], ranks: list[Any] | None) -> None:
        for number in range(64 if ranks is not None else 0):
            loss = "inf" if number % 10 == 5 else "0.1"
            ranks[number] = {"rank": number, "loss": loss, "samples": [f"s{number}"]}  # type: ignore[index]
        assert mine == {"rank": rank, "loss": "0.1", "samples": ["a", "b"]}

    monkeypatch.setattr(train.dist, "gather_object", gather_object)
    told: list[Any] = []
    run: Any = SimpleNamespace(
        step=3, rank=rank, world_size=64, report=told.append, optimizer=SimpleNamespace(loss=0.1, grad_norm=1.5)
    )
    train._tell_of_bad_step(run, ["a", "b"])
    if rank:
        assert told == []
        return
    (found,) = (record["bad_step"] for record in told)
    assert [len(found["ranks"]), found["gradient_norm"]] == [64, "1.5"]
    assert found["said"] == (
        "step 3 not applied: gradient norm 1.5; rank 5 had loss inf from s5; rank 15 had loss inf from s15; "
        "rank 25 had loss inf from s25; rank 35 had loss inf from s35; 2 ranks more"
    )


def test_the_start_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    armed: list[float] = []
    monkeypatch.setattr(train.faulthandler, "dump_traceback_later", lambda seconds, exit: armed.append(seconds))
    with train._not_hanging(3600, 900) as alive:
        alive.armed_at -= 10
        alive.rearm()  # a part of the start is over
        assert armed == [3600, 3600]
        alive.started()  # at once, though the last sign of life was just now
        assert armed == [3600, 3600, 900]
        alive.started()
        assert armed == [3600, 3600, 900]
