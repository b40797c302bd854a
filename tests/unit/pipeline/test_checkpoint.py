"""Whole tensors from the ranks' partitions, whatever the ZeRO stage laid where."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
import torch.distributed as dist

from data_prep import storage
from pipeline import checkpoint
from pipeline.lock import LockedError
from tests.s3_server import S3Server
from tests.shared_data import ROOT

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(10.0, 13.0)
LAYOUT: list[checkpoint.Group] = [[("a", [2, 3], 6), ("b", [3], 3)]]


def test_partitions_laid_end_to_end() -> None:
    flat = torch.cat([A.flatten(), B, torch.zeros(3)])  # padded to a multiple of the ranks
    whole = checkpoint.assemble([[flat[:4]], [flat[4:8]], [flat[8:]]], LAYOUT, interleaved=False)
    assert torch.equal(whole["a"], A)
    assert torch.equal(whole["b"], B)


def test_every_tensor_spread_over_the_ranks() -> None:
    layout: list[checkpoint.Group] = [[("a", [2, 3], 3), ("b", [3], 2)]]
    padded = torch.cat([B, torch.zeros(1)])
    parts = [[torch.cat([A.flatten()[3 * r : 3 * r + 3], padded[2 * r : 2 * r + 2]])] for r in range(2)]
    whole = checkpoint.assemble(parts, layout, interleaved=True)
    assert torch.equal(whole["a"], A)
    assert torch.equal(whole["b"], B)


def write(folder: Path, world_size: int, digest: str = "d", **more: Any) -> ray.train.Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    flat = torch.cat([A.flatten(), B, torch.zeros(1)])
    part = {name: [flat[:5]] for name in ("params", "exp_avg", "exp_avg_sq", "ema")}
    torch.save(part, folder / checkpoint.part_name(0))
    torch.save({name: [flat[5:]] for name in part}, folder / checkpoint.part_name(1))
    meta = {"job_digest": digest, "world_size": world_size, "zero_stage": 1, "layout": LAYOUT, "step": 3, **more}
    (folder / checkpoint.META).write_text(json.dumps(meta))
    return ray.train.Checkpoint.from_directory(folder)


def test_a_checkpoint_is_read_back_whole(tmp_path: Path) -> None:
    saved = write(tmp_path, world_size=2)
    state, meta = checkpoint.load(tmp_path, "d")
    assert meta["step"] == 3
    assert torch.equal(state["exp_avg"]["a"], A)
    assert torch.equal(checkpoint.ema_weights(saved)["b"], B)


def test_a_foreign_or_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="belongs to another training"):
        checkpoint.load(Path(write(tmp_path, world_size=2).path), "other")
    with pytest.raises(ValueError, match=r"lacks rank-00002\.pt"):
        checkpoint.load(Path(write(tmp_path, world_size=3).path), "d")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three checkpoints as earlier versions named them; the newest lacks a rank's file."""
    for step in (2, 4, 6):
        write(tmp_path / f"step-{step:08}-{step:08}", world_size=3 if step == 6 else 2)
    return tmp_path


def test_the_newest_whole_checkpoint_is_found(place: Path) -> None:
    assert checkpoint.recover(str(place)) == f"{place}/step-00000004-00000004"
    (place / "step-00000004-00000004" / checkpoint.META).write_text("{torn")
    assert checkpoint.recover(str(place)) == f"{place}/step-00000002-00000002"


def test_nothing_to_recover_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.recover(str(tmp_path / "absent")) is None
    assert checkpoint.begin_attempt(str(tmp_path / "absent"), 2) == ("attempt-000001", None)


def test_a_branch_that_was_given_up_is_not_gone_on_from(tmp_path: Path) -> None:
    """It had taken more steps when it met losses that were not finite; the one that lives has passed that data over."""
    write(tmp_path / "step-00000110-00000110", world_size=2)
    write(tmp_path / "step-00000105-00000215", world_size=2)
    assert checkpoint.recover(str(tmp_path)) == f"{tmp_path}/step-00000105-00000215"


