"""What every test shares: the gpu marker, and hypothesis without a clock."""

import pytest
import torch
from hypothesis import settings

# A busy machine is slow, not wrong: a deadline would make failures of it.
settings.register_profile("shardproof", deadline=None, print_blob=True)
settings.load_profile("shardproof")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch finds none"))
