"""The lock, `requirements.txt`: made by uv for every supported Python, checked against the index, installed by pip.

    python infra/lock.py renew [--upgrade]      # after a change of pyproject.toml; --upgrade: everything anew
    python infra/lock.py check                  # does it resolve for every supported Python?
    python infra/lock.py install [--extra NAME ...]

Every file that `install` takes is checked by a hash. torch comes first, since there are several builds of one version:
one of `torch-builds.txt` where pip finds it, else PyPI's. What only PyPI's CUDA build needs (3 GB) is left out where
another one is installed. A torch of the locked version that lies in the environment already is kept, so that any build
can be used (CPU only, ROCm). DeepSpeed comes as source; pip builds it with tools that it takes from the index by name.
"""

import argparse
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.txt"
TORCH_BUILDS = ROOT / "infra" / "torch-builds.txt"
"""Builds of the locked torch that come before PyPI's, which pip would prefer if their hashes were listed together."""
WITHOUT_DEPENDENCIES = ROOT / "tests" / "requirements.txt"
"""What tests need but must not bring its dependencies along."""
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SOURCE_ONLY = ("deepspeed",)
"""What has no wheels: everything else must have one for every Python."""
HEADER = """\
# Every version this project is tested with, for Python 3.11 to 3.14, by hash.
# Installed by: make setup. Renewed by: make lock. Checked by: make check-lock.
# torch is PyPI's here; infra/torch-builds.txt lists other builds that are taken where pip finds them.
"""


@dataclass
class Entry:
    """One pinned package of a lock."""

    name: str
    pin: str
    lines: list[str] = field(default_factory=list)
    needed_by: set[str] = field(default_factory=set)

    @property
    def hashes(self) -> set[str]:
        """The sha256 of every file that may be installed."""
        return set(re.findall(r"--hash=sha256:(\w+)", "".join(self.lines)))


def canonical(requirement: str) -> str:
    """The normalised name that a requirement begins with."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]).lower()


def parse(text: str) -> dict[str, Entry]:
    """The entries of a lock by name. Lines that name no parent or hash of an entry are left out."""
    entries: dict[str, Entry] = {}
    entry = None
    for line in text.splitlines():
        if line[:1].isalnum():
            pin = line.split(";")[0].rstrip("\\ ")
            entry = entries.setdefault(canonical(line), Entry(canonical(line), pin))
            entry.lines.append(line)
        elif entry and line.strip().startswith("--hash="):
            entry.lines.append(line)
        elif entry and line.strip().startswith("#"):
            parent = line.strip("# ").removeprefix("via").strip()
            entry.needed_by |= {canonical(parent)} if parent else set()
    return entries


def text_of(entries: Collection[Entry]) -> str:
    """A requirements file of these entries."""
    return "".join(f"{line}\n" for entry in entries for line in entry.lines)


def closure(entries: dict[str, Entry], roots: Collection[str], torch_needs: Collection[str]) -> list[Entry]:
    """The entries that `roots` lead to, where torch leads to `torch_needs` alone."""
    found: set[str] = set()
    waiting = [name for name in roots if name in entries]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            children = {child.name for child in entries.values() if name in child.needed_by}
            waiting += children & set(torch_needs) if name == "torch" else children
    return [entry for entry in entries.values() if entry.name in found]


def wanted(extras: Collection[str]) -> set[str]:
    """Names of what the project and these extras ask for, and of what builds the project."""
    file = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*file["build-system"]["requires"], *file["project"]["dependencies"]]
    for extra in extras:
        asked += file["project"]["optional-dependencies"][extra]
    return {canonical(requirement) for requirement in asked}


def all_extras() -> list[str]:
    """Names of the project's extras."""
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def pip_install(*arguments: str, must: bool = True) -> bool:
    """Run `pip install` in this environment; where it fails, False, or the program's end if it `must` not."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=ROOT, stderr=None if must else subprocess.DEVNULL)
    if must and done.returncode:
        sys.exit(done.returncode)
    return done.returncode == 0


def install_locked(entries: Collection[Entry], *arguments: str, must: bool = True) -> bool:
    """Install these entries, every file checked by its hash."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(text_of(entries))
        file.flush()
        return pip_install("--require-hashes", *arguments, "--requirement", file.name, must=must)


