"""Artifacts: what a stage leaves in the storage, published by a marker that is written last.

`{storage}/{stage}/{fingerprint[:16]}/artifact.json` is that marker. The fingerprint covers the stage's config and
the content digests of its inputs, so changed inputs or config lead to a new place, and unchanged ones to the old. Files
lie in a folder of whoever held the stage's lock, and the marker replaces none that it has not seen: who lost the lock
without knowing publishes nothing and alters no file of who took it over.
"""

import datetime
import functools
import os
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import features
from pydantic import Field, ValidationError

from data_prep import storage
from pipeline.config import Settings, digest_of

MARKER = "artifact.json"
_FILES = "files-"
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data_prep", "model", "pipeline")


class FileEntry(Settings):
    """One file of an artifact."""

    sha256: str
    size_bytes: int


class Artifact(Settings):
    """A finished stage's result: where it lies, what it holds, what it was made from."""

    stage: str
    uri: str
    fingerprint: str = Field(description="sha256 over stage, config and the inputs' digests")
    folder: str = Field("", description="where the files lie below uri; empty: in it")
    digest: str = Field(description="sha256 over the content alone: what later stages depend on")
    inputs: dict[str, str] = Field(default_factory=dict, description="input stage -> its digest")
    config: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, FileEntry] = Field(default_factory=dict)
    info: dict[str, Any] = Field(default_factory=dict, description="what a person or a later stage wants to know")
    created: str = ""
    code: dict[str, str] = Field(default_factory=dict, description="revision of the code and library versions")

    def file_uri(self, name: str) -> str:
        """The URI of one of its files."""
        if name not in self.files:
            raise KeyError(f"artifact {self.uri} has no file {name!r}, it has {sorted(self.files)}")
        return storage.join(self.uri, self.folder, name)


def place(storage_uri: str, stage: str, fingerprint: str) -> str:
    """The folder that the artifact of a stage with this fingerprint lives in."""
    return storage.join(storage_uri, stage, fingerprint[:16])


def find(storage_uri: str, stage: str, fingerprint: str) -> Artifact | None:
    """The finished artifact of a stage, or None; ValueError when its marker cannot be read."""
    uri = storage.join(place(storage_uri, stage, fingerprint), MARKER)
    if not storage.exists(uri):
        return None
    try:
        artifact = Artifact.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        raise ValueError(
            f"{uri} is not an artifact marker ({error.error_count()} faults): delete it to redo the stage"
        ) from error
    if artifact.fingerprint != fingerprint:
        raise ValueError(
            f"{uri} has fingerprint {artifact.fingerprint}, expected {fingerprint}: delete it to redo the stage"
        )
    # an artifact folder that was copied or mounted elsewhere is found where it is now
    return artifact.model_copy(update={"uri": place(storage_uri, stage, fingerprint)})


def publish(
    storage_uri: str,
    stage: str,
    fingerprint: str,
    *,
    inputs: dict[str, str],
    config: dict[str, Any],
    local_files: dict[str, Path] | None = None,
    info: dict[str, Any] | None = None,
    digest: str | None = None,
    before_marker: Callable[[Artifact], None] = lambda made: None,
    token: str = "",
    check: Callable[[], object] = lambda: None,
) -> Artifact:
    """Upload a stage's files, then its marker. `digest` defaults to the sha256 over the files' hashes.

    before_marker: what else must be done before the stage counts as done; called when the files are there.
    token: names the folder of the files, which nobody else writes to; empty: they lie beside the marker.
    check: raises where this run has lost the stage's lock.
    """
    uri = place(storage_uri, stage, fingerprint)
    marker, folder = storage.join(uri, MARKER), f"{_FILES}{token}" if token else ""
    check()
    seen = storage.read_versioned(marker)
    files: dict[str, FileEntry] = {}
    for name, path in sorted((local_files or {}).items()):
        storage.upload(path, storage.join(uri, folder, name))
        files[name] = FileEntry(sha256=storage.sha256_of(str(path)), size_bytes=path.stat().st_size)
    artifact = Artifact(
        stage=stage,
        uri=uri,
        folder=folder,
        fingerprint=fingerprint,
        digest=digest or digest_of({name: entry.sha256 for name, entry in files.items()}),
        inputs=inputs,
        config=config,
        files=files,
        info=info or {},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        code=code_versions(),
    )
    before_marker(artifact)
    check()
    content = artifact.model_dump_json(indent=1).encode()
    if not (storage.replace(marker, content, seen[1]) if seen else storage.put_if_absent(marker, content)):
        raise ValueError(f"{uri} was published by another run meanwhile: call again, which takes that result")
    if folder:
        _sweep(uri, folder)
    return artifact


def _sweep(uri: str, folder: str) -> None:
    """Delete the files of runs that did not come to publish them."""
    tops = {file.path.partition("/")[0] for file in storage.iter_files(uri)}
    for left in tops - {folder}:
        if left.startswith(_FILES):
            storage.delete_tree(storage.join(uri, left))


def fetch(artifact: Artifact, name: str, folder: Path) -> Path:
    """A file of an artifact on the local disk, checked against its recorded hash."""
    local = folder / f"{artifact.files[name].sha256[:16]}-{Path(name).name}"
    if not local.exists():
        storage.download(artifact.file_uri(name), local)
    if storage.sha256_of(str(local)) != artifact.files[name].sha256:
        local.unlink()
        raise ValueError(
            f"{artifact.file_uri(name)} differs from the sha256 recorded when it was published: "
            f"restore it, or delete {artifact.uri}/{MARKER} to redo stage {artifact.stage}"
        )
    return local


@functools.cache
def code_versions() -> dict[str, str]:
    """Revision of this project (see `revision`) and versions of the libraries that shape results.

    numpy's distributions, Pillow's resizing, libjpeg and scipy's convolutions decide the pixels of degradations.
    """
    named = ("torch", "deepspeed", "ray", "webdataset", "mlflow", "numpy", "pillow", "scipy", "numba")
    return {"git": revision(ROOT)} | {name: version(name) for name in named} | {"libjpeg": _libjpeg()}


def _libjpeg() -> str:
    """The library that Pillow decodes and encodes JPEG with."""
    turbo = features.version_feature("libjpeg_turbo")
    return f"turbo {turbo}" if turbo else str(features.version_codec("jpg"))


def changed_libraries(before: Mapping[str, str]) -> str:
    """What a training that goes on says of libraries that were others before; empty where none was."""
    now = code_versions()
    changed = [
        f"{name} {now.get(name, 'unknown')} instead of {old}"
        for name, old in before.items()
        if name != "git" and now.get(name) != old
    ]
    return f"goes on with {', '.join(changed)}: pairs and steps may differ from those of before" if changed else ""


def revision(root: Path) -> str:
    """What code runs: git's revision (with `+changes` for an unclean tree), $HATCHERY_REVISION, or `source-<sha256>`.

    Ray uploads a job's folder without .git, and images have none: there the variable tells, which infra/Dockerfile
    sets, else a hash over the project's own files.
    """
    return _git_revision(root) or os.environ.get("HATCHERY_REVISION") or f"source-{_source_hash(root)[:40]}"


def _git_revision(root: Path) -> str | None:
    if not (root / ".git").exists():  # else git would tell of a repository around the project
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+changes",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _source_hash(root: Path) -> str:
    """sha256 (hex) over names and content of the project's Python files."""
    files = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return digest_of({path.relative_to(root).as_posix(): storage.sha256_of(str(path)) for path in files})
