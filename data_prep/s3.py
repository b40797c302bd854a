"""Object storage by boto3, for any server that speaks S3; `storage` calls it and names the URI in errors.

Endpoint, region, certificates and credentials come from where AWS's own tools take them: AWS_* variables, the profile
in ~/.aws/config, roles. Two variables of our own say which buckets are public (ANONYMOUS) or bill whoever reads them
(REQUESTER_PAYS): names or globs, by commas or spaces.
"""

import fnmatch
import functools
import os
import random
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore
import botocore.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    InvalidConfigError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
    SSOError,
    TokenRetrievalError,
)

from data_prep.uri import StorageError, split_s3

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

ANONYMOUS = "HATCHERY_S3_ANONYMOUS"
REQUESTER_PAYS = "HATCHERY_S3_REQUESTER_PAYS"
ATTEMPTS = 5
PATIENT_ATTEMPTS = 12
"""For who cannot begin anew: with their waits, a server that is away for a minute is waited for."""
_NOT_SET_UP = (
    NoCredentialsError,
    PartialCredentialsError,
    NoRegionError,
    ParamValidationError,
    ProfileNotFound,
    ConfigParseError,
    InvalidConfigError,
    SSOError,
    TokenRetrievalError,
)
_ANSWER_S = 22.0  # of silence, after which a request is given up: times ATTEMPTS is what a person waits for
_READ_ATTEMPTS = 7  # of a read, which botocore would not repeat once its body has begun; with waits of 13 s in all
_READ_S = 120.0  # after which a read is not tried again
_PATIENT_READ_ATTEMPTS, _PATIENT_READ_S = 12, 300.0  # with waits of 77 s in all
_DOWNLOAD_BYTES, _DOWNLOADS = 8 * 2**20, 8  # parts of a download, and how many of them at once
_CONDITIONAL_ATTEMPTS = 5
_MULTIPART_BYTES = 64 * 2**20
_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_PROFILE = "correct AWS_PROFILE and the files that AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE name (~/.aws)"
_REGION = "set AWS_DEFAULT_REGION to the bucket's region"
_RENEW = "log in again (`aws sso login`), or renew AWS_SESSION_TOKEN"
_DENIED = (
    f"access is denied; {_CREDENTIALS} and the bucket's policy, or name a public bucket in storage.s3.anonymous "
    f"({ANONYMOUS}) and one that bills its readers in storage.s3.requester_pays ({REQUESTER_PAYS})"
)
_CHANGED = "it has changed since it was listed; run the command again"
_BY_CODE = {
    "PreconditionFailed": _CHANGED,
    "412": _CHANGED,
    "NoSuchKey": "there is no such object",
    "InvalidRange": "it ends before the bytes that were asked for; it is truncated, make it anew",
    "NoSuchBucket": "the bucket does not exist; create it or correct the URI",
    "SignatureDoesNotMatch": f"the secret key is wrong; {_CREDENTIALS}",
    "InvalidAccessKeyId": f"the access key is unknown; {_CREDENTIALS}",
    "AccessDenied": _DENIED,
    "403": _DENIED,
    "ExpiredToken": f"the session token has expired; {_RENEW}",
    "ExpiredTokenException": f"the session token has expired; {_RENEW}",
    "TokenRefreshRequired": f"the session token has expired; {_RENEW}",
    "InvalidToken": f"the session token is wrong; {_RENEW}, or unset it",
    "RequestTimeTooSkewed": "this machine's clock differs from the server's; set it (by NTP)",
    "RequestExpired": "this machine's clock differs from the server's; set it (by NTP)",
    "InvalidBucketName": "the bucket name is invalid; correct the URI",
    "InvalidObjectState": "it lies in an archive (Glacier); restore it first",
    "PermanentRedirect": f"the bucket lies in another region; {_REGION}",
    "301": f"the bucket lies in another region; {_REGION}",
    "IllegalLocationConstraintException": f"the bucket lies in another region; {_REGION}",
    "AuthorizationHeaderMalformed": f"the region is wrong; {_REGION}",
    "400": f"the server refuses the request without a reason, as for a wrong region or an expired session token; "
    f"{_REGION}, {_RENEW}",
}


