"""`--dry-run` and what it reckons: quick to answer, with times that rest on a measurement or say what they assume."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from model import build
from pipeline import dry_run, estimate
from pipeline.arithmetic import macs_per_sample
from pipeline.config import ModelConfig, load_recipe
from pipeline.survey import Choice
from tests.shared_data import ROOT

SMALL = {
    "hat": {"embed_dim": 12, "depths": [2, 3], "num_heads": [3, 3], "window_size": 8, "squeeze_factor": 3},
    "hmanet": {"embed_dim": 32, "depths": [2, 2], "num_heads": [4, 4], "window_size": 8, "interval_size": 4},
    "hat_unet": {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "refinement": 1},
}


@pytest.mark.parametrize("arch", SMALL)
def test_a_few_blocks_tell_the_arithmetic_of_all(arch: str) -> None:
    macs = estimate.Macs(ModelConfig(arch=arch, options=SMALL[arch]))
    for scale in (2, 4):
        network = build(arch, scale, **SMALL[arch])
        assert macs.per_px(scale) == pytest.approx(macs_per_sample(network, 32) / 32**2, rel=0.02)


@pytest.mark.parametrize("arch", ["hat", "hat_l"])
def test_published_trainings_take_what_the_papers_say(arch: str) -> None:
    """Four days and eight on eight A100s, which the assumed pace is made of."""
    recipe = load_recipe(arch)
    pace = estimate.pace_of(recipe)
    days = 800_000 * estimate.step_time_s(recipe, "pretrain-x4", pace, estimate.Macs(recipe.model)) / 86_400
    assert days == pytest.approx({"hat": 4, "hat_l": 8}[arch], rel=0.05)
    assert "8 GPUs as fast as the A100s" in pace.source


def shown(tmp_path: Path, *overrides: str) -> str:
    screen = io.StringIO()
    recipe = load_recipe("demo", [f"storage.uri={tmp_path}/runs", *overrides])
    dry_run.run(recipe, Choice(), Console(file=screen, width=300))
    return screen.getvalue()


def test_every_stage_to_run_has_a_time_and_the_basis_is_told(tmp_path: Path) -> None:
    said = shown(tmp_path, "phases.cascaded={steps: null, minutes: 90, milestones: [0.5]}")
    stages = [line for line in said.splitlines() if "  run " in line]
    assert len(stages) == 15
    assert all("  about " in line for line in stages)
    assert sum("90 minutes  about 90 min" in line or "90 minutes  about 1.5 h" in line for line in stages) == 3
    assert "15 of 15 stages to run, 640 training steps, about " in said
    assert "times are estimates: a pass through two blocks of the network, timed on 1 of this machine's" in said
    assert not Path(tmp_path, "runs", "mlflow.db").exists()  # a look makes no database


def test_times_grow_with_the_steps_and_shrink_with_the_workers(tmp_path: Path) -> None:
    pace = estimate.Pace(1e9, "")
    macs = estimate.Macs(load_recipe("demo").model)
    alone, two = (load_recipe("demo", [f"compute.num_workers={count}"]) for count in (1, 2))
    one_step = estimate.step_time_s(alone, "pretrain-x2", pace, macs)
    assert estimate.step_time_s(two, "pretrain-x2", pace, macs) == pytest.approx(one_step / 2)
    assert one_step < estimate.step_time_s(alone, "pretrain-x4", pace, macs)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "about 1 s"), (40, "about 40 s"), (400, "about 6.7 min"), (8000, "about 2.2 h"), (7e5, "about 8.1 days")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert estimate.in_words(seconds) == words


def test_a_look_imports_neither_ray_nor_mlflow_and_no_compiler(tmp_path: Path) -> None:
    """What a plan takes seconds for, else; timing it would depend on the machine."""
    code = (
        "import sys; from pipeline import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "slow = {'ray', 'mlflow', 'deepspeed', 'pandas', 'torch._inductor.compile_fx'}\n"
        "print('imported:', sorted(slow & set(sys.modules)))\n"
    )
    command = ["pretrain", "--recipe", "demo", "--dry-run", "--set", f"storage.uri={tmp_path}/runs"]
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "imported: []", done.stdout + done.stderr
