"""HAT and HMANet against their plain form (tests/plain.py): times, bytes kept for the backward pass, equality.

    .venv/bin/python -m tests.bench.networks [hat] [hmanet]

One group of six blocks, width 180, window 16, low resolution 64 x 64 px, x2, two threads. All sides take turns in one
run, each in a process of its own (see `measure.race`), a matrix product among them, which shows what the machine
reaches at that moment. Ends with exit code 1 where one of HAT's floors is missed (issue 3 sets none for HMANet) or a
result differs from the plain form's.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model import build
from pipeline.heap import keep_freed_memory
from tests.bench.measure import race, saved_bytes
from tests.plain import plain_form

THREADS = 2
SIZE_PX = 64
PRODUCT_SIDE = 1536
"""Side of the square matrices whose product is the yardstick."""
ROUNDS = 10
LIMIT_S = {"inference": 60, "training": 180}
"""For how long to wait for rounds without other work on the machine."""
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
"""Largest differences from the plain form in fp32, relative to the largest entry."""


@dataclass(frozen=True)
class Goal:
    """What issue 3 asks of a ratio to the plain form in fp32."""

    name: str
    floor: float
    aim: float

    @property
    def is_share(self) -> bool:
        """Whether less is better: a share of the plain form's bytes instead of a speed-up."""
        return self.floor < 1

    def verdict(self, ratio: float) -> str:
        """`aim`, `floor` or `MISSED`."""
        sign = -1 if self.is_share else 1
        if sign * ratio >= sign * self.aim:
            return "aim"
        return "floor" if sign * ratio >= sign * self.floor else "MISSED"


GOALS = (
    Goal("inference fp32", 1.3, 1.8),
    Goal("inference bf16", 2.5, 4.0),
    Goal("training fp32", 1.15, 1.6),
    Goal("training bf16", 2.0, 3.0),
    Goal("bytes kept fp32", 0.65, 0.45),
    Goal("bytes kept, checkpoint: block", 0.12, 0.12),
)


@dataclass
class Sides:
    """The networks to compare, with the same weights."""

    plain: nn.Module
    ours: nn.Module
    blocks: nn.Module
    """Ours with `checkpoint: block`."""

    def train(self, mode: bool) -> None:
        """All of them into training or evaluation mode."""
        for network in (self.plain, self.ours, self.blocks):
            network.train(mode)


def sides(arch: str) -> Sides:
    """One group of six blocks; stochastic depth off, so that both sides compute the same."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"depths": (6,), "num_heads": (6,), "drop_path_rate": 0.0}
    ours = build(arch, 2, **options)
    blocks = build(arch, 2, checkpoint="block", **options)
    blocks.load_state_dict(ours.state_dict())
    return Sides(plain_form(ours), ours, blocks)


def example() -> Tensor:
    """(1, 3, H, W), the same in every process."""
    return torch.rand(1, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(1))


def infer(network: nn.Module, x: Tensor, bf16: bool) -> Tensor:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return network(x)


def train_step(network: nn.Module, x: Tensor, bf16: bool) -> Tensor:
    """Forward and backward pass; the gradients of all parameters end in `.grad`."""
    network.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = network(x)
    out.float().square().mean().backward()
    return out.detach()


def multiply_adds(network: nn.Module, x: Tensor) -> float:
    """Of one forward pass of the plain form: convolutions and matrix products alone."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return counter.get_total_flops() / 2


def differences(ours: nn.Module, plain: nn.Module, x: Tensor, bf16: bool = False) -> tuple[float, float]:
    """Of outputs and of gradients, to the plain form in fp32, each relative to the largest entry of its tensor.

    Gradients that are zero but for rounding (a bias that cancels in a softmax) are measured by the largest one of all.
    """
    expected, out = train_step(plain, x, False), train_step(ours, x, bf16)
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    largest = max(grad.abs().max().item() for grad in grads.values())
    worst = 0.0
    for name, parameter in ours.named_parameters():
        size = max(grads[name].abs().max().item(), 1e-4 * largest)
        worst = max(worst, (parameter.grad - grads[name]).abs().max().item() / size)
    return (out - expected).abs().max().item() / expected.abs().max().item(), worst


def check_equal(pair: Sides, x: Tensor) -> bool:
    """Print how far results are from the plain form's; in bf16 the plain form's own distance is the measure."""
    pair.train(True)
    equal = True
    for name, network in (("ours", pair.ours), ("checkpoint: block", pair.blocks)):
        output, gradient = differences(network, pair.plain, x)
        equal &= output <= OUTPUT_TOLERANCE and gradient <= GRADIENT_TOLERANCE
        print(f"  {name}: outputs differ by {output:.1e}, gradients by {gradient:.1e} (relative)")
    ours, plain = (differences(network, pair.plain, x, True) for network in (pair.ours, copy.deepcopy(pair.plain)))
    print(f"  bf16: outputs differ by {ours[0]:.1e} (plain form in bf16 {plain[0]:.1e}), ", end="")
    print(f"gradients by {ours[1]:.1e} ({plain[1]:.1e})")
    return equal and ours[0] <= 2 * plain[0] and ours[1] <= 2 * plain[1]


