"""What people write into YAML files and --set: where it is wrong, what may have been meant, what is extended."""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pipeline import config_files, published
from pipeline.config import CONFIGS, ConfigError, Recipe, load_recipe
from pipeline.domain import load_domain
from pipeline.rule import GateConfig
from pipeline.settings import load_settings
from pipeline.suggest import closest
from tests.shared_data import ROOT


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def fault(folder: Path, text: str, *overrides: str) -> str:
    """The one line that is said of a recipe."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(folder, text), list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "place", "line", "words"),
    [
        ("extends: demo\nmodel:\n  options: {embed_dim: 32 depths: [2]}\n", (3, 33), "options: {embed_dim", "comma"),
        ("extends: demo\nphases:\n  finetune:\n    steps: 4\n   lr: 3\n", (5, 4), "lr: 3", "indent"),
        ("extends: demo\nphases:\n\tfinetune: {steps: 3}\n", (3, 1), "finetune", "tabs"),
        ("extends: demo\nseed: 3\nseed: 4\n", (3, 1), "seed: 4", "keep one"),
        ("extends: demo\nphases:\n  a: {steps: 3\n  b: {steps: 4}\n", (4, 4), "b: {steps", "begins at line 3"),
        ("extends: demo\nseed:4\nmodel: {}\n", (3, 1), "model", "with a space"),
        ("extends: demo\nname: 'mine\n", (3, 1), "the end", "close the quotes"),
        ("extends: [demo\nname: mine\n", (2, 5), "name: mine", "bracket"),
    ],
)
def test_what_is_no_yaml_is_said_with_its_place_and_line(
    tmp_path: Path, text: str, place: tuple[int, int], line: str, words: str
) -> None:
    said = fault(tmp_path, text)
    assert said.startswith(f"{tmp_path / 'mine.yaml'}: not readable as YAML at line {place[0]}, column {place[1]}, ")
    assert line in said
    assert words in said


def test_every_kind_of_yaml_file_tells_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = write(tmp_path, "better: {Set5: 0.1\nmetric: psnr_y\n", "published.yaml")
    for load in (
        lambda: load_domain(broken),
        lambda: load_settings(GateConfig, Path(broken), []),
        lambda: load_recipe("demo", ["evaluate={sets: {A: x\n"]),
    ):
        with pytest.raises(ConfigError, match=r"line 2, column \d"):
            load()
    monkeypatch.setattr(published, "CONFIGS", tmp_path)
    with pytest.raises(ConfigError, match=r"published\.yaml: not readable as YAML at line 2"):
        published.rows.__wrapped__()
    write(tmp_path, "- {model: bicubic, arch: null, extra: null, scale: 2, psnr_z: {Set5: 3}}", "published.yaml")
    with pytest.raises(ConfigError, match=r"unknown key 'rows\.0\.psnr_z'.*: did you mean psnr_y"):
        published.rows.__wrapped__()


@given(st.text(max_size=60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_text_as_a_file_or_override_is_a_recipe_or_one_error(text: str, overriding: bool) -> None:
    """No other exception, whatever is written."""
    try:
        if overriding:
            load_settings(GateConfig, CONFIGS / "rule.yaml", [text])
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "rule.yaml")
                file.write_text(text, encoding="utf-8", errors="surrogateescape")
                load_settings(GateConfig, file, [])
    except (ConfigError, UnicodeEncodeError):
        pass


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("phasess.finetune.steps=3", "unknown key 'phasess': did you mean phases?"),
        ("phases.finetune.stepz={a: [1, 2]}", "unknown key 'phases.finetune.stepz': did you mean steps?"),
        ("phases.finetune.stepz=3", "unknown key 'phases.finetune.stepz' (value 3): did you mean steps?"),
        (
            "phases.finetune.perceptual={backbon: x}",
            "phases.finetune.perceptual.backbon' (value 'x'): did you mean back",
        ),
        ("phases.finetune.degradation=[{step: noise, sigmaa: 9}]", "noise.sigmaa' (value 9): did you mean sigma?"),
        ("phases.finetune.degradation=[{step: nosie}]", "degradation.0.step: value 'nosie' is none of noise, poisson"),
        ("phases.finetune.degradation=[{sigma: 3}]", "degradation.0: value a mapping of sigma has no step: say which"),
        ("mixes.both=[{data: [sharp], sharee: 1}]", "unknown key 'mixes.both.0.sharee' (value 1): did you mean share?"),
        ("evaluate.protocol.rbg=true", "unknown key 'evaluate.protocol.rbg' (value True): did you mean rgb?"),
        ("lr=1", "unknown key 'lr' (value 1): it belongs to phases.NAME.lr"),
        ("wholly=1", "unknown key 'wholly' (value 1); known here: storage, tracking"),
        (
            "phases.finetune.precision=bf61",
            "value 'bf61': Input should be 'auto', 'fp32' or 'bf16': did you mean bf16?",
        ),
        ("phases.finetune.lr=-1", "phases.finetune.lr: value -1: Input should be greater than 0"),
        ("phases.finetune=3", "phases.finetune: value 3: expected a mapping of keys to values"),
        ("phases=[1]", "phases is a list in one place and a mapping in another"),
        ("phases.new={data: sharp}", "phases.new: steps and minutes are both missing: give one"),
        ("model.arch=hatl", "arch 'hatl' is none of hat, hat_s, hat_l, hmanet, hat_unet: did you mean hat_l?"),
        ("model.options.embed_dimm=3", "model.options.embed_dimm): did you mean embed_dim?"),
        ("model.options.num_heads=[5,5]", "model.options: embed_dim=32 is not divisible by num_heads=5"),
        ("trainings.finetune-x3.phase=finetun", "phases: pretrain, cascaded, finetune: did you mean finetune?"),
        ("trainings.finetune-x3.init_from=pretrain-x33", "did you mean pretrain-x3?"),
        ("phases.finetune.data=shrap", "did you mean sharp?"),
        ("evaluate.models=[finetune-x22]", "did you mean finetune-x2?"),
        ("registry.gate.not_worse.held-ot=1", "did you mean held-out?"),
        ("seed=${phases.typo}", "seed: Interpolation key 'phases.typo' not found"),
        ("a..b=3", "override 'a..b=3' is not of the form"),
    ],
)
def test_a_misspelt_key_or_value_names_its_path_and_what_was_meant(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_recipe("demo", [override])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_missing_keys_are_one_line(tmp_path: Path) -> None:
    assert "name, model, data, phases, trainings, registry are missing: give them" in fault(tmp_path, "")
    assert "phases.new.data is missing (name of" in fault(tmp_path, "extends: demo\nphases: {new: {steps: 3}}\n")


def test_case_and_distance_of_suggestions() -> None:
    assert closest("STEPS", ["steps", "stop"]) == "steps"
    assert closest("zzz", ["steps"]) is None


def test_extends_finds_shipped_recipes_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for extends in ("hat_l", "hat_l.yaml", "[_base, _cascade, ../model/hat_l.yaml]", "[_base, _cascade, model/hat_l]"):
        recipe = load_recipe(write(tmp_path, f"extends: {extends}\nname: mine\nregistry: {{name: hat_l}}"))
        shipped = load_recipe("hat_l")
        assert recipe.model_copy(update={"name": "hat_l"}) == shipped
        assert recipe.digest != shipped.digest  # the name differs


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path: Path) -> None:
    write(tmp_path, "extends: demo\nseed: 5\n", "base.yaml")
    write(tmp_path, "extends: base\nseed: ${oc.env:NO_SEED,7}\n", "hat_l.yaml")
    assert load_recipe(write(tmp_path, "extends: hat_l\n")).seed == 7
    mine = load_recipe(write(tmp_path, "extends: [hmanet]\nname: mine\n", "hmanet.yaml"))
    assert (mine.name, mine.model.arch) == ("mine", "hmanet")  # called as what it extends


@pytest.mark.parametrize(
    ("extends", "words"),
    [
        ("hat_ll", r"'hat_ll', which is no file beside it and none that is shipped: did you mean hat_l\?"),
        ("3", "extends 3 is no file and no list of files"),
        ("{a: b}", "is no file and no list"),
        ("mine", "extends itself"),
        ("'${oc.env:NOT_SET_HERE}'", "NOT_SET_HERE"),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, extends: str, words: str) -> None:
    assert re.search(words, fault(tmp_path, f"extends: {extends}\n"))


def recipe(folder: Path, text: str) -> Recipe:
    return load_recipe(write(folder, f"extends: demo\n{text}"))


ONLY_X2 = """
trainings: {pretrain-x3: null, pretrain-x2-again: null, pretrain-x4: null, finetune-x3: null, finetune-x4: null,
            finetune-x2: {init_from: pretrain-x2}}
