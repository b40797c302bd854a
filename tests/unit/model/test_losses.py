"""Losses by name."""

import pytest
import torch

from model.losses import build_loss


@pytest.mark.parametrize(("name", "expected"), [("l1", 2.0), ("l2", 5.0), ("charbonnier", 2.0)])
def test_mean_over_all_elements(name: str, expected: float) -> None:
    loss = build_loss(name)(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_charbonnier_is_smooth_at_zero() -> None:
    pred = torch.zeros(1, requires_grad=True)
    build_loss("charbonnier")(pred, torch.zeros(1)).backward()
    assert pred.grad is not None
    assert pred.grad.item() == 0


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="'L1' is unknown: choose one of l1, l2, charbonnier"):
        build_loss("L1")