def reason(error: Exception) -> str:
    """What went wrong and the remedy, in one line."""
    error = _answer(error)
    if isinstance(error, RecursionError):  # botocore asks for the bucket's region, is redirected, asks again
        return f"the server redirects every request, as one that wants https:// does; {_endpoint_remedy()}"
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code == "404":
            return _BY_CODE["NoSuchKey"]
        return _BY_CODE.get(code) or _one_line(error)
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return f"there are no complete S3 credentials; {_CREDENTIALS}"
    if isinstance(error, SSOError | TokenRetrievalError):
        return f"{_one_line(error)}; {_RENEW}"
    if isinstance(error, ProfileNotFound | ConfigParseError | InvalidConfigError | CredentialRetrievalError):
        return f"{_one_line(error)}; {_PROFILE}"
    if isinstance(error, NoRegionError):
        return f"no region is set; {_REGION}"
    if isinstance(error, SSLError):
        return _untrusted(error)
    if isinstance(error, EndpointConnectionError | HTTPClientError):
        return f"the server at {_server(error)} does not answer; {_endpoint_remedy()}"
    if isinstance(error, BotoCoreError):
        return f"{_one_line(error)}; check the URI and the AWS_* variables"
    return f"{_one_line(error)}; {_endpoint_remedy()}"


def _server(error: BotoCoreError) -> str:
    """The server that a request went to."""
    parts = urlsplit(str(error.kwargs.get("endpoint_url") or ""))
    return f"{parts.scheme}://{parts.netloc}" if parts.netloc else "the endpoint"


def _endpoint_remedy() -> str:
    given = any(name.startswith("AWS_ENDPOINT_URL") for name in os.environ)
    return f"check {'AWS_ENDPOINT_URL' if given else 'endpoint_url in the AWS profile'} and that the server runs"


def _untrusted(error: SSLError) -> str:
    """Why there is no TLS connection, and the remedy."""
    if _certificate_is_refused(error.kwargs.get("error")):
        remedy = "name the file of its CA in AWS_CA_BUNDLE (or as ca_bundle in the AWS profile)"
        return f"the certificate of the server at {_server(error)} is not trusted; {remedy}"
    return f"the server at {_server(error)} does not speak TLS as wanted ({_one_line(error)}); {_endpoint_remedy()}"


def _certificate_is_refused(error: object) -> bool:
    """Whether an error, or one that it wraps, is Python's word for a certificate that does not verify."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return True
    wrapped = (*error.args, getattr(error, "reason", None)) if isinstance(error, Exception) else ()
    return any(_certificate_is_refused(inner) for inner in wrapped)


def may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later: the server is away or busy, rather than that it said no."""
    error = _answer(error)
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code")
        return status >= 500 or status in (408, 429) or code == "RequestTimeout"
    if isinstance(error, SSLError):
        return not _certificate_is_refused(error.kwargs.get("error"))
    return isinstance(error, BotoCoreError | Boto3Error) and not isinstance(error, _NOT_SET_UP)


def _answer(error: Exception) -> Exception:
    """The server's answer, where boto3 hides it behind an error of its own."""
    hidden = error.__context__ if isinstance(error, Boto3Error) else None
    return hidden if isinstance(hidden, ClientError) else error


def environment() -> dict[str, str]:
    """The variables of this process that say which S3 is meant, and how it is reached."""
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "HATCHERY_S3_"))}


def use_buckets(anonymous: Iterable[str], requester_pays: Iterable[str]) -> None:
    """Add buckets (names or globs) to those of the environment, for this process and its children: for entries."""
    for variable, buckets in ((ANONYMOUS, anonymous), (REQUESTER_PAYS, requester_pays)):
        if together := dict.fromkeys([*_buckets(variable), *buckets]):
            os.environ[variable] = ",".join(together)


def _buckets(variable: str) -> list[str]:
    return os.environ.get(variable, "").replace(",", " ").split()


def _is_listed(bucket: str, variable: str) -> bool:
    return any(fnmatch.fnmatchcase(bucket, glob) for glob in _buckets(variable))


def for_other_machines() -> dict[str, str]:
    """Variables that give another machine this one's view of S3: what is found in a profile here is not there.

    Credentials stay where they are: the other machine has its own, or is given them by its owner.
    """
    session = botocore.session.Session()
    found = {name: value for name, value in environment().items() if name in (ANONYMOUS, REQUESTER_PAYS)}
    if (url := _url(session)) != _url(session, ignore_configured_endpoint_urls=True):
        found["AWS_ENDPOINT_URL_S3"] = url
    if region := session.get_config_variable("region"):
        found["AWS_DEFAULT_REGION"] = region
    return found


def _url(session: botocore.session.Session, **options: Any) -> str:
    config = Config(signature_version=botocore.UNSIGNED, **options)  # needs no credentials
    return str(session.create_client("s3", config=config).meta.endpoint_url)


_making = threading.Lock()


def _renew_lock() -> None:
    """A fork may happen while another thread holds it."""
    global _making
    _making = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def client(bucket: str, attempts: int = ATTEMPTS) -> "S3Client":
    """A client for this process, a bucket and the present variables; kept for the next call."""
    anonymous, pays = _is_listed(bucket, ANONYMOUS), _is_listed(bucket, REQUESTER_PAYS)
    with _making:  # else each of sixteen threads that begin together would make its own, which takes half a second
        return _client(attempts, anonymous, pays, os.getpid(), tuple(environment().items()))


@functools.lru_cache(maxsize=16)
def _client(
    attempts: int, anonymous: bool, requester_pays: bool, pid: int, environment: tuple[tuple[str, str], ...]
) -> "S3Client":
    """`pid` and `environment` are keys: connections do not survive a fork, nor other credentials."""
    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=5,
        read_timeout=_ANSWER_S,
        max_pool_connections=16,
        signature_version=botocore.UNSIGNED if anonymous else None,
    )
    return _made(config, requester_pays)


def _made(config: Config, requester_pays: bool) -> "S3Client":
    """A client by the present variables and files."""
    session = botocore.session.Session()
    session.register_component("data_loader", descriptions())
    _check_bundle(session)
    made = boto3.session.Session(botocore_session=session).client("s3", config=config)
    if requester_pays:
        made.meta.events.register("provide-client-params.s3", _pay)
    return made


@functools.cache
def descriptions() -> Any:
    """What botocore knows of the service and its endpoints, for all clients: 12 MB that each would read for itself."""
    loader = botocore.session.Session().get_component("data_loader")
    for kind in ("service-2", "endpoint-rule-set-1"):
        loader.load_service_model("s3", kind)
    for name in ("endpoints", "partitions"):
        loader.load_data(name)
    return loader


def _pay(params: dict[str, Any], model: Any, **_: object) -> None:
    """Agree to be billed, in every request that can say so."""
    if model.input_shape is not None and "RequestPayer" in model.input_shape.members:
        params.setdefault("RequestPayer", "requester")


def _check_bundle(session: botocore.session.Session) -> None:
    """StorageError for a file of certificates that cannot be used: else each request would fail without naming it."""
    bundle = session.get_config_variable("ca_bundle")
    if not bundle:
        return
    try:
        ssl.create_default_context(cafile=os.fspath(bundle))
    except OSError as error:  # also of ssl: no certificate in it
        name = "AWS_CA_BUNDLE" if "AWS_CA_BUNDLE" in os.environ else "ca_bundle of the AWS profile"
        raise StorageError(
            f"{name} {bundle!r} is no file of certificates ({error.strerror or error}); correct the path"
        ) from error


def is_missing(error: ClientError) -> bool:
    """Whether the object is not there, or ends before the range that was asked for."""
    return str(error.response.get("Error", {}).get("Code", "")) in ("NoSuchKey", "404", "InvalidRange", "416")


def read(uri: str, offset: int = 0, size: int | None = None, attempts: int = ATTEMPTS, version: str = "") -> bytes:
    """The object's bytes, or `size` of them from `offset`.

    version: the ETag that it must have. Raises StorageError where it has another.
    """
    bucket, key = split_s3(uri)
    asked = {"Bucket": bucket, "Key": key}
    if size is not None:
        asked["Range"] = f"bytes={offset}-{offset + size - 1}"
    if version:
        asked["IfMatch"] = f'"{version}"'

    def body() -> bytes:
        answer = client(bucket, 1).get_object(**asked)  # type: ignore[arg-type]
        tag = answer.get("ETag", "").strip('"')
        if version and tag and tag != version:  # of a server that does not know the condition
            raise StorageError(f"{uri}: {_CHANGED}")
        return answer["Body"].read()

    if attempts <= ATTEMPTS:
        return _again(body, _READ_ATTEMPTS, _READ_S)
    return _again(body, _PATIENT_READ_ATTEMPTS, _PATIENT_READ_S)


