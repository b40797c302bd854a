"""The live objects of one training process, and how they are set up: fresh, from weights, or from a checkpoint."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from data_prep.loader import Batch, PairLoader, PairSettings, micro_batches_per_step
from data_prep.shard_cache import default_cache
from data_prep.uri import join
from model import build
from model.blocks import DropPath, UpscalingNetwork, drop_paths
from model.compiling import compile_in_place
from model.init import bicubic_start
from model.losses import Loss, with_adversary
from model.precision import emulation_note, keep_fp32_exact, resolve_precision
from model.weights import load_parameters, read_weights
from pipeline import artifact, checkpoint, zero
from pipeline.adversary import Adversary
from pipeline.arithmetic import TRAINING_PASSES, macs_per_sample, peak_macs_per_s
from pipeline.autobatch import find_micro_batch
from pipeline.budget import Budget
from pipeline.heap import keep_freed_memory
from pipeline.launch import TrainJob
from pipeline.objective import loss_of
from pipeline.optimizer import GuardedAdam
from pipeline.system import SystemWatch
from pipeline.validate import Validator, published_best


@dataclass
class Run:
    """One training process.

    `step` counts global batches; the data position runs `data_offset` ahead. `saved` names the last checkpoint, `mark`
    (the same on all ranks) is in the names of those that this group of processes makes.
    """

    job: TrainJob
    engine: Any
    optimizer: GuardedAdam
    ema: zero.PartitionedEMA
    batches: Iterator[Batch]
    loss: Loss
    adversary: Adversary | None
    drop_paths: list[DropPath]
    device: torch.device
    rank: int
    world_size: int
    micro_batch: int
    passes: int
    budget: Budget
    step: int
    data_offset: int
    saved: str | None
    mark: str
    mailbox: Any
    validator: Validator | None
    system: SystemWatch | None
    peak_share_per_image_per_s: float

    def report(self, record: dict[str, Any]) -> None:
        """Tell the driver, from rank 0."""
        if self.rank == 0:
            self.mailbox.post.remote({"step": self.step, **record})


def set_up(job: TrainJob, mailbox: Any, images: Any, alive: Callable[[], object] = lambda: None) -> Run:
    """Collective. mailbox: the driver's actor; images: an object reference to validation images, or None.

    alive: called between the parts, each of which may take minutes.
    """
    checkpoint.sweep()
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(job.compute.cpus_per_worker)
        keep_freed_memory()
    bf16 = _agree(resolve_precision(job.phase.precision, device) == "bf16", device)
    if not bf16:
        keep_fp32_exact()
    alive()
    network, state, meta, saved = _start(job)
    alive()
    network.to(device)
    macs = macs_per_sample(network, job.phase.patch_px)
    micro_batch, loss = job.compute.micro_batch, loss_of(job.phase, device)
    adversary = _adversary(job, meta, device, bf16)
    if adversary is not None:
        loss = with_adversary(loss, adversary.loss)
    if micro_batch == "auto":
        alive()
        micro_batch = find_micro_batch(network, loss, job.phase, job.compute, job.training.scale, bf16)
    if job.compute.compile:  # after the trials, each of which would be compiled
        compile_in_place(network)
    alive()
    step, data_offset = meta["step"], max(meta["data_step"] - meta["step"], job.data_offset)
    engine = zero.initialize(network, job.phase, job.compute, micro_batch, world_size, bf16)
    ema = zero.PartitionedEMA(engine, job.phase.ema_decay)
    if state is not None:
        zero.restore(engine, ema, state, meta["optimizer_steps"])
    engine.train()
    alive()
    run = Run(
        job=job,
        engine=engine,
        optimizer=zero.optimizer_of(engine),
        ema=ema,
        batches=iter(_loader(job, micro_batch, rank, world_size, step + data_offset, device)),
        loss=loss,
        adversary=adversary,
        drop_paths=drop_paths(network),
        device=device,
        rank=rank,
        world_size=world_size,
        micro_batch=micro_batch,
        passes=micro_batches_per_step(job.phase.global_batch, micro_batch, world_size),
        budget=Budget(job.phase, meta),
        step=step,
        data_offset=data_offset,
        saved=saved,
        mark=_mark(device),
        mailbox=mailbox,
        validator=_validator(job, images),
        system=SystemWatch(context.get_node_rank()) if context.get_local_rank() == 0 else None,
        peak_share_per_image_per_s=TRAINING_PASSES * macs / (peak_macs_per_s(device, bf16) * world_size),
    )
    alive()
    if note := emulation_note(job.phase.precision, device):
        run.report({"warning": note})
    if changed := artifact.changed_libraries(meta.get("code", {})):
        run.report({"warning": changed})
    used = {"precision_used": "bf16" if bf16 else "fp32", "device": str(device), "workers_used": world_size}
    run.report({"params": used | {"micro_batch_used": micro_batch, "gmacs_per_sample": round(macs / 1e9, 3)}})
    return run


def _loader(
    job: TrainJob, micro_batch: int, rank: int, world_size: int, start_step: int, device: torch.device
) -> PairLoader:
    return PairLoader(
        job.shards_uri,
        pair_settings(job),
        global_batch=job.phase.global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        num_workers=job.compute.loader_workers,
        start_step=start_step,
        device=device,
    )


def _adversary(job: TrainJob, meta: dict[str, Any], device: torch.device, bf16: bool) -> Adversary | None:
    if job.phase.adversarial is None:
        return None
    adversary = Adversary(job.phase.adversarial, job.training.seed, device, bf16)
    if meta.get("adversary"):
        adversary.restore(meta["adversary"])
    return adversary


def _validator(job: TrainJob, images: Any) -> Validator | None:
    if images is None:
        return None
    place = join(job.checkpoints_uri, "best")
    return Validator(ray.get(images), job.gate_metric, place, published_best(place, job.gate_metric), job.patience_s)


def _start(job: TrainJob) -> tuple[UpscalingNetwork, checkpoint.State | None, dict[str, Any], str | None]:
    """The network with the weights to start from; if it was trained before, the optimizer's state, the position, and
    the name of the checkpoint.

    1. this training's own last checkpoint, 2. the weights of an earlier stage, 3. a fresh start.
    """
    torch.manual_seed(job.training.seed)
    network = fresh_network(job)
    saved = ray.train.get_checkpoint()
    if saved is None and job.resume_from is not None:
        saved = checkpoint.open_at(job.resume_from)
    if saved is not None:
        with checkpoint.on_this_node(saved) as folder:
            state, meta = checkpoint.load(folder, job.digest)
        load_parameters(network, state["params"])
        return network, state, meta, checkpoint.name_at(saved)
    if job.init is not None:
        weights = artifact.fetch(job.init, "weights.safetensors", Path(job.compute.cache_dir or default_cache()))
        network.load_state_dict(read_weights(weights))
    elif job.training.start == "bicubic":
        bicubic_start(network)
    return network, None, {"step": 0, "data_step": 0}, None


def fresh_network(job: TrainJob) -> UpscalingNetwork:
    """A network of the job's architecture with the published initialization."""
    options = job.model.options | {"checkpoint": job.compute.activation_checkpoint}
    return build(job.model.arch, job.training.scale, **options)


def pair_settings(job: TrainJob) -> PairSettings:
    """The loader's settings of a training."""
    return PairSettings(
        scale=job.training.scale,
        patch_px=job.phase.patch_px,
        seed=job.seed,
        degradation=job.phase.degradation,
        rounding=job.phase.low_res_rounding,
        num_streams=job.phase.num_streams,
        crops_per_image=job.phase.crops_per_image,
        on_damage=job.phase.on_damage,
        cache_decoded_bytes=job.phase.cache_decoded_bytes,
        cache_dir=job.compute.cache_dir,
        cache_bytes=job.compute.cache_bytes,
    )


def _mark(device: torch.device) -> str:
    """A random word of 8 letters, the same on every rank."""
    drawn = torch.tensor(secrets.randbits(32), device=device)
    dist.broadcast(drawn, 0)
    return f"{int(drawn):08x}"


def _agree(mine: bool, device: torch.device) -> bool:
    """True if it is so on every rank: nodes of a cluster may differ."""
    vote = torch.tensor(int(mine), device=device)
    dist.all_reduce(vote, dist.ReduceOp.MIN)
    return bool(vote.item())
