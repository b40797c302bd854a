"""Recipes: pydantic models, YAML files that extend one another, `a.b=c` overrides, cross checks.

A recipe says *what* is trained; `compute`, `storage` and `tracking` say *where*. Only the former enters an
artifact's fingerprint, so moving a run to other machines never changes what it trains.
"""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from data_prep import storage
from data_prep.degrade import Kind, check
from data_prep.degrade_steps import Step
from data_prep.image_files import MAX_PIXELS, PassedOver
from data_prep.pairs import OnDamage
from data_prep.redact import redacted
from model.losses import STAGE_WEIGHTS
from model.presets import PRESETS, arguments_of, configure
from pipeline import config_files
from pipeline.benchmark import BenchmarkImage, Protocol, read_set
from pipeline.names import ModelName, Name
from pipeline.rule import GateConfig
from pipeline.settings import CONFIGS, ConfigError, Settings, digest_of, flatten, load_settings
from pipeline.suggest import did_you_mean

__all__ = ["CONFIGS", "ConfigError", "Recipe", "Settings", "digest_of", "flatten", "load_recipe", "tracking_uri"]

EVALUATION_SCALES = (1, 2, 3, 4, 8)


class S3Config(Settings):
    """Buckets that are read in another way than by this process's credentials; the rest is AWS's own settings."""

    anonymous: tuple[str, ...] = Field(
        (),
        description="names or globs of public buckets, read without credentials; with those in $HATCHERY_S3_ANONYMOUS",
    )
    requester_pays: tuple[str, ...] = Field(
        (),
        description="names or globs of buckets that bill who reads them, which is agreed to; with those in "
        "$HATCHERY_S3_REQUESTER_PAYS",
    )


class StorageConfig(Settings):
    """Where artifacts are kept, and how S3 is reached."""

    uri: str = Field(
        "runs",
        description="folder or s3://bucket/prefix that receives every artifact; a folder must be shared by all nodes, "
        "and in a Ray job its path absolute",
    )
    patience_s: float = Field(
        21_600, ge=0, description="how long a run waits for a storage that does not answer, a training beside its work"
    )
    s3: S3Config = S3Config()

    @field_validator("uri")
    @classmethod
    def _without_empty_parts(cls, uri: str) -> str:
        """Keys with empty parts are other people's: here, one is a variable that was not set."""
        key = uri.removeprefix("s3://")
        if uri != key and "//" in key:
            raise ValueError(f"{uri!r} has an empty part: write {'s3://' + re.sub('/+', '/', key)!r}")
        return uri


class TrackingConfig(Settings):
    """The MLflow server that is told everything."""

    uri: str | None = Field(
        None,
        description="MLflow tracking URI; default $MLFLOW_TRACKING_URI, else SQLite below a local storage.uri. A login "
        "in it is used and stored nowhere; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD do as well",
    )
    experiment: str = Field(
        "hatchery", min_length=1, max_length=500, description="MLflow experiment that holds the runs"
    )
    patience_s: float = Field(
        21_600,
        ge=0,
        description="how long a stage waits for an MLflow that does not answer at its beginning or end; what a "
        "training has for it meanwhile is kept on disk",
    )


