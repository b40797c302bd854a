"""numba's compiler for the loops over pixels and bits: compiled on first use, kept for later processes."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba import config

from data_prep.private_folder import private_folder

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """`function` without Python's lock while it runs.

    numba keeps the machine code beside the source, else in the user's cache folder. Where neither can be written
    (another user's read-only code, no home) it is kept in a temporary folder of this user, and where there is none
    either, every process compiles for itself.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no place for its files
        pass
    usual = config.CACHE_DIR
    try:
        config.CACHE_DIR = private_folder("hatchery-numba")  # asked for now, and never again for this function
        return numba.njit(nogil=True, cache=True)(function)
    except (RuntimeError, OSError):
        return numba.njit(nogil=True)(function)
    finally:
        config.CACHE_DIR = usual
