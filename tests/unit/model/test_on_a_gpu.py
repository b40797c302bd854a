"""The networks as on a GPU (see `tests.fake_cuda`): devices, dtypes and shapes, nothing that waits for values."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import model.attention
from model.attention import PAIRS_AT_ONCE, attend_image
from model.blocks import DropPath, drop_paths, set_drop_path_draws
from model.inference import upscale_tensor
from model.window_kernel import Attention, gather_bias
from model.windows import Grids, grid_rows
from tests.fake_cuda import backward, fake_cuda, mixed_types, to_fake_cuda
from tests.unit.model.tiny import tiny, tiny_hmanet, tiny_unet

NETWORKS: dict[str, Callable[..., Any]] = {"hat": tiny, "hmanet": tiny_hmanet, "hat_unet": partial(tiny_unet, 2)}


def training_pass(network: nn.Module, device: str, bf16: bool, go_back: Callable[[Tensor], None]) -> Tensor:
    """Forward and backward pass of two samples with drop path, as a training does it."""
    network.zero_grad()
    draws = torch.rand(2, len(drop_paths(network)), DropPath.BRANCHES, device=device)
    set_drop_path_draws(drop_paths(network), draws)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        output = network(torch.rand(2, 3, 16, 16, device=device))
    go_back((output.float() - torch.rand(2, 3, 32, 32, device=device)).abs().mean())
    return output


def looks(tensors: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("arch", NETWORKS)
def test_the_stand_in_for_autograds_engine_gives_its_gradients(arch: str) -> None:
    network = NETWORKS[arch](checkpoint="block", drop_path_rate=0.5).train()
    gradients = []
    for go_back in (backward, Tensor.backward):
        torch.manual_seed(1)
        training_pass(network, "cpu", True, go_back)
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize(("bf16", "checkpoint"), [(True, "none"), (False, "block")])
@pytest.mark.parametrize("arch", NETWORKS)
def test_a_training_pass_looks_as_on_the_cpu(arch: str, bf16: bool, checkpoint: str) -> None:
    network = NETWORKS[arch](checkpoint=checkpoint, drop_path_rate=0.5).train()
    expected = looks({"": training_pass(network, "cpu", bf16, Tensor.backward)})
    expected |= looks({name: parameter.grad for name, parameter in network.named_parameters()})
    set_drop_path_draws(drop_paths(network), None)
    with fake_cuda(), mixed_types(to_fake_cuda(network)) as mixed:
        made = {"": training_pass(network, "cuda", bf16, backward)}
        made |= {name: parameter.grad for name, parameter in network.named_parameters()}
    assert looks(made) == expected
    assert {tensor.device.type for tensor in made.values()} == {"cuda"}
    assert mixed == []


@pytest.mark.parametrize("arch", NETWORKS)
def test_inference_looks_as_on_the_cpu(arch: str) -> None:
    network = NETWORKS[arch]()
    x = torch.rand(1, 3, 19, 30)
    on_cpu = upscale_tensor(network, x, tile=16, overlap=8, batch=2, precision="bf16")  # now its tables are kept
    with fake_cuda() as mode, mixed_types(to_fake_cuda(network)) as mixed:
        made = upscale_tensor(network, mode.from_tensor(x), tile=16, overlap=8, batch=2, precision="bf16")
    assert (made.shape, made.dtype, made.device.type) == (on_cpu.shape, on_cpu.dtype, "cpu")
    assert mixed == []


@pytest.mark.parametrize("arch", NETWORKS)
def test_attention_does_not_plan_anew_for_each_shape(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = []
    attention = F.scaled_dot_product_attention

    def noted(*arguments: Any, **options: Any) -> Tensor:
        backends = torch.backends.cuda
        allowed.append((backends.cudnn_sdp_enabled(), backends.mem_efficient_sdp_enabled()))
        return attention(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    network = NETWORKS[arch]()
    with fake_cuda(), torch.no_grad():
        to_fake_cuda(network)(torch.rand(1, 3, 16, 16, device="cuda"))
    assert set(allowed) == {(False, True)}


def test_a_large_grids_bias_is_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """HMANet's of an image of 512 x 512 px has 2**28 pairs."""
    made = []

    def noted(table_pa: Tensor, index_nm: Tensor, dtype: torch.dtype) -> Tensor:
        made.append(index_nm.numel())
        return gather_bias(table_pa, index_nm, dtype)

    monkeypatch.setattr(model.attention, "gather_bias", noted)
    with fake_cuda(), torch.no_grad():
        rows = partial(grid_rows, 128, 128, torch.device("cuda"))
        images = [torch.empty(1, 512, 512, 12, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        out = attend_image(Attention(Grids(4), 2, rows), torch.empty(255**2, 2, device="cuda"), *images)
    assert (out.shape, out.dtype) == (images[0].shape, torch.bfloat16)
    assert sum(made) == 2**28
    assert max(made) <= PAIRS_AT_ONCE
