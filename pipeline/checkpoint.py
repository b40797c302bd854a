"""Training checkpoints: each rank's partitions, uploaded in the background, readable by any number of ranks.

Every rank writes its own file to the local disk and goes on training; Ray Train uploads it in a thread and commits
the checkpoint when all ranks' files are in the storage, so that a reader sees a whole one or none. Beside the state
lie the step, the data position, config and versions. Random numbers in the network are drawn from (seed, step,
place of the sample in the global batch), and the sample order is arithmetic on the data position, so there is no
generator to save.

Each call of Ray Train is an attempt with a numbered folder of its own, and each group of processes names its
checkpoints by a mark of its own: no folder is written twice, and what a run still writes that was thought dead changes
nothing that another one reads.
"""

import json
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from pyarrow.fs import LocalFileSystem
from ray.train import CheckpointUploadMode
from torch import Tensor

from data_prep import storage
from pipeline import waiting
from pipeline.artifact import code_versions

MOMENTS = ("exp_avg", "exp_avg_sq")
META = "meta.json"
ADVERSARY = "adversary.pt"
CLAIM = "attempt.json"
"""The file by which an attempt has its number."""
UPLOAD_PATIENCE_S = 600
FOLDER = "hatchery-checkpoint-"
"""Local folders of what is to be uploaded begin so; `sweep` deletes those that a kill has left."""