class ComputeConfig(Settings):
    """How the work is spread over a cluster; changes nothing about the result."""

    num_workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        1, description="training processes (one per GPU); [min, max]: goes on with fewer when nodes are lost"
    )
    use_gpu: bool | Literal["auto"] = Field(
        "auto", description="one GPU per worker, waited for; auto: where the cluster has any when the work begins"
    )
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores reserved and torch threads per training process")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    offload: Literal["none", "optimizer"] = Field(
        "none", description="optimizer: fp32 weights, moments and averages of ZeRO 1 to 3 live in the host's memory"
    )
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        4, description="samples per forward pass and process; accumulation is derived; auto: as many as fit"
    )
    memory_limit_gb: float | None = Field(
        None, gt=0, description="for micro_batch auto: memory of a process; default the GPU's, or a share of the host's"
    )
    activation_checkpoint: Literal["none", "block"] = Field(
        "none", description="block: recompute each block's activations in the backward pass"
    )
    compile: bool = Field(
        False,
        description="torch.compile the network: minutes at the first step, needs a C++ compiler; ZeRO 0 to 2",
    )
    loader_workers: int = Field(0, ge=0, description="data loading processes per training process (0: in-process)")
    cache_dir: str | None = Field(
        None, description="local folder of each node for shards from S3; default: the user's, in the temporary folder"
    )
    cache_bytes: int = Field(20 * 2**30, ge=0, description="size of cache_dir; the longest unused shards go")
    max_failures: int = Field(3, ge=-1, description="restarts after lost workers before the run fails (-1: no limit)")
    hang_timeout_s: float = Field(
        900, gt=0, description="a training process that finishes no step for so long counts as dead and is restarted"
    )
    start_timeout_s: float = Field(
        3600,
        gt=0,
        description="the same for each part of its start, the first step included, at which `compile` compiles",
    )
    checkpoint_every_s: float | None = Field(
        600, gt=0, description="longest time between checkpoints, beside the phase's checkpoint_every; null: no limit"
    )
    resize_every_s: float = Field(
        300,
        gt=0,
        description="with [min, max] workers: how often more are looked for; taking them in costs a restart and what "
        "was done since the last checkpoint, so at most checkpoint_every_s",
    )
    checkpoints_kept: int = Field(2, ge=1, description="newest training checkpoints kept in the storage")
    bad_steps_tolerated: int = Field(
        5, ge=0, description="non-finite steps in a row that are skipped; one more goes back to the last checkpoint"
    )
    max_rollbacks: int = Field(3, ge=0, description="times to go back, with fresh data, before the training fails")
    profile_steps: tuple[int, int] | None = Field(
        None, description="[first, last]: these steps of each training are traced by torch.profiler, kept in MLflow"
    )

    @property
    def min_workers(self) -> int:
        """The fewest training processes that a training goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The training processes that a training has while nothing is lost."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _fits_together(self) -> "ComputeConfig":
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers {list(self.num_workers)} must be [min, max]: swap them")  # type: ignore[arg-type]
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload 'optimizer' needs a partitioned optimizer: set zero_stage to 1, 2 or 3")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile does not go with zero_stage 3, which gathers weights by layer: use 0, 1 or 2")
        if self.profile_steps and not 0 < self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(f"profile_steps {list(self.profile_steps)} must be [first, last], from 1 on")
        if self.cache_dir is not None and not os.path.isabs(self.cache_dir):
            raise ValueError(f"cache_dir {self.cache_dir!r} must be a folder of every node: give an absolute path")
        return self


class ModelConfig(Settings):
    """The network; `options` are the arguments of `model.build`."""

    arch: str = Field(description="hat_s | hat | hat_l | ... as `model.build` knows them")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="constructor arguments that differ from the preset; null takes back what an extended file says",
    )

    @field_validator("options")
    @classmethod
    def _without_nulls(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in options.items() if value is not None}

    @model_validator(mode="after")
    def _names_are_known(self) -> "ModelConfig":
        if self.arch not in PRESETS:
            raise ValueError(f"arch {self.arch!r} is none of {', '.join(PRESETS)}{did_you_mean(self.arch, PRESETS)}")
        known = arguments_of(self.arch)
        for name in self.options:
            if name not in known:
                meant = did_you_mean(name, known) or f": it has {', '.join(known)}"
                raise ValueError(f"{self.arch} has no argument {name!r} (model.options.{name}){meant}")
        return self


class DataConfig(Settings):
    """A training set: where its images come from and how they are sharded."""

    source: str = Field(description="folder, s3://bucket/prefix, or photographs: (those that scikit-image ships)")
    include: tuple[str, ...] = Field((), description="glob patterns on the relative path; empty: all images")
    exclude: tuple[str, ...] = Field((), description="glob patterns left out; of the whole path with a leading /")
    samples_per_shard: int = Field(512, ge=1, description="images per WebDataset tar")
    min_side_px: int = Field(64, ge=1, description="images with a shorter side are rejected, with the reason listed")
    max_pixels: int = Field(
        MAX_PIXELS,
        ge=1,
        le=MAX_PIXELS,
        description="images of more pixels are rejected; each crop of one that is no baseline JPEG decodes it whole",
    )
    drop_duplicates: bool = Field(True, description="of files with the same bytes keep the one with the smallest key")
    sub_image_px: int | None = Field(
        None, ge=1, description="cut images into PNG crops of this side, for large ones as DF2K's; null: as they are"
    )
    sub_image_step_px: int = Field(240, ge=1, description="pixels from one such crop to the next")
    max_reject_share: float = Field(0.01, ge=0, le=1, description="share of rejected images that fails the stage")

    @model_validator(mode="after")
    def _sub_images_meet(self) -> "DataConfig":
        if self.sub_image_px is not None and self.sub_image_step_px > self.sub_image_px:
            raise ValueError(
                f"sub_image_step_px {self.sub_image_step_px} is above sub_image_px {self.sub_image_px}, which would "
                f"lose the pixels between: lower it"
            )
        return self


class MixPartConfig(Settings):
    """Sets of `data` that are served as one within a mix."""

    data: tuple[str, ...] = Field(min_length=1, description="names of sets in `data`")
    share: float = Field(gt=0, description="share of all samples, relative to the other parts'")


class PerceptualConfig(Settings):
    """A loss of VGG's features beside the pixel loss."""

    backbone: str = Field(
        description="path (on every node) or URI of VGG-19's or VGG-16's weights in torchvision's layout, yours"
    )
    weight: float = Field(1.0, gt=0, description="of it in the sum; the pixel loss has 1")

    @field_validator("backbone")
    @classmethod
    def _absolute(cls, backbone: str) -> str:
        return storage.normalise(backbone)  # training processes work in another folder

    stage_weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        STAGE_WEIGHTS, min_length=5, max_length=5, description="of the last convolution of each of VGG's stages"
    )

    @model_validator(mode="after")
    def _some_stage(self) -> "PerceptualConfig":
        if not any(self.stage_weights):
            raise ValueError("stage_weights are all 0: raise one, or leave perceptual out")
        return self


