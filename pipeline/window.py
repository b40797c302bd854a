"""What a training measures between two logs: loss, parts of a step's time, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
import torch.distributed as dist
from torch import Tensor


class Window:
    """Loss and times since the last log. Losses stay on the device until then: no synchronization per step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self.losses: list[Tensor] = []
        self.times_s = dict.fromkeys(("data_wait_s", "forward_s", "backward_s", "optimizer_s"), 0.0)
        self.marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.begin = time.perf_counter()
        self.forget_memory()

    def forget_memory(self) -> None:
        """What was held until now (by trials of micro-batches, by a validation) is no part of the next figure."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the time inside to a part of the step; on a GPU by marks in its queue, so that nothing waits for it."""
        if self.device.type == "cuda" and name != "data_wait_s":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
            self.marks.append((name, before, after))
            return
        begin = time.perf_counter()
        yield
        self.times_s[name] += time.perf_counter() - begin

    def add(self, loss: Tensor) -> None:
        """Note the loss of one micro-batch."""
        self.losses.append(loss.detach())

    def close(self, global_batch: int) -> dict[str, float]:
        """Collective: means over the window's steps (loss over all ranks, times of this rank in s); start anew."""
        loss = torch.stack(self.losses).mean()
        dist.all_reduce(loss)
        mean_loss = float(loss) / dist.get_world_size()  # waits for the device
        elapsed_s, steps = time.perf_counter() - self.begin, self.steps
        metrics = {
            "loss": mean_loss,
            "images_per_s": steps * global_batch / elapsed_s,
            "step_time_s": elapsed_s / steps,
        }
        if self.marks:
            torch.cuda.synchronize(self.device)
        for name, before, after in self.marks:
            self.times_s[name] += before.elapsed_time(after) / 1e3
        metrics |= {name: total / steps for name, total in self.times_s.items()}
        metrics["memory_gb"] = psutil.Process().memory_info().rss / 1e9
        if self.device.type == "cuda":
            metrics["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self._reset()
        return metrics
