"""The adversarial part of a training: it learns, its step is that of the whole batch on any number of processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from pipeline.adversary import Adversary
from pipeline.config import AdversarialConfig

ASKED = AdversarialConfig(channels=4, lr=1e-2)
CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adversary() -> Adversary:
    return Adversary(ASKED, 3, CPU, bf16=False)


def images(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Made ones, smooth, and real ones, with edges: (1, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(number)
    made = torch.rand(1, 3, 4, 4, generator=generator)
    real = (torch.rand(1, 3, 16, 16, generator=generator) > 0.5).float()
    return F.interpolate(made, size=(16, 16), mode="bilinear"), real


def weights(found: Adversary) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in found.network.parameters()]


def test_it_learns_to_tell_and_pulls_made_images_towards_real_ones(alone: None) -> None:
    found = adversary()
    for step in range(60):
        found.observe(*images(step), 1.0)
        found.step(1, 1.0, applied=True)
        told = found.metrics()
        if not step:
            first = told
    assert told["discriminator_loss"] < 0.5 * first["discriminator_loss"]
    assert told["discriminator_real"] > 0 > told["discriminator_fake"]
    made, _ = images(99)
    made.requires_grad_()
    before = found.loss(made)
    before.backward()
    assert all(parameter.grad is None for parameter in found.network.parameters())  # only the network is pulled
    with torch.no_grad():
        assert found.loss(made - 0.01 * made.grad / made.grad.norm()) < before
    logits = found.network(made)
    assert before.item() == pytest.approx(0.1 * F.softplus(-logits).mean().item(), rel=1e-4)


def test_a_refused_or_unreal_step_changes_nothing(alone: None) -> None:
    found = adversary()
    before = weights(found)
    found.observe(*images(0), 1.0)
    found.step(1, 1.0, applied=False)
    found.observe(images(0)[0] * float("nan"), images(0)[1], 1.0)
    found.step(1, 1.0, applied=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(found), before, strict=True))
    found.observe(*images(0), 1.0)
    found.step(1, 1.0, applied=True)
    assert not all(torch.equal(a, b) for a, b in zip(weights(found), before, strict=True))
    assert all(parameter.isfinite().all() for parameter in weights(found))


def test_a_checkpoint_continues_it(alone: None, tmp_path: Path) -> None:
    left_alone, stopped = adversary(), adversary()
    for step in range(6):
        if step == 3:
            torch.save(stopped.state(), tmp_path / "state.pt")
            stopped = Adversary(ASKED, 8, CPU, bf16=False)
            stopped.restore(torch.load(tmp_path / "state.pt", weights_only=True))
        for found in (left_alone, stopped):
            found.observe(*images(step), 1.0)
            found.step(1, 0.5, applied=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(left_alone), weights(stopped), strict=True))


SHARES = {0: [0, 1], 1: [2]}
"""Which of a batch's three images each of two processes has: one has an empty pass at the end."""


def halves(rank: int, folder: Path, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    found = adversary()
    for step in range(4):
        for number in SHARES[rank]:  # 2 passes in 2 processes share 3 samples: each counts 4 / 3
            found.observe(*images(3 * step + number), 1 * 2 * 2 / 3)
        found.step(2, 1.0, applied=True)
    torch.save(weights(found), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_and_passes_change_nothing(alone: None, tmp_path: Path) -> None:
    mp.spawn(halves, (tmp_path, str(tmp_path / "two")), nprocs=2)  # type: ignore[no-untyped-call]
    whole = adversary()
    for step in range(4):
        made, real = zip(*(images(3 * step + number) for number in range(3)), strict=True)
        whole.observe(torch.cat(made), torch.cat(real), 1.0)
        whole.step(1, 1.0, applied=True)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for first, second, alone_ in zip(*both, weights(whole), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, alone_, rtol=1e-3, atol=1e-5)
