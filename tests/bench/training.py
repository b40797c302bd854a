"""What the training machinery costs: python -m tests.bench.training. Ratios measured in one run; 1 where one is missed.

1. A step of our loop against one of a bare PyTorch loop: same network, batch and data, both in memory, taken in turn.
2. The stall of a checkpoint, in steps.
3. The same stall with the checkpoints on a real S3 server, to which they are uploaded while training goes on.
4. Two workers with one thread each against one worker with one thread: images per second; and, as what the machine
   gives beside Ray's own processes, the same of bare loops that exchange nothing.
5. From `ray job submit` to a cluster that runs to the first step of a training: at most 30 s (not a ratio).
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "RAY_AUTH_MODE": "disabled", "RAY_TRAIN_V2_ENABLED": "1"}

import ray
import ray.train
import ray.train.torch
import torch
from torch import nn

from data_prep import storage
from data_prep.loader import Batch
from data_prep.shard import ShardSettings, make_shards
from pipeline.cluster import connected
from pipeline.config import ComputeConfig, ModelConfig, PhaseConfig, TrainingConfig
from pipeline.launch import TrainJob
from pipeline.monitor import Mailbox, StopWatch
from pipeline.schedule import learning_rate
from tests.integration.servers import ray_cluster, submission, submit
from tests.s3_server import s3_server

ROUNDS, BATCH, PATCH, SCALE = 40, 8, 32, 2
ATTEMPT = "attempt-000001"  # as `pipeline.launch` has it: Ray wants checkpoints in its experiment's folder
MODEL = {"embed_dim": 60, "depths": [4], "num_heads": [6], "window_size": 16, "compress_ratio": 4, "squeeze_factor": 10}
LIMITS = {"overhead": 1.03, "stall": 2.0, "stall_s3": 2.0, "scaling": 1.85, "start_s": 30.0}


def job(folder: str, shards: str, workers: int, checkpoints: str) -> TrainJob:
    return TrainJob(
        name="bench",
        model=ModelConfig(arch="hat", options=MODEL),
        phase=PhaseConfig(
            data="d",
            steps=10**6,
            global_batch=BATCH * workers,
            patch_px=PATCH,
            precision="fp32",
            log_every=10**6,
            grad_clip=1.0,
        ),
        training=TrainingConfig(scale=SCALE, phase="pretrain"),
        compute=ComputeConfig(num_workers=workers, micro_batch=BATCH, cache_dir=f"{folder}/cache"),
        seed=0,
        shards_uri=shards,
        init=None,
        checkpoints_uri=checkpoints,
        attempt=ATTEMPT,
    )


def in_memory(size: int) -> Iterator[Batch]:
    low_res = torch.rand(size, 3, PATCH, PATCH)
    batch = Batch(low_res, torch.rand(size, 3, SCALE * PATCH, SCALE * PATCH), ["key"] * size, 0)
    return itertools.repeat(batch)


def bare_loop(batches: Iterator[Batch]) -> Any:
    """One step of an ordinary loop with Adam, clipping and averages, as a function."""
    from pipeline.worker import fresh_network

    network = fresh_network(job("", "", 1, "")).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.9, 0.99))
    parameters = list(network.parameters())
    averages = [p.detach().clone() for p in parameters]

    def bare() -> None:
        batch = next(batches)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.l1_loss(network(batch.low_res), batch.high_res).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 0.001)

    return bare


def one_worker(config: dict[str, Any]) -> dict[str, float]:
    """Our step, the bare step and a checkpoint, timed in turn in a real worker."""
    from pipeline.train import step
    from pipeline.window import Window
    from pipeline.worker import set_up

    run = set_up(TrainJob.model_validate(config["job"]), config["mailbox"], None)
    run.batches = in_memory(BATCH)
    window, watch = Window(run.device), StopWatch(run.mailbox)

    def ours() -> None:
        step(run, window, learning_rate(run.step, run.job.phase), want_stop=watch.poll())

    bare, times = bare_loop(in_memory(BATCH)), {"ours": [], "bare": []}  # type: dict[str, list[float]]
    for _ in range(ROUNDS):
        for name, work in (("ours", ours), ("bare", bare)):
            begin = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - begin)
    step_s, bare_s = (sorted(times[name])[ROUNDS // 2] for name in ("ours", "bare"))
    return {"overhead": step_s / bare_s, "step_s": step_s, "stall": stall_s(run, ours) / step_s}


def stall_s(run: Any, ours: Callable[[], None]) -> float:
    """For how long a checkpoint holds up the training at the most, five steps apart; the first one warms up."""
    from pipeline.train import save

    stalls = []
    for _ in range(5):
        begin = time.perf_counter()
        save(run, {})
        stalls.append(time.perf_counter() - begin)
        for _ in range(5):
            ours()
    return max(stalls[1:])


def to_s3(config: dict[str, Any]) -> float:
    """The stall in steps."""
    from pipeline.train import step
    from pipeline.window import Window
    from pipeline.worker import set_up

    run = set_up(TrainJob.model_validate(config["job"]), config["mailbox"], None)
    run.batches = in_memory(BATCH)
    window, times = Window(run.device), []

    def ours() -> None:
        begin = time.perf_counter()
        step(run, window, 1e-4)
        times.append(time.perf_counter() - begin)

    for _ in range(5):
        ours()
    return stall_s(run, ours) / sorted(times)[len(times) // 2]


def throughput(config: dict[str, Any]) -> dict[str, float]:
    """Images per second of a group of workers: ours, and bare loops beside each other that exchange nothing."""
    from pipeline.train import step
    from pipeline.window import Window
    from pipeline.worker import set_up

    run = set_up(TrainJob.model_validate(config["job"]), config["mailbox"], None)
    run.batches = in_memory(BATCH)
    window, bare, best = Window(run.device), bare_loop(in_memory(BATCH)), {"ours": 0.0, "bare": 0.0}
    for _ in range(6):
        for name, work in (("ours", lambda: step(run, window, 1e-4)), ("bare", bare)):
            torch.distributed.barrier()
            begin = time.perf_counter()
            for _ in range(5):
                work()
            best[name] = max(best[name], 5 * BATCH * run.world_size / (time.perf_counter() - begin))
    return best


def start_up_s(folder: Path) -> float:
    """From submission to the moment when all processes of a training stand before step 0; its shards are made."""
    arguments = ["--recipe", "tests/integration/tiny_pair.yaml", "--set", f"storage.uri={folder}/runs"]
    with ray_cluster(folder, cpus=(2,)) as cluster:
        first = submit(cluster, "pipeline/pretrain.py", *arguments, "--until", "shard", env={})
        assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
        begin = time.monotonic()
        process = subprocess.Popen(
            submission(cluster, "pipeline/pretrain.py", *arguments, "--until", "pretrain-x2", env={}),
            env=cluster.env,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if "from step 0" in line:
                taken = time.monotonic() - begin
                process.communicate()
                return taken
        raise AssertionError("the training did not start")


def fit(function: Any, folder: str, shards: str, workers: int, checkpoints: str | None = None) -> Any:
    """What the function returns in rank 0; `checkpoints` is the URI of a folder that is not there yet."""
    # an actor that stays with the driver: records that nobody reads
    mailbox = Mailbox.remote()  # type: ignore[attr-defined]
    checkpoints = checkpoints or f"{folder}/{function.__name__}-{workers}"
    filesystem, path = storage.filesystem(checkpoints)
    trainer = ray.train.torch.TorchTrainer(
        function,
        train_loop_config={
            "job": job(folder, shards, workers, checkpoints).model_dump(mode="json"),
            "mailbox": mailbox,
        },
        scaling_config=ray.train.ScalingConfig(num_workers=workers),
        run_config=ray.train.RunConfig(name=ATTEMPT, storage_path=path, storage_filesystem=filesystem),
    )
    return trainer.fit().return_value


def measure(folder: Path) -> dict[str, float]:
    """Everything, by name as in LIMITS."""
    start_s = start_up_s(folder)  # first: the cluster below is set up by environment variables, which would reach it
    with s3_server(folder / "s3") as s3, connected(ComputeConfig(num_workers=2), "local", debug=False):
        shards = f"{folder}/shards"
        make_shards("photographs:", shards, ShardSettings(samples_per_shard=8, min_side_px=256))
        measured: dict[str, float] = fit(one_worker, str(folder), shards, 1)
        measured["stall_s3"] = fit(to_s3, str(folder), shards, 1, f"{s3.uri}/checkpoints")
        one, two = (fit(throughput, str(folder), shards, workers) for workers in (1, 2))
    scaling = {"scaling": two["ours"] / one["ours"], "scaling_bare": two["bare"] / one["bare"]}
    return measured | scaling | {"start_s": start_s}


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="hatchery-bench-") as folder:
        measured = measure(Path(folder))
    print(f"step: {1000 * measured['step_s']:.0f} ms ({BATCH} x {PATCH} px, HAT of width {MODEL['embed_dim']})")
    missed = False
    for name, what in (
        ("overhead", "our step / a bare PyTorch step (at most 1.03)"),
        ("stall", "stall of a checkpoint, in steps (at most 2)"),
        ("stall_s3", "the same, uploaded to a real S3 server meanwhile (at most 2)"),
        ("scaling", f"images/s of two workers / one, {BATCH} images and one thread each (at least 1.85)"),
        ("scaling_bare", "the same of bare loops that exchange nothing, in the same processes: what the machine gives"),
        ("start_s", "seconds from `ray job submit` to the first step (at most 30)"),
    ):
        limit = LIMITS.get(name, measured[name])  # what the machine gives has none
        kept = measured[name] >= limit if name == "scaling" else measured[name] <= limit
        missed |= not kept
        print(f"{what}: {measured[name]:.3f} {'' if kept else 'MISSED'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
