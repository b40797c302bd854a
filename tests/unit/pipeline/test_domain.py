"""Domains and their ledger: what is seen is seen by content, what is held out stays held out."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from data_prep.sources import NoImagesError, list_items
from model import build
from pipeline import registry, retrain
from pipeline.config import DataConfig, ModelConfig, Recipe
from pipeline.costs import measure_costs
from pipeline.domain import load_domain
from pipeline.held_out import patterns_of_judging
from pipeline.ledger import Ledger, NewImage, Round, with_roles
from pipeline.settings import ConfigError
from pipeline.worker import pair_settings
from tests.domains import let_arrive
from tests.unit.model.tiny import TINY

YAML = """
name: text
source: {folder}
base: models:/tiny-x2@champion
replay: {{source: "photographs:", share: 0.3}}
training: {{steps: 10}}
evaluate: {{sets: {{Set5: /data/Set5}}}}
gate: {{better: {{text: 0.1}}, not_worse: {{Set5: 0.1}}}}
"""


def domain_file(folder: Path) -> str:
    (folder / "text.yaml").write_text(YAML.format(folder=folder))
    return str(folder / "text.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("name=Bad Name", ["name", "Bad Name"]),
        ("base=tiny", ["base", "tiny"]),
        ("training.data=photographs", ["training.data", "remove it"]),
        ("evaluate.sets.text=/x", ["evaluate.sets.text", "rename"]),
        ("gate.better.nowhere=1", ["nowhere", "text, Set5"]),
        ("hold_out_share=1", ["hold_out_share", "1"]),
        ("replay.shares=0.2", ["replay.shares", "share"]),
        ("schedule.cron=daily", ["schedule.cron", "'daily' has 1 fields", "minute hour day"]),
        ("schedule.cron=0 24 * * *", ["schedule.cron", "hour '24'", "within 0-23"]),
        ("base=models:/tiny-x2", ["base", "models:/tiny-x2", "models:/NAME@champion"]),
        ("base=models:/tiny-x2@", ["base", "models:/NAME@champion"]),
        ("registered_as=pages", ["registered_as", "'pages'", "end it in -x2"]),
        ("compute.num_workers=64", ["training.global_batch 32", "compute.num_workers 64"]),
        ("training.global_batch=2", ["training.global_batch 2", "lower compute.micro_batch"]),
    ],
)
def test_faults_name_the_value(tmp_path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_domain(domain_file(tmp_path), [override])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_domain_file_that_is_absent() -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml is no file"):
        load_domain("/absent.yaml")


def images(count: int) -> list[NewImage]:
    digests = [hashlib.sha256(bytes([n])).hexdigest() for n in range(count)]
    return [NewImage(sha256=sha, item_key=sha, uri="/x", offset=None, size=1, ext="png") for sha in digests]


def test_roles_follow_from_content_alone() -> None:
    together = {image.sha256: image.role for image in with_roles(images(200), 0.2, 0)}
    apart = with_roles(images(200)[100:], 0.2, 0) + with_roles(images(200)[:100], 0.2, 0)
    assert {image.sha256: image.role for image in apart} == together
    held = sum(role == "hold-out" for role in together.values())
    assert 25 <= held <= 55
    few = [image.role for image in with_roles(images(3), 0.01, 2)]
    assert few.count("hold-out") == 2


def open_round(ledger: Ledger, folder: Path, number: int) -> list[NewImage]:
    new, _ = ledger.new_images(list_items(str(folder)), 64)
    chosen = with_roles(new, 0.3, 1)
    ledger.open(Round(number=number, start="models:/m/1", opened="now", images=tuple(chosen)))
    return chosen


def test_the_ledger_knows_content_not_names(tmp_path: Path) -> None:
    incoming, ledger = tmp_path / "incoming", Ledger(str(tmp_path / "runs"), "text")
    let_arrive("text", incoming, range(4))
    (incoming / "copy.png").write_bytes((incoming / "text-00000.png").read_bytes())
    (incoming / "small.png").write_bytes(b"")
    new, unusable = ledger.new_images(list_items(str(incoming)), 64)
    assert (len(new), unusable) == (4, 1)
    assert ledger.new_images(list_items(str(incoming)), 64)[0] == new
    assert 0 <= ledger.waited_s(new) < 60
    first = open_round(ledger, incoming, 1)
    (incoming / "text-00001.png").rename(incoming / "renamed.png")
    assert ledger.new_images(list_items(str(incoming)), 64)[0] == []
    assert ledger.rounds()[0].images == tuple(first)
    assert ledger.outcome(1) is None
    ledger.close(1, {"promoted": True})
    assert ledger.outcome(1) == {"promoted": True}


def test_a_name_that_is_no_utf8_arrives_is_copied_and_left_out_of_the_replay(tmp_path: Path) -> None:
    incoming, ledger = tmp_path / "incoming", Ledger(str(tmp_path / "runs"), "text")
    let_arrive("text", incoming, range(2))
    (incoming / "text-00000.png").rename(incoming / os.fsdecode(b"caf\xe9.png"))
    (incoming / "text-00001.png").rename(incoming / ("x" * 251 + ".png"))
    chosen = open_round(ledger, incoming, 1)
    assert ledger.rounds()[0].images == tuple(chosen)
    assert sorted(path.stem for path in Path(ledger.uri).rglob("*.png")) == sorted(image.sha256 for image in chosen)
    items = list_items(str(incoming))
    globs = patterns_of_judging(str(incoming), (), (), items)
    assert sorted(globs)[0] == "/caf?.png"
    assert DataConfig(source=str(incoming), exclude=globs).exclude == globs
    with pytest.raises(NoImagesError):
        list_items(str(incoming), exclude=globs)


def test_copies_of_a_round_that_never_opened_are_swept(tmp_path: Path) -> None:
    """A killed call may have held out an image that the next call, with more images, trains on."""
    incoming, ledger = tmp_path / "incoming", Ledger(str(tmp_path / "runs"), "text")
    let_arrive("text", incoming, range(4))
    Path(ledger.hold_out_uri).mkdir(parents=True)
    (Path(ledger.hold_out_uri) / f"{'0' * 64}.png").write_bytes(b"left")
    chosen = open_round(ledger, incoming, 1)
    held = {path.stem for path in Path(ledger.hold_out_uri).iterdir()}
    trained = {path.stem for path in Path(ledger.train_uri(1)).iterdir()}
    assert held == {image.sha256 for image in chosen if image.role == "hold-out"}
    assert trained == {image.sha256 for image in chosen if image.role == "train"}
    assert not held & trained


def test_an_image_that_changes_while_it_is_copied_is_refused(tmp_path: Path) -> None:
    incoming, ledger = tmp_path / "incoming", Ledger(str(tmp_path / "runs"), "text")
    let_arrive("text", incoming, range(2))
    new, _ = ledger.new_images(list_items(str(incoming)), 64)
    let_arrive("charts", incoming, range(1))
    (incoming / "text-00000.png").write_bytes((incoming / "charts-00000.png").read_bytes())
    with pytest.raises(ValueError, match="changed while it was being read"):
        ledger.open(Round(number=1, start="models:/m/1", opened="now", images=tuple(new)))


def choose(folder: Path, *overrides: str, now: bool = False) -> tuple[list[NewImage] | None, str]:
    """What a call at the domain would take in, and what it says of it."""
    let_arrive("charts", folder / "Set5", range(1))
    places = (f"storage.uri={folder}/runs", f"evaluate.sets.Set5={folder}/Set5")
    domain = load_domain(domain_file(folder), [f"source={folder}/incoming", *places, *overrides])
    said: list[str] = []
    ledger = Ledger(f"{folder}/runs", "text")
    return retrain._choose_images(domain, ledger, ledger.rounds(), now, said.append), " ".join(said)


def test_too_few_new_images_wait_until_the_oldest_is_overdue(tmp_path: Path) -> None:
    let_arrive("text", tmp_path / "incoming", range(3))
    few = ("min_hold_out=1", "max_wait_days=14")
    assert choose(tmp_path, *few) == (None, "text: 3 new images, 50 make a retraining worthwhile: nothing to do")
    waiting = tmp_path / "runs" / "domains" / "text" / "waiting.json"
    seen = json.loads(waiting.read_text())
    waiting.write_text(json.dumps(seen | {min(seen): time.time() - 13.9 * 86_400}))
    assert choose(tmp_path, *few)[0] is None
    waiting.write_text(json.dumps(seen | {min(seen): time.time() - 14.1 * 86_400}))
    images, _ = choose(tmp_path, *few)
    assert images is not None
    assert sorted(image.role for image in images) == ["hold-out", "train", "train"]


def test_images_that_are_all_held_out_wait(tmp_path: Path) -> None:
    let_arrive("text", tmp_path / "incoming", range(3))
    images, said = choose(tmp_path, "min_hold_out=3", now=True)
    assert images is None
    assert said == "text: all 3 new images are held out for judgement, none is left to train on: waiting"


@pytest.fixture
def recipe_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """Makes the recipe of a domain's last round, from a tiny network that no registry holds."""
    monkeypatch.setattr(registry, "resolve", lambda client, uri: ModelVersion("tiny-x2", uri.rpartition("/")[2], 0))
    monkeypatch.setattr(retrain, "_model_of", lambda version: (ModelConfig(arch="hat", options=TINY), 2))
    let_arrive("charts", tmp_path / "Set5", range(1))
    said: list[str] = []

    def make(rounds: list[Round], *overrides: str, **more: object) -> Recipe:
        places = (f"storage.uri={tmp_path}/runs", f"evaluate.sets.Set5={tmp_path}/Set5", "training.patch_px=32")
        domain = load_domain(domain_file(tmp_path), [*places, *overrides]).model_copy(update=more)
        return retrain.round_recipe(domain, Ledger(f"{tmp_path}/runs", "text"), MlflowClient(), rounds, said.append)

    make.said = said  # type: ignore[attr-defined]
    return make


