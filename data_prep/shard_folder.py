"""Which files of a folder are a set's, so that making shards deletes and replaces nothing else."""

import json
import re
from collections.abc import Iterable

from data_prep.storage import StorageError, join, read_bytes, write_bytes
from data_prep.uri import normalise

MAKING_NAME = "making.json"
"""Lies in a folder while shards are made in it."""
_INDEX, _DUPLICATES = "index.json", "duplicates.json"
_LOOKED_AT = 8  # sidecars of a stopped run of an earlier version; one of them may be damaged
_SHARD_FILE = re.compile(r"shard-\d{6,}\.(tar|json)")


def is_shard_file(path: str) -> bool:
    """Whether a path in a set's folder is a tar or sidecar that was made by this project, or could be taken for one."""
    return _SHARD_FILE.fullmatch(path) is not None


def take_folder(destination: str, paths: Iterable[str]) -> None:
    """Mark a folder that holds `paths` as one in which shards are made.

    Raises StorageError where it holds an index or shards that this project has not made: they would be replaced. Ours
    are known by their index, by what a run leaves until it is done, or by a sidecar.
    """
    found = set(paths)
    shards = sorted(filter(is_shard_file, found))
    sidecars = [path for path in shards if path.endswith(".json")]
    if _INDEX in found:
        ours = _has(destination, _INDEX, "source_fingerprint")
    else:
        left = found & {MAKING_NAME, _DUPLICATES}
        ours = not shards or bool(left) or any(_has(destination, sidecar, "plan") for sidecar in sidecars[:_LOOKED_AT])
    if not ours:
        name = _INDEX if _INDEX in found else shards[0]
        raise StorageError(
            f"{join(destination, name)}: it was not made by `hatchery shards make`, which would replace it; choose "
            f"another folder than {normalise(destination)}, or empty it"
        )
    write_bytes(join(destination, MAKING_NAME), b"{}")


def _has(destination: str, name: str, field: str) -> bool:
    try:
        record = json.loads(read_bytes(join(destination, name)))
    except StorageError:
        raise
    except ValueError:  # no JSON, or no text
        return False
    return isinstance(record, dict) and field in record