class AdversarialConfig(Settings):
    """A loss by a discriminator that learns beside the network."""

    weight: float = Field(0.1, gt=0, description="of it in the sum; the pixel loss has 1")
    lr: float = Field(1e-4, gt=0, description="Adam's learning rate of the discriminator; decays as the network's")
    channels: int = Field(64, ge=4, description="of the discriminator's first layer")


class PhaseConfig(Settings):
    """One kind of training: optimizer, schedule, batch. Several stages share a phase."""

    data: str = Field(description="name of the set in `data`, or of the mix in `mixes`, to train on")
    steps: int | None = Field(None, ge=1, description="optimizer steps; null: minutes says how long")
    minutes: float | None = Field(
        None,
        gt=0,
        description="instead of steps: as many as fit, measured until the first milestone, then fixed; pipeline.budget",
    )
    global_batch: int = Field(32, ge=1, description="samples per optimizer step over all processes")
    patch_px: int = Field(64, ge=8, description="side of the square low-resolution crop")
    lr: float = Field(2e-4, gt=0, description="Adam's learning rate")
    betas: tuple[float, float] = Field((0.9, 0.99), description="Adam's moments")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty added to the gradient, as in torch.optim.Adam")
    milestones: tuple[int | float, ...] = Field(
        (), description="steps, or shares of them between 0 and 1, at which the learning rate is multiplied by gamma"
    )
    gamma: float = Field(0.5, gt=0, le=1, description="factor on the learning rate at each milestone")
    warmup_steps: int = Field(0, ge=0, description="steps of linear rise; needed after start: bicubic")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay per step of the averaged weights")
    loss: Literal["l1", "l2", "charbonnier"] = Field("l1", description="between the network's pixels and the true ones")
    perceptual: PerceptualConfig | None = Field(None, description="a loss of deep features as well; null: none")
    adversarial: AdversarialConfig | None = Field(None, description="a discriminator's loss as well; null: none")
    grad_clip: float | None = Field(None, gt=0, description="largest gradient norm; null: no clipping")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="auto: bf16 autocast where the processor or GPU has it; bf16: also where it is emulated, slowly, "
        "which is said; weights are fp32 always",
    )
    low_res_rounding: Literal["float", "uint8"] = Field(
        "float", description="low-resolution crops as floats (ImageNet recipe) or rounded to uint8"
    )
    degradation: Kind = Field(
        "bicubic",
        description="how low-resolution crops are made: bicubic, or a list of steps (data_prep.degrade_steps)",
    )
    num_streams: int = Field(
        64, ge=1, description="streams of the order: more mix wider; divisible by num_workers x loader_workers"
    )
    crops_per_image: int = Field(1, ge=1, description="crops of each image per epoch, for one decoding")
    on_damage: OnDamage = Field(
        "stop", description="skip: a damaged sample's neighbour takes its place and is named; else the training stops"
    )
    cache_decoded_bytes: int = Field(0, ge=0, description="keep decoded images up to this size; for small sets")
    checkpoint_every: int = Field(
        5000, ge=1, description="steps between checkpoints; compute.checkpoint_every_s makes more where steps are slow"
    )
    log_every: int = Field(
        100, ge=1, description="steps between metrics; more where a training would tell of them over 40,000 times"
    )

    def what(self) -> dict[str, Any]:
        """What decides the result: all but intervals, caches, and the way on for a training that damage stopped.

        Where the perceptual loss finds its backbone is left out; its content counts (`pretrain.survey`).
        """
        never = ("checkpoint_every", "log_every", "cache_decoded_bytes", "on_damage")
        left_out: dict[str, Any] = dict.fromkeys(never, True)
        left_out["perceptual"] = {"backbone"} if self.perceptual else True
        if self.adversarial is None:
            left_out["adversarial"] = True
        if self.degradation == "bicubic":
            left_out["degradation"] = True  # the only one there was: trainings from before the key still count
        if self.minutes is None:
            left_out["minutes"] = True
        return self.model_dump(mode="json", exclude=left_out)

    def milestones_of(self, steps: int | None) -> list[float]:
        """The milestones in steps of a training of `steps`; without shares while that is not known."""
        if steps is None:
            return [at for at in self.milestones if isinstance(at, int)]
        return [at if isinstance(at, int) else at * steps for at in self.milestones]

    @property
    def first_milestone_share(self) -> float:
        """The share of a training with minutes after which its steps must be known: then its rate first falls."""
        return float(self.milestones[0]) if self.milestones else 1.0

    @property
    def length(self) -> str:
        """How long the training is, in words."""
        return f"{self.steps} steps" if self.steps else f"{self.minutes:g} minutes"

    @field_validator("milestones")
    @classmethod
    def _whole_steps(cls, milestones: tuple[int | float, ...]) -> tuple[int | float, ...]:
        found = tuple(int(at) if isinstance(at, float) and at.is_integer() and at else at for at in milestones)
        wrong = [at for at in found if isinstance(at, float) and not 0 < at < 1]
        if wrong:
            raise ValueError(f"{wrong[0]:g} is no step and no share between 0 and 1: use one of them")
        if len({type(at) for at in found}) > 1:
            raise ValueError(f"{list(found)} mixes steps with shares of them: use one kind")
        return found

    @model_validator(mode="after")
    def _one_length(self) -> "PhaseConfig":
        if (self.steps is None) == (self.minutes is None):
            given = "exclude one another: set one of them to null" if self.steps else "are both missing: give one"
            raise ValueError(f"steps and minutes {given}")
        if self.minutes is not None and any(isinstance(at, int) for at in self.milestones):
            raise ValueError(
                f"milestones {list(self.milestones)} must be shares such as 0.6: minutes have no steps yet"
            )
        return self

    @model_validator(mode="after")
    def _milestones_rise(self) -> "PhaseConfig":
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {list(self.milestones)} must rise strictly: sort them")
        return self