ROUND = Round(number=1, start="models:/tiny-x2/1", opened="now", images=tuple(images(1)))


def held_by_another(folder: Path, image: Path) -> None:
    """Another domain with the same storage holds out an image with this content, under its own name."""
    data = image.read_bytes()
    target = folder / "runs" / "domains" / "other" / "hold-out" / f"{hashlib.sha256(data).hexdigest()}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def excluded(data: DataConfig) -> set[str]:
    everything = {item.key for item in list_items(data.source)}
    return everything - {item.key for item in list_items(data.source, data.include, data.exclude)}


def test_what_another_domain_holds_out_never_trains(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    replay, incoming = tmp_path / "replay", tmp_path / "incoming"
    let_arrive("charts", replay, range(1, 4))
    let_arrive("charts", replay / "below", range(4, 5))
    (replay / "below" / "charts-00001.png").write_bytes((replay / "charts-00002.png").read_bytes())
    let_arrive("text", incoming, range(8))
    places = [f"replay.source={replay}"]
    ledger = Ledger(str(tmp_path / "runs"), "text")
    chosen = open_round(ledger, incoming, 1)
    round_ = ledger.rounds()[0]
    before = recipe_of([round_], *places)
    assert before.data["replay"].exclude == before.data["text-0001"].exclude == ()
    held_by_another(tmp_path, replay / "charts-00001.png")
    trained = next(image for image in chosen if image.role == "train")
    held_by_another(tmp_path, Path(trained.uri))
    (replay / "page.png").write_bytes((tmp_path / "Set5" / "charts-00000.png").read_bytes())
    recipe = recipe_of([round_], *places)
    # not the one of the same name below it
    assert excluded(recipe.data["replay"]) == {"charts-00001%2Epng", "page%2Epng"}
    assert excluded(recipe.data["text-0001"]) == {f"{trained.sha256}%2Epng"}
    assert recipe_of.said == [  # type: ignore[attr-defined]
        "text: 1 images of its rounds and 2 of the replay judge now: left out"
    ]
    for image in chosen:
        if image.role == "train":
            held_by_another(tmp_path, Path(image.uri))
    with pytest.raises(ValueError, match="all images of its rounds are held out elsewhere: remove them"):
        recipe_of([round_], *places)


def test_every_round_is_held_against_where_the_domain_started(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    later = ROUND.model_copy(update={"number": 2, "start": "models:/tiny-x2/5"})
    recipe = recipe_of([ROUND, later])
    assert recipe.trainings["text-0002"].init_weights == "models:/tiny-x2/5"
    assert recipe.registry.anchor == "models:/tiny-x2/1"


def test_an_open_rounds_own_hold_out_is_not_replayed(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    """The recipe is made before the round's copies are."""
    let_arrive("text", tmp_path / "incoming", range(6))
    new, _ = Ledger(str(tmp_path / "runs"), "text").new_images(list_items(str(tmp_path / "incoming")), 64)
    round_ = ROUND.model_copy(update={"images": tuple(with_roles(new, 0.3, 1))})
    recipe = recipe_of([round_], f"replay.source={tmp_path}/incoming")
    held = {image.item_key for image in round_.images if image.role == "hold-out"}
    assert held
    assert excluded(recipe.data["replay"]) == held


def test_new_images_that_judge_elsewhere_are_held_out(tmp_path: Path) -> None:
    let_arrive("text", tmp_path / "incoming", range(3))
    let_arrive("charts", tmp_path / "incoming", range(1))  # of Set5
    held_by_another(tmp_path, tmp_path / "incoming" / "text-00001.png")
    images, said = choose(tmp_path, "min_hold_out=1", "hold_out_share=0.001", now=True)
    assert "2 new images judge already, in another domain or a benchmark: held out" in said
    assert images is not None
    held = {Path(image.uri).name for image in images if image.role == "hold-out"}
    assert {"text-00001.png", "charts-00000.png"} <= held


def test_a_domains_degradation_reaches_the_loader(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of([ROUND], "degradation=[{step: shrink}, {step: jpeg, quality: 50}]")
    job = SimpleNamespace(
        training=recipe.trainings["text-0001"], phase=recipe.phases["retrain"], seed=0, compute=recipe.compute
    )
    steps = pair_settings(job).degradation  # type: ignore[arg-type]
    assert [step["step"] for step in recipe.phases["retrain"].what()["degradation"]] == ["shrink", "jpeg"]
    assert steps == recipe.phases["retrain"].degradation
    with pytest.raises(ConfigError, match=r"domain text: degradation .noise. has 0 steps `shrink`"):
        recipe_of([ROUND], "degradation=[{step: noise, sigma: 5}]")
    assert "degradation" not in recipe_of([ROUND]).phases["retrain"].what()  # artifacts from before still count


def test_a_degradation_in_the_wrong_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belongs beside training"):
        load_domain(domain_file(tmp_path), ["training.degradation=[{step: shrink}, {step: jpeg, quality: 30}]"])


def test_without_upscaling_a_domains_hold_out_must_be_degraded(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrain, "_model_of", lambda version: (ModelConfig(arch="hat", options=TINY), 1))
    noise = "[{step: noise, sigma: 5}]"
    settings = ["registered_as=tiny-x1", f"degradation={noise}", f"evaluate.degrade.Set5={noise}"]
    with pytest.raises(
        ConfigError, match=r"domain text: at x1 its hold-out must be degraded .* evaluate\.degrade\.text"
    ):
        recipe_of([ROUND], *settings)
    recipe = recipe_of([ROUND], *settings, f"evaluate.degrade.text={noise}")
    assert recipe.trainings["text-0001"].scale == 1
    assert set(recipe.evaluate.degrade) == {"Set5", "text"}


def test_the_registered_models_name_must_tell_its_scale(tmp_path: Path) -> None:
    start = ModelVersion("tiny-x2", "3", 0)
    assert retrain._registry_name(load_domain(domain_file(tmp_path)), start, 2) == "tiny"
    other = load_domain(domain_file(tmp_path), ["registered_as=pages-x4"])
    with pytest.raises(ValueError, match="'pages-x4' upscales x2: set registered_as to a name that ends in -x2"):
        retrain._registry_name(other, start, 2)


def test_costs_are_ratios() -> None:
    small, large = build("hat", 2, **TINY), build("hat", 2, **(TINY | {"depths": (4,)}))
    found = measure_costs(large.eval(), small.eval())
    parameters = [sum(p.numel() for p in network.parameters()) for network in (large, small)]
    assert found.growth == parameters[0] / parameters[1]
    assert found.slowdown > 0  # a time: tests/bench compares those