def side_pass(arch: str, mode: str, side: str, bf16: bool, keep: bool = False) -> Callable[[], object]:
    """A pass of one side, "plain", "ours" or "blocks": forward alone ("inference") or with backward ("training").

    keep: freed memory is kept, as `pipeline.worker` has it.
    """
    torch.set_num_threads(THREADS)
    if keep:
        keep_freed_memory()
    network: nn.Module = getattr(sides(arch), side)
    network.train(mode == "training")
    return partial(train_step if mode == "training" else infer, network, example(), bf16)


def product(dtype: torch.dtype) -> Callable[[], object]:
    """A plain matrix product of PRODUCT_SIDE**3 multiply-adds."""
    torch.set_num_threads(THREADS)
    a, b = (torch.rand(PRODUCT_SIDE, PRODUCT_SIDE, dtype=dtype) for _ in range(2))
    return partial(torch.mm, a, b)


def times(arch: str) -> dict[str, float]:
    """Median seconds of each side, forward alone and forward with backward."""
    measured = {}
    for mode in ("inference", "training"):
        pass_of, keep = partial(side_pass, arch, mode), mode == "training"
        makers: dict[str, Callable[[], Callable[[], object]]] = {
            f"{mode} plain": partial(pass_of, "plain", False),
            f"{mode} fp32": partial(pass_of, "ours", False, keep),
            f"{mode} bf16": partial(pass_of, "ours", True, keep),
            f"{mode} plain bf16": partial(pass_of, "plain", True),
        }
        if mode == "training":
            makers["training blocks fp32"] = partial(pass_of, "blocks", False, keep)
            makers["training blocks bf16"] = partial(pass_of, "blocks", True, keep)
            makers["training plain kept"] = partial(pass_of, "plain", False, keep)
        makers[f"{mode} product fp32"] = partial(product, torch.float32)
        makers[f"{mode} product bf16"] = partial(product, torch.bfloat16)
        measured |= {name: samples.time_s for name, samples in race(makers, ROUNDS, LIMIT_S[mode]).items()}
        print(f"  {mode}, ms:", ", ".join(f"{key} {1000 * measured[key]:.0f}" for key in makers), flush=True)
    return measured


def kept_bytes(pair: Sides, x: Tensor) -> dict[str, int]:
    """What each side keeps for the backward pass."""
    pair.train(True)
    kept = {"plain": saved_bytes(pair.plain, x), "fp32": saved_bytes(pair.ours, x)}
    kept["block"] = saved_bytes(pair.blocks, x)
    with torch.autocast("cpu", torch.bfloat16):
        kept |= {"plain bf16": saved_bytes(pair.plain, x), "bf16": saved_bytes(pair.ours, x)}
    return kept


def report(seconds: dict[str, float], kept: dict[str, int], macs: float) -> bool:
    """Print the table and say whether every floor is held."""
    held = True
    print("\n| | plain fp32 | ours | ratio | floor | aim | |\n|---|---:|---:|---:|---:|---:|---|")
    for goal in GOALS:
        if goal.is_share:
            before, after = kept["plain"] / 2**20, kept["block" if "block" in goal.name else "fp32"] / 2**20
            ratio, unit = after / before, "MiB"
        else:
            before, after = seconds[f"{goal.name.split()[0]} plain"] * 1000, seconds[goal.name] * 1000
            ratio, unit = before / after, "ms"
        verdict = goal.verdict(ratio)
        held &= verdict != "MISSED"
        print(
            f"| {goal.name} | {before:.0f} {unit} | {after:.0f} {unit} | **{ratio:.2f}** | {goal.floor} | {goal.aim} "
            f"| {verdict} |"
        )
    print(f"\nPlain form in bf16: inference {seconds['inference plain bf16'] * 1000:.0f} ms, ", end="")
    print(f"training {seconds['training plain bf16'] * 1000:.0f} ms; ", end="")
    print(f"kept in bf16: plain {kept['plain bf16'] / 2**20:.0f} MiB, ours {kept['bf16'] / 2**20:.0f} MiB")
    print(f"Plain form where freed memory is kept: training {seconds['training plain kept'] * 1000:.0f} ms")
    for dtype in ("fp32", "bf16"):
        price = seconds[f"training blocks {dtype}"] / seconds[f"training {dtype}"]
        print(
            f"checkpoint: block, {dtype}: {seconds[f'training blocks {dtype}'] * 1000:.0f} ms, {price:.2f} x the time"
        )
    print(f"\n{macs / 1e9:.1f} GMAC forward, counted three times for training. GMAC/s:")
    for mode, passes in (("inference", 1), ("training", 3)):
        for dtype in ("fp32", "bf16"):
            reached = passes * macs / seconds[f"{mode} {dtype}"] / 1e9
            limit = PRODUCT_SIDE**3 / seconds[f"{mode} product {dtype}"] / 1e9
            print(f"  {mode} {dtype}: {reached:.0f}; a matrix product {limit:.0f}: {reached / limit:.2f} of it")
    return held


def main(archs: list[str]) -> int:
    torch.set_num_threads(THREADS)
    x = example()
    good = True
    for arch in archs or ["hat", "hmanet"]:
        print(f"\n## {arch}", flush=True)
        pair = sides(arch)
        good &= check_equal(pair, x)
        held = report(times(arch), kept_bytes(pair, x), multiply_adds(pair.plain.eval(), x))
        good &= held or arch != "hat"
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
