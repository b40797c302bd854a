"""Looking things up in a registry that holds more models, with odder names, than one answer of MLflow's."""

import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline import promotion, registry
from pipeline.cli import main
from pipeline.gate import Verdict
from pipeline.mlflow_search import quoted
from pipeline.registry_lock import promotion_lock

MANY = 105  # MLflow answers with 100 at a time


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """Many models, in whose alphabet the champions come last."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    found = MlflowClient(uri, uri)
    for number in range(MANY):
        found.create_registered_model(f"model-{number:03}")
    for name in ("z-x2", "z'x3"):
        make_champion(found, name, name[-1])
    return found


def make_champion(client: MlflowClient, name: str, scale: str) -> ModelVersion:
    client.create_registered_model(name)
    tags = {registry.SCALE_TAG: scale, registry.CONTENT_TAG: f"content of {name}"}
    version = client.create_model_version(name, "s3://bucket/somewhere", tags=tags)
    promotion.promote(client, name, version, lambda _: Verdict(promoted=True, reason="good", rival="none"))
    return version


@pytest.mark.parametrize(("scale", "name"), [(2, "z-x2"), (3, "z'x3")])
def test_the_champion_of_a_scale_is_found_behind_a_hundred_others(client: MlflowClient, scale: int, name: str) -> None:
    assert registry.champion_of(client, scale) == f"models:/{name}@champion"


@pytest.mark.parametrize("name", ["z-x2", "z'x3"])
def test_all_that_is_asked_of_a_model_whatever_it_is_called(client: MlflowClient, name: str) -> None:
    assert [version.name for version in registry.versions_of(client, name)] == [name]
    assert registry.find_version(client, name, f"content of {name}") is not None
    assert registry.find_version(client, name, "another") is None
    assert [event.version for event in promotion.history(client, name)] == ["1"]
    with promotion_lock(client, name):
        pass
    with pytest.raises(ValueError, match="has no version 7, its newest is 1"):
        registry.resolve(client, f"models:/{name}/7")


@pytest.mark.parametrize("name", ["absent", "a:b", "..", "'\"", " "])
def test_a_model_that_is_not_there_or_cannot_be_is_one_line(client: MlflowClient, name: str) -> None:
    with pytest.raises(ValueError, match=r"registered are: model-000, .* and 95 more"):
        registry.registered(client, name)


def test_a_text_with_both_quotes_has_no_filter() -> None:
    assert (quoted("a"), quoted("o'b"), quoted('a"b')) == ("'a'", '"o\'b"', "'a\"b'")
    with pytest.raises(ValueError, match="choose another name"):
        quoted("'\"")


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_what_mlflow_refuses_is_one_line_from_any_command(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], debug: list[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise MlflowException("no, not at\nhttp://u:SECRET@host/x")

    monkeypatch.setattr(promotion, "rollback", refuse)
    with pytest.raises(SystemExit) as left:
        main(["rollback", "z-x2", "--tracking-uri", client.tracking_uri, *debug])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "hatchery: MLflow refuses: no, not at http://host/x"
    assert len(said.splitlines()) == 1 or debug
    assert "SECRET" not in said


def test_a_fault_of_ours_has_a_traceback_without_secrets(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("at http://u:SECRET@host")

    monkeypatch.setattr(promotion, "rollback", fail)
    with pytest.raises(SystemExit) as left:
        main(["rollback", "z-x2", "--tracking-uri", client.tracking_uri])
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.splitlines()[-1] == "AssertionError: at http://host"
