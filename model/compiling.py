"""`torch.compile`, which is refused in one line where it cannot work."""

from torch import nn


def compile_in_place(network: nn.Module) -> None:
    """Have a network compiled at its first pass of each size; the names of its weights stay as they are.

    ValueError where there is no C++ compiler, without which that pass would end in a traceback.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # a second of imports, for whoever compiles

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ValueError(
            "torch.compile needs a C++ compiler, and there is none: install g++, name one by CXX, "
            "or go without compute.compile (--compile)"
        ) from error
    network.compile(dynamic=False)
