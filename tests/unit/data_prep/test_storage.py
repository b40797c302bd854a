"""Storage on a real disk and on a real S3 server: the same behaviour, and errors that name URI and remedy."""

import errno
import hashlib
import http.server
import os
import stat
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import storage
from data_prep.storage import StorageError, join, normalise
from tests.faulty_proxy import Faults, faulty_proxy
from tests.shared_data import ROOT

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.integration)])
def root(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "root")
    return join(request.getfixturevalue("s3").uri, uuid.uuid4().hex)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket//a///b/", "s3://bucket//a///b"),
        ("s3://bucket", "s3://bucket"),
        ("file:///data/a%20b/", "/data/a b"),
        ("/data//x/../y/", "/data/y"),
        ("~", os.path.expanduser("~")),
        ("data", os.path.abspath("data")),
    ],
)
def test_normalise(uri, expected):
    assert normalise(uri) == expected
    assert normalise(normalise(uri)) == expected


@pytest.mark.parametrize(
    ("uri", "message"),
    [("", "is empty"), ("s3://", "names no bucket"), ("gs://b/k", "scheme gs:// is unknown")],
)
def test_normalise_refuses(uri, message):
    with pytest.raises(StorageError, match=message):
        normalise(uri)


@given(st.lists(st.text("ab/", min_size=1), max_size=4))
def test_join_never_makes_an_empty_part(parts):
    uri = join("s3://bucket/prefix", *parts)
    assert "//" not in uri.removeprefix("s3://")
    assert not uri.endswith("/")
    assert uri.startswith("s3://bucket/prefix")


