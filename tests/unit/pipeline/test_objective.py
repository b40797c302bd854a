"""Perceptual losses of recipes: found before work begins, part of what is trained, wherever the file lies."""

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.config import Recipe, load_recipe
from pipeline.objective import check_backbones, loss_of
from pipeline.plan import Outside, stages_of
from tests.unit.model.test_perceptual import write


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG-16 with made-up weights."""
    return write(tmp_path_factory.mktemp("vgg"), "vgg")[0]


def recipe(backbone: object, *more: str) -> Recipe:
    return load_recipe("demo", [f"phases.finetune.perceptual.backbone={backbone}", *more])


def finetuning(made: Recipe) -> dict[str, object]:
    sources = dict.fromkeys(made.data, "v1")
    outside = Outside(sources, dict.fromkeys(made.evaluate.sets, "v1"), {}, check_backbones(made))
    return {stage.name: stage.config for stage in stages_of(made, outside)}


def test_a_relative_path_means_the_drivers_folder(vgg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(vgg.parent)
    made = recipe(vgg.name)
    monkeypatch.chdir("/")  # training processes work in another one
    pred, target = torch.rand(2, 1, 3, 32, 32).unbind()
    loss = loss_of(made.phases["finetune"], torch.device("cpu"))
    assert loss(pred, target) > loss_of(made.phases["pretrain"], torch.device("cpu"))(pred, target)


def test_what_counts_is_the_files_content(vgg: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.pth"
    shutil.copy(vgg, moved)
    here, there = finetuning(recipe(vgg)), finetuning(recipe(moved))
    assert here == there
    state = torch.load(vgg, weights_only=True)
    torch.save(state | {"features.0.bias": state["features.0.bias"] + 1}, moved)
    other = finetuning(recipe(moved))
    differing = {name for name in here if here[name] != other[name]}
    assert differing == {"finetune-x2", "finetune-x3", "finetune-x4"}
    heavier = finetuning(recipe(vgg, "phases.finetune.perceptual.weight=2"))
    assert here["finetune-x2"] != heavier["finetune-x2"]
    assert "backbone" not in here["pretrain-x2"]  # type: ignore[operator]


@pytest.mark.parametrize(("name", "words"), [("absent.pth", "absent"), ("alex.pth", "holds AlexNet")])
def test_files_that_will_not_do_are_named(vgg: Path, name: str, words: str) -> None:
    write(vgg.parent, "alex")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        check_backbones(recipe(vgg.parent / name))
    assert str(vgg.parent / name) in str(caught.value)


def test_without_weights_no_stage_matters(vgg: Path) -> None:
    with pytest.raises(ValueError, match="stage_weights are all 0"):
        recipe(vgg, "phases.finetune.perceptual.stage_weights=[0,0,0,0,0]")
