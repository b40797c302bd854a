"""How busy a node is, under MLflow's names for system metrics, so that its UI shows them on their own tab."""

import math
import os
import time
from typing import Any

import psutil
import pynvml

EVERY_S = 60
"""Time between two looks: what a training of weeks keeps of them grows with its hours, not with its steps."""


class SystemWatch:
    """Usage of this node since the last look. One process of each node looks."""

    def __init__(self, node: int, every_s: float = EVERY_S) -> None:
        self.node = node
        self.every_s = every_s
        self.gpus = _visible_gpus()
        self.due_at = -math.inf
        self.seen_at = time.monotonic()
        self.network = psutil.net_io_counters()
        psutil.cpu_percent()  # the first call only begins the measurement

    def look(self) -> dict[str, float]:
        """`system/node0/cpu_utilization_percentage` and so on; nothing until `every_s` after the last look."""
        now = time.monotonic()
        if now < self.due_at:
            return {}
        network = psutil.net_io_counters()
        elapsed_s, memory = max(now - self.seen_at, 1e-3), psutil.virtual_memory()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": psutil.disk_usage(os.sep).percent,
            "network_receive_megabytes_per_s": (network.bytes_recv - self.network.bytes_recv) / 1e6 / elapsed_s,
            "network_transmit_megabytes_per_s": (network.bytes_sent - self.network.bytes_sent) / 1e6 / elapsed_s,
        }
        for index, gpu in enumerate(self.gpus):
            found |= {f"gpu_{index}_{name}": value for name, value in _usage(gpu).items()}
        self.seen_at, self.network, self.due_at = now, network, now + self.every_s
        return {f"system/node{self.node}/{name}": value for name, value in found.items()}


def _visible_gpus() -> list[Any]:
    """Handles of the GPUs that this process may use, by NVIDIA's management library, which takes none of their memory.

    None where there is no driver.
    """
    try:
        pynvml.nvmlInit()
        names = os.environ.get("CUDA_VISIBLE_DEVICES")
        if names is None:
            names = ",".join(map(str, range(pynvml.nvmlDeviceGetCount())))
        return [_handle(name.strip()) for name in names.split(",") if name.strip() not in ("", "-1")]
    except pynvml.NVMLError:
        return []


def _handle(name: str) -> Any:
    """Of a GPU by its number, or by its UUID (also of a part, MIG-...)."""
    by_number = pynvml.nvmlDeviceGetHandleByIndex
    return by_number(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)


def _usage(gpu: Any) -> dict[str, float]:
    """What the GPU tells: a part of one has no utilization of its own, one that was lost tells nothing."""
    found = {}
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        found["memory_usage_percentage"] = 100 * memory.used / memory.total
        found["utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
    except pynvml.NVMLError:
        pass
    return found
