"""A GPU that is not there: tensors on "cuda" with shapes, dtypes and devices, but without values.

What the code does on GPUs runs on any machine: an operation that mixes devices fails, and so does whatever asks a
tensor for its values. Kernels do not run, so that what one of them refuses is not found.

PyTorch's `FakeTensorMode` does the work. Where PyTorch is built for CPUs it lacks two things: a guard of the device
(`_guarded`), and threads of the autograd engine for the device, which is why `backward` walks the graph itself.
"""

import ctypes
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

ROOMS = ("data_prep", "model", "pipeline")
CUDA, META, DEVICE_TYPES = 1, 14, 22
"""Of c10::DeviceType."""


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Inside, tensors are fake, and those on "cuda" are as if there were a GPU that has bf16."""
    with ExitStack() as stack:
        stack.enter_context(_guarded())
        stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda including_emulation=True: True))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


@contextmanager
def _guarded() -> Iterator[None]:
    """The guard that does nothing, as of the meta device, for CUDA: there is none in a PyTorch built for CPUs."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * DEVICE_TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    assert guards[META], "PyTorch has moved its device types"
    before = guards[CUDA]
    guards[CUDA] = before or guards[META]
    try:
        yield
    finally:
        guards[CUDA] = before


def to_fake_cuda(network: nn.Module) -> nn.Module:
    """A network of real tensors with fake ones in their place; inside `fake_cuda`."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                placed = torch.empty_like(parameter, device="cuda")
                module._parameters[name] = nn.Parameter(placed, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cuda")
    return network


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """As `loss.backward()`; AssertionError for a gradient on another device than what it is of."""
    assert loss.grad_fn is not None
    given: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    given[loss.grad_fn][0] = torch.ones_like(loss)
    with patch("torch._C._current_graph_task_id", lambda: 0):  # by which a checkpoint knows that it was recomputed
        for node in _order(loss.grad_fn):
            grads = given.pop(node, {})
            if node.name() == "torch::autograd::AccumulateGrad":
                if grads:
                    known = node.variable.grad
                    node.variable.grad = grads[0] if known is None else known + grads[0]
                continue
            for grad, (following, number) in _call(node, grads) if grads else ():
                grad = _fitting(grad, following._input_metadata[number], node)
                known = given[following].get(number)
                given[following][number] = grad if known is None else known + grad


def _order(root: Any) -> list[Any]:
    """All nodes of a graph, each before those that its gradients go to."""
    order: list[Any] = []
    seen, stack = set(), [(root, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return order[::-1]


def _call(node: Any, grads: dict[int, Tensor]) -> list[tuple[Tensor, tuple[Any, int]]]:
    """The gradients that a node makes, each with the node and the number of the input that it is for."""
    metadata = node._input_metadata
    if isinstance(node, BackwardCFunction):
        zeros = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) for m in metadata]
        made = node.apply(*(grads.get(number, zero) for number, zero in enumerate(zeros)))
        made = made if isinstance(made, tuple) else (made,)
        made = [grad for grad, is_needed in zip(made, node.needs_input_grad, strict=True) if is_needed]
        targets = [target for target in node.next_functions if target[0] is not None]
    else:
        made = node(*(grads.get(number) for number in range(len(metadata))))
        made = made if isinstance(made, tuple) else (made,)
        targets = node.next_functions
    pairs = zip(made, targets, strict=True)
    return [(grad, target) for grad, target in pairs if grad is not None and target[0] is not None]


def _fitting(grad: Tensor, of: Any, node: Any) -> Tensor:
    """A gradient in the shape and dtype of what it is of, as autograd makes it."""
    assert grad.device == of.device, f"{node.name()} gives a gradient on {grad.device} for a tensor on {of.device}"
    return grad.sum_to_size(of.shape).to(of.dtype)


@contextmanager
def mixed_types(network: nn.Module) -> Iterator[list[str]]:
    """Names of layers that get another floating dtype than their weights have, where no autocast takes care of it.

    CUDA's kernels refuse that; those of the CPU, and fake ones, do not.
    """
    found: list[str] = []

    def look(name: str, weight: Tensor, x: Tensor) -> None:
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            found.append(f"{name}: {x.dtype} beside {weight.dtype}")

    with ExitStack() as stack:
        for name, module in network.named_modules():
            if isinstance(getattr(module, "weight", None), Tensor):

                def hook(layer: Any, inputs: tuple[Any, ...], name: str = name) -> None:
                    look(name, layer.weight, inputs[0])

                stack.callback(module.register_forward_pre_hook(hook).remove)
        yield found


@contextmanager
def operations() -> Iterator[list[tuple[str, list[Tensor]]]]:
    """(name, tensors it was given) of every operation inside, as it reaches the device."""
    done: list[tuple[str, list[Tensor]]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            done.append((str(func), [arg for arg in args if isinstance(arg, Tensor)]))
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield done


@contextmanager
def waits() -> Iterator[list[str]]:
    """What inside makes the processor wait for the GPU, each with the line that does it: values that are asked for (all
    are 1), and copies that are blocking or between memory that is not pinned.
    """
    found: list[str] = []
    pinned = WeakIdKeyDictionary()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            options = kwargs or {}
            if func is torch.ops.aten._local_scalar_dense.default:
                if args[0].device.type == "cuda":
                    found.append(_where("a value"))
                return args[0].dtype == torch.bool or 1.0
            out = func(*args, **options)
            is_moved = func is torch.ops.aten._to_copy.default and out.device != args[0].device
            if is_moved and not (options.get("non_blocking") and args[0] in pinned):
                found.append(_where("a copy"))
            return out

    def pin_memory(self: Tensor) -> Tensor:
        copy = self.clone()
        pinned[copy] = True
        return copy

    def tolist(self: Tensor) -> list[float]:
        if self.device.type == "cuda":
            found.append(_where("values"))
        return [1.0] * len(self)

    patches = (patch.object(FakeTensor, "tolist", tolist), patch.object(FakeTensor, "pin_memory", pin_memory))
    with patches[0], patches[1], Watch():
        yield found


def _where(what: str) -> str:
    """The innermost line of this project's code."""
    frames = [frame for frame in traceback.extract_stack() if any(f"/{room}/" in frame.filename for room in ROOMS)]
    last = [frame for frame in frames if "/site-packages/" not in frame.filename][-1]
    return f"{what}: {Path(last.filename).name}:{last.lineno} {last.line}"
