"""How many steps a training has: as many as its phase says, or as many as its minutes turn out to hold.

With minutes, the learning rate stays where it is until the first milestone, a share of the training. When that share
of the minutes is over, the steps done tell how many there are in all; from then on it is a training of so many steps,
whatever the clock says. The number goes into the next checkpoint, which is made at once, so a training that is killed
goes on to the same number; with `steps` of that number in place of `minutes`, the learning rates are the same.
"""

import math
import time
from typing import Any

from pipeline.config import PhaseConfig

STEPS, SPENT_S = "steps", "trained_s"
"""What a checkpoint's meta data holds of a budget."""


class Budget:
    """The steps of one training; `steps` is None while they are not known.

    meta: that of the checkpoint that the training goes on from.
    """

    def __init__(self, phase: PhaseConfig, meta: dict[str, Any]) -> None:
        self.phase = phase
        self.steps: int | None = phase.steps or meta.get(STEPS)
        self.spent_before_s = float(meta.get(SPENT_S, 0.0))
        self.begin = time.monotonic()

    def start_clock(self) -> None:
        """The first step begins: starting up is not training."""
        self.begin = time.monotonic()

    @property
    def spent_s(self) -> float:
        """Seconds of training up to now, without those that a kill has lost."""
        return self.spent_before_s + time.monotonic() - self.begin

    @property
    def is_due(self) -> bool:
        """Whether the steps are to be settled now; to be asked on one rank, for all."""
        if self.steps is not None or self.phase.minutes is None:
            return False
        return self.spent_s >= self.phase.minutes * 60 * self.phase.first_milestone_share

    def is_over(self, step: int) -> bool:
        """Whether `step` steps are all."""
        return self.steps is not None and step >= self.steps

    def settle(self, step: int) -> int:
        """The number of steps in all, `step` of which are done; at least one is still to come."""
        # the fewest whose first milestone lies behind the steps done: those had the rate of before it
        self.steps = max(step + 1, math.floor((step - 1) / self.phase.first_milestone_share) + 1)
        return self.steps

    def expected(self, step: int) -> int:
        """The steps in all as far as can be told after `step` of them."""
        if self.steps is not None:
            return self.steps
        assert self.phase.minutes is not None
        return max(step + 1, round(step * self.phase.minutes * 60 / max(self.spent_s, 1e-9)))

    def as_meta(self) -> dict[str, Any]:
        """What the next process must know of it."""
        return {STEPS: self.steps, SPENT_S: self.spent_s}
