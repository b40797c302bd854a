"""Adam that knows the whole gradient: its norm over all ranks, clipping, and steps it refuses to take.

The loss is watched as well: L1's gradient is a sign, so that of an infinite loss is finite.

DeepSpeed calls `step` with each rank's partition of the averaged gradient (or, at ZeRO 0, with all of it on every
rank), so the norm is the same for every ZeRO stage, and a non-finite one is noticed before any weight changes.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GuardedAdam(torch.optim.Adam):
    """torch.optim.Adam with a global gradient norm, clipping to `max_norm`, and refusal of what is not finite.

    partitioned: each rank holds a part of the gradient (ZeRO 1 to 3) rather than all of it (ZeRO 0).
    device: where the ranks communicate; offloaded gradients lie elsewhere.
    `add_loss` is to be told the loss of every pass of a step. After `step`: `applied` says whether the weights
    changed, `grad_norm` the norm before clipping, `stop_wanted`, `save_wanted` and `settle_wanted` whether any rank had
    wished so at `begin_step`. Losses and wishes travel with the norm, so that all ranks agree at no cost.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        max_norm: float | None,
        partitioned: bool,
        device: torch.device,
        **options: Any,
    ) -> None:
        super().__init__(params, **options)
        self.device = device
        self.max_norm = max_norm
        self.partitioned = partitioned
        self.applied = False
        self.wishes = (False, False, False)
        self.stop_wanted = self.save_wanted = self.settle_wanted = False
        self.grad_norm = float("nan")
        self.loss = torch.zeros((), device=device)

    def begin_step(self, *, want_stop: bool = False, want_save: bool = False, want_settle: bool = False) -> None:
        """Forget the last step: DeepSpeed does not call `step` at all where it finds an overflow itself."""
        self.applied = self.stop_wanted = self.save_wanted = self.settle_wanted = False
        self.wishes, self.grad_norm = (want_stop, want_save, want_settle), math.nan
        self.loss = torch.zeros((), device=self.device)

    def add_loss(self, loss: Tensor) -> None:
        """Note this rank's loss of one pass; no synchronization. `loss` is the step's sum on this rank."""
        self.loss = self.loss + loss.detach()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Collective. Take the step unless a loss, or the gradient's norm over all ranks, is not finite."""
        assert closure is None, "DeepSpeed passes no closure"
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm, loss = self._agree(grads)
        self.applied = math.isfinite(self.grad_norm) and math.isfinite(loss)
        if not self.applied:
            return
        if self.max_norm is not None and self.grad_norm > self.max_norm:
            torch._foreach_mul_(grads, self.max_norm / self.grad_norm)
        super().step()

    def _agree(self, grads: list[Tensor]) -> tuple[float, float]:
        """The norm of the whole gradient and the sum of all losses; tells the other ranks of wishes, hears theirs."""
        norms = torch.stack(torch._foreach_norm(grads)) if grads else torch.zeros(1)
        squared = norms.float().square().sum().to(self.device)
        if not self.partitioned:
            squared = squared / dist.get_world_size()  # every rank holds the same gradient
        wishes = torch.zeros(len(self.wishes), device=self.device)
        for number, wish in enumerate(self.wishes):
            if wish:
                wishes[number].fill_(1)  # a tensor of given values would be copied to a GPU, which waits for it
        shared = torch.cat([torch.stack([squared, self.loss.float()]), wishes])
        dist.all_reduce(shared)
        total, loss, *wished = shared.tolist()
        self.stop_wanted, self.save_wanted, self.settle_wanted = (votes > 0 for votes in wished)
        return math.sqrt(total), loss  # NaN stays NaN, infinity stays infinity
