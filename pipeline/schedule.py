"""The learning rate of a step: linear warm-up, then halving at milestones (MultiStepLR). A pure function."""

from bisect import bisect_right

from pipeline.config import PhaseConfig


def learning_rate(step: int, phase: PhaseConfig, steps: int | None = None) -> float:
    """The learning rate used by optimizer step `step` (0-based).

    steps: of the whole training, default the phase's; milestones that are shares of them wait until they are known.
    Equals torch's MultiStepLR stepped after every optimizer step; warm-up rises linearly and reaches the full rate
    at step `warmup_steps`.
    """
    rate = phase.lr * phase.gamma ** bisect_right(phase.milestones_of(steps or phase.steps), step)
    if step < phase.warmup_steps:
        rate *= (step + 1) / (phase.warmup_steps + 1)
    return rate
