"""Memory of a training: what autograd keeps, the state by ZeRO stage, the micro-batch that fits."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from model import build
from model.losses import build_loss
from pipeline.autobatch import find_micro_batch, memory_limit, useful_sizes
from pipeline.config import ComputeConfig, PhaseConfig
from pipeline.memory import StateBytes, saved_bytes, state_bytes

L1 = build_loss("l1")
PHASE = PhaseConfig(data="d", steps=1, global_batch=16, patch_px=16)


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def network():
    options = {"embed_dim": 12, "depths": [1], "num_heads": [3], "window_size": 8}
    return build("hat", 2, compress_ratio=3, squeeze_factor=3, **options)


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    layer = nn.Linear(4, 4)
    x = torch.randn(10, 4, requires_grad=True)

    def work():
        y = layer(x)  # keeps x and the weight
        (y * y).sum().backward()  # keeps y, twice

    assert saved_bytes(layer, work) == 2 * 10 * 4 * 4


def test_partitioning_divides_what_it_says():
    whole, parts = state_bytes(10**6, 0, 4), {stage: state_bytes(10**6, stage, 4) for stage in (1, 2, 3)}
    assert (whole.weights, whole.optimizer, whole.ema) == (4e6, 8e6, 4e6)
    assert parts[1].weights == 4e6
    assert parts[3].weights == 1e6
    assert all(part.ema == 1e6 for part in parts.values())
    assert all(part.optimizer == 3e6 for part in parts.values())  # with the fp32 partition
    offloaded = state_bytes(10**6, 2, 4, offload=True)
    assert offloaded.optimizer == offloaded.ema == 0
    assert offloaded.host == parts[2].optimizer + parts[2].ema + 1e6


def test_the_micro_batch_grows_with_the_memory(alone, network):
    chosen = {}
    for megabytes in (8, 12, 1000):
        compute = ComputeConfig(micro_batch="auto", memory_limit_gb=megabytes / 1000)
        chosen[megabytes] = find_micro_batch(network, L1, PHASE, compute, 2, bf16=False)
        assert chosen[megabytes] in useful_sizes(16)
    assert 1 <= chosen[8] < chosen[12] < chosen[1000] == 16
    assert all(p.grad is None for p in network.parameters())


def test_too_little_memory_for_one_sample_is_said(alone, network):
    compute = ComputeConfig(micro_batch="auto", memory_limit_gb=0.001)
    with pytest.raises(ValueError, match=r"not one sample of patch_px 16 fits .* compute.activation_checkpoint=block"):
        find_micro_batch(network, L1, PHASE, compute, 2, bf16=False)


class Greedy(nn.Module):
    """A network that runs out of memory above a number of samples."""

    def __init__(self, fitting: int, error: RuntimeError | None = None) -> None:
        super().__init__()
        self.fitting = fitting
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.layer = nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, x):
        if len(x) > self.fitting:
            raise self.error
        return nn.functional.pixel_shuffle(self.layer(x), 2)


def test_a_trial_may_run_out_of_memory(alone):
    compute = ComputeConfig(micro_batch="auto", memory_limit_gb=1)
    assert find_micro_batch(Greedy(2), L1, PHASE, compute, 2, bf16=False) == 16
    assert find_micro_batch(Greedy(1), L1, PHASE, compute, 2, bf16=False) == 1
    with pytest.raises(ValueError, match=r"not one sample .* \(out of memory when tried here\): set"):
        find_micro_batch(Greedy(0), L1, PHASE, compute, 2, bf16=False)


def test_libraries_that_run_out_of_memory_are_understood_and_other_errors_told(alone):
    compute = ComputeConfig(micro_batch="auto", memory_limit_gb=1)
    full = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert find_micro_batch(Greedy(1, full), L1, PHASE, compute, 2, bf16=False) == 1
    unsupported = "could not create a primitive descriptor for the inner product forward propagation primitive."
    for words in ("an illegal memory access", unsupported):
        with pytest.raises(RuntimeError, match=words):
            find_micro_batch(Greedy(1, RuntimeError(words)), L1, PHASE, compute, 2, bf16=False)


def voting(rank, folder):
    """One rank of two, of which the second has less memory than the first."""
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    compute = ComputeConfig(micro_batch="auto", memory_limit_gb=1)
    assert find_micro_batch(Greedy(2 - rank), L1, PHASE, compute, 2, bf16=False) == 1
    with pytest.raises(ValueError, match="not one sample"):
        find_micro_batch(Greedy(1 - rank), L1, PHASE, compute, 2, bf16=False)
    dist.destroy_process_group()


def test_all_ranks_agree_when_one_runs_out_of_memory(tmp_path):
    mp.spawn(voting, (str(tmp_path),), nprocs=2)


def test_useful_sizes_are_the_smallest_for_each_number_of_passes():
    assert list(useful_sizes(8)) == [8, 4, 3, 2, 1]


def test_the_limit_is_a_share_of_the_free_memory(monkeypatch):
    monkeypatch.setattr("pipeline.autobatch.free_memory_bytes", lambda: 8 * 10**9)
    for here, share in (("2", 4e9), ("4", 2e9)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert memory_limit(ComputeConfig(), torch.device("cpu")) == share


def test_offload_takes_the_state_off_the_device(network):
    on_device = StateBytes.of(network, ComputeConfig(zero_stage=2), 2)
    assert StateBytes.of(network, ComputeConfig(zero_stage=2, offload="optimizer"), 2).total < on_device.total
