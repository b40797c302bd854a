"""Images of any size through a network."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from model.blocks import UpscalingNetwork
from model.inference import upscale, upscale_tensor
from model.init import bicubic_start
from model.precision import keep_fp32_exact
from model.tiles import Tiler
from tests.golden_cases import golden_network
from tests.photographs import shipped
from tests.shared_data import ROOT
from tests.unit.model.tiny import tiny, tiny_hmanet


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def bicubic(scale: int = 2) -> UpscalingNetwork:
    network = tiny(scale)
    bicubic_start(network)
    return network


@pytest.mark.parametrize("size", [(16, 24), (17, 23), (5, 30), (3, 2), (1, 1)])
@pytest.mark.parametrize("scale", [1, 3])
def test_any_size_including_below_a_window(size: tuple[int, int], scale: int) -> None:
    out = upscale(tiny(scale), image(*size))
    assert out.dtype == np.uint8
    assert out.shape == (size[0] * scale, size[1] * scale, 3)


def test_padding_reflects_at_the_right_and_the_bottom() -> None:
    network, x = tiny(), torch.rand(1, 3, 13, 6)
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, 3), (0, 2)), mode="reflect"))
    with torch.no_grad():
        assert torch.equal(upscale_tensor(network, x), network(padded)[:, :, :26, :12])


def test_whole_windows_are_not_padded() -> None:
    network, x = tiny(), torch.rand(2, 3, 8, 16)
    with torch.no_grad():
        assert torch.equal(upscale_tensor(network, x), network(x))


def test_values_are_rounded_half_to_even_and_clipped() -> None:
    """The identity network with a constant added shows how levels are made."""
    network, levels = bicubic(1), np.full((8, 8, 3), 100, np.uint8)
    bias = network.conv_last.bias
    assert bias is not None
    for added, expected in ((0.4, 100), (0.6, 101), (-300.0, 0), (300.0, 255)):
        torch.nn.init.constant_(bias, added / 255)
        assert (upscale(network, levels) == expected).all()
    assert torch.tensor([0.5, 1.5]).round().tolist() == [0, 2]


@pytest.mark.parametrize(("tile", "overlap"), [(16, 8), (21, 9), (40, 32), (64, 8)])
def test_tiles_equal_the_whole_where_the_network_sees_no_further_than_they_drop(tile: int, overlap: int) -> None:
    """Bicubic looks two pixels around; the outer quarter of an overlap of 8 is two pixels."""
    network, low_res = bicubic(), image(50, 37)
    # The whole image in whole windows: its own right and bottom border is padded differently from a tile's.
    low_res = np.pad(low_res, ((0, 6), (0, 3), (0, 0)), mode="reflect")
    whole, tiled = upscale(network, low_res), upscale(network, low_res, tile=tile, overlap=overlap)
    inside = slice(0, -4)
    assert np.abs(whole.astype(int) - tiled)[inside, inside].max() <= 1


def test_a_tile_as_large_as_the_image_changes_nothing() -> None:
    network = tiny()
    assert np.array_equal(upscale(network, image(20, 30), tile=30, overlap=8), upscale(network, image(20, 30)))


@pytest.mark.parametrize("size", [(50, 37), (64, 12), (33, 33)])
def test_tiles_of_a_network_without_context_leave_no_trace(size: tuple[int, int]) -> None:
    """A scale-1 identity sees one pixel only: blended tiles must give the image back, to the last bit."""
    assert np.array_equal(upscale(bicubic(1), image(*size), tile=16, overlap=8), image(*size))


def test_seams_are_no_steeper_than_the_whole_images_differences() -> None:
    """Along a tile border, neighbouring pixels of (tiled - whole) differ no more than elsewhere in it."""
    torch.manual_seed(0)
    network = tiny()
    x = torch.rand(1, 3, 64, 64)
    difference = upscale_tensor(network, x, tile=32, overlap=16) - upscale_tensor(network, x)
    steps = difference.diff(dim=3).abs().mean(dim=(0, 1, 2))
    borders = [2 * column - 1 for column in (16, 32, 48)]
    assert steps[borders].max() <= 2 * steps.median() + 1e-4


def test_mode_of_the_network_is_left_as_it_was() -> None:
    network = tiny(drop_path_rate=0.9).train()
    assert np.array_equal(upscale(network, image(8, 8)), upscale(network, image(8, 8)))
    assert network.training


def test_device_is_where_the_network_goes() -> None:
    assert upscale(tiny(), image(8, 8), device="cpu").shape == (16, 16, 3)


@pytest.mark.parametrize(
    "wrong", [image(8, 8)[0, 0], image(8, 8) / 255, image(8, 8)[..., [0, 1, 2, 0, 0]], image(0, 8)]
)
def test_wrong_images(wrong: Any) -> None:
    with pytest.raises(ValueError, match="expected a uint8 or uint16 image"):
        upscale(tiny(), wrong)


@pytest.mark.parametrize(("tile", "overlap"), [(32, 32), (16, 40), (16, -1), (0, 0)])
def test_wrong_tiles(tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"tile={tile} px with overlap={overlap} px"):
        upscale(tiny(), image(8, 8), tile=tile, overlap=overlap)


def test_wrong_batches_and_precisions() -> None:
    with pytest.raises(ValueError, match="batch=0: at least one tile"):
        upscale(tiny(), image(8, 8), batch=0)
    with pytest.raises(ValueError, match="precision='fp16': choose one of auto, fp32, bf16"):
        upscale(tiny(), image(8, 8), precision="fp16")


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.dtype(">u2")])
def test_the_identity_network_gives_every_kind_of_image_back(channels: int | None, dtype: Any) -> None:
    shape = (13, 10) if channels is None else (13, 10, channels)
    low_res = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
    if channels in (2, 4):
        low_res[..., -1] |= 1  # what is wholly transparent takes another colour
    out = upscale(bicubic(1), low_res)
    assert (out.dtype, out.shape) == (np.dtype(dtype).newbyteorder("="), low_res.shape)
    assert np.array_equal(out, low_res)


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_upscaled_like_a_gray_image(channels: int) -> None:
    network, low_res = bicubic(2), image(12, 12)[..., [0, 1, 2, 1]][..., -channels:]
    low_res[..., -1] |= 1  # what is wholly transparent takes another colour
    out = upscale(network, low_res)
    assert np.array_equal(out[..., -1], upscale(network, low_res[..., -1]))
    colour = low_res[..., :3] if channels == 4 else low_res[..., 0]
    assert np.array_equal(out[..., :-1].squeeze(), upscale(network, colour))


def test_opaque_images_stay_opaque_to_the_last_level() -> None:
    low_res = np.dstack([image(8, 8), np.full((8, 8), 255, np.uint8)])
    assert (upscale(tiny(), low_res)[..., 3] == 255).all()


def test_sixteen_bits_hold_more_than_eight() -> None:
    """Levels between those of 8 bits survive."""
    ramp = np.tile(np.arange(30000, 30000 + 16, dtype=np.uint16), (16, 1))
    out = upscale(bicubic(2), ramp)
    assert len(np.unique(out[8])) > 16
    assert np.abs(out[8:24:2, 8:24:2].astype(int) - ramp[4:12, 4:12]).max() <= 1


def test_ensemble_is_the_mean_over_flips_and_turns() -> None:
    network, x = tiny(), torch.rand(1, 3, 13, 10)
    turns = []
    for turns_by_90 in range(4):
        for flipped in (False, True):
            turned = x.flip(3).rot90(turns_by_90, (2, 3)) if flipped else x.rot90(turns_by_90, (2, 3))
            back = upscale_tensor(network, turned).rot90(-turns_by_90, (2, 3))
            turns.append(back.flip(3) if flipped else back)
    assert torch.allclose(upscale_tensor(network, x, ensemble=True), torch.stack(turns).mean(0), atol=1e-6)


def test_batched_tiles_are_the_same_tiles() -> None:
    network, x = tiny(), torch.rand(2, 3, 50, 37)
    one = upscale_tensor(network, x, tile=24, overlap=8)
    assert torch.allclose(upscale_tensor(network, x, tile=24, overlap=8, batch=5), one, atol=1e-6)


def test_progress_counts_every_tile_once() -> None:
    seen: list[tuple[int, int]] = []
    low_res = image(16, 24)[..., [0, 1, 2, 0]]
    upscale(tiny(), low_res, tile=16, overlap=8, ensemble=True, progress=lambda done, total: seen.append((done, total)))
    tiles = 2 * 8 * 2  # columns, turns, and once more for alpha
    assert seen == [(done, tiles) for done in range(1, tiles + 1)]


def test_bf16_is_used_and_near() -> None:
    torch.manual_seed(0)
    network, x = tiny(), torch.rand(1, 3, 32, 32)
    exact, rounded = upscale_tensor(network, x), upscale_tensor(network, x, precision="bf16")
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.02


def test_networks_in_other_types_work_or_say_why() -> None:
    low_res = image(16, 16)
    exact = upscale(bicubic(), low_res)
    assert np.abs(upscale(bicubic().bfloat16(), low_res).astype(int) - exact).max() <= 8
    assert np.array_equal(upscale(bicubic().double(), low_res), exact)
    with pytest.raises(ValueError, match=r"float16, which its activations overflow: call \.float\(\) or \.bfloat16"):
        upscale(bicubic().half(), low_res)


@pytest.fixture
def tf32_places() -> Iterator[list[Any]]:
    places: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [place.allow_tf32 for place in places]
    yield places
    for place, allowed in zip(places, before, strict=True):
        place.allow_tf32 = allowed


@pytest.mark.parametrize("allowed", [True, False])
def test_fp32_is_no_tf32(allowed: bool, tf32_places: list[Any]) -> None:
    for place in tf32_places:
        place.allow_tf32 = allowed
    seen: list[bool] = []
    network = tiny()
    network.register_forward_pre_hook(lambda *_: seen.extend(place.allow_tf32 for place in tf32_places))
    upscale_tensor(network, torch.rand(1, 3, 8, 8), precision="fp32")
    upscale_tensor(network, torch.rand(1, 3, 8, 8), precision="bf16")
    assert seen == [False, False, allowed, allowed]
    assert [place.allow_tf32 for place in tf32_places] == [allowed, allowed]


def test_a_training_in_fp32_takes_no_tf32(tf32_places: list[Any]) -> None:
    for place in tf32_places:
        place.allow_tf32 = True
    keep_fp32_exact()
    assert not any(place.allow_tf32 for place in tf32_places)


@pytest.mark.parametrize(
    ("case", "tile", "overlap"), [("hat_x3_w8", 128, 64), ("hat_x2_w16", 160, 96)], ids=["windows of 8", "of 16"]
)
def test_tiles_of_a_photograph_equal_the_whole(case: str, tile: int, overlap: int) -> None:
    """Golden weights are random and answer strongly to what is far away: trained ones need less (README)."""
    network = golden_network(case)
    x = photograph()
    difference = upscale_tensor(network, x, tile=tile, overlap=overlap) - upscale_tensor(network, x)
    assert difference.abs().max() <= 1e-3


@pytest.mark.parametrize(("case", "tile"), [("hat_x3_w8", 64), ("hat_x2_w16", 96)], ids=["windows of 8", "of 16"])
def test_tiles_at_the_default_overlap_equal_the_whole_once_trained(case: str, tile: int) -> None:
    """The golden body, as loud beside the image as after a brief training: golden weights alone answer with noise."""
    network, x = golden_network(case), photograph()
    body = network.conv_after_body.weight.detach().clone()
    bicubic_start(network)
    plain = upscale_tensor(network, x)
    network.conv_after_body.weight.data += body / 40
    whole = upscale_tensor(network, x)
    assert (whole - plain).abs().max() >= 0.05, "the body must matter"
    assert (upscale_tensor(network, x, tile=tile) - whole).abs().max() <= 1e-3


def test_the_default_overlap_is_in_windows() -> None:
    for network, what in ((tiny(window_size=16), "not seen"), (tiny_hmanet(), "ANOTHER ANSWER")):
        with pytest.raises(ValueError, match=f"overlap={4 * network.multiple} px"):
            upscale(network, image(8, 8), tile=network.multiple)
        assert what in Tiler(network, 999).describe()


def photograph() -> torch.Tensor:
    """(1, 3, 160, 208) in 0..1."""
    pixels = shipped("astronaut.png")[100:260, 100:308]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


class Greedy(torch.nn.Module):
    """A network that really runs out of memory above `limit` pixels, at every second call or whenever told."""

    def __init__(self, limit: int, every: int = 2) -> None:
        super().__init__()
        self.scale, self.multiple, self.limit, self.every = 1, 8, limit, every
        self.arch, self.conv_first = "hat", torch.nn.Conv2d(3, 3, 1)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tuple(x.shape))
        if len(x) * x.shape[2] * x.shape[3] > self.limit and len(self.sizes) % self.every == 0:
            torch.empty(1 << 50, dtype=torch.uint8)  # a petabyte: the allocator refuses
        return x + x.mean((2, 3), keepdim=True)


def test_out_of_memory_halves_the_batch_then_the_tile(caplog: pytest.LogCaptureFixture) -> None:
    """What is returned is what the size that fits gives by itself: nothing of the failed attempts is in it."""
    network: Any = Greedy(24 * 24)
    x = torch.rand(1, 3, 64, 64)
    out = upscale_tensor(network, x, tile=48, overlap=8, batch=2)
    assert network.sizes[-1] == (1, 3, 24, 24)
    assert {size[2] for size in network.sizes} == {48, 24}
    assert torch.equal(out, upscale_tensor(Greedy(1 << 40), x, tile=24, overlap=8))  # type: ignore[arg-type]
    assert "going on with tiles of 24 px that overlap by 8 px (" in caplog.text


def test_a_whole_image_is_tried_once_whatever_the_batch() -> None:
    network: Any = Greedy(2 * 24 * 24, every=1)
    upscale_tensor(network, torch.rand(1, 3, 64, 64), overlap=8, batch=8)
    assert network.sizes[:2] == [(1, 3, 64, 64), (8, 3, 32, 32)]


def test_out_of_memory_with_the_smallest_tile_ends() -> None:
    network: Any = Greedy(0, every=1)
    with pytest.raises(MemoryError, match="even with tiles of 16 px that overlap by 8 px: choose a smaller overlap"):
        upscale_tensor(network, torch.rand(1, 3, 64, 64), overlap=8)


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    network = tiny()
    network.conv_last = torch.nn.Conv2d(5, 3, 3)
    with pytest.raises(RuntimeError, match="channels"):
        upscale(network, image(8, 8))


LIMITED = """
import resource, numpy, torch
from model import build
from model.inference import upscale
torch.set_num_threads(1)
network = build("hat", 2, embed_dim=24, depths=(1,), num_heads=(2,), window_size=8, squeeze_factor=6).eval()
image = numpy.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=numpy.uint8)
small = upscale(network, image, tile=96, overlap=16)
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (128 << 20),) * 2)
seen = []
out = upscale(network, image, overlap=16, progress=lambda done, total: seen.append(total))
assert len(seen) > 1 and out.shape == (768, 768, 3)
print(seen[-1], numpy.abs(out.astype(numpy.int16) - small).max())
"""


def test_a_process_with_little_memory_upscales_all_the_same() -> None:
    """The kernel refuses the whole image's activations to this process; tiles fit."""
    command = [sys.executable, "-c", LIMITED]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"MALLOC_ARENA_MAX": "1"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "out of memory: going on with tiles of" in ended.stderr
    assert int(ended.stdout.split()[1]) <= 3
