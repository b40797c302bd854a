"""MLflow keeps the URI it was last given in the environment; a test must not hand it to the next."""

import pytest


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
