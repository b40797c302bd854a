"""`hatchery export`: a network for other runtimes, from a weights file or a registered model."""

from pathlib import Path

from rich.console import Console

from model.export import export_onnx, require_onnx, save_program
from pipeline.progress import Display
from pipeline.upscale import Source, open_network
from pipeline.upscale_files import refuse_below_a_file


def export(source: Source, target: str, console: Console) -> str:
    """Write a network as `.onnx` or `.pt2`; returns what was written. ValueError for another ending.

    Says on the console what is being done, and how long it took.
    """
    path = Path(target)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{target}: choose an ending among .onnx, .pt2")
    refuse_below_a_file(path)
    if path.suffix == ".onnx":
        require_onnx()
    network, name = open_network(source)
    with Display(console) as display:

        def begin(number: int, count: int, what: str) -> None:
            if number > 1:
                display.end_stage("")
            display.begin_stage(number, count, path.name, what)

        if path.suffix == ".onnx":
            difference = export_onnx(path, network, begin)
            checked = f"differs from PyTorch by at most {difference:.1e} in onnxruntime, of a range of 1"
        else:
            save_program(path, network, begin)
            checked = f"for sides of more than {network.multiple} px"
        display.end_stage("")
    return f"{target}: {name}, {network.arch} x{network.scale}, {checked}"
