"""Networks for other runtimes: ONNX, and `torch.export` programs, for images of any height and width.

Both take RGB images (B, 3, H, W), float32 in 0..1, and give (B, 3, scale H, scale W), not clipped. Padding by
reflection and cropping are part of the graph, so that sizes need not be multiples of the window. ONNX takes any
size; a `torch.export` program sides of more than one window, since PyTorch treats a length of 1 as a case of its
own. Any number of images of one size is taken at once. Needs the extra `export` for ONNX.

Axes in tensor names: b batch, c channels, h height, w width.
"""

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from model.blocks import UpscalingNetwork
from model.files import write_atomically
from model.inference import upscale_tensor

Steps = Callable[[int, int, str], None]
"""Called before each step of an export: its number, how many there are, what is done."""
AXES = {0: "batch", 2: "height", 3: "width"}
"""Axes of the input that are free; ONNX files call them so."""
COMPARED = ((1, (2.0, 3.0)), (2, (3.625, 1.125)), (1, (0.5, 1.875)))
"""Batches, and sides in windows, at which an ONNX file is compared with its network."""
LARGEST_PX = 1 << 16
"""Upper bound of a side that the program is told of."""
TOLERANCE = 1e-4
"""Largest difference that `export_onnx` lets pass, of a range of 1."""


class Padded(nn.Module):
    """A network that takes any size: reflects at the right and the bottom, upscales, crops."""

    def __init__(self, network: UpscalingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, low_res: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, scale H, scale W)."""
        height, width = low_res.shape[2:]
        padded = low_res[:, :, _reflected(height, self.network.multiple)]
        padded = padded[:, :, :, _reflected(width, self.network.multiple)]
        out = self.network(padded)
        # By index, not by a slice: whether a slice is the whole would be asked while sizes are symbols.
        out = out[:, :, torch.arange(height * self.network.scale)]
        return out[:, :, :, torch.arange(width * self.network.scale)]


def _reflected(length: int, multiple: int) -> Tensor:
    """Indices 0 .. length - 1 and on by reflection, as often as it takes, to the next multiple."""
    position = torch.arange((length + multiple - 1) // multiple * multiple)
    period = torch.full((1,), 2 * length - 2).clamp(min=1)
    position = torch.remainder(position, period)
    return torch.minimum(position, (period - position).clamp(max=length - 1)).clamp(min=0)


def _on_cpu(network: UpscalingNetwork) -> UpscalingNetwork:
    """A copy in fp32."""
    return copy.deepcopy(network).cpu().float()


def _silent(number: int, count: int, what: str) -> None:
    """Steps that nobody looks at."""


def export_program(network: UpscalingNetwork) -> ExportedProgram:
    """A `torch.export` program on the CPU; sides of more than one window, in any combination, any batch."""
    module = Padded(_on_cpu(network)).eval()
    window = network.multiple
    example = torch.zeros(2, 3, 3 * window + 1, 2 * window + 3)  # a batch of 1 would be taken for fixed
    least = {"batch": 1, "height": window + 1, "width": window + 1}
    free = {axis: Dim(name, min=least[name], max=None if axis == 0 else LARGEST_PX) for axis, name in AXES.items()}
    # Deferred: guards that hold for every size but which the solver cannot prove become checks at run time.
    with torch.no_grad(), _quiet():
        return torch.export.export(
            module, (example,), dynamic_shapes=(free,), prefer_deferred_runtime_asserts_over_guards=True
        )


def save_program(path: str | Path, network: UpscalingNetwork, begin: Steps = _silent) -> None:
    """Write a `.pt2` file: `torch.export.load(path).module()` upscales; the file appears only when complete."""
    begin(1, 2, f"tracing {network.arch} x{network.scale}")
    program = export_program(network)
    begin(2, 2, "writing")
    about = {"hatchery.json": json.dumps(network.config)}
    write_atomically(Path(path), lambda part: torch.export.save(program, part, extra_files=about))


def export_onnx(path: str | Path, network: UpscalingNetwork, begin: Steps = _silent) -> float:
    """Write an `.onnx` file with input `low_res` and output `high_res`, and its config as metadata.

    The input's axes are called as in `AXES`. Returns the largest difference between onnxruntime and PyTorch over
    several sizes. The file appears only when it is at most `TOLERANCE`; ValueError where it is not, or where the extra
    `export` is not installed.
    """
    require_onnx()
    begin(1, 3, f"tracing {network.arch} x{network.scale}")
    program = export_program(network)
    begin(2, 3, "translating it to ONNX")
    with _quiet():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["low_res"],
            output_names=["high_res"],
            dynamic_shapes=(AXES,),
        )
    assert onnx_program is not None
    onnx_program.model.metadata_props["hatchery"] = json.dumps(network.config)
    difference = 0.0

    def write(part: Path) -> None:
        nonlocal difference
        onnx_program.save(part)
        begin(3, 3, "comparing it with PyTorch in onnxruntime")
        difference = onnx_difference(part, network)
        if difference > TOLERANCE:
            raise ValueError(f"the ONNX graph differs from the network by {difference:.1e} of the range: not written")

    write_atomically(Path(path), write)
    return difference


def require_onnx() -> None:
    """ValueError where the extra `export` is not installed."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        missing = f"ONNX needs more packages ({error.name} is missing)"
        raise ValueError(f"{missing}: pip install 'hatchery[export]'") from error


def onnx_difference(path: str | Path, network: UpscalingNetwork) -> float:
    """Largest difference between an ONNX file in onnxruntime and the network, over small and odd sizes and batches.

    Both in fp32 on the CPU, as the graph was made, wherever and in whatever the network computes.
    """
    import onnxruntime

    network = _on_cpu(network)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    window = network.multiple
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch, sides in COMPARED:
        low_res = torch.rand(batch, 3, *(int(side * window) for side in sides), generator=generator)
        (high_res,) = session.run(None, {"low_res": low_res.numpy()})
        worst = max(worst, float(np.abs(high_res - upscale_tensor(network, low_res).numpy()).max()))
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages and calls of its own."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
