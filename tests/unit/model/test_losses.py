"""Losses by name, and the perceptual loss beside them."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model.losses import Perceptual, build_loss, with_perceptual


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


VGG19 = (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4)
"""Channels and poolings as the paper lists them (configuration E)."""
CPU = torch.device("cpu")


def vgg19() -> nn.Sequential:
    """Layer by layer, random."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for entry in VGG19:
        if isinstance(entry, int):
            layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.ReLU()]
            channels = entry
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Sequential]:
    network, path = vgg19(), tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    state = {f"features.{name}": value for name, value in network.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, path)
    return path, network


def test_the_perceptual_loss_is_of_the_last_convolutions_before_their_relu(
    backbone: tuple[Path, nn.Sequential],
) -> None:
    path, network = backbone
    pred, target = torch.rand(2, 2, 3, 32, 32, requires_grad=True).unbind()
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = torch.zeros(())
    for layer, weight in {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}.items():  # conv1_2, 2_2, 3_4, 4_4, 5_4
        ours, theirs = (network[: layer + 1]((x - mean) / std) for x in (pred, target))
        expected = expected + weight * F.l1_loss(ours, theirs)
    assert torch.allclose(Perceptual(path, CPU)(pred, target), expected, rtol=1e-5)
    both = with_perceptual(build_loss("l1"), Perceptual(path, CPU), 0.5)(pred, target)
    assert torch.allclose(both, F.l1_loss(pred, target) + 0.5 * expected, rtol=1e-5)


def test_the_perceptual_loss_pulls_the_first_image_alone(backbone: tuple[Path, nn.Sequential]) -> None:
    perceptual = Perceptual(backbone[0], CPU, (1, 0, 0, 0, 0))
    pred, target = (torch.rand(1, 3, 32, 32, requires_grad=True) for _ in range(2))
    perceptual(pred, target).backward()
    assert pred.grad is not None
    assert pred.grad.abs().max() > 0
    assert target.grad is None
    assert perceptual(target, target).item() == 0


def test_backbones_that_will_not_do(backbone: tuple[Path, nn.Sequential], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage_weights \[1, 1\] must be 5 numbers"):
        Perceptual(backbone[0], CPU, (1, 1))
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="holds neither AlexNet, VGG-16 nor VGG-19"):
        Perceptual(tmp_path / "half.pth", CPU)
