"""The allocator's settings, by what the system counts: pages that had to be given to the process."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from pipeline.heap import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    torch.ones(2**24)
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 10 * 2**24 * 4 // 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_not_asked_for_again() -> None:
    assert _pages_given("keep") < PAGES // 20 < PAGES // 2 < _pages_given("give back")


def _pages_given(how: str) -> int:
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(run.stdout)
