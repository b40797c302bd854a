"""Degradations by steps: each does what it says, a crop is the whole image's, and chance follows from the sample."""

import io

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from scipy.ndimage import gaussian_filter

from data_prep.bicubic import imresize
from data_prep.degrade import Crop, Kind, check, degradation, degrade, run
from data_prep.image import Picture
from data_prep.pairs import PairSettings, make_pair

KIND: TypeAdapter = TypeAdapter(Kind)
SEED = bytes(range(32))


def kind(*steps: dict) -> Kind:
    return KIND.validate_python(steps)


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """(300, 352, 3) uint8, a real one."""
    from skimage import data

    return np.ascontiguousarray(data.astronaut()[:300, :352])


def planes(value: float, side: int = 256) -> np.ndarray:
    return np.full((3, side, side), value, np.float32)


def degraded(image: np.ndarray, *steps: dict, seed: bytes = SEED) -> np.ndarray:
    """Steps on (3, h, w) of any dtype, at the same size."""
    return run(kind(*steps), image, image.shape[1:], seed)


def test_noise_has_its_deviation_and_is_not_cut() -> None:
    noisy = degraded(planes(250), {"step": "noise", "sigma": 25})
    assert abs((noisy - 250).std() - 25) < 0.2
    assert noisy.max() > 300
    assert not np.array_equal(noisy[0], noisy[1])
    assert degraded(planes(250), {"step": "noise", "sigma": 25, "clip": True}).max() == 255


def test_gray_noise_is_the_same_in_all_channels() -> None:
    noisy = degraded(planes(128), {"step": "noise", "sigma": 25, "gray": 1})
    np.testing.assert_array_equal(noisy[0], noisy[2])


@pytest.mark.parametrize("gray", [0, 1])
def test_the_variance_of_counted_light_is_its_mean(gray: int) -> None:
    for value in (20, 120):
        noisy = degraded(planes(value), {"step": "poisson", "scale": 0.5, "gray": gray})
        assert (noisy - value).var() == pytest.approx(0.25 * value, rel=0.02)


def test_a_range_is_drawn_evenly_and_from_the_seed() -> None:
    steps = kind({"step": "noise", "sigma": [0, 50]})
    deviations = []
    for number in range(200):
        seed = number.to_bytes(32, "little")
        noisy = run(steps, planes(128, 64), (64, 64), seed)
        np.testing.assert_array_equal(noisy, run(steps, planes(128, 64), (64, 64), seed))
        deviations.append((noisy - 128).std())
    assert min(deviations) < 2
    assert max(deviations) > 48
    assert np.mean(deviations) == pytest.approx(25, abs=3)


def test_jpeg_is_what_an_image_file_holds(photograph: np.ndarray) -> None:
    file = io.BytesIO()
    Image.fromarray(photograph).save(file, "JPEG", quality=30)
    expected = np.asarray(Image.open(file))
    np.testing.assert_array_equal(degrade(photograph, 1, kind({"step": "jpeg", "quality": 30}), "a"), expected)


def test_a_round_blur_is_a_gaussian_filter(photograph: np.ndarray) -> None:
    pixels = photograph.transpose(2, 0, 1)
    blurred = degraded(pixels, {"step": "blur", "sigma": 2.5, "side": 21})
    expected = gaussian_filter(pixels.astype(np.float64), (0, 2.5, 2.5), mode="reflect", radius=(0, 10, 10))
    np.testing.assert_allclose(blurred, expected, atol=1e-3)


def spread(image: np.ndarray) -> tuple[float, float]:
    """Standard deviations along and across the direction in which a blurred point is longest."""
    weight = image[0] / image[0].sum()
    y, x = np.mgrid[: weight.shape[0], : weight.shape[1]]
    y, x = y - (weight * y).sum(), x - (weight * x).sum()
    moments = [[(weight * x * x).sum(), (weight * x * y).sum()], [(weight * x * y).sum(), (weight * y * y).sum()]]
    across, along = np.sqrt(np.linalg.eigvalsh(moments).clip(0))
    return along, across


POINT = planes(0, 65)
POINT[:, 32, 32] = 1000


@pytest.mark.parametrize(
    ("step", "along", "across"),
    [
        ({"step": "blur", "sigma": 3, "side": 41}, 3, 3),
        ({"step": "blur", "sigma": 4, "sigma_across": 1, "side": 41}, 4, 1),
        ({"step": "motion", "length": 15, "side": 21}, 15 / 12**0.5, 0.4),
    ],
)
def test_a_point_is_spread_as_wide_as_the_kernel_says(step: dict, along: float, across: float) -> None:
    found = spread(degraded(POINT, step))
    assert found == (pytest.approx(along, rel=0.05), pytest.approx(across, abs=0.1))


