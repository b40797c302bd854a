"""The tests that a processor's features may decide, run again as on a processor without AVX-512: `make masked`.

oneDNN and PyTorch each read a mask from the environment when a process starts.
"""

import os
import subprocess
import sys

import torch

from tests.shared_data import ROOT

MASK = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
TESTS = ("tests/unit/model", "tests/parity", "tests/unit/pipeline/test_capacity.py")
ELSEWHERE = ("compile", "export", "layouts", "metrics", "payload", "picture", "spandrel", "weights")
"""Tests of `model/` that are left out: of files and of numbers that no feature touches, and of what compilers make."""


def main() -> int:
    """Run them; 0 where all pass, and where there is nothing to mask."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX512"):
        print(f"This processor's features ({capability}) need no mask: the unit tests are that pass already.")
        return 0
    ignored = [f"--ignore=tests/unit/model/test_{name}.py" for name in ELSEWHERE]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "-m", "not integration", *TESTS, *ignored]
    return subprocess.run(command, cwd=ROOT, env=os.environ | MASK).returncode


if __name__ == "__main__":
    sys.exit(main())
