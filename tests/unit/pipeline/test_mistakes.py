"""A few hundred drawn mistakes: each is answered in a line or two, none by a traceback, none by half a result.

A mistake is a word of a good command line that becomes another one, or a good YAML file of which a value, a key or a
byte is changed. Some of what is drawn happens to be right: then the command may do its work.
"""

import copy
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from model import build
from model.weights import save_pth
from pipeline.cli import main
from pipeline.tracking import connect_default
from tests.shared_data import ROOT
from tests.unit.model.tiny import TINY

BIG = "9" * 30
NUMBERS = ["0", "-1", "1.5", "nan", "inf", "1e400", "two", BIG, "", " "]
WORDS = [
    "",
    " ",
    "nothing-of-this-name",
    "-",
    "--",
    "a\nb",
    "x" * 300,
    "\u2028",
    "caf\udce9",
    "%s{}",
    "'",
    '"',
    "*",
    "models:/x",
    "a=b",
]
URIS = [
    "s3://",
    "s3:///key",
    "S3:/bucket",
    "file://",
    "http://",
    "gs://bucket/key",
    "models:/",
    "models:/x@y@z",
    "sqlite://",
    "~nobody-of-this-name/x",
]
VALUES: list[Any] = [
    *(None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**30, "", "nonsense", "a\nb", "x" * 300, "a=b: [", "{x}"),
    *([], {}, [1, 2], [[]], ["x", None], {"a": 1}, {"": {}}, {"x": {"y": []}}, "${nowhere}", "???"),
]


