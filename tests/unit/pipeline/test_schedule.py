"""The learning rate against torch's own schedulers."""

import torch

from pipeline.config import PhaseConfig
from pipeline.schedule import learning_rate


def test_equals_multisteplr() -> None:
    phase = PhaseConfig(data="d", steps=20, lr=0.1, milestones=(5, 9, 10))
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 9, 10], 0.5)
    for step in range(20):
        assert learning_rate(step, phase) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def test_warmup_rises_linearly_to_the_full_rate() -> None:
    phase = PhaseConfig(data="d", steps=20, lr=0.1, warmup_steps=4)
    rates = [learning_rate(step, phase) for step in range(6)]
    assert torch.allclose(torch.tensor(rates), torch.tensor([0.02, 0.04, 0.06, 0.08, 0.1, 0.1]))
