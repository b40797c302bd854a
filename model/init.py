"""How weights begin: as published, from bicubic interpolation, or from a network of another scale."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.blocks import NUM_FEAT, STAGES, UpscalingNetwork, restoration_head_of, stages_of

TAILS = ("resample", "fresh", "bicubic")
SLOPE = 0.01
"""Negative slope of the head's LeakyReLU: leaky(x) - leaky(-x) = (1 + SLOPE) x."""

NAMES = ("weight", "bias")
"""Parameters of a stage's convolution."""


def published_init(module: nn.Module) -> None:
    """Initialize one module as HAT does: linear layers normal (sigma 0.02, cut at +-2) with zero bias.

    LayerNorm (ones, zeros) and convolutions keep PyTorch's own defaults. Use with `network.apply`.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def bicubic_start(network: UpscalingNetwork) -> None:
    """Set the layers outside the body so that the untrained network interpolates bicubically (a = -0.5).

    Exact up to fp32 rounding for x2, x3, x4 and x8 but for 2 low-resolution pixels at each border, where
    convolutions see zeros; the identity for scale 1. RGB passes through channels 0..2 of conv_first, and
    conv_after_body is zero, so the body adds nothing until that layer has learnt. Warm the learning rate up:
    Adam's first full-size step would destroy the start.
    """
    _pass_through(network.conv_first, 3)
    nn.init.zeros_(network.conv_after_body.weight)
    if network.conv_after_body.bias is not None:
        nn.init.zeros_(network.conv_after_body.bias)
    _bicubic_tail(network)


def transfer(source: dict[str, Tensor], network: UpscalingNetwork, *, tail: str = "resample") -> dict[str, str]:
    """Load what fits of another scale's state dict (a cascade step) and say per key what was done.

    Everything but the PixelShuffle stages has the same shape at every scale and is copied, conv_last only where the
    source ends as the network does (see `restoration_head`). `tail` says how stages begin that the source does not
    have:
    - "resample" (default): a stage of another factor is interpolated between the sub-pixel positions of the
      source's, a further stage interpolates its features, so the new scale begins near the old one's gain. Where
      the source has more stages, the last one here gives the source's image at fewer sub-pixels; at scale 1, which
      has none, conv_last does.
    - "fresh": they stay as `network` has them (what the published cascade does).
    - "bicubic": conv_before_upsample, upsample and conv_last are set as in `bicubic_start`; only sensible if
      the source was itself trained from there.
    Set5 PSNR at step 0 and after 60 steps, from an x2 network of 48 channels and 2 blocks, 350 steps after its
    bicubic start (34.98 dB; plain bicubic has 33.67, 30.40 and 28.43 at x2, x3, x4):
    x3 resample 30.93, 31.19; bicubic 30.74, 31.04; fresh 12.77, 26.65;
    x4 resample 28.80, 29.11; bicubic 28.81, 29.10; fresh 12.61, 25.77.
    Downwards, at step 0, from an x4 network of 24 channels, 150 steps after its bicubic start (28.64 dB):
    x2 resample 33.79, bicubic 33.82; x3 resample 30.58, bicubic 30.56. Untrained starts: within 0.1 dB of the new
    scale's own, for all pairs.
    Values of the report: "copied", "computed" (a buffer that the source lacks), "resampled: ...",
    "interpolating: ...", "passing through: ...", "bicubic", "fresh: ...".
    ValueError for an unknown tail, a source of which nothing fits, or one whose position indices are others.
    """
    if tail not in TAILS:
        raise ValueError(f"tail={tail!r} is unknown: choose one of {', '.join(TAILS)}")
    own = network.state_dict()
    same_head = ("conv_before_upsample.0.weight" in source) == (not network.is_residual)
    apart = () if same_head else ("conv_last.weight", "conv_last.bias")
    fitting = {key: source[key] for key in own if key in source and source[key].shape == own[key].shape}
    fitting = {key: value for key, value in fitting.items() if key not in apart}
    _check_fitting(fitting, network)
    report = {key: "copied" if key in fitting else _why_fresh(key, network, source) for key in own}
    network.load_state_dict(fitting, strict=False)
    if tail == "bicubic" and not network.is_residual:
        _bicubic_tail(network)
        report |= {key: "bicubic" for key in own if key.startswith(("conv_before_up", "upsample", "conv_last"))}
    if tail == "resample" and same_head:
        report |= _resample_tail(source, network)
    return report


def _check_fitting(fitting: dict[str, Tensor], network: UpscalingNetwork) -> None:
    """ValueError where nothing but buffers fits, or buffers hold other values than are computed here."""
    buffers = dict(network.named_buffers())
    if not fitting.keys() - buffers.keys():
        raise ValueError(f"no tensor of the source fits {network.arch} x{network.scale}: a network of other sizes?")
    for key, value in fitting.items():
        if key in buffers and not torch.equal(buffers[key].to(value), value):
            raise ValueError(
                f"{key} of the source has other values than {network.arch} computes: another program's order"
            )


def _why_fresh(key: str, network: UpscalingNetwork, source: dict[str, Tensor]) -> str:
    if key not in source:
        return "computed" if key in dict(network.named_buffers()) else "fresh: not in the source"
    own, theirs = tuple(network.state_dict()[key].shape), tuple(source[key].shape)
    if own == theirs:
        return f"fresh: of a {restoration_head_of(source)} head in the source"
    return f"fresh: {theirs} in the source, {own} here"


def _stage(network: UpscalingNetwork, stage: int) -> nn.Conv2d:
    """The convolution before PixelShuffle number `stage`."""
    return _convolution(network.upsample, 2 * stage)


def _convolution(layers: nn.Sequential, position: int) -> nn.Conv2d:
    layer = layers[position]
    assert isinstance(layer, nn.Conv2d)
    return layer


def _clear(conv: nn.Conv2d, num_outputs: int | None = None) -> None:
    """Zero all that feeds the first outputs; the others stay random, so that they can learn."""
    conv.weight[:num_outputs] = 0
    if conv.bias is not None:
        conv.bias[:num_outputs] = 0


def _pass_through(conv: nn.Conv2d, num_outputs: int) -> None:
    """Output i is input i, for the first outputs."""
    _clear(conv, num_outputs)
    for channel in range(num_outputs):
        conv.weight[channel, channel, 1, 1] = 1


def _keys_cubic(distance: Tensor) -> Tensor:
    """The bicubic kernel of Keys (1981) with a = -0.5, for distances in low-resolution pixels."""
    x = distance.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, torch.zeros_like(x)))


def _phases(factor: int) -> Tensor:
    """Centres of a pixel's `factor` sub-pixels along one axis, relative to its own centre."""
    return (torch.arange(factor, dtype=torch.float64) + 0.5) / factor - 0.5


