"""One training: what every Ray Train worker runs. Reads from top to bottom: step, log, validate, save.

The result depends on the recipe alone: sample order, crops and global batches are the same for any number of
workers, and a run that was stopped anywhere continues from its last checkpoint as if it had not been.
"""

import faulthandler
import functools
import math
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from data_prep import storage
from data_prep.loader import Batch
from model.blocks import DropPath, set_drop_path_draws
from pipeline import checkpoint, zero
from pipeline.communication import CommunicationProbe
from pipeline.config import digest_of
from pipeline.launch import TrainJob
from pipeline.monitor import StopWatch
from pipeline.saving import SaveWatch
from pipeline.schedule import learning_rate
from pipeline.window import Window
from pipeline.worker import Run, fresh_network, set_up

MOST_LOGS = 40_000
"""Times that a training tells of its metrics: MLflow keeps a row for each of them and each time."""
BAD_RANKS_NAMED = 4
"""So many ranks of a step that was not applied are named at once; all of them are in MLflow."""
TRACE_PATIENCE_S = 60  # training waits meanwhile: a trace is not worth more


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train to the phase's last step and say how it ended (see pipeline.launch.run_training).

    config: {"job": TrainJob as dict, "mailbox": actor handle, "images": reference to validation images or None}.
    """
    job = TrainJob.model_validate(config["job"])
    with _not_hanging(job.compute.start_timeout_s, job.compute.hang_timeout_s) as alive:
        run = set_up(job, config["mailbox"], config["images"], alive.rearm)
        outcome = _train(run, alive)
        if run.validator is not None:
            run.validator.wait(alive.rearm)
        # calls arrive in order: once this one is answered, all records are there, and the process may end
        ray.get(run.mailbox.stop_requested.remote())
    return outcome


class _Alarm:
    """Ends this process, with every thread's traceback in its log, unless `rearm` is called in time.

    Each part of the start may take `start_s`, each step after the first one `step_s`. Works even where the interpreter
    is stuck in a library; Ray sees a dead worker and restarts the group.
    """

    def __init__(self, start_s: float, step_s: float) -> None:
        self.timeout_s, self.step_s = start_s, step_s
        self.armed_at = float("-inf")

    def started(self) -> None:
        """A step is done: what is compiled at the first one is compiled."""
        if self.timeout_s != self.step_s:
            self.timeout_s, self.armed_at = self.step_s, float("-inf")
        self.rearm()

    def rearm(self) -> None:
        """A sign of life."""
        if time.monotonic() - self.armed_at > min(1.0, self.timeout_s / 10):
            self.armed_at = time.monotonic()
            faulthandler.dump_traceback_later(self.timeout_s, exit=True)


@contextmanager
def _not_hanging(start_s: float, step_s: float) -> Iterator[_Alarm]:
    alarm = _Alarm(start_s, step_s)
    alarm.rearm()
    try:
        yield alarm
    finally:
        faulthandler.cancel_dump_traceback_later()


def _train(run: Run, alive: _Alarm) -> dict[str, Any]:
    phase, every = run.job.phase, run.job.validation.every
    window, watch, probe, bad_steps = Window(run.device), StopWatch(run.mailbox), CommunicationProbe(), 0
    metrics: dict[str, float] = {}
    # one clock for all: rank 0's
    saves = SaveWatch(run.job.compute.checkpoint_every_s if run.rank == 0 else None)
    trace, due, stop = _Trace(run), False, False
    run.budget.start_clock()
    while not run.budget.is_over(run.step):
        last, logging = run.step + 1 == run.budget.steps, (run.step + 1) % log_interval(run) == 0
        if last or logging:
            probe.begin()
        trace.before_step()
        rate = learning_rate(run.step, phase, run.budget.steps)
        wishes = {"want_stop": run.rank == 0 and watch.poll(), "want_save": saves.poll()}
        keys = step(run, window, rate, **wishes, want_settle=run.rank == 0 and run.budget.is_due)
        alive.started()
        trace.after_step()
        bad_steps = 0 if run.optimizer.applied else bad_steps + 1
        if bad_steps:
            _tell_of_bad_step(run, keys)
            if last or bad_steps > run.job.compute.bad_steps_tolerated:
                return _roll_back(run, bad_steps)
        if run.optimizer.settle_wanted and run.budget.steps is None:
            run.report({"settled": run.budget.settle(run.step)})
            due = True
        if last or logging:
            metrics = _log(run, window, probe.end(), rate)
        if run.validator is not None and (last or (every and run.step % every == 0)):
            metrics |= _validate(run, alive)
            window.forget_memory()
        stop = stop or run.optimizer.stop_wanted
        due = due or run.optimizer.save_wanted or run.step % phase.checkpoint_every == 0 or last or stop
        if due and not bad_steps:  # amid bad steps the weights may be the cause: going back must not lead to them
            uploaded = save(run, metrics)
            if saves.preempted:
                run.report({"warning": f"a node is being taken away: saved a checkpoint at step {run.step}"})
            saves.saved(uploaded)
            due = False
            if stop and not last:
                return {"kind": "stopped", "step": run.step}
    return {"kind": "done", "step": run.step}


def log_interval(run: Run) -> int:
    """Steps between two logs: the phase's, or more where there would be too many."""
    return max(run.job.phase.log_every, -(-(run.budget.steps or 0) // MOST_LOGS))


def step(run: Run, window: Window, rate: float, **wishes: bool) -> list[str]:
    """One optimizer step at a learning rate, and the averages after it; the names of this rank's samples.

    wishes: of this rank, as `GuardedAdam.begin_step` takes them.
    """
    for group in run.engine.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.begin_step(**wishes)
    keys = _global_batch(run, window)
    run.step += 1
    window.steps += 1
    if run.adversary is not None:
        run.adversary.step(run.passes, rate / run.job.phase.lr, run.optimizer.applied)
    if run.optimizer.applied:
        run.ema.update()
    return keys


def _global_batch(run: Run, window: Window) -> list[str]:
    """This rank's micro-batches of one optimizer step, and the step (DeepSpeed takes it after the last one)."""
    keys: list[str] = []
    draws = _drop_path_draws(run)
    for number in range(run.passes):
        with window.timing("data_wait_s"):
            batch = next(run.batches)
            keys += batch.keys
        set_drop_path_draws(run.drop_paths, draws[number * run.micro_batch :][: max(1, len(batch.keys))])
        with window.timing("forward_s"):
            loss, seen = _weighted_loss(run, batch)
            run.optimizer.add_loss(loss)
        with window.timing("backward_s"):
            run.engine.backward(loss)
            if run.adversary is not None and seen is not None:
                run.adversary.observe(*seen)
        with window.timing("optimizer_s"):
            run.engine.step()
        window.add(loss)
    return keys


def _drop_path_draws(run: Run) -> Tensor:
    """What this rank's samples of the step drop, (samples, blocks, branches), and a row for passes without samples.

    Drawn for the whole global batch, so that it is the sample that counts and not the rank.
    """
    generator = torch.Generator().manual_seed(int(digest_of([run.job.seed, run.step])[:15], 16))
    size = (run.job.phase.global_batch, len(run.drop_paths), DropPath.BRANCHES)
    mine = torch.rand(size, generator=generator)[run.rank :: run.world_size]
    draws = torch.cat([mine, torch.ones(1, *size[1:])])
    # pinned, else the copy waits until the GPU has nothing left to do
    return draws.pin_memory().to(run.device, non_blocking=True) if run.device.type == "cuda" else draws


def _weighted_loss(run: Run, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, float] | None]:
    """The micro-batch's mean loss times its share of the global batch, relative to an even share; what a discriminator
    is to see of it: the network's images, the real ones, the share.

    DeepSpeed takes the mean over ranks and passes, and the shares differ where the numbers do not divide. A rank
    without samples takes part with a loss of zero.
    """
    if not batch.keys:
        side = run.job.phase.patch_px
        return run.engine(torch.zeros(1, 3, side, side, device=run.device)).float().sum() * 0, None
    high_res = batch.high_res.to(run.device, non_blocking=True)
    pred = run.engine(batch.low_res.to(run.device, non_blocking=True)).float()
    loss = run.loss(pred, high_res)
    weight = len(batch.keys) * run.passes * run.world_size / run.job.phase.global_batch
    return loss if weight == 1 else loss * weight, (pred, high_res, weight)


def _log(run: Run, window: Window, communication_s: float, rate: float) -> dict[str, float]:
    """Collective: the window's metrics, told to the driver; every node tells of its own usage."""
    metrics = window.close(run.job.phase.global_batch)
    metrics |= {"learning_rate": rate, "grad_norm": run.optimizer.grad_norm, "communication_s": communication_s}
    if run.adversary is not None:
        metrics |= run.adversary.metrics()
    metrics["percent_of_peak"] = 100 * metrics["images_per_s"] * run.peak_share_per_image_per_s
    run.report({"metrics": metrics, "steps": run.budget.expected(run.step)})
    if run.system is not None and (usage := run.system.look()):
        run.mailbox.post.remote({"step": run.step, "system": usage})
    return metrics


def _validate(run: Run, alive: _Alarm) -> dict[str, float]:
    """Collective: judge the averaged weights, keep the best."""
    assert run.validator is not None
    weights = zero.gathered_ema(run.engine, run.ema, run.job.compute.zero_stage)
    network = fresh_network(run.job).to(run.device).eval()
    record = run.validator.judge(network, weights, run.step, run.job.validation.pictures, alive.rearm)
    run.report(record)
    metrics: dict[str, float] = record["metrics"]
    return metrics


class _Trace:
    """torch.profiler over the steps that compute.profile_steps names, on rank 0; the trace goes to the storage."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.steps = run.job.compute.profile_steps if run.rank == 0 else None
        self.profiler: torch.profiler.profile | None = None

    def before_step(self) -> None:
        """Begin with the first step."""
        if self.steps and self.profiler is None and self.steps[0] <= self.run.step + 1 <= self.steps[1]:
            self.profiler = torch.profiler.profile(profile_memory=True)
            self.profiler.start()

    def after_step(self) -> None:
        """End after the last step and publish."""
        if self.profiler is None or self.steps is None or self.run.step < self.steps[1]:
            return
        self.profiler.stop()
        name = f"profile-steps-{self.steps[0]}-{self.steps[1]}.json.gz"
        uri = storage.join(self.run.job.checkpoints_uri, name)
        try:
            self._publish(name, uri)
        except storage.StorageError as error:
            self.run.report({"warning": f"the trace {name} is lost: {error}"})
        else:
            self.run.report({"files": {name: uri}})
        self.profiler, self.steps = None, None

    def _publish(self, name: str, uri: str) -> None:
        assert self.profiler is not None
        with tempfile.TemporaryDirectory(prefix=storage.owned(checkpoint.FOLDER)) as folder:
            self.profiler.export_chrome_trace(str(Path(folder, name)))
            checkpoint.upload(Path(folder, name), uri, TRACE_PATIENCE_S)


def save(run: Run, metrics: dict[str, float]) -> threading.Event:
    """Collective; tells when this rank's part is uploaded. At ZeRO 0 every rank holds everything: only rank 0 saves."""
    stage = run.job.compute.zero_stage
    meta = {
        "step": run.step,
        "data_step": run.step + run.data_offset,
        "optimizer_steps": zero.optimizer_step(run.engine),
        "job": run.job.model_dump(mode="json"),
        "job_digest": run.job.digest,
        "attempt": run.job.attempt,
        "mark": run.mark,
        "zero_stage": stage,
        "world_size": run.world_size,
        "layout": zero.layout(run.engine, stage),
        **run.budget.as_meta(),
    }
    part = zero.local_part(run.engine, run.ema) if stage or run.rank == 0 else None
    run.saved = checkpoint.name_of(meta)
    adversary = run.adversary.state() if run.adversary is not None and run.rank == 0 else None
    say = functools.partial(_warn_of_upload, run)
    return checkpoint.save(part, meta, metrics, run.job.checkpoints_uri, adversary, run.job.patience_s, say)


def _warn_of_upload(run: Run, text: str) -> None:
    run.report({"warning": f"a checkpoint waits for the storage: {text}"})


def _tell_of_bad_step(run: Run, keys: list[str]) -> None:
    """Collective: rank 0 tells the driver of a step that was not applied: every rank's loss and samples."""
    ranks: list[Any] | None = [None] * run.world_size if run.rank == 0 else None
    # figures as text: JSON knows no NaN
    mine = {"rank": run.rank, "loss": f"{float(run.optimizer.loss):.5g}", "samples": keys}
    dist.gather_object(mine, ranks)
    if ranks is None:
        return
    guilty = [found for found in ranks if not math.isfinite(float(found["loss"]))] or ranks
    named = [
        f"rank {found['rank']} had loss {found['loss']} from {', '.join(found['samples'])}"
        for found in guilty[:BAD_RANKS_NAMED]
    ]
    if len(guilty) > len(named):
        named.append(f"{len(guilty) - len(named)} ranks more")
    norm = f"{run.optimizer.grad_norm:.5g}"
    said = f"step {run.step} not applied: gradient norm {norm}; {'; '.join(named)}"
    run.report({"bad_step": {"said": said, "gradient_norm": norm, "ranks": ranks}})


def _roll_back(run: Run, bad_steps: int) -> dict[str, Any]:
    """How the driver is told to go back to the last checkpoint, and from which data position to go on."""
    reason = f"{bad_steps} steps in a row up to step {run.step} had a non-finite loss or gradient"
    # which checkpoint is committed is not known here; an offset past all data seen so far is fresh from any of them
    offset = run.step + run.data_offset
    return {"kind": "roll_back", "step": run.step, "data_offset": offset, "checkpoint": run.saved, "reason": reason}
