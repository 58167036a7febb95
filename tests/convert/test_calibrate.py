"""Calibration: what is chosen, what caches and `enable` make of it, scales for vLLM, and bad input."""

from __future__ import annotations

import itertools
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import command_lines
import pytest
import torch
from models import generate, prompt, tiny_config, tiny_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import hf_kvattn
from hf_kvattn import QuantizedKVCache
from hf_kvattn.attention import Rules
from hf_kvattn.caches.static_layer import KVStaticLayer
from hf_kvattn.convert import calibrate
from hf_kvattn.evaluation import cards
from hf_kvattn.kernels import dispatch
from hf_kvattn.quant import widths
from hf_kvattn.quant.calibration import MAX_FILE_BYTES, Calibration, file_name
from hf_kvattn.quant.codecs import codec_for
from hf_kvattn.quant.packed import OF_BLOCKS


def table(bits: int, seed: int = 0, heads: int = 2, dim: int = 16) -> widths.KeyTable:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, 64, dim, generator=generator) * torch.rand(heads, 1, dim, generator=generator)
    return widths.choose(keys, torch.rand(heads, dim, generator=generator), bits)


GIVEN = Calibration("llama", 3, 2, 16, 16, (8, 4, 2), (2, 3, 8))
WITH_TABLES = replace(GIVEN, tables=(None, table(4), table(2, 1)))


pytestmark = pytest.mark.usefixtures("one_thread")


def windows(count: int = 2, length: int = 100) -> torch.Tensor:
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(3))


# --------------------------------------------------------------------------------------------- the object and its file


def wide() -> Calibration:
    """Numbers as small and as large as there are, and more channels than a byte counts."""
    made = widths.choose(torch.zeros(1, 64, 512), None, 3)
    mean = torch.linspace(-1.5e38, 1.5e38, 512)[None]
    mean[0, :3] = torch.tensor([1e-45, 0.0, 1 / 3])
    step = made.step.clone()
    step[0, 0], step[0, 1] = 1e18, 1 / 3
    return Calibration("llama", 1, 1, 512, 16, (3,), (4,), (), (made._replace(mean=mean, step=step),))


