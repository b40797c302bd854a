"""Registration and the gate on a real MLflow store (SQLite): who becomes champion, and why."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from model import build, load
from model.inference import upscale
from model.weights import save_pth
from pipeline import dry_run, lineage, pretrain, promotion, registry, report
from pipeline.artifact import Artifact
from pipeline.cli import main
from pipeline.config import EvaluateConfig, Recipe, load_recipe
from pipeline.evaluate import SetResult
from pipeline.gate import Verdict, decide
from pipeline.lineage import PARENT_TAG
from pipeline.promotion import Decision
from pipeline.registry_lock import Busy, promotion_lock
from pipeline.rivals import judge_candidate
from pipeline.rule import GateConfig
from tests.shared_data import ROOT
from tests.unit.pipeline.figures import judged

pytestmark = pytest.mark.integration

RULE = GateConfig(better={"Set5": 0.1})
OPTIONS = {"embed_dim": 12, "depths": [1], "num_heads": [3], "window_size": 8, "compress_ratio": 3, "squeeze_factor": 3}


def result(psnr: float, name: str = "Set5") -> SetResult:
    return judged([psnr, psnr], name)


class Registry:
    """A fresh store with one run in it."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"sqlite:///{folder}/mlflow.db"
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        self.client = MlflowClient(self.uri)
        experiment = self.client.create_experiment("e", artifact_location=str(folder / "artifacts"))
        self.run_id = self.client.create_run(experiment).info.run_id
        self.weights = folder / "weights.pth"
        save_pth(self.weights, build("hat", 2, **OPTIONS).state_dict())

    def register(self, content: str, *figures: SetResult) -> registry.ModelVersion:
        tags = {registry.CONTENT_TAG: content, **registry.metric_tags(list(figures))}
        carried = self.weights.with_name(registry.EVALUATION)
        carried.write_text(report.as_json(list(figures)))
        files = {"weights.pth": self.weights, registry.EVALUATION: carried}
        return registry.register(self.client, self.run_id, "m-x2", files, {}, tags)

    def promote(self, content: str, figures: SetResult) -> Decision:
        def judge(champion: registry.ModelVersion | None) -> Verdict:
            if champion is None:
                return decide([figures], None, "bicubic", RULE)
            with tempfile.TemporaryDirectory() as folder:
                theirs = registry.read_report(champion, Path(folder))
            return decide([figures], theirs, f"champion version {champion.version}", RULE)

        return promotion.promote(self.client, "m-x2", self.register(content, figures), judge)

    def aliases(self) -> tuple[str | None, ...]:
        return tuple(self.alias(name) for name in ("candidate", "champion", "previous"))

    def alias(self, name: str) -> str | None:
        found = registry.by_alias(self.client, "m-x2", name)
        return str(found.version) if found else None


@pytest.fixture
def store(tmp_path: Path) -> Registry:
    return Registry(tmp_path)


def test_the_gate_over_several_candidates_and_the_history_of_it(store: Registry) -> None:
    assert not store.promote("worse than bicubic", result(30.05)).promoted
    assert store.aliases() == ("1", None, None)
    first = store.promote("good", result(31.0))
    assert first.promoted
    assert "31.0000 against 30.0000" in first.reason
    assert not store.promote("hardly better", result(31.05)).promoted
    assert store.aliases() == ("3", "2", None)
    last = store.promote("better", result(31.2))
    assert "champion version 2" in last.reason
    assert store.aliases() == ("4", "4", "2")
    tags = store.client.get_model_version("m-x2", "3").tags
    assert tags["hatchery.promoted"] == "false"
    assert tags["hatchery.gain.psnr_y.Set5"] == "+0.050000 (+0.050000 .. +0.050000)"
    artifacts = [item.path for item in store.client.list_artifacts(store.run_id, "decisions")]
    assert artifacts == [f"decisions/m-x2-version-{n}.json" for n in (1, 2, 3, 4)]
    back = promotion.rollback(store.client, "m-x2", "complaints")
    assert (back.version, back.before) == ("2", "4")
    assert store.aliases() == ("4", "2", "4")
    told = [(e.action, e.version, e.before, e.done) for e in promotion.history(store.client, "m-x2")]
    assert told == [("promote", "2", None, True), ("promote", "4", "2", True), ("rollback", "2", "4", True)]


