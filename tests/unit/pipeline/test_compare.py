"""Paired comparison and the gate: figures in, verdict out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.metrics import RESOLVED_DB
from pipeline.compare import against_bicubic, bootstrap_interval, compare
from pipeline.gate import Anchor, Costs, decide
from pipeline.rule import GateConfig
from tests.unit.pipeline.figures import judged


def test_pairing_sees_what_means_hide() -> None:
    """Images differ by 10 dB, the models by 0.1 dB on each: the interval is as narrow as the second."""
    rival = [25.0, 30, 35, 28, 33]
    found = compare(judged([value + 0.1 for value in rival]), judged(rival, model="rival"))
    assert found.difference == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)
    assert (found.rival, found.images) == ("rival", 5)


def test_images_are_matched_by_content_not_by_order() -> None:
    mine = judged([31.0, 20, 40])
    backwards = mine.model_copy(update={"images": mine.images[::-1]})
    assert compare(mine, backwards).difference == 0


def test_the_interval_is_the_bootstraps() -> None:
    """For many normal differences it is mean +- 1.96 standard errors; and it is the same every time."""
    differences = np.random.default_rng(1).normal(0.2, 1.0, 400)
    low, high = bootstrap_interval(differences, 0.95)
    error = differences.std() / 20
    assert low == pytest.approx(differences.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(differences.mean() + 1.96 * error, abs=0.15 * error)
    assert bootstrap_interval(differences, 0.95) == (low, high)
    assert bootstrap_interval(differences, 0.99)[0] < low


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_the_interval_holds_the_mean_and_lies_within_the_values(values: list[float]) -> None:
    low, high = bootstrap_interval(np.array(values), 0.9)
    assert min(values) - 1e-9 <= low <= np.mean(values) + 1e-9
    assert np.mean(values) - 1e-9 <= high <= max(values) + 1e-9


def test_equal_images_do_not_break_the_figures() -> None:
    found = compare(judged([math.inf, 30]), judged([math.inf, 29], model="rival"))
    assert found.difference == 0.5


def test_one_blank_page_does_not_outweigh_nineteen_better_ones() -> None:
    """Off by less than uint8 resolves where the rival is exact; reports from before the limit hold infinity."""
    pages = [30.0 + n for n in range(19)]
    mine = judged([*(value + 0.5 for value in pages), 62.0], "text")
    for exact in (math.inf, RESOLVED_DB):
        found = compare(mine, judged([*pages, exact], "text", "rival"))
        assert found.difference == pytest.approx((19 * 0.5 + 62 - RESOLVED_DB) / 20)
        assert found.low > 0
        assert decide([mine], [judged([*pages, exact], "text")], "champion", GateConfig(better={"text": 0.0})).promoted


def test_what_cannot_be_compared_says_so() -> None:
    with pytest.raises(ValueError, match="not judged on the same images: judge both on the same set"):
        compare(judged([30.0, 31]), judged([30.0]))
    with pytest.raises(ValueError, match=r"x2.*x4.*same images"):
        compare(judged([30.0]), judged([30.0], scale=4))
    with pytest.raises(ValueError, match="Set5 was judged without psnr_rgb"):
        compare(judged([30.0]), judged([30.0]), "psnr_rgb")


RULE = GateConfig(better={"new": 0.1}, not_worse={"Set5": 0.05})
RIVAL = [judged([30.0, 31, 32], "new", "rival"), judged([33.0, 34, 35], "Set5", "rival")]


def candidate(on_new: float, on_set5: float) -> list[object]:
    return [judged([30 + on_new, 31 + on_new, 32 + on_new], "new"), judged([33.0, 34, 35 + 3 * on_set5], "Set5")]


@pytest.mark.parametrize(
    ("on_new", "on_set5", "promoted", "words"),
    [
        (0.2, 0.0, True, "better than champion: psnr_y on new 31.2000 against 31.0000, +0.2000"),
        (0.09, 0.0, False, "+0.0900 (+0.0900 .. +0.0900), required: more than +0.1 by the whole interval"),
        # the mean would do, the lower end of the interval does not
        (0.2, -0.02, False, "required: at least -0.05 by the whole interval"),
        (0.2, -0.01, True, "required: at least -0.05"),
    ],
)
def test_every_line_of_the_rule_must_hold(on_new: float, on_set5: float, promoted: bool, words: str) -> None:
    verdict = decide(candidate(on_new, on_set5), RIVAL, "champion", RULE)
    assert verdict.promoted is promoted
    assert words in verdict.reason
    assert [condition.figures.set for condition in verdict.conditions] == ["new", "Set5"]


@pytest.mark.parametrize("decide_by", ["interval", "mean"])
def test_a_loss_that_the_rule_allows_is_not_called_better(decide_by: str) -> None:
    rule = GateConfig(better={"new": -0.5, "Set5": -0.5}, decide_by=decide_by)
    lost = decide(candidate(0.2, -0.3), RIVAL, "champion", rule)
    assert lost.promoted is (decide_by == "mean")  # the interval's lower end is -0.9
    lost = decide(candidate(0.2, -0.1), RIVAL, "champion", rule)
    assert lost.reason.startswith("no worse than allowed against champion: psnr_y on new")
    assert "required: no worse than allowed, more than -0.5" in lost.reason
    assert decide(candidate(0.2, 0.1), RIVAL, "champion", rule).reason.startswith("better than champion")
    refused = decide(candidate(0.2, -1.0), RIVAL, "champion", rule)
    assert refused.reason.startswith("not promoted over champion: psnr_y on Set5")


def test_the_rule_may_ask_for_means_only() -> None:
    by_mean = RULE.model_copy(update={"decide_by": "mean"})
    assert decide(candidate(0.2, -0.02), RIVAL, "champion", by_mean).promoted
    refused = decide(candidate(0.2, -0.06), RIVAL, "champion", by_mean)
    assert not refused.promoted
    assert refused.reason.endswith("-0.0600, required: at least -0.05")


def test_without_a_champion_bicubic_is_the_rival() -> None:
    rule = GateConfig(better={"Set5": 1.0})
    assert decide([judged([31.5, 32])], None, "bicubic", rule).promoted
    refused = decide([judged([30.5, 32])], None, "bicubic", rule)
    assert not refused.promoted
    assert "over bicubic" in refused.reason
    assert against_bicubic(judged([31.0])).theirs == 30


def test_costs_count_where_the_rule_limits_them() -> None:
    rule = RULE.model_copy(update={"max_slowdown": 1.1, "max_growth": 1.0})
    good = candidate(0.2, 0.0)
    assert decide(good, RIVAL, "champion", rule, Costs(slowdown=1.05, growth=1.0)).promoted
    assert "time 1.300 of the rival's, required: at most 1.1" in (
        decide(good, RIVAL, "champion", rule, Costs(slowdown=1.3, growth=1.0)).reason
    )
    assert "parameters 2.000" in decide(good, RIVAL, "champion", rule, Costs(slowdown=1.0, growth=2.0)).reason


def test_losses_within_the_tolerance_do_not_add_up() -> None:
    """Two rounds that each lose 0.04 dB of the 0.05 allowed: the second loses too much since the anchor."""
    anchor = Anchor("m-x2 version 1, where the domain started", [judged([33.0, 34, 35], "Set5", "anchor")])
    by_mean = RULE.model_copy(update={"decide_by": "mean"})
    first, second = ([judged([33 - loss, 34 - loss, 35 - loss], "Set5")] for loss in (0.04, 0.08))
    new, newer = ([judged([30 + gain, 31, 32 + gain], "new")] for gain in (1, 2))
    assert decide(new + first, RIVAL, "version 1", by_mean, anchor=anchor).promoted
    assert decide(newer + second, new + first, "version 2", by_mean).promoted
    refused = decide(newer + second, new + first, "version 2", by_mean, anchor=anchor)
    assert not refused.promoted
    assert "since m-x2 version 1, where the domain started, psnr_y on Set5 33.9200 against 34.0000" in refused.reason
    assert [condition.against for condition in refused.conditions] == ["rival", "rival", "anchor"]


def test_a_set_that_was_not_judged_is_named() -> None:
    with pytest.raises(ValueError, match="asks about 'Set5', judged were new"):
        decide(candidate(1, 1)[:1], None, "bicubic", RULE)
