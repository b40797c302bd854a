"""What a training process on the CPU asks of its allocator."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and values of glibc's malloc.h
LARGE_BYTES, KEPT_BYTES = 2**28, 2**30


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, up to KEPT_BYTES in a piece; says whether the C library can do that.

    A training step asks for the same hundreds of MiB each time. glibc gives them back to the system and has every page
    zeroed on its return: a tenth of HMANet's step (tests/bench/README.md). Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
