"""The driver's side of a training: what is to be trained, and the Ray Train run that does it.

Does not import DeepSpeed: a worker must set its environment before that, and a driver has no use for it
(tests/unit/test_imports.py checks).
"""

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
from pydantic import Field

from data_prep import storage
from pipeline import checkpoint, cluster, signals
from pipeline.artifact import Artifact
from pipeline.config import (
    ComputeConfig,
    ModelConfig,
    PhaseConfig,
    Settings,
    TrainingConfig,
    ValidationConfig,
    digest_of,
)
from pipeline.errors import Stopped
from pipeline.monitor import Monitor, Record
from pipeline.validate import ImagePair

STORAGE_RETRIES = 5
"""Times that a training is begun again without getting further while reading from the storage fails."""


class TrainJob(Settings):
    """All that a worker needs to know; plain values, so that it travels to any node."""

    name: str
    model: ModelConfig
    phase: PhaseConfig
    training: TrainingConfig
    compute: ComputeConfig
    seed: int
    shards_uri: str
    init: Artifact | None
    validation: ValidationConfig = ValidationConfig()
    gate_metric: str = "psnr_y"
    checkpoints_uri: str
    resume_from: str | None = Field(None, description="URI of a checkpoint to start from where Ray Train knows none")
    attempt: str = Field("", description="folder of this attempt's checkpoints below checkpoints_uri")
    data_offset: int = Field(0, description="steps of data passed over because they led to non-finite losses")

    @property
    def digest(self) -> str:
        """What a checkpoint must have been trained as to be resumed: everything but where it runs."""
        places = {
            "compute",
            "shards_uri",
            "checkpoints_uri",
            "init",
            "phase",
            "data_offset",
            "resume_from",
            "attempt",
        }
        places |= {"validation", "gate_metric"}
        values = self.model_dump(mode="json", exclude=places) | {"phase": self.phase.what()}
        return digest_of([values, self.init.digest if self.init else None])


def run_training(
    job: TrainJob,
    handle: Callable[[Record], None],
    images: list[ImagePair] | None = None,
    check: Callable[[], object] = lambda: None,
) -> ray.train.Checkpoint:
    """Train to the end (from the last checkpoint at job.checkpoints_uri, if any) and give the last checkpoint.

    handle: called in a thread with every record. images: to validate on. check: raises where this run has lost its
    lock. Raises ValueError for what a worker raised as such, Stopped when the process was asked to end (SIGTERM,
    Ctrl-C) and a checkpoint was made, else Ray Train's TrainingFailedError.
    """
    references = {"images": ray.put(images) if images else None}
    # decided once: a node that is lost for an hour must not turn a training on GPUs into one on CPUs
    compute = job.compute.model_copy(update={"use_gpu": cluster.has_gpus(job.compute)})
    job = job.model_copy(update={"compute": compute})
    failed = None
    with Monitor(handle) as monitor, signals.asking(monitor.request_stop) as asked:
        for _ in range(job.compute.max_rollbacks + 1):
            result = _fit(job, monitor, references, check)
            outcome = result.return_value or {}
            if outcome.get("kind") == "stopped":
                note = f"{job.name} was asked to stop at step {outcome['step']} and saved a checkpoint"
                raise Stopped(note, asked.exit_code)
            if outcome.get("kind") != "roll_back":
                # none where the last attempt had come to the end, and only what follows it was missing
                made = result.checkpoint or checkpoint.recover(job.checkpoints_uri)
                assert made is not None, "a finished training has a checkpoint"
                return checkpoint.open_at(made) if isinstance(made, str) else made
            job = job.model_copy(update={"data_offset": outcome["data_offset"]})
            target = _way_back(job.checkpoints_uri, outcome["checkpoint"], failed)
            failed = outcome["checkpoint"]
            handle({"step": outcome["step"], "warning": f"{outcome['reason']}: going back to {target}"})
    raise ValueError(
        f"{job.name}: {outcome['reason']}, after going back {job.compute.max_rollbacks} times: "
        f"lower the learning rate, set grad_clip, or use precision fp32"
    )


