"""Trainings that are given minutes: their steps are measured once, written down, and then a plain number of steps."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import budget, train
from pipeline.budget import Budget
from pipeline.config import ComputeConfig, ConfigError, PhaseConfig, load_recipe
from pipeline.plan import Outside, stages_of
from pipeline.schedule import learning_rate
from tests.unit.pipeline.loop import run_of, stand_in


def phase(**changes: Any) -> PhaseConfig:
    return PhaseConfig(**{"data": "d", "minutes": 1, "lr": 1.0, "milestones": (0.5, 0.75), "log_every": 100} | changes)


class Clock:
    """Stands still until a training takes a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: self.now_s))


class Training:
    """`_train` with steps that take as long as told; `saved` are the meta data of its checkpoints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, of: PhaseConfig, meta: dict[str, Any] | None = None) -> None:
        self.clock, self.rates, self.saved, self.told = Clock(monkeypatch), [], [], []
        self.step_s, self.stop_at = 1.0, 0
        self.run = run_of(of, ComputeConfig(), meta or {}, report=self.told.append)
        stand_in(monkeypatch, step=self.step, save=self.save)
        self.clock.now_s += 500  # starting up

    def step(self, run: Any, window: Any, rate: float, **wishes: bool) -> list[str]:
        self.rates.append(rate)
        run.step += 1
        self.clock.now_s += self.step_s
        run.optimizer.settle_wanted = wishes["want_settle"]
        run.optimizer.stop_wanted = run.step == self.stop_at
        return []

    def save(self, run: Any, metrics: dict[str, float]) -> None:
        self.saved.append({"step": run.step, **run.budget.as_meta()})

    def go(self) -> dict[str, Any]:
        return train._train(self.run, SimpleNamespace(rearm=lambda: None, started=lambda: None))  # type: ignore[arg-type]


def test_a_training_ends_when_its_minutes_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch, phase())
    outcome = training.go()
    assert outcome["kind"] == "done"
    assert 59 <= outcome["step"] <= 63  # a minute, at a second a step
    assert [sorted(set(training.rates), reverse=True), training.rates[0]] == [[1.0, 0.5, 0.25], 1.0]
    assert training.told == [{"settled": outcome["step"]}]


def test_without_milestones_the_clock_alone_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 60 <= Training(monkeypatch, phase(milestones=())).go()["step"] <= 62


def test_one_step_longer_than_all_minutes_is_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch, phase())
    training.step_s = 1e4
    assert training.go() == {"kind": "done", "step": 3}


def test_the_steps_are_in_a_checkpoint_made_at_once_and_a_resumed_run_keeps_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Training(monkeypatch, phase())
    steps = whole.go()["step"]
    settled = whole.saved[0]
    assert settled["steps"] == steps
    assert settled["step"] < steps
    later = Training(monkeypatch, phase(), settled)
    later.step_s = 20.0  # on another machine, where a measurement would find something else
    assert later.go()["step"] == steps
    assert later.rates == whole.rates[settled["step"] :]


def test_a_run_stopped_before_its_steps_are_known_counts_the_time_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Training(monkeypatch, phase())
    first.stop_at = 20
    assert first.go() == {"kind": "stopped", "step": 20}
    (left,) = first.saved
    assert (left["steps"], left["trained_s"]) == (None, 20.0)
    assert 59 <= Training(monkeypatch, phase(), left).go()["step"] <= 63


def test_the_same_number_of_steps_is_the_same_training(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Training(monkeypatch, phase(warmup_steps=7))
    steps = measured.go()["step"]
    counted = Training(monkeypatch, phase(warmup_steps=7, minutes=None, steps=steps))
    counted.go()
    assert counted.rates == measured.rates


@given(st.integers(1, 10_000), st.floats(0.01, 0.99), st.integers(0, 50))
def test_what_was_trained_before_the_steps_were_known_fits_them(step: int, share: float, warmup: int) -> None:
    of = phase(milestones=(share,), warmup_steps=warmup)
    steps = Budget(of, {}).settle(step)
    assert steps > step
    for done in {0, step // 2, step - 1}:
        assert learning_rate(done, of) == learning_rate(done, of, steps)
    assert learning_rate(steps - 1, of, steps) <= learning_rate(steps - 1, of)


def test_shares_are_milestones_of_counted_steps_as_well() -> None:
    shares = PhaseConfig(data="d", steps=200, milestones=(0.5, 0.75))
    steps = PhaseConfig(data="d", steps=200, milestones=(100, 150))
    assert [learning_rate(step, shares) for step in range(200)] == [learning_rate(step, steps) for step in range(200)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("phases.finetune.minutes=3", "steps and minutes exclude one another: set one of them to null"),
        ("phases.finetune.steps=null", "steps and minutes are both missing: give one"),
        ("phases.finetune={steps: null, minutes: 3}", "milestones [40, 60] must be shares such as 0.6"),
        ("phases.finetune.milestones=[0.5, 40]", "[0.5, 40] mixes steps with shares"),
        ("phases.finetune.milestones=[1.5]", "1.5 is no step and no share"),
        ("phases.finetune={steps: null, minutes: 0, milestones: []}", "phases.finetune.minutes: value 0"),
    ],
)
def test_lengths_that_cannot_be(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("demo", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_minutes_are_in_the_fingerprint_and_what_they_turned_out_to_be_is_not() -> None:
    def fingerprint(length: str) -> str:
        recipe = load_recipe("demo", [f"phases.finetune={{{length}, milestones: [0.6]}}"])
        outside = Outside(dict.fromkeys(recipe.data, "v"), dict.fromkeys(recipe.evaluate.sets, "v"), {})
        return {stage.name: stage for stage in stages_of(recipe, outside)}["finetune-x2"].fingerprint({})

    lengths = ("steps: null, minutes: 3", "steps: null, minutes: 4", "steps: 80")
    assert len({fingerprint(length) for length in lengths}) == 3
    assert fingerprint(lengths[0]) == fingerprint(lengths[0])