def test_a_file_gives_back_what_was_saved_and_replaces_nothing(tmp_path):
    path = tmp_path / "calibration.json"
    for i, made in enumerate((replace(GIVEN, skip_layers=(1,)), wide(), WITH_TABLES)):
        path = tmp_path / f"calibration{i}.json"
        calibrate.save(made, path)
        loaded = Calibration.load(path)
        assert loaded.as_json() == made.as_json() and len(list(tmp_path.iterdir())) == i + 1
        for ours, theirs in zip(loaded.tables, made.tables, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(ours, theirs, strict=True))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        calibrate.save(GIVEN, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "no calibration of version 1 or 2"),
        ({"version": True}, "no calibration of version 1 or 2"),
        ({"version": 1}, "tables must be a list, and came with version 2, got version 1"),
        ({"key_bits": [4, 4]}, r"key_bits must be 3 numbers, one a layer, got \(4, 4\)"),
        ({"key_bits": [4, 5, 4]}, "bits must be one of .* got 5"),
        ({"value_bits": [4, True, 4]}, "value_bits must be ints, got True"),
        ({"value_bits": [4, 4.0, 4]}, "value_bits must be ints, got 4.0"),
        ({"value_bits": [4, [4], 4]}, "value_bits must be ints"),
        ({"value_bits": "444"}, "value_bits must be 3 numbers, one a layer, got '444'"),
        ({"layers": -1}, "layers must be an int of at least 1, got -1"),
        ({"kv_heads": "2"}, "kv_heads must be an int of at least 1, got '2'"),
        ({"group_size": 32}, "group_size=32 does not divide head_dim=16"),
        ({"group_size": 0}, "group_size must be a multiple of 16, got 0"),
        ({"skip_layers": [3]}, r"skip_layers must be from 0 to 2, got \(3,\)"),
        ({"model_type": None}, "model_type must be a string, got None"),
        ({"rotation": 1}, "rotation"),
        ({"tables": [None]}, "tables must be 3, one a layer, or none"),
        ({"tables": {"0": None}}, "tables must be a list"),
        ({"key_bits": [8, 8, 2]}, "the table of layer 1: keys of 8 bits have none"),
        ({"key_bits": [8, 3, 2]}, "the table of layer 1: widths of keys must fall from 7 at most, with 3 bits"),
        ({"head_dim": 32}, r"the table of layer 1: mean must be \(2, 32\) torch.float32, got \(2, 16\)"),
        ({"kv_heads": 1}, r"the table of layer 1: mean must be \(1, 16\) torch.float32, got \(2, 16\)"),
    ],
)
def test_broken_files_are_named_with_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "calibration.json"
    calibrate.save(WITH_TABLES, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"calibration.json is not a calibration file: .*{message}"):
        Calibration.load(path)


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("mean", (0, 0), float("nan"), "mean of a table holds nan"),
        ("mean", (1, 3), float("inf"), "mean of a table holds inf"),
        ("mean", (1, 3), 10**400, "mean of a table holds 1000"),
        ("mean", (0, 0), "1", "mean of a table holds '1'"),
        ("mean", (0, 0), True, "mean of a table holds True"),
        ("mean", (0, 0), None, "mean of a table holds None"),
        ("mean", (0, 0), [1.0], r"mean of a table holds \[1.0\]"),
        ("mean", (0,), [0.0], "mean of a table must be lists of one length"),
        ("mean", (0,), 0.0, "mean of a table must be a list for each KV head"),
        ("mean", (), [], "mean of a table must be a list for each KV head"),
        ("mean", (), [[], []], r"mean must be \(2, 16\) torch.float32, got \(2, 0\)"),
        ("mean", (), {"0": 1}, "mean of a table must be a list for each KV head"),
        ("step", (0, 0), 0, "steps of keys must be from"),
        ("step", (0, 0), -1.0, "steps of keys must be from"),
        ("step", (1, 15), 1e20, "steps of keys must be from"),
        ("unit", (0, 0), 0.0, "units of keys must be from"),
        ("unit", (0, 0), 1e-30, "units of keys must be from"),
        ("order", (0, 0), 16, "an order of keys' channels is none of 16"),
        ("order", (0, 0), -1, "order of a table holds -1"),
        ("order", (0, 0), 1 << 16, "order of a table holds 65536"),
        ("order", (0, 0), 1.0, "order of a table holds 1.0"),
        ("order", (0,), [0] * 16, "an order of keys' channels is none of 16"),
        ("widths", (0, 0), 5, "widths of keys must fall"),
        ("widths", (0, 0), 256, "widths of a table holds 256"),
        ("widths", (), [[4]], r"widths must be \(2, 1\) torch.uint8, got \(1, 1\)"),
    ],
    ids=str,
)
def test_broken_tables_are_named_with_what_is_wrong(name, at, value, message):
    found = json.loads(json.dumps(WITH_TABLES.as_json()))
    place = found["tables"][1]
    for key in (name, *at)[:-1]:
        place = place[key]
    place[(name, *at)[-1]] = value
    with pytest.raises(ValueError, match=message):
        Calibration.of_json(found)
    del found["tables"][1]["unit"]
    with pytest.raises(ValueError, match="a table must have mean, step, unit, order, widths"):
        Calibration.of_json(found)


def test_widths_of_a_table_fall():
    good = widths.choose(torch.randn(1, 64, 32) * torch.linspace(1, 50, 32), None, 4)
    assert good.widths.tolist() == [[5, 3]] or good.widths[0, 0] > good.widths[0, 1]
    made = Calibration("llama", 1, 1, 32, 16, (4,), (4,), (), (good,))
    with pytest.raises(ValueError, match="layer 0: widths of keys must fall"):
        replace(made, tables=(good._replace(widths=good.widths.flip(-1)),))
    with pytest.raises(ValueError, match="layer 0: step must be .* torch.bfloat16, got .* torch.float32"):
        replace(made, tables=(good._replace(step=good.step.float()),))


