"""What a network computes in: fp32, or bf16 under autocast where the device has it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch

Precision = Literal["auto", "fp32", "bf16"]


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`auto` as fp32 or bf16: bf16 where the device computes in it rather than emulating it.

    ValueError for another name.
    """
    if wanted not in get_args(Precision):
        raise ValueError(f"precision={wanted!r}: choose one of {', '.join(get_args(Precision))}")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


@contextmanager
def computing(wanted: str, device: torch.device) -> Iterator[None]:
    """A context in which a network of fp32 weights computes as wanted (see `resolve_precision`).

    fp32 means it: on GPUs PyTorch would have convolutions round their inputs to TF32, as coarse as fp16.
    """
    bf16 = resolve_precision(wanted, device) == "bf16"
    places: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [place.allow_tf32 for place in places]
    try:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed and bf16
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed
