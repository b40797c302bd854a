"""One view of S3: AWS's own settings decide for every reader alike; keys, bucket settings, and what refuses."""

import datetime
import io
import ipaddress
import os
import socket
import tarfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from data_prep import duplicates, listing, loader, read_ahead, s3, sources, storage
from data_prep.image_files import PassedOver
from data_prep.plan import Plan
from data_prep.shard import ShardSettings, plan_shards, write_shard
from data_prep.storage import StorageError
from tests import literal_s3 as literal_s3_module
from tests.literal_s3 import CREDENTIALS, LiteralS3, literal_s3
from tests.unit.data_prep.odd_files import good_files


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in s3.environment():
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiteralS3]:
    with literal_s3(monkeypatch) as running:
        running.objects["bucket/x"] = b"content"
        yield running


@pytest.fixture
def reached(server: LiteralS3, monkeypatch: pytest.MonkeyPatch) -> LiteralS3:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    return server


def use_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    (tmp_path / "config").write_text(text)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))


def read_by_all(uri: str) -> list[bytes]:
    """The object as the loader and sharding read it, and as Ray Train does."""
    filesystem, path = storage.filesystem(uri)
    with filesystem.open_input_stream(path) as stream:
        return [storage.read_bytes(uri), stream.read()]


def try_once(monkeypatch: pytest.MonkeyPatch) -> None:
    working = s3.client
    monkeypatch.setattr(s3, "client", lambda bucket, *_: working(bucket, 1))


def refusal(uri: str = "s3://bucket/x") -> str:
    with pytest.raises(StorageError) as caught:
        storage.read_bytes(uri)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(uri)
    return str(caught.value)


PROFILES = {
    "endpoint_url": "[profile lab]\nendpoint_url = {url}\nregion = eu-central-1\n",
    "services": (
        "[profile lab]\nendpoint_url = http://127.0.0.1:9\nservices = lab\nregion = eu-central-1\n"
        "[services lab]\ns3 =\n  endpoint_url = {url}\n"
    ),
}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_says_where_s3_is_for_every_reader(
    server: LiteralS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profile: str
) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    keys = "aws_access_key_id = someone\naws_secret_access_key = secret\n"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    use_config(monkeypatch, tmp_path, PROFILES[profile].format(url=server.url))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    (tmp_path / "credentials").write_text(f"[lab]\n{keys}")
    assert read_by_all("s3://bucket/x") == [b"content", b"content"]
    assert {"/eu-central-1/s3/" in headers["Authorization"] for _, headers in server.requests} == {True}
    assert s3.for_other_machines() == {"AWS_ENDPOINT_URL_S3": server.url, "AWS_DEFAULT_REGION": "eu-central-1"}


def test_the_variable_for_s3_goes_before_the_one_for_all_services(
    server: LiteralS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    assert read_by_all("s3://bucket/x") == [b"content", b"content"]


def test_configured_endpoints_can_be_ignored_as_by_awss_own_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert "amazonaws.com" in s3.client("bucket").meta.endpoint_url
    assert "AWS_ENDPOINT_URL_S3" not in s3.for_other_machines()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[default]\n", r"profile \(lab\) could not be found; correct AWS_PROFILE"),
        ("[profile lab\n", r"Unable to parse config file: .*; correct AWS_PROFILE and the files"),
        (
            "[profile lab]\nservices = gone\nregion = us-east-1\n",
            r"\"gone\" services configuration does not exist.*; corr",
        ),
        (
            "[profile lab]\nca_bundle = /nowhere.pem\n",
            r"ca_bundle of the AWS profile '/nowhere.pem' is no file of cert",
        ),
        ("[profile lab]\nendpoint_url = http://127.0.0.1:9\n", "check endpoint_url in the AWS profile and that"),
    ],
)
def test_a_wrong_profile_is_one_line(
    server: LiteralS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str, words: str
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "lab")
    try_once(monkeypatch)
    use_config(monkeypatch, tmp_path, config)
    with pytest.raises(StorageError, match=words) as caught:
        storage.read_bytes("s3://bucket/x")
    assert "\n" not in str(caught.value)


