"""`hatchery plan`, and the arithmetic that it and the training report."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model import build
from pipeline import capacity
from pipeline.arithmetic import macs_per_sample, peak_macs_per_s
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
