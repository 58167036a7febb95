"""A decode step on CUDA tensors without memory: whatever would read a number back raises, and the compiler's own
conditions for a CUDA graph are asked of its graph. It has a process of its own, since it tells PyTorch that there is a
GPU.

pytest tests/jobs/graphs_on_fakes
"""

import contextlib
import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_count import launched
from models import tiny_model
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch._inductor import cudagraph_utils
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import hf_kvattn
from hf_kvattn import QuantizedKVCache, StaticKVCache
from hf_kvattn.caches.quantized_layer import KVQuantizedLayer, QuantSettings, quantize_due
from hf_kvattn.compiling import append_attend
from hf_kvattn.compiling.append_attend import Numbers
from hf_kvattn.compiling.decode_steps import DecodeSteps, StepHandle
from hf_kvattn.evaluation import codegen
from hf_kvattn.kernels import dispatch, flash, flash_libraries
from hf_kvattn.kernels.triton import backend as triton_backend
from hf_kvattn.quant.codecs import CODECS

GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar guard(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""


@pytest.fixture(scope="module", autouse=True)
def device_guard(tmp_path_factory):
    """A PyTorch without CUDA has none, and asks for it where a tensor is indexed."""
    library, torch_home = tmp_path_factory.mktemp("guard") / "guard.so", Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_home}/include", "-x", "c++", "-", "-o", str(library)]
    subprocess.run([*command, f"-L{torch_home}/lib", "-lc10"], input=GUARD, text=True, check=True)
    ctypes.CDLL(str(library))


@pytest.fixture(autouse=True)
def no_memory():
    torch.use_deterministic_algorithms(False)
    with FakeTensorMode(), torch.no_grad():
        yield


def filled(family, padded=True, bits=None):
    """An enabled model on the GPU, its steps after a prompt of 13, and the arguments of the next."""
    with torch.device("cuda"):
        model = hf_kvattn.enable(tiny_model(family, num_hidden_layers=2))
        ids = torch.ones(2, 13, dtype=torch.long)
        cache = StaticKVCache(model.config, max_cache_len=100)
        if bits is not None:
            cache = QuantizedKVCache(model.config, bits, group_size=16, max_cache_len=100)
        model(ids, past_key_values=cache)
        for layer in cache.layers:
            layer.wants_queries = False  # as if few bits had their table: until then steps are not compiled
        steps = DecodeSteps(cache)
        if padded:  # what was found in a mask before
            steps.leftpad, steps.leftpad_known = torch.ones(2, dtype=torch.int32), True
    return model, steps, {"input_ids": ids[:, :1], "position_ids": ids[:, :1], "past_key_values": cache}


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize(
    ("family", "bits"), [("llama", None), ("mistral", None), ("gemma2", None), ("phi3", 4), ("llama", "fp8")]
)
def test_nothing_is_read_back_in_a_step(family, bits, positions):
    model, steps, arguments = filled(family, bits=bits)
    if not positions:
        del arguments["position_ids"]
    for _ in range(2):
        out = steps.run(model, model, arguments)
        assert (out.logits.device.type, out.logits.shape) == ("cuda", (2, 1, 128))
    assert {layer.seen for layer in steps.cache.layers} == {15}


@pytest.mark.parametrize("plant", [lambda n: n[0].item(), lambda n: bool((n > 3).all()), lambda n: n.nonzero()])
def test_a_number_read_back_raises(plant, monkeypatch):
    model, steps, arguments = filled("llama")
    attend = StepHandle.attend

    def planted(self, *args):
        plant(steps.layers[0].numbers.lengths)
        return attend(self, *args)

    monkeypatch.setattr(StepHandle, "attend", planted)
    with pytest.raises(Exception) as raised:
        steps.run(model, model, arguments)
    assert "DataDependent" in type(raised.value).__name__ or "DynamicOutputShape" in type(raised.value).__name__


def test_nor_is_a_number_of_a_mask_read_twice():
    """Its one look at the mask is the only thing that waits; it would raise here."""
    model, steps, arguments = filled("llama", padded=False)
    mask = torch.ones(2, 14, dtype=torch.long, device="cuda")
    with pytest.raises(DataDependentOutputException):
        steps.run(model, model, {**arguments, "attention_mask": mask})
    steps.run(model, model, {**arguments, "attention_mask": None})
    steps.run(model, model, {**arguments, "attention_mask": mask})


