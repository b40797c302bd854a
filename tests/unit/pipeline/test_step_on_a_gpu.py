"""A whole training step as on a GPU (see `tests.fake_cuda`): what it communicates, and how often it waits."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_prep.loader import Batch
from model.blocks import drop_paths
from model.losses import build_loss, with_adversary
from pipeline import train, zero
from pipeline.adversary import Adversary
from pipeline.config import AdversarialConfig, PhaseConfig
from pipeline.optimizer import GuardedAdam
from tests.fake_cuda import backward, fake_cuda, to_fake_cuda, waits
from tests.unit.model.test_on_a_gpu import NETWORKS

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "reduce_scatter", "gather")
PHASE = PhaseConfig(data="d", steps=9, global_batch=4, patch_px=16, grad_clip=0.5)


class Engine:
    """DeepSpeed's part at ZeRO 0: autocast, and the optimizer after the last pass."""

    def __init__(self, network: nn.Module, passes: int) -> None:
        self.module, self.passes, self.done = network, passes, 0
        options: dict[str, Any] = {"max_norm": PHASE.grad_clip, "partitioned": False, "device": torch.device("cuda", 0)}
        self.optimizer = GuardedAdam(network.parameters(), **options)

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            output: Tensor = self.module(x)
        return output

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self.done += 1
        if self.done % self.passes == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


@contextmanager
def collectives() -> Iterator[list[str]]:
    """Devices of all that is given to `torch.distributed`, which sends nothing."""
    seen: list[str] = []

    def note(*arguments: Any, **options: Any) -> None:
        tensors = [x for arg in arguments for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, Tensor)]
        seen.extend(x.device.type for x in tensors)

    with ExitStack() as stack:
        stack.enter_context(patch.object(dist, "get_world_size", lambda: 2))
        for name in COLLECTIVES:
            stack.enter_context(patch.object(dist, name, note))
        yield seen


def batches() -> Iterator[Batch]:
    """One sample and none, in turns, as a loader gives them to a rank of two."""
    while True:
        yield Batch(torch.rand(1, 3, 16, 16).pin_memory(), torch.rand(1, 3, 32, 32).pin_memory(), ["one"], 0)
        yield Batch(torch.rand(0, 3, 16, 16), torch.rand(0, 3, 32, 32), [], 0)


def run_on(network: nn.Module, adversary: Adversary | None, passes: int) -> Any:
    engine, loss = Engine(network.train(), passes), build_loss("l1")
    return SimpleNamespace(
        job=SimpleNamespace(phase=PHASE, seed=1),
        engine=engine,
        optimizer=engine.optimizer,
        ema=zero.PartitionedEMA(engine, 0.9),
        batches=batches(),
        loss=with_adversary(loss, adversary.loss) if adversary else loss,
        adversary=adversary,
        drop_paths=drop_paths(network),
        device=torch.device("cuda", 0),
        **{"rank": 0, "world_size": 2, "micro_batch": 1, "passes": passes, "step": 0},
    )


@pytest.mark.parametrize(("arch", "adversarial"), [("hat", True), ("hmanet", False), ("hat_unet", False)])
def test_a_step_stays_on_the_device_and_waits_once(arch: str, adversarial: bool) -> None:
    """Twice with a discriminator: whether its gradient is finite is known after the network's step."""
    network = NETWORKS[arch](drop_path_rate=0.5)
    adversary = Adversary(AdversarialConfig(channels=4), 0, torch.device("cpu"), bf16=True) if adversarial else None
    with fake_cuda(), collectives() as seen, patch.object(Tensor, "backward", backward):
        if adversary is not None:
            to_fake_cuda(adversary.network)
            adversary.device = torch.device("cuda", 0)
            adversary.sums = adversary.sums.cuda()
            adversary.optimizer = torch.optim.Adam(adversary.network.parameters())
        run = run_on(to_fake_cuda(network), adversary, passes=2)
        window = train.Window(torch.device("cpu"))  # whose clock is the host's: there are no events here
        for number in range(2):  # the first makes Adam's moments
            with waits() as waited:
                keys = train.step(run, window, 1e-4, want_save=number == 1)
            assert keys == ["one"]
            assert run.optimizer.applied
            assert len(waited) == 1 + adversarial, waited
    assert set(seen) == {"cuda"}
    assert len(seen) == 2 * (1 + adversarial)
    assert {p.device.type for p in (*network.parameters(), *run.ema.partitions)} == {"cuda"}
