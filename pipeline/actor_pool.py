"""Ray actors that share work: what one has loaded serves all that it does, and its process ends with the pool.

An actor gets work once it lives, and one piece at a time: those that wait for a node hold nothing up.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import ray
import ray.exceptions

Item = TypeVar("Item")

MOST_LOSSES = 3
"""Times that a pool begins anew what was lost with an actor's process or node, as often as Ray does with tasks."""


class ActorPool:
    """At most `most()` actors, made by `make()` as there is work for them. `close` ends their processes."""

    def __init__(self, make: Callable[[], Any], most: Callable[[], int]) -> None:
        self.make, self.most = make, most
        self.idle: list[Any] = []
        self.starting: dict[Any, Any] = {}
        """Actors that do not live yet, by the reference that tells when they do."""
        self.working: dict[Any, tuple[Any, int]] = {}
        """Actors at work, and the number of the item they have, by the reference that tells when it is done."""

    def run(self, submit: Callable[[Any, Item], list[Any]], items: Sequence[Item]) -> list[list[Any]]:
        """`submit(actor, item)` for all items, in their order: references, the first of which tells when it is done.

        Raises what the work raises, and Ray's error where actors are lost again and again.
        """
        try:
            return self._run(submit, items)
        except BaseException:
            self.close()  # what is still at work is of no use
            raise

    def _run(self, submit: Callable[[Any, Item], list[Any]], items: Sequence[Item]) -> list[list[Any]]:
        waiting, losses, most = deque(range(len(items))), 0, self.most()
        answers: list[list[Any]] = [[] for _ in items]
        while waiting or self.working:
            self._grow(min(len(waiting), most - len(self.working)))
            while waiting and self.idle:
                actor, number = self.idle.pop(), waiting.popleft()
                answers[number] = submit(actor, items[number])
                self.working[answers[number][0]] = actor, number
            (told,), _ = ray.wait([*self.working, *self.starting], num_returns=1)
            lost = self.working[told][1] if told in self.working else None
            try:
                ray.get(told)
            except ray.exceptions.RayActorError:
                losses += 1
                if losses > MOST_LOSSES:
                    raise
                waiting.extendleft([] if lost is None else [lost])
            else:
                self.idle.append(self.starting[told] if lost is None else self.working[told][0])
            (self.starting if lost is None else self.working).pop(told)
        return answers

    def _grow(self, wanted: int) -> None:
        """Have as many actors that are idle or on their way."""
        for _ in range(wanted - len(self.idle) - len(self.starting)):
            actor = self.make()
            self.starting[actor.__ray_ready__.remote()] = actor

    def close(self) -> None:
        """End all processes."""
        for actor in (*self.idle, *self.starting.values(), *(actor for actor, _ in self.working.values())):
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)
        self.idle, self.starting, self.working = [], {}, {}
