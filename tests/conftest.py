"""Shared fixtures. Every test runs with `torch.empty` filled with NaN, so that reading a slot nobody wrote shows."""

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # read by OpenMP when it loads: a thread that waits leaves its core to others

import pytest
import torch

from hf_kvattn.kernels import dispatch, native
from hf_kvattn.kernels.triton import backend as triton_backend

# Each needs a process of its own: see tests/README.md.
collect_ignore = ["jobs"]


@pytest.fixture(autouse=True)
def nan_filled_memory():
    torch.default_generator.manual_seed(0)  # torch.manual_seed would note a stack trace for each GPU library, slowly
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As many processes as cores run tests, and so small a model gains nothing from more threads."""
    torch.set_num_threads(1)


@pytest.fixture
def two_threads():
    """Kernels that divide their work do so."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def fresh_choice(monkeypatch):
    """The test begins without a choice of backend, and without reasons that were logged already."""
    monkeypatch.setattr(dispatch, "_for_process", [])
    monkeypatch.delenv("HF_KVATTN_BACKEND", raising=False)
    dispatch.logger.info_once.cache_clear()


@pytest.fixture
def variant(request, two_threads):
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
    """On GPUs that are none its kernels cannot run; `jobs/triton_interpreter` has them."""
    monkeypatch.setattr(triton_backend, "unavailable", lambda: "there is none")
