"""Places that would lose a run's results are refused before any work."""

import pytest

from pipeline import lasting, places
from pipeline.config import ConfigError, Places, StorageConfig, TrackingConfig


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
