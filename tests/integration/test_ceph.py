"""The main job on another S3 server: Ceph's RADOS Gateway, whose conditional writes and listings differ."""

import os
from pathlib import Path

import pytest

from tests.integration.cloud import artifact_of, running_cloud

pytestmark = [
    pytest.mark.integration,
    pytest.mark.ceph,
    pytest.mark.skipif(os.environ.get("CI") != "true", reason="installs Debian packages: set CI=true to run"),
]


def test_a_short_recipe_on_ceph(tmp_path: Path) -> None:
    with running_cloud(tmp_path, "ceph", "tiny_pair") as cloud:
        done = cloud.run()
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert "tiny-x4 version 1: champion" in done.stdout
        assert artifact_of(cloud, "finetune-x4").startswith("s3://")
        again = cloud.run()
        assert "8 of 8 stages are done, nothing to run" in again.stdout
