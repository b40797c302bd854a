"""What the guarded optimizer refuses."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.optimizer import GuardedAdam


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def optimizer() -> GuardedAdam:
    weight = nn.Parameter(torch.ones(3))
    return GuardedAdam([weight], max_norm=None, partitioned=True, device=torch.device("cpu"), lr=0.1)


@pytest.mark.parametrize("faulty", [float("inf"), float("nan")])
@pytest.mark.parametrize("number", [0, 1])
def test_a_loss_that_is_not_finite_refuses_the_step(alone: None, faulty: float, number: int) -> None:
    adam = optimizer()
    (weight,) = adam.param_groups[0]["params"]
    adam.begin_step(want_stop=False)
    for position in range(2):  # two passes of one step
        target = torch.full((3,), faulty if position == number else 0.0)
        loss = nn.functional.l1_loss(weight, target)
        adam.add_loss(loss)
        loss.backward()
    assert weight.grad.isfinite().all()  # L1's gradient is a sign
    adam.step()
    assert not adam.applied
    assert torch.equal(weight, torch.ones(3))
    adam.begin_step(want_stop=True)
    weight.grad = torch.ones(3)
    adam.add_loss(torch.tensor(1.0))
    adam.step()
    assert (adam.applied, adam.stop_wanted, adam.save_wanted) == (True, True, False)
    assert not torch.equal(weight, torch.ones(3))