def test_two_promotions_at_once_one_wins_and_the_other_says_so(store: Registry) -> None:
    """The second one judges while the first one finishes; then two try to hold the lock."""
    slow, quick = store.register("slow", result(31.0)), store.register("quick", result(32.0))
    good = Verdict(promoted=True, reason="good", rival="none")

    def judge_slowly(champion: registry.ModelVersion | None) -> Verdict:
        promotion.promote(store.client, "m-x2", quick, lambda _: good)
        return good

    with pytest.raises(ValueError, match=r"version 1 is not promoted: version 2 became champion meanwhile"):
        promotion.promote(store.client, "m-x2", slow, judge_slowly)
    assert store.alias("champion") == "2"
    tags = store.client.get_model_version("m-x2", "1").tags
    assert tags["hatchery.promoted"] == "false"
    assert tags["hatchery.decision"].startswith("not promoted: version 2 became champion meanwhile")
    with (
        promotion_lock(store.client, "m-x2"),
        pytest.raises(Busy, match=r"m-x2 is being promoted by .* process \d+ since 0 s: wait"),
    ):
        promotion.rollback(store.client, "m-x2", "now")
    assert store.client.search_registered_models("name LIKE 'm-x2.lock-%'") == []


def test_two_promotions_of_one_version_agree(store: Registry) -> None:
    only = store.register("only", result(31.0))
    good = Verdict(promoted=True, reason="good", rival="none")

    def judge_slowly(champion: registry.ModelVersion | None) -> Verdict:
        promotion.promote(store.client, "m-x2", only, lambda _: good)
        return good

    assert promotion.promote(store.client, "m-x2", only, judge_slowly).promoted
    assert store.client.get_model_version("m-x2", "1").tags["hatchery.promoted"] == "true"
    assert len(promotion.history(store.client, "m-x2")) == 1


def test_of_many_that_want_the_lock_at_once_one_gets_it(store: Registry) -> None:
    def hold(_: int) -> str:
        try:
            with promotion_lock(MlflowClient(store.uri), "m-x2"):
                time.sleep(2)
        except Busy:
            return "busy"
        return "held"

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(hold, range(4))) == ["busy", "busy", "busy", "held"]


def locked(store: Registry, generation: int, **holder: object) -> None:
    tags = {"hatchery.holder": json.dumps({"owner": "x", "machine": "another one", "since": time.time()} | holder)}
    store.client.create_registered_model(f"m-x2.lock-{generation}", tags=tags)


def test_a_lock_of_another_machine_is_followed_after_a_while(store: Registry) -> None:
    locked(store, 3, owner="somebody@elsewhere")
    with pytest.raises(Busy, match=r"by somebody@elsewhere since \d s"), promotion_lock(store.client, "m-x2"):
        pass
    locked(store, 4, since=time.time() - 61)
    with promotion_lock(store.client, "m-x2"):
        held = [model.name for model in store.client.search_registered_models("name LIKE 'm-x2.lock-%'")]
        assert held == ["m-x2.lock-5"]


PROMOTE_AND_STOP = """
import sys, time
from mlflow import MlflowClient
from pipeline import promotion
from pipeline.gate import Verdict

client = MlflowClient(sys.argv[1])
moved = client.set_registered_model_alias

def move(name, alias, version):
    if alias == "champion":
        print("between the aliases", flush=True)
        time.sleep(60)
    moved(name, alias, version)

client.set_registered_model_alias = move
better = Verdict(promoted=True, reason="better", rival="version 1")
promotion.promote(client, "m-x2", client.get_model_version("m-x2", "2"), lambda champion: better)
"""


def test_a_promotion_that_was_killed_is_completed_by_the_next_call_at_once(store: Registry) -> None:
    store.promote("first", result(31.0))
    store.register("second", result(32.0))
    command = [sys.executable, "-c", PROMOTE_AND_STOP, store.uri]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "between the aliases\n"
    with pytest.raises(Busy, match=rf"process {killed.pid} since"):
        promotion.rollback(store.client, "m-x2", "while it lives")
    with pytest.raises(ValueError, match=r"no registered model 'other'; registered are: m-x2$"):
        registry.registered(store.client, "other")
    killed.kill()
    killed.wait()
    assert store.aliases() == ("2", "1", "1")
    begin = time.monotonic()
    assert store.promote("second", result(32.0)).promoted
    assert time.monotonic() - begin < 10
    assert store.aliases() == ("2", "2", "1")
    assert [(e.version, e.done) for e in promotion.history(store.client, "m-x2")] == [("1", True), ("2", True)]
    tags = store.client.get_model_version("m-x2", "2").tags
    assert (tags["hatchery.promoted"], tags["hatchery.decision"]) == ("true", "better")
    assert store.client.search_registered_models("name LIKE 'm-x2.lock-%'") == []