def test_the_last_attempt_is_the_one_that_lives(tmp_path: Path) -> None:
    """A run that lost its lock without knowing went on writing, and got further than its successor."""
    write(tmp_path / "attempt-000003/step-00000200-00000200-aaaaaaaa", world_size=2)
    write(tmp_path / "attempt-000004/step-00000120-00000120-bbbbbbbb", world_size=2)
    write(tmp_path / "attempt-000005/step-00000130-00000130-cccccccc", world_size=3)  # not whole
    assert checkpoint.recover(str(tmp_path)) == f"{tmp_path}/attempt-000004/step-00000120-00000120-bbbbbbbb"


def test_a_checkpoint_without_all_files_that_it_names_is_not_whole(tmp_path: Path) -> None:
    """Ray deletes in any order: the discriminator's state may be gone while all ranks' files are there."""
    names = [checkpoint.part_name(0), checkpoint.part_name(1), checkpoint.ADVERSARY]
    write(tmp_path / "attempt-000001/step-00000002-00000002-aaaaaaaa", world_size=2, files=names)
    assert checkpoint.recover(str(tmp_path)) is None


def test_an_attempt_removes_what_crashes_have_left(place: Path) -> None:
    for name, world_size in (("000001/step-00000008-00000008-aaaaaaaa", 2), ("000002/step-00000009-00000009-b", 3)):
        write(place / f"attempt-{name}", world_size=world_size)
    write(place / "attempt-000003", world_size=3)  # Ray's own files lie there
    for other in ("best/best.json", "profile-steps-1-2.json.gz"):
        storage.write_bytes(str(place / other), b"{}")
    newest = f"{place}/attempt-000001/step-00000008-00000008-aaaaaaaa"
    assert checkpoint.begin_attempt(str(place), 2) == ("attempt-000004", newest)
    left = {folder.relative_to(place).as_posix() for folder in place.rglob("*") if folder.is_dir()}
    attempts = {"attempt-000001", "attempt-000001/step-00000008-00000008-aaaaaaaa", "attempt-000004"}
    assert left == {"best", "step-00000004-00000004", *attempts}
    assert (place / "best/best.json").exists()
    assert (place / "profile-steps-1-2.json.gz").exists()
    assert checkpoint.begin_attempt(str(place), 1) == ("attempt-000005", newest)


def test_who_lost_the_lock_has_no_higher_number_than_who_took_it_over(tmp_path: Path) -> None:
    """The lock is lost between its check and the claim, the worst moment."""
    others: list[str] = []

    def check() -> None:
        if others:
            raise LockedError("it was taken over")
        others.append(checkpoint.begin_attempt(str(tmp_path), 2)[0])

    with pytest.raises(LockedError):
        checkpoint.begin_attempt(str(tmp_path), 2, check)
    assert others == ["attempt-000001"]
    assert [path.name for path in tmp_path.iterdir()] == ["attempt-000001"]


SAVE_AND_DIE = """
import os, signal, types
import ray.train, torch
from pipeline import checkpoint
ray.train.get_context = lambda: types.SimpleNamespace(get_world_rank=lambda: 0)
ray.train.report = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
meta = {"step": 1, "data_step": 1, "attempt": "attempt-000001", "mark": "a", "world_size": 1, "zero_stage": 0}
checkpoint.save({"params": [torch.ones(2)]}, meta, {}, "s3://bucket/runs")
"""


def test_checkpoints_of_killed_workers_are_swept_and_others_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", SAVE_AND_DIE], cwd=ROOT, env=environment, check=False)
    assert killed.returncode < 0
    (left,) = tmp_path.glob("hatchery-checkpoint-*")
    assert (left / checkpoint.part_name(0)).exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = Path(tempfile.mkdtemp(prefix=storage.owned("hatchery-checkpoint-")))
    elsewhere, old = (tmp_path / f"hatchery-checkpoint-{name}" for name in ("another-host-1-x", "8xv_k3_1"))
    elsewhere.mkdir()
    old.mkdir()  # as earlier versions named them
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    checkpoint.sweep()
    assert sorted(tmp_path.glob("hatchery-checkpoint-*")) == sorted([mine, elsewhere])