def install_torch(entry: Entry) -> None:
    """The locked version of torch in one of its builds, unless there is one."""
    builds = parse(TORCH_BUILDS.read_text()).values()
    found = {distribution.version for distribution in importlib.metadata.distributions(name="torch")}
    if entry.pin.partition("==")[2] in {version.partition("+")[0] for version in found}:
        return
    if not any(install_locked([build], "--no-deps", must=False) for build in builds):
        install_locked([entry], "--no-deps")


def installed_torch_needs() -> set[str]:
    """What the installed build of torch names as its dependencies."""
    importlib.invalidate_caches()
    listed = importlib.metadata.requires("torch") or []
    return {canonical(requirement) for requirement in listed if "extra ==" not in requirement}


def install(extras: Collection[str]) -> None:
    """The project, editable, with what it and these extras need."""
    entries = parse(LOCK.read_text())
    install_torch(entries["torch"])
    # the list is whole and uv has resolved it: pip would look through the index for each of them once more
    install_locked(closure(entries, wanted(extras), installed_torch_needs()), "--no-deps")
    alone = parse(WITHOUT_DEPENDENCIES.read_text()).values() if "dev" in extras else ()
    if alone:
        install_locked(alone, "--no-deps")
    pip_install("--no-deps", "--no-build-isolation", "--editable", ".")


def uv(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run uv, which the `dev` extra brings, without a configuration of its own."""
    beside = Path(sys.executable).with_name("uv")
    command = [str(beside) if beside.exists() else "uv", *arguments, "--no-config", "--color", "never"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("uv is not installed: make setup brings it")


def compile_arguments(python: str) -> list[str]:
    """What `uv pip compile` is told whenever the whole project is resolved from this Python on."""
    extras = [word for extra in all_extras() for word in ("--extra", extra)]
    return ["pip", "compile", "pyproject.toml", *extras, "--python-version", python, "--generate-hashes", "--no-header"]


def renew(upgrade: bool) -> None:
    """Write the lock anew; versions that still fit are kept unless `upgrade`."""
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder) / "requirements.txt"
        if LOCK.exists() and not upgrade:
            new.write_text(LOCK.read_text())
        done = uv(*compile_arguments(PYTHONS[0]), "--universal", "--quiet", "--output-file", str(new))
        if done.returncode:
            sys.exit(done.stderr)
        LOCK.write_text(HEADER + new.read_text())


def faults(python: str) -> list[str]:
    """What keeps the lock from being installed on Linux with this Python."""
    locked = parse(LOCK.read_text())
    wheels = ["--only-binary", ":all:", *[word for name in SOURCE_ONLY for word in ("--no-binary", name)]]
    wheels += ["--python-platform", "x86_64-manylinux_2_28", "--constraint", str(LOCK)]
    resolved = uv(*compile_arguments(python), "--quiet", *wheels)
    if resolved.returncode:
        return [f"Python {python}: {resolved.stderr.strip()}"]
    found = []
    for entry in parse(resolved.stdout).values():
        listed = locked.get(entry.name, Entry(entry.name, "nothing"))
        if listed.pin != entry.pin or not listed.hashes or listed.hashes - entry.hashes:
            found.append(f"Python {python}: {entry.pin} is needed; the lock lacks it, or its hashes: run make lock")
    return found


def check() -> None:
    """Say whether the lock resolves for every Python; exit code 1 where it does not."""
    with ThreadPoolExecutor() as pool:
        found = [fault for several in pool.map(faults, PYTHONS) for fault in several]
    if found:
        sys.exit("\n".join(found))
    sys.stdout.write(f"requirements.txt resolves for Python {', '.join(PYTHONS)}\n")


def main() -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("renew").add_argument("--upgrade", action="store_true")
    commands.add_parser("check")
    commands.add_parser("install").add_argument("--extra", action="append", default=[], choices=all_extras())
    given = parser.parse_args()
    if given.command == "install":
        install(given.extra)
    elif given.command == "renew":
        renew(given.upgrade)
    else:
        check()


if __name__ == "__main__":
    main()
