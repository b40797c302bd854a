"""The MLflow pyfunc model, as MLflow's "models from code" wants it: this file is copied into the model.

Needs only the package `model/`, which is copied beside it, so that it loads where Hatchery is not installed.
"""

import json
import threading
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.pyfunc import PythonModel

from model import load
from model.inference import Upscaler
from model.limits import bound_threads
from model.payload import RefusedError, answer


class RequestRefusedError(MlflowException):
    """A request that is answered by one line and HTTP 400.

    MLflow's server puts all that was sent before the message of an error, so it is told of none that it could change.
    """

    def __init__(self, line: str) -> None:
        self._line = line
        super().__init__(line, error_code=BAD_REQUEST)

    @property
    def message(self) -> str:
        """The line."""
        return self._line

    @message.setter
    def message(self, value: str) -> None:
        """Nothing: the line stays."""


class SuperResolution(PythonModel):
    """Super-resolves arrays, and PNG and JPEG files, and answers in the kind that it was asked in."""

    def load_context(self, context: Any) -> None:
        """Load the network from the model's artifacts, once."""
        options = json.loads(Path(context.artifacts["options"]).read_text())
        network = load(context.artifacts["weights"], **options)
        self.upscaler = Upscaler(network.to("cuda" if torch.cuda.is_available() else "cpu"), tile="auto")
        self.one_at_a_time = threading.Lock()  # two images that each fit the memory may not fit it together
        bound_threads()

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> Any:
        """Images of any size, one or several: see `model.payload`. RequestRefusedError for what is none."""
        try:
            return answer(model_input, self._enlarged)
        except RefusedError as error:
            raise RequestRefusedError(str(error)) from error

    def _enlarged(self, image: np.ndarray) -> np.ndarray:
        """One image: whole where it is likely to fit the free memory, else in tiles."""
        with self.one_at_a_time:
            return self.upscaler(image)


mlflow.models.set_model(SuperResolution())
