"""Shared fixtures. Every test runs with `torch.empty` filled with NaN, so that reading a slot nobody wrote shows."""

import pytest
import torch

from hf_kvattn.kernels import native
from hf_kvattn.kernels.triton import backend as triton_backend


@pytest.fixture(autouse=True)
def nan_filled_memory():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def variant(request):
    """The native kernels' SIMD variant `request.param`; the test is skipped where the CPU lacks it."""
    try:
        native.select_variant(request.param)
    except ValueError as error:
        if request.param == "portable":  # runs everywhere, or the kernels are not built
            raise
        pytest.skip(str(error))  # the CPU lacks it
    yield request.param
    native.select_variant(None)


@pytest.fixture
def without_triton(monkeypatch):
    """On GPUs that are none its kernels cannot run; `triton_interpreter.py` has them."""
    monkeypatch.setattr(triton_backend, "unavailable", lambda: "there is none")


@pytest.fixture(scope="module")
def one_thread():
    """So small a model gains nothing from more, and on a busy machine waiting for them takes minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
