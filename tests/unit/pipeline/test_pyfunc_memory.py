"""The served model in little memory: an answer in tiles, not a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

from model import build
from model.weights import save_pth
from tests.shared_data import ROOT

SIZES = {"embed_dim": 12, "depths": (1,), "num_heads": (3,), "window_size": 8, "squeeze_factor": 6}

SERVED = """
import resource, sys, types
import numpy as np, torch
from pipeline.pyfunc_model import SuperResolution
served = SuperResolution()
served.load_context(types.SimpleNamespace(artifacts={"weights": sys.argv[1], "options": sys.argv[2]}))
torch.set_num_threads(1)
image = np.random.default_rng(0).integers(0, 256, (1, 512, 448, 3), np.uint8)
small = served.predict(None, image[:, :64, :64])
assert served.upscaler.tile_used is None
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (160 << 20),) * 2)
answer = served.predict(None, image)
assert answer.shape == (1, 1024, 896, 3) and answer.dtype == np.uint8, answer.shape
print(served.upscaler.tile_used)
"""


def test_a_large_image_is_answered_where_the_process_has_little_memory(tmp_path: Path) -> None:
    """Whole it would take 220 MB: the tiles are chosen before memory runs out, and nothing is begun anew."""
    save_pth(tmp_path / "x2.pth", build("hat", 2, **SIZES).state_dict())
    (tmp_path / "options.json").write_text(json.dumps({"num_heads": [3]}))
    command = [sys.executable, "-c", SERVED, str(tmp_path / "x2.pth"), str(tmp_path / "options.json")]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"MALLOC_ARENA_MAX": "1"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert 64 <= int(ended.stdout) < 448
    assert "out of memory" not in ended.stderr
