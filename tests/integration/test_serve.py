"""A registered version where Hatchery is not installed (`mlflow models serve`, pyfunc), and the registry's commands."""

import base64
import io
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model import load
from model.inference import upscale
from model.weights import read_weights, save_safetensors
from pipeline import registry, report
from pipeline.cli import main
from pipeline.config import load_recipe
from tests.golden_crops import kept_crop
from tests.integration.servers import BIN, cluster_env, free_port, running, wait_for
from tests.integration.test_registry import Registry, result
from tests.shared_data import ROOT

pytestmark = pytest.mark.integration


def low_res() -> np.ndarray:
    return kept_crop("woman", 2)[:40, :56]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Two versions, as the main job registers them; the first is champion."""
    folder = tmp_path_factory.mktemp("serve")
    made = Registry(folder)
    tiny = str(ROOT / "tests" / "integration" / "tiny_pair.yaml")
    recipe = load_recipe(tiny, ["registry.gate.better.held-out=0.1"])
    files = {"weights.pth": made.weights, registry.RECIPE: folder / registry.RECIPE}
    files[registry.RECIPE].write_text(recipe.model_dump_json())
    files["weights.safetensors"] = folder / "weights.safetensors"
    save_safetensors(files["weights.safetensors"], read_weights(made.weights), {"scale": "2"})
    for content, psnr in (("first", 31.0), ("second", 31.5)):
        files[registry.EVALUATION] = folder / registry.EVALUATION
        files[registry.EVALUATION].write_text(report.as_json([result(psnr, "held-out")]))
        tags = {registry.CONTENT_TAG: content, **registry.metric_tags([result(psnr, "held-out")])}
        registry.register(made.client, made.run_id, "m-x2", files, {}, tags)
    made.client.set_registered_model_alias("m-x2", "champion", "1")
    return made


def clean_env(folder: Path, uri: str) -> dict[str, str]:
    """Where the project cannot be imported."""
    return cluster_env(folder) | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_REGISTRY_URI": uri}


@pytest.fixture(scope="module")
def served(store: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real `mlflow models serve` of the champion."""
    folder = tmp_path_factory.mktemp("served")
    port, log = free_port(), folder / "serve.log"
    command = [str(BIN / "mlflow"), "models", "serve", "-m", "models:/m-x2@champion", "--env-manager", "local"]
    with running([*command, "--port", str(port)], clean_env(folder, store.uri), log) as process:
        wait_for(f"http://127.0.0.1:{port}/ping", process, log)
        yield f"http://127.0.0.1:{port}/invocations"


def post(url: str, body: object) -> tuple[int, Any]:
    """The status and the JSON of an answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def base64_png(image: np.ndarray) -> str:
    return base64.b64encode(encoded_png(image)).decode()


def encoded_png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("key", ["inputs", "instances"])
def test_a_served_model_sends_arrays_back_upscaled(key: str, served: str, store: Registry) -> None:
    image = low_res()
    expected = upscale(load(store.weights), image)
    gray = image[..., 0]
    for sent, wanted, error in (
        (image[None], expected[None], 0.0),
        (image, expected, 0.0),
        (gray, upscale(load(store.weights), gray), 0.0),
        (image / 255, expected / 255, 0.51 / 255),  # what was expected is rounded to 8 bits
        (image[None] * 1.0, expected[None], 0.51),
    ):
        status, answer = post(served, {key: sent.tolist()})
        assert status == 200
        got = np.array(answer["predictions"])
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= error


@pytest.mark.parametrize(
    "wrap",
    [
        lambda texts: {"inputs": texts},
        lambda texts: {"instances": texts},
        lambda texts: {"instances": [{"b64": text} for text in texts]},
        lambda texts: {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
        lambda texts: {"dataframe_records": [{"image": text} for text in texts]},
    ],
)
def test_a_served_model_sends_files_back_upscaled(wrap: Any, served: str, store: Registry) -> None:
    images = [low_res(), low_res()[:24, :31, :1].repeat(3, 2)]
    status, answer = post(served, wrap([base64_png(image) for image in images]))
    assert status == 200
    for text, image in zip(answer["predictions"], images, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(text))) as got:
            assert np.array_equal(np.asarray(got), upscale(load(store.weights), image))
    status, answer = post(served, {"inputs": base64_png(images[0])})
    assert (status, type(answer["predictions"])) == (200, str)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": np.zeros((3, 40, 56), int).tolist()}, "put the channels last"),
        ({"inputs": np.full((40, 56), 4095).tolist()}, "16 bits come as uint16 or PNG"),
        ({"inputs": np.full((40, 56, 3), 1.5).tolist()}, "clip them to 0..1 or to 0..255"),
        ({"instances": ["nothing"]}, "image 1 is no PNG or JPEG file in base64"),
        ({"dataframe_split": {"columns": ["a", "b"], "data": [[1, 2]]}}, "a table must have one column"),
    ],
)
def test_a_served_model_refuses_in_one_line(body: object, words: str, served: str) -> None:
    status, answer = post(served, body)
    assert status == 400
    assert words in answer["message"]
    assert len(answer["message"]) < 320
    assert "stack_trace" not in answer
    assert len(json.dumps(answer)) < 480, "no pixels anywhere"


def test_a_clean_process_loads_the_champion(store: Registry, tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", low_res()[None])
    code = (
        "import mlflow, numpy, importlib.util; assert importlib.util.find_spec('pipeline') is None\n"
        "model = mlflow.pyfunc.load_model('models:/m-x2@champion')\n"
        "numpy.save('out.npy', model.predict(numpy.load('in.npy')))"
    )
    env = clean_env(tmp_path, store.uri)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.array_equal(np.load(tmp_path / "out.npy")[0], upscale(load(store.weights), low_res()))


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    said = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((said.out + said.err).split())


def test_the_commands_promote_go_back_and_tell(store: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("--tracking-uri", store.uri)
    code, said = command(capsys, "promote", "m-x2", *at, "--address", "local")
    assert (code, "version 2: champion (better than champion version 1" in said) == (0, True), said
    code, said = command(capsys, "rollback", "m-x2", "--reason", "complaints", *at)
    assert (code, said) == (0, "m-x2: version 1 is champion again, version 2 is previous")
    code, said = command(capsys, "history", "m-x2", *at)
    assert code == 0
    for words in ("champions, oldest first", "promote", "rollback", "complaints", "previous", "+0.5000"):
        assert words in said
    code, said = command(capsys, "promote", "m-x2", "--version", "2", "--force", "tested by hand", *at)
    assert (code, "champion (by hand: tested by hand)" in said) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["promote", "other"], "no registered model 'other'; registered are: m-x2"),
        (["promote", "m-x2", "--version", "9"], "no version 9, its newest is 2"),
        (["promote", "m-x2", "--version", "1", "--rule", "/absent.yaml"], "/absent.yaml is no file"),
        (["rollback", "other"], "no registered model 'other'"),
        (["history", "other"], "no registered model 'other'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    store: Registry, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code, said = command(capsys, *arguments, "--tracking-uri", store.uri)
    assert code == 2
    assert said.startswith("hatchery: ")
    assert words in said