@torch.no_grad()
def _bicubic_tail(network: UpscalingNetwork) -> None:
    """Channels 0..2 of the features -> their bicubic interpolation.

    conv_before_upsample stores the 9 shifts of each colour with both signs (54 features), which gives the
    first stage 5x5 taps. It computes every output pixel there and then: its features are the sub-pixels that
    later stages only have to spread (at most 3 x 4 x 4 of 64, for x8).
    Scale 1 passes the colours through, or adds nothing to its input.
    """
    factors = STAGES[network.scale]
    if not factors:
        _identity_tail(network)
        return
    _store_shifts(_convolution(network.conv_before_upsample, 0))
    rest = network.scale // factors[0]
    _add_bicubic_taps(_stage(network, 0), factors[0], rest)
    for stage, factor in enumerate(factors[1:], start=1):
        rest //= factor
        _spread(_stage(network, stage), factor, rest)
    _clear(network.conv_last)
    for colour in range(3):
        network.conv_last.weight[colour, colour, 1, 1] = 1


def _identity_tail(network: UpscalingNetwork) -> None:
    """Each colour of the features with both signs through the LeakyReLU, and together again."""
    _clear(network.conv_last)
    if network.is_residual:
        return
    before = _convolution(network.conv_before_upsample, 0)
    _clear(before, 6)
    for colour in range(3):
        for feature, sign in ((2 * colour, 1.0), (2 * colour + 1, -1.0)):
            before.weight[feature, colour, 1, 1] = sign
            network.conv_last.weight[colour, feature, 1, 1] = sign / (1 + SLOPE)