def test_write_read_replace_delete(root):
    uri = join(root, "a/b.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, b"second version")
    assert storage.exists(uri)
    assert not storage.exists(join(root, "a"))  # a folder is no file
    assert storage.read_bytes(uri) == b"second version"
    assert storage.read_range(uri, 7, 4) == b"vers"
    assert storage.read_range(uri, 7, 0) == b""
    assert storage.sha256_of(uri) == hashlib.sha256(b"second version").hexdigest()
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_an_empty_file(root):
    storage.write_bytes(join(root, "empty"), b"")
    assert storage.read_bytes(join(root, "empty")) == b""
    assert storage.sha256_of(join(root, "empty")) == hashlib.sha256().hexdigest()


def test_a_short_range_is_an_error(root):
    uri = join(root, "short")
    storage.write_bytes(uri, b"12345")
    with pytest.raises(StorageError, match="short: 2 of 9 bytes at 3"):
        storage.read_range(uri, 3, 9)


def test_a_missing_file_is_an_error_that_names_it(root):
    for read in (storage.read_bytes, storage.sha256_of):
        with pytest.raises(StorageError, match=r"nothing: .*(not exist|no such object)"):
            read(join(root, "nothing"))


def test_put_if_absent_lets_one_of_many_win(root):
    uri = join(root, "lock")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.put_if_absent(uri, b"owner %d" % i), range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == b"owner %d" % won.index(True)
    assert not storage.put_if_absent(uri, b"late")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_put_if_absent_without_hard_links(tmp_path, monkeypatch, number):
    def refuse(*names: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    test_put_if_absent_lets_one_of_many_win(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_folder_that_refuses_the_file_itself_is_named(tmp_path, monkeypatch):
    """No second way where the first one failed for another reason, and nothing half-written where the disk is full."""
    numbers, flushed = [errno.ENOSPC, errno.EPERM], []

    def link(*names: object) -> None:
        raise OSError(numbers[0], os.strerror(numbers[0]))

    def fsync(number: int) -> None:
        flushed.append(number)
        if len(flushed) == 3:  # of the file that the second way created
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "fsync", fsync)
    for expected in (1, 3):
        with pytest.raises(StorageError, match="the disk is full"):
            storage.put_if_absent(str(tmp_path / "lock"), b"mine")
        assert len(flushed) == expected
        assert list(tmp_path.iterdir()) == []
        numbers.pop(0)


def test_listing_is_sorted_relative_and_fresh(root):
    assert storage.list_files(root) == []
    for path in ("b/2", "a", "b/10", "B", "b.c", "ä"):
        storage.write_bytes(join(root, path), path.encode())
    listed = storage.list_files(root)
    assert [info.path for info in listed] == ["B", "a", "b.c", "b/10", "b/2", "ä"]
    assert [info.size for info in listed] == [1, 1, 3, 4, 3, 2]
    assert all(storage.read_bytes(info.uri) == info.path.encode() for info in listed)
    storage.write_bytes(join(root, "new"), b"")
    assert len(storage.list_files(root)) == 7


def test_a_version_changes_with_the_content(root):
    storage.write_bytes(join(root, "x"), b"one")
    before = storage.list_files(root)
    assert storage.list_files(root) == before
    storage.write_bytes(join(root, "x"), b"two")
    assert storage.list_files(root)[0].version != before[0].version


def test_delete_tree_takes_just_that_folder(root):
    for path in ("run/1", "run/deep/2", "run-2/3"):
        storage.write_bytes(join(root, path), b"x")
    storage.delete_tree(join(root, "run"))
    storage.delete_tree(join(root, "run"))
    assert [info.path for info in storage.list_files(root)] == ["run-2/3"]


@pytest.mark.parametrize("uri", ["/", "s3://bucket", "s3://bucket/"])
def test_delete_tree_refuses_everything(uri):
    with pytest.raises(StorageError, match="refusing to delete all of it"):
        storage.delete_tree(uri)


def test_upload_and_download(root, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(9 * 2**20))  # boto3 fetches it in two parts
    storage.upload(source, join(root, "copy"))
    storage.download(join(root, "copy"), tmp_path / "back" / "again")
    assert (tmp_path / "back" / "again").read_bytes() == source.read_bytes()
    assert storage.sha256_of(join(root, "copy")) == hashlib.sha256(source.read_bytes()).hexdigest()


def test_a_failed_download_leaves_nothing(root, tmp_path):
    with pytest.raises(StorageError, match="absent: "):
        storage.download(join(root, "absent"), tmp_path / "target" / "file")
    assert not list(tmp_path.glob("target/*"))


def test_check_writable_leaves_nothing(root):
    storage.check_writable(root)
    assert storage.list_files(root) == []


def test_filesystem_for_arrow_writes_what_storage_reads(root):
    filesystem, path = storage.filesystem(root)
    filesystem.create_dir(path, recursive=True)
    with filesystem.open_output_stream(f"{path}/by-arrow") as stream:
        stream.write(b"arrow")
    assert storage.read_bytes(join(root, "by-arrow")) == b"arrow"


def test_new_files_have_the_usual_permissions(tmp_path):
    storage.write_bytes(str(tmp_path / "file"), b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_links_are_followed_and_a_dangling_one_is_marked(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "image").write_bytes(b"x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "data")
    assert [info.path for info in storage.list_files(str(tmp_path / "root"))] == ["linked/image"]
    (tmp_path / "root" / "dangling").symlink_to(tmp_path / "gone")
    found = [(info.path, info.version == storage.DANGLING) for info in storage.list_files(str(tmp_path / "root"))]
    assert found == [("dangling", True), ("linked/image", False)]


@pytest.mark.parametrize("deeper", ["x", "x/y"])
def test_a_file_in_the_way_is_explained(tmp_path, deeper):
    (tmp_path / "file").write_bytes(b"")
    uri = str(tmp_path / "file" / deeper)
    for write in (
        storage.check_writable,
        lambda u: storage.put_if_absent(u, b""),
        lambda u: storage.upload(__file__, u),
    ):
        with pytest.raises(StorageError, match=r"file/x.*a part of the path is a file") as caught:
            write(uri)
        assert "\n" not in str(caught.value)


def test_a_read_only_folder_is_explained(tmp_path):
    """In a process that gives up root's rights, if it has them: root may write anywhere."""
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o555)
    code = f"""
import os
from data_prep.storage import check_writable
if os.geteuid() == 0:
    os.seteuid(65534)
check_writable({str(folder)!r})"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"StorageError: {folder}: permission is denied; change the folder's permissions" in run.stderr


def test_uploading_a_missing_file_names_that_file(tmp_path):
    with pytest.raises(StorageError, match=f"^{tmp_path}/gone: it does not exist"):
        storage.upload(tmp_path / "gone", str(tmp_path / "target"))


def refused(monkeypatch, uri, **environment):
    """The message of check_writable under these AWS_* variables."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError) as caught:
        storage.check_writable(uri)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.integration
def test_a_wrong_secret_is_explained(s3, monkeypatch):
    message = refused(monkeypatch, s3.uri, AWS_SECRET_ACCESS_KEY="wrong")
    assert message == f"{s3.uri}: the secret key is wrong; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def failure(call, *arguments):
    with pytest.raises(StorageError) as caught:
        call(*arguments)
    return caught.value


@pytest.mark.integration
def test_what_the_server_refuses_does_not_pass(s3, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100)
    assert not storage.may_pass(failure(storage.read_bytes, join(s3.uri, "absent")))
    assert not storage.may_pass(failure(storage.read_bytes, "s3://no-such-bucket/x"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for call in (lambda: storage.read_bytes(s3.uri), lambda: storage.upload(source, join(s3.uri, "x"))):
        assert not storage.may_pass(failure(call))


@pytest.mark.integration
def test_what_a_busy_or_absent_server_fails_at_may_pass(s3, monkeypatch):
    storage.write_bytes(join(s3.uri, "x"), b"x")
    with faulty_proxy(s3.endpoint, Faults(1.0)):
        assert storage.may_pass(failure(storage.read_bytes, join(s3.uri, "x")))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert storage.may_pass(failure(storage.exists, join(s3.uri, "x")))


def test_what_is_wrong_with_a_path_does_not_pass(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert not storage.may_pass(failure(storage.write_bytes, str(tmp_path / "file" / "x"), b""))
    assert not storage.may_pass(failure(storage.read_bytes, str(tmp_path / "absent")))
    assert not storage.may_pass(failure(storage.delete_tree, "/"))


@pytest.mark.integration
def test_an_unknown_access_key_is_explained(s3, monkeypatch):
    assert "the access key is unknown" in refused(monkeypatch, s3.uri, AWS_ACCESS_KEY_ID="nobody")


@pytest.mark.integration
def test_a_missing_bucket_is_explained(s3, monkeypatch):
    message = refused(monkeypatch, "s3://no-such-bucket/runs")
    assert message == "s3://no-such-bucket/runs: the bucket does not exist; create it or correct the URI"


@pytest.mark.integration
def test_a_denied_look_is_not_taken_for_absence(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="access is denied"):
        storage.exists(join(s3.uri, "x"))
    with pytest.raises(StorageError, match="the secret key is wrong"):
        storage.put_if_absent(join(s3.uri, "x"), b"")


def test_an_unreachable_server_is_explained(monkeypatch):
    message = refused(monkeypatch, "s3://bucket/runs", AWS_ENDPOINT_URL="http://127.0.0.1:9", **CREDENTIALS)
    assert message == (
        "s3://bucket/runs: the server at http://127.0.0.1:9 does not answer; "
        "check AWS_ENDPOINT_URL and that the server runs"
    )


def test_an_endpoint_that_is_no_url_is_explained(monkeypatch):
    message = refused(monkeypatch, "s3://bucket/runs", AWS_ENDPOINT_URL="localhost", **CREDENTIALS)
    assert "Invalid endpoint: localhost; check AWS_ENDPOINT_URL" in message


def test_an_error_of_whoever_writes_stays_what_it_is(root):
    def fail():
        with storage.writing(join(root, "x")) as file:
            file.write(b"half")
            raise ValueError("not mine")

    with pytest.raises(ValueError, match=r"^not mine$") as caught:
        fail()
    assert not isinstance(caught.value, StorageError)
    assert not storage.exists(join(root, "x"))


def test_absent_credentials_are_explained(monkeypatch):
    for name in CREDENTIALS:
        monkeypatch.delenv(name, raising=False)
    environment = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/nowhere", "HOME": "/nowhere"}
    message = refused(monkeypatch, "s3://bucket/runs", AWS_ENDPOINT_URL="http://127.0.0.1:9", **environment)
    assert "there are no complete S3 credentials; check AWS_ACCESS_KEY_ID" in message


class HalfAnAnswer(http.server.BaseHTTPRequestHandler):
    """Breaks off in the middle of the first `failures` answers."""

    protocol_version = "HTTP/1.1"
    failures = 1
    body = b"whole object"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        cls = type(self)
        cls.failures -= 1
        self.wfile.write(self.body if cls.failures < 0 else self.body[:5])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("failures", [1, 9])
def test_a_body_that_breaks_off_is_read_again(monkeypatch, failures):
    handler = type("Handler", (HalfAnAnswer,), {"failures": failures})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("data_prep.s3._READ_ATTEMPTS", 3)
    try:
        if failures == 1:
            assert storage.read_bytes("s3://bucket/key") == b"whole object"
        else:
            with pytest.raises(StorageError, match=r"^s3://bucket/key: "):
                storage.read_bytes("s3://bucket/key")
    finally:
        server.shutdown()
        server.server_close()
