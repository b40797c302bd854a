"""Layers that keep less for the backward pass, and run where the CPU is fastest.

A layer norm or an activation is cheap to compute and as large as its input. Where its result feeds a matrix
product or a convolution, autograd would keep both. Here the layer is told how to make its input again from a
tensor that is kept anyway (`Remake`), so that only the latter stays in memory. Values are those of the plain
layers. Under `torch.compile` and in exports the plain layers run: the compiler does its own bookkeeping.

Axes in tensor names: b batch, h height, w width, c channels.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.precision import onednn_has_bf16

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether PyTorch was built with the operator that its own compiler uses for linear layers on CPUs."""


Activation = Literal["none", "gelu"]


class Remake(NamedTuple):
    """A layer's input as a function of a tensor that is kept for the backward pass."""

    source: Tensor
    """What is kept."""
    make: Callable[[Tensor], Tensor]
    """Gives the input. Called in the backward pass under the forward pass's autocast; may call modules, so that ZeRO-3
    gathers their weights."""


def in_compute_dtype(x: Tensor) -> Tensor:
    """x in what its products are computed in: autocast's dtype where that is on, else its own."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def is_traced() -> bool:
    """Whether torch.compile or an export is looking: then only plain operations may be used."""
    return torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


class Linear(nn.Linear):
    """`nn.Linear` whose `forward` may be told how to remake its input."""

    def forward(self, x: Tensor, remake: Remake | None = None, activation: Activation = "none") -> Tensor:
        """(..., C) -> (..., C'); `activation` of the result, free of charge where no gradient is asked for."""
        if is_traced() or self.bias is None:
            return gelu(super().forward(x)) if activation == "gelu" else super().forward(x)
        x = in_compute_dtype(x)
        if not torch.is_grad_enabled():
            return multiply(x, self.weight.to(x.dtype), self.bias.to(x.dtype), activation)
        out = _Linear.apply(x, self.weight, self.bias, *(remake or (None, None)))
        return gelu(out) if activation == "gelu" else out


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, stride 1, whose `forward` may be told how to remake its input."""

    def forward(self, x_bchw: Tensor, remake: Remake | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        if is_traced() or self.bias is None or not torch.is_grad_enabled():
            return super().forward(x_bchw)
        return _Convolution.apply(
            in_compute_dtype(x_bchw), self.weight, self.bias, self.padding, *(remake or (None, None))
        )


def add(x: Tensor, *branches: Tensor) -> Tensor:
    """The sum in the dtype of x; branches of another dtype are not cast first, which would take fresh memory."""
    first, *others = branches
    x = x + first
    for branch in others:
        x += branch  # of a sum nothing is kept for the backward pass
    return x


def gelu(x: Tensor, remake: Remake | None = None) -> Tensor:
    """GELU (exact, by the error function). `remake` gives x away: without gradients it is overwritten."""
    if remake is None or is_traced():
        return F.gelu(x)
    return _Gelu.apply(x, *remake) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


def scale(x: Tensor, gate: Tensor, remake: Remake | None = None) -> Tensor:
    """x * gate, the latter of size 1 along some axes. `remake` as in `gelu`."""
    if remake is None or is_traced():
        return x * gate
    return _Scale.apply(x, gate, *remake) if torch.is_grad_enabled() else x.mul_(gate)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    """x @ weight.T + bias, then "gelu" or "none".

    On the CPU by oneDNN, where it takes the type: it is up to 1.5 times as fast as BLAS at these sizes
    (tests/bench/README.md) and applies the activation while the result is in the cache.
    """
    if x.device.type == "cpu" and _onednn_takes(x.dtype):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    out = F.linear(x, weight, bias)
    return F.gelu(out) if activation == "gelu" else out


def _onednn_takes(dtype: torch.dtype) -> bool:
    return HAS_ONEDNN and (dtype == torch.float32 or (dtype == torch.bfloat16 and onednn_has_bf16()))


def _note(ctx: Any, x: Tensor, make: Callable[[Tensor], Tensor] | None) -> None:
    """What `_made` needs to make x again."""
    ctx.make, ctx.dtype = make, x.dtype
    ctx.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)


def _made(ctx: Any, kept: Tensor) -> Tensor:
    if ctx.make is None:
        return kept
    enabled, dtype = ctx.autocast
    with torch.autocast(kept.device.type, dtype, enabled=enabled):  # off in a backward pass; CUDA's layer norm needs it
        return ctx.make(kept).to(ctx.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, source: Tensor | None, make: Any) -> Tensor:
        _note(ctx, x, make)
        ctx.save_for_backward(x if source is None else source, weight)
        return multiply(x, weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = multiply(grad, weight.to(ctx.dtype).t()) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            # The transposed product, transposed: BLAS is faster at it.
            grad_weight = (_made(ctx, kept).reshape(len(rows), -1).t() @ rows).t().to(weight.dtype)
        if ctx.needs_input_grad[2]:
            # A product with ones: `sum` of the first axis takes three times as long.
            grad_bias = (rows.new_ones(1, len(rows)) @ rows)[0].to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int], source: Tensor | None, make: Any
    ) -> Tensor:
        _note(ctx, x, make)
        ctx.padding = padding
        ctx.save_for_backward(x if source is None else source, weight)
        return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            _made(ctx, kept),
            weight.to(ctx.dtype),
            [len(weight)],
            [1, 1],
            ctx.padding,
            [1, 1],
            False,
            [0, 0],
            1,
            ctx.needs_input_grad[:3],
        )
        grads = (None if grad is None else grad.to(weight.dtype) for grad in (grad_weight, grad_bias))
        return grad_x, *grads, None, None, None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, make: Any) -> Tensor:
        _note(ctx, x, make)
        ctx.save_for_backward(source)
        return F.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.aten.gelu_backward(grad, _made(ctx, *ctx.saved_tensors)), None, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, source: Tensor, make: Any) -> Tensor:
        _note(ctx, x, make)
        ctx.save_for_backward(gate, source)
        return x * gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, source = ctx.saved_tensors
        grad_gate = (grad * _made(ctx, source)).sum_to_size(gate.shape)
        return grad * gate, grad_gate, None, None
