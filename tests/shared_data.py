"""Where the real images and reference values for tests lie: `../shared` beside the checkout, or $HATCHERY_SHARED."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("HATCHERY_SHARED", ROOT.parent / "shared"))


def shared(relative: str) -> Path:
    """The path below `shared/`; skips the calling test where it is absent, fails it where CI=true."""
    path = SHARED / relative
    if not path.exists():
        message = f"{path} is absent: put the test data beside the checkout or set HATCHERY_SHARED"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message, allow_module_level=True)
    return path
