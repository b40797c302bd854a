"""How busy a node is, under MLflow's names for system metrics, so that its UI shows them on their own tab."""

import os
import time

import psutil
import torch


class SystemWatch:
    """Usage of this node since the last look. One process of each node looks."""

    def __init__(self, node: int) -> None:
        self.node = node
        self.seen_at = time.monotonic()
        self.network = psutil.net_io_counters()
        psutil.cpu_percent()  # the first call only begins the measurement

    def look(self) -> dict[str, float]:
        """`system/node0/cpu_utilization_percentage` and so on."""
        now, network = time.monotonic(), psutil.net_io_counters()
        elapsed_s, memory = max(now - self.seen_at, 1e-3), psutil.virtual_memory()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": psutil.disk_usage(os.sep).percent,
            "network_receive_megabytes_per_s": (network.bytes_recv - self.network.bytes_recv) / 1e6 / elapsed_s,
            "network_transmit_megabytes_per_s": (network.bytes_sent - self.network.bytes_sent) / 1e6 / elapsed_s,
        }
        self.seen_at, self.network = now, network
        return {f"system/node{self.node}/{name}": value for name, value in (found | _gpus()).items()}


def _gpus() -> dict[str, float]:
    """Of every GPU that this process sees; nothing where there is none, or no NVIDIA management library."""
    found = {}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found[f"gpu_{index}_memory_usage_percentage"] = 100 * (1 - free / total)
        try:
            found[f"gpu_{index}_utilization_percentage"] = float(torch.cuda.utilization(index))
        except (RuntimeError, ModuleNotFoundError):
            continue
    return found
