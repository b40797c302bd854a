"""The networks under `torch.compile`: one graph without breaks, and the same results."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch.nn.attention import sdpa_kernel

from model.attention import BACKENDS, fused_attention, rows_of
from model.blocks import DropPath, drop_paths, set_drop_path_draws
from model.compiling import compile_in_place
from model.window_kernel import Attention
from model.windows import Squares, window_index
from tests.unit.model.tiny import tiny, tiny_hmanet, tiny_unet

NETWORKS = {"hat": tiny, "hmanet": tiny_hmanet, "hat_unet": partial(tiny_unet, 2)}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled by one test is left to the next."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def outputs_and_gradients(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    network.zero_grad()
    out = network(x)
    out.square().mean().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [out.detach(), *(gradient.clone() for gradient in gradients)]


@pytest.mark.parametrize(("checkpoint", "backend"), [("none", "aot_eager"), ("block", "eager")])
@pytest.mark.parametrize("arch", NETWORKS)
def test_one_graph_without_breaks_and_the_same_results(arch: str, checkpoint: str, backend: str) -> None:
    """`aot_eager` traces the backward pass as well, with the operators that the default compiler gets to see."""
    network = NETWORKS[arch](checkpoint=checkpoint).double().train()
    x = torch.rand(1, 3, 8, 16, dtype=torch.float64)
    expected = outputs_and_gradients(network, x)
    network.compile(backend=backend)
    results = outputs_and_gradients(network, x)
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == 1
    assert len(results) == len(expected) == 1 + len(list(network.parameters()))
    for ours, plain in zip(results, expected, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-6, atol=1e-12)


def test_one_graph_without_gradients_too() -> None:
    network, x = tiny(), torch.rand(1, 3, 8, 16)
    with torch.no_grad():
        expected = network(x)
        network.compile(backend="eager")
        assert torch.allclose(network(x), expected, atol=1e-6)
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == 1


def steps(network: nn.Module) -> tuple[list[float], list[torch.Tensor]]:
    """The losses of three training steps with numbers of their own for drop path, and the weights after them."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        set_drop_path_draws(drop_paths(network), torch.rand(2, len(drop_paths(network)), DropPath.BRANCHES))
        loss = (network(torch.rand(2, 3, 8, 16)) - torch.rand(2, 3, 16, 32)).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("arch", NETWORKS)
def test_training_steps_compile_once_and_train_the_same(arch: str) -> None:
    """What drop path is told anew at each step is data of the graph, not a part of it."""
    plain, compiled = (NETWORKS[arch](drop_path_rate=0.5).train() for _ in range(2))
    names = list(compiled.state_dict())
    compiled.compile(dynamic=False, backend="aot_eager")
    expected, (losses, weights) = steps(plain), steps(compiled)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["graph_break"] == {}
    assert list(compiled.state_dict()) == names
    assert losses == pytest.approx(expected[0], rel=1e-4)
    assert all(torch.allclose(ours, theirs, atol=1e-4) for ours, theirs in zip(weights, expected[1], strict=True))


def test_rates_of_drop_path_are_data_of_the_graph() -> None:
    """So that its kernels serve all blocks, and what is kept of a compilation serves other rates."""
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    for rate in (0.1, 0.3):
        module = DropPath(rate).train()
        module.draws = torch.rand(2, DropPath.BRANCHES)
        torch.compile(module, backend=keep)(torch.rand(2, 3))
        torch._dynamo.reset()
    assert graphs[0] == graphs[1]


def test_a_missing_compiler_is_said_before_the_first_pass() -> None:
    words = r"torch\.compile needs a C\+\+ compiler.* install g\+\+, name one by CXX"
    with inductor_config.patch("cpp.cxx", ("no-such-compiler",)), pytest.raises(ValueError, match=words):
        compile_in_place(tiny())


def test_the_choice_of_attention_is_no_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.attention._backends", lambda device: sdpa_kernel(BACKENDS))
    attention = Attention(Squares(4), 2, partial(rows_of, window_index(4)))
    table, image = torch.rand(49, 2), torch.rand(1, 8, 8, 12)
    compiled = torch.compile(partial(fused_attention, attention), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(table, image), fused_attention(attention, table, image))
