"""PyTorch's SDPA as the backend `sdpa` calls it on a GPU: under which switches, with which masks, and what NaN does."""

import dataclasses
import threading

import pytest
import torch
from flash_stub import flash_libraries
from impostor import fake_cuda, on_gpu
from models import generate, prompt, tiny_model
from problems import problem
from tolerance import assert_close_to_reference
from torch.backends.cuda import cudnn_sdp_enabled, enable_cudnn_sdp
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import hf_kvattn
from hf_kvattn import StaticKVCache
from hf_kvattn.kernels import sdpa
from hf_kvattn.kernels.call import AttendCall

pytestmark = pytest.mark.usefixtures("without_triton")


def moved(call: AttendCall) -> AttendCall:
    values = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
    return dataclasses.replace(call, **{name: on_gpu(value) for name, value in values.items()})


class Recorder:
    """In the place of PyTorch's function: notes how it is called, and gives NaN to queries that see nothing."""

    def __init__(self):
        self.cudnn, self.masks, self.heads = [], [], []

    def __call__(self, q, k, v, attn_mask=None, **kwargs):
        self.cudnn.append(cudnn_sdp_enabled())
        self.masks.append(attn_mask)
        self.heads.append((q.shape[1], k.shape[1]))
        out = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **kwargs)
        if attn_mask is None:
            return out
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
        return out.masked_fill(~seen.any(-1, keepdim=True), torch.nan)


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", made)
    with flash_libraries(), fake_cuda((9, 0)):
        yield made


def dense_mask(call: AttendCall) -> AttendCall:
    """The rules of `call` as a mask of a model's own."""
    return dataclasses.replace(call, mask=call.visible(), leftpad=None, window=None)


@pytest.mark.parametrize(
    ("name", "cudnn"),
    [("g3-65", False), ("short-query", False), ("padded", False), ("window-many-queries", False),
     ("prefill-after-past", False), ("not-causal", False), ("prefill", True), ("padded-prefill", True)],
)  # fmt: skip
def test_cudnn_is_off_where_lengths_grow_and_on_afterwards(name, cudnn, recorder):
    call = problem(name, torch.float16)
    assert_close_to_reference(sdpa.attend(moved(call)).data_on_cpu, call)
    assert recorder.cudnn == [cudnn] and cudnn_sdp_enabled()
    enable_cudnn_sdp(False)
    try:
        sdpa.attend(moved(call))
        assert recorder.cudnn[1:] == [False] and not cudnn_sdp_enabled(), "one who switched it off finds it so"
    finally:
        enable_cudnn_sdp(True)


def test_cudnn_is_on_again_after_an_error(monkeypatch):
    def fails(*args, **kwargs):
        assert not cudnn_sdp_enabled()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", fails)
    with fake_cuda(), pytest.raises(RuntimeError, match="out of memory"):
        sdpa.attend(moved(problem("g3-65", torch.float16)))
    assert cudnn_sdp_enabled()


def test_threads_cannot_leave_cudnn_switched_off(monkeypatch):
    """Two calls that overlap, one inside the other: who finds it off does not switch it."""
    entered, leave = threading.Event(), threading.Event()
    call = problem("g3-65", torch.float16)

    def waits(q, k, v, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            leave.wait(10)
        return q

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", waits)
    with fake_cuda():
        on_it = moved(call)
        other = threading.Thread(target=sdpa._attention, args=(on_it, on_it.q, on_it.k, on_it.v))
        other.start()
        assert entered.wait(10) and not cudnn_sdp_enabled()
        sdpa._attention(on_it, on_it.q, on_it.k, on_it.v)
        leave.set()
        other.join()
    assert cudnn_sdp_enabled()


def test_on_a_cpu_no_switch_is_touched(monkeypatch):
    monkeypatch.setattr(sdpa, "cudnn_sdp_enabled", None)
    monkeypatch.setattr(sdpa, "enable_cudnn_sdp", None)
    monkeypatch.setattr(sdpa, "can_use_flash_attention", None)
    for name in ("g3-65", "short-query", "padded-prefill", "prefill"):
        call = problem(name)
        assert_close_to_reference(sdpa.attend(call), call)


@pytest.mark.parametrize("name", ["prefill-after-past", "rows-cross-chunk"])
def test_a_prompt_continued_gets_no_mask_where_pytorch_has_flash(name, recorder, monkeypatch):
    call = problem(name, torch.float16)
    kv_heads, q_heads = call.k.shape[1], call.q.shape[1]
    asked, launched = [], []

    def flash(q, k, v, dropout_p, is_causal, scale):
        """What PyTorch's op does on a GPU, after its own check of the arguments."""
        op = torch.ops.aten._scaled_dot_product_flash_attention
        meta = op(*(t.data_on_cpu.to("meta") for t in (q, k, v)), dropout_p, is_causal=is_causal, scale=scale)[0]
        launched.append((q.shape[1], k.shape[1]))
        mask = on_gpu(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2]))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        assert out.shape == meta.shape
        return out, None

    monkeypatch.setattr(sdpa, "_flash", flash)
    monkeypatch.setattr(sdpa, "can_use_flash_attention", lambda params: asked.append(params) or True)
    assert_close_to_reference(sdpa.attend(moved(call)).data_on_cpu, call)
    assert launched == [(q_heads, kv_heads)] and not recorder.masks
    assert asked[0].enable_gqa and not asked[0].is_causal and asked[0].attn_mask is None
    for other in ("padded-window", "window-many-queries"):  # it has no argument for these
        sdpa.attend(moved(problem(other, torch.float16)))
        assert recorder.masks[-1].dtype == torch.bool and len(launched) == 1
    monkeypatch.setattr(torch.version, "hip", "6.4")  # where the corner is not known
    assert_close_to_reference(sdpa.attend(moved(call)).data_on_cpu, call)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(sdpa, "can_use_flash_attention", lambda params: False)
    assert_close_to_reference(sdpa.attend(moved(call)).data_on_cpu, call)
    assert recorder.heads[-2:] == [(kv_heads, kv_heads)] * 2 and len(launched) == 1


