"""A folder that is not ours is refused before anything in it is touched."""

from pathlib import Path

import pytest

from data_prep.index import ShardSettings
from data_prep.shard import _delete_stale, make_shards
from data_prep.shard_folder import MAKING_NAME, take_folder
from data_prep.storage import StorageError
from tests.unit.data_prep.odd_files import encoded, photograph


def paths(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


FOREIGN = [
    {"index.json": '{"pages": []}'},
    {"index.json": "no JSON \\xff"},
    {"index.json": "[1]"},
    {"shard-000000.tar": "another's"},
    {"shard-000000.tar": "another's", "shard-000000.json": '{"samples": 3}'},
]


@pytest.mark.parametrize("files", FOREIGN)
def test_a_folder_with_anothers_index_or_shards_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    source, there = tmp_path / "source", tmp_path / "there"
    fill(there, files)
    source.mkdir()
    (source / "a.jpeg").write_bytes(encoded(photograph()))
    with pytest.raises(StorageError, match=rf"{there}/(index|shard-000000)\..*was not made by .*choose another folder"):
        make_shards(str(source), str(there), ShardSettings())
    assert paths(there) == sorted(files)


OURS = [
    {},
    {"README": "", "photographs/shard-000000.tar": "", "shard-notes.json": "{}"},
    {"index.json": '{"source_fingerprint": "0", "format": 1}', "shard-000000.tar": ""},
    {"duplicates.json": "{}", "shard-000000.tar": ""},
    {MAKING_NAME: "{}", "shard-000000.tar": ""},
    {"shard-000000.tar": "", "shard-000001.tar": "", "shard-000000.json": "cut", "shard-000001.json": '{"plan": "0"}'},
]


@pytest.mark.parametrize("files", OURS)
def test_a_folder_of_ours_is_taken_and_marked(tmp_path: Path, files: dict[str, str]) -> None:
    fill(tmp_path, files)
    take_folder(str(tmp_path), paths(tmp_path))
    assert paths(tmp_path) == sorted({*files, MAKING_NAME})


def test_only_shards_at_the_folders_top_are_stale(tmp_path: Path) -> None:
    kept = ["shard-000000.json", "shard-000000.tar", "shard-list.json", "old/shard-000007.tar", "shard-1.tar"]
    fill(tmp_path, dict.fromkeys([*kept, "shard-000001.tar", "shard-1000000.json", "duplicates.json", MAKING_NAME], ""))
    _delete_stale(str(tmp_path), {"shard-000000"}, "shard-000000")
    assert paths(tmp_path) == sorted(kept)
