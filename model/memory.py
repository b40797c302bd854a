"""How much memory an image takes on its way through a network, how much there is, and whether it ran out.

Linux kills a process that takes too much rather than refusing it memory, so on CPUs it is reckoned before; on GPUs too,
so that not every image begins with a failure. Sizes are in low-resolution px unless they say otherwise.
"""

import math
import re

import torch

from model.blocks import NUM_FEAT, UpscalingNetwork
from model.limits import free_memory_bytes
from model.precision import has_bf16, resolve_precision

BODY_TENSORS = {"hat": 13, "hmanet": 40, "hat_unet": 20}
"""How many tensors of embed_dim channels exist at once. Measured on CPUs in fp32 at x2, where the body weighs most: HAT
8.6 to 9.2 kB a pixel; HMANet 17.9 kB at 224 px, growing with the size, since its grids do: hence 40; the U of 48
channels 3.5 kB at 512 px."""
HEAD_TENSORS = 3
"""How many tensors of NUM_FEAT channels in high resolution exist at once. Measured for HAT at x4, where the head weighs
most: 11.8 to 12.7 kB a pixel."""
FP32_BODY_TENSORS, FP32_HEAD_TENSORS = 3, 1
"""How many of those stay fp32 in bf16: the trunk, its input and a norm's output; the last convolution's input. The
others take half. Counted in the code, not measured."""
FLOAT_IMAGES, FLOAT_IMAGES_ENSEMBLE, FLOAT_INPUTS = 1.5, 3.5, 4
"""How many float RGB images of the result's size exist at once, and of the input's. Measured beside the pixels: at x4
1.1 (gray and alpha, which are averaged, 1.4), with ensemble 3.3; at x1, where inputs count, 2.8 to 3.7, with ensemble
5.8 to 7.7."""
MEMORY_SHARE = 0.6
"""Of the memory that the result leaves free, for the network: allocators fragment, and other work goes on."""

_PLENTY = 1 << 62

_WORDS = re.compile(
    r"(?m)"
    + "|".join(
        (
            *(r"DefaultCPUAllocator", r"[Cc]an(no|')t allocate memory", r"std::bad_alloc"),
            # oneDNN names no reason where it has no room for a kernel; "... a primitive descriptor for" is another
            # error: the processor lacks what was asked for
            r"could not create a primitive\s*$",
            r"CUDA error: out of memory",
            r"(CUBLAS|CUDNN|CUSOLVER)_STATUS_ALLOC_FAILED",
            r"unable to find an engine to execute",  # cuDNN's, where no algorithm's workspace fits
        )
    )
)
"""What errors say that have no type of their own for it."""
_ELSEWHERE = re.compile(r"static TLS block")
"""What is said of too little room of another kind."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or the CPU: by its type, else by its words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return bool(_WORDS.search(str(error))) and not _ELSEWHERE.search(str(error))


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take on a device; of a GPU, with what PyTorch holds of it and does not use."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    return free_memory_bytes() if device.type == "cpu" else _PLENTY


def bytes_per_px(network: UpscalingNetwork, precision: str = "fp32") -> int:
    """What a pixel of an image takes in the network (see `BODY_TENSORS`)."""
    weight = network.conv_first.weight
    full = half = weight.element_size()
    # emulated, products are computed in fp32 all the same
    if full == 4 and resolve_precision(precision, weight.device) == "bf16" and has_bf16(weight.device):
        half = 2
    tensors = BODY_TENSORS[network.arch]
    body = network.config["embed_dim"] * (FP32_BODY_TENSORS * full + (tensors - FP32_BODY_TENSORS) * half)
    features = FP32_HEAD_TENSORS * full + (HEAD_TENSORS - FP32_HEAD_TENSORS) * half
    return int(max(body, NUM_FEAT * network.scale**2 * features))


def output_bytes(scale: int, shape: tuple[int, ...], ensemble: bool, pixel_bytes: int = 1) -> int:
    """What an image (H, W, C) and its result take at their peak: RGB floats, and C channels of so many bytes."""
    height, width, channels = shape
    floats = (FLOAT_IMAGES_ENSEMBLE if ensemble else FLOAT_IMAGES) * scale**2 + FLOAT_INPUTS
    return int((floats * 4 * 3 + channels * pixel_bytes * scale**2) * height * width)


def fitting_tile(
    network: UpscalingNetwork,
    size: tuple[int, ...],
    overlap: int,
    free_bytes: int,
    result_bytes: int = 0,
    *,
    batch: int = 1,
    precision: str = "fp32",
    share: float = MEMORY_SHARE,
) -> int | None:
    """None where a whole image is likely to fit the memory beside its result, else the side of tiles that are, px.

    size: (H, W), or (B, H, W) for B images together; batch: tiles at once; share: of what the result leaves free.
    MemoryError where not even the smallest useful tiles fit.
    """
    per_px, left_bytes = bytes_per_px(network, precision), free_bytes - result_bytes
    images, area = math.prod(size[:-2]), math.prod(size[-2:])
    px = left_bytes * share / per_px / images
    if area <= px:
        return None
    smallest = smallest_tile(overlap, network.multiple)
    needed_bytes = min(batch * smallest**2, area) * images * per_px
    if needed_bytes > left_bytes:
        at_once = f", {batch} at once," if batch > 1 else ""
        raise MemoryError(
            f"the result takes {result_bytes / 1e9:.3g} GB of memory and tiles of {smallest} px{at_once} take "
            f"{needed_bytes / 1e9:.3g} GB, where {free_bytes / 1e9:.3g} GB are free: free some, "
            "cut the image into parts, or say --tile and --tile-overlap yourself"
        )
    side = int(max(px / batch, 0) ** 0.5) // network.multiple * network.multiple
    return max(side, smallest)


def smallest_tile(overlap: int, window: int) -> int:
    """Side of the smallest useful tile: below twice the overlap every pixel is computed more than 4 times."""
    return max(2 * overlap, window)
