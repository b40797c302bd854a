"""Object storage by boto3, for any server that speaks S3; `storage` calls it and names the URI in errors.

Endpoint, region and credentials come from the usual AWS_* variables, profiles and roles.
"""

import functools
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO, TypeVar
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error, RetriesExceededError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from data_prep.uri import split_s3

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

ATTEMPTS = 5
_BROKEN_OFF = (
    IncompleteReadError,
    ResponseStreamingError,
    ReadTimeoutError,
    ConnectionClosedError,
    RetriesExceededError,
)
_NOT_SET_UP = (NoCredentialsError, PartialCredentialsError, NoRegionError, ParamValidationError)
_BODY_ATTEMPTS = 6  # with waits of 6 s in all
_CONDITIONAL_ATTEMPTS = 5
_MULTIPART_BYTES = 64 * 2**20
_ENVIRONMENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
)
_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_ENDPOINT = "check AWS_ENDPOINT_URL and that the server runs"
_REGION = "set AWS_DEFAULT_REGION to the bucket's region"
_BY_CODE = {
    "NoSuchKey": "there is no such object",
    "InvalidRange": "it ends before the bytes that were asked for; it is truncated, make it anew",
    "NoSuchBucket": "the bucket does not exist; create it or correct the URI",
    "SignatureDoesNotMatch": f"the secret key is wrong; {_CREDENTIALS}",
    "InvalidAccessKeyId": f"the access key is unknown; {_CREDENTIALS}",
    "AccessDenied": f"access is denied; {_CREDENTIALS} and the bucket's policy",
    "403": f"access is denied; {_CREDENTIALS} and the bucket's policy",
    "ExpiredToken": "the session token has expired; renew AWS_SESSION_TOKEN",
    "InvalidBucketName": "the bucket name is invalid; correct the URI",
    "PermanentRedirect": f"the bucket lies in another region; {_REGION}",
    "AuthorizationHeaderMalformed": f"the region is wrong; {_REGION}",
}


def reason(error: Exception) -> str:
    """What went wrong and the remedy, in one line."""
    error = _answer(error)
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code == "404":
            return _BY_CODE["NoSuchKey"]
        return _BY_CODE.get(code) or _one_line(error)
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return f"there are no complete S3 credentials; {_CREDENTIALS}"
    if isinstance(error, NoRegionError):
        return f"no region is set; {_REGION}"
    if isinstance(error, EndpointConnectionError | HTTPClientError):
        return f"the server at {endpoint() or 'the AWS endpoint'} does not answer; {_ENDPOINT}"
    if isinstance(error, BotoCoreError):
        return f"{_one_line(error)}; check the URI and the AWS_* variables"
    return f"{_one_line(error)}; {_ENDPOINT}"


def may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later: the server is away or busy, rather than that it said no."""
    error = _answer(error)
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code")
        return status >= 500 or status in (408, 429) or code == "RequestTimeout"
    return isinstance(error, BotoCoreError | Boto3Error) and not isinstance(error, _NOT_SET_UP)


def _answer(error: Exception) -> Exception:
    """The server's answer, where boto3 hides it behind an error of its own."""
    hidden = error.__context__ if isinstance(error, Boto3Error) else None
    return hidden if isinstance(hidden, ClientError) else error


def endpoint() -> str | None:
    """The custom endpoint URL, None for AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def client(attempts: int = ATTEMPTS) -> "S3Client":
    """A client for this process and the present AWS_* variables; kept for the next call."""
    environment = tuple(os.environ.get(name) for name in _ENVIRONMENT)
    return _client(attempts, os.getpid(), environment)


@functools.lru_cache(maxsize=8)
def _client(attempts: int, pid: int, environment: tuple[str | None, ...]) -> "S3Client":
    """`pid` and `environment` are keys: connections do not survive a fork, nor other credentials."""
    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=16,
    )
    return boto3.session.Session().client("s3", endpoint_url=endpoint(), config=config)


def is_missing(error: ClientError) -> bool:
    """Whether the object is not there, or ends before the range that was asked for."""
    return str(error.response.get("Error", {}).get("Code", "")) in ("NoSuchKey", "404", "InvalidRange", "416")


def read(uri: str, offset: int = 0, size: int | None = None) -> bytes:
    """The object's bytes, or `size` of them from `offset`."""
    bucket, key = split_s3(uri)
    get = functools.partial(client().get_object, Bucket=bucket, Key=key)

    def body() -> bytes:
        answer = get() if size is None else get(Range=f"bytes={offset}-{offset + size - 1}")
        return answer["Body"].read()

    return _again(body)


