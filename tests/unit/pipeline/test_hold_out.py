"""Images that a recipe holds out of its own training set: which, that they never train, and that the rest does."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from data_prep import sources
from pipeline import dry_run, plan, survey
from pipeline.config import ConfigError, Recipe, load_recipe
from pipeline.domain import load_domain
from pipeline.survey import Choice
from tests.shared_data import ROOT


def photograph(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (140, 150, 3), dtype=np.uint8)).save(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty photographs with names as people have them."""
    for number in range(40):
        photograph(tmp_path / "in" / f"day {number % 3}" / f"IMG[{number}]_é.png", number)
    return tmp_path / "in"


def own(folder: Path, *overrides: str) -> Recipe:
    places = [f"data.photographs.source={folder}", f"storage.uri={folder.parent}/runs"]
    return load_recipe("own_photographs", [*places, *overrides])


def split(recipe: Recipe) -> tuple[set[str], set[str]]:
    """The paths that train and those that judge, as sharding and evaluating find them."""
    data = recipe.data["photographs"]
    trained = sources.list_items(data.source, data.include, data.exclude)
    judged = recipe.evaluate.images("held-out", 2)
    return {item.uri for item in trained}, {image.high_res.uri for image in judged}


def test_a_share_is_held_out_and_never_trains(folder: Path) -> None:
    recipe, said = survey.settled(own(folder))
    trained, judged = split(recipe)
    assert (len(trained), len(judged)) == (36, 4)
    assert not trained & judged
    assert said == ["held-out: 4 of the 40 images of data.photographs judge and never train"]
    assert recipe.evaluate.hold_out == {}
    assert survey.settled(recipe) == (recipe, [])  # once is enough: so a registered version's recipe can be judged by


def test_copies_of_what_judges_do_not_train(folder: Path) -> None:
    _, judged = split(survey.settled(own(folder))[0])
    first = Path(sorted(judged)[0])
    shutil.copy(first, folder / "zzz copy.png")
    trained, again = split(survey.settled(own(folder))[0])
    assert not {path for path in trained if Path(path).read_bytes() == first.read_bytes()}
    assert len(again) == 4


def test_more_photographs_leave_most_of_the_judges_what_they_are(folder: Path) -> None:
    _, before = split(survey.settled(own(folder))[0])
    for number in range(40, 44):
        photograph(folder / f"new-{number}.png", number)
    _, after = split(survey.settled(own(folder))[0])
    assert len(before & after) >= 3


def test_broken_files_and_names_that_are_there_twice_do_not_judge(folder: Path) -> None:
    _, judged = split(survey.settled(own(folder))[0])
    for path in judged:
        Path(path).write_bytes(b"broken")
    (folder / "other").mkdir()
    _, others = split(survey.settled(own(folder))[0])
    assert len(others) == 4
    assert not others & judged
    stems = [Path(path).stem for path in others]
    for number, path in enumerate(sorted(others)):
        photograph(folder / "other" / Path(path).name, 100 + number)
    recipe = survey.settled(
        own(folder, "evaluate.hold_out.held-out.max_images=6", "evaluate.hold_out.held-out.share=0.5")
    )
    names = [image.name for image in recipe[0].evaluate.images("held-out", 2)]
    assert len(names) == len(set(names)) == 6
    assert set(names) & set(stems)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluate.hold_out.held-out.data=photograph", "is not one of data: photographs: did you mean photographs?"),
        ("evaluate.sets.held-out=x", "'held-out' is in evaluate.sets and in evaluate.hold_out"),
        ("evaluate.hold_out.held-out.min_images=9", "min_images 9 is above max_images 6: lower it"),
        ("registry.gate.better={held-ou: 0}", "registry.gate asks about 'held-ou', not one of evaluate.sets: held-out"),
    ],
)
def test_holding_out_what_cannot_be(folder: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        own(folder, override)
    assert words in str(caught.value)


def test_too_few_photographs_are_one_line(tmp_path: Path) -> None:
    for number in range(2):
        photograph(tmp_path / "in" / f"{number}.png", number)
    with pytest.raises(ValueError, match=r"leaves no image of data\.photographs to train on: add images"):
        survey.settled(own(tmp_path / "in"))
    (tmp_path / "in" / "0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1 of the 2 images of data\.photographs can judge, 2 must"):
        survey.settled(own(tmp_path / "in"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        survey.settled(own(tmp_path / "empty"))


def test_a_domain_holds_out_its_own_way() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.hold_out is for recipes: a domain has hold_out_share"):
        load_domain(str(ROOT / "configs" / "domain" / "text.yaml"), ["evaluate.hold_out.x={data: y}"])


def test_the_fingerprint_follows_the_photographs(folder: Path) -> None:
    def fingerprints() -> dict[str, str]:
        recipe, _ = survey.settled(own(folder))
        return {stage.name: stage.fingerprint({}) for stage in plan.stages_of(recipe, survey.survey(recipe))}

    before = fingerprints()
    assert before == fingerprints()
    photograph(folder / "new.png", 99)
    assert fingerprints()["shard-photographs"] != before["shard-photographs"]


def test_a_dry_run_says_what_is_held_out(folder: Path) -> None:
    screen = io.StringIO()
    dry_run.run(own(folder), Choice(), Console(file=screen, width=200))
    assert "held-out: 4 of the 40 images" in screen.getvalue()
    assert "15 minutes" in screen.getvalue()