"""


def test_an_inherited_entry_is_dropped_by_null(tmp_path: Path) -> None:
    mine = recipe(tmp_path, f"{ONLY_X2}phases: {{cascaded: null}}\n")
    assert list(mine.trainings) == ["pretrain-x2", "finetune-x2"]
    assert list(mine.phases) == ["pretrain", "finetune"]
    sets = "phases: {finetune: {data: photographs}}\ndata: {sharp: null}\n"
    sets += "evaluate: {sets: {held-out: null, Set5: x}, include: {held-out: null}}\n"
    sets += "registry: {gate: {better: {held-out: null, Set5: 0.1}}}\n"
    mine = recipe(tmp_path, sets)
    assert (list(mine.data), list(mine.evaluate.sets)) == (["photographs"], ["Set5"])
    assert mine.registry.gate.better == {"Set5": 0.1}
    write(tmp_path, "extends: hat_l\nname: wide\nregistry: {gate: {not_worse: null}}\n", "wide.yaml")
    assert load_recipe(str(tmp_path / "wide.yaml")).registry.gate.not_worse == {}
    kept = load_recipe("demo", ["phases.finetune.warmup_steps=null", "phases.finetune.grad_clip=null"])
    assert (kept.phases["finetune"].warmup_steps, kept.phases["finetune"].grad_clip) == (0, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainings: {pretrain-x3: null}", "trainings.pretrain-x2-again.init_from 'pretrain-x3' is not an earlier"),
        ("phases: {finetune: null}", "trainings.finetune-x2.phase 'finetune' is not one of phases"),
        ("data: {sharp: null}", "phases.finetune.data 'sharp' is not one of data: photographs"),
        ("evaluate: {sets: {held-out: null}}", "evaluate.include 'held-out' is not one of evaluate.sets: none"),
        ("trainings: {pretrain-x44: null}", "there is no pretrain-x44 to drop: did you mean pretrain-x4?"),
        ("mixes: {both: null}", "mixes.both is null, but there is no both to drop: remove it"),
        ("compute:\n", "compute is empty: list keys below it, or remove it"),
        ("trainings:\n", "trainings is missing"),
    ],
)
def test_what_still_needs_a_dropped_entry_is_named(tmp_path: Path, text: str, words: str) -> None:
    assert words in fault(tmp_path, f"extends: demo\n{text}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: byte 9 is no UTF-8: save it as UTF-8"):
        load_recipe(str(tmp_path / "latin.yaml"))
    for text in ("3", "word", "- 1"):
        assert "a config is a mapping of keys to values" in fault(tmp_path, text)
    with pytest.raises(ConfigError, match="no file: did you mean hat_l"):
        load_recipe("hat_ll")
    for name in ("x" * 5000, "a\0b", str(tmp_path)):
        with pytest.raises(ConfigError, match="is no file; give a path"):
            load_recipe(name)


def test_shipped_configs_are_found_where_the_project_is_installed(tmp_path: Path) -> None:
    """As a wheel, from another folder: the package that pip unpacks has the configs beside the code."""
    build = "import os, sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "configs", "pipeline", "model", "data_prep"):
        (source / name).symlink_to(ROOT / name)
    built = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True, text=True
    )
    site, folder = tmp_path / "site", tmp_path / "elsewhere"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        wheel.extractall(site)
    shipped = {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")}
    assert {path.relative_to(site / "configs") for path in (site / "configs").rglob("*.yaml")} == shipped
    code = "from pipeline import config_files as f; print(f.CONFIGS, f.find('hat_l', 'recipe'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(site / "configs"), str(site / "configs" / "recipe" / "hat_l.yaml")]


@pytest.mark.parametrize(
    ("value", "read"),
    [("/x #1", "/x #1"), ("'/x #1'", "/x #1"), ("3 # three", 3), ("[1, 2] # c", [1, 2]), ("/x#1", "/x#1")],
)
def test_a_text_given_to_set_is_taken_whole(value: str, read: Any) -> None:
    """A path may have " #" in it, where YAML begins a comment."""
    config = OmegaConf.create({"storage": {"uri": "runs"}})
    assert config_files.overridden(Recipe, config, [f"storage.uri={value}"]).storage.uri == read
