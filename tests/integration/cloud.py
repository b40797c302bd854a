"""A cloud on this machine for the main job: S3 server, MLflow server, Ray cluster of two nodes, photographs on S3."""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from data_prep import storage
from pipeline.artifact import Artifact
from tests.golden_crops import SET5
from tests.integration.servers import RayCluster, mlflow_server, ray_cluster, submit
from tests.photographs import write_photographs
from tests.s3_server import s3_server

SECRET = "hunter2-planted"


@dataclass
class Cloud:
    """Everything that runs, and the overrides that point the recipe at it."""

    cluster: RayCluster
    tracking: str
    base: str
    env: dict[str, str]
    recipe: str
    said: list[str] = field(default_factory=list)  # by all jobs

    @property
    def signed(self) -> str:
        """The MLflow server's address with a login in it, which must be left nowhere."""
        return self.tracking.replace("://", f"://someone:{SECRET}@")

    def run(self, *arguments: str, storage_uri: str | None = None) -> "subprocess.CompletedProcess[str]":
        places = [f"storage.uri={storage_uri or self.base + '/runs'}", f"tracking.uri={self.signed}"]
        sets = [word for place in (*places, *self.sources) for word in ("--set", place)]
        return self._submit("pipeline/pretrain.py", "--recipe", self.recipe, *sets, *arguments)

    def _submit(self, *command: str) -> "subprocess.CompletedProcess[str]":
        done = submit(self.cluster, *command, env=self.env)
        self.said += [done.stdout, done.stderr]
        return done

    def retrain(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self._submit("pipeline/retrain.py", *self.domain, *arguments)

    @property
    def sources(self) -> list[str]:
        return [f"data.photographs.source={self.base}/imagenet", f"evaluate.sets.Set5={SET5}"]

    @property
    def domain(self) -> list[str]:
        """A domain's file and what it leaves to say: images arrive on S3, its storage is there too."""
        places = [f"source={self.base}/incoming", f"replay.source={self.base}/imagenet"]
        places += [f"storage.uri={self.base}/retrained", f"tracking.uri={self.signed}"]
        return ["tests/integration/pages.yaml", *[word for place in places for word in ("--set", place)]]


def upload_images(base: str) -> None:
    """Twenty photographs in class folders, and one file that is no image."""
    with tempfile.TemporaryDirectory() as folder:
        for path in write_photographs(Path(folder), 20):
            storage.upload(path, f"{base}/imagenet/{path.relative_to(folder)}")
    storage.write_bytes(f"{base}/imagenet/n00000000/broken.JPEG", b"no image")


def artifact_of(cloud: Cloud, stage: str) -> str:
    markers = [f.uri for f in storage.list_files(f"{cloud.base}/runs/{stage}") if f.uri.endswith("/artifact.json")]
    assert len(markers) == 1, f"{stage}: {markers}"
    return markers[0].removesuffix("/artifact.json")


def file_of(cloud: Cloud, stage: str, name: str) -> str:
    """The URI of a file that a stage has published."""
    marker = storage.read_bytes(f"{artifact_of(cloud, stage)}/artifact.json")
    return Artifact.model_validate_json(marker).file_uri(name)


@contextmanager
def running_cloud(folder: Path, engine: str, recipe: str) -> Iterator[Cloud]:
    """Everything up, on an S3 server of this engine, until the end of the block."""
    with (
        s3_server(folder / "s3", engine) as s3,
        mlflow_server(folder, f"{s3.uri}/mlflow") as tracking,
        ray_cluster(folder) as cluster,
    ):
        upload_images(s3.uri)
        yield Cloud(cluster, tracking, s3.uri, s3.environment, f"tests/integration/{recipe}.yaml")
