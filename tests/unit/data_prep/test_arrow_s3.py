"""The pyarrow file system that Ray Train gets, on a real S3 server: whole files, no half ones, errors with a reason."""

import os
import pickle
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pyarrow import fs

from data_prep import arrow_s3, s3, storage
from data_prep.storage import join
from tests.faulty_proxy import Faults, faulty_proxy
from tests.s3_server import S3Server

pytestmark = pytest.mark.integration


@pytest.fixture
def root(s3: S3Server) -> str:
    return join(s3.uri, uuid.uuid4().hex)


def at(uri: str) -> str:
    return uri.removeprefix("s3://")


def test_it_travels_to_other_processes_and_is_equal_there(root: str) -> None:
    storage.write_bytes(f"{root}/x", b"x")
    sent = pickle.loads(pickle.dumps(arrow_s3.file_system()))
    assert sent == arrow_s3.file_system()
    with sent.open_input_stream(at(f"{root}/x")) as stream:
        assert stream.read() == b"x"


def test_folders_are_copied_both_ways_byte_for_byte(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray copies them: several files at once, in chunks, a large one in parts."""
    monkeypatch.setattr(s3, "_MULTIPART_BYTES", 5 * 2**20)
    files = {f"rank-{number}": os.urandom(number) for number in range(20)} | {"large": os.urandom(13 * 2**20 + 5)}
    files["deep/er/x"] = b"deep"
    for name, data in files.items():
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).write_bytes(data)
    system = arrow_s3.file_system()
    fs.copy_files(str(tmp_path / "up"), at(root), destination_filesystem=system)
    assert {file.path: storage.read_bytes(file.uri) for file in storage.list_files(root)} == files
    fs.copy_files(at(root), str(tmp_path / "down"), source_filesystem=system, chunk_size=2**20)
    found = {file.path: Path(file.uri).read_bytes() for file in storage.list_files(str(tmp_path / "down"))}
    assert found == files


def test_what_is_there_and_what_is_not(root: str) -> None:
    for name in ("a/1", "a/b/2", "c", "ab"):
        storage.write_bytes(f"{root}/{name}", b"12")
    system = arrow_s3.file_system()
    infos = system.get_file_info(
        [at(f"{root}/{name}") for name in ("c", "a", "a/", "absent")] + [at(root).split("/")[0]]
    )
    kinds = [
        fs.FileType.File,
        fs.FileType.Directory,
        fs.FileType.Directory,
        fs.FileType.NotFound,
        fs.FileType.Directory,
    ]
    assert [info.type for info in infos] == kinds
    assert infos[0].size == 2
    below = system.get_file_info(fs.FileSelector(at(root)))
    assert {(info.base_name, info.is_file) for info in below} == {("a", False), ("ab", True), ("c", True)}
    every = system.get_file_info(fs.FileSelector(at(root), recursive=True))
    assert {info.path.removeprefix(f"{at(root)}/") for info in every} == {"a", "a/b", "a/1", "a/b/2", "ab", "c"}
    assert system.get_file_info(fs.FileSelector(at(f"{root}/absent"), allow_not_found=True)) == []
    for call in (
        lambda: system.get_file_info(fs.FileSelector(at(f"{root}/absent"))),
        lambda: system.open_input_stream(at(f"{root}/absent")),
        lambda: system.delete_dir_contents(at(f"{root}/absent")),
    ):
        with pytest.raises(FileNotFoundError, match=f"^{root}/absent: there is no such"):
            call()


def test_a_folder_is_deleted_with_its_marker_and_nothing_else(root: str) -> None:
    bucket, key = storage.split_s3(root)
    s3.client(bucket).put_object(Bucket=bucket, Key=f"{key}/run/", Body=b"")
    for name in ("run/1", "run/deep/2", "run-2/3", "other"):
        storage.write_bytes(f"{root}/{name}", b"x")
    system = arrow_s3.file_system()
    system.delete_dir(at(f"{root}/run"))
    system.delete_dir(at(f"{root}/run"))
    system.delete_file(at(f"{root}/other"))
    assert [file.path for file in storage.list_files(root)] == ["run-2/3"]
    assert system.get_file_info(at(f"{root}/run")).type == fs.FileType.NotFound
    system.move(at(f"{root}/run-2/3"), at(f"{root}/moved"))
    assert [file.path for file in storage.list_files(root)] == ["moved"]
    for whole in (
        lambda: system.delete_dir_contents(bucket),
        lambda: system.delete_dir_contents("", accept_root_dir=True),
    ):
        with pytest.raises(OSError, match="refusing to delete all"):
            whole()


def test_a_file_appears_when_it_is_closed_and_never_in_part(root: str) -> None:
    system = arrow_s3.file_system()
    stream = system.open_output_stream(at(f"{root}/x"))
    stream.write(b"one")
    assert not storage.exists(f"{root}/x")
    stream.close()
    stream.close()
    assert storage.read_bytes(f"{root}/x") == b"one"
    forgotten = system.open_output_stream(at(f"{root}/y"))
    forgotten.write(b"half")
    del forgotten
    assert not storage.exists(f"{root}/y")
    with pytest.raises(OSError, match=r"cannot be appended to"):
        system.open_append_stream(at(f"{root}/x"))


def test_any_part_of_a_file_can_be_read(root: str) -> None:
    data = os.urandom(3 * 2**20)
    storage.write_bytes(f"{root}/x", data)
    with arrow_s3.file_system().open_input_file(at(f"{root}/x")) as file:
        assert file.size() == len(data)
        file.seek(2**20 - 5)
        assert file.read(10) == data[2**20 - 5 : 2**20 + 5]
        assert file.read_at(7, 100) == data[100:107]
        file.seek(0)
        assert file.read() == data


def test_files_written_at_once_are_all_there(root: str) -> None:
    system = arrow_s3.file_system()

    def write(number: int) -> None:
        with system.open_output_stream(at(f"{root}/{number:02}")) as stream:
            stream.write(b"%d" % number * 1000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(16)))
    assert [storage.read_bytes(file.uri) for file in storage.list_files(root)] == [b"%d" % n * 1000 for n in range(16)]


def test_busy_answers_resets_and_short_bodies_change_nothing(root: str, s3: S3Server) -> None:
    data = os.urandom(3 * 2**20)
    storage.write_bytes(f"{root}/x", data)
    faults = Faults(0.4, seed=3)
    with faulty_proxy(s3.endpoint, faults), arrow_s3.file_system().open_input_stream(at(f"{root}/x")) as stream:
        assert b"".join(iter(lambda: stream.read(2**18), b"")) == data
    assert sum(faults.seen[fault] for fault in ("reset", "unavailable", "short")) > 0


def test_what_the_server_refuses_is_one_line(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system = arrow_s3.file_system()
    storage.write_bytes(f"{root}/x", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(OSError, match=f"^{root}/x: access is denied; check AWS_ACCESS_KEY_ID") as caught:
        system.open_input_stream(at(f"{root}/x"))
    assert "\n" not in str(caught.value)
    with (
        pytest.raises(OSError, match=f"^{root}/y: the secret key is wrong"),
        system.open_output_stream(at(f"{root}/y")) as stream,
    ):
        stream.write(b"y")
