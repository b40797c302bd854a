from pathlib import Path

import pytest
import torch

from tests.system.jobs import good_day

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.system)
            item.add_marker(pytest.mark.timeout(1500))


@pytest.fixture(scope="session")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("good")


@pytest.fixture(scope="session")
def good(good_folder: Path) -> dict[str, torch.Tensor]:
    """The weights that every test here must end with."""
    return good_day(good_folder)
