"""The promotion rule: what a candidate must show before it becomes champion. Config only; `gate` applies it."""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.settings import Settings

Metric = Literal["psnr_y", "ssim_y", "psnr_rgb"]


class GateConfig(Settings):
    """A candidate is promoted when every line holds against the champion (or bicubic, where there is none)."""

    better: dict[str, float] = Field(
        default_factory=dict, description="set -> the candidate must be better by more than this (metric's unit)"
    )
    not_worse: dict[str, float] = Field(
        default_factory=dict, description="set -> the candidate may be worse by at most this (metric's unit)"
    )
    metric: Metric = Field("psnr_y", description="what the sets are compared by: psnr_y and psnr_rgb in dB, ssim_y")
    decide_by: Literal["interval", "mean"] = Field(
        "interval",
        description="what must hold: the lower end of the mean difference's bootstrap interval, or the mean itself",
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="of the bootstrap interval over paired images")
    max_slowdown: float | None = Field(
        None, gt=0, description="candidate's time over champion's on one image, in turns on one machine; null: no limit"
    )
    max_growth: float | None = Field(
        None, gt=0, description="candidate's number of parameters over the champion's; null: no limit"
    )

    @model_validator(mode="after")
    def _asks_for_something(self) -> "GateConfig":
        if not self.better:
            raise ValueError("gate.better is empty: name at least one set that decides, such as {Set5: 0.0}")
        for name, tolerance in self.not_worse.items():
            if tolerance < 0:
                raise ValueError(f"gate.not_worse.{name} {tolerance} is negative: use gate.better.{name}")
            if name in self.better:
                raise ValueError(f"{name} is in gate.better and in gate.not_worse: keep one of them")
        return self

    @property
    def validation_set(self) -> str:
        """The set that validations while training look at."""
        return next(iter(self.better))

    @property
    def validation_metric(self) -> Literal["psnr_y", "ssim_y"]:
        """What validations while training go by; they know no RGB."""
        return "ssim_y" if self.metric == "ssim_y" else "psnr_y"

    @property
    def sets(self) -> list[str]:
        """The sets that it asks about."""
        return [*self.better, *self.not_worse]
