"""Where a network's time goes, by kind of operation: `python -m tests.bench.network_profile [hat|hmanet] ...`.

The same network and size as `tests.bench.networks`, ours alone, inference and training in fp32 and bf16.
"""

import sys
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from tests.bench.networks import SIZE_PX, THREADS, infer, sides, train_step

ROUNDS = 5
KINDS = {
    "convolutions": ("convolution", "conv2d"),
    "linear layers": ("linear", "aten::mm", "addmm"),
    "attention: products": ("bmm",),
    "attention: softmax": ("softmax",),
    "attention: our code between": ("windowattention",),
    "layer norms": ("layer_norm",),
    "GELU": ("gelu",),
    "copies, casts, rolls": ("copy_", "cat", "clone", "roll"),
    "sums and products of features": ("add", "mul", "sum", "mean", "div"),
}
"""Kind -> parts of operator names, tried in this order."""


def kind_of(operator: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in operator.lower() for part in parts):
            return kind
    return "the rest (views, allocations, Python)"


def main(archs: list[str]) -> None:
    torch.set_num_threads(THREADS)
    x = torch.rand(1, 3, SIZE_PX, SIZE_PX)
    for arch in archs or ["hat", "hmanet"]:
        network = sides(arch).ours
        for step, bf16 in ((infer, False), (infer, True), (train_step, False), (train_step, True)):
            network.train(step is train_step)
            step(network, x, bf16)
            with profile(activities=[ProfilerActivity.CPU]) as record:
                for _ in range(ROUNDS):
                    step(network, x, bf16)
            times: Counter[str] = Counter()
            for event in record.key_averages():
                times[kind_of(event.key)] += event.self_cpu_time_total / ROUNDS / 1000
            print(f"\n{arch}, {step.__name__}, {'bf16' if bf16 else 'fp32'}: {times.total():.0f} ms")
            for kind, time_ms in times.most_common():
                print(f"  {time_ms:7.1f} ms {time_ms / times.total():5.0%}  {kind}")


if __name__ == "__main__":
    main(sys.argv[1:])
