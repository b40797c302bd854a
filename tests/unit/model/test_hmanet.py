"""Position biases and quirks of HMANet against direct definitions."""

import pytest
import torch

from model.hmanet import PositionBias, unrolled
from model.windows import grid_rows
from tests.plain import plain_form
from tests.unit.model.tiny import tiny_hmanet


def test_unrolling_moves_pixels_along_rows_and_channels_as_published() -> None:
    x_bhwc = torch.arange(4 * 4 * 3).reshape(1, 4, 4, 3)
    out = unrolled(x_bhwc, 4)
    assert out.shape == x_bhwc.shape
    assert torch.equal(out[0, 1, 1], x_bhwc[0, 0, 3, [1, 2, 0]])


def test_position_bias_depends_on_the_offset_alone() -> None:
    torch.manual_seed(0)
    network = PositionBias(5, 3).double()
    bias = network(2, 4)[grid_rows(2, 4, torch.device("cpu"), 0, 8)]
    for query in range(8):
        for key in range(8):
            offset = torch.tensor([[query // 4 - key // 4, query % 4 - key % 4]]).double()
            direct = network.pos3(network.pos2(network.pos1(network.pos_proj(offset))))[0]
            assert torch.allclose(bias[query, key], direct, atol=1e-12)


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_position_network_learns_as_in_the_plain_form(size: tuple[int, int]) -> None:
    """Five channels wide, as published; the golden cases have one, whose gradient is zero."""
    network = tiny_hmanet(embed_dim=160, num_heads=(2,)).double()
    plain = plain_form(network).double()
    x = torch.rand(1, 3, *size).double()
    for form in (network, plain):
        form(x).square().mean().backward()
    expected = {name: value.grad for name, value in plain.named_parameters() if ".pos." in name}
    assert len(expected) == 28
    for name, value in network.named_parameters():
        if ".pos." in name:
            assert value.grad is not None
            assert torch.allclose(value.grad, expected[name], rtol=1e-6, atol=1e-18), name
    # A constant added to every score of a head cancels in the softmax: only that bias stays without gradient.
    assert all(grad.abs().max() > 1e-12 for name, grad in expected.items() if "pos3.2.b" not in name)