def test_a_file_of_version_1_has_bits_and_no_tables(tmp_path):
    path = tmp_path / "calibration.json"
    old = {name: x for name, x in GIVEN.as_json().items() if name != "tables"} | {"version": 1}
    path.write_text(json.dumps(old))
    assert Calibration.load(path).as_json() == GIVEN.as_json() == WITH_TABLES.without_tables().as_json()
    assert GIVEN.tables == (None, None, None)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"version": 1}'])
def test_files_of_something_else_are_refused(tmp_path, content):
    path = tmp_path / "calibration.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="calibration.json is not a calibration file"):
        Calibration.load(path)


def test_files_are_not_read_without_end(tmp_path):
    path = tmp_path / "calibration.json"
    calibrate.save(GIVEN, path)
    with path.open("a") as file:
        file.write(" " * (MAX_FILE_BYTES - path.stat().st_size))
    assert Calibration.load(path).as_json() == GIVEN.as_json()
    os.truncate(path, 1 << 40)  # of which nothing is on the disk
    for endless in (path, "/dev/zero"):
        with pytest.raises(ValueError, match=f"{endless} is not a calibration file: it is larger than 16777216 bytes"):
            QuantizedKVCache(tiny_config(), calibration=endless)
    with pytest.raises(ValueError, match="7 is not a calibration file"):  # nor a descriptor
        QuantizedKVCache(tiny_config(), calibration=7)


def test_bits_count_codes_scales_and_exact_layers():
    """Against what a full cache allocates, less its exact tokens and what serves all blocks."""
    for made in (GIVEN, replace(GIVEN, key_bits=(3, 3, 3), value_bits=(4, 8, 2))):
        cache = QuantizedKVCache(tiny_config(), calibration=made, sinks=0)
        for i in range(3):
            cache.update(*torch.randn(2, 1, 2, 320, 16).bfloat16(), i)
        codes = [t for x in cache.layers for name, t in x._packed.items() if name in OF_BLOCKS]
        numbers = sum(2 * 2 * 16 * 32 * x._packed["k_codes"].shape[2] for x in cache.layers)
        assert made.bits_per_element == 8 * sum(t.numel() * t.element_size() for t in codes) / numbers
    assert replace(GIVEN, skip_layers=(0, 1, 2)).bits_per_element == 16


# --------------------------------------------------------------------------------------------------------- the caches


def test_a_calibrated_cache_has_its_layers_bits_and_reads_them(tmp_path):
    path = tmp_path / "calibration.json"
    made = replace(GIVEN, skip_layers=(1,))
    calibrate.save(made, path)
    model, inputs = tiny_model("llama"), prompt(75)
    logits = []
    for calibration in (made, path, str(path)):
        cache = QuantizedKVCache(model.config, calibration=calibration)
        with hf_kvattn.enabled(model):
            logits.append(generate(model, inputs, past_key_values=cache)[1])
        assert isinstance(cache.layers[1], KVStaticLayer)
        for i in (0, 2):
            settings = cache.layers[i].settings
            assert (settings.k_codec.bits, settings.v_codec.bits, settings.group_size) == (
                made.key_bits[i],
                made.value_bits[i],
                16,
            )
            assert cache.layers[i].packed_tokens == 64
            assert cache.layers[i]._packed["v_codes"].shape[-1] == 4 * made.value_bits[i] * 16
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    uniform = Calibration("llama", 3, 2, 16, 16, (4,) * 3, (4,) * 3)
    for cache in (QuantizedKVCache(model.config, calibration=uniform), QuantizedKVCache(model.config, group_size=16)):
        with hf_kvattn.enabled(model):
            logits.append(generate(model, inputs, past_key_values=cache)[1])
    assert torch.equal(logits[3], logits[4]) and not torch.equal(logits[0], logits[3])


