"""Restoration, on another S3 server: Ceph's RADOS Gateway, whose conditional writes and listings differ."""

import json
import os
from pathlib import Path

import pytest

from data_prep import storage
from tests.integration.cloud import artifact_of, file_of, running_cloud

pytestmark = pytest.mark.skipif(os.environ.get("CI") != "true", reason="installs Debian packages: set CI=true to run")


def test_a_restoration_recipe_on_ceph(tmp_path: Path) -> None:
    with running_cloud(tmp_path, "ceph", "tiny_restore") as cloud:
        noise = "evaluate.degrade.Set5=[{step: noise, sigma: 25}]"
        done = cloud.run("--set", noise)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert "tiny-x1 version 1: champion" in done.stdout
        uri = artifact_of(cloud, "pretrain-x1")
        assert uri.startswith("s3://")
        rows = json.loads(storage.read_bytes(file_of(cloud, "evaluate", "results.json")))
        assert {row["set"] for row in rows} == {"Set5", "held-out"}
        for row in rows:
            assert row["scale"] == 1
            # noise of 25 is 20.17 dB, more once cut to what uint8 holds; the network starts as the identity
            assert 20.1 < row["bicubic_psnr_rgb"] < 21.5
            assert row["psnr_rgb"] == pytest.approx(row["bicubic_psnr_rgb"], abs=0.5)
        again = cloud.run("--set", noise)
        assert "5 of 5 stages are done, nothing to run" in again.stdout, again.stdout[-6000:]