def test_a_checkpoint_that_fails_again_gives_way_to_the_one_before(place: Path) -> None:
    assert checkpoint.discard(str(place), "step-00000004-00000004")
    assert checkpoint.recover(str(place)) == f"{place}/step-00000002-00000002"


def test_the_only_checkpoint_is_kept(place: Path) -> None:
    assert not checkpoint.discard(str(place), "step-00000002-00000002")
    assert (place / "step-00000002-00000002" / checkpoint.META).exists()


def test_an_older_checkpoint_that_is_not_whole_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    for step, ranks in ((2, 3), (4, 2)):
        write(tmp_path / f"step-{step:08}-{step:08}", world_size=ranks)
    assert not checkpoint.discard(str(tmp_path), "step-00000004-00000004")


def test_what_a_checkpoint_holds_is_uploaded_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between two files leaves no checkpoint that counts as whole; the folder is of these processes alone."""
    reported: dict[str, Any] = {}
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    monkeypatch.setattr(ray.train, "report", lambda metrics, **options: reported.update(options))
    order: list[str] = []
    monkeypatch.setattr(checkpoint, "upload", lambda file, uri, *patience: order.append(uri))
    meta = {"step": 1, "data_step": 3, "attempt": "attempt-000001", "mark": "0badcafe", "world_size": 2}
    part = {"params": [torch.ones(2)]}
    checkpoint.save(part, {**meta, "zero_stage": 1}, {}, str(tmp_path), {"state": torch.ones(1)})
    assert reported["checkpoint_dir_name"] == "step-00000001-00000003-0badcafe"
    local = Path(reported["checkpoint"].path)
    named = json.loads((local / checkpoint.META).read_text())["files"]
    made = reported["checkpoint_upload_fn"](reported["checkpoint"], reported["checkpoint_dir_name"])
    folder = f"{tmp_path}/attempt-000001/step-00000001-00000003-0badcafe"
    assert order == [f"{folder}/{name}" for name in ("adversary.pt", "rank-00000.pt", "meta.json")]
    assert named == ["rank-00000.pt", "rank-00001.pt", "adversary.pt"]
    assert not local.exists()
    assert checkpoint.name_at(made) == "attempt-000001/step-00000001-00000003-0badcafe"


def read_on_a_node(rank: int, uri: str, folder: Path) -> None:
    """One of four processes on two nodes."""
    context = SimpleNamespace(
        get_local_rank=lambda: rank % 2, get_node_rank=lambda: rank // 2, get_world_size=lambda: 4
    )
    download = storage.download

    def counted(source: str, local: Path) -> None:
        (folder / f"{rank}-{local.name}").touch()
        download(source, local)

    ray.train.get_context = lambda: context  # type: ignore[assignment]
    checkpoint.storage.download = counted  # type: ignore[assignment]
    tempfile.tempdir = str(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=4)
    with checkpoint.on_this_node(checkpoint.open_at(uri)) as there:
        state, _ = checkpoint.load(there, "d")
    assert torch.equal(state["params"]["b"], B)


def test_a_node_downloads_a_checkpoint_once(tmp_path: Path, s3: S3Server) -> None:
    write(tmp_path / "here", world_size=2)
    uri = f"{s3.uri}/attempt-000001/step-00000003-00000003-aaaaaaaa"
    for file in (tmp_path / "here").iterdir():
        storage.upload(file, f"{uri}/{file.name}")
    (tmp_path / "log").mkdir()
    fork = multiprocessing.get_context("fork")
    nodes = [fork.Process(target=read_on_a_node, args=(rank, uri, tmp_path / "log")) for rank in range(4)]
    for process in nodes:
        process.start()
    for process in nodes:
        process.join(60)
    assert [process.exitcode for process in nodes] == [0] * 4
    files = ("meta.json", "rank-00000.pt", "rank-00001.pt")
    downloads = [f"{first}-{file}" for first in (0, 2) for file in files]
    assert sorted(path.name for path in (tmp_path / "log").iterdir() if path.name != "group") == downloads