def _way_back(place: str, last: str | None, failed: str | None) -> str:
    """Where a training goes back to, in words: past the last checkpoint where that has failed before."""
    if last is not None and last == failed and checkpoint.discard(place, last):
        return f"the checkpoint before {last}, which failed twice"
    return "the last checkpoint"


def _fit(
    job: TrainJob, monitor: Monitor, references: dict[str, Any], check: Callable[[], object] = lambda: None
) -> Any:
    """The Ray Train run, begun again while it gets further between failures, or the storage was out of reach."""
    reached, stuck = -1, 0
    while True:
        try:
            kept = job.compute.checkpoints_kept
            attempt, newest = checkpoint.begin_attempt(job.checkpoints_uri, kept, check)
            return _trainer(
                job.model_copy(update={"attempt": attempt, "resume_from": newest}), monitor, references
            ).fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError, storage.StorageError) as failure:
            errors = [failure, *getattr(failure, "worker_failures", {}).values()]
            for error in errors:
                if isinstance(error, ValueError) and not _may_pass(error):
                    raise error from None
            unread = next(filter(_may_pass, errors), None)
            waited_s = _wait_for_storage(job.checkpoints_uri)
            stuck = 0 if monitor.last_step > reached or waited_s else stuck + 1
            if stuck > (STORAGE_RETRIES if unread else 0):
                raise (unread or failure) from None
            reached = monitor.last_step
            why = "lost its processes again and again"
            if unread or waited_s:
                why = f"the storage was away, waited {waited_s:.0f} s{f' ({unread})' if unread else ''}"
            monitor.handle({"step": max(reached, 0), "warning": f"{why}: going on from the last checkpoint"})


def _may_pass(error: Exception) -> bool:
    """Whether a worker failed because the storage did not answer; what is damaged stays so."""
    return isinstance(error, storage.StorageError) and not isinstance(error, storage.DamageError)


def _wait_for_storage(uri: str) -> float:
    """Wait until the storage answers; how long it did not, in s. StorageError where it stays away."""
    begin, away = time.monotonic(), False
    while True:
        try:
            storage.exists(storage.join(uri, "any"))
            return time.monotonic() - begin if away else 0.0
        except storage.StorageError:
            away = True
            if time.monotonic() - begin > checkpoint.UPLOAD_PATIENCE_S:
                raise
            time.sleep(5)


class _Trainer(ray.train.torch.TorchTrainer):
    """Leaves SIGINT to `pipeline.signals`; an interrupt ends the training on the cluster as well.

    Ray's own handler stays when `fit` is over and keeps its controller: in later stages it would swallow the signal.
    """

    controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def fit(self) -> Any:
        """As Ray's."""
        try:
            return super().fit()
        except KeyboardInterrupt:
            with suppress(ray.exceptions.RayError):  # it dies of it, and says so
                ray.get(self.controller.abort.remote(), timeout=20)
            raise


def _trainer(job: TrainJob, monitor: Monitor, references: dict[str, Any]) -> Any:
    filesystem, folder = storage.filesystem(job.checkpoints_uri)
    compute = job.compute
    use_gpu = cluster.has_gpus(compute)  # settled by run_training
    # Ray's own check of workers that do not answer; it passes the variable on to the processes that read it
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(compute.hang_timeout_s)
    return _Trainer(
        _worker,
        train_loop_config={
            "job": job.model_dump(mode="json"),
            "mailbox": monitor.mailbox,
            "use_gpu": use_gpu,
            **references,
        },
        torch_config=ray.train.torch.TorchConfig(timeout_s=math.ceil(compute.hang_timeout_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.num_workers,
            elastic_resize_monitor_interval_s=compute.resize_every_s,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": compute.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=job.attempt,
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=compute.checkpoints_kept),
        ),
    )


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    if not config["use_gpu"]:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    from pipeline.train import train_worker

    return train_worker(config)
