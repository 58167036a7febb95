"""Every test runs with `torch.empty` filled with NaN, so that reading a slot nobody wrote shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_filled_memory():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
