"""The rooms' doors: who may import whom (design: only `pipeline` knows Ray Train, DeepSpeed and MLflow)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "data_prep": {"model", "pipeline", "mlflow", "deepspeed"},
    "model": {"data_prep", "pipeline", "ray", "mlflow", "deepspeed"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_only_what_they_may(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    found = {str(file.relative_to(ROOT)): imported(file) & FORBIDDEN[package] for file in files}
    assert {file: names for file, names in found.items() if names} == {}


def test_the_driver_does_not_import_deepspeed() -> None:
    code = "import pipeline.pretrain, sys; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_training_processes_do_not_import_mlflow() -> None:
    code = "import pipeline.train, sys; import deepspeed; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
