"""The discriminator: sizes, one logit a pixel, and spectral norms that follow the weights once a step."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from model.discriminator import Discriminator
from tests.fake_cuda import fake_cuda, operations, to_fake_cuda


def test_the_published_size() -> None:
    """4,376,897 parameters, as Real-ESRGAN's has."""
    assert sum(parameter.numel() for parameter in Discriminator().parameters()) == 4_376_897


@pytest.mark.parametrize("size", [(8, 8), (32, 24), (50, 33)])
def test_a_logit_for_each_pixel(size: tuple[int, int]) -> None:
    assert Discriminator(4)(torch.rand(2, 3, *size)).shape == (2, 1, *size)


def normed(network: Discriminator) -> list[nn.Module]:
    return [module for module in network.modules() if parametrize.is_parametrized(module)]


def test_layers_are_divided_by_their_largest_singular_value() -> None:
    torch.manual_seed(0)
    network = Discriminator(4)
    assert len(normed(network)) == 8  # all but the first and the last
    for _ in range(200):
        network.follow()
    for conv in normed(network):
        largest = torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item()
        assert largest == pytest.approx(1, abs=1e-3)


def test_only_following_changes_the_norms() -> None:
    torch.manual_seed(0)
    network = Discriminator(4)
    with torch.no_grad():
        for conv in normed(network):
            conv.parametrizations.weight.original.mul_(torch.linspace(0.1, 3, len(conv.weight))[:, None, None, None])
        x = torch.rand(1, 3, 16, 16)
        first = network(x)
        assert torch.equal(network(x), first)  # asking changes nothing, however often
        network.follow()
        assert not torch.equal(network(x), first)
    assert not network.training


def test_norms_are_found_in_fp32_where_autocast_multiplies_in_bf16() -> None:
    network = Discriminator(4)
    with fake_cuda(), operations() as done:
        to_fake_cuda(network)
        with torch.autocast("cuda", torch.bfloat16):
            assert network(torch.rand(1, 3, 16, 16, device="cuda")).dtype == torch.bfloat16
    products = [inputs for name, inputs in done if name == "aten.mv.default"]
    assert len(products) == 8
    assert {x.dtype for inputs in products for x in inputs} == {torch.float32}
