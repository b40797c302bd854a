"""Memory of a node's readers: 8 ranks of 6 loader workers over a set of ImageNet's shape.

    PYTHONPATH=. .venv/bin/python -m tests.bench.data_memory [RANKS WORKERS]

1,252 shards of 1,024 photographs (links to one tar), 200 micro-batches of 4 for each rank. Counted is each process's
share of the pages that it uses (PSS): of the workers, and of the server that each rank forks its workers from. Exit
code 1 where they take more than 3 GB for 48 readers.
"""

import dataclasses
import itertools
import multiprocessing
import os
import sys
import tempfile
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil

from data_prep.index import publish_index, summarise
from data_prep.loader import PairLoader, PairSettings
from data_prep.shard import ShardPlan, ShardSettings, write_shard
from data_prep.sources import list_items
from tests.shared_data import shared

NUM_SHARDS, PER_SHARD, MICRO_BATCH, BATCHES = 1252, 1024, 4, 200
LIMIT_BYTES = 3e9 / 48


def make_set(folder: Path) -> str:
    """A set whose shards are links to one."""
    settings = ShardSettings(samples_per_shard=PER_SHARD, min_side_px=128)
    photographs = itertools.cycle(list_items(str(shared("data/imagenet-sample/train"))))
    items = [
        dataclasses.replace(item, key=f"{item.key}-{number}")
        for number, item in enumerate(itertools.islice(photographs, PER_SHARD))
    ]
    made = summarise(write_shard(ShardPlan("shard-000000", tuple(items), settings), str(folder)))
    assert made.shard is not None
    summaries = []
    for name in (f"shard-{number:06d}" for number in range(NUM_SHARDS)):
        summaries.append(made.model_copy(update={"shard": made.shard.model_copy(update={"name": name})}))
        for ext in ("tar", "json") if name != made.shard.name else ():
            os.link(folder / f"{made.shard.name}.{ext}", folder / f"{name}.{ext}")
    publish_index(str(folder), "imagenet-sample", "0", settings, summaries)
    return str(folder)


def read(uri: str, rank: int, num_ranks: int, num_workers: int, done: Barrier, measured: Barrier) -> None:
    """One rank, as a training process reads."""
    settings = PairSettings(scale=2, patch_px=64)
    batches = iter(PairLoader(uri, settings, num_ranks * MICRO_BATCH, MICRO_BATCH, rank, num_ranks, num_workers))
    for _ in range(BATCHES):
        next(batches)
    done.wait()
    measured.wait()


def children(process: psutil.Process, word: str) -> list[psutil.Process]:
    return [child for child in process.children() if word in " ".join(child.cmdline())]


def pss(processes: list[psutil.Process]) -> int:
    return sum(process.memory_full_info().pss for process in processes)


def main() -> int:
    num_ranks, num_workers = map(int, sys.argv[1:]) if len(sys.argv) > 1 else (8, 6)
    context = multiprocessing.get_context("spawn")
    done, measured = context.Barrier(num_ranks + 1), context.Barrier(num_ranks + 1)
    with tempfile.TemporaryDirectory() as folder:
        uri = make_set(Path(folder))
        ranks = [
            context.Process(target=read, args=(uri, rank, num_ranks, num_workers, done, measured))
            for rank in range(num_ranks)
        ]
        for rank in ranks:
            rank.start()
        done.wait()
        servers = [server for rank in ranks for server in children(psutil.Process(rank.pid), "forkserver")]
        readers = [reader for server in servers for reader in children(server, "")]
        assert len(readers) == num_ranks * num_workers
        of_servers, of_readers = pss(servers), pss(readers)
        measured.wait()
        for rank in ranks:
            rank.terminate()
            rank.join()
    total = of_servers + of_readers
    each, server = of_readers / len(readers) / 1e6, of_servers / len(servers) / 1e6
    print(f"{len(readers)} readers: {total / 1e9:.2f} GB; {each:.0f} MB each, {server:.0f} MB each rank's server")
    return int(total > LIMIT_BYTES * len(readers))


if __name__ == "__main__":
    sys.exit(main())
