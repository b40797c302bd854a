"""Retraining as a scheduler calls it: images arrive in between, calls are killed, two call at once."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from data_prep import storage
from data_prep.index import ShardSettings
from data_prep.loader import PairLoader, PairSettings
from data_prep.sources import list_items
from model import build
from model.init import bicubic_start
from model.weights import save_pth
from pipeline import promotion, registry, tracking
from pipeline.cli import main
from pipeline.gate import Verdict
from pipeline.ledger import Ledger
from pipeline.lock import StorageLock
from tests.domains import let_arrive, mean_psnr_y
from tests.golden_crops import SET5
from tests.integration.test_resume import committed
from tests.photographs import write_photographs
from tests.shared_data import ROOT
from tests.unit.data_prep.test_loader import shard_here

pytestmark = pytest.mark.integration

MARGIN_DB, TOLERANCE_DB = 0.05, 0.4
OPTIONS = {"embed_dim": 12, "depths": [1], "num_heads": [3], "window_size": 8, "compress_ratio": 3, "squeeze_factor": 3}


def train_general(folder: Path, steps: int = 80) -> Path:
    """A tiny x2 network of forty photographs, from the bicubic start."""
    items = list_items(f"{folder}/photographs")
    shards = shard_here(items, f"{folder}/general", ShardSettings(samples_per_shard=20))
    torch.manual_seed(0)
    network = build("hat", 2, **OPTIONS)
    bicubic_start(network)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    batches = iter(PairLoader(shards.uri, PairSettings(scale=2, patch_px=24), 8, 8, 0, 1, 0))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50)
        batch = next(batches)
        loss = (network(batch.low_res) - batch.high_res).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_pth(folder / "weights.pth", network.state_dict())
    return folder / "weights.pth"


class Domain:
    """A domain file, the folder where its images arrive, and a registry with a general champion."""

    def __init__(self, folder: Path) -> None:
        self.incoming, self.file = folder / "incoming", folder / "text.yaml"
        self.incoming.mkdir()
        (folder / "replay.txt").write_text("\n".join(map(str, write_photographs(folder / "photographs"))))
        self.file.write_text(yaml.safe_dump(self.config(folder)))
        self.client = tracking.connect_default(f"sqlite:///{folder}/runs/mlflow.db")
        weights = train_general(folder)
        experiment = self.client.create_experiment("general", artifact_location=f"{folder}/artifacts")
        run_id = self.client.create_run(experiment).info.run_id
        tags = {registry.CONTENT_TAG: "general"}
        version = registry.register(self.client, run_id, "tiny-x2", {"weights.pth": weights}, {}, tags)
        good = Verdict(promoted=True, reason="general", rival="none")
        promotion.promote(self.client, "tiny-x2", version, lambda _: good)
        self.ledger = Ledger(f"{folder}/runs", "text")

    def config(self, folder: Path) -> dict[str, object]:
        return {
            "name": "text",
            "source": str(self.incoming),
            "base": "models:/tiny-x2@champion",
            "min_new_images": 8,
            "hold_out_share": 0.25,
            "min_hold_out": 3,
            "samples_per_shard": 8,
            "min_side_px": 150,
            "max_reject_share": 0.2,
            "replay": {"source": f"{folder}/replay.txt", "share": 0.4},
            "training": {
                **{"steps": 60, "global_batch": 8, "patch_px": 24, "lr": 1e-3, "warmup_steps": 10, "milestones": [45]},
                **{"ema_decay": 0.9, "checkpoint_every": 10, "log_every": 10, "cache_decoded_bytes": 100_000_000},
            },
            "evaluate": {"sets": {"Set5": str(SET5)}, "pictures": 0},
            "gate": {"better": {"text": MARGIN_DB}, "not_worse": {"Set5": TOLERANCE_DB}, "decide_by": "mean"},
            "storage": {"uri": f"{folder}/runs"},
            "compute": {"num_workers": 1, "micro_batch": 8},
        }

    def start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "pipeline/retrain.py", str(self.file), "--address", "local"]
        env = {**os.environ, "MLFLOW_TRACKING_URI": ""}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def retrain(self) -> str:
        process = self.start()
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output[-4000:]
        return output

    def champion(self) -> str:
        found = registry.by_alias(self.client, "tiny-x2", "champion")
        return str(found and found.version)


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    return Domain(tmp_path_factory.mktemp("domain"))


def quick(domain: Domain, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """A call that has nothing to train, in this process."""
    with pytest.raises(SystemExit) as ended:
        main(["retrain", str(domain.file), *more])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_nothing_or_too_little_is_said_and_left(domain: Domain, capsys: pytest.CaptureFixture[str]) -> None:
    assert "0 new images: nothing to do" in quick(domain, capsys)
    let_arrive("text", domain.incoming, range(3))
    (domain.incoming / "broken.png").write_bytes(b"no image")
    said = quick(domain, capsys)
    assert "1 files cannot be used" in said
    assert "3 new images, 8 make a retraining worthwhile: nothing to do" in said
    assert domain.ledger.rounds() == []
    overdue = ("--set", "max_wait_days=0", "--dry-run")
    assert "all 3 new images are held out for judgement" in quick(domain, capsys, *overdue)
    said = quick(domain, capsys, *overdue, "--set", "min_hold_out=1", "--set", "hold_out_share=0.01")
    assert "round 1 with 2 new images to train on and 1 held out, from models:/tiny-x2/1" in said
    assert "a call would train 60 steps" in said
    assert domain.ledger.rounds() == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.patch_px=20", ["training.patch_px 20", "window 8: use 16"]),
        ("training.patch_px=80", ["min_side_px 150", "raise it to 160"]),
        ("registered_as=other-x3", ["'other-x3'", "ends in -x2"]),
        ("gate.metric=psnr_rgb", ["gate.metric psnr_rgb", "evaluate.protocol.rgb=true"]),
        ("evaluate.sets.Set5=/absent", ["/absent"]),
        ("replay.source=/absent", ["/absent"]),
    ],
)
def test_what_cannot_be_run_opens_no_round(
    domain: Domain, capsys: pytest.CaptureFixture[str], override: str, words: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["retrain", str(domain.file), "--now", "--set", "min_hold_out=1", "--set", override])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(said.strip().splitlines()) == 1, said
    for word in words:
        assert word in said
    assert domain.ledger.rounds() == []


def test_the_second_of_two_at_once_leaves(domain: Domain, capsys: pytest.CaptureFixture[str]) -> None:
    with StorageLock(f"{domain.ledger.uri}/retrain.lock", "a test", heartbeat_s=0.2):
        assert "leaving it to another run: a test is being run by" in quick(domain, capsys)


def test_two_retrainings_with_arrivals_a_kill_and_copies_in_between(
    domain: Domain, capsys: pytest.CaptureFixture[str]
) -> None:
    let_arrive("text", domain.incoming, range(3, 16))
    first = domain.retrain()
    assert "round 1 with" in first
    assert domain.champion() == "2", first[-3000:]
    held = {info.path for info in storage.list_files(domain.ledger.hold_out_uri)}
    assert len(held) >= 3
    # the same content under other names is not new
    for path in list(domain.incoming.glob("text-*.png")):
        path.rename(path.with_name(f"again-{path.name}"))
    assert "0 new images: nothing to do" in quick(domain, capsys)
    let_arrive("text", domain.incoming, range(16, 28))
    killed = domain.start()
    wait_for_checkpoint(domain, "text-0002", killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert len(domain.ledger.rounds()) == 2
    assert domain.ledger.outcome(2) is None
    second = domain.retrain()
    assert "round 2 was interrupted, continuing it" in second
    assert "shard-text-0001: done before" in second
    resumed = re.search(r"text-0002: 1 process from step (\d+)", second)
    assert resumed, second[-4000:]
    assert int(resumed[1]) >= 10
    check_rounds(domain, held)
    check_registry(domain)
    check_gain(domain)


def wait_for_checkpoint(domain: Domain, stage: str, process: "subprocess.Popen[str]") -> None:
    """Until a training has committed its first checkpoint, while it trains on."""
    deadline = time.monotonic() + 400
    while not committed(domain.file.parent, stage):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_rounds(domain: Domain, held_first: set[str]) -> None:
    """Every image has one role for ever; each round starts from the champion, and is promoted or says why not."""
    rounds = domain.ledger.rounds()
    assert [entry.start for entry in rounds] == ["models:/tiny-x2/1", "models:/tiny-x2/2"]
    first, second = domain.ledger.outcome(1), domain.ledger.outcome(2)
    assert first["promoted"]
    assert first["reason"].startswith("better than champion version 1: psnr_y on text ")
    assert second["promoted"] or second["reason"].startswith("not promoted over champion version 2: ")
    assert domain.champion() == ("3" if second["promoted"] else "2")
    roles = [(image.sha256, image.role) for entry in rounds for image in entry.images]
    assert len({sha for sha, _ in roles}) == len(roles) == 28
    held = {f"{sha}.png" for sha, role in roles if role == "hold-out"}
    assert held_first < held == {info.path for info in storage.list_files(domain.ledger.hold_out_uri)}


def check_registry(domain: Domain) -> None:
    """Its history and tags tell who was champion, from what, by how much, and of which data."""
    events = promotion.history(domain.client, "tiny-x2")
    assert [event.version for event in events] == [str(n) for n in range(1, int(domain.champion()) + 1)]
    version = domain.client.get_model_version("tiny-x2", "2")
    assert version.tags["hatchery.parent_version"] == "models:/tiny-x2/1"
    assert float(version.tags["hatchery.gain.psnr_y.text"].split()[0]) > MARGIN_DB
    assert float(version.tags["hatchery.gain.psnr_y.Set5"].split()[0]) >= -TOLERANCE_DB
    again = domain.client.get_model_version("tiny-x2", "3")
    assert {"hatchery.data.text-0001", "hatchery.data.text-0002", "hatchery.data.replay"} <= set(again.tags)
    assert again.tags["hatchery.parent_version"] == "models:/tiny-x2/2"
    assert again.tags["hatchery.decision"] == domain.ledger.outcome(2)["reason"]
    assert float(again.tags["hatchery.since_start.psnr_y.Set5"].split()[0]) >= -TOLERANCE_DB
    run = MlflowClient().get_run(again.run_id)
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {"text-0001", "text-0002", "replay"}


def check_gain(domain: Domain) -> None:
    """The champion of now against the first, both on today's hold-out and Set5: better by the margin, lost little."""
    sets = {"text": domain.ledger.hold_out_uri, "Set5": str(SET5)}
    first, last = (domain.client.get_model_version("tiny-x2", number) for number in ("1", domain.champion()))
    gains = {name: mean_psnr_y(last, uri) - mean_psnr_y(first, uri) for name, uri in sets.items()}
    assert gains["text"] > MARGIN_DB, gains
    assert gains["Set5"] >= -TOLERANCE_DB, gains