RULES = {"plain": {}, "ring": {"wraps": True}, "softcap": {"softcap": 2.0}}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("served_by", ["sdpa", "flash", "sinks"])
def test_the_ops_own_code_reads_nothing_back(served_by, rules, monkeypatch):
    """Fake tensors see an op's fake implementation: its real one is called here, with the library's part left out."""
    launched = []

    def with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, cache_leftpad=None, **kwargs):
        assert {t.device.type for t in (q, k_cache, v_cache, cache_seqlens, cache_leftpad)} == {"cuda"}
        assert cache_seqlens.dtype == cache_leftpad.dtype == torch.int32
        assert cache_seqlens.is_contiguous() and cache_leftpad.is_contiguous()
        launched.append(k is not None)
        return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], 1, dtype=torch.float32)

    if served_by != "sdpa":
        monkeypatch.setattr(flash, "unavailable", lambda: None)
        monkeypatch.setattr(flash_libraries, "serving", lambda q, features: (with_kvcache, None))
    asked = {"wraps": False, "softcap": None, **RULES[rules]}
    with torch.device("cuda"):
        q, k = torch.empty(2, 8, 1, 16).half(), torch.empty(2, 2, 1, 16).half()
        buffers, two = (torch.empty(2, 2, 72, 16).half() for _ in "kv"), torch.ones(2, dtype=torch.int32)
        numbers = Numbers(two, two, torch.ones(1, dtype=torch.long), two)
        s_aux = torch.empty(8) if served_by == "sinks" else None
        asked |= {"s_aux": s_aux, "backend": "auto"}
        out = append_attend._append_attend(*buffers, q, k, k, *numbers, 0.25, **asked)
    assert (out.device.type, out.shape, out.dtype) == ("cuda", (2, 1, 8, 16), torch.float16)
    assert launched == ([] if served_by == "sdpa" else [True, False] if asked["wraps"] else [True])


@pytest.mark.parametrize("served_by", ["sdpa", "triton", "sinks"])
def test_nor_does_that_of_the_packed_op(served_by, monkeypatch):
    given = []
    _, steps, _ = filled("llama", bits=4)
    if served_by == "triton":
        monkeypatch.setattr(dispatch, "serving", lambda call, step: triton_backend)
        monkeypatch.setattr(triton_backend, "attend_lengths", lambda call, n: given.append(n) or call.q.transpose(1, 2))
    steps._begin(torch.ones(2, 1, dtype=torch.long, device="cuda"), None)
    part = steps.layers[0]
    with torch.device("cuda"):
        q, k, s_aux = torch.empty(2, 4, 1, 16), torch.empty(2, 2, 1, 16), torch.empty(4)
    rules = (0.25, None, s_aux if served_by == "sinks" else None, "auto")
    packed = (part.packed, part.codecs, part.layout)
    out = append_attend._append_attend_packed(part.k, part.v, q, k, k, *part.numbers, *packed, *rules)
    assert (out.device.type, out.shape, len(given)) == ("cuda", (2, 1, 4, 16), served_by == "triton")


@pytest.mark.parametrize("kind", ["static", "ring", "learned sinks", "int4", "8 and 3 bits"])
def test_how_many_kernels_a_layer_takes_without_flash(kind, monkeypatch):
    """Both halves of the new token are stored, its attention is split, and merged: nothing else runs in a layer."""
    monkeypatch.setattr(triton_backend, "unavailable", lambda: None)
    monkeypatch.setattr(triton_backend, "_too_old", lambda *args: None)
    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    bits = {"int4": (4, 4), "8 and 3 bits": (8, 3)}.get(kind, (0, 0))
    with codegen.compile_only("sm_90") as gpu, torch.device("cuda"):
        call = codegen.fake_call(64, *bits)
        new = torch.empty(1, 2, 1, 64).bfloat16()
        one = torch.ones(1, dtype=torch.int32)
        numbers = Numbers(one, torch.ones(2, dtype=torch.int32), one.long(), one)
        s_aux = torch.empty(8) if kind == "learned sinks" else None
        with launched() as operations:
            if call.packed is None:
                run, how = append_attend._append_attend, (0.25, kind == "ring", None, s_aux)
            else:
                packed = call.packed
                codecs = [packed.k_codec.name, packed.v_codec.name]
                run, how = append_attend._append_attend_packed, (
                    list(packed.arrays()), codecs, [packed.start, packed.tokens], 0.25, None, None,
                )  # fmt: skip
            run(call.k, call.v, call.q, new, new, *numbers, *how, "auto")
    assert operations == ["aten::index_copy_"] * 2
    assert [name for name, _ in gpu.launches] == ["decode_attention_kernel", "merge_splits_kernel"]
    assert len(operations) + len(gpu.launches) == 4


def test_the_blocks_of_all_layers_become_codes_in_one_launch(monkeypatch):
    """Beside it: flags that begin as ones, the addresses of the layers' tensors, the means of the first blocks."""
    monkeypatch.setattr(triton_backend, "unavailable", lambda: None)
    monkeypatch.setattr(triton_backend, "_too_old", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None, query=lambda: False))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    made = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, pin_memory, **how: made(data, **how))  # which needs a driver
    with codegen.compile_only("sm_90") as gpu:
        settings = QuantSettings(CODECS["int8"], CODECS["int4"], 16, residual_length=0, exact_first=4)
        layers = [KVQuantizedLayer(settings, 100, i, 2, 64, None) for i in range(5)]
        for layer in layers:
            for tokens in (36, 32):  # the first block, with its mean, then one as in a step
                layer.append(*(torch.empty(1, 2, tokens, 64, device="cuda").bfloat16() for _ in "kv"))
                if tokens == 36:
                    quantize_due([layer], dispatch.quantize_blocks)
        gpu.launches.clear()
        with launched() as operations:
            quantize_due(layers, dispatch.quantize_blocks)
    assert gpu.launches == [("quantize_blocks_kernel", (1, 2, 5))]
    assert operations == ["aten::ones", "aten::_to_copy"], operations
    assert {layer.packed_tokens for layer in layers} == {64}


