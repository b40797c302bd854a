"""Parts shared by the networks."""

import pytest
import torch

from model.blocks import DropPath, Float32Conv2d, drop_paths, set_drop_path_draws, stages_of, upsampler
from tests.unit.model.tiny import tiny


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.min(1).values, per_sample.max(1).values)
    assert per_sample.unique().tolist() == pytest.approx([0, 4 / 3])
    assert out.mean().item() == pytest.approx(1, abs=0.05)


def test_drop_path_follows_the_samples_numbers_in_any_batch() -> None:
    network = tiny(depths=(2,), drop_path_rate=0.5).train()
    paths = drop_paths(network)
    x, draws = torch.rand(4, 3, 8, 8), torch.rand(4, 2, DropPath.BRANCHES, generator=torch.Generator().manual_seed(1))
    set_drop_path_draws(paths, draws)
    together = network(x)
    assert torch.equal(network(x), together)
    for part in (slice(0, 1), slice(1, 4)):
        set_drop_path_draws(paths, draws[part])
        torch.testing.assert_close(network(x[part]), together[part], rtol=1e-5, atol=1e-6)
    set_drop_path_draws(paths, draws.flip(0))
    assert not torch.allclose(network(x), together, atol=1e-4)
    set_drop_path_draws(paths, None)
    torch.manual_seed(0)
    assert not torch.equal(network(x), network(x))


def test_drop_path_does_nothing_in_eval_mode() -> None:
    x = torch.rand(3, 2)
    assert torch.equal(DropPath(0.9).eval()(x), x)


def test_the_last_convolution_ignores_autocast() -> None:
    conv = Float32Conv2d(2, 3, 3)
    x = torch.rand(1, 2, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x.bfloat16())
    assert torch.equal(out, conv(x.bfloat16().float()))


@pytest.mark.parametrize(("scale", "stages"), [(2, (2,)), (3, (3,)), (4, (2, 2)), (8, (2, 2, 2))])
def test_upsampler_multiplies_by_the_scale_and_its_stages_are_found(scale: int, stages: tuple[int, ...]) -> None:
    layers = upsampler(scale)
    assert layers(torch.rand(1, 64, 3, 4)).shape == (1, 64, 3 * scale, 4 * scale)
    assert stages_of({f"upsample.{key}": value for key, value in layers.state_dict().items()}) == stages
