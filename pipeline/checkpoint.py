"""Training checkpoints: each rank's partitions, uploaded in the background, readable by any number of ranks.

Every rank writes its own file to the local disk and goes on training; Ray Train uploads it in a thread and commits
the checkpoint when all ranks' files are in the storage, so that a reader sees a whole one or none. Beside the state
lie the step, the data position, config and versions. Random numbers in the network are drawn from (seed, step,
place of the sample in the global batch), and the sample order is arithmetic on the data position, so there is no
generator to save.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import CheckpointUploadMode
from torch import Tensor

from data_prep import storage
from pipeline.artifact import code_versions

MOMENTS = ("exp_avg", "exp_avg_sq")
META = "meta.json"
UPLOAD_PATIENCE_S = 600

State = dict[str, dict[str, Tensor]]  # "params", "exp_avg", "exp_avg_sq", "ema" -> whole tensors by name
Part = dict[str, list[Tensor]]  # the same, as one rank's flat partitions
Group = list[tuple[str, list[int], int]]  # name, shape and elements per rank of what lies in a flat partition


def save(part: Part | None, meta: dict[str, Any], metrics: dict[str, float], place: str) -> None:
    """Collective: write this rank's file (None: it has nothing to save) and let it be uploaded in the background.

    meta: from rank 0 goes into the checkpoint; must hold "step". place: URI of the run's checkpoint folder.
    An upload that fails for ten minutes raises in the training.
    """
    rank = ray.train.get_context().get_world_rank()
    reported = {"step": meta["step"], **metrics}
    if part is None:
        ray.train.report(reported)
        return
    folder = Path(tempfile.mkdtemp(prefix="hatchery-checkpoint-"))
    torch.save(part, folder / part_name(rank))
    if rank == 0:
        (folder / META).write_text(json.dumps(meta | {"code": code_versions(), "metrics": metrics}, indent=1))
    ray.train.report(
        reported,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"step-{meta['step']:08d}-{meta['data_step']:08d}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=lambda checkpoint, name: _upload(Path(checkpoint.path), storage.join(place, name)),
        delete_local_checkpoint_after_upload=False,
    )


def _upload(folder: Path, uri: str) -> ray.train.Checkpoint:
    """Upload one rank's files, trying again while the storage does not answer; removes the local ones after."""
    deadline = time.monotonic() + UPLOAD_PATIENCE_S
    for file in sorted(folder.iterdir()):
        while True:
            try:
                storage.upload(file, storage.join(uri, file.name))
                break
            except storage.StorageError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(5)
    shutil.rmtree(folder)
    filesystem, path = storage.filesystem(uri)
    return ray.train.Checkpoint(path, filesystem)


def part_name(rank: int) -> str:
    """The file of a rank in a checkpoint."""
    return f"rank-{rank:05d}.pt"


def load(checkpoint: ray.train.Checkpoint, job_digest: str) -> tuple[State, dict[str, Any]]:
    """The whole state and the meta data; ValueError when it belongs to another training."""
    with checkpoint.as_directory() as folder:
        meta = json.loads(Path(folder, META).read_text())
        if meta["job_digest"] != job_digest:
            raise ValueError(
                f"checkpoint {checkpoint.path} belongs to another training (its digest {meta['job_digest'][:12]}, "
                f"expected {job_digest[:12]}): give the run another storage.uri"
            )
        return _read(Path(folder), meta, ("params", *MOMENTS, "ema")), meta


def ema_weights(checkpoint: ray.train.Checkpoint) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, whole: what is exported."""
    with checkpoint.as_directory() as folder:
        meta = json.loads(Path(folder, META).read_text())
        return _read(Path(folder), meta, ("ema",))["ema"]


def _read(folder: Path, meta: dict[str, Any], names: tuple[str, ...]) -> State:
    ranks = range(meta["world_size"] if meta["zero_stage"] else 1)
    files = [folder / part_name(rank) for rank in ranks]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ValueError(f"checkpoint {folder} lacks {', '.join(missing)}: delete it, an older one will be used")
    parts: list[Part] = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
    return {
        name: assemble([part[name] for part in parts], meta["layout"], interleaved=meta["zero_stage"] == 3)
        for name in names
    }


def assemble(parts: list[list[Tensor]], layout: list[Group], *, interleaved: bool) -> dict[str, Tensor]:
    """Whole tensors from all ranks' flat partitions.

    interleaved: every tensor is spread over the ranks (ZeRO 3); else the ranks' partitions laid end to end hold
    the tensors one after another (ZeRO 1 and 2; ZeRO 0 with its single rank). What is left over is padding.
    """
    whole: dict[str, Tensor] = {}
    for number, group in enumerate(layout):
        flats = [part[number].flatten() for part in parts]
        joined = flats[0] if len(flats) == 1 else torch.cat(flats)
        offset = 0
        for name, shape, size in group:
            count = torch.Size(shape).numel()
            if interleaved:
                value = torch.cat([flat[offset : offset + size] for flat in flats])
            else:
                value = joined[offset : offset + size]
            whole[name] = value[:count].reshape(shape).clone()
            offset += size
    return whole
