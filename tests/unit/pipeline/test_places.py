"""Places that would lose a run's results are refused before any work."""

from typing import Any

import pytest

from data_prep import s3, storage
from pipeline import lasting, places
from pipeline.buckets import use_buckets
from pipeline.config import ConfigError, Places, StorageConfig, TrackingConfig
from tests.literal_s3 import literal_s3


def check(storage: str, tracking: str | None = None) -> None:
    lasting.check_lasting(Places(storage=StorageConfig(uri=storage), tracking=TrackingConfig(uri=tracking)))


@pytest.mark.parametrize(
    ("storage", "tracking", "words"),
    [
        ("runs", None, r"storage\.uri 'runs' is a relative path, .*RAY_JOB_CONFIG_JSON_ENV_VAR.* use s3://"),
        ("./runs", "http://host:5000", r"storage\.uri"),
        ("/shared/runs", "sqlite:///mlflow.db", r"tracking\.uri 'sqlite:///mlflow\.db' is a relative path"),
    ],
)
def test_relative_paths_are_refused_in_a_ray_job(
    monkeypatch: pytest.MonkeyPatch, storage: str, tracking: str | None, words: str
) -> None:
    check(storage, tracking)  # a laptop
    monkeypatch.setenv(lasting.IN_RAY_JOB, "{}")
    with pytest.raises(ConfigError, match=words) as caught:
        check(storage, tracking)
    assert "\n" not in str(caught.value)


def test_a_relative_database_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lasting.IN_RAY_JOB, "{}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with pytest.raises(ConfigError, match=r"tracking\.uri"):
        check("s3://bucket/runs")
    check("s3://bucket/runs", "http://host:5000")


@pytest.mark.parametrize(
    ("storage", "tracking"),
    [
        ("s3://bucket/runs", "http://host:5000"),
        ("/shared/runs", None),
        ("~/runs", "sqlite:////shared/mlflow.db"),
        ("file:///shared/runs", None),
    ],
)
def test_lasting_places_are_fine_in_a_ray_job(
    monkeypatch: pytest.MonkeyPatch, storage: str, tracking: str | None
) -> None:
    monkeypatch.setenv(lasting.IN_RAY_JOB, "{}")
    check(storage, tracking)


def test_rays_marker_of_a_job_has_this_name() -> None:
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert lasting.IN_RAY_JOB == RAY_JOB_CONFIG_JSON_ENV_VAR


def test_what_other_nodes_do_not_see(tmp_path: object) -> None:
    assert places._fault(f"{tmp_path}/absent", patience_s=0.1) == "it is not there"


@pytest.mark.integration
def test_an_s3_that_the_nodes_do_not_see_is_refused_before_work(
    ray_local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's processes were started before this server: they look elsewhere, as nodes do without our profile."""
    with literal_s3(monkeypatch) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with pytest.raises(
            ValueError, match=r"^storage\.uri 's3://bucket/runs' is not seen from \S+ as from here \("
        ) as caught:
            places.check_shared("s3://bucket/runs")
    assert "give the nodes the same S3, by the AWS_* variables" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.objects == {}


def test_buckets_of_a_recipe_are_used_by_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(s3.ANONYMOUS, "")
    monkeypatch.setenv(s3.REQUESTER_PAYS, "")
    config = StorageConfig.model_validate({"s3": {"anonymous": ["public"], "requester_pays": ["paid-*"]}})
    use_buckets(Places(storage=config))
    assert s3.for_other_machines().items() >= {s3.ANONYMOUS: "public", s3.REQUESTER_PAYS: "paid-*"}.items()


@pytest.mark.parametrize("uri", ["s3://bucket//runs", "s3:////runs", "s3://bucket/a//b/"])
def test_a_storage_with_an_empty_part_is_a_variable_that_was_not_set(uri: str) -> None:
    with pytest.raises(ValueError, match=r"has an empty part: write 's3://"):
        StorageConfig(uri=uri)
    assert storage.normalise(StorageConfig(uri="s3://bucket/runs/").uri) == "s3://bucket/runs"
