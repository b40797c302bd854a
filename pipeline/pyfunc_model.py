"""The MLflow pyfunc model, as MLflow's "models from code" wants it: this file is copied into the model.

Needs only the package `model/`, which is copied beside it, so that it loads where Hatchery is not installed.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel

from model import load
from model.inference import upscale


class SuperResolution(PythonModel):
    """Super-resolves uint8 RGB images, shape (images, height, width, 3), to (images, height*scale, width*scale, 3)."""

    def load_context(self, context: Any) -> None:
        """Load the network from the model's artifacts, once."""
        options = json.loads(Path(context.artifacts["options"]).read_text())
        self.network = load(context.artifacts["weights"], **options)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network.to(self.device)

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Any image size: padded by reflection to what the network needs, and cut again."""
        return np.stack([upscale(self.network, image) for image in np.asarray(model_input, dtype=np.uint8)])


mlflow.models.set_model(SuperResolution())