def test_a_crash_while_aliases_move_is_completed_by_the_next_call(
    store: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.promote("first", result(31.0))
    moved = store.client.set_registered_model_alias

    def die(name: str, alias: str, version: str) -> None:
        if alias == "champion":
            raise KeyboardInterrupt
        moved(name, alias, version)

    with monkeypatch.context() as patched:
        patched.setattr(store.client, "set_registered_model_alias", die)
        with pytest.raises(KeyboardInterrupt):
            store.promote("second", result(32.0))
    assert store.alias("champion") == "1"
    assert not promotion.history(store.client, "m-x2")[-1].done
    assert store.promote("second", result(32.0)).promoted
    assert store.aliases() == ("2", "2", "1")
    assert [event.done for event in promotion.history(store.client, "m-x2")] == [True, True]


def test_without_a_champion_the_version_it_was_started_from_is_the_rival(store: Registry) -> None:
    store.register("start", result(31.0))
    store.client.set_model_version_tag(
        "m-x2", store.register("tuned", result(31.2)).version, PARENT_TAG, "models:/m-x2/1"
    )
    tuned = store.client.get_model_version("m-x2", "2")
    verdict = judge_candidate([result(31.2)], tuned, None, RULE, EvaluateConfig())
    assert verdict.promoted
    assert "better than m-x2 version 1, its start" in verdict.reason
    costs = RULE.model_copy(update={"max_growth": 0.5})
    assert "parameters 1.000 of the rival's, required: at most 0.5" in (
        judge_candidate([result(31.2)], tuned, None, costs, EvaluateConfig()).reason
    )


def test_both_are_judged_again_where_the_set_has_grown(store: Registry, ray_local: object, tmp_path: Path) -> None:
    """An older version is put to the gate after images were added, while the champion was judged on all of them."""
    (tmp_path / "Set5").mkdir()
    for seed in range(3):
        image = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "Set5" / f"{seed}.png")
    older, champion = (judged([31.0] * images) for images in (2, 3))
    versions = [store.register(f"{len(found.images)}", found) for found in (older, champion)]
    rule = GateConfig(better={"Set5": -1.0})
    verdict = judge_candidate(
        [older], versions[0], versions[1], rule, EvaluateConfig(sets={"Set5": f"{tmp_path}/Set5"})
    )
    (condition,) = verdict.conditions
    assert verdict.promoted
    assert condition.figures is not None
    assert condition.figures.images == 3
    assert condition.figures.difference == 0  # the same weights
    assert condition.figures.mine < 30


@pytest.mark.parametrize("command", [pretrain, dry_run])
def test_an_alias_is_resolved_once_before_anything_reads_it(
    store: Registry, monkeypatch: pytest.MonkeyPatch, command: ModuleType
) -> None:
    """Else another champion's weights could be fine-tuned than the fingerprint and the lineage tell."""
    store.promote("first", result(31.0))
    start = ["trainings.pretrain-x2.init_weights=models:/m-x2@champion", "trainings.pretrain-x2.start=published"]
    recipe = load_recipe("demo", [*start, f"tracking.uri={store.uri}"])
    prepared = []

    def prepare(recipe: Recipe, choice: pretrain.Choice) -> None:
        prepared.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "prepare", prepare)
    with pytest.raises(KeyboardInterrupt):
        command.run(recipe, pretrain.Choice(), Console())
    store.promote("second", result(32.0))
    artifact = Artifact(stage="pretrain-x2", uri="", fingerprint="", digest="")
    tags = lineage.tags(prepared[0], "pretrain-x2", {"pretrain-x2": artifact})
    assert tags[PARENT_TAG] == "models:/m-x2/1"


def test_what_champions_lost_together_counts_against_the_anchor(store: Registry) -> None:
    rule = GateConfig(better={"new": 0.1}, not_worse={"Set5": 0.1}, decide_by="mean")

    def next_round(psnr_new: float, psnr_set5: float) -> Decision:
        mine = [result(psnr_new, "new"), result(psnr_set5)]
        version = store.register(f"{psnr_new}", *mine)

        def judge(champion: registry.ModelVersion | None) -> Verdict:
            return judge_candidate(mine, version, champion, rule, EvaluateConfig(), "models:/m-x2/1")

        return promotion.promote(store.client, "m-x2", version, judge)

    good = Verdict(promoted=True, reason="general", rival="none")
    general = store.register("general", result(30.0, "new"), result(33.0))
    promotion.promote(store.client, "m-x2", general, lambda _: good)
    first, second = next_round(31.0, 32.94), next_round(32.0, 32.88)
    assert first.promoted
    assert "since" not in first.reason  # the champion is the anchor still
    assert not second.promoted
    assert "since m-x2 version 1, where the domain started, psnr_y on Set5 32.8800 against 33.0000" in second.reason
    tags = store.client.get_model_version("m-x2", "3").tags
    assert tags["hatchery.gain.psnr_y.Set5"].startswith("-0.060000")
    assert tags["hatchery.since_start.psnr_y.Set5"].startswith("-0.120000")


