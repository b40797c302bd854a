"""Patience with MLflow: which of its errors may pass, and a client that waits for those."""

import functools
import time
from collections.abc import Callable
from typing import Any

import requests
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from data_prep import s3, storage
from data_prep.redact import without_secrets

_PASSING = (
    "INTERNAL_ERROR",  # also what MLflow says where it reached no server
    "TEMPORARILY_UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
)
_S3_ERRORS = (BotoCoreError, ClientError, Boto3Error)  # artifacts may go straight to S3


class TrackingError(ValueError):
    """MLflow cannot be used; the message names the URI and the remedy."""


FAILURES = (TrackingError, MlflowException, OSError, storage.StorageError, *_S3_ERRORS)
"""What a call to MLflow may end with; the errors of `requests` are OSErrors."""


class Patient:
    """An MlflowClient whose calls are repeated while the server does not answer, for `patience_s`.

    TrackingError where it stays away; what MLflow itself refuses is raised as it comes.
    """

    def __init__(
        self, client: MlflowClient, uri: str, notice: Callable[[Exception | None], None], patience_s: float
    ) -> None:
        self._client = client
        self._uri = uri
        self._notice = notice
        self._patience_s = patience_s

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            deadline, failed = time.monotonic() + self._patience_s, False
            while True:
                try:
                    answer = method(*args, **options)
                    break
                except FAILURES as error:
                    self._raise_unless_it_may_pass(error, deadline)
                    self._notice(error)
                failed = True
                time.sleep(3)
            if failed:
                self._notice(None)
            return answer

        return call

    def _raise_unless_it_may_pass(self, error: Exception, deadline: float) -> None:
        if may_pass(error) and time.monotonic() < deadline:
            return
        if isinstance(error, MlflowException) and not may_pass(error):
            raise error
        raise TrackingError(f"MLflow at {self._uri}: {reason(error)}") from error


def may_pass(error: Exception) -> bool:
    """Whether MLflow, or what its artifacts lie in, was out of reach, rather than said no."""
    if isinstance(error, MlflowException):
        return error.error_code in _PASSING
    if isinstance(error, storage.StorageError):
        return storage.may_pass(error)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return isinstance(error, requests.RequestException) or s3.may_pass(error)


def reason(error: Exception) -> str:
    """What went wrong, in one line without secrets."""
    text = s3.reason(error) if isinstance(error, _S3_ERRORS) else str(error)
    return without_secrets(" ".join(text.split()))[:300]
