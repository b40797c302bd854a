"""Lean layers against plain ones: the same values and gradients, with less kept."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import model.lean
from model.lean import Conv2d, Linear, Remake, gelu, multiply, scale
from tests.bench.measure import saved_bytes

PRECISIONS = [(torch.float64, False, 1e-12), (torch.float32, False, 1e-5), (torch.float32, True, 0.02)]


class Plain(nn.Module):
    """Layer norm, linear, GELU, linear; and the same with convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.conv1, self.conv2 = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        rows = self.fc2(F.gelu(self.fc1(normed)))
        middle = self.conv1(normed.permute(0, 3, 1, 2))
        gate = middle.mean((2, 3), keepdim=True).sigmoid()
        return rows + self.conv2(F.gelu(middle) * gate).permute(0, 2, 3, 1)


class Lean(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(8, 12), Linear(12, 8)
        self.conv1, self.conv2 = Conv2d(8, 12, 3, padding=1), Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        hidden = self.fc1(normed, Remake(x, self.norm))
        rows = self.fc2(gelu(hidden), Remake(hidden, gelu))
        middle = self.conv1(normed.permute(0, 3, 1, 2), Remake(x, lambda x: self.norm(x).permute(0, 3, 1, 2)))
        gate = middle.mean((2, 3), keepdim=True).sigmoid()
        gated = scale(gelu(middle, Remake(middle, lambda middle: middle * 1)), gate, Remake(middle, gelu))
        inner = Remake(middle, lambda middle: gelu(middle) * gate.detach())
        return rows + self.conv2(gated, inner).permute(0, 2, 3, 1)


def results(network: nn.Module, x: Tensor, autocast: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = network(x)
    out.float().square().sum().backward()
    grads = [x.grad, *(parameter.grad for parameter in network.parameters())]
    return [out.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize(("dtype", "autocast", "tolerance"), PRECISIONS)
def test_values_and_gradients_are_those_of_plain_layers(dtype: torch.dtype, autocast: bool, tolerance: float) -> None:
    torch.manual_seed(0)
    plain = Plain().to(dtype)
    lean = Lean().to(dtype)
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 5, 8, dtype=dtype)
    ours, expected = results(lean, x, autocast), results(plain, x, autocast)
    assert len(ours) == len(expected) == 12
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * max(b.abs().max().item(), 1)


def test_what_can_be_remade_is_not_kept() -> None:
    x = torch.randn(1, 64, 64, 8)
    kept = saved_bytes(Lean(), x)
    statistics = 2 * 64 * 64 * 4
    hidden = 2 * 64 * 64 * 12 * 4
    assert kept <= x.nbytes + hidden + statistics + 1000
    assert saved_bytes(Plain(), x) > 2 * kept


def test_frozen_weights_get_no_gradient() -> None:
    network = Lean()
    network.fc1.weight.requires_grad_(False)
    network.conv1.bias.requires_grad_(False)
    network(torch.randn(1, 4, 4, 8)).sum().backward()
    assert network.fc1.weight.grad is None
    assert network.conv1.bias.grad is None
    assert network.fc1.bias.grad is not None
    assert network.conv1.weight.grad is not None


def test_layers_without_bias_are_plain_ones() -> None:
    layer, conv = Linear(4, 3, bias=False), Conv2d(4, 3, 1, bias=False)
    x = torch.randn(2, 4)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    assert torch.equal(conv(x[:, :, None, None]), F.conv2d(x[:, :, None, None], conv.weight))


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("onednn", [True, False])
def test_products_with_and_without_onednn(
    onednn: bool, dtype: torch.dtype, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.lean, "HAS_ONEDNN", onednn and model.lean.HAS_ONEDNN)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 4, dtype=dtype), torch.randn(6, 4, dtype=dtype), torch.randn(6, dtype=dtype)
    expected = F.linear(x, weight, bias)
    expected = F.gelu(expected) if activation == "gelu" else expected
    assert torch.allclose(multiply(x, weight, bias, activation), expected, atol=1e-6)


def test_second_derivatives_are_refused() -> None:
    """Rather than silently wrong: the backward passes are not differentiable themselves."""
    network: Any = copy.deepcopy(Lean())
    x = torch.randn(1, 4, 4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