class TrainingConfig(Settings):
    """One node of the recipe's graph: a network of one scale, trained in one phase."""

    scale: Literal[1, 2, 3, 4, 8] = Field(description="upscaling factor; 1: restoration without upscaling")
    phase: str = Field(description="name of the phase in `phases`")
    init_from: str | None = Field(None, description="an earlier training to start from; other scale: a cascade stage")
    init_weights: str | None = Field(
        None, description="weights to start from, any scale: path or URI of .pth or .safetensors, models:/NAME@alias"
    )
    start: Literal["published", "bicubic"] = Field(
        "published",
        description="without init_from: the paper's random start, or bicubic interpolation exactly",
    )
    seed: int = Field(0, description="of the network's random start and of what drop path drops")

    @model_validator(mode="after")
    def _one_start(self) -> "TrainingConfig":
        given = [key for key in ("init_from", "init_weights") if getattr(self, key)]
        if self.start != "published":
            given.append("start")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude one another: a training has one start, keep one of them")
        return self


class ValidationConfig(Settings):
    """A look at the averaged weights while they are trained, on images of the gate's first set."""

    every: int = Field(0, ge=0, description="steps between two validations; 0: none")
    max_images: int = Field(8, ge=1, description="the set's first images")
    pictures: int = Field(2, ge=0, description="comparison pictures per validation, in the stage's MLflow run")
    export: Literal["last", "best"] = Field(
        "last", description="which averaged weights a training ends with: the last, or the best by the gate's metric"
    )

    @model_validator(mode="after")
    def _best_of_some(self) -> "ValidationConfig":
        if self.export == "best" and not self.every:
            raise ValueError("export 'best' needs validations to choose by: set every")
        return self