def _again(call: Callable[[], T], attempts: int, until_s: float) -> T:
    """Repeat a call of one request while its error may pass, waiting longer each time: the only layer that does."""
    begin = time.monotonic()
    for attempt in range(attempts):
        try:
            return call()
        except (BotoCoreError, Boto3Error, ClientError) as error:
            wait_s = min(0.2 * 2**attempt, 13.0) * random.uniform(0.75, 1.25)  # readers must not come back all at once
            late = time.monotonic() + wait_s - begin > until_s
            if attempt == attempts - 1 or late or not may_pass(error):
                raise
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def write(uri: str, data: bytes, attempts: int = ATTEMPTS) -> None:
    """One put: readers see the old object or the new one."""
    bucket, key = split_s3(uri)
    client(bucket, attempts).put_object(Bucket=bucket, Key=key, Body=data)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Put where no object is; False where one is.

    The object carries this call's mark, so that a repeated request after a lost answer still knows its own.
    """
    bucket, key = split_s3(uri)
    mark = uuid.uuid4().hex
    for attempt in range(_CONDITIONAL_ATTEMPTS):
        try:
            client(bucket).put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", Metadata={"put-by": mark})
            return True
        except ClientError as error:
            status = _status(error)
            if status == 412:
                return client(bucket).head_object(Bucket=bucket, Key=key)["Metadata"].get("put-by") == mark
            if status != 409 or attempt == _CONDITIONAL_ATTEMPTS - 1:  # 409: another put is under way
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


def exists(uri: str) -> bool:
    """Whether the object is there."""
    bucket, key = split_s3(uri)
    try:
        client(bucket).head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if _status(error) == 404:
            return False
        raise
    return True


def head(uri: str, attempts: int = ATTEMPTS) -> tuple[int, str]:
    """(size, ETag) of an object."""
    bucket, key = split_s3(uri)
    answer = client(bucket, attempts).head_object(Bucket=bucket, Key=key)
    return answer["ContentLength"], answer["ETag"].strip('"')


def objects(uri: str, attempts: int = ATTEMPTS, markers: bool = False) -> Iterator[tuple[str, int, str]]:
    """(key below the prefix, size, ETag) of every object below `uri`, in the server's order.

    markers: also the objects that some tools write for an empty folder, whose keys end in /.
    """
    bucket, prefix = split_s3(uri)
    prefix = prefix and prefix + "/"
    for page in client(bucket, attempts).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", []):
            if markers or not entry["Key"].endswith("/"):
                yield entry["Key"].removeprefix(prefix), entry["Size"], entry["ETag"].strip('"')


def upload(file: BinaryIO, uri: str, attempts: int = ATTEMPTS) -> None:
    """Upload an open file, in parts where it is large; it appears when complete."""
    bucket, key = split_s3(uri)
    parts = TransferConfig(multipart_threshold=_MULTIPART_BYTES)
    client(bucket, attempts).upload_fileobj(file, bucket, key, Config=parts)


def download(uri: str, file: BinaryIO) -> None:
    """Download into an open file of the disk, in parts side by side, all of one version of the object."""
    size, version = head(uri)

    def part(offset: int) -> None:
        data = read(uri, offset, min(_DOWNLOAD_BYTES, size - offset), version=version)
        os.pwrite(file.fileno(), data, offset)

    pool = ThreadPoolExecutor(_DOWNLOADS)
    try:
        list(pool.map(part, range(0, size, _DOWNLOAD_BYTES)))
    finally:
        pool.shutdown(cancel_futures=True)


def copy(source: str, target: str, attempts: int = ATTEMPTS) -> None:
    """Copy an object within the server."""
    (bucket, key), (to_bucket, to_key) = split_s3(source), split_s3(target)
    client(to_bucket, attempts).copy({"Bucket": bucket, "Key": key}, to_bucket, to_key)


def delete(uris: Iterable[str], attempts: int = ATTEMPTS) -> None:
    """Delete objects; nothing happens where there is none."""
    _delete(map(split_s3, uris), attempts)


def delete_below(uri: str, attempts: int = ATTEMPTS) -> None:
    """Delete every object below `uri`."""
    bucket, prefix = split_s3(uri)
    _delete(((bucket, f"{prefix}/{path}") for path, _, _ in objects(uri, attempts, markers=True)), attempts)


def _delete(keys: Iterable[tuple[str, str]], attempts: int) -> None:
    """One by one: servers disagree about the checksum header of the multi-object request."""

    def delete_one(place: tuple[str, str]) -> None:
        bucket, key = place
        client(bucket, attempts).delete_object(Bucket=bucket, Key=key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(delete_one, keys))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


_OTHER_THERE = (404, 409, 412)  # answers to a condition that does not hold
SHORT_REQUEST_S = 20
"""What a call of those below takes at most: two tries, each with 3 s to connect and 5 s to be answered, and a wait."""


def read_tagged(uri: str) -> tuple[bytes, str] | None:
    """A small object's bytes and ETag, or None where there is none; within SHORT_REQUEST_S."""
    bucket, key = split_s3(uri)
    try:
        answer = _short_client(bucket).get_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if is_missing(error):
            return None
        raise
    return answer["Body"].read(), answer["ETag"]


