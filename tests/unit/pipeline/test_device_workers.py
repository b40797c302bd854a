"""Several devices share the work: real processes, on CPUs."""

import os
import signal
import time
from contextlib import closing
from itertools import islice

import torch
from torch import nn

from model.files import WriteError
from pipeline.device_workers import WorkerEndedError, in_order


def work(network: nn.Module, job: int) -> tuple[int, float]:
    """Its process, and the job's product with the weight; some jobs end badly."""
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if job == 4:
        raise WriteError("a.png cannot be written", 28)
    time.sleep(0.2 if job % 2 else 0.0)
    return os.getpid(), float(network(torch.tensor([float(job)])))


def test_results_come_in_order_and_a_dead_process_costs_one_job() -> None:
    network = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(2.0)
    cpu = torch.device("cpu")
    with closing(in_order(range(100), [cpu, cpu], network, work)) as results:
        found = list(islice(results, 10))
    assert [job for job, _, _ in found] == list(range(10))
    assert {device for _, _, device in found} == {cpu}
    good = {job: result for job, result, _ in found if not isinstance(result, Exception)}
    assert {job: product for job, (_, product) in good.items()} == {
        job: 2.0 * job for job in range(10) if job not in (3, 4)
    }
    killed, refused = found[3][1], found[4][1]
    assert isinstance(killed, WorkerEndedError)
    assert str(killed) == "its process on cpu was killed, perhaps for the memory it took: say a smaller --tile"
    assert isinstance(refused, WriteError)
    assert (str(refused), refused.errno) == ("a.png cannot be written", 28)

    processes = {process for process, _ in good.values()}
    assert os.getpid() not in processes
    assert not any(os.path.exists(f"/proc/{process}") for process in processes), "closing ends them, with jobs left"
