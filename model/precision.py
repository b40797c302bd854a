"""What a network computes in: fp32, or bf16 under autocast where the device has it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, get_args

import torch

Precision = Literal["auto", "fp32", "bf16"]

_NATIVE = ("avx512_bf16", "amx_bf16")
"""What an x86 processor has, as `torch.cpu.get_capabilities` calls it, where bf16 is faster than fp32."""
_MASKS_WITHOUT_BF16 = ("AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of ONEDNN_MAX_CPU_ISA that leave oneDNN its operators in bf16, but not the instructions for them."""


@cache
def onednn_has_bf16() -> bool:
    """Whether oneDNN's operators take bf16 on this processor (x86: from AVX-512 on); elsewhere they raise.

    oneDNN is asked, not the processor: ONEDNN_MAX_CPU_ISA may mask some of its features.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16; without it bf16 is emulated, which is much slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    masked = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if masked in _MASKS_WITHOUT_BF16 or not onednn_has_bf16():
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _NATIVE)


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`auto` as fp32 or bf16: bf16 where the device computes in it rather than emulating it.

    `bf16` stays bf16 everywhere (see `emulation_note`). ValueError for another name.
    """
    if wanted not in get_args(Precision):
        raise ValueError(f"precision={wanted!r}: choose one of {', '.join(get_args(Precision))}")
    if wanted != "auto":
        return wanted
    return "bf16" if has_bf16(device) else "fp32"


def emulation_note(wanted: str, device: torch.device) -> str | None:
    """A line to show where bf16 was asked for of a device that only emulates it; None elsewhere."""
    if wanted != "bf16" or has_bf16(device):
        return None
    what = "GPU" if device.type == "cuda" else "processor"
    return f"this {what} has no bf16 arithmetic: precision bf16 is emulated, much slower than fp32 (auto takes fp32)"


def keep_fp32_exact() -> None:
    """From now on fp32 means it in this process, for trainings in fp32; `computing` does so for a while."""
    for place in _places_of_tf32():
        place.allow_tf32 = False


def _places_of_tf32() -> list[Any]:
    return [torch.backends.cudnn, torch.backends.cuda.matmul]


@contextmanager
def computing(wanted: str, device: torch.device) -> Iterator[None]:
    """A context in which a network of fp32 weights computes as wanted (see `resolve_precision`).

    fp32 means it: on GPUs PyTorch would have convolutions round their inputs to TF32, as coarse as fp16.
    """
    bf16 = resolve_precision(wanted, device) == "bf16"
    places = _places_of_tf32()
    before = [place.allow_tf32 for place in places]
    try:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed and bf16
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed
