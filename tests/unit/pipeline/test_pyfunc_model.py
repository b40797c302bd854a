"""The model that a registry serves: what it needs where Hatchery is not installed, and how it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mlflow.exceptions import MlflowException

from model import load
from model.inference import upscale
from model.weights import save_pth
from pipeline import registry
from pipeline.pyfunc_model import SuperResolution
from tests.unit.model.tiny import tiny
from tests.unit.test_imports import ROOT, imported


@pytest.fixture
def model(tmp_path: Path) -> SuperResolution:
    save_pth(tmp_path / "weights.pth", tiny().state_dict())
    (tmp_path / "options.json").write_text(json.dumps({}))
    made = SuperResolution()
    files = {"weights": str(tmp_path / "weights.pth"), "options": str(tmp_path / "options.json")}
    made.load_context(SimpleNamespace(artifacts=files))
    return made


def test_its_requirements_are_what_its_code_imports() -> None:
    code = (
        "import sys, model, model.inference, model.payload; print(*sorted(n for n in sys.modules if n[:6] == 'model.'))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / f"{name.replace('.', '/')}.py" for name in loaded.split()]
    modules = set().union(*map(imported, files), imported(ROOT / "pipeline" / "pyfunc_model.py"))
    needed = {"pillow" if name == "PIL" else name for name in modules - set(sys.stdlib_module_names) - {"model"}}
    assert needed == {requirement.split("==")[0] for requirement in registry.requirements()}


def test_it_upscales_as_the_network_does(model: SuperResolution) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 12, 3), np.uint8)
    network = load(tiny().state_dict())
    assert np.array_equal(model.predict(None, images), [upscale(network, image) for image in images])


def test_a_refusal_stays_the_line_that_it_is(model: SuperResolution) -> None:
    """MLflow's server would put all pixels before it."""
    with pytest.raises(MlflowException) as refused:
        model.predict(None, np.zeros((3, 9, 9), np.uint8))
    line = refused.value.message
    assert "put the channels last" in line
    refused.value.message = f"Failed to predict data '[[[0, 0, ...'. \nError: {line}"
    said = json.loads(refused.value.serialize_as_json())
    assert (said["error_code"], said["message"]) == ("BAD_REQUEST", line)
    assert "stack_trace" not in said
    assert refused.value.get_http_status_code() == 400