@pytest.mark.parametrize(
    "kwargs", [{"bits": 8}, {"key_bits": 4}, {"value_bits": 4}, {"group_size": 16}, {"skip_layers": [0]}], ids=str
)
def test_what_a_calibration_sets_cannot_be_set_beside_it(kwargs):
    with pytest.raises(ValueError, match="a calibration sets the bits, group_size and skip_layers itself"):
        QuantizedKVCache(tiny_config(), calibration=GIVEN, **kwargs)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {}, "model_type 'llama', not 'qwen2'"),
        ("llama", {"num_hidden_layers": 4}, "layers 3, not 4"),
        ("llama", {"num_hidden_layers": 2}, "layers 3, not 2"),
        ("llama", {"num_key_value_heads": 4, "head_dim": 32}, "kv_heads 2, not 4 and head_dim 16, not 32"),
    ],
)
def test_another_models_calibration_is_refused_with_what_differs(family, changes, message):
    with pytest.raises(ValueError, match=f"made for another model, one of {message}"):
        QuantizedKVCache(tiny_config(family, **changes), calibration=GIVEN)


# -------------------------------------------------------------------------------------------------------------- enable


@pytest.fixture
def saved(tmp_path):
    """A model's folder, with a tokenizer of one word a token."""
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_enable_takes_the_calibration_beside_the_model_and_says_so_once(saved, caplog):
    calibrate.save(GIVEN, saved / file_name("int4"))
    model, inputs = load(saved), prompt(75)
    caplog.set_level(logging.INFO, logger="hf_kvattn")
    for _ in range(2):
        hf_kvattn.enable(model, cache="int4")

    def told() -> list[str]:
        return [r.message for r in caplog.records if "caches follow" in r.message]

    assert len(told()) == 1 and str(saved / file_name("int4")) in told()[0]
    expected = generate(model, inputs, past_key_values=QuantizedKVCache(model.config, calibration=GIVEN))[1]
    assert torch.equal(generate(model, inputs)[1], expected)
    for other in ("int8", "static"):  # it is int4's
        hf_kvattn.enable(model, cache=other)
    assert len(told()) == 1
    hf_kvattn.disable(model)
    (saved / file_name("int4")).unlink()
    hf_kvattn.enable(model, cache="int4")
    assert len(told()) == 1


def test_enable_refuses_a_broken_or_foreign_calibration_and_changes_nothing(saved):
    model, path = load(saved), saved / file_name("int4")
    path.write_text("{")
    with pytest.raises(ValueError, match="kvattn_calibration_int4.json is not a calibration file"):
        hf_kvattn.enable(model, cache="int4")
    path.unlink()
    calibrate.save(replace(GIVEN, kv_heads=1), path)
    hf_kvattn.enable(model, cache="int8")
    with pytest.raises(ValueError, match="kv_heads 1, not 2"):
        hf_kvattn.enable(model, cache="int4")
    assert model._hf_kvattn.request == ("int8", False)  # the earlier call's
    hf_kvattn.disable(model)
    assert not hf_kvattn.is_enabled(model)


# --------------------------------------------------------------------------------------------------------- the choice


def brute_force(costs, errors, capacity):
    best = None
    for chosen in itertools.product(range(len(costs)), repeat=len(errors)):
        total = sum(row[c] for row, c in zip(errors, chosen, strict=True))
        if sum(costs[c] for c in chosen) <= capacity and (best is None or total < best):
            best = total
    return best


@pytest.mark.parametrize("seed", range(30))
def test_the_knapsack_finds_what_trying_everything_finds(seed):
    generator = torch.Generator().manual_seed(seed)
    costs = (torch.randint(1, 9, (4,), generator=generator) * 6).tolist()
    errors = torch.rand(4, 4, generator=generator, dtype=torch.float64).tolist()
    capacity = int(torch.randint(10, 200, (1,), generator=generator))
    chosen = calibrate._knapsack(costs, errors, capacity)
    best = brute_force(costs, errors, capacity)
    if best is None:
        assert chosen is None
    else:
        assert sum(costs[c] for c in chosen) <= capacity
        assert sum(row[c] for row, c in zip(errors, chosen, strict=True)) == pytest.approx(best, rel=1e-12)


def sensitivity(layers: int = 3, sensitive: int = 1) -> calibrate.Sensitivity:
    """Every part costs the same, but for the keys of one layer."""
    part = torch.tensor([[1.6e-2, 4e-3, 1e-3, 1e-5]], dtype=torch.float64).repeat(layers, 1)
    keys = part.clone()
    keys[sensitive] *= 1000
    tables = {bits: [table(bits)] * layers for bits in (2, 3, 4)}
    return calibrate.Sensitivity(keys, {16: part}, tables, torch.ones(layers, 2), torch.ones(layers, 2), 100)


