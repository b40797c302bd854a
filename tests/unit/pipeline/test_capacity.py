"""`hatchery plan`, and the arithmetic that it and the training report."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model import build
from pipeline import capacity, capacity_report, cpu_capacity
from pipeline.arithmetic import macs_per_sample, peak_macs_per_s
from pipeline.cli import app
from pipeline.config import PhaseConfig, load_recipe
from tests.plain import plain_form
from tests.shared_data import ROOT

TINY = {
    "hat": {"embed_dim": 12, "depths": [2], "num_heads": [3], "window_size": 8, "squeeze_factor": 3},
    "hmanet": {"embed_dim": 32, "depths": [2], "num_heads": [4], "window_size": 8, "interval_size": 4},
}


@pytest.mark.parametrize("arch", TINY)
def test_macs_are_those_of_the_plain_form(arch):
    network = build(arch, 2, **TINY[arch])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain_form(network)(torch.zeros(1, 3, 32, 32))
    assert macs_per_sample(network, 32) == pytest.approx(counter.get_total_flops() / 2, rel=0.02)


def test_the_peak_is_above_what_a_small_product_reaches():
    assert peak_macs_per_s(torch.device("cpu"), bf16=False) > 1e9


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("demo", ["compute.num_workers=2"])


def test_more_gpus_hold_less_state_each(recipe):
    machines = [capacity.Machines(1, gpus, 16) for gpus in (2, 8)]
    totals = [capacity.states(recipe, "pretrain-x2", each, 3).total for each in machines]
    assert totals[0] > totals[1]


def test_checkpoints_hold_weights_moments_and_averages(recipe):
    network = build(recipe.model.arch, 2, **recipe.model.options)
    trained = sum(p.numel() for p in network.parameters())
    assert capacity.checkpoint_bytes(recipe, "pretrain-x2") == 16 * trained


def test_checkpoints_are_made_by_steps_and_by_the_clock():
    phase = PhaseConfig(data="d", steps=10_000, checkpoint_every=5000)
    assert capacity.num_checkpoints(phase, 1.0, None) == 2
    assert capacity.num_checkpoints(phase, 1.0, 600) == 17
    assert capacity.num_checkpoints(phase, 0.01, 600) == 2


def test_samples_that_fit_follow_the_memory():
    per_sample = 1e9
    assert capacity.samples_that_fit(1e9, per_sample, capacity.Machines(1, 1, 10)) == 5
    assert capacity.samples_that_fit(9e9, per_sample, capacity.Machines(1, 1, 10)) == 0


def test_the_measured_sample_is_scaled_to_the_patch(recipe):
    small = capacity.measure_sample(recipe, "pretrain-x2", bf16=False)
    assert 0 < small.kept["block"] < small.kept["none"]
    assert small.gmacs > 0
    assert small.time_s > 0


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_measured_only_where_the_cpu_computes_in_it(recipe, monkeypatch, native):
    monkeypatch.setattr(capacity, "has_bf16", lambda device: native)
    said = "measured in fp32, since this CPU has no bf16"
    for precision, bf16 in (("auto", native), ("bf16", native), ("fp32", False)):
        phase = recipe.phases["pretrain"].model_copy(update={"precision": precision})
        changed = recipe.model_copy(update={"phases": recipe.phases | {"pretrain": phase}})
        assert capacity.measures_in_bf16(phase) == bf16
        sample = capacity.Sample({"none": 1e9, "block": 1e8}, 1.0, 1.0)
        lines = capacity.notes(changed, "pretrain-x2", capacity.Machines(1, 2, 80), sample, given=False)
        assert any(said in line for line in lines) == (precision != "fp32" and not native)


def test_the_command_prints_every_stage_and_every_training():
    command = [sys.executable, "-m", "pipeline.cli", "plan", "--recipe", "demo", "--gpus-per-node", "3"]
    done = subprocess.run([*command, "--step-time", "2"], cwd=ROOT, capture_output=True, text=True, check=True)
    for word in ("3 + offload", "pretrain-x2-again", "finetune-x4", "given by --step-time", "at most 89% of them work"):
        assert word in done.stdout
    refused = subprocess.run([*command, "--nodes", "9"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "27 GPUs are more than the global batch 8" in refused.stderr


def test_attention_outside_the_network_is_not_needed():
    linear = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1))
    assert macs_per_sample(linear, 10) == 5 * 27 * 100


def hatchery_plan(capsys, *arguments):
    app(["plan", *arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_a_recipe_for_cpus_is_planned_for_cpus(capsys, monkeypatch):
    """Measured on one core; that several are measured as well is `test_ways_on_cpus_follow_memory_and_batch`."""
    monkeypatch.setattr(cpu_capacity.estimate, "available_cpus", lambda: 1)
    said = hatchery_plan(capsys, "--recipe", "demo", "--cpus", "4", "--memory", "16", "--nodes", "2")
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in said.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows[:3]] == [["2", "4"], ["4", "2"], ["8", "1"]]  # of two machines together
    assert [row[2] for row in rows[:3]] == ["4", "2", "1"]  # of a global batch of 8
    assert "processes on 2 x 4 cores and 16.0 GB" in said
    assert re.search(r"fastest of these: --set compute.num_workers=\d --set compute.cpus_per_worker=\d ", said)
    for training in ("pretrain-x2-again", "finetune-x4"):
        assert training in said
    assert "GPU" not in said.replace("use_gpu", "")


@pytest.mark.parametrize(
    ("use_gpu", "here", "planned_for"), [(True, 0, 8), (False, 2, None), ("auto", 0, None), ("auto", 2, 2)]
)
def test_who_gets_gpus_planned(use_gpu, here, planned_for, recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    compute = recipe.compute.model_copy(update={"use_gpu": use_gpu})
    assert capacity_report.gpus_wanted(recipe.model_copy(update={"compute": compute})) == planned_for


def test_ways_on_cpus_follow_memory_and_batch(recipe, monkeypatch):
    monkeypatch.setattr(cpu_capacity.estimate, "available_cpus", lambda: 8)
    monkeypatch.setattr(cpu_capacity.estimate, "measured_macs_per_s", lambda recipe, phase, threads: 1e9 * threads**0.5)
    sample = capacity.Sample({"none": 0.2e9, "block": 0.1e9}, 1.0, 1.0)
    found = cpu_capacity.ways(recipe, "pretrain-x2", cpu_capacity.CpuMachines(1, 8, 16), sample)
    assert [way.processes for way in found] == [1, 2, 4, 8]
    assert [way.threads for way in found] == [8, 4, 2, 1]
    assert all(way.processes * way.micro_batch == 8 for way in found)
    assert [way.hours for way in found] == sorted((way.hours for way in found), reverse=True)
    assert cpu_capacity.best_of(found).processes == 8
    tight = cpu_capacity.ways(recipe, "pretrain-x2", cpu_capacity.CpuMachines(1, 8, 4), sample)
    assert [way.fits for way in tight] == [True, True, False, False]
    assert cpu_capacity.best_of(tight).processes == 2
    none = cpu_capacity.ways(recipe, "pretrain-x2", cpu_capacity.CpuMachines(1, 8, 0.5), sample)
    assert cpu_capacity.best_of(none) is None
    machines = cpu_capacity.CpuMachines(1, 8, 0.5)
    assert "not one sample fits in 0.5 GB" in cpu_capacity.notes(recipe, "pretrain-x2", None, sample, machines)[-1]


def test_plans_that_cannot_be():
    for arguments, words in (
        (["--cpus", "2", "--gpus-per-node", "2"], "exclude one another"),
        (["--cpus", "1", "--nodes", "9"], "9 machines are more than the global batch 8"),
    ):
        with pytest.raises(ValueError, match=words):
            app(["plan", "--recipe", "demo", *arguments], standalone_mode=False)
