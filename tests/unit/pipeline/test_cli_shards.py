"""`hatchery shards`: from images to a checked set by the command alone."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from data_prep import storage
from data_prep.index import ShardSettings, read_shard_set
from pipeline.cli import main
from pipeline.cli_shards import make
from tests.unit.data_prep.odd_files import encoded, photograph


@pytest.fixture
def source(tmp_path: Path) -> str:
    for number in range(5):
        storage.write_bytes(str(tmp_path / "source" / f"{number}.JPEG"), encoded(photograph(seed=number)))
    storage.write_bytes(str(tmp_path / "source" / "again.JPEG"), encoded(photograph(seed=0)))
    return str(tmp_path / "source")


def test_a_set_is_made_listed_and_verified(
    source: str, tmp_path: Path, ray_local: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = str(tmp_path / "set")
    options = ["--samples-per-shard", "2", "--seed", "3", "--sub-image-px", "64", "--sub-image-step-px", "32"]
    for command in (
        ["make", source, uri, *options, "--min-side-px", "32", "--exclude", "4.*", "--address", "local"],
        ["ls", uri],
        ["verify", uri],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["shards", *command])
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "24 samples in 2 shards, 0 rejects, 1 duplicates" in out.replace("\n", " ")
    assert f"{uri}: 2 shards, sound" in out
    made = read_shard_set(uri).index.settings
    assert (made.samples_per_shard, made.seed, made.min_side_px, made.sub_image_px) == (2, 3, 32, 64)


def test_the_commands_defaults_are_the_settings() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(make).parameters.items()}
    settings = ShardSettings().model_dump()
    assert {name: defaults[name] for name in settings} == settings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/absent"], "/absent: it does not exist"),
        (["{source}", "--sub-image-px", "100"], "sub_image_step_px=240 is above sub_image_px=100"),
        (["{source}", "--include", "*.png"], "no images with include"),
    ],
)
def test_what_can_be_wrong_is_one_line(
    source: str,
    tmp_path: Path,
    ray_local: Any,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    first, *options = (argument.format(source=source) for argument in arguments)
    with pytest.raises(SystemExit) as ended:
        main(["shards", "make", first, str(tmp_path / "set"), *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_an_absent_set_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shards", "ls", str(tmp_path)])
    assert "make it with `hatchery shards make`" in capsys.readouterr().err