def test_bits_go_where_errors_cost_most_and_the_budget_is_kept():
    model = tiny_model("llama")
    uniform = calibrate.budget_of(4, 16)
    made, predicted = calibrate.choose(model, sensitivity(), uniform)
    assert made.key_bits[1] == 8 and made.bits_per_element <= uniform and predicted < 0.04  # uniform: 1.005
    for budget in (calibrate.budget_of(2, 16), 4.0, 5.0, 7.0, 16.0):
        made, cost = calibrate.choose(model, sensitivity(), budget)
        assert made.bits_per_element <= budget + 1e-9
    assert calibrate.choose(model, sensitivity(), calibrate.budget_of(2, 16))[0].key_bits == (2, 2, 2)
    assert made.skip_layers == (0, 1, 2) and cost == 0


@pytest.mark.parametrize("budget", [0.0, 2.34, 16.1, float("nan"), float("inf")])
def test_an_impossible_budget_is_named_with_the_least_and_the_most(budget):
    with pytest.raises(ValueError, match=rf"{budget:g} bits .* from 2.34375 \(2 bits everywhere\) to 16"):
        calibrate.choose(tiny_model("llama"), sensitivity(), budget)


def test_the_prediction_is_the_divergence_of_a_real_run(monkeypatch):
    """One forward with a part of one layer quantized, all else exact; averaged over parts, as one draw is noisy."""
    monkeypatch.setattr(calibrate, "EVERY", 1)
    torch.manual_seed(0)
    model = tiny_model("llama", initializer_range=0.1)
    ids = windows(12, 132)
    found = calibrate.measure(model, ids, [16])

    def attention(module, query, key, value, mask, scaling, **kwargs):
        """As where tokens come one by one: the first and the newest are exact, others of one part are codes."""
        q, (k, v) = query.unflatten(1, (2, -1)), (x[:, :, None] for x in (key, value))
        both = [k, v]
        if module.layer_idx == part[0]:
            table = found.tables[part[2]][part[0]] if part[2] in found.tables else None
            settings = calibrate.QuantSettings(*[codec_for(part[2])] * 2, 16, 0, calibrate.SINKS, table)
            stored = calibrate.KVQuantizedLayer(settings, None, 0)
            stored.append(key, value)
            stored.finish_attention(dispatch.quantize_blocks)
            both[part[1]] = stored.dense()[part[1]][:, :, None]
        at = torch.arange(132)
        far = at[:, None] - at > (at[:, None] - 4) % 32
        weights = (torch.where(far, q @ both[0].mT, q @ k.mT) * scaling + mask[:, :, None]).softmax(-1)
        out = (weights * far) @ both[1] + (weights * ~far) @ v
        return out.flatten(1, 2).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(calibrate.ALL_ATTENTION_FUNCTIONS, "one-part", attention)
    calibrate.AttentionMaskInterface.register("one-part", calibrate.eager_mask)
    model.config._attn_implementation = "one-part"
    measured, predicted = [], []
    part = (3, 0, 8)  # none of the layers
    with torch.no_grad():
        exact = torch.log_softmax(model(ids, use_cache=False).logits, -1)
        for layer, which, column in itertools.product(range(3), range(2), (1, 2)):
            part = layer, which, calibrate.BITS[column]
            own = torch.log_softmax(model(ids, use_cache=False).logits, -1)
            measured.append((exact.exp() * (exact - own)).sum(-1).mean().item())
            predicted.append((found.keys, found.values[16])[which][layer, column].item())
    ratios = torch.tensor(predicted) / torch.tensor(measured)
    assert 0.8 < ratios.log().mean().exp() < 1.25 and ratios.min() > 0.5 and ratios.max() < 2, ratios