def replace(uri: str, data: bytes, tag: str) -> str | None:
    """Put in the place of the object with an ETag; the new one's ETag, None where another is there, or none.

    Where the server does not compare ETags, what is there is read before, and whoever writes in between is overwritten.
    Takes SHORT_REQUEST_S at most, or twice that.
    """
    bucket, key = split_s3(uri)
    put = functools.partial(_short_client(bucket).put_object, Bucket=bucket, Key=key, Body=data)
    if not _compares_tags(bucket, key, os.getpid(), tuple(environment().items())):
        found = read_tagged(uri)
        return put()["ETag"] if found is not None and found[1] == tag else None
    try:
        return put(IfMatch=tag)["ETag"]
    except ClientError as error:
        if _status(error) not in _OTHER_THERE:
            raise
    found = read_tagged(uri)
    return found[1] if found is not None and found[0] == data else None  # the answer to the first try was lost


def delete_tagged(uri: str, tag: str) -> None:
    """Delete the object with an ETag; nothing happens where another is there, or none."""
    bucket, key = split_s3(uri)
    delete = functools.partial(_short_client(bucket).delete_object, Bucket=bucket, Key=key)
    try:
        if _compares_tags(bucket, key, os.getpid(), tuple(environment().items())):
            delete(IfMatch=tag)
        elif (found := read_tagged(uri)) is not None and found[1] == tag:
            delete()
    except ClientError as error:
        if _status(error) not in _OTHER_THERE:
            raise


@functools.lru_cache(maxsize=16)
def _compares_tags(bucket: str, key: str, pid: int, environment: tuple[tuple[str, str], ...]) -> bool:
    """Whether the server takes a put for the right ETag, and no other; some ignore the header, some take none."""
    probe = f"{key}.probe-{uuid.uuid4().hex}"
    client = _short_client(bucket)
    put = functools.partial(client.put_object, Bucket=bucket, Key=probe)
    try:
        put(IfMatch=put(Body=b"1")["ETag"], Body=b"2")
        put(IfMatch=f'"{"0" * 32}"', Body=b"3")
    except ClientError as error:
        if _status(error) >= 500:
            raise
        return client.get_object(Bucket=bucket, Key=probe)["Body"].read() == b"2"
    finally:
        client.delete_object(Bucket=bucket, Key=probe)
    return False


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _short_client(bucket: str) -> "S3Client":
    return _made_short(_is_listed(bucket, REQUESTER_PAYS), os.getpid(), tuple(environment().items()))


@functools.lru_cache(maxsize=4)
def _made_short(requester_pays: bool, pid: int, environment: tuple[tuple[str, str], ...]) -> "S3Client":
    """As `_client`, with connections of its own: no transfer holds them up."""
    retries: Any = {"mode": "standard", "total_max_attempts": 2}
    return _made(Config(retries=retries, connect_timeout=3, read_timeout=5), requester_pays)
