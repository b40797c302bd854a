"""Servers that tests share: one S3 server and one local Ray per session, started when first asked for."""

import os

import pytest

from tests.photographs import write_photographs
from tests.s3_server import s3_server
from tests.shared_data import ROOT

# without these, Ray writes a token into the home folder and later clusters refuse it, and it tries to rebuild
# uv's environment in every worker
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# else Ray gives its workers a low priority, and a test beside a busy one takes five times as long
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(autouse=True, scope="module")
def tracking_uri_of_its_own():
    """MLflow keeps the URI and login it was last given in the environment; a module must not hand it to the next."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of forty JPEG files in class folders (see `tests.photographs`)."""
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder)
    return folder


@pytest.fixture(scope="session")
def golden_files(tmp_path_factory):
    """A folder with published weights of HAT and HMANet, tiny, and a file that holds none."""
    from tests.golden_cases import golden_file

    folder = tmp_path_factory.mktemp("golden")
    for case in ("hat_x2_w16", "hat_x3_w8", "hmanet_x2_w16"):
        golden_file(case, folder)
    (folder / "cases.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def ray_local():
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield ray
    ray.shutdown()