class CascadeConfig(Settings):
    """How weights of one scale start another (see model.init.transfer)."""

    tail: Literal["fresh", "bicubic", "resample"] = Field("resample", description="what becomes of the upsampler")


class HoldOutConfig(Settings):
    """Images of a set in `data` that judge and never train; their names decide which (pipeline.hold_out)."""

    data: str = Field(description="name of the set in `data` that they are taken from")
    share: float = Field(0.1, gt=0, lt=1, description="of the set's images")
    min_images: int = Field(2, ge=1, description="at least so many")
    max_images: int = Field(8, ge=1, description="at most so many")

    @model_validator(mode="after")
    def _in_order(self) -> "HoldOutConfig":
        if self.min_images > self.max_images:
            raise ValueError(f"min_images {self.min_images} is above max_images {self.max_images}: lower it")
        return self


class EvaluateConfig(Settings):
    """Benchmarks by the published protocol."""

    sets: dict[Name, str] = Field(
        default_factory=dict,
        description="name -> folder with HR/ and LR_bicubic/X2 ... (or GTmod12/, LRbicx2), of SelfExSR's layout, or of "
        "images; or photographs:",
    )
    hold_out: dict[str, HoldOutConfig] = Field(
        default_factory=dict, description="name -> images of a training set that judge instead of training"
    )
    include: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="name -> glob patterns of its images")
    degrade: dict[str, tuple[Step, ...]] = Field(
        default_factory=dict,
        description="name -> steps that make its low-resolution images, instead of bicubic; scale 1 needs them, or LQ/",
    )
    models: tuple[str, ...] = Field((), description="trainings to evaluate; empty: those that nothing starts from")
    pictures: int = Field(2, ge=0, description="so many of the worst images, and of the best, as pictures per set")
    protocol: Protocol = Protocol()

    def images(self, name: str, scale: int, passed_over: PassedOver | None = None) -> list[BenchmarkImage]:
        """A set's images at a scale; `passed_over` counts what is none. ValueError as `read_set`."""
        return read_set(self.sets[name], scale, self.include.get(name, ()), self.degrade.get(name, ()), passed_over)


class RegistryConfig(Settings):
    """The MLflow model registry and the gate before `champion`."""

    name: ModelName = Field(description="registered model name; the scale is appended: NAME-x2")
    gate: GateConfig
    anchor: str | None = Field(
        None, description="models:/NAME/VERSION that gate.not_worse is asked about as well as the champion; null: none"
    )


class Places(Settings):
    """Where things run and are kept; never part of what they are."""

    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_serializer(mode="wrap")
    def _without_secrets(self, dump: SerializerFunctionWrapHandler) -> Any:
        """Whatever is stored or shown of it has no login in a URI; the object itself keeps what it was given."""
        return redacted(dump(self))


