"""What the system refuses is one line with the operation, the path and a remedy."""

import errno
import os
from pathlib import Path

import pytest

from data_prep import storage
from pipeline import cli, config_files, pretrain, stages
from pipeline.errors import describe_os_error


def refusal(call: object, *arguments: object) -> OSError:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        call(*arguments)  # type: ignore[operator]
    return caught.value


def test_the_path_and_the_operation_are_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone.pth"
    said = describe_os_error(refusal(gone.read_bytes), "evaluate")
    assert said.startswith(f"evaluate: '{gone}': No such file or directory: it was removed, or the path is wrong")
    said = describe_os_error(refusal(os.replace, gone, tmp_path / "other"), "stage register")
    assert f"'{gone}' -> '{tmp_path / 'other'}'" in said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.EIO])
def test_every_error_of_the_system_is_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str, folder: str) -> Path:
        raise OSError(number, os.strerror(number), "/some/place")

    monkeypatch.setattr(config_files, "find", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--recipe", "demo"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"hatchery: plan (config.load_recipe): '/some/place': {os.strerror(number)}: ")
    assert said.count("\n") == 1


def test_a_stage_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beneath it, whatever library it came from."""
    abandoned = []

    class Tracker:
        def stage_run(self, *told: object) -> str:
            return "run"

        def abandon(self, run_id: str, error: BaseException) -> None:
            abandoned.append(type(error))

    def register(work: stages.Work) -> None:
        Path(tmp_path, "weights.pth").read_bytes()

    monkeypatch.setitem(stages.RUN, "register", register)  # type: ignore[arg-type]
    stage = pretrain.Stage("register", "register", "register", ())
    with pytest.raises(ValueError, match=r"^stage register \(pretrain\._run_stage\): '.*weights\.pth': No such file"):
        pretrain._run_stage(None, stage, {}, {}, Tracker(), None, None)  # type: ignore[arg-type]
    assert abandoned == [FileNotFoundError]


def test_the_storages_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(storage.StorageError, match=r"gone"):
        storage.read_bytes(str(tmp_path / "gone"))
