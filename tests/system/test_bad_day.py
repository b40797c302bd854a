"""One training through everything that goes wrong in two weeks on a cluster, to the same weights as on a good day.

A worker is killed, another hangs, a node dies and a new one joins, S3 and MLflow are out of reach for a while; in
another one the whole cluster is lost, head included.
"""

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch

from tests.integration.servers import MlflowServer, mlflow_server, ray_cluster, session_of, stop
from tests.s3_server import s3_server
from tests.system.jobs import (
    EVERY,
    STEPS,
    Job,
    assert_same_losses,
    assert_same_training,
    losses,
    newest_checkpoint,
    training_processes,
)

OUTAGE_S = 30


def test_a_bad_day_ends_with_the_weights_of_a_good_one(
    tmp_path: Path, good: dict[str, torch.Tensor], good_folder: Path
) -> None:
    with s3_server(tmp_path / "s3") as s3, ray_cluster(tmp_path) as cluster:
        mlflow = MlflowServer(tmp_path, f"{s3.uri}/mlflow")
        mlflow.start()
        try:
            elastic = ("compute.num_workers=[1,2]", "compute.hang_timeout_s=20", "compute.resize_every_s=5")
            job = Job(cluster, tmp_path, s3.environment, s3.uri, f"tracking.uri={mlflow.uri}", *elastic)
            job.next_checkpoint()
            again = job.restarted("2 processes from step")
            os.kill(training_processes(cluster)[0], signal.SIGKILL)
            job.wait_for("a restart after a killed worker", again)
            job.next_checkpoint()
            again = job.restarted("2 processes from step")
            os.kill(training_processes(cluster)[1], signal.SIGSTOP)
            job.wait_for("a restart after a hanging worker", again)
            job.next_checkpoint()
            fewer = job.restarted("1 process from step")
            lost = cluster.nodes.pop()
            for pid in session_of(lost.pid):
                os.kill(pid, signal.SIGKILL)
            job.wait_for("going on with one worker", fewer)
            again = job.restarted("2 processes from step")
            cluster.start_node(1, ip="127.0.0.3")
            job.wait_for("both workers again", again)
            job.next_checkpoint()
            server = int((tmp_path / "s3" / "run" / "weed.pid").read_text())
            os.kill(server, signal.SIGSTOP)
            mlflow.stop()
            time.sleep(OUTAGE_S)
            mlflow.start()
            os.kill(server, signal.SIGCONT)
            assert_same_training(job.ends_well(tmp_path), good)
            assert_same_losses(losses(mlflow.uri), losses(f"sqlite:///{good_folder}/runs/mlflow.db"))
        finally:
            mlflow.stop()
            for node in cluster.nodes[1:]:
                stop(node)


def test_a_new_cluster_continues_what_a_lost_one_has_begun(tmp_path: Path, good: dict[str, torch.Tensor]) -> None:
    """All nodes die at once, with the head, its driver and what Ray knew; the same command goes on elsewhere."""
    with s3_server(tmp_path / "s3") as s3, mlflow_server(tmp_path, f"{s3.uri}/mlflow") as tracking:
        said = ""
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            with ray_cluster(tmp_path / name) as cluster:
                job = Job(cluster, tmp_path / name, s3.environment, s3.uri, f"tracking.uri={tracking}")
                if name == "second":
                    weights = job.ends_well(tmp_path)
                    said = job.log.read_text()
                    break
                for _ in range(3):
                    job.next_checkpoint()
                for pid in [pid for node in cluster.nodes for pid in session_of(node.pid)]:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                reached = newest_checkpoint(job.place)
                job.process.kill()
                job.process.wait()
        begun = re.search(r"2 processes from step (\d+)", said)
        assert begun, said
        assert reached - EVERY <= int(begun[1]) < STEPS  # the newest may have lacked a rank's file
        assert "shard-photographs: done before" in said
        assert_same_training(weights, good, most=1e-5)
        steps = [step for step, _ in losses(tracking)]
        # what the driver had not sent yet died with it: of the interval before the checkpoint that was gone on from
        assert set(range(5, STEPS + 1, 5)) - set(steps) <= set(range(int(begun[1]) - EVERY + 5, int(begun[1]) + 1, 5))
        assert len(steps) <= len(set(steps)) + 2 * EVERY // 5  # what was done twice: one interval, and the one begun
