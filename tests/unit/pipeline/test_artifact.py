"""Artifacts: published whole or not at all, found again, checked when fetched."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import storage
from pipeline import artifact
from pipeline.artifact import Artifact
from tests.shared_data import ROOT


def publish(folder: Path, content: bytes = b"weights") -> Artifact:
    local = folder / "local.bin"
    local.write_bytes(content)
    return artifact.publish(
        str(folder / "store"),
        "train",
        "f" * 64,
        inputs={"shard": "d"},
        config={"lr": 1},
        local_files={"w/a.bin": local},
    )


def test_what_is_published_is_found_and_fetched(tmp_path: Path) -> None:
    made = publish(tmp_path)
    found = artifact.find(str(tmp_path / "store"), "train", "f" * 64)
    assert found == made
    assert artifact.fetch(made, "w/a.bin", tmp_path).read_bytes() == b"weights"
    assert artifact.find(str(tmp_path / "store"), "train", "e" * 64) is None
    assert set(made.code) >= {"git", "torch", "deepspeed"}


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    first, second = publish(tmp_path / "a" if (tmp_path / "a").mkdir() is None else tmp_path), None
    (tmp_path / "b").mkdir()
    second = publish(tmp_path / "b")
    assert first.digest == second.digest
    assert publish(tmp_path / "b", b"other").digest != first.digest


def test_an_altered_file_is_refused_and_named(tmp_path: Path) -> None:
    made = publish(tmp_path)
    storage.write_bytes(made.file_uri("w/a.bin"), b"altered")
    with pytest.raises(ValueError, match=r"a\.bin differs from the sha256"):
        artifact.fetch(made, "w/a.bin", tmp_path)


def test_a_marker_that_is_none_is_refused(tmp_path: Path) -> None:
    made = publish(tmp_path)
    storage.write_bytes(storage.join(made.uri, artifact.MARKER), b"{}")
    with pytest.raises(ValueError, match="not an artifact marker"):
        artifact.find(str(tmp_path / "store"), "train", "f" * 64)
    other = made.model_copy(update={"fingerprint": "f" * 16 + "0" * 48})
    storage.write_bytes(storage.join(made.uri, artifact.MARKER), other.model_dump_json().encode())
    with pytest.raises(ValueError, match="has fingerprint"):
        artifact.find(str(tmp_path / "store"), "train", "f" * 64)


def test_an_unknown_file_is_a_programmers_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="has no file 'nope'"):
        publish(tmp_path).file_uri("nope")


def copy_of_the_code(folder: Path) -> Path:
    for package in artifact.PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_revision_is_known_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a Ray job's uploaded folder, or an image."""
    monkeypatch.delenv("HATCHERY_REVISION", raising=False)
    here, there = copy_of_the_code(tmp_path / "a"), copy_of_the_code(tmp_path / "b")
    found = artifact.revision(here)
    assert re.fullmatch("source-[0-9a-f]{40}", found)
    assert artifact.revision(there) == found
    with (there / "pipeline" / "cli.py").open("a") as file:
        file.write("\n")
    assert artifact.revision(there) != found
    monkeypatch.setenv("HATCHERY_REVISION", "v7")
    assert artifact.revision(here) == "v7"
    assert "ENV HATCHERY_REVISION=$HATCHERY_REVISION" in (ROOT / "infra" / "Dockerfile").read_text()


def test_gits_revision_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HATCHERY_REVISION", "v7")
    here = copy_of_the_code(tmp_path)
    git = ["git", "-C", str(here), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    found = artifact.revision(here)
    assert re.fullmatch("[0-9a-f]{40}", found)
    (here / "pipeline" / "cli.py").write_text("")
    assert artifact.revision(here) == f"{found}+changes"


def test_a_training_that_goes_on_with_other_libraries_says_which():
    """What is drawn for degradations depends on them."""
    now = artifact.code_versions()
    assert {"numpy", "pillow", "scipy", "libjpeg", "torch"} < set(now)
    assert artifact.changed_libraries(now) == artifact.changed_libraries({}) == ""
    assert artifact.changed_libraries(now | {"git": "another"}) == ""
    assert artifact.changed_libraries(now | {"numpy": "1.0", "libjpeg": "6b"}) == (
        f"goes on with numpy {now['numpy']} instead of 1.0, libjpeg {now['libjpeg']} instead of 6b: pairs and steps "
        "may differ from those of before"
    )


def test_a_late_owner_publishes_nothing_and_alters_nothing(tmp_path: Path) -> None:
    """It lost the lock while it uploaded, or between its last look at the lock and the marker."""
    uri, local = str(tmp_path / "store"), tmp_path / "a.bin"

    def publish_as(token: str, check: Callable[[], object] = lambda: None) -> Artifact:
        local.write_text(token)
        return artifact.publish(
            uri, "train", "f" * 64, inputs={}, config={}, local_files={"a.bin": local}, token=token, check=check
        )

    def lost() -> None:
        raise ValueError("the lock was taken over")

    with pytest.raises(ValueError, match="the lock was taken over"):
        publish_as("late", lost)
    assert artifact.find(uri, "train", "f" * 64) is None
    answers = iter([lambda: None, lambda: publish_as("next")])
    with pytest.raises(ValueError, match="was published by another run meanwhile: call again"):
        publish_as("late", lambda: next(answers)())
    found = artifact.find(uri, "train", "f" * 64)
    assert found is not None
    assert artifact.fetch(found, "a.bin", tmp_path).read_text() == "next"
    publish_as("last")  # a stage that is done anew, as registration for another server
    found = artifact.find(uri, "train", "f" * 64)
    assert found is not None
    assert found.file_uri("a.bin").endswith("/files-last/a.bin")
    assert [path.name for path in Path(found.uri).iterdir() if path.is_dir()] == ["files-last"]
