"""How busy a cluster is, in as many series as one node has: what MLflow keeps must not grow with nodes and GPUs."""

import re
import statistics
import time

EVERY_S = 60.0
MOST_POINTS = 20_000
"""Of each series over a training."""
_FORGOTTEN_AFTER_S = 600.0  # without a word from a node


class SystemSummary:
    """The mean, the least and the most over all nodes, or GPUs, of what each node has told last.

    Given out at most once in `EVERY_S` and `MOST_POINTS` times in all.
    """

    def __init__(self) -> None:
        self.told: dict[str, tuple[float, float]] = {}  # series of a node -> when, value
        self.given_at, self.given_step = float("-inf"), 0

    def add(self, values: dict[str, float], step: int, steps: int) -> dict[str, float]:
        """One node's figures at a step of so many: what is to be logged now, mostly nothing.

        values: as `pipeline.system.SystemWatch` names them, system/node0/gpu_0_utilization_percentage.
        """
        now = time.monotonic()
        self.told |= {name: (now, value) for name, value in values.items()}
        if now - self.given_at < EVERY_S or 0 <= step - self.given_step < steps / MOST_POINTS:
            return {}
        self.given_at, self.given_step = now, step
        self.told = {name: entry for name, entry in self.told.items() if now - entry[0] < _FORGOTTEN_AFTER_S}
        merged: dict[str, list[float]] = {}
        for name, (_, value) in self.told.items():
            merged.setdefault(re.sub(r"node\d+/(gpu)?(?:_\d+)?", r"\1", name), []).append(value)
        found = {}
        for name, all_values in merged.items():
            found[name] = statistics.fmean(all_values)
            if len(all_values) > 1:
                found |= {f"{name}_min": min(all_values), f"{name}_max": max(all_values)}
        return found
