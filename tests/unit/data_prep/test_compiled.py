"""Compiled loops where numba finds no place for its files: read-only code of another user, no home."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import compiled as module
from data_prep.compiled import compiled
from tests.shared_data import ROOT

RUN = """
import numpy as np
from data_prep import compiled
from data_prep.jpeg_scan_kernels import _peek
assert _peek(np.arange(64, dtype=np.uint8), 8, 8) == 1
assert compiled.config.CACHE_DIR == ""
print(sum(_peek.stats.cache_hits.values()), sum(_peek.stats.cache_misses.values()))
"""


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """Code beside which nobody can write, root included: a file lies where Python and numba would put theirs."""
    (tmp_path / "data_prep").mkdir()
    for name in ("__init__", "compiled", "private_folder", "jpeg_scan_kernels"):
        shutil.copy(ROOT / "data_prep" / f"{name}.py", tmp_path / "data_prep")
    (tmp_path / "data_prep" / "__pycache__").touch()
    (tmp_path / "tmp").mkdir()
    return tmp_path


def run(folder: Path) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "XDG_"))}
    env = kept | {"HOME": "/dev/null", "TMPDIR": f"{folder}/tmp", "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", RUN], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_code_is_kept_in_a_temporary_folder_for_later_processes(read_only: Path) -> None:
    assert run(read_only) == "0 1"
    (kept,) = (read_only / "tmp").iterdir()
    assert kept.name == f"hatchery-numba-{os.getuid()}"
    assert list(kept.rglob("*.nbc"))
    assert run(read_only) == "1 0"


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> str:
        raise OSError(name)

    monkeypatch.setattr(module, "private_folder", refuse)
    namespace: dict[str, object] = {}
    exec("def twice(x):\n    return 2 * x", namespace)  # of no file: numba finds no place for its code
    function = compiled(namespace["twice"])  # type: ignore[type-var]
    assert function(21) == 42  # type: ignore[operator]
