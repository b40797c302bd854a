"""The gate: a promotion rule applied to figures. Pure; who is promoted where is `promotion`'s business."""

from dataclasses import dataclass
from typing import Literal

from pipeline.compare import Comparison, against_bicubic, compare
from pipeline.evaluate import SetResult
from pipeline.rule import GateConfig
from pipeline.settings import Settings


class Costs(Settings):
    """A candidate's costs over its rival's: times of one image, measured in turns, and numbers of parameters."""

    slowdown: float
    growth: float


class Condition(Settings):
    """One line of the rule, whether it holds, and the figures that say so."""

    text: str
    holds: bool
    figures: Comparison | None = None
    against: Literal["rival", "anchor"] = "rival"


class Verdict(Settings):
    """What the gate says of a candidate, with all figures; `reason` is one line for people."""

    promoted: bool
    reason: str
    rival: str
    conditions: tuple[Condition, ...] = ()
    costs: Costs | None = None


@dataclass(frozen=True)
class Anchor:
    """A version that does not move with the champion, and its results on the sets that must not become worse.

    Each champion may lose the tolerance against the last; against the anchor all of them together may.
    """

    title: str
    results: list[SetResult]


def decide(
    mine: list[SetResult],
    theirs: list[SetResult] | None,
    rival: str,
    rule: GateConfig,
    costs: Costs | None = None,
    anchor: Anchor | None = None,
) -> Verdict:
    """Whether a candidate is to be champion. theirs: the rival's results on the rule's sets; None: bicubic is it.

    ValueError where a set that the rule names was not judged, or not on the same images.
    """
    conditions = []
    for name, margin in rule.better.items():
        conditions.append(_condition(_compared(mine, theirs, name, rule), margin, rule, _wanted(margin), strictly=True))
    for name, tolerance in rule.not_worse.items():
        conditions.append(
            _condition(_compared(mine, theirs, name, rule), -tolerance, rule, f"at least {-tolerance:+g}")
        )
        if anchor is not None:
            compared = _compared(mine, anchor.results, name, rule)
            found = _condition(compared, -tolerance, rule, f"at least {-tolerance:+g}")
            text = f"since {anchor.title}, {found.text}"
            conditions.append(found.model_copy(update={"text": text, "against": "anchor"}))
    if costs is not None:
        conditions += _cost_conditions(costs, rule)
    failed = [condition.text for condition in conditions if not condition.holds]
    promoted = not failed
    shown = failed or [condition.text for condition in conditions]
    reason = f"{_title(rule, conditions) if promoted else 'not promoted over'} {rival}: {'; '.join(shown)}"
    return Verdict(promoted=promoted, reason=reason, rival=rival, conditions=tuple(conditions), costs=costs)


def _wanted(margin: float) -> str:
    """What a set of `better` must show: a margin below 0 lets it lose."""
    return f"{'no worse than allowed, ' if margin < 0 else ''}more than {margin:+g}"


def _title(rule: GateConfig, conditions: list[Condition]) -> str:
    """What a candidate that passed is beside its rival: better only where no set that decides lost anything."""
    decisive = [condition.figures for condition in conditions[: len(rule.better)] if condition.figures is not None]
    lost = any((found.low if rule.decide_by == "interval" else found.difference) < 0 for found in decisive)
    return "no worse than allowed against" if lost else "better than"


def _compared(mine: list[SetResult], theirs: list[SetResult] | None, name: str, rule: GateConfig) -> Comparison:
    if theirs is None:
        return against_bicubic(_of_set(mine, name), rule.metric, rule.confidence)
    return compare(_of_set(mine, name), _of_set(theirs, name), rule.metric, rule.confidence)


def _of_set(results: list[SetResult], name: str) -> SetResult:
    for result in results:
        if result.set == name:
            return result
    judged = ", ".join(result.set for result in results) or "none"
    raise ValueError(f"the gate asks about {name!r}, judged were {judged}: judge it, or correct the rule")


def _condition(found: Comparison, bound: float, rule: GateConfig, wanted: str, *, strictly: bool = False) -> Condition:
    by_interval = rule.decide_by == "interval"
    decisive = found.low if by_interval else found.difference
    # a margin must be passed, a tolerance may be reached
    holds = decisive > bound if strictly else decisive >= bound
    interval = f" ({found.low:+.4f} .. {found.high:+.4f})" if by_interval else ""
    text = (
        f"{found.metric} on {found.set} {found.mine:.4f} against {found.theirs:.4f}, "
        f"{found.difference:+.4f}{interval}, required: {wanted}{' by the whole interval' if by_interval else ''}"
    )
    return Condition(text=text, holds=holds, figures=found)


def _cost_conditions(costs: Costs, rule: GateConfig) -> list[Condition]:
    conditions = []
    for what, value, limit in (
        ("time", costs.slowdown, rule.max_slowdown),
        ("parameters", costs.growth, rule.max_growth),
    ):
        if limit is not None:
            text = f"{what} {value:.3f} of the rival's, required: at most {limit:g}"
            conditions.append(Condition(text=text, holds=value <= limit))
    return conditions