@pytest.mark.parametrize("family", ["llama-g3", "mistral", "qwen3", "gemma2", "gemma3", "phi3"])
def test_measuring_leaves_the_model_as_it_was(family):
    model = tiny_model(family)
    model.lm_head.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    found = calibrate.measure(model, windows(1, 70), [16])
    assert (found.keys > 0).all() and (found.values[16] > 0).all() and found.k_absmax.min() > 0
    assert (found.keys[:, 0] > found.keys[:, 3]).all() and (found.values[16][:, 0] > found.values[16][:, 3]).all()
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())
    assert not model.get_input_embeddings()._forward_hooks
    assert torch.equal(found.keys, calibrate.measure(model, windows(1, 70), [16]).keys)


@pytest.mark.parametrize(("softcap", "sinks", "window"), [(None, False, None), (2.0, False, 40), (None, True, 50)])
def test_what_is_noted_is_what_autograd_says_of_scores(softcap, sinks, window):
    """Gradients by scores, and the sum over queries and tokens of (gradient of score * q)**2, in float64."""
    tokens, heads, group, dim = 132, 2, 3, 16
    q, k, v = (torch.randn(1, n, tokens, dim, dtype=torch.float64) for n in (heads * group, heads, heads))
    gradient = torch.randn(1, tokens, heads * group, dim, dtype=torch.float64)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    mask = torch.zeros(tokens, tokens).masked_fill_((distance < 0) | (distance >= (window or tokens)), -torch.inf)
    s_aux = torch.randn(heads * group, dtype=torch.float64) if sinks else None
    scores = (q.unflatten(1, (heads, group)) @ k[:, :, None].mT * 0.3).requires_grad_()
    capped = scores if softcap is None else softcap * (scores / softcap).tanh()
    wide = capped + mask
    if s_aux is not None:
        wide = torch.cat([wide, s_aux.view(1, heads, group, 1, 1).expand(1, -1, -1, tokens, 1)], -1)
    out = (wide.softmax(-1)[..., :tokens] @ v[:, :, None]).flatten(1, 2).transpose(1, 2)
    out.backward(gradient)
    at = slice(36, None, calibrate.EVERY)
    share = torch.stack([distance > newest for newest in range(32)]).double().mean(0) * (torch.arange(tokens) >= 4)
    chosen = torch.zeros(tokens, 1, dtype=torch.bool)
    chosen[at] = True
    of_scores, q_grouped, weights = (
        scores.grad * share.sqrt() * chosen,
        q.unflatten(1, (heads, group)),
        wide.softmax(-1),
    )
    rules = Rules(mask[None, None].double(), 0.3, True, None, softcap, s_aux)
    layer = calibrate._Noted(k, v, torch.zeros_like(k), torch.zeros_like(v), torch.zeros(heads, dim).double())
    calibrate._note(layer, q, out.detach(), rules, gradient)
    always = scores.grad * (share == 1) * chosen
    importance = (always[..., None] * q_grouped[..., None, :]).square().sum((0, 2, 3, 4)) * 0.3**2
    torch.testing.assert_close(layer.importance, importance)
    torch.testing.assert_close(layer.of_k, (of_scores.mT @ q_grouped).sum(2) * 0.3)
    of_out = gradient.transpose(1, 2).unflatten(1, (heads, group))
    torch.testing.assert_close(
        layer.of_v, ((weights[..., :tokens] * share.sqrt() * chosen).mT @ of_out).sum(2).detach()
    )


def test_channels_that_queries_use_get_the_bits():
    """Keys vary alike in all channels; queries meet half of them, most layers' others hardly."""
    model = tiny_model("llama", head_dim=32, initializer_range=0.1)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.unflatten(0, (-1, 2, 8, 2))[..., 0, :] *= 1e-2
    found = calibrate.measure(model, windows(2, 132), [16])
    used = torch.arange(32) % 2 == 1
    for each in found.tables[2]:
        assert used[each.order[:, :16].long()].float().mean() > 0.9 and (each.widths[:, 0] > each.widths[:, 1]).all()


def test_nan_keys_are_named():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.v_proj.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="layer 1 .* NaN"):
        calibrate.measure(model, windows(), [16])


# ----------------------------------------------------------------------------------------------------- the command line


