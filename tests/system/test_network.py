"""One training on hosts with a network between them: cut off, slow, lossy; it ends with the weights of a good day."""

import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from tests.integration.servers import MlflowServer, RayCluster, stop
from tests.s3_server import s3_server
from tests.system import hosts
from tests.system.jobs import STEPS, Job, assert_same_training, losses

CUT_S, DELAY_S, LOSS = 60, 0.05, 0.05


@pytest.fixture
def network() -> hosts.Network:
    if lack := hosts.lacking():
        pytest.skip(lack)
    return hosts.Network(3)


@pytest.mark.network
def test_a_bad_network_ends_with_the_weights_of_a_good_day(
    tmp_path: Path, good: dict[str, torch.Tensor], network: hosts.Network
) -> None:
    with s3_server(tmp_path / "s3") as s3, network, ExitStack() as stack:
        mlflow = MlflowServer(tmp_path, f"{s3.uri}/mlflow")
        stack.callback(mlflow.stop)
        mlflow.start()
        tracking = stack.enter_context(hosts.reachable(network, mlflow.port))
        objects = stack.enter_context(hosts.reachable(network, urlsplit(s3.endpoint).port or 0))
        cluster = stack.enter_context(hosts.cluster_of(network, tmp_path))
        env = s3.environment | {"AWS_ENDPOINT_URL": f"http://{objects}"}
        job = Job(cluster, tmp_path, env, s3.uri, f"tracking.uri=http://{tracking}", "compute.hang_timeout_s=60")
        job.next_checkpoint()
        again = job.restarted("2 processes from step")
        network.cut.add(2)
        time.sleep(CUT_S)
        network.cut.clear()
        job.wait_for("both hosts again", lambda: rejoined(cluster, network) and again(), timeout_s=300)
        job.next_checkpoint()
        network.delay_s, network.loss = DELAY_S, LOSS
        for _ in range(2):
            job.next_checkpoint()
        network.delay_s, network.loss = 0, 0
        assert_same_training(job.ends_well(tmp_path), good, most=1e-5)
        assert {step for step, _ in losses(mlflow.uri)} == set(range(5, STEPS + 1, 5))


def rejoined(cluster: RayCluster, network: hosts.Network) -> bool:
    """Start the node again where Ray, which was told that it is dead, has ended it: as who runs nodes does."""
    if cluster.nodes[-1].poll() is not None:
        stop(cluster.nodes[-1])
        hosts.join(cluster, network, 2)
    return True
