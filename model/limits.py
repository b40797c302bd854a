"""What this process may use of its machine: CPUs and memory, as affinity and control groups say.

A control group may lie in others, and a limit anywhere up the tree counts. Linux has two kinds of them, version 1
(a tree for each resource) and version 2 (one tree); both are read from `/proc/self` and where they are mounted. Every
other part of Hatchery asks here.
"""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path("/")


def usable_cpus(root: Path = ROOT) -> int:
    """CPUs that this process may keep busy: its affinity (`taskset`, cpusets) and quotas, rounded down, at least 1.

    root: where `proc` and the control groups are found; another folder for tests.
    """
    quotas = [quota for group in _groups(root, "cpu") if (quota := _cpu_quota(group)) is not None]
    return max(1, int(min([len(os.sched_getaffinity(0)), *quotas])))


def free_memory_bytes(root: Path = ROOT) -> int:
    """Bytes that this process may still take: what the machine, its control groups and `ulimit -v` leave, at least 0.

    Cached files that nobody used lately count as free, since Linux drops them. root: as in `usable_cpus`.
    """
    left = [_available_bytes(root), _address_space_left(root)]
    for group in _groups(root, "memory"):
        limit, used = _group_limit(group), _number(group / "memory.current", group / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            left.append(limit - max(used - _inactive_files(group), 0))
    return max(0, min(each for each in left if each is not None))


def bound_threads() -> None:
    """Let PyTorch use no more threads than there are usable CPUs: it counts those of the machine, not of the quota."""
    if torch.get_num_threads() > usable_cpus():
        torch.set_num_threads(usable_cpus())


def _available_bytes(root: Path) -> int:
    """What the whole machine has left; /proc/meminfo gives KiB."""
    lines = (line.split() for line in _text(root / "proc/meminfo").splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")


def _address_space_left(root: Path) -> int | None:
    """What RLIMIT_AS leaves; None where there is none."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    pages = int(_text(root / "proc/self/statm").split()[0])
    return limit - pages * resource.getpagesize()


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in and that may limit it, from its own to the outermost."""
    members = _memberships(root)
    for mount_root, mount_point, kind, controllers in _mounts(root):
        name = controller if kind == "cgroup" else ""
        if (kind == "cgroup" and controller not in controllers) or name not in members:
            continue
        top = root / mount_point.lstrip("/")
        inner = os.path.relpath(members[name], mount_root)
        group = top if inner.startswith("..") else top / inner  # seen from outside the mount, it is the mount itself
        yield group
        while group != top:
            group = group.parent
            yield group


def _memberships(root: Path) -> dict[str, str]:
    """This process's control groups: by controller in version 1, by the empty name in version 2."""
    found: dict[str, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        found |= dict.fromkeys(controllers.split(","), path)
    return found


def _mounts(root: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """(root inside the tree, mount point, cgroup or cgroup2, controllers) of each mounted tree of control groups."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            mount_root, mount_point = mount.split(" ")[3:5]
            yield mount_root, mount_point.replace("\\040", " "), kind, options.split(",")


def _cpu_quota(group: Path) -> float | None:
    """CPUs that a control group may use on average; None where it has no limit."""
    if both := _text(group / "cpu.max"):
        quota, period = both.split()
        return None if quota == "max" else int(quota) / int(period)
    micros, period_micros = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return None if micros is None or not period_micros or micros < 0 else micros / period_micros


def _group_limit(group: Path) -> int | None:
    """Bytes that a control group may hold before Linux slows it down (`memory.high`) or kills it; None: no limit."""
    limits = [_number(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    return min((limit for limit in limits if limit is not None), default=None)


def _inactive_files(group: Path) -> int:
    """Bytes of cached files that a control group has not used lately, in all groups below it too."""
    stat = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _number(*files: Path) -> int | None:
    """The number in the first file that there is; None where there is none, or it says `max`."""
    text = next((found for file in files if (found := _text(file).strip())), "max")
    return None if text == "max" else int(text)


def _text(file: Path) -> str:
    """A file of the kernel's; empty where it is not there or may not be read."""
    try:
        return file.read_text()
    except OSError:
        return ""
