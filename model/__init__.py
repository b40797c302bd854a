"""Super-resolution networks in plain PyTorch: `build` makes one, `load` reads one from a weights file."""

from model.presets import build
from model.weights import load

__all__ = ["build", "load"]
