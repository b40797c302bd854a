"""Temporary folders of one user, and short ones for sockets."""

import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from data_prep import private_folder as folders
from data_prep.private_folder import folder_for_sockets, private_folder


def test_a_folder_is_this_users_alone_and_the_same_for_every_process(tmp_path: Path) -> None:
    path = private_folder("kept", str(tmp_path))
    assert path == f"{tmp_path}/kept-{os.getuid()}" == private_folder("kept", str(tmp_path))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700


@pytest.mark.parametrize("prepared", ["a file", "a link", "open to all", "another's"])
def test_what_another_user_may_have_prepared_is_not_used(tmp_path: Path, prepared: str) -> None:
    path, elsewhere = tmp_path / f"kept-{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if prepared == "a file":
        path.touch()
    elif prepared == "a link":
        path.symlink_to(elsewhere)
    else:
        path.mkdir()
        path.chmod(0o777 if prepared == "open to all" else 0o700)
    if prepared == "another's":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        os.chown(path, 65534, 65534)
    found = private_folder("kept", str(tmp_path))
    assert found != str(path)
    assert stat.S_IMODE(os.stat(found).st_mode) == 0o700
    assert list(elsewhere.iterdir()) == []
    assert private_folder("kept", str(tmp_path)) == found  # also in every other process


def test_a_short_temporary_folder_is_used_for_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert folder_for_sockets(107 - len(str(tmp_path)), "sockets") is None
    assert folder_for_sockets(10, "sockets", f"{tmp_path}/not/yet/made") is None


@pytest.mark.parametrize("below", [30, 68])
@pytest.mark.parametrize("reason", ["long", "a file"])
def test_a_socket_of_that_length_can_be_bound(tmp_path: Path, below: int, reason: str) -> None:
    usual = str(tmp_path / ("x" * 90))
    if reason == "a file":
        usual = "/dev/null"
    folder = folder_for_sockets(below, "hatchery-test", usual)
    assert folder is not None
    with socket.socket(socket.AF_UNIX) as listener:
        path = os.path.join(folder, "s" * (below - 1))
        listener.bind(path)
        os.unlink(path)


def test_where_no_folder_is_short_it_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(folders, "_SHORT", ("/dev/null", str(tmp_path / ("y" * 80))))
    with pytest.raises(ValueError, match=r"TMPDIR /x+ is too long for sockets.*: set TMPDIR to a folder of at most 39"):
        folder_for_sockets(68, "hatchery-test", "/" + "x" * 90)