def text_file(folder: Path, tokens: int = 700, seed: int = 0) -> Path:
    ids = torch.randint(3, 128, (tokens,), generator=torch.Generator().manual_seed(seed))
    path = folder / f"text{seed}-{tokens}.txt"
    path.write_text(" ".join(f"w{i}" for i in ids.tolist()))
    return path


def run(*arguments: object) -> int:
    return command_lines.run("calibrate", *arguments)


def small(tmp_path: Path) -> list[object]:
    calibration = ["--calibration-text", text_file(tmp_path), "--calibration-windows", 2, "--window", 100]
    return [*calibration, "--text", text_file(tmp_path, seed=1), "--windows", 2]


def test_the_command_line_writes_what_enable_uses_and_reports_it(saved, tmp_path, capsys):
    arguments = [*small(tmp_path), "--dtype", "float32", "--report", tmp_path / "report", "--json"]
    assert run("--model", saved, *arguments) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    made = Calibration.load(saved / file_name("int4"))
    uniform = calibrate.budget_of(4, 16)
    assert made.bits_per_element <= uniform and (made.layers, made.kv_heads, made.head_dim) == (3, 2, 16)
    rows = {row["variant"]: row for row in results["rows"]}
    assert list(rows) == ["stock-dynamic", "int4, groups of 16", "calibrated"]
    assert rows["int4, groups of 16"]["code_bits"] == uniform and rows["calibrated"]["kld_share"] == 1
    assert [x["key_bits"] for x in results["layers"]] == list(made.key_bits)
    report = (tmp_path / "report" / "report.md").read_text()
    assert "## Calibration" in report and (tmp_path / "report" / "calibrated_bits.png").stat().st_size > 10_000
    cards.write(tmp_path / "report")
    model = load(saved)
    hf_kvattn.enable(model, cache="int4")
    generate(model, prompt(75))
    assert run("--model", saved, *small(tmp_path)) == 2  # it is there already
    assert "exists already" in capsys.readouterr().err


def refusals(tmp_path: Path, saved: Path):
    yield ["--window", 400], "the calibration text has 700 tokens: too short for 2 windows of 400"
    yield ["--window", 67], "windows of 67 tokens hold no block that queries meet: 68 at least"
    yield ["--budget", 2.3], r"a budget of 2.3 bits a number is impossible: from 2.34375 (2 bits everywhere) to 16"
    yield ["--budget", 99], "a budget of 99 bits"
    yield ["--group-size", 32], "the group size of a head_dim of 16 is one of [16], not 32"
    yield ["--report", tmp_path / "r", "--windows", 9], "the text has 700 tokens, and 900 are needed"
    yield ["--report", tmp_path / "r", "--text", text_file(tmp_path)], "measure on text it has not seen"
    yield ["--calibration-text", "no-such.txt"], "no such text: 'no-such.txt'"
    yield ["--output", tmp_path / "none" / "x.json"], "there is no folder"
    yield ["--output", saved], "exists already"
    yield ["--export-scales", saved], "exists already"
    yield ["--model", "smollm2-135m"], "'smollm2-135m' is no local folder to put the calibration in: give --output"


