"""What a person sees: progress at most every ten seconds, every validation at once."""

import io
from types import SimpleNamespace

from rich.console import Console

from pipeline import stages
from pipeline.progress import Display


class NoTracker:
    """Is told and keeps nothing."""

    def log_metrics(self, *told: object) -> None:
        pass


def told(*, terminal: bool) -> str:
    """What is shown of 40 logs and 8 validations that come at once, as after a driver was busy."""
    screen = io.StringIO()
    display = Display(Console(file=screen, width=200, force_terminal=terminal))
    display.begin_stage(1, 1, "train", "40 steps")
    work = SimpleNamespace(stage=SimpleNamespace(name="train"), display=display, tracker=NoTracker(), run_id="r")
    last: dict[str, float] = {}
    handle = stages._training_records(work, last)  # type: ignore[arg-type]
    for step in range(1, 41):
        handle({"step": step, "steps": 40, "metrics": {"loss": 1 / step, "images_per_s": 2.0}})
        if step % 5 == 0:
            handle({"step": step, "metrics": {"validation_psnr_y": 30 + step / 100, "validation_ssim_y": 0.9}})
    display.end_stage("")
    assert {"loss", "validation_psnr_y"} <= set(last)
    return screen.getvalue()


def test_every_validation_is_printed() -> None:
    for terminal in (False, True):
        lines = [line for line in told(terminal=terminal).splitlines() if "validation" in line]
        assert [line.split("train: ")[1].rstrip() for line in lines] == [
            f"step {step}, validation {30 + step / 100:.3f} dB, SSIM 0.9000" for step in range(5, 41, 5)
        ]


def test_other_progress_is_throttled() -> None:
    assert sum("loss" in line for line in told(terminal=False).splitlines()) == 2  # the first, the last
