"""The main job as users run it: `ray job submit` to a cluster of two nodes, storage on S3, a real MLflow server."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from data_prep import storage
from data_prep.index import read_shard_set
from model import build, load
from model.init import bicubic_start
from model.weights import read_weights, save_pth
from pipeline import promotion, registry
from pipeline.cli import main
from pipeline.gate import Verdict
from pipeline.ledger import Ledger
from pipeline.lock import StorageLock
from pipeline.stages import PTH, RESULTS, SAFETENSORS
from tests.domains import let_arrive
from tests.golden_crops import kept_crop
from tests.integration.cloud import SECRET, Cloud, artifact_of, file_of, running_cloud
from tests.shared_data import ROOT
from tests.unit.model.tiny import TINY

pytestmark = pytest.mark.integration

TRAININGS = (
    "pretrain-x2",
    "pretrain-x3",
    "pretrain-x2-again",
    "pretrain-x4",
    "finetune-x2",
    "finetune-x3",
    "finetune-x4",
)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with running_cloud(tmp_path_factory.mktemp("cloud"), "seaweedfs", "tiny") as running:
        yield running


def test_the_project_is_not_installed_on_the_cluster(cloud: Cloud) -> None:
    command = [sys.executable, "-c", "import pipeline"]
    tried = subprocess.run(command, env=cloud.cluster.env, cwd="/", capture_output=True, text=True)
    assert "No module named 'pipeline'" in tried.stderr


def test_the_whole_recipe_and_all_it_leaves(cloud: Cloud) -> None:
    done = cloud.run()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "[15/15] promote" in done.stdout
    shards = read_shard_set(artifact_of(cloud, "shard-photographs"))
    assert shards.num_samples == 20
    assert [reject.uri for reject in shards.index.rejects] == [f"{cloud.base}/imagenet/n00000000/broken.JPEG"]
    for name in TRAININGS:
        uri = artifact_of(cloud, name)
        marker = json.loads(storage.read_bytes(f"{uri}/artifact.json"))
        assert marker["info"]["steps"] == (4 if name.startswith("pretrain") else 2)
        assert {PTH, SAFETENSORS} <= set(marker["files"])
        assert any("checkpoints/" in file.uri for file in storage.list_files(uri))
    check_evaluation(cloud)
    check_tracking(cloud)


def check_evaluation(cloud: Cloud) -> None:
    results = json.loads(storage.read_bytes(file_of(cloud, "evaluate", RESULTS)))
    rows = {(row["set"], row["scale"]): row for row in results}
    assert set(rows) == {(name, scale) for name in ("Set5", "held-out") for scale in (2, 3, 4)}
    assert [f"{rows['Set5', scale]['bicubic_psnr_y']:.3f}" for scale in (2, 3, 4)] == ["34.066", "30.741", "28.828"]
    for scale in (2, 3, 4):  # started from bicubic and hardly trained: the cascade must not have lost that
        assert rows["Set5", scale]["psnr_y"] > rows["Set5", scale]["bicubic_psnr_y"] - 0.5


def check_tracking(cloud: Cloud) -> None:
    client = MlflowClient(cloud.tracking)
    experiment = client.get_experiment_by_name("hatchery")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    assert parents[0].info.status == "FINISHED"
    assert parents[0].data.params["phases.pretrain.steps"] == "4"
    assert "recipe.yaml" in [item.path for item in client.list_artifacts(parents[0].info.run_id)]
    children = {run.data.tags["hatchery.stage"]: run for run in runs if run not in parents}
    assert len(children) == 15
    trained = children["pretrain-x2"]
    history = client.get_metric_history(trained.info.run_id, "loss")
    assert [entry.step for entry in history] == [2, 4]
    assert {"learning_rate", "images_per_s", "step_time_s", "data_wait_s"} <= set(trained.data.metrics)
    assert 0 < trained.data.metrics["communication_s"] < trained.data.metrics["step_time_s"] * 4
    assert 0 < trained.data.metrics["percent_of_peak"] < 100
    assert "system/cpu_utilization_percentage" in trained.data.metrics
    assert trained.data.tags["hatchery.micro_batch_used"] == "4"  # auto: all of a worker's half of the global batch
    validations = client.get_metric_history(trained.info.run_id, "validation_psnr_y")
    assert [entry.step for entry in validations] == [2, 4]
    paths = [item.path for item in client.list_artifacts(trained.info.run_id)]
    assert {PTH, SAFETENSORS, "profile-steps-2-2.json.gz"} <= set(paths)
    looks = [item.path for item in client.list_artifacts(trained.info.run_id, "validation/step-00000004")]
    assert looks == ["validation/step-00000004/chelsea.png"]
    best = json.loads(storage.read_bytes(f"{artifact_of(cloud, 'pretrain-x2')}/artifact.json"))["info"]["best"]
    assert best["value"] == max(entry.value for entry in validations)
    pictures = [item.path for item in client.list_artifacts(children["evaluate"].info.run_id, "pictures")]
    assert any(path.startswith("pictures/Set5-x2-finetune-x2-worst-1-") for path in pictures)
    assert "index.json" in [item.path for item in client.list_artifacts(children["shard-sharp"].info.run_id)]


def test_the_registered_models_super_resolve_images(cloud: Cloud) -> None:
    client = MlflowClient(cloud.tracking)
    mlflow.set_tracking_uri(cloud.tracking)
    for scale in (2, 3, 4):
        version = client.get_model_version_by_alias(f"tiny-x{scale}", "champion")
        assert client.get_model_version_by_alias(f"tiny-x{scale}", "candidate").version == version.version
        assert "psnr_y.held-out" in version.tags
        assert version.tags["hatchery.ancestry"].startswith(f"finetune-x{scale} <- pretrain-x{scale}")
        assert version.tags["hatchery.data.sharp"] == read_shard_set(artifact_of(cloud, "shard-sharp")).digest
        files = {"weights.pth", "weights.safetensors", "evaluation.json", "recipe.json", "lineage.json"}
        folder = mlflow.artifacts.download_artifacts(f"models:/tiny-x{scale}/{version.version}")
        assert files <= {path.name for path in Path(folder, "artifacts").iterdir()}
        assert promotion.history(client, f"tiny-x{scale}")[0].version == version.version
    model = mlflow.pyfunc.load_model("models:/tiny-x3@champion")
    image = kept_crop("bird", 3)
    upscaled = model.predict(image[None])
    assert upscaled.shape == (1, image.shape[0] * 3, image.shape[1] * 3, 3)
    assert upscaled.dtype == np.uint8


def test_exported_weights_are_in_the_published_layout(cloud: Cloud, tmp_path: Path) -> None:
    for name in (PTH, SAFETENSORS):
        storage.download(file_of(cloud, "finetune-x4", name), tmp_path / name)
    pth, tensors = read_weights(tmp_path / PTH), read_weights(tmp_path / SAFETENSORS)
    assert pth.keys() == tensors.keys()
    assert {
        "relative_position_index_SA",
        "upsample.2.weight",
        "layers.0.residual_group.overlap_attn.qkv.weight",
    } <= set(pth)
    assert load(tmp_path / PTH).scale == 4


def test_a_second_run_finds_everything_done(cloud: Cloud) -> None:
    again = cloud.run()
    assert again.returncode == 0, again.stdout[-3000:]
    assert "15 of 15 stages are done, nothing to run" in again.stdout
    assert "tiny-x2 version 1: champion" in again.stdout
    assert "finetune-x4" in again.stdout


def test_changed_config_is_planned_anew_and_only_what_it_concerns(cloud: Cloud) -> None:
    plan = cloud.run("--dry-run", "--set", "phases.finetune.lr=3e-5")
    lines = {line.split()[0]: line.split()[1] for line in plan.stdout.splitlines() if line.strip()}
    assert lines["pretrain-x4"] == "done"
    assert lines["finetune-x2"] == lines["evaluate"] == lines["promote"] == "run"
    assert "6 of 15 stages to run, 6 training steps" in plan.stdout


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("runs", "storage.uri 'runs' is a relative path, and this is a Ray job"),
        # the working folder of whoever looks: each node has its own
        ("/proc/self/cwd/runs", "is not the same folder on 127.0.0.2 as on the driver's node: use s3://"),
    ],
)
def test_storage_that_vanishes_or_is_not_shared_is_refused_before_any_work(cloud: Cloud, uri: str, words: str) -> None:
    tried = cloud.run(storage_uri=uri)
    assert tried.returncode != 0
    assert words in tried.stdout + tried.stderr
    assert "[1/15]" not in tried.stdout


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["storage.uri=/proc/nowhere"], ["/proc/nowhere"]),
        (["storage.uri=s3://no-such-bucket-here/x"], ["s3://no-such-bucket-here"]),
        (["data.photographs.source=/absent/folder"], ["/absent/folder"]),
        (["tracking.uri=http://127.0.0.1:9"], ["http://127.0.0.1:9", "start the server"]),
        (["phases.pretrain.stepz=1"], ["stepz"]),
        (["data.photographs.source={tmp}/empty"], ["/empty", "no image"]),
        (
            ["{start}.start=published", "{start}.init_weights={golden}/hat_x2_w16.pth"],
            ["hat_x2_w16.pth", "embed_dim 48"],
        ),
        (
            ["{start}.start=published", "{start}.init_weights={golden}/hmanet_x2_w16.pth"],
            ["hmanet_x2_w16.pth", "arch hmanet"],
        ),
        (["{start}.start=published", "{start}.init_weights={golden}/cases.json"], ["cases.json"]),
        (["{start}.start=published", "{start}.init_weights=/absent/x.pth"], ["/absent/x.pth"]),
        (["trainings.pretrain-x3.init_from=pretrain-x9"], ["pretrain-x9"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    cloud: Cloud,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    golden_files: Path,
    overrides: list[str],
    words: list[str],
) -> None:
    (tmp_path / "empty").mkdir()
    for name, value in cloud.env.items():
        monkeypatch.setenv(name, value)
    known = {"tmp": tmp_path, "golden": golden_files, "start": "trainings.pretrain-x2"}
    filled = [override.format(**known) for override in overrides]
    places = [f"storage.uri={tmp_path}/runs", f"tracking.uri={cloud.tracking}", *filled]
    arguments = [word for place in places for word in ("--set", place)]
    with pytest.raises(SystemExit) as left:  # in this process: each of its own would import for five seconds
        main(["pretrain", "--recipe", "tests/integration/tiny.yaml", *arguments])
    said = capsys.readouterr().err
    assert left.value.code == 2, said
    assert len(said.strip().splitlines()) == 1, said
    for word in words:
        assert word in said


def test_a_wrong_s3_secret_is_one_line_and_exit_code_2(cloud: Cloud) -> None:
    env = {**os.environ, **cloud.env, "AWS_SECRET_ACCESS_KEY": "wrong"}
    command = [sys.executable, "-m", "pipeline.pretrain", "--recipe", "tests/integration/tiny.yaml"]
    command += ["--set", f"storage.uri={cloud.base}/x", "--set", f"tracking.uri={cloud.tracking}"]
    tried = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert tried.returncode == 2
    assert len(tried.stderr.strip().splitlines()) == 1
    assert cloud.base in tried.stderr


def general_champion(client: MlflowClient, folder: Path) -> str:
    """An x2 network that interpolates bicubically becomes the champion `general-x2`; its version."""
    network = build("hat", 2, **TINY)
    bicubic_start(network)
    save_pth(folder / PTH, network.state_dict())
    run_id = client.create_run(client.create_experiment("general")).info.run_id
    tags = {registry.CONTENT_TAG: "general"}
    version = registry.register(client, run_id, "general-x2", {PTH: folder / PTH}, {}, tags)
    good = Verdict(promoted=True, reason="general", rival="none")
    return promotion.promote(client, "general-x2", version, lambda _: good).version


def test_a_retraining_on_the_cluster_with_everything_on_s3(
    cloud: Cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow.set_tracking_uri(cloud.tracking)
    client = MlflowClient(cloud.tracking)
    first = general_champion(client, tmp_path)
    let_arrive("text", tmp_path / "pages", range(8))
    for path in (tmp_path / "pages").iterdir():
        storage.upload(path, f"{cloud.base}/incoming/{path.name}")
    done = cloud.retrain()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    ledger = Ledger(f"{cloud.base}/retrained", "pages")
    (round_,) = ledger.rounds()
    assert round_.start == f"models:/general-x2/{first}"
    held = {f"{image.sha256}.png" for image in round_.images if image.role == "hold-out"}
    assert len(round_.images) == 8
    assert len(held) >= 2
    assert {info.path for info in storage.list_files(ledger.hold_out_uri)} == held
    outcome = ledger.outcome(1)
    assert outcome is not None
    assert outcome["promoted"], outcome
    champion = client.get_model_version_by_alias("general-x2", "champion")
    assert str(champion.version) == outcome["version"] != first
    assert champion.tags["hatchery.parent_version"] == round_.start
    assert not storage.exists(f"{ledger.uri}/retrain.lock")
    with StorageLock(f"{ledger.uri}/retrain.lock", "a test", heartbeat_s=0.2):
        assert "leaving it to another run" in retrain_here(cloud, capsys)
    assert "0 new images: nothing to do" in retrain_here(cloud, capsys)


def test_the_planted_secret_is_in_no_byte_of_what_was_left(cloud: Cloud) -> None:
    """Storage, MLflow's database and artifacts, and what the jobs said: both commands had it in tracking.uri.

    But for the line in which Ray repeats the command that it was given.
    """
    assert SECRET in cloud.signed
    kept = {info.uri: storage.read_bytes(info.uri) for info in storage.list_files(cloud.base)}
    assert any("/mlflow/" in uri for uri in kept)
    assert any(uri.endswith("/artifact.json") for uri in kept)
    kept |= {str(path): path.read_bytes() for path in cloud.cluster.folder.glob("mlflow.*")}
    said = [re.sub(r"(?m)^Running entrypoint for job .*$", "", text) for text in cloud.said]
    kept |= {f"output {number}": text.encode() for number, text in enumerate(said)}
    assert len(cloud.said) >= 4
    assert [name for name, content in kept.items() if SECRET.encode() in content] == []


def retrain_here(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> str:
    """A call that has nothing to train, without the cluster."""
    with pytest.raises(SystemExit) as ended:
        main(["retrain", *cloud.domain])
    assert ended.value.code == 0
    return capsys.readouterr().out