def test_names_that_lead_nowhere_are_named(store: Registry) -> None:
    store.register("only", result(31.0))
    store.client.create_registered_model("empty")
    for uri, words in {
        "models:/other@champion": "no registered model 'other'; registered are: empty, m-x2",
        "models:/m-x2@champion": r"no version called champion: promote one, .*; it has candidate \(version 1\)",
        "models:/m-x2@candidat": r"called candidat: did you mean candidate\?; it has candidate \(version 1\)",
        "models:/m-x22@champion": r"no registered model 'm-x22'; registered are: empty, m-x2: did you mean m-x2\?",
        "models:/m-x2/9": "has no version 9, its newest is 1; there are 1",
        "models:/empty/1": "empty has no version 1, nor any other: register one",
        "models:/empty@candidate": "empty has no version called candidate: register one, or name a version by number",
        "models:/m-x2": "not of the form",
    }.items():
        with pytest.raises(ValueError, match=words):
            registry.resolve(store.client, uri)
        with pytest.raises(ValueError, match=words.replace("not of the form", "is no registered model")):
            registry.fetch_model(store.client, uri, store.weights.parent)
    shutil.rmtree(store.weights.parent / "artifacts")
    with pytest.raises(ValueError, match="models:/m-x2/1 was not registered by Hatchery, or its files are gone"):
        registry.fetch_model(store.client, "models:/m-x2/1", store.weights.parent)
    with pytest.raises(ValueError, match="carries no lineage"):
        registry.fetch(registry.resolve(store.client, "models:/m-x2/1"), "lineage.json", store.weights.parent)
    with pytest.raises(ValueError, match="no previous champion to go back to"):
        promotion.rollback(store.client, "m-x2", "x")


def test_the_same_content_is_registered_once(store: Registry) -> None:
    assert store.register("same", result(31.0)).version == store.register("same", result(31.0)).version
    assert store.promote("same", result(31.0)).promoted
    assert store.promote("same", result(31.0)).promoted  # again: champion already


def test_the_registered_model_takes_images_of_any_size(store: Registry) -> None:
    store.register("model", result(31.0))
    model = mlflow.pyfunc.load_model("models:/m-x2@candidate")
    images = np.random.default_rng(0).integers(0, 256, (2, 13, 30, 3), dtype=np.uint8)
    upscaled = model.predict(images)
    assert (upscaled.shape, upscaled.dtype) == ((2, 26, 60, 3), np.uint8)
    assert model.predict(images[..., :1]).shape == (2, 26, 60, 1)
    with pytest.raises(mlflow.exceptions.MlflowException, match="put the channels last"):
        model.predict(images.transpose(0, 3, 1, 2))


def test_upscaling_with_registered_models(store: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name, by version, or as the only champion of its scale."""
    tags = {registry.SCALE_TAG: "2"}
    store.promote("good", result(31.0))
    store.client.set_model_version_tag("m-x2", "1", *tags.popitem())
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "in.png")
    expected = upscale(load(store.weights), image)
    for chosen in (["--model", "models:/m-x2@champion"], ["--model", "models:/m-x2/1"], ["--scale", "2"]):
        out = str(tmp_path / "out.png")
        with pytest.raises(SystemExit) as ended:
            main(
                ["upscale", str(tmp_path / "in.png"), out, *chosen, "--tracking-uri", store.uri, "--precision", "fp32"]
            )
        assert ended.value.code == 0, capsys.readouterr().err
        assert np.array_equal(np.asarray(Image.open(out)), expected)


def test_several_champions_of_a_scale_are_named(store: Registry) -> None:
    for name in ("a", "b"):
        store.client.create_registered_model(name)
        version = store.client.create_model_version(name, str(store.weights), tags={registry.SCALE_TAG: "2"})
        store.client.set_registered_model_alias(name, "champion", version.version)
    with pytest.raises(ValueError, match="several champions for x2: choose one, --model models:/a@champion, models:/b"):
        registry.champion_of(store.client, 2)


def test_models_that_are_not_hatcherys(store: Registry, tmp_path: Path) -> None:
    store.client.create_registered_model("other")
    store.client.create_model_version("other", str(store.weights.parent / "artifacts"))
    (store.weights.parent / "artifacts").mkdir()
    with pytest.raises(ValueError, match="was not registered by Hatchery"):
        registry.fetch_model(store.client, "models:/other/1", tmp_path / "fetched")