def test_the_command_line_refuses_in_one_line_and_writes_nothing(saved, tmp_path, capsys):
    common = ["--model", saved, *small(tmp_path)]
    text_file(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in refusals(tmp_path, saved):
        capsys.readouterr()
        assert run(*common, "--export-scales", tmp_path / "scales", *arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert ": error: " in error and message in error
        assert sorted(tmp_path.rglob("*")) == before


def test_models_of_other_kinds_are_refused(saved, tmp_path, capsys):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba"}))
    assert run("--model", saved, *small(tmp_path)) == 2
    assert ": error: " in capsys.readouterr().err.splitlines()[-1]
    assert not (saved / file_name("int4")).exists()


# --------------------------------------------------------------------------------------------------- scales for vLLM


def exported(saved: Path, tmp_path: Path, strategy: str, **arguments: object) -> Path:
    folder = tmp_path / "scales"
    model = load(saved)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved)
    folder.mkdir()
    calibrate.export_scales(model, tokenizer, calibrate.measure(model, windows(), [16]), folder, strategy, **arguments)
    return folder


@pytest.mark.parametrize(("strategy", "shape"), [("tensor", (1,)), ("head", (2, 1, 1))])
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_scales_are_the_largest_numbers_over_448_and_the_weights_stay(saved, tmp_path, strategy, shape, shard):
    folder = exported(saved, tmp_path, strategy, max_shard_size=shard)
    written = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (shard == "50KB")
    if index.exists():
        assert set(json.loads(index.read_text())["weight_map"]) == set(written)
    original = load_file(saved / "model.safetensors")
    assert all(torch.equal(written[name], weight) for name, weight in original.items())
    model, seen = load(saved), {}
    with torch.no_grad():
        for ids in windows():
            cache = calibrate.DynamicCache(config=model.config)
            model(ids[None], past_key_values=cache)
            for i, layer in enumerate(cache.layers):
                for letter, x in (("k", layer.keys), ("v", layer.values)):
                    largest = x.abs().amax((0, 2, 3))
                    seen[letter, i] = torch.maximum(seen.get((letter, i), largest), largest)
    for (letter, i), largest in seen.items():
        scale = written.pop(f"model.layers.{i}.self_attn.{letter}_scale")
        assert tuple(scale.shape) == shape and scale.dtype == torch.float32
        expected = largest if strategy == "head" else largest.max()
        torch.testing.assert_close(scale.flatten() * 448, expected.reshape(-1), rtol=1e-5, atol=0)
    assert set(written) == set(original)


@pytest.mark.parametrize("strategy", calibrate.SCALES)
def test_compressed_tensors_reads_the_scales(saved, tmp_path, strategy):
    package = pytest.importorskip("compressed_tensors.quantization", reason="needs the package compressed-tensors")
    folder = exported(saved, tmp_path, strategy)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    parsed = package.QuantizationConfig.model_validate(config)
    scheme = parsed.kv_cache_scheme
    assert (scheme.num_bits, scheme.type, scheme.symmetric, scheme.dynamic) == (8, "float", True, False)
    model = load(saved)
    package.apply_quantization_config(model, parsed)
    scales = {name: x for name, x in load_file(folder / "model.safetensors").items() if name.endswith("_scale")}
    own = model.state_dict()
    assert {name for name in own if name.endswith("_scale")} == set(scales) and len(scales) == 6
    assert all(own[name].shape == scale.shape for name, scale in scales.items())
    model.load_state_dict(scales, strict=False)
    ids = windows(1)
    with torch.no_grad():
        plain, fp8 = load(saved)(ids).logits, model(ids).logits
    assert 0 < (plain - fp8).abs().mean() < 0.1 * plain.std()


def test_a_quantized_model_is_not_exported(saved, tmp_path):
    model = load(saved)
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    found = calibrate.measure(model, windows(), [16])
    with pytest.raises(ValueError, match="has a quantization_config already"):
        calibrate.export_scales(model, None, found, tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_a_saved_calibrated_cache_comes_back_with_the_bits_of_its_layers(tmp_path):
    path = tmp_path / "calibration.json"
    calibrate.save(GIVEN, path)
    model, ids = tiny_model(), prompt(75)["input_ids"]
    with torch.no_grad(), hf_kvattn.enabled(model):
        for calibration in (path, GIVEN, GIVEN.as_json()):
            cache = QuantizedKVCache(model.config, calibration=calibration, residual_length=3)
            model(ids, past_key_values=cache)
            hf_kvattn.save_cache(cache, tmp_path / "cache")
            path.unlink(missing_ok=True)  # a file says all that it needs
            loaded = hf_kvattn.load_cache(tmp_path / "cache", model.config)
            assert loaded.settings == cache.settings
            for ours, theirs in zip(loaded.layers, cache.layers, strict=True):
                assert vars(ours).get("settings") == vars(theirs).get("settings")
            again = type(loaded)(model.config, **loaded.settings)
            assert [type(layer) for layer in again.layers] == [type(layer) for layer in cache.layers]
            one = ids[:, :1]
            assert torch.equal(model(one, past_key_values=loaded).logits, model(one, past_key_values=cache).logits)