def compiled_graph(model, steps, arguments, through_steps=True):
    """The graph that inductor is given, functional, and what is known of its inputs."""
    found = {}

    def compiler(graph, inputs):
        found.update(graph=graph, known=TracingContext.get().fw_metadata)
        return graph

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler)
    step = torch.compile(lambda **kwargs: model(**kwargs), fullgraph=True, backend=backend)
    steps.run(step, model, arguments) if through_steps else step(**arguments)
    return found["graph"], found["known"]


def reason_of_devices(graph):
    """Where inductor does not leave out of the graph what runs on the CPU, as it may by default."""
    tensors = [(node.meta["val"], node) for node in graph.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    with torch._inductor.config.patch(graph_partition=False):
        return cudagraph_utils.check_multiple_devices_or_any_cpu_nodes({t.device: node for t, node in tensors})


def unsafe_ops(graph):
    """Names of ops that are tagged so; functional for a while, an op that mutates is an argument."""
    ops = {
        op for node in graph.graph.nodes for op in (node.target, *node.args) if isinstance(op, torch._ops.OpOverload)
    }
    return {op.name() for op in ops if torch.Tag.cudagraph_unsafe in op.tags}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_inductor_finds_no_reason_to_skip_the_graph(family):
    model, steps, arguments = filled(family)
    graph, known = compiled_graph(model, steps, arguments)
    assert get_first_incompatible_cudagraph_node(graph) is None
    assert unsafe_ops(graph) == set()
    assert reason_of_devices(graph) is None
    mutated = known.mutated_inp_runtime_indices
    assert len(mutated) == 2 * 2 and set(mutated) <= set(known.static_input_indices)
    static = known.static_input_indices
    found = cudagraph_utils.check_for_mutation_ignore_cuda_graph_managed_tensor(graph, set(mutated), mutated, static)
    assert found is None
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    assert all(isinstance(value, torch.Tensor) for value in inputs), "no symbolic sizes, no numbers"
    shapes = {tuple(inputs[index].shape) for index in mutated}
    assert shapes <= {(2, 2, 100, 16), (2, 2, 72, 16)}
    copies = [node for node in graph.graph.nodes if "_to_copy" in str(node.target) or "device_put" in str(node.target)]
    assert not [node for node in copies if torch.device(node.kwargs.get("device") or "cuda").type != "cuda"]


def test_nor_for_a_quantized_cache():
    model, steps, arguments = filled("llama", bits=4)
    graph, known = compiled_graph(model, steps, arguments)
    assert get_first_incompatible_cudagraph_node(graph) is None and unsafe_ops(graph) == set()
    assert reason_of_devices(graph) is None
    mutated, static = known.mutated_inp_runtime_indices, known.static_input_indices
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    assert [tuple(inputs[index].shape) for index in mutated] == [(2, 2, 36, 16)] * 4 and set(mutated) <= set(static)
    copied = [tuple(inputs[index].shape) for index in range(len(inputs)) if index not in static]
    numbers = [(1,), (2,), (2,), (2,), (2,)]  # slot, counts, lengths, begin, padding: of both layers
    assert sorted(copied) == [*numbers, (2, 1), (2, 1)], "nothing of the cache is copied for a replay"


def test_and_would_find_those_of_steps_that_ask_the_host():
    model, steps, arguments = filled("llama")
    graph, _ = compiled_graph(model, steps, arguments, through_steps=False)
    assert unsafe_ops(graph) == {"hf_kvattn::begin", "hf_kvattn::append_and_attend"}
    assert "cpu device" in reason_of_devices(graph)


def test_and_that_buffers_may_move_if_they_did_not_say():
    model, steps, arguments = filled("llama")
    steps.run(model, model, arguments)
    for layer in steps.layers:
        del layer.k._dynamo_static_input_type
    graph, known = compiled_graph(model, steps, arguments)
    mutated = known.mutated_inp_runtime_indices
    assert len(set(mutated) - set(known.static_input_indices)) == 2


def test_other_buffers_are_not_another_graph():
    model, steps, arguments = filled("llama")
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(lambda **kwargs: model(**kwargs), fullgraph=True, backend=backend)
    for _ in range(2):
        for _ in range(3):
            steps.run(step, model, arguments)
        cache = StaticKVCache(model.config, max_cache_len=100)
        model(arguments["input_ids"].expand(-1, 20), past_key_values=cache)
        steps, arguments = DecodeSteps(cache), {**arguments, "past_key_values": cache}
    assert len(seen) == 1
