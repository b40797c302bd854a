"""Names that MLflow would refuse are refused before any work; what is taken, a real MLflow takes."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from pydantic import TypeAdapter, ValidationError

from pipeline.config import ConfigError, load_recipe
from pipeline.domain import load_domain
from pipeline.names import ModelName, Name
from tests.shared_data import ROOT
from tests.unit.pipeline.test_faults import TINY

_TEXT = st.text(st.sampled_from("aZ9é日_-.:/ ()'\"@#%\\\n\u0301"), max_size=8) | st.text(max_size=5)


def takes(kind: object, name: str) -> bool:
    try:
        return bool(TypeAdapter(kind).validate_python(name) == name)
    except ValidationError:
        return False


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    return MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('names')}/mlflow.db")


@pytest.fixture(scope="module")
def run_id(client: MlflowClient) -> str:
    return str(client.create_run(client.create_experiment("names")).info.run_id)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_TEXT)
def test_mlflow_takes_every_name_that_is_taken(client: MlflowClient, run_id: str, name: str) -> None:
    if takes(Name, name):
        client.log_metric(run_id, f"bicubic_psnr_y.{name}.x2", 1.0)
        client.set_tag(run_id, f"hatchery.since_start.psnr_y.{name}", "x")
        client.log_param(run_id, f"evaluate.sets.{name}", "x")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_TEXT)
def test_mlflow_takes_every_model_that_is_taken(client: MlflowClient, name: str) -> None:
    if takes(ModelName, name):
        client.create_registered_model(f"{name}-x2")
        client.delete_registered_model(f"{name}-x2")


@pytest.mark.parametrize("name", ["Set5", "DIV2K/valid", "Städte", "a b", "v1.0:x", "x" * 100])
def test_common_names_are_taken(name: str) -> None:
    assert takes(Name, name)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluate.sets={'Set5 (x2)': 'photographs:'}", ["evaluate.sets.Set5 (x2)", "call it 'Set5 -x2-'"]),
        ("data={'a@b': {source: 'photographs:'}}", ["data.a@b", "call it 'a-b'"]),
        ("trainings={'../x': {scale: 2, phase: train}}", ["trainings.../x", "call it 'x'"]),
        ("registry.name=team/hat", ["registry.name", "'team/hat' cannot be a registered model", "'team-hat'"]),
        ("registry.name=team:hat", ["registry.name", "'team:hat' cannot be a registered model"]),
        (f"registry.name={'x' * 300}", ["registry.name", "(300 characters)"]),
        ("tracking.experiment=''", ["tracking.experiment"]),
        (f"tracking.experiment={'x' * 501}", ["tracking.experiment"]),
    ],
)
def test_a_recipe_with_a_name_that_mlflow_refuses(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_recipe(TINY, [override])
    line = next(line for line in str(refused.value).splitlines() if words[0] in line)
    for word in words:
        assert word in line


def test_a_domain_whose_results_mlflow_would_not_register() -> None:
    domain = str(ROOT / "configs" / "domain" / "text.yaml")
    with pytest.raises(ConfigError, match="'a/b-x2' cannot be a registered model"):
        load_domain(domain, ["registered_as=a/b-x2"])
