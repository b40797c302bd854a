"""DeepSpeed without MLflow and without a warning at every step.

Its autotuner, which nothing here uses, imports MLflow, 0.7 s of every worker's start. ZeRO 2 and 3 call functions that
torch calls deprecated, which every rank would print each time.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Importing `name` fails inside, as if it were not installed."""
    known = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if known is not None:
            sys.modules[name] = known


with _hidden("mlflow"):
    import deepspeed
    from deepspeed import ops, utils
    from deepspeed.comm import comm

warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

__all__ = ["comm", "deepspeed", "ops", "utils"]