def _again(transfer: Callable[[], T]) -> T:
    """Repeat a transfer that breaks off, waiting longer each time. botocore repeats requests, but not bodies."""
    for attempt in range(_BODY_ATTEMPTS):
        try:
            return transfer()
        except _BROKEN_OFF:
            if attempt == _BODY_ATTEMPTS - 1:
                raise
            time.sleep(0.2 * 2**attempt * random.uniform(0.75, 1.25))  # readers must not come back all at once
    raise AssertionError("unreachable")


def write(uri: str, data: bytes, attempts: int = ATTEMPTS) -> None:
    """One put: readers see the old object or the new one."""
    bucket, key = split_s3(uri)
    client(attempts).put_object(Bucket=bucket, Key=key, Body=data)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Put where no object is; False where one is.

    The object carries this call's mark, so that a repeated request after a lost answer still knows its own.
    """
    bucket, key = split_s3(uri)
    mark = uuid.uuid4().hex
    for attempt in range(_CONDITIONAL_ATTEMPTS):
        try:
            client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", Metadata={"put-by": mark})
            return True
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == 412:
                return client().head_object(Bucket=bucket, Key=key)["Metadata"].get("put-by") == mark
            if status != 409 or attempt == _CONDITIONAL_ATTEMPTS - 1:  # 409: another put is under way
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


def exists(uri: str) -> bool:
    """Whether the object is there."""
    bucket, key = split_s3(uri)
    try:
        client().head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return False
        raise
    return True


def head(uri: str) -> tuple[int, str]:
    """(size, ETag) of an object."""
    bucket, key = split_s3(uri)
    answer = client().head_object(Bucket=bucket, Key=key)
    return answer["ContentLength"], answer["ETag"].strip('"')


def objects(uri: str) -> Iterator[tuple[str, int, str]]:
    """(key below the prefix, size, ETag) of every object below `uri`, in the server's order."""
    bucket, prefix = split_s3(uri)
    prefix = prefix and prefix + "/"
    for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", []):
            if not entry["Key"].endswith("/"):  # a marker that some tools write for an empty folder
                yield entry["Key"].removeprefix(prefix), entry["Size"], entry["ETag"].strip('"')


def upload(file: BinaryIO, uri: str) -> None:
    """Upload an open file, in parts where it is large; it appears when complete."""
    bucket, key = split_s3(uri)
    client().upload_fileobj(file, bucket, key, Config=TransferConfig(multipart_threshold=_MULTIPART_BYTES))


def download(uri: str, file: BinaryIO) -> None:
    """Download into an open file."""
    bucket, key = split_s3(uri)

    def whole() -> None:
        file.seek(0)
        file.truncate()
        client().download_fileobj(bucket, key, file)

    _again(whole)


def delete(uris: list[str], attempts: int = ATTEMPTS) -> None:
    """Delete objects one by one: servers disagree about the checksum header of the multi-object request."""

    def delete_one(uri: str) -> None:
        bucket, key = split_s3(uri)
        client(attempts).delete_object(Bucket=bucket, Key=key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(delete_one, uris))


def arrow_options() -> dict[str, str]:
    """Arguments for `pyarrow.fs.S3FileSystem`; credentials it finds itself, in the same places."""
    options = {}
    if url := endpoint():
        parts = urlsplit(url)
        options = {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        options["region"] = region
    return options


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
