"""The driver's side of a training: what is to be trained, and the Ray Train run that does it.

Does not import DeepSpeed: a worker must set its environment before that, and a driver has no use for it
(tests/unit/test_imports.py checks).
"""

import functools
import math
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
from pydantic import Field

from data_prep import storage
from pipeline import checkpoint, cluster, signals, waiting
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

LOSS_RETRIES = 1
"""Times that a training is begun again without a further checkpoint where its processes are lost.

Each time Ray Train restarts them `compute.max_failures` times itself.
"""


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
    patience_s: float = Field(21_600, description="how long the storage is waited for, s")
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
            "patience_s",
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
    Ctrl-C) and a checkpoint was made, in the last step as well, else Ray Train's TrainingFailedError.
    """
    references = {"images": ray.put(images) if images else None}
    # decided once: a node that is lost for an hour must not turn a training on GPUs into one on CPUs
    compute = job.compute.model_copy(update={"use_gpu": cluster.has_gpus(job.compute)})
    job = job.model_copy(update={"compute": compute})
    with Monitor(handle) as monitor, signals.asking(monitor.request_stop) as asked:
        last = _fit_and_go_back(job, monitor, references, asked, check)
    if asked.signal is not None:  # after the training could heed it: the run is to end all the same
        raise Stopped(f"{job.name} was asked to stop when it was trained, and its checkpoint saved", asked.exit_code)
    return last


def _fit_and_go_back(
    job: TrainJob,
    monitor: Monitor,
    references: dict[str, Any],
    asked: signals.Asked,
    check: Callable[[], object],
) -> ray.train.Checkpoint:
    """The last checkpoint of a training that goes back, with fresh data, where its steps are not finite."""
    failed = None
    for _ in range(job.compute.max_rollbacks + 1):
        result = _fit(job, monitor, references, asked, check)
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
        monitor.handle({"step": outcome["step"], "warning": f"{outcome['reason']}: going back to {target}"})
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
    job: TrainJob,
    monitor: Monitor,
    references: dict[str, Any],
    asked: signals.Asked,
    check: Callable[[], object] = lambda: None,
) -> Any:
    """The Ray Train run, begun again while checkpoints are committed between failures, or the storage was away."""
    known: set[str] | None = None
    stuck = 0
    while True:
        try:
            kept = job.compute.checkpoints_kept
            attempt, newest = checkpoint.begin_attempt(job.checkpoints_uri, kept, check)
            if known is None:
                known = checkpoint.committed(job.checkpoints_uri)
            begun = job.model_copy(update={"attempt": attempt, "resume_from": newest})
            return _trainer(begun, monitor, references).fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError, storage.StorageError) as failure:
            errors = [failure, *getattr(failure, "worker_failures", {}).values()]
            for error in errors:
                if isinstance(error, ValueError) and not _may_pass(error):
                    raise error from None
            unread = next(filter(_may_pass, errors), None)
            ask = functools.partial(checkpoint.committed, job.checkpoints_uri)
            say = functools.partial(_warn, monitor)
            waited_s, there = waiting.until_it_answers(ask, job.patience_s, lambda: asked.signal is None, say)
            if asked.signal is not None:
                note = f"{job.name} was asked to stop when it was to begin again; its last checkpoint is kept"
                raise Stopped(note, asked.exit_code) from None
            assert there is not None, "waited for, unless asked to stop"
            stuck = 0 if there - (known or set()) or waited_s else stuck + 1
            known = (known or set()) | there
            if stuck > (waiting.RETRIES if unread else LOSS_RETRIES):
                raise (unread or failure) from None
            why = "lost its processes again and again"
            if unread or waited_s:
                why = f"the storage was away, waited {waited_s:.0f} s{f' ({unread})' if unread else ''}"
            _warn(monitor, f"{why}: going on from the last checkpoint")


def _warn(monitor: Monitor, text: str) -> None:
    monitor.handle({"step": max(monitor.last_step, 0), "warning": text})


def _may_pass(error: Exception) -> bool:
    """Whether a worker failed because the storage did not answer; what is damaged stays so."""
    return isinstance(error, storage.StorageError) and not isinstance(error, storage.DamageError)


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
        # of collectives: who waits for a process that still compiles is not to give up before it
        torch_config=ray.train.torch.TorchConfig(
            timeout_s=math.ceil(max(compute.start_timeout_s, compute.hang_timeout_s))
        ),
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