class Recipe(Places):
    """Everything about one run of the pipeline."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=200, description="of the run in MLflow")]
    seed: int = Field(0, description="seed of shard order, sample order, crops and initialization")
    model: ModelConfig
    data: dict[Name, DataConfig]
    mixes: dict[Name, tuple[MixPartConfig, ...]] = Field(
        default_factory=dict, description="name -> sets served together by shares, exactly and whatever the workers"
    )
    phases: dict[Name, PhaseConfig]
    trainings: dict[Name, TrainingConfig]
    validation: ValidationConfig = ValidationConfig()
    cascade: CascadeConfig = CascadeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    registry: RegistryConfig

    @model_validator(mode="after")
    def _cross_checks(self) -> "Recipe":
        _check_references(self)
        for name, phase in self.phases.items():
            check_batch(f"phases.{name}", phase, self.compute)
        _check_crops(self)
        _check_evaluation(self)
        _check_networks(self)
        return self

    @property
    def final_trainings(self) -> list[str]:
        """The trainings to be judged and registered: the named ones, else those that nothing starts from."""
        if self.evaluate.models:
            return list(self.evaluate.models)
        sources = {training.init_from for training in self.trainings.values()}
        return [name for name in self.trainings if name not in sources]

    def scales_judged(self, name: str) -> set[int]:
        """At which scales a set of `evaluate` is looked at: those of the final trainings; to validate by, of all."""
        validates = self.validation.every and name == self.registry.gate.validation_set
        names = list(self.trainings) if validates else self.final_trainings
        return {self.trainings[training].scale for training in names}

    @property
    def used_data(self) -> set[str]:
        """The sets of `data` that some training trains on, by itself or in a mix."""
        return {name for phase in self.used_phases for name in self.data_of(phase.data)}

    @property
    def used_phases(self) -> list[PhaseConfig]:
        """The phases that some training has, in the order of `phases`; others may come from an extended file."""
        names = {training.phase for training in self.trainings.values()}
        return [phase for name, phase in self.phases.items() if name in names]

    def data_of(self, name: str) -> tuple[str, ...]:
        """The sets of `data` behind the name of a set or a mix."""
        return tuple(data for part in self.mixes[name] for data in part.data) if name in self.mixes else (name,)

    @property
    def digest(self) -> str:
        """sha256 of what is trained, without where."""
        values = self.model_dump(mode="json", exclude={"storage", "tracking", "compute"})
        for phase in values["phases"].values():
            if phase["minutes"] is None:
                del phase["minutes"]  # runs of before there was the key are found again
        if not values["evaluate"]["hold_out"]:
            del values["evaluate"]["hold_out"]
        return digest_of(values)


def _check_references(recipe: Recipe) -> None:
    if not recipe.trainings:
        raise ValueError("trainings is empty: name at least one training")
    seen: list[str] = []
    for name, training in recipe.trainings.items():
        if training.phase not in recipe.phases:
            raise ValueError(
                f"trainings.{name}.phase {training.phase!r} is not one of phases: {', '.join(recipe.phases)}"
                f"{did_you_mean(training.phase, recipe.phases)}"
            )
        if training.init_from and training.init_from not in seen:
            raise ValueError(
                f"trainings.{name}.init_from {training.init_from!r} is not an earlier training "
                f"(earlier: {', '.join(seen) or 'none'}): a cascade starts each scale from one trained before it"
                f"{did_you_mean(training.init_from, seen)}"
            )
        seen.append(name)
    for name in recipe.mixes:
        unknown = [data for data in recipe.data_of(name) if data not in recipe.data]
        if unknown:
            known, meant = ", ".join(recipe.data), did_you_mean(unknown[0], recipe.data)
            raise ValueError(f"mixes.{name} asks for {unknown[0]!r}, not one of data: {known}{meant}")
        if name in recipe.data:
            raise ValueError(f"{name!r} is in data and in mixes: give the mix another name")
    for name, phase in recipe.phases.items():
        if phase.data not in (*recipe.data, *recipe.mixes):
            sets = (*recipe.data, *recipe.mixes)
            meant = did_you_mean(phase.data, sets)
            raise ValueError(f"phases.{name}.data {phase.data!r} is not one of data: {', '.join(sets)}{meant}")


def check_batch(key: str, phase: PhaseConfig, compute: ComputeConfig) -> None:
    """ValueError where the phase at a key has a global batch that cannot be spread as `compute` says."""
    if phase.global_batch < compute.max_workers:
        raise ValueError(
            f"{key}.global_batch {phase.global_batch} is less than compute.num_workers {compute.max_workers}: "
            f"use fewer workers, the global batch is the recipe"
        )
    if compute.micro_batch != "auto" and phase.global_batch < compute.micro_batch:
        raise ValueError(
            f"{key}.global_batch {phase.global_batch} is less than compute.micro_batch {compute.micro_batch}: "
            f"lower compute.micro_batch"
        )


def _check_crops(recipe: Recipe) -> None:
    for name, training in recipe.trainings.items():
        phase = recipe.phases[training.phase]
        try:
            check(phase.degradation, training.scale)
        except ValueError as error:
            raise ValueError(f"trainings.{name} by phases.{training.phase}: {error}") from error
        needed = phase.patch_px * training.scale
        for data in recipe.data_of(phase.data):
            side = recipe.data[data].sub_image_px
            if side is not None and side < needed:
                raise ValueError(
                    f"data.{data}.sub_image_px {side} is less than the crop of {needed} px that trainings.{name} takes "
                    f"(patch_px {phase.patch_px} at scale {training.scale}): use at least {needed}"
                )


def _check_evaluation(recipe: Recipe) -> None:
    _check_hold_out(recipe)
    sets = [*recipe.evaluate.sets, *recipe.evaluate.hold_out]
    for name in recipe.evaluate.models:
        if name not in recipe.trainings:
            known, meant = ", ".join(recipe.trainings), did_you_mean(name, recipe.trainings)
            raise ValueError(f"evaluate.models {name!r} is not one of trainings: {known}{meant}")
    for key in ("include", "degrade"):
        for name in getattr(recipe.evaluate, key):
            if name not in sets:
                known, meant = ", ".join(sets) or "none", did_you_mean(name, sets)
                raise ValueError(f"evaluate.{key} {name!r} is not one of evaluate.sets: {known}{meant}")
    for name, steps in recipe.evaluate.degrade.items():
        for scale in recipe.scales_judged(name):
            try:
                check(steps, scale)
            except ValueError as error:
                raise ValueError(f"evaluate.degrade.{name}: {error}") from error
    for name in recipe.registry.gate.sets:
        if name not in sets:
            raise ValueError(
                f"registry.gate asks about {name!r}, not one of evaluate.sets: {', '.join(sets) or 'none'}"
                f"{did_you_mean(name, sets)}"
            )
    if recipe.registry.gate.metric == "psnr_rgb" and not recipe.evaluate.protocol.rgb:
        raise ValueError("registry.gate.metric psnr_rgb is not measured: set evaluate.protocol.rgb=true")
    scales = [recipe.trainings[name].scale for name in recipe.final_trainings]
    for scale in scales:
        if scales.count(scale) > 1:
            raise ValueError(
                f"{scales.count(scale)} trainings of scale {scale} are final ({', '.join(recipe.final_trainings)}), "
                f"but one model per scale is registered: choose by evaluate.models"
            )


def _check_hold_out(recipe: Recipe) -> None:
    for name, held in recipe.evaluate.hold_out.items():
        if name in recipe.evaluate.sets:
            raise ValueError(f"{name!r} is in evaluate.sets and in evaluate.hold_out: give one of them another name")
        if held.data not in recipe.data:
            known, meant = ", ".join(recipe.data), did_you_mean(held.data, recipe.data)
            raise ValueError(f"evaluate.hold_out.{name}.data {held.data!r} is not one of data: {known}{meant}")


def _check_networks(recipe: Recipe) -> None:
    for training in {t.scale: t for t in recipe.trainings.values()}.values():
        try:
            multiple = configure(recipe.model.arch, training.scale, **recipe.model.options).multiple
        except ValueError as error:
            raise ValueError(f"model.options: {error}") from error
        for name, phase in recipe.phases.items():
            if phase.patch_px % multiple:
                fitting = max(phase.patch_px // multiple, 1) * multiple
                raise ValueError(
                    f"phases.{name}.patch_px {phase.patch_px} is no multiple of the network's window {multiple}: "
                    f"use {fitting}"
                )


def load_recipe(path: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a YAML file (or the name of one in configs/recipe) with `a.b=c` overrides on top.

    Raises ConfigError with one line per fault, each naming the key, the value and the remedy.
    """
    return load_settings(Recipe, config_files.find(path, "recipe"), overrides or [])


def tracking_uri(places: Places) -> str:
    """The MLflow URI of a recipe or domain: its own, $MLFLOW_TRACKING_URI, or SQLite below a local storage.uri."""
    uri = places.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    if not storage.is_local(places.storage.uri):
        raise ConfigError(
            f"tracking.uri is not set and storage.uri {places.storage.uri!r} is not a local folder: "
            f"give --set tracking.uri=http://host:5000 or MLFLOW_TRACKING_URI"
        )
    folder = storage.normalise(places.storage.uri)
    if re.search(r"\?|%[0-9A-Fa-f]{2}", folder):
        raise ConfigError(
            f"storage.uri {places.storage.uri!r} has ? or %.. in its name, which MLflow takes for more than a name: "
            f"call the folder something else, or give tracking.uri"
        )
    return f"sqlite:///{folder}/mlflow.db"
