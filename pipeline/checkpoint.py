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
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import CheckpointUploadMode
from torch import Tensor

from data_prep import storage
from pipeline import waiting
from pipeline.artifact import code_versions

MOMENTS = ("exp_avg", "exp_avg_sq")
META = "meta.json"
ADVERSARY = "adversary.pt"
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints it has committed."""
UPLOAD_PATIENCE_S = 600
FOLDER = "hatchery-checkpoint-"
"""Local folders of what is to be uploaded begin so; `sweep` deletes those that a kill has left."""

State = dict[str, dict[str, Tensor]]  # "params", "exp_avg", "exp_avg_sq", "ema" -> whole tensors by name
Part = dict[str, list[Tensor]]  # the same, as one rank's flat partitions
Group = list[tuple[str, list[int], int]]  # name, shape and elements per rank of what lies in a flat partition


def save(
    part: Part | None,
    meta: dict[str, Any],
    metrics: dict[str, float],
    place: str,
    adversary: dict[str, Any] | None = None,
    patience_s: float = UPLOAD_PATIENCE_S,
    say: Callable[[str], object] = lambda text: None,
) -> threading.Event:
    """Collective: write this rank's file (None: it has nothing to save) and let it be uploaded in the background.

    Gives an event that is set when this rank's upload is over.

    meta: from rank 0 goes into the checkpoint; must hold "step" and "data_step". place: URI of the run's checkpoints.
    adversary: the discriminator's state, the same on all ranks.
    say: told, in a thread, of an upload that has to wait; one that fails for `patience_s` raises in the training.
    """
    rank = ray.train.get_context().get_world_rank()
    reported = {"step": meta["step"], **metrics}
    over = threading.Event()
    if part is None:
        over.set()
        ray.train.report(reported)
        return over
    folder = Path(tempfile.mkdtemp(prefix=storage.owned(FOLDER)))
    torch.save(part, folder / part_name(rank))
    if rank == 0 and adversary is not None:
        torch.save(adversary, folder / ADVERSARY)
    if rank == 0:
        (folder / META).write_text(json.dumps(meta | {"code": code_versions(), "metrics": metrics}, indent=1))

    def send(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        try:
            return _upload(Path(checkpoint.path), storage.join(place, name), patience_s, say)
        finally:
            over.set()

    ray.train.report(
        reported,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_dir_name=name_of(meta),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=send,
        delete_local_checkpoint_after_upload=False,
    )
    return over


def _upload(folder: Path, uri: str, patience_s: float, say: Callable[[str], object]) -> ray.train.Checkpoint:
    """Upload one rank's files; removes the local ones after."""
    for file in sorted(folder.iterdir()):
        upload(file, storage.join(uri, file.name), patience_s, say)
    shutil.rmtree(folder)
    return open_at(uri)


def upload(
    file: Path,
    uri: str,
    patience_s: float = UPLOAD_PATIENCE_S,
    say: Callable[[str], object] = lambda text: None,
) -> None:
    """Upload a local file, trying again while the storage does not answer; StorageError where it stays away.

    say: told that it has to be tried again.
    """
    waiting.until_it_answers(lambda: storage.upload(file, uri), patience_s, say=say)


