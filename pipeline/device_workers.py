"""One process for each of several devices, each with a network of its own; jobs go to whoever is free.

Processes, since a GPU is fed by thousands of small calls, which threads of one process would make in turns.
"""

import multiprocessing
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

Work = Callable[[Any, Any], Any]
"""(network on its device, job) -> what came of it. Is pickled, as are jobs, results and errors."""


class WorkerEndedError(ValueError):
    """A device's process ended in the middle of a job."""


class _Worker:
    """A device's process. Call it with a job; after its end it is started anew by the next call."""

    def __init__(self, device: torch.device, network: bytes, work: Work, threads: int) -> None:
        self.device = device
        self._arguments = (str(device), network, pickle.dumps(work), threads)
        self._process: Any = None
        self._connection: Connection | None = None

    def __call__(self, job: Any) -> Any:
        """What the work gives; raises what it raises, and WorkerEndedError where the process ended."""
        connection = self._connection or self._start()
        try:
            connection.send(job)
            is_good, result = connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerEndedError(self._how_it_ended()) from error
        if not is_good:
            raise result
        return result

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._connection = ours
        return ours

    def _how_it_ended(self) -> str:
        self._process.join(10)
        code = self._process.exitcode
        self.close()
        if code == -signal.SIGKILL:
            return f"its process on {self.device} was killed, perhaps for the memory it took: say a smaller --tile"
        return f"its process on {self.device} ended with code {code}"

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None and self._process.is_alive():
            self._process.terminate()
            self._process.join()


def in_order(
    jobs: Sequence[Any], devices: Sequence[torch.device], network: nn.Module, work: Work
) -> Generator[tuple[Any, Any, torch.device], None, None]:
    """(job, result or error, device) in the order of the jobs, each as soon as those before it are done.

    `network` is on the CPU. Closing the iterator ends the processes; jobs that are not begun are left.
    """
    threads = max(torch.get_num_threads() // len(devices), 1)
    copy = pickle.dumps(network)
    workers = [_Worker(device, copy, work, threads) for device in devices[: len(jobs)]]
    idle: queue.Queue[_Worker] = queue.Queue()
    for worker in workers:
        idle.put(worker)
    stop = threading.Event()

    def do(job: Any) -> tuple[Any, torch.device]:
        worker = idle.get()
        try:
            return (None if stop.is_set() else worker(job)), worker.device
        except Exception as error:  # noqa: BLE001 - is handed on to whoever asks for this job
            return error, worker.device
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(len(workers))
    try:
        futures: list[Future[tuple[Any, torch.device]]] = [pool.submit(do, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            yield job, *future.result()
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()
        pool.shutdown()


def _serve(connection: Connection, device: str, network: bytes, work: bytes, threads: int) -> None:
    """A device's process: work on jobs until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: whoever started this ends it
    if device == "cpu":
        torch.set_num_threads(threads)
    placed = pickle.loads(network).to(device)
    do = pickle.loads(work)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            answer = True, do(placed, job)
        except Exception as error:  # noqa: BLE001 - is raised again where the job came from
            answer = False, _sendable(error)
        connection.send(answer)


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same, where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - pickle raises whatever a class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
