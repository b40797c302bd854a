"""A domain: images of one kind that keep arriving, and how a champion is fine-tuned on them."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from data_prep.degrade import Kind
from pipeline.config import EvaluateConfig, PhaseConfig, Places, check_batch
from pipeline.cron import check_cron
from pipeline.names import check_model_name
from pipeline.rule import GateConfig
from pipeline.settings import Settings, load_settings
from pipeline.suggest import did_you_mean

PHASE, MIX = "retrain", "mixed"


class ReplayConfig(Settings):
    """Images of the kind that the base was trained on, mixed in so that it does not forget them."""

    source: str = Field(description="folder, s3://bucket/prefix, or photographs:")
    include: tuple[str, ...] = Field((), description="glob patterns on the relative path; empty: all images")
    exclude: tuple[str, ...] = Field((), description="glob patterns left out; of the whole path with a leading /")
    share: float = Field(0.3, gt=0, lt=1, description="share of the training samples that comes from here")


class ScheduleConfig(Settings):
    """When and where a cluster retrains; `hatchery schedule render` makes manifests of it."""

    cron: Annotated[str, AfterValidator(check_cron)] = Field(
        "0 3 * * *", description="five fields: minute hour day month weekday"
    )
    namespace: str = "default"
    image: str | None = Field(
        None, description="of Ray's pods, with this project and all dependencies: built from infra/Dockerfile"
    )
    working_dir: str = Field(
        "/hatchery",
        pattern="^/",
        description="where the image, or the machine of the plain cron line, has this project",
    )
    ray_address: str = Field("http://127.0.0.1:8265", description="dashboard that the plain cron line submits to")
    ray: str | None = Field(
        None, pattern="^/", description="path of `ray` for the plain cron line; null: working_dir/.venv/bin/ray"
    )
    runtime_env: str | None = Field(
        None, pattern="^/", description="YAML file that the plain cron line hands to Ray: env_vars of S3 and MLflow"
    )
    workers: int = Field(1, ge=0, description="worker pods")
    cpus: int = Field(8, ge=1, description="CPU cores of each pod")
    memory_gib: int = Field(32, ge=1, description="memory of each pod")
    gpus: int = Field(0, ge=0, description="GPUs of each worker pod")
    history: int = Field(3, ge=0, le=20, description="finished jobs kept, failed ones likewise")
    deadline_s: int = Field(86_400, ge=60, description="an attempt is ended after this time; a cluster makes two")
    env_secret: str | None = Field(None, description="Kubernetes secret whose keys become environment variables")


class DomainConfig(Places):
    """Everything about the retraining of one domain."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$")]
    source: str = Field(description="folder, s3://bucket/prefix or tar where images of the domain arrive")
    include: tuple[str, ...] = Field((), description="glob patterns on the relative path; empty: all images")
    exclude: tuple[str, ...] = Field((), description="glob patterns left out; of the whole path with a leading /")
    degradation: Kind = Field("bicubic", description="how low-resolution crops are made; judgement: evaluate.degrade")
    base: str = Field(description="models:/NAME@champion or models:/NAME/VERSION: what is fine-tuned")
    registered_as: str | None = Field(
        None, description="registered model of the results, NAME-x2; null: the base's own, whose champion they become"
    )
    min_new_images: int = Field(50, ge=1, description="so many new images make a retraining worthwhile")
    max_wait_days: float | None = Field(
        None, ge=0, description="fewer new images do as well once the oldest has waited so long; null: never"
    )
    hold_out_share: float = Field(0.1, gt=0, lt=1, description="share of new images kept for judgement, for ever")
    min_hold_out: int = Field(4, ge=1, description="images held out at least, of the first ones where need be")
    min_side_px: int = Field(256, ge=1, description="images with a shorter side are left out")
    samples_per_shard: int = Field(256, ge=1, description="images per WebDataset tar")
    max_reject_share: float = Field(0.01, ge=0, le=1, description="share of rejected replay images that is an error")
    replay: ReplayConfig
    training: PhaseConfig
    seed: int = Field(0, ge=0, description="seed of shard order, sample order and crops")
    evaluate: EvaluateConfig = Field(description="the standard sets; the domain's hold-out is added under its name")
    gate: GateConfig
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="before")
    @classmethod
    def _training_takes_the_mix(cls, values: Any) -> Any:
        """The data of the training is the mix: it is not for the YAML to say."""
        training = values.get("training") if isinstance(values, dict) else None
        if isinstance(training, dict):
            if training.get("data", MIX) != MIX:
                raise ValueError("training.data is always new images mixed with replay: remove it")
            if training.get("degradation", "bicubic") != "bicubic":
                raise ValueError("training.degradation belongs beside training, as the domain's degradation: move it")
            return values | {"training": training | {"data": MIX}}
        return values

    @model_validator(mode="after")
    def _models_are_named(self) -> "DomainConfig":
        if not re.fullmatch(r"models:/[^/@]+(@[^/@]+|/\d+)", self.base):
            raise ValueError(f"base {self.base!r} names no version: write models:/NAME@champion or models:/NAME/N")
        if self.registered_as and not re.search(r".-x\d$", check_model_name(self.registered_as)):
            raise ValueError(f"registered_as {self.registered_as!r} does not tell its scale: end it in -x2, -x3 or -x4")
        return self

    @model_validator(mode="after")
    def _batch_fits(self) -> "DomainConfig":
        check_batch("training", self.training, self.compute)
        return self

    @model_validator(mode="after")
    def _sets_are_known(self) -> "DomainConfig":
        if self.evaluate.hold_out:
            raise ValueError("evaluate.hold_out is for recipes: a domain has hold_out_share, remove it")
        if self.name in self.evaluate.sets:
            raise ValueError(f"evaluate.sets.{self.name} has the domain's name, which its hold-out takes: rename it")
        known = [self.name, *self.evaluate.sets]
        for name in self.gate.sets:
            if name not in known:
                meant = did_you_mean(name, known)
                raise ValueError(f"gate asks about {name!r}, known are: {', '.join(known)}{meant}")
        return self


def load_domain(path: str, overrides: list[str] | None = None) -> DomainConfig:
    """The domain of a YAML file with `a.b=c` overrides. ConfigError with one line per fault."""
    return load_settings(DomainConfig, Path(path), overrides or [], "domain")