def test_long_kernels_turn_in_every_direction() -> None:
    y, x = np.mgrid[-32:33, -32:33]
    sixths = set()
    for number in range(60):
        step = {"step": "motion", "length": 15, "side": 21}
        line = degraded(POINT, step, seed=number.to_bytes(32, "little"))[0]
        angle = 0.5 * np.arctan2(2 * (line * x * y).sum(), (line * (x * x - y * y)).sum())
        sixths.add(int(np.degrees(angle) % 180 // 30))
    assert sixths == set(range(6))


@pytest.mark.parametrize("shape", ["generalized", "plateau"])
def test_every_shape_keeps_brightness(shape: str) -> None:
    step = {"step": "blur", "sigma": 2, "shape": shape, "beta": [0.5, 4], "sigma_across": 1}
    np.testing.assert_allclose(degraded(planes(100, 64), step), 100, rtol=1e-5)
    assert not np.allclose(degraded(POINT, step), degraded(POINT, step | {"shape": "gaussian"}), atol=1)


def test_sinc_lets_low_frequencies_pass_and_no_high_ones() -> None:
    x = np.arange(256)
    slow, fast = (np.broadcast_to(100 * np.cos(frequency * x), (3, 256, 256)) for frequency in (0.2, 2.5))
    step = {"step": "sinc", "cutoff": 1.2, "side": 21}
    inside = (slice(None), slice(30, -30), slice(30, -30))
    assert np.abs(degraded(slow, step) - slow)[inside].max() < 20
    assert np.abs(degraded(fast, step))[inside].max() < 10


def test_one_of_follows_its_weights() -> None:
    step = {"step": "one_of", "of": [[{"step": "blur", "sigma": 1}], []], "weights": [1, 3]}
    kept = sum(np.array_equal(degraded(POINT, step, seed=n.to_bytes(32, "little")), POINT) for n in range(300))
    assert 195 <= kept <= 255  # 225 expected, 4 deviations


def test_a_step_left_to_chance_is_taken_as_often_as_it_says() -> None:
    step = {"step": "noise", "sigma": 1, "probability": 0.25}
    kept = sum(np.array_equal(degraded(POINT, step, seed=n.to_bytes(32, "little")), POINT) for n in range(300))
    assert 195 <= kept <= 255


EXACT = {
    "jpeg": (1, [{"step": "jpeg", "quality": 20}]),
    "blur, jpeg": (1, [{"step": "blur", "sigma": 2, "side": 13}, {"step": "jpeg", "quality": 40}]),
    "motion, jpeg, blur, jpeg": (
        1,
        [
            {"step": "blur", "sigma": 9, "sigma_across": 9, "side": 21},
            {"step": "jpeg", "quality": 90},
            {"step": "blur", "sigma": 2, "side": 7},
            {"step": "jpeg", "quality": 90},
        ],
    ),
    "shrink, jpeg": (3, [{"step": "shrink"}, {"step": "jpeg", "quality": 40}]),
    "blur, shrink, sinc, jpeg": (
        2,
        [
            {"step": "blur", "sigma": 3},
            {"step": "shrink"},
            {"step": "sinc", "cutoff": 2, "side": 11},
            {"step": "jpeg", "quality": 60},
        ],
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_crop_is_the_whole_images_crop(photograph: np.ndarray, name: str) -> None:
    scale, steps = EXACT[name]
    size = tuple(side // scale * scale for side in photograph.shape[:2])
    whole, way = degrade(photograph[: size[0], : size[1]], scale, kind(*steps), "a"), degradation(kind(*steps))
    height, width = whole.shape[:2]
    for crop in (
        Crop(0, 0, 32),
        Crop(37, 50, 32),
        Crop(77, 77, 32),
        Crop(height - 32, width - 32, 32),
        Crop(height - 41, 3, 32),
    ):
        box = way.needs(size, scale, crop)
        low_res = way.make(Picture(photograph).region(box), size, scale, crop, "uint8", SEED)
        expected = whole[crop.top : crop.top + 32, crop.left : crop.left + 32]
        np.testing.assert_allclose(low_res, expected.transpose(2, 0, 1) / 255, atol=1e-6)


def test_noise_is_left_uncut_only_where_every_sample_ends_with_it(photograph: np.ndarray) -> None:
    noise, cut = {"step": "noise", "sigma": 5}, {"step": "noise", "sigma": 5, "clip": True}
    for steps, dtype in (
        ([noise], np.float32),
        ([{"step": "one_of", "of": [[noise], [{"step": "jpeg", "quality": 50}, noise]]}], np.float32),
        ([{"step": "one_of", "of": [[noise], [cut]]}], np.uint8),
        ([{"step": "one_of", "of": [[noise]], "probability": 0.5}], np.uint8),
        ([noise, {"step": "jpeg", "quality": 50}], np.uint8),
    ):
        assert degrade(photograph, 1, kind(*steps), "a").dtype == dtype


def test_shrinking_is_the_published_bicubic(photograph: np.ndarray) -> None:
    low_res = run(kind({"step": "shrink"}), photograph.transpose(2, 0, 1), (150, 176), SEED)
    expected = imresize(photograph, 0.5, rounding="float")
    np.testing.assert_allclose(low_res, expected.transpose(2, 0, 1), atol=1e-3)


def test_sizes_on_the_way_end_at_the_low_resolution(photograph: np.ndarray) -> None:
    steps = kind(
        {"step": "resize", "factor": [0.15, 1.5]},
        {"step": "noise", "sigma": [1, 30], "clip": True},
        {"step": "resize", "factor": [0.3, 1.2], "of": "low_res"},
        {"step": "jpeg", "quality": [30, 95]},
        {"step": "shrink"},
    )
    for seed in "abc":
        assert degrade(photograph[:300, :352], 4, steps, seed).shape == (75, 88, 3)
    settings = PairSettings(scale=4, patch_px=24, degradation=steps)
    pair = make_pair(Picture(photograph), "a", 0, settings)
    assert pair.low_res.shape == (3, 24, 24)
    assert pair.high_res.shape == (3, 96, 96)
    # the two sides show the same place
    shrunk = imresize(np.ascontiguousarray(pair.high_res.transpose(1, 2, 0)), 0.25).transpose(2, 0, 1) / 255
    assert np.corrcoef(shrunk.ravel(), pair.low_res.ravel())[0, 1] > 0.8


def test_pairs_without_upscaling(photograph: np.ndarray) -> None:
    settings = PairSettings(scale=1, patch_px=48, degradation=kind({"step": "noise", "sigma": 5}))
    seen = set()
    for number in range(12):
        pair = make_pair(Picture(photograph), f"image{number}", 3, settings)
        noise = pair.low_res * 255 - pair.high_res
        assert noise.std() == pytest.approx(5, rel=0.1)
        np.testing.assert_array_equal(pair.low_res, make_pair(Picture(photograph), f"image{number}", 3, settings)[0])
        seen.add(noise.tobytes())
    assert len(seen) == 12


@pytest.mark.parametrize(
    ("scale", "steps", "words"),
    [
        (1, "bicubic", "list steps"),
        (2, [{"step": "noise", "sigma": 1}], r"\[noise\] has 0 steps `shrink`: at scale 2 it needs one"),
        (1, [{"step": "resize", "factor": 2}], "has 0 steps `shrink`"),
        (2, [{"step": "shrink"}, {"step": "shrink"}], "has 2 steps `shrink`"),
        (2, [{"step": "shrink"}, {"step": "resize", "factor": 2}], "after every `resize`"),
        (2, [{"step": "shrink", "probability": 0.5}], "take `shrink` always"),
        (2, [{"step": "one_of", "of": [[{"step": "shrink"}], []]}], r"\[\] has 0 steps"),
        (2, [{"step": "one_of", "of": [[{"step": "shrink"}]], "probability": 0.5}], r"\[\] has 0 steps"),
        (1, [], "has no steps"),
    ],
)
def test_steps_that_do_not_arrive_are_refused(scale: int, steps: list | str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(KIND.validate_python(steps), scale)
    with pytest.raises(ValidationError, match=words):
        PairSettings(scale=scale, patch_px=16, degradation=steps)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"step": "noise", "sigma": -1}, "sigma -1 must lie in 0..255"),
        ({"step": "noise", "sigma": [50, 0]}, r"sigma \[50, 0\] must lie"),
        ({"step": "noise", "sigmas": 3}, "Extra inputs"),
        ({"step": "jpeg", "quality": 0}, "quality 0 must lie in 1..100"),
        ({"step": "blur", "sigma": 1, "side": 20}, "side 20 must be odd"),
        ({"step": "blur", "sigma": 1, "side": 1001}, "side 1001 must lie in 3..101"),
        ({"step": "motion", "length": 30, "side": 21}, "length 30 must lie in 1..21"),
        ({"step": "one_of", "of": [[], []], "weights": [1]}, "one number for each of the 2"),
        ({"step": "one_of", "of": [[], []], "weights": [0, 0]}, "one number for each"),
        ({"step": "gauss"}, "'noise', 'poisson', 'jpeg', 'blur'"),
    ],
)
def test_settings_of_steps_are_checked(step: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        kind(step)
