"""`hatchery config`: no key is left out, every one says what it is for, values are those of the recipe."""

import pytest

from pipeline import config_reference
from pipeline.cli import main
from pipeline.config import Recipe, load_recipe

EVERY = config_reference.keys()
PHASES = ("pretrain", "cascaded", "finetune")


def test_no_key_is_left_out_and_every_one_says_what_it_is_for() -> None:
    schema = Recipe.model_json_schema()
    classes = [found["properties"] for found in (schema, *schema["$defs"].values()) if "properties" in found]
    declared = {name for properties in classes if "step" not in properties for name in properties}
    assert declared <= {part for key in EVERY for part in key.path.split(".")}
    assert len({key.path for key in EVERY}) == len(EVERY)
    assert [key.path for key in EVERY if not key.description] == []


def test_a_recipes_names_and_values_are_shown() -> None:
    demo = {key.path: key for key in config_reference.keys(load_recipe("demo", ["phases.finetune.lr=0.5"]))}
    assert (demo["phases.finetune.lr"].value, demo["phases.finetune.lr"].default) == ("0.5", "0.0002")
    assert demo["registry.gate.better"].value == "{held-out: 0}"
    assert demo["evaluate.include"].value == "{held-out: [coffee.png, chelsea.png]}"
    assert demo["trainings.pretrain-x3.init_from"].value == "pretrain-x2"
    line = demo["phases.finetune.steps"].as_line()
    assert line == (
        "phases.finetune.steps = 80  (default null)  # optimizer steps; null: minutes says how long; "
        "a whole number at least 1 or null"
    )
    assert "phases.finetune.perceptual.weight" not in demo  # the section is null there
    assert "phases.adversarial.perceptual.weight" in {
        key.path for key in config_reference.keys(load_recipe("real_gan"))
    }


def hatchery(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["config", *arguments])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        (["compute.zero_stage"], ["compute.zero_stage"]),
        (["tracking"], ["tracking.uri", "tracking.experiment", "tracking.patience_s"]),
        (["steps"], ["phases.NAME.steps"]),
        (
            ["warmup_steps", "--recipe", "demo"],
            [f"phases.{name}.warmup_steps" for name in ("pretrain", "cascaded", "finetune")],
        ),
        (
            ["registry.gate.max_growth", "--recipe", "demo", "--set", "registry.gate.max_growth=2"],
            ["registry.gate.max_growth"],
        ),
    ],
)
def test_the_command_prints_the_keys_asked_for(
    capsys: pytest.CaptureFixture[str], arguments: list[str], paths: list[str]
) -> None:
    code, out, err = hatchery(capsys, *arguments)
    assert (code, err) == (0, "")
    assert [line.split(" ")[0] for line in out.splitlines()] == paths
    assert all("  # " in line for line in out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stepz"], "no key 'stepz': did you mean steps?"),
        (["phases.NAME.stepz"], "did you mean phases.NAME.steps?"),
        (["computee"], "did you mean compute?"),
        (["qqqq"], "there are storage, tracking, compute"),
        (["phases.finetun", "--recipe", "demo"], "did you mean phases.finetune?"),
        (["--set", "seed=3"], "--set seed=3 needs a recipe to change: give --recipe"),
        (["--recipe", "demoo"], "did you mean demo?"),
    ],
)
def test_keys_that_are_not_there(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    code, out, err = hatchery(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
