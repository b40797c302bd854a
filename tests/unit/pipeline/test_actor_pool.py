"""A pool of actors: what they hold, who gets work, what is lost with one, and where judges work."""

import os
import time
from typing import Any

import pytest
import ray
import ray.exceptions

from pipeline.actor_pool import MOST_LOSSES, ActorPool
from pipeline.config import ComputeConfig
from pipeline.evaluate import judges


@ray.remote(num_cpus=0)
class Worker:
    """Tells its process and how much it has done; -n kills it, n times, of which `folder` keeps count."""

    def __init__(self, folder: str) -> None:
        self.folder, self.done = folder, 0

    def work(self, number: int) -> tuple[int, int, int]:
        if number < 0:
            deaths = len(os.listdir(self.folder))
            if deaths < -number:
                open(os.path.join(self.folder, str(deaths)), "w").close()
                os._exit(1)
        self.done += 1
        time.sleep(0.02)
        return os.getpid(), self.done, number


@pytest.fixture
def worked(ray_local: Any, tmp_path: Any) -> Any:
    """(pool, numbers) -> what the workers told."""
    return lambda pool, numbers: ray.get(
        [answer for (answer,) in pool.run(lambda w, n: [w.work.remote(n)], numbers)], timeout=60
    )


def pool_of(folder: Any, most: int, **options: Any) -> ActorPool:
    return ActorPool(lambda: Worker.options(**options).remote(str(folder)), lambda: most)  # type: ignore[attr-defined]


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_same_processes_serve_until_the_pool_is_closed(worked: Any, tmp_path: Any) -> None:
    pool = pool_of(tmp_path, 2)
    told = worked(pool, range(6)) + worked(pool, range(6, 9))
    assert [number for _, _, number in told] == list(range(9))
    processes = {process for process, _, _ in told}
    assert 1 <= len(processes) <= 2
    assert max(done for _, done, _ in told) >= 5
    pool.close()
    deadline = time.monotonic() + 20
    while any(map(lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, processes))


def test_who_waits_for_a_node_holds_nothing_up(worked: Any, tmp_path: Any) -> None:
    rooms = iter([0, 1000])
    pool = ActorPool(lambda: Worker.options(num_cpus=next(rooms)).remote(str(tmp_path)), lambda: 2)  # type: ignore[attr-defined]
    assert len({process for process, _, _ in worked(pool, range(4))}) == 1
    assert len(pool.starting) == 1
    pool.close()


def test_what_is_lost_with_a_process_is_done_by_another(worked: Any, tmp_path: Any) -> None:
    pool = pool_of(tmp_path, 1)
    told = worked(pool, [1, -2, 3])
    assert [number for _, _, number in told] == [1, -2, 3]
    pool.close()


def test_what_kills_every_process_ends(worked: Any, tmp_path: Any) -> None:
    pool = pool_of(tmp_path, 1)
    with pytest.raises(ray.exceptions.RayActorError):
        worked(pool, [-MOST_LOSSES - 1])
    pool.close()


@pytest.mark.parametrize(("use_gpu", "gpus", "expected"), [(False, 4, 0), ("auto", 4, 1), ("auto", 0, 0), (True, 0, 1)])
def test_the_configuration_says_where_images_are_judged(
    use_gpu: Any, gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what the cluster holds at the moment: a GPU that is asked for and lost is waited for."""
    made: list[Any] = []

    class Remote:
        def options(self, **options: Any) -> Any:
            made.append(options)
            return self

        def remote(self, on_gpu: bool) -> None:
            made.append(on_gpu)

    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0} | ({"GPU": float(gpus)} if gpus else {}))
    monkeypatch.setattr("pipeline.evaluate._Judge", Remote())
    with judges(ComputeConfig(use_gpu=use_gpu)) as pool:
        pool.make()
        assert pool.most() == (max(gpus, 1) if expected else 8)
    assert made == [{"num_gpus": expected}, bool(expected)]
