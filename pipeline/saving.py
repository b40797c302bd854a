"""When a training saves beside its phase's own steps: by the clock, and when a node is about to be taken away."""

import threading
import time
from collections.abc import Callable

from ray.train import PreemptionInfo
from ray.train.v2._internal.execution.context import get_train_context


def preemption_notice() -> PreemptionInfo | None:
    """What Ray Train has told this worker of nodes of the group that are drained, e.g. before a spot reclaim.

    `ray.train.get_preemption_info` gives the same, but waits for all ranks in each call; here every rank looks for
    itself and the wish to save travels with the gradient's norm.
    """
    return get_train_context().preemption_context.preemption_info


class SaveWatch:
    """Says when a checkpoint is wanted: `every_s` after the last one, and once at each new notice of preemption.

    every_s: None where no clock is asked, or another rank keeps it: they need not agree, one that wants is enough. The
    clock waits while the last checkpoint is on its way: where the storage is away for hours, they would fill the disk.
    """

    def __init__(self, every_s: float | None, notice: Callable[[], PreemptionInfo | None] = preemption_notice) -> None:
        self.every_s = every_s
        self.uploaded: threading.Event | None = None
        self.notice = notice
        self.saved()

    def saved(self, uploaded: threading.Event | None = None) -> None:
        """A checkpoint was made, and `uploaded` tells when it is in the storage: it answers all that is known now."""
        self.uploaded = uploaded
        self.saved_at = time.monotonic()
        self.heeded = self.notice()

    def poll(self) -> bool:
        """Whether a checkpoint is wanted now."""
        late = self.every_s is not None and time.monotonic() - self.saved_at >= self.every_s
        return (late and (self.uploaded is None or self.uploaded.is_set())) or self.preempted

    @property
    def preempted(self) -> bool:
        """Whether there is a notice that no checkpoint has answered yet."""
        return self.notice() != self.heeded
