"""CPUs and memory that a process may use: planted control groups of both versions, and the real `taskset`."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from model.limits import free_memory_bytes, usable_cpus
from tests.shared_data import ROOT

GB = 10**9
MOUNTS = {
    "v1": [
        "25 1 0:22 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory",
        "26 1 0:23 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct",
        "27 1 0:24 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd",
    ],
    "v2": ["30 1 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"],
}
MEMBERS = {"v1": "4:memory:{0}\n3:cpu,cpuacct:{0}\n1:name=systemd:/elsewhere\n", "v2": "0::{0}\n"}
TREES = {"v1": ("sys/fs/cgroup/memory", "sys/fs/cgroup/cpu,cpuacct"), "v2": ("sys/fs/cgroup", "sys/fs/cgroup")}


class Planted:
    """A machine with 64 GB free whose process is in a control group two levels down."""

    def __init__(self, root: Path, version: str, group: str = "/work.slice/job") -> None:
        self.root, self.version = root, version
        self.write("proc/meminfo", "MemTotal: 80000000 kB\nMemFree: 1 kB\nMemAvailable: 62500000 kB\n")
        self.write("proc/self/mountinfo", "\n".join(["1 0 8:1 / / rw - ext4 /dev/sda1 rw", *MOUNTS[version]]))
        self.write("proc/self/cgroup", MEMBERS[version].format(group))

    def write(self, name: str, text: str) -> None:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def memory(self, group: str, limit: int | None, used: int = 0, cached: int = 0) -> None:
        tree = TREES[self.version][0]
        if self.version == "v1":
            unlimited = 9223372036854771712  # the largest whole number of pages
            self.write(f"{tree}{group}/memory.limit_in_bytes", f"{unlimited if limit is None else limit}\n")
            self.write(f"{tree}{group}/memory.usage_in_bytes", f"{used}\n")
            self.write(f"{tree}{group}/memory.stat", f"inactive_file 1\ntotal_inactive_file {cached}\n")
        else:
            self.write(f"{tree}{group}/memory.max", f"{'max' if limit is None else limit}\n")
            self.write(f"{tree}{group}/memory.current", f"{used}\n")
            self.write(f"{tree}{group}/memory.stat", f"active_file 5\ninactive_file {cached}\n")

    def cpus(self, group: str, share: float | None) -> None:
        tree = TREES[self.version][1]
        if self.version == "v1":
            self.write(f"{tree}{group}/cpu.cfs_quota_us", str(-1 if share is None else int(share * 100_000)))
            self.write(f"{tree}{group}/cpu.cfs_period_us", "100000\n")
        else:
            self.write(f"{tree}{group}/cpu.max", f"{'max' if share is None else int(share * 50_000)} 50000\n")


@pytest.fixture(params=["v1", "v2"])
def machine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planted:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    return Planted(tmp_path, request.param)


def test_without_limits_the_machine_decides(machine: Planted) -> None:
    assert (usable_cpus(machine.root), free_memory_bytes(machine.root)) == (12, 64 * GB)
    for group in ("/work.slice/job", "/work.slice", ""):
        machine.memory(group, None, used=50 * GB)
        machine.cpus(group, None)
    assert (usable_cpus(machine.root), free_memory_bytes(machine.root)) == (12, 64 * GB)


@pytest.mark.parametrize("group", ["/work.slice/job", "/work.slice", ""])
def test_a_limit_anywhere_up_the_tree_counts(machine: Planted, group: str) -> None:
    machine.memory("/work.slice/job", 30 * GB)
    machine.cpus("/work.slice/job", 8)
    machine.memory(group, 10 * GB, used=7 * GB, cached=2 * GB)
    machine.cpus(group, 2.5)
    assert free_memory_bytes(machine.root) == 5 * GB
    assert usable_cpus(machine.root) == 2


def test_a_group_beside_ours_does_not_count(machine: Planted) -> None:
    machine.memory("/work.slice/other", GB)
    machine.cpus("/work.slice/other", 1)
    assert (usable_cpus(machine.root), free_memory_bytes(machine.root)) == (12, 64 * GB)


def test_less_than_a_cpu_is_one_and_no_memory_is_none(machine: Planted) -> None:
    machine.cpus("/work.slice", 0.5)
    machine.memory("/work.slice", GB, used=2 * GB)
    assert (usable_cpus(machine.root), free_memory_bytes(machine.root)) == (1, 0)


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    """Version 1 without a namespace: the path is the host's, the mount shows the container's part of the tree."""
    machine = Planted(tmp_path, "v1", group="/docker/1f")
    mount = "25 1 0:22 /docker/1f /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    machine.write("proc/self/mountinfo", mount)
    machine.memory("", 4 * GB, used=GB)
    assert free_memory_bytes(machine.root) == 3 * GB
    machine.write("proc/self/cgroup", "4:memory:/docker/another\n")
    assert free_memory_bytes(machine.root) == 3 * GB


def test_what_slows_a_group_down_counts_as_its_limit(tmp_path: Path) -> None:
    machine = Planted(tmp_path, "v2")
    machine.memory("/work.slice/job", 30 * GB)
    machine.write("sys/fs/cgroup/work.slice/job/memory.high", f"{6 * GB}\n")
    assert free_memory_bytes(machine.root) == 6 * GB


def test_both_versions_at_once_as_older_systems_mount_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    machine = Planted(tmp_path, "v1")
    unified = "31 1 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    machine.write("proc/self/mountinfo", "\n".join([*MOUNTS["v1"], unified]))
    machine.write("proc/self/cgroup", MEMBERS["v1"].format("/a") + "0::/a\n")
    machine.cpus("/a", 3)
    assert usable_cpus(machine.root) == 3


def run(code: str, *before: str, limit: int | None = None) -> str:
    """A process of its own, whose address space may be limited."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    command = [*before, sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, preexec_fn=limited)
    return ended.stdout.strip()


def test_taskset_counts() -> None:
    cpu = min(os.sched_getaffinity(0))
    asked = "from model.limits import usable_cpus; print(usable_cpus())"
    assert run(asked, "taskset", "--cpu-list", str(cpu)) == "1"


def test_a_limited_address_space_counts() -> None:
    limit = 8 * GB
    free = int(run("from model.limits import free_memory_bytes; print(free_memory_bytes())", limit=limit))
    assert 0 < free < limit


def test_threads_are_bounded_by_the_quota() -> None:
    code = """
import model.limits, torch
torch.set_num_threads(8)
model.limits.usable_cpus = lambda: 3
model.limits.bound_threads()
assert torch.get_num_threads() == 3
torch.set_num_threads(2)
model.limits.bound_threads()
print(torch.get_num_threads())
"""
    assert run(code) == "2"
