"""Where networks work: the processors, or GPUs, that a person names or the machine has."""

import re

import torch


def choose(wanted: str = "auto") -> list[torch.device]:
    """The devices of `cpu`, `cuda` (all GPUs), `cuda:1`, several by commas, or `auto`: all GPUs, else the CPU.

    ValueError for another name, and for a GPU that is not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return [device for name in wanted.split(",") for device in _named(name.strip())]


def _named(name: str) -> list[torch.device]:
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"--device {name}: choose auto, cpu, cuda (all GPUs), cuda:0 ..., or several by commas")
    if name == "cpu":
        return [torch.device("cpu")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        built = "is built for CPUs" if torch.version.cuda is None else "finds no GPU with a driver that fits"
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} {built}; choose cpu")
    if match[1] is None:
        return [torch.device("cuda", number) for number in range(count)]
    if int(match[1]) >= count:
        there = ", ".join(f"cuda:{number}" for number in range(count))
        raise ValueError(f"--device {name}: there is no such GPU; choose among {there}, cpu")
    return [torch.device(name)]