@dataclass(frozen=True)
class Bench:
    """What good command lines name, and files that are none of it."""

    folder: Path
    recipe: dict[str, Any]
    domain: dict[str, Any]

    def path(self, name: str) -> str:
        return str(self.folder / name)

    @property
    def places(self) -> list[str]:
        """Paths at which there is something else than what is asked for, or nothing."""
        names = (
            "absent",
            "absent/below",
            "noise.bin",
            "noise.bin/below",
            "empty.yaml",
            "empty.pth",
            "folder",
            "images",
        )
        more = (
            "images/0.png",
            "cut.png",
            "list.yaml",
            "pickle.pth",
            "set",
            "x2.pth",
            "recipe.yaml",
            "nul\0nul",
            "n" * 300,
        )
        return [self.path(name) for name in (*names, *more)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, ray_local: Any) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 48, 3), np.uint8)
    for number, image in enumerate(pixels):
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
    torch.manual_seed(0)
    save_pth(folder / "x2.pth", build("hat", 2, **TINY).state_dict())
    png = (folder / "images" / "0.png").read_bytes()
    contents: dict[str, bytes] = {
        "noise.bin": np.random.default_rng(1).bytes(5000),
        "empty.yaml": b"",
        "empty.pth": b"",
        "list.yaml": b"[1, 2]\n",
        "cut.png": png[: len(png) // 2],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    torch.save({"params": [os.getcwd]}, folder / "pickle.pth")
    (folder / "folder").mkdir()
    recipe = _recipe(folder)
    domain = _domain(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "domain.yaml").write_text(yaml.safe_dump(domain))
    shutil.copy(ROOT / "configs" / "rule.yaml", folder / "rule.yaml")
    connect_default(f"sqlite:///{folder}/mlflow.db").create_registered_model("bare-x2")
    made = Bench(folder, recipe, domain)
    code, text = call(
        ["shards", "make", made.path("images"), made.path("set"), "--min-side-px", "8", "--address", "local"]
    )
    assert code == 0, text
    return made


def _places(folder: Path) -> dict[str, Any]:
    return {"storage": {"uri": f"{folder}/runs"}, "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}


def _recipe(folder: Path) -> dict[str, Any]:
    phase = {"data": "own", "steps": 4, "global_batch": 4, "patch_px": 16, "milestones": [2], "warmup_steps": 1}
    return {
        "name": "drawn",
        "model": {"arch": "hat", "options": {key: list(v) if isinstance(v, tuple) else v for key, v in TINY.items()}},
        "data": {"own": {"source": f"{folder}/images", "include": ["*.png"], "samples_per_shard": 2, "min_side_px": 8}},
        "phases": {"pretrain": {**phase, "degradation": [{"step": "shrink"}, {"step": "jpeg", "quality": [30, 90]}]}},
        "trainings": {
            "pretrain-x2": {"scale": 2, "phase": "pretrain", "start": "bicubic"},
            "pretrain-x4": {"scale": 4, "phase": "pretrain", "init_from": "pretrain-x2"},
        },
        "evaluate": {"sets": {"held-out": f"{folder}/images"}, "include": {"held-out": ["0.png"]}},
        "registry": {"name": "drawn", "gate": {"better": {"held-out": -0.5}, "not_worse": {}}},
        "compute": {"num_workers": [1, 2], "micro_batch": 2},
        **_places(folder),
    }


def _domain(folder: Path) -> dict[str, Any]:
    return {
        "name": "pages",
        "source": f"{folder}/images",
        "base": "models:/bare-x2@champion",
        "replay": {"source": f"{folder}/images", "share": 0.3},
        "training": {"steps": 10, "global_batch": 4},
        "evaluate": {"sets": {"Set5": f"{folder}/images"}},
        "gate": {"better": {"pages": 0.1}, "not_worse": {"Set5": 0.1}},
        "schedule": {"cron": "0 3 * * *", "image": "registry.example.com/hatchery:1", "env_secret": "s3"},
        **_places(folder),
    }


def good(bench: Bench) -> dict[str, list[str]]:
    """A command line for each command that finds nothing wrong until it works, or, of the registry, no version."""
    out, tracking = bench.path("out"), ["--tracking-uri", f"sqlite:///{bench.folder}/mlflow.db"]
    image, weights = bench.path("images/0.png"), bench.path("x2.pth")
    return {
        "pretrain": [
            "pretrain",
            "--recipe",
            bench.path("recipe.yaml"),
            "--set",
            "name=other",
            "--stages",
            "shard",
            "--dry-run",
        ],
        "plan": [
            "plan",
            "--recipe",
            bench.path("recipe.yaml"),
            "--nodes",
            "0",
            "--gpus-per-node",
            "2",
            "--gpu-memory",
            "8",
        ],
        "upscale": ["upscale", image, f"{out}/0.png", "--weights", weights, "--tile", "32", "--tile-overlap", "8"],
        "upscale-folder": [
            "upscale",
            bench.path("images"),
            out,
            "--weights",
            weights,
            "--precision",
            "fp32",
            "--scale",
            "2",
        ],
        "export": ["export", weights, f"{out}/x2.onx"],
        "make": [
            "shards",
            "make",
            bench.path("images"),
            f"{out}/set",
            "--samples-per-shard",
            "0",
            "--min-side-px",
            "8",
            "--address",
            "local",
        ],
        "ls": ["shards", "ls", bench.path("set")],
        "verify": ["shards", "verify", bench.path("set")],
        "evaluate": [
            "evaluate",
            "--weights",
            weights,
            "--sets",
            bench.path("images"),
            "--tile",
            "16",
            "--degrade",
            "[{step: shrnk}]",
            "--out",
            out,
            "--address",
            "local",
        ],
        "promote": ["promote", "bare-x2", "--version", "1", "--rule", bench.path("rule.yaml"), *tracking],
        "rollback": ["rollback", "bare-x2", "--reason", "why", *tracking],
        "history": ["history", "bare-x2", *tracking],
        "retrain": ["retrain", bench.path("domain.yaml"), "--set", "name=pages", "--dry-run"],
        "render": ["schedule", "render", bench.path("domain.yaml"), "--kind", "cronjob"],
    }


COMMANDS = list(good(Bench(Path("/"), {}, {})))


@pytest.fixture(autouse=True, scope="module")
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a drawn word makes, by its relative path, is made in a folder of this module's."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("here"))
    yield
    os.chdir(before)


def call(arguments: list[str]) -> tuple[int, str]:
    """Exit code, and what was written to both streams; whatever else the command raises is the fault looked for."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as ended:
            code = ended.code
    return int(code or 0), err.getvalue() or out.getvalue()


def check(arguments: list[str], bench: Bench) -> None:
    """Run a command with a mistake in it; see that it is answered as a mistake is."""
    target = bench.folder / "out"
    shutil.rmtree(target, ignore_errors=True)
    try:
        code, text = call(arguments)
    except Exception as error:
        raise AssertionError(f"{arguments}: {type(error).__name__}: {error}") from error
    assert code in (0, 1, 2), (arguments, code, text)
    assert "Traceback" not in text, (arguments, text)
    if code == 2:
        assert text.strip(), arguments
        assert not target.is_dir() or not [path for path in target.rglob("*") if path.is_file()], (arguments, text)
    if code == 2 and not text.startswith("Usage"):
        lines = text.strip().splitlines()
        assert lines[-1].startswith("hatchery: ") or len(lines) <= 12, (arguments, text)
        assert len(text) < 4000, (arguments, len(text), text[:300])
        assert not any(bare in text for bare in ("[Errno", "Error(", "object at 0x", "<class '")), (arguments, text)


def few(examples: int) -> Any:
    """Settings of a drawn test: the same draws every time, none kept in a file, as slow as commands are."""
    skipped = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=skipped
    )


@pytest.mark.parametrize("command", COMMANDS)
@few(40)
@given(data=st.data())
def test_a_word_of_the_command_line(command: str, bench: Bench, data: st.DataObject) -> None:
    """One word becomes another, is left out or said twice."""
    arguments = good(bench)[command]
    first = 2 if arguments[0] in ("shards", "schedule") else 1
    at = data.draw(st.integers(first, len(arguments) - 1))
    place = st.sampled_from([*NUMBERS, *WORDS, *URIS, *bench.places])
    new = data.draw(st.one_of(place.map(lambda word: [word]), st.just([]), st.just([arguments[at]] * 2)))
    check([*arguments[:at], *new, *arguments[at + 1 :]], bench)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value in a nest of dictionaries and lists."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield from places_in(below, (*path, key))


def changed(value: Any, path: tuple[Any, ...], how: str, new: Any) -> Any:
    """A copy in which one value is another, is gone, or its key is misspelt."""
    whole = copy.deepcopy(value)
    parent = whole
    for part in path[:-1]:
        parent = parent[part]
    if how == "value":
        parent[path[-1]] = new
    elif how == "gone":
        del parent[path[-1]]
    elif isinstance(parent, dict):
        parent[f"{path[-1]}s"] = parent.pop(path[-1])
    return whole


YAML_COMMANDS = {
    "recipe": lambda file: ["pretrain", "--recipe", file, "--dry-run"],
    "domain": lambda file: ["retrain", file, "--dry-run"],
    "render": lambda file: ["schedule", "render", file],
}


@pytest.mark.parametrize("kind", YAML_COMMANDS)
@few(120)
@given(data=st.data())
def test_a_value_or_a_key_of_a_yaml_file(kind: str, bench: Bench, data: st.DataObject) -> None:
    whole = bench.recipe if kind == "recipe" else bench.domain
    path = data.draw(st.sampled_from(list(places_in(whole))))
    how = data.draw(st.sampled_from(["value", "value", "value", "gone", "misspelt"]))
    new = data.draw(st.sampled_from([*VALUES, *URIS, *bench.places[:4]])) if how == "value" else None
    file = bench.folder / "drawn.yaml"
    file.write_text(yaml.safe_dump(changed(whole, path, how, new)))
    check(YAML_COMMANDS[kind](str(file)), bench)


@pytest.mark.parametrize("kind", YAML_COMMANDS)
@few(60)
@given(data=st.data())
def test_a_byte_of_a_yaml_file(kind: str, bench: Bench, data: st.DataObject) -> None:
    text = yaml.safe_dump(bench.recipe if kind == "recipe" else bench.domain).encode()
    at = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.sampled_from([0, 1, 1, 5, 1000]))
    new = data.draw(
        st.sampled_from(
            [
                b"",
                b"\t",
                b": ",
                b"- ",
                b"\xff",
                b"\0",
                b"{",
                b"]",
                b"'",
                b"&a",
                b"*a",
                b"!!python/object:os.system ",
                b"<<: ",
                b"\n",
                b"#",
                b"%",
            ]
        )
    )
    file = bench.folder / "drawn.yaml"
    file.write_bytes(text[:at] + new + text[at + length :])
    check(YAML_COMMANDS[kind](str(file)), bench)


@few(60)
@given(
    key=st.sampled_from(
        [
            "name",
            "trainings.pretrain-x2.scale",
            "phases.pretrain",
            "data",
            "",
            ".",
            "a..b",
            "storage.uri",
            "model.options.depths[0]",
            "name[",
            "évaluate",
        ]
    ),
    value=st.sampled_from(
        [json.dumps(v) for v in VALUES] + ["{", "[1,", "{a: 1, a: 2}", "!!binary x", "*a", "1: 2: 3", "\t"]
    ),
    sign=st.sampled_from(["=", "", "==", ": "]),
)
def test_an_override(key: str, value: str, sign: str, bench: Bench) -> None:
    check(["pretrain", "--recipe", bench.path("recipe.yaml"), "--dry-run", "--set", f"{key}{sign}{value}"], bench)