def all_seen_by_none(call: AttendCall, dtype) -> AttendCall:
    """A mask of `dtype` in which query 0 of row 1 sees nothing."""
    q_len, kv_len = call.q.shape[2], call.kv_len
    mask = torch.ones(call.q.shape[0], 1, q_len, kv_len, dtype=torch.bool)
    mask[1, :, 0] = False
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    return dataclasses.replace(call, mask=mask)


BLIND = {
    "padded-prefill": lambda: problem("padded-prefill", torch.float16),
    "padded-window": lambda: problem("padded-window", torch.float16),
    "empty-row": lambda: problem("empty-row", torch.float16),
    "padded-window-long-prefill": lambda: problem("padded-window-long-prefill", torch.float16),
    "dense bool": lambda: all_seen_by_none(problem("short-query", torch.float16), torch.bool),
    "dense float16": lambda: all_seen_by_none(problem("short-query", torch.float16), torch.float16),
    "dense float32": lambda: all_seen_by_none(problem("g3-65", torch.float16), torch.float32),
    "one mask a head": lambda: dataclasses.replace(
        problem("short-query", torch.float16), mask=torch.rand(2, 6, 5, 77) < torch.tensor([0.0, 1, 0.5, 1, 0])[:, None]
    ),
    "ring": lambda: ring(problem("empty-row", torch.float16)),
    "more queries than keys": lambda: longer(problem("prefill", torch.float16)),
}


def ring(call):
    call.k, call.v = call.k.clone(), call.v.clone()
    call.tokens, call.slot = 40, 17
    return call


def longer(call):
    return dataclasses.replace(call, k=call.k[:, :, :50], v=call.v[:, :, :50])


@pytest.mark.parametrize("name", BLIND)
def test_queries_that_see_nothing_get_zeros_whatever_the_kernel_gives(name, recorder):
    call = BLIND[name]()
    out = sdpa.attend(moved(call)).data_on_cpu
    in_order = call
    if call.tokens is not None:
        k, v = (t.roll(-call.slot, 2) for t in (call.k, call.v))
        in_order = dataclasses.replace(call, k=k, v=v, tokens=None, slot=0)
    assert_close_to_reference(out, in_order)
    mask = in_order.visible() if call.mask is None else call.mask
    blind = ~(mask if mask.dtype == torch.bool else mask > -torch.inf).any(-1).expand(len(out), out.shape[2], -1)
    assert blind.any() and not out.transpose(1, 2)[blind].any()


class Operations(TorchDispatchMode):
    """The names of what is computed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.names: set[str] = set()
        return super().__enter__()


@pytest.mark.parametrize("name", ["g3-65", "prefill", "prefill-after-past", "window-many-queries", "padded-prefill"])
def test_calls_that_cannot_have_such_queries_do_nothing_for_them(name, recorder):
    call = moved(problem(name, torch.float16))
    with pytest.MonkeyPatch.context() as patch, Operations() as operations:
        patch.setattr(sdpa, "scaled_dot_product_attention", lambda q, k, v, **kwargs: q)
        sdpa.attend(call)
    assert bool(operations.names & {"any", "masked_fill"}) == (name == "padded-prefill")


def test_padding_leaves_no_nan_in_a_cache():
    model, inputs = tiny_model().half(), prompt(left_padding=5)
    expected, _ = generate(model, inputs, 6)
    made = Recorder()
    with pytest.MonkeyPatch.context() as patch, flash_libraries(), fake_cuda():
        patch.setattr(sdpa, "scaled_dot_product_attention", made)
        on_gpu(model)
        with hf_kvattn.enabled(model):
            cache = StaticKVCache(model.config)
            tokens, _ = generate(model, on_gpu(inputs), 6, past_key_values=cache)
        for layer in cache.layers:
            assert all(t.data_on_cpu.isfinite().all() for t in layer.dense())
    assert torch.equal(tokens.data_on_cpu, expected) and made.masks