def certificate(folder: Path) -> Path:
    """A self-signed certificate for 127.0.0.1 with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lab")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "ca.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return folder / "server.pem"


@pytest.fixture
def by_tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LiteralS3]:
    with literal_s3(monkeypatch, certificate(tmp_path)) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        running.objects["bucket/x"] = b"content"
        yield running


@pytest.mark.parametrize("way", ["variable", "profile"])
def test_a_private_ca_is_trusted_where_it_is_named(
    by_tls: LiteralS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    if way == "variable":
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    else:
        use_config(monkeypatch, tmp_path, f"[default]\nca_bundle = {tmp_path}/ca.pem\n")
    assert read_by_all("s3://bucket/x") == [b"content", b"content"]


def test_a_private_ca_that_is_not_named_is_one_line(by_tls: LiteralS3, monkeypatch: pytest.MonkeyPatch) -> None:
    try_once(monkeypatch)
    message = refusal()
    assert (
        f"the certificate of the server at {by_tls.url} is not trusted; name the file of its CA in AWS_CA_BUN"
        in message
    )
    with pytest.raises(StorageError) as caught:
        storage.exists("s3://bucket/x")
    assert not storage.may_pass(caught.value)


def test_a_bundle_that_is_none_is_named(reached: LiteralS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_bytes(b"no certificate")
    for path in ("/nowhere.pem", str(tmp_path), str(tmp_path / "empty.pem")):
        monkeypatch.setenv("AWS_CA_BUNDLE", path)
        with pytest.raises(
            StorageError, match=f"^AWS_CA_BUNDLE '{path}' is no file of certificates .*; correct the path"
        ):
            storage.read_bytes("s3://bucket/x")


def test_tls_where_there_is_none_is_one_line(server: LiteralS3, monkeypatch: pytest.MonkeyPatch) -> None:
    try_once(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.replace("http://", "https://"))
    assert "does not speak TLS as wanted" in refusal()
    assert "check AWS_ENDPOINT_URL" in refusal()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "RequestTimeTooSkewed", "this machine's clock differs from the server's; set it"),
        (400, "ExpiredToken", "the session token has expired; log in again"),
        (400, "InvalidToken", "the session token is wrong; log in again"),
        (400, "AuthorizationHeaderMalformed", "the region is wrong; set AWS_DEFAULT_REGION"),
        (301, "PermanentRedirect", "the bucket lies in another region; set AWS_DEFAULT_REGION"),
        (400, "IllegalLocationConstraintException", "the bucket lies in another region"),
        (403, "AccessDenied", "access is denied; check AWS_ACCESS_KEY_ID .* storage.s3.anonymous .*requester_pays"),
        (403, "InvalidObjectState", r"it lies in an archive \(Glacier\); restore it first"),
        (404, "NoSuchBucket", "the bucket does not exist; create it or correct the URI"),
    ],
)
def test_what_a_server_refuses_is_one_line_with_the_remedy(
    reached: LiteralS3, status: int, code: str, words: str
) -> None:
    reached.refusal = (status, code)
    begin = time.monotonic()
    with pytest.raises(StorageError, match=words) as caught:
        storage.read_bytes("s3://bucket/x")
    assert "\n" not in str(caught.value)
    assert not storage.may_pass(caught.value)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("status", "words"), [(400, "a wrong region or an expired session"), (403, "access is denied")]
)
def test_a_refusal_without_a_body_has_a_remedy(reached: LiteralS3, status: int, words: str) -> None:
    reached.refusal = (status, "")
    with pytest.raises(StorageError, match=words):
        storage.exists("s3://bucket/x")


def test_a_server_that_redirects_every_request_is_one_line(reached: LiteralS3) -> None:
    reached.refusal = (301, "")
    reached.region = ""
    assert "the server redirects every request, as one that wants https:// does; check AWS_ENDPOINT_URL" in refusal()


KEYS = ("set/a.png", "set//a.png", "set///a.png", "/set/a.png", "set/a b.png", "set/ü.png", "set/a?x=1.png")
KEYS += ("set/a#b.png", "set/a%2Fb.png", "set/a+b.png", "set/a&b.png", "set/a.png/b.png", "//a.png", "set/a:b@c.png")


def test_every_key_is_another_object(reached: LiteralS3) -> None:
    reached.objects = {f"bucket/{key}": key.encode() for key in KEYS}
    listed = storage.list_files("s3://bucket")
    assert sorted(info.path for info in listed) == sorted(KEYS)
    for info in listed:
        assert storage.read_bytes(info.uri) == info.path.encode()
        assert storage.read_range(info.uri, 0, info.size) == info.path.encode()
        assert storage.file_info(info.uri).size == len(info.path.encode())
        assert read_by_all(info.uri) == [info.path.encode()] * 2
    assert [info.path for info in storage.list_files("s3://bucket/set/")] == sorted(
        key.removeprefix("set/") for key in KEYS if key.startswith("set/")
    )


def test_images_under_such_keys_become_samples_of_their_own(reached: LiteralS3, tmp_path: Path) -> None:
    images = dict(zip(KEYS, good_files().values(), strict=False))
    reached.objects = {f"bucket/{key}": data for key, data in images.items()}
    listing = "\n".join(f"s3://bucket/{key}" for key in images)
    (tmp_path / "list.txt").write_text(listing)
    for source in ("s3://bucket", str(tmp_path / "list.txt")):
        items = sources.list_items(source)
        assert {item.uri.removeprefix("s3://bucket/"): sources.read_item(item) for item in items} == images
        assert len({item.key for item in items}) == len(images)
        assert all("//" not in item.key and not item.key.startswith("/") for item in items)
        (plan,) = plan_shards(items, ShardSettings(min_side_px=1, samples_per_shard=len(items)))
        info = write_shard(plan, str(tmp_path / f"shards-of-{Path(source).name}"))
        assert len(info.samples) == len({sample.key for sample in info.samples}) == len(images)


@pytest.mark.parametrize("key", ["set/../a.png", "set/./a.png", "../a.png", "set/.."])
def test_keys_that_servers_read_as_others_are_refused(reached: LiteralS3, key: str) -> None:
    reached.objects = {f"bucket/{key}": b"here", "bucket/a.png": b"another", "bucket/set/a.png": b"another"}
    with pytest.raises(StorageError, match=r"has the part \. or \.\., which servers read as another key; rename"):
        storage.read_bytes(f"s3://bucket/{key}")
    found = {item.uri: item.flaw for item in sources.list_items("s3://bucket")}
    if key.endswith("png"):
        assert found == {f"s3://bucket/{key}": storage.ODD_KEY, "s3://bucket/a.png": "", "s3://bucket/set/a.png": ""}


@pytest.mark.parametrize("uri", ["s3://bucket/a//", "s3://bucket/a.png//", "s3:///bucket/a", "s3://"])
def test_prefixes_that_name_nothing_clear_are_refused(uri: str) -> None:
    with pytest.raises(StorageError, match=r"empty part|names no bucket") as caught:
        storage.normalise(uri)
    assert repr(uri) in str(caught.value)


def test_public_buckets_are_read_unsigned_and_others_signed(
    reached: LiteralS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv(s3.ANONYMOUS, "other, public-*")
    reached.objects["public-1/x"] = b"public"
    assert read_by_all("s3://public-1/x") == [b"public", b"public"]
    assert [info.path for info in storage.list_files("s3://public-1")] == ["x"]
    assert {headers["Authorization"] for _, headers in reached.requests} == {None}
    assert "there are no complete S3 credentials" in refusal()


def test_every_request_to_a_bucket_that_bills_its_readers_agrees_to_it(
    reached: LiteralS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(s3.REQUESTER_PAYS, "paid")
    monkeypatch.setattr(s3, "_MULTIPART_BYTES", 5 * 2**20)
    (tmp_path / "large").write_bytes(bytes(11 * 2**20))
    storage.write_bytes("s3://paid/x", b"1")
    storage.read_bytes("s3://paid/x")
    storage.read_range("s3://paid/x", 0, 1)
    storage.exists("s3://paid/x")
    storage.list_files("s3://paid")
    storage.put_if_absent("s3://paid/y", b"")
    storage.upload(tmp_path / "large", "s3://paid/large")
    storage.download("s3://paid/x", tmp_path / "x")
    s3.copy("s3://paid/x", "s3://paid/z")
    storage.delete_tree("s3://paid/x")
    storage.delete("s3://paid/x")
    kinds = {kind for kind, _ in reached.requests}
    assert kinds == {
        "PUT", "GET", "HEAD", "DELETE", "GET list-type", "POST uploads", "PUT partNumber", "POST uploadId"
    }  # fmt: skip
    assert {headers["x-amz-request-payer"] for _, headers in reached.requests} == {"requester"}
    reached.requests.clear()
    storage.read_bytes("s3://bucket/x")
    assert [headers["x-amz-request-payer"] for _, headers in reached.requests] == [None]


def test_buckets_of_a_config_join_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(s3.ANONYMOUS, "a b")
    monkeypatch.setenv(s3.REQUESTER_PAYS, "")
    s3.use_buckets(("b", "c"), ("d",))
    assert s3.for_other_machines() == {s3.ANONYMOUS: "a,b,c", s3.REQUESTER_PAYS: "d"}


def test_a_loaders_worker_sees_s3_as_its_parent_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "old")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "expired")
    loader._start_worker({"AWS_ACCESS_KEY_ID": "new", s3.ANONYMOUS: "public"}, 0)
    assert s3.environment() == {"AWS_ACCESS_KEY_ID": "new", s3.ANONYMOUS: "public"}


def pngs(count: int) -> dict[str, bytes]:
    """name -> bytes of images that are as long as each other and differ."""
    made = {}
    for number in range(count):
        file = io.BytesIO()
        Image.new("L", (64, 64), number).save(file, "BMP")
        made[f"{number:03d}.bmp"] = file.getvalue()
    assert len({len(data) for data in made.values()}) == 1
    return made


def count(server: LiteralS3, kind: str) -> int:
    return [asked for asked, _ in server.requests].count(kind)


@pytest.mark.parametrize("tags", ["md5", "others"])
def test_duplicates_are_told_by_etags_where_these_are_md5_sums(
    reached: LiteralS3, monkeypatch: pytest.MonkeyPatch, tags: str
) -> None:
    """A probe of each of as many images as are as long took 14 million requests."""
    if tags == "others":  # as KMS's encryption makes them: another one for each object
        monkeypatch.setattr(literal_s3_module, "tag", lambda data: uuid.uuid4().hex)
        monkeypatch.setattr(sources, "read_item", lambda item: storage.read_bytes(item.uri))
        monkeypatch.setattr(duplicates, "read_item", lambda item: storage.read_bytes(item.uri))
    monkeypatch.setattr(duplicates, "in_order", lambda call, arguments: (call(*given) for given in arguments))
    images = pngs(60)
    reached.objects = {f"bucket/set/{name}": data for name, data in images.items()}
    reached.objects["bucket/set/copy.bmp"] = images["007.bmp"]
    with Plan(sources.iter_items("s3://bucket/set"), ShardSettings()) as plan:
        reached.requests.clear()
        assert duplicates.find_duplicates(plan) == {"copy%2Ebmp": "007%2Ebmp"}
    assert count(reached, "GET") <= 18 if tags == "md5" else count(reached, "GET") >= 61


def test_an_object_that_changed_since_it_was_listed_is_not_sharded(reached: LiteralS3, tmp_path: Path) -> None:
    """Else its new bytes would stand under the old fingerprint."""
    reached.objects = {f"bucket/set/{name}": data for name, data in pngs(3).items()}
    (plan,) = plan_shards(sources.list_items("s3://bucket/set"), ShardSettings())
    reached.objects["bucket/set/001.bmp"] = pngs(9)["008.bmp"]
    with pytest.raises(StorageError, match=r"set/001.bmp: it has changed since it was listed; run the command again"):
        write_shard(plan, str(tmp_path))
    assert {headers["If-Match"] is None for kind, headers in reached.requests if kind == "GET"} == {False}
    assert not list(tmp_path.iterdir())


def test_a_local_file_that_changed_since_it_was_listed_is_not_sharded(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    path.write_bytes(pngs(1)["000.bmp"])
    (item,) = sources.list_items(str(tmp_path))
    os.utime(path, ns=(1, 1))
    with pytest.raises(StorageError, match=r"a.bmp: it has changed since it was listed"):
        sources.read_item(item)


def test_images_are_read_ahead_in_their_order_and_no_further_than_allowed(
    reached: LiteralS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pngs(30)
    reached.objects = {f"bucket/set/{name}": data for name, data in images.items()}
    items = sources.list_items("s3://bucket/set")
    size = items[0].size
    reading, most, lock = 0, 0, threading.Lock()

    def slow(item: sources.Item) -> bytes:
        nonlocal reading, most
        with lock:
            reading += 1
            most = max(most, reading)
        time.sleep(0.02)
        with lock:
            reading -= 1
        return sources.read_item(item)

    monkeypatch.setattr(read_ahead, "read_item", slow)
    for allowed, at_once in ((size, 1), (4 * size, 4), (100 * size, 16)):
        monkeypatch.setattr(read_ahead, "_AHEAD_BYTES", allowed)
        most = 0
        got = list(read_ahead.read_ahead(items))
        assert got == [(item, images[item.path]) for item in items]
        assert most == at_once


def test_a_tar_of_small_images_is_listed_by_few_requests(reached: LiteralS3) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in pngs(200).items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    reached.objects["bucket/a.tar"] = file.getvalue()
    items = sources.list_items("s3://bucket/a.tar")
    assert len(items) == 200
    assert count(reached, "GET") <= 2
    assert {item.path: sources.read_item(item) for item in items[::40]} == dict(list(pngs(200).items())[::40])


def test_a_server_that_never_answers_is_an_error_in_two_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """31 minutes, by six times five requests of a minute each. Here they are counted, at a fortieth of the time."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    config = s3.client("bucket").meta.config
    assert config.read_timeout * config.retries["total_max_attempts"] <= 120
    answer_s, accepted = s3._ANSWER_S, []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Thread(target=lambda: accepted.extend(iter(silent.accept, None)), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(s3, "_ANSWER_S", answer_s / 40)
        monkeypatch.setattr(s3, "_READ_S", s3._READ_S / 40)
        with pytest.raises(StorageError, match="does not answer"):
            storage.read_bytes("s3://bucket/x")
    assert 2 <= len(accepted) <= 140 / answer_s


def test_a_download_is_of_one_version(reached: LiteralS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(s3, "_DOWNLOAD_BYTES", 1000)
    for size in (0, 999, 1000, 5500):
        reached.objects["bucket/large"] = os.urandom(size)
        storage.download("s3://bucket/large", tmp_path / "large")
        assert (tmp_path / "large").read_bytes() == reached.objects["bucket/large"]
    working = s3.head
    monkeypatch.setattr(s3, "head", lambda uri, *given: (working(uri, *given)[0], "0" * 32))  # of before
    (tmp_path / "large").unlink()
    with pytest.raises(StorageError, match="it has changed since it was listed"):
        storage.download("s3://bucket/large", tmp_path / "large")
    assert not (tmp_path / "large").exists()


def test_a_source_is_listed_once_in_a_command(reached: LiteralS3) -> None:
    reached.objects = {f"bucket/set/{name}": data for name, data in pngs(5).items()}
    reached.objects |= {"bucket/set/._a.bmp": b"", "bucket/set/notes.txt": b""}
    source, said = "s3://bucket/set", []
    alone = sources.list_items(source)
    reached.requests.clear()
    with listing.listed_once(), listing.listed_once():
        for include in ((), ("00[12].bmp",), ()):
            passed_over = PassedOver()
            found = sources.list_items(source, include, passed_over=passed_over)
            assert found == [item for item in alone if not include or item.path in ("001.bmp", "002.bmp")]
            said.append(passed_over.describe())
        with Plan(sources.iter_items(source), ShardSettings()) as plan:
            assert plan.fingerprint == sources.fingerprint(sources.iter_items(source)) == sources.fingerprint(alone)
        both = zip(sources.iter_items(source), sources.iter_items(source), strict=True)
        assert [first for first, second in both if first == second] == alone
        assert count(reached, "GET list-type") == 1
    assert set(said) == {"passed over: 1 of the system's or a program's own (._a.bmp); 1 with other endings (.txt 1)"}
    sources.list_items(source)
    assert count(reached, "GET list-type") == 2


def test_who_cannot_begin_anew_waits_for_a_server_that_is_away_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    waits: list[float] = []
    monkeypatch.setattr(s3.time, "sleep", waits.append)
    for attempts, least, most in ((s3.ATTEMPTS, 9, 20), (s3.PATIENT_ATTEMPTS, 60, 120)):
        waits.clear()
        with pytest.raises(EndpointConnectionError):
            s3.read("s3://bucket/x", attempts=attempts)
        assert least < sum(waits) < most
