"""Many calls as Ray tasks, a bounded number in flight; Ray must be initialised by the caller."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_PER_CPU = 2  # tasks in flight: one that runs and one that waits with its arguments ready


def in_order(call: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """The results of call(*arguments), in the arguments' order, run as Ray tasks; an error comes out as itself.

    At most two tasks per CPU are in flight, and as many results wait for their turn. A task whose worker or node dies
    is run again by Ray.
    """
    import ray  # local: all but the driver of a stage does without

    task = ray.remote(call)
    limit = max(2, _PER_CPU * int(ray.cluster_resources().get("CPU", 1)))
    coming, started, delivered = iter(arguments), 0, 0
    running: dict[Any, int] = {}
    ready: dict[int, T] = {}
    more = True
    while more or running or ready:
        while more and len(running) < limit and started - delivered < 4 * limit:
            if (entry := next(coming, None)) is None:
                more = False
                break
            running[task.remote(*entry)] = started
            started += 1
        while delivered in ready:
            yield ready.pop(delivered)
            delivered += 1
        if running:
            done, _ = ray.wait(list(running), num_returns=1)
            try:
                ready[running.pop(done[0])] = ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error  # the task's own error, without Ray's lines around it
