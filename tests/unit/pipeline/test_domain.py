"""Domains and their ledger: what is seen is seen by content, what is held out stays held out."""

from pathlib import Path

import pytest
from mlflow.entities.model_registry import ModelVersion

from data_prep.sources import list_items
from model import build
from pipeline import retrain
from pipeline.costs import measure_costs
from pipeline.domain import load_domain
from pipeline.ledger import Ledger, NewImage, Round, with_roles
from pipeline.settings import ConfigError
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
    import hashlib

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