def sweep() -> None:
    """Delete the local folders of processes that were killed before their upload was done."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        with suppress(FileNotFoundError):  # another worker of this machine sweeps as well
            if storage.is_abandoned(folder, FOLDER):
                shutil.rmtree(folder, ignore_errors=True)


def name_of(meta: dict[str, Any]) -> str:
    """The folder of a checkpoint; later ones sort behind earlier ones."""
    return f"step-{meta['step']:08d}-{meta['data_step']:08d}"


def part_name(rank: int) -> str:
    """The file of a rank in a checkpoint."""
    return f"rank-{rank:05d}.pt"


def load(checkpoint: ray.train.Checkpoint, job_digest: str) -> tuple[State, dict[str, Any]]:
    """The whole state and the meta data; ValueError when it belongs to another training.

    `meta["adversary"]` is the discriminator's state, or None.
    """
    with checkpoint.as_directory() as folder:
        meta = json.loads(Path(folder, META).read_text())
        if meta["job_digest"] != job_digest:
            raise ValueError(
                f"checkpoint {checkpoint.path} belongs to another training (its digest {meta['job_digest'][:12]}, "
                f"expected {job_digest[:12]}): give the run another storage.uri"
            )
        file = Path(folder, ADVERSARY)
        meta["adversary"] = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None
        return _read(Path(folder), meta, ("params", *MOMENTS, "ema")), meta


def recover(place: str) -> str | None:
    """URI of the newest whole checkpoint at a place where Ray Train would find none, though there are some.

    Ray keeps a list of checkpoints and writes it in place: a crash in the middle leaves half of it, a crash before
    it leaves files that nobody knows of, and Ray refuses a list that names a checkpoint which somebody deleted. A
    list that cannot be used is put aside.
    """
    snapshot = storage.join(place, SNAPSHOT)
    found = _files_by_checkpoint(place)
    if storage.exists(snapshot):
        content = storage.read_bytes(snapshot)
        listed = _listed(content)
        if listed and all(META in found.get(name, ()) for name in listed):
            return None
        storage.write_bytes(f"{snapshot}.unusable", content)
        storage.delete(snapshot)
    newest = next((name for name in sorted(found, reverse=True) if _is_whole(place, name, found[name])), None)
    return storage.join(place, newest) if newest else None


def committed(place: str) -> set[str]:
    """The checkpoints on Ray Train's list; none where there is no list, or one that cannot be read."""
    snapshot = storage.join(place, SNAPSHOT)
    return set(_listed(storage.read_bytes(snapshot))) if storage.exists(snapshot) else set()


def discard(place: str, name: str) -> bool:
    """Delete a checkpoint in favour of an older whole one, which `recover` then finds; False where none is kept.

    Ray Train has no way to go back further than its newest checkpoint; it refuses a list that names a deleted one.
    """
    found = _files_by_checkpoint(place)
    if not any(_is_whole(place, older, found[older]) for older in found if older < name):
        return False
    for file in sorted(found.get(name, ()), key=lambda file: file != META):  # without it, the rest counts as nothing
        storage.delete(storage.join(place, name, file))
    return True


def _is_whole(place: str, name: str, files: set[str]) -> bool:
    return META in files and not _missing(json.loads(storage.read_bytes(storage.join(place, name, META))), files)


def _files_by_checkpoint(place: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file in storage.iter_files(place):
        folder, _, name = file.path.rpartition("/")
        if folder.startswith("step-"):
            found.setdefault(folder, set()).add(name)
    return found


def _listed(snapshot: bytes) -> list[str]:
    """Checkpoints that Ray Train's list names; none where it cannot be read."""
    try:
        return [result["checkpoint_dir_name"] for result in json.loads(snapshot)["checkpoint_results"]]
    except (ValueError, KeyError, TypeError):
        return []


def _missing(meta: dict[str, Any], there: set[str]) -> list[str]:
    """Files that a checkpoint with this meta data lacks."""
    ranks = range(meta["world_size"] if meta["zero_stage"] else 1)
    return [part_name(rank) for rank in ranks if part_name(rank) not in there]


def open_at(uri: str) -> ray.train.Checkpoint:
    """The checkpoint at a URI."""
    filesystem, path = storage.filesystem(uri)
    return ray.train.Checkpoint(path, filesystem)


def steps_of(checkpoint: ray.train.Checkpoint) -> int:
    """The step that a checkpoint was made after."""
    with checkpoint.filesystem.open_input_stream(f"{checkpoint.path}/{META}") as file:
        return int(json.loads(file.read())["step"])


def ema_weights(checkpoint: ray.train.Checkpoint) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, whole: what is exported."""
    with checkpoint.as_directory() as folder:
        meta = json.loads(Path(folder, META).read_text())
        return _read(Path(folder), meta, ("ema",))["ema"]


def _read(folder: Path, meta: dict[str, Any], names: tuple[str, ...]) -> State:
    if missing := _missing(meta, {file.name for file in folder.iterdir()}):
        raise ValueError(f"checkpoint {folder} lacks {', '.join(missing)}: delete it, an older one will be used")
    files = [folder / part_name(rank) for rank in range(meta["world_size"] if meta["zero_stage"] else 1)]
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