_NAME = re.compile(r"(attempt-(?P<attempt>\d+)/)?step-(?P<step>\d+)-(?P<data_step>\d+)(-\w+)?")
_ATTEMPT = re.compile(r"attempt-(\d+)")

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

    meta: from rank 0 goes into the checkpoint; must hold "step", "data_step", "attempt" and "mark" (see `name_of`).
    place: URI of the run's checkpoints. adversary: the discriminator's state, the same on all ranks.
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
        files = _ranks(meta) + ([ADVERSARY] if adversary is not None else [])
        told = {"code": code_versions(), "metrics": metrics, "files": files}
        (folder / META).write_text(json.dumps(meta | told, indent=1))
    uri = storage.join(place, name_of(meta))

    def send(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        try:
            return _upload(Path(checkpoint.path), uri, patience_s, say)
        finally:
            over.set()

    ray.train.report(
        reported,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_dir_name=uri.rpartition("/")[2],
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=send,
        delete_local_checkpoint_after_upload=False,
    )
    return over


def _upload(folder: Path, uri: str, patience_s: float, say: Callable[[str], object]) -> ray.train.Checkpoint:
    """Upload one rank's files, what the checkpoint holds last; removes the local ones after."""
    for file in sorted(folder.iterdir(), key=lambda file: (file.name == META, file.name)):
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
    """The folder of a checkpoint below a run's checkpoints.

    meta: "attempt" is the folder of the attempt, "mark" that of the group of processes, which makes names unique.
    """
    return f"{meta['attempt']}/step-{meta['step']:08d}-{meta['data_step']:08d}-{meta['mark']}"


def part_name(rank: int) -> str:
    """The file of a rank in a checkpoint."""
    return f"rank-{rank:05d}.pt"


@contextmanager
def on_this_node(checkpoint: ray.train.Checkpoint) -> Iterator[Path]:
    """Collective: a local folder with the checkpoint's files, downloaded once for all processes of a node.

    By `checkpoint.as_directory` every process would download all of it, or write over what its neighbour reads.
    """
    if isinstance(checkpoint.filesystem, LocalFileSystem):
        yield Path(checkpoint.path)
        return
    context = ray.train.get_context()
    first = context.get_local_rank() == 0
    with tempfile.TemporaryDirectory(prefix=storage.owned(FOLDER)) if first else nullcontext() as made:
        if made is not None:
            for file in storage.list_files(f"s3://{checkpoint.path}"):
                storage.download(file.uri, Path(made, file.path))
        folders: list[Any] = [None] * context.get_world_size()
        dist.all_gather_object(folders, (context.get_node_rank(), made))
        yield next(Path(folder) for node, folder in folders if node == context.get_node_rank() and folder)
        dist.barrier()  # until all of the node have read it


def load(folder: Path, job_digest: str) -> tuple[State, dict[str, Any]]:
    """The whole state and the meta data; ValueError when it belongs to another training.

    folder: a checkpoint's files. `meta["adversary"]` is the discriminator's state, or None.
    """
    meta = json.loads(Path(folder, META).read_text())
    if meta["job_digest"] != job_digest:
        raise ValueError(
            f"checkpoint {folder} belongs to another training (its digest {meta['job_digest'][:12]}, "
            f"expected {job_digest[:12]}): give the run another storage.uri"
        )
    file = Path(folder, ADVERSARY)
    meta["adversary"] = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None
    return _read(folder, meta, ("params", *MOMENTS, "ema")), meta


def begin_attempt(place: str, kept: int, check: Callable[[], object] = lambda: None) -> tuple[str, str | None]:
    """The folder, below a run's checkpoints, of a new attempt, and the URI of the checkpoint to go on from, if any.

    Removes what crashes have left at the place, and whole checkpoints beyond the newest `kept`.
    check: raises where this run has lost its lock. It is asked after the attempts are counted and before the next
    number is taken, which only one can: whoever lost the lock never has a higher number than whoever took it over.
    """
    while True:
        folders = _folders(place)
        name = f"attempt-{max((_attempt(folder) for folder in folders), default=0) + 1:06d}"
        check()
        if storage.put_if_absent(storage.join(place, name, CLAIM), json.dumps({"since": time.time()}).encode()):
            break
    whole = _whole(place, folders)
    keep = [found for found, _ in zip(whole, range(kept), strict=False)]
    in_use = {name, *keep, *(found.partition("/")[0] for found in keep)}
    for folder in sorted(folders.keys() - in_use):
        if _attempt(folder) or _NAME.fullmatch(folder):  # not best weights, traces
            storage.delete_tree(storage.join(place, folder))
    return name, storage.join(place, keep[0]) if keep else None


def recover(place: str) -> str | None:
    """URI of the newest whole checkpoint at a place, if any.

    The newest is that of the last attempt which has one, and of those the furthest by data: an attempt that was given
    up may have come further than the one that lives.
    """
    newest = next(_whole(place, _folders(place)), None)
    return storage.join(place, newest) if newest else None


def committed(place: str) -> set[str]:
    """The names of all whole checkpoints at a place."""
    return set(_whole(place, _folders(place)))


def discard(place: str, name: str) -> bool:
    """Delete a checkpoint in favour of an older whole one, which `recover` then finds; False where none is kept."""
    folders = _folders(place)
    if not any(_order(older) < _order(name) for older in _whole(place, folders)):
        return False
    for file in sorted(folders.get(name, ()), key=lambda file: file != META):  # without it, the rest counts as nothing
        storage.delete(storage.join(place, name, file))
    return True


def name_at(checkpoint: ray.train.Checkpoint) -> str:
    """The name of a checkpoint below its run's checkpoints, as `name_of` gave it."""
    match = re.search(rf"(^|/)({_NAME.pattern})$", checkpoint.path)
    assert match is not None, checkpoint.path
    return match[2]


def _whole(place: str, folders: dict[str, set[str]]) -> Iterator[str]:
    """Names of the whole checkpoints, newest first."""
    for name in sorted(filter(_NAME.fullmatch, folders), key=_order, reverse=True):
        if META not in folders[name]:
            continue
        with suppress(ValueError):  # not JSON: written by no version of this project
            if not _missing(json.loads(storage.read_bytes(storage.join(place, name, META))), folders[name]):
                yield name


def _order(name: str) -> tuple[int, int, int, str]:
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return _attempt(name), int(match["data_step"]), int(match["step"]), name


def _attempt(folder: str) -> int:
    """The number of the attempt that a folder belongs to; 0: none, as earlier versions wrote checkpoints."""
    match = _ATTEMPT.match(folder)
    return int(match[1]) if match else 0


def _folders(place: str) -> dict[str, set[str]]:
    """The files of every folder below a place, by the folder's path; folders that hold but folders are among them."""
    found: dict[str, set[str]] = {}
    for file in storage.iter_files(place):
        folder, _, name = file.path.rpartition("/")
        found.setdefault(folder, set()).add(name)
        if folder:
            found.setdefault(folder.partition("/")[0], set())
    return found


def _ranks(meta: dict[str, Any]) -> list[str]:
    return [part_name(rank) for rank in range(meta["world_size"] if meta["zero_stage"] else 1)]


def _missing(meta: dict[str, Any], there: set[str]) -> list[str]:
    """Files that a checkpoint with this meta data lacks."""
    return [name for name in meta.get("files") or _ranks(meta) if name not in there]


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
    files = _ranks(meta)
    parts: list[Part] = [torch.load(folder / file, map_location="cpu", weights_only=True, mmap=True) for file in files]
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
