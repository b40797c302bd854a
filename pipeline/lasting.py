"""Which places a run may keep its results at: none that vanish with a Ray job."""

import os

from pipeline.config import ConfigError, Places

IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray's job supervisor in the environment of a job's driver, and nowhere else."""


def check_lasting(places: Places) -> None:
    """ConfigError for a relative path inside a Ray job, whose working folder Ray removes some time after the job."""
    if IN_RAY_JOB not in os.environ:
        return
    tracking = places.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    for key, uri, remedy in (
        ("storage.uri", places.storage.uri, "s3://bucket/prefix or the absolute path of a folder that all nodes share"),
        ("tracking.uri", tracking, "http://host:5000 or the absolute path of a database, sqlite:////path"),
    ):
        if _is_relative(uri):
            raise ConfigError(
                f"{key} {uri!r} is a relative path, and this is a Ray job ({IN_RAY_JOB} is set): its working folder is "
                f"removed after the job; use {remedy}"
            )


def _is_relative(uri: str) -> bool:
    if uri.startswith("sqlite:///"):
        return not uri.startswith("sqlite:////")
    return bool(uri) and "://" not in uri and not os.path.isabs(os.path.expanduser(uri))
