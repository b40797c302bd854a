"""The adversarial part of a training: a discriminator that every process holds whole, and its optimizer.

It is small beside the network, so it is not partitioned: gradients are averaged over all processes, and all take the
same step. Losses are weighted by the samples' share of the global batch, as the network's are, so that the number of
processes changes nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from model.discriminator import Discriminator
from pipeline.config import AdversarialConfig


class Adversary:
    """A discriminator in training."""

    def __init__(self, asked: AdversarialConfig, seed: int, device: torch.device, bf16: bool) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same in every process
            self.network = Discriminator(asked.channels)
        self.network.to(device).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=asked.lr, betas=(0.9, 0.99))
        self.asked, self.device, self.bf16 = asked, device, bf16
        self.sums = torch.zeros(3, device=device)
        self.count = 0

    def loss(self, pred_bchw: Tensor) -> Tensor:
        """What the network is to lower: how well its images are told from real ones, times the weight."""
        logits = self._logits(pred_bchw)
        return self.asked.weight * F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))

    def observe(self, pred_bchw: Tensor, target_bchw: Tensor, weight: float) -> None:
        """Add to the discriminator's gradient what it learns from a micro-batch; `weight` as of the network's loss."""
        self.network.requires_grad_(True)
        real, fake = self._logits(target_bchw), self._logits(pred_bchw.detach())
        loss = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
        loss = loss + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
        (loss * weight).backward()
        self.network.requires_grad_(False)
        self.sums += torch.stack([loss.detach(), real.detach().mean(), fake.detach().mean()])
        self.count += 1

    def step(self, passes: int, decay: float, applied: bool) -> None:
        """Collective: one step, unless the network's was refused or the gradient is not finite.

        passes: of every process in this step. decay: of the learning rate, as the network's has decayed.
        """
        parameters = list(self.network.parameters())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        mean = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(mean)
        mean /= passes * dist.get_world_size()
        if applied and bool(mean.isfinite().all()):
            for parameter, grad in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = grad.view_as(parameter)
            for group in self.optimizer.param_groups:
                group["lr"] = self.asked.lr * decay
            self.optimizer.step()
            self.network.follow()
        self.optimizer.zero_grad(set_to_none=True)

    def metrics(self) -> dict[str, float]:
        """Means of this process since the last call: the discriminator's loss, its logits of real and made images."""
        means = (self.sums / max(self.count, 1)).tolist()
        self.sums, self.count = torch.zeros_like(self.sums), 0
        names = ("discriminator_loss", "discriminator_real", "discriminator_fake")
        return dict(zip(names, means, strict=True))

    def state(self) -> dict[str, Any]:
        """Weights and moments, for a checkpoint."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _logits(self, x_bchw: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits: Tensor = self.network(x_bchw)
        return logits.float()