def _store_shifts(conv: nn.Conv2d) -> None:
    """Feature 18 colour + 6 (y + 1) + 2 (x + 1): the colour at offset y, x of -1..1; the next, negated."""
    _clear(conv, 54)
    for feature in range(54):
        colour, place = divmod(feature // 2, 9)
        y, x = divmod(place, 3)
        conv.weight[feature, colour, y, x] = 1 - 2 * (feature % 2)


def _add_bicubic_taps(conv: nn.Conv2d, factor: int, rest: int) -> None:
    """Output (colour, rest y, rest x, phase y, phase x) is bicubic at sub-pixel phase * rest + rest."""
    taps = torch.arange(-2, 3)
    kernel = _keys_cubic(_phases(factor * rest)[:, None] - taps[None, :])
    _clear(conv, 3 * (rest * factor) ** 2)
    weight = conv.weight[: 3 * (rest * factor) ** 2].unflatten(0, (3, rest, rest, factor, factor))
    for colour in range(3):
        for tap_y in range(-2, 3):
            for tap_x in range(-2, 3):
                shift_y, shift_x = max(-1, min(1, tap_y)), max(-1, min(1, tap_x))
                value = kernel[:, None, tap_y + 2] * kernel[None, :, tap_x + 2] / (1 + SLOPE)
                value = value.unflatten(0, (factor, rest)).unflatten(2, (factor, rest)).permute(1, 3, 0, 2)
                feature = 18 * colour + 6 * (shift_y + 1) + 2 * (shift_x + 1)
                y, x = tap_y - shift_y + 1, tap_x - shift_x + 1
                weight[colour, ..., feature, y, x] = value.to(weight.dtype)
                weight[colour, ..., feature + 1, y, x] = -value.to(weight.dtype)


def _spread(conv: nn.Conv2d, factor: int, rest: int) -> None:
    """Input features (colour, y, x) of side factor * rest become sub-pixels: nothing is computed any more."""
    _clear(conv, 3 * (rest * factor) ** 2)
    source = torch.arange(3 * (rest * factor) ** 2).unflatten(0, (3, factor, rest, factor, rest))
    source = source.permute(0, 2, 4, 1, 3)
    for output, feature in enumerate(source.flatten().tolist()):
        conv.weight[output, feature, 1, 1] = 1


@torch.no_grad()
def _resample_tail(source: dict[str, Tensor], network: UpscalingNetwork) -> dict[str, str]:
    """Set the stages that the source lacks or has with another factor; returns their part of the report.

    Where the source has more stages, the last one here does the work of all that are left there, and of conv_last;
    conv_last does it where there is none here.
    """
    report: dict[str, str] = {}
    factors, own = stages_of(source), STAGES[network.scale]
    if network.is_residual:
        return report
    if factors and not own:
        for parameter, old in zip(network.conv_last.parameters(), _image_of(source, 0, factors), strict=True):
            parameter.copy_(_mix_sub_pixels(old, math.prod(factors), 1))
        return {
            f"conv_last.{name}": f"resampled: the image from x{math.prod(factors)} sub-pixels to x1" for name in NAMES
        }
    for stage, factor in enumerate(own):
        conv = _stage(network, stage)
        theirs = factors[stage:] if stage == len(own) - 1 else factors[stage : stage + 1]
        if not theirs:
            _interpolate_features(conv, factor)
            report |= _keys(stage, f"interpolating: 3x3 taps of x{factor} on each feature")
        elif len(theirs) > 1:
            _clear(conv, 3 * factor**2)
            for parameter, old in zip(conv.parameters(), _image_of(source, stage, theirs), strict=True):
                parameter[: 3 * factor**2] = _mix_sub_pixels(old, math.prod(theirs), factor)
            _clear(network.conv_last)
            _pass_through(network.conv_last, 3)
            report |= _keys(stage, f"resampled: the image from x{math.prod(theirs)} sub-pixels to x{factor}")
            report |= {f"conv_last.{name}": f"passing through: part of upsample.{2 * stage}" for name in NAMES}
        elif theirs != (factor,):
            for name, parameter in conv.named_parameters():
                old = source[f"upsample.{2 * stage}.{name}"]
                parameter.copy_(_mix_sub_pixels(old, theirs[0], factor))
            report |= _keys(stage, f"resampled: x{theirs[0]} sub-pixels to x{factor}")
    return report


def _image_of(source: dict[str, Tensor], first: int, factors: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Weight (3 factor**2, C, taps, taps) and bias of one stage that does what stages from `first` on and conv_last do.

    Between them sub-pixels only move, so together they are linear: an impulse in each input feature shows the
    weights, mirrored, and an input of zeros the bias. Each layer sees at most a pixel farther.
    """
    taps, channels = 2 * len(factors) + 3, source[f"upsample.{2 * first}.weight"].shape[1]
    x_bchw = source["conv_last.weight"].new_zeros(channels + 1, channels, taps, taps)
    x_bchw[range(channels), range(channels), taps // 2, taps // 2] = 1
    for number, factor in enumerate(factors, start=first):
        weight, bias = (source[f"upsample.{2 * number}.{name}"] for name in NAMES)
        x_bchw = F.pixel_shuffle(F.conv2d(x_bchw, weight, bias, padding=1), factor)
    image_bchw = F.conv2d(x_bchw, source["conv_last.weight"], source["conv_last.bias"], padding=1)
    phases_bfhw = F.pixel_unshuffle(image_bchw, math.prod(factors))
    impulses, zeros = phases_bfhw[:-1], phases_bfhw[-1]
    return (impulses - zeros).flip(2, 3).transpose(0, 1), zeros[:, taps // 2, taps // 2]


def _keys(stage: int, what: str) -> dict[str, str]:
    return {f"upsample.{2 * stage}.{name}": what for name in NAMES}


def _sub_pixel_weights(old: int, new: int) -> Tensor:
    """(3, new, old): cubic weights, per axis, of the old sub-pixels of the pixel before, of this one, of the next."""
    cells = torch.arange(-1, 2)
    positions = cells[:, None, None] + _phases(old)[None, None, :]
    weights = _keys_cubic((_phases(new)[None, :, None] - positions) * old)
    return weights / weights.sum((0, 2), keepdim=True)


def _mix_sub_pixels(tensor: Tensor, old: int, new: int) -> Tensor:
    """(F old**2, ...) -> (F new**2, ...): a stage's weight or bias at other sub-pixel positions.

    What a neighbouring pixel's sub-pixel computes is computed here by moving its taps one on; taps that leave
    the 3x3, also those of larger weights, are kept at its rim, so that constant images stay exact.
    """
    weights = _sub_pixel_weights(old, new).to(tensor.device)
    phases = tensor.double().unflatten(0, (-1, old, old))
    if tensor.ndim == 1:
        axis = weights.sum(0)
        mixed = torch.einsum("fyx,py,qx->fpq", phases, axis, axis)
        return mixed.flatten().to(tensor.dtype)
    own, taps = (torch.arange(size, device=tensor.device) - size // 2 for size in (3, tensor.shape[-1]))
    moved = torch.stack([(own[:, None] == (taps[None, :] + cell).clamp(-1, 1)) for cell in (-1, 0, 1)])
    axis = torch.einsum("cpy,cst->pyst", weights, moved.double())
    mixed = torch.einsum("fyxiab,pysa,qxtb->fpqist", phases, axis, axis)
    return mixed.flatten(0, 2).to(tensor.dtype)


def _interpolate_features(conv: nn.Conv2d, factor: int) -> None:
    """Each feature's sub-pixels by the parabola through three neighbours, along both axes."""
    x = _phases(factor)
    taps = torch.stack([x * (x - 1) / 2, 1 - x * x, x * (x + 1) / 2], dim=1).to(conv.weight.dtype)
    _clear(conv)
    weight = conv.weight.unflatten(0, (NUM_FEAT, factor, factor))
    for feature in range(NUM_FEAT):
        weight[feature, :, :, feature] = taps[:, None, :, None] * taps[None, :, None, :]
