"""Calibration: how many bits the keys and the values of each layer are worth, measured on text.

An error in the cache shifts the predictions by KL(exact || quantized), to second order half the mean square of
g . error, where g is the gradient of the log-likelihood of tokens drawn from the model's own predictions (the Fisher
information). One forward and one backward pass over a window give g for every cached key and value, so each layer, each
of its two tensors and each number of bits is judged by the codes that the cache itself would write, without a pass for
each. The sums over tokens and over layers take errors to be independent of each other; measured against the divergence
of real runs, one part quantized at a time.

The same backward pass says which channels of keys matter, for the tables of their widths (`quant/widths.py`): it gives
the gradient of every attention output, hence of any score. An error `e` of a key's channel moves a query's score by
`q * e`, so the channel's importance is the mean of (gradient of score * q)**2. Only tokens count that are codes when a
query meets them: the first and the newest ones are exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AttentionMaskInterface, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_kvattn.attention import Rules, kvattn_attention, scale_of
from hf_kvattn.caches.configs import kv_shape, layer_needs
from hf_kvattn.caches.quantized_layer import KVQuantizedLayer, QuantSettings
from hf_kvattn.kernels import dispatch
from hf_kvattn.models import attention_modules
from hf_kvattn.quant import widths
from hf_kvattn.quant.calibration import EXACT_BITS, Calibration, key_bits_with_scales, value_bits_with_scales
from hf_kvattn.quant.codecs import Codec, codec_for
from hf_kvattn.quant.layout import BLOCK
from hf_kvattn.quant.widths import KeyTable
from hf_kvattn.tools.files import read_json, replace_text

BITS = (2, 3, 4, 8)
SINKS = 4  # exact in the cache unless it is told otherwise
LEAST_WINDOW = SINKS + 2 * BLOCK  # tokens: a block is quantized then, and queries meet it
NAME = "kvattn-calibration"  # of the attention function that is there while a model is measured
EVERY = 8  # queries, of which one is looked at
FP8_LARGEST = 448.0  # of float8_e4m3, which stands for the largest number seen
SCALES = ("tensor", "head")


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one part costs, in nats a token, and the largest numbers seen.

    Attributes:
        keys: (layers that store keys and values, bits) float64, a column for each of `BITS`.
        values: the same for each group size.
        tables: for 4, 3 and 2 bits, of each of these layers' keys.
        k_absmax, v_absmax: (layers, KV heads) float32.
        tokens: how many were looked at.
    """

    keys: torch.Tensor
    values: dict[int, torch.Tensor]
    tables: dict[int, list[KeyTable]]
    k_absmax: torch.Tensor
    v_absmax: torch.Tensor
    tokens: int


class _Recorder(DynamicCache):
    """Keeps keys and values of one forward from an empty cache as they are, part of the graph, with their gradients."""

    def __init__(self, config) -> None:
        super().__init__(config=config)
        self.recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        if not (torch.isfinite(key_states).all() and torch.isfinite(value_states).all()):
            raise ValueError(f"layer {layer_idx} has keys or values that are NaN or infinite on the calibration text")
        key_states.retain_grad()
        value_states.retain_grad()
        self.recorded[layer_idx] = key_states, value_states
        return key_states, value_states


@contextmanager
def _only_activations_have_gradients(model: PreTrainedModel) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    try:
        yield
    finally:
        hook.remove()
        for parameter in trained:
            parameter.requires_grad_()


@contextmanager
def _noting_importance(model: PreTrainedModel, kept: list[int], importance: torch.Tensor) -> Iterator[None]:
    """Backward passes in this context add what `_importance` finds to `importance` `(kept layers, Hkv, D)`."""
    config = model.config.get_text_config(decoder=True)
    needs, before = layer_needs(config), config._attn_implementation

    def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any):
        out, _ = kvattn_attention(module, query, key, value, mask, **kwargs)
        lender = needs[int(module.layer_idx)].lender
        i = kept.index(int(module.layer_idx) if lender is None else lender)
        rules = Rules(mask, kwargs.get("scaling"), True, None, kwargs.get("softcap"), kwargs.get("s_aux"))
        found = partial(_importance, query.detach(), key.detach(), value.detach(), out.detach(), rules)

        def add(gradient: torch.Tensor) -> None:
            importance[i] += found(gradient).to(importance.device)

        out.register_hook(add)
        return out, None

    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    AttentionMaskInterface.register(NAME, eager_mask)  # it stays: transformers has no way to take one back
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[NAME]


@torch.no_grad()
def _importance(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, rules: Rules, gradient: torch.Tensor
) -> torch.Tensor:
    """The importance `(Hkv, D)` of each channel of the keys, up to a factor, by the gradient of `out`.

    Args:
        query: `(1, Hq, T, D)`.
        key, value: `(1, Hkv, T, D)`.
        out, gradient: `(1, T, Hq, D)`.
        rules: `mask`, a float one `(1, 1, T, T)`, `scaling`, `softcap` and `s_aux` are read.
    """
    at = torch.arange(SINKS + BLOCK, query.shape[2], EVERY, device=query.device)
    q, g, o = (x[0, :, at].float().unflatten(0, (key.shape[1], -1)) for x in
               (query, gradient.transpose(1, 2), out.transpose(1, 2)))  # fmt: skip
    k, v = (x[0, :, None].float() for x in (key, value))
    scores, slope = q @ k.mT * scale_of(query, rules), 1.0
    if rules.softcap is not None:
        scores = rules.softcap * (scores / rules.softcap).tanh()
        slope = 1 - (scores / rules.softcap).square()
    scores = scores + rules.mask[0, :, at]
    if rules.s_aux is not None:
        sinks = rules.s_aux.float().view(*q.shape[:2], 1, 1).expand(*q.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    of_scores = weights * slope * (g @ v.mT - (g * o).sum(-1, keepdim=True))
    tokens = torch.arange(k.shape[2], device=query.device)
    are_codes = (tokens >= SINKS) & (tokens <= at[:, None] - BLOCK)
    weight = (of_scores * are_codes).square().sum(-1, keepdim=True)
    return (weight * q.square()).sum((1, 2))


def group_sizes(head_dim: int) -> list[int]:
    """The group sizes that a cache of this head_dim can have."""
    return [size for size in range(16, head_dim + 1, 16) if head_dim % size == 0]


def kept_layers(model: PreTrainedModel) -> list[int]:
    """The layers that store keys and values; ValueError unless all store as many numbers, and `enable` serves them."""
    attention_modules(model)
    needs = layer_needs(model.config.get_text_config(decoder=True))
    kept = [i for i, need in enumerate(needs) if need.keys]
    shapes = {needs[i][1:3] for i in kept}
    if len(shapes) > 1 or any(needs[i].latent for i in kept):
        raise ValueError(
            f"{model.config.model_type}: latents, and layers of unlike shapes, are not calibrated; KV heads and widths "
            f"are {shapes}"
        )
    return kept


def budget_of(bits: int, group_size: int) -> float:
    """Bits a number, scales included, of an uncalibrated cache."""
    return (key_bits_with_scales(bits) + value_bits_with_scales(bits, group_size)) / 2


def check_budget(budget: float, sizes: list[int]) -> None:
    """Raises ValueError, with the least and the most, where no choice of bits and of these group sizes meets it."""
    least = min(budget_of(min(BITS), size) for size in sizes)
    if not least <= budget <= EXACT_BITS:
        raise ValueError(
            f"a budget of {budget:g} bits a number is impossible: from {least:g} (2 bits everywhere) to {EXACT_BITS} "
            "(nothing quantized)"
        )


def spread(tokenizer: PreTrainedTokenizerBase, text: str, windows: int, window: int) -> torch.Tensor:
    """Windows of a text, evenly spread over it: token ids, (windows, window).

    Raises:
        ValueError: a text that is too short.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    whole = len(ids) // window
    if whole < windows:
        raise ValueError(f"the calibration text has {len(ids)} tokens: too short for {windows} windows of {window}")
    return ids[: whole * window].view(whole, window)[torch.arange(windows) * whole // windows]


def measure(
    model: PreTrainedModel, windows: torch.Tensor, sizes: list[int], seed: int = 0, progress: bool = False
) -> Sensitivity:
    """Run text through the model and judge every layer's keys and values at each number of bits.

    Args:
        model: of a kind that `hf_kvattn.enable` serves; float32 is best. It comes back as it was.
        windows: token ids, (windows, tokens), at least 68 tokens each.
        sizes: the group sizes of values to judge.
        seed: of the tokens drawn from the predictions.
        progress: show a bar on stderr.
    """
    kept = kept_layers(model)
    layers, (heads, dim) = len(kept), kv_shape(model.config.get_text_config(decoder=True))
    assert heads is not None and dim is not None
    if windows.shape[1] < LEAST_WINDOW:
        raise ValueError(
            f"windows of {windows.shape[1]} tokens hold no block that queries meet: {LEAST_WINDOW} at least"
        )
    generator = torch.Generator(model.device).manual_seed(seed)
    keys = torch.zeros(layers, len(BITS), dtype=torch.float64)
    values = {size: torch.zeros_like(keys) for size in sizes}
    k_absmax, v_absmax = torch.zeros(2, layers, heads)
    importance = torch.zeros(layers, heads, dim)
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in kept]  # keys of each window and their gradients
    with _only_activations_have_gradients(model), _noting_importance(model, kept, importance):
        for ids in tqdm(windows, desc="calibrating", unit="window", disable=not progress):
            recorder = _Recorder(model.config)
            with torch.enable_grad():
                logits = model(ids[None].to(model.device), past_key_values=recorder, use_cache=True).logits[0]
                predicted = torch.log_softmax(logits.float(), dim=-1)
                drawn = torch.multinomial(predicted.detach().exp(), 1, generator=generator)
                predicted.gather(1, drawn).sum().backward()
            for layer_idx, (k, v) in recorder.recorded.items():
                i = kept.index(layer_idx)
                for absmax, x in ((k_absmax, k), (v_absmax, v)):
                    absmax[i] = torch.maximum(absmax[i], x.detach().abs().amax((0, 2, 3)).float().cpu())
                assert k.grad is not None and v.grad is not None
                seen[i].append((k.detach(), k.grad))
                for (column, bits), size in product(enumerate(BITS), sizes):
                    values[size][i, column] += _cost(v.detach(), v.grad, 1, codec_for(bits), size, None)
    tables: dict[int, list[KeyTable]] = {bits: [] for bits in BITS if codec_for(bits).by_channel}
    for i, (column, bits) in product(range(layers), enumerate(BITS)):
        table = None
        if bits in tables:
            whole = [k[0, :, SINKS:][:, : (k.shape[2] - SINKS) // BLOCK * BLOCK] for k, _ in seen[i]]
            table = KeyTable(*(t.cpu() for t in widths.choose(torch.cat(whole, 1), importance[i], bits)))
            tables[bits].append(table)
        keys[i, column] = sum(_cost(k, gradient, 0, codec_for(bits), sizes[0], table) for k, gradient in seen[i])
    tokens = windows.numel()
    per_token = keys / tokens, {size: x / tokens for size, x in values.items()}
    return Sensitivity(*per_token, tables, k_absmax, v_absmax, tokens)


@torch.no_grad()
def _cost(
    x: torch.Tensor, gradient: torch.Tensor, which: int, codec: Codec, group_size: int, table: KeyTable | None
) -> float:
    """What the codes that a cache makes of keys `x` (`which` 0) or of values (1) cost, summed over tokens, in nats."""
    codecs = [codec_for(8), codec_for(8)]
    codecs[which] = codec
    layer = KVQuantizedLayer(QuantSettings(*codecs, group_size, 0, SINKS, table), None, 0)
    layer.append(x, x)
    layer.finish_attention(dispatch.quantize_blocks)
    shift = ((layer.dense()[which] - x).double() * gradient.double()).sum(-1)
    return shift.square().sum().item() / 2


def choose(model: PreTrainedModel, found: Sensitivity, budget: float) -> tuple[Calibration, float]:
    """The bits of each layer, and the group size, with the least predicted KLD within `budget` bits a number.

    A knapsack with one choice a layer: keys and values at 2, 3, 4 or 8 bits each, or the layer left exact.

    Returns:
        the calibration, and its predicted KLD in nats a token.

    Raises:
        ValueError: an impossible budget.
    """
    decoder = model.config.get_text_config(decoder=True)
    heads, dim = kv_shape(decoder)
    assert heads is not None and dim is not None
    check_budget(budget, list(found.values))
    pairs = list(product(range(len(BITS)), repeat=2))
    candidates = []
    for size, values in found.values.items():
        unit = 1 / math.lcm(2 * BLOCK, size)  # every cost below is a whole number of these
        bits_of_pairs = [key_bits_with_scales(BITS[a]) + value_bits_with_scales(BITS[b], size) for a, b in pairs]
        costs = [round(bits / unit) for bits in [*bits_of_pairs, 2 * EXACT_BITS]]
        errors = [[*((found.keys[i, a] + values[i, b]).item() for a, b in pairs), 0.0] for i in range(len(found.keys))]
        chosen = _knapsack(costs, errors, math.floor(2 * budget * len(errors) / unit + 1e-6))
        if chosen is None:
            continue
        total = sum(row[choice] for row, choice in zip(errors, chosen, strict=True))
        skipped = tuple(i for i, choice in enumerate(chosen) if choice == len(pairs))
        bits = [(8, 8) if i in skipped else tuple(BITS[j] for j in pairs[choice]) for i, choice in enumerate(chosen)]
        key_bits, value_bits = zip(*bits, strict=True)
        tables = tuple(
            found.tables[b][i] if b in found.tables and i not in skipped else None for i, b in enumerate(key_bits)
        )
        made = Calibration(decoder.model_type, len(errors), heads, dim, size, key_bits, value_bits, skipped, tables)
        candidates.append((made, total))
    return min(candidates, key=lambda candidate: candidate[1])


def _knapsack(costs: list[int], errors: list[list[float]], capacity: int) -> list[int] | None:
    """For each row of `errors` one choice, of these costs, so that the errors' sum is least; None if nothing fits."""
    common = math.gcd(*costs)
    costs, capacity = [cost // common for cost in costs], capacity // common
    best = torch.zeros(capacity + 1, dtype=torch.float64)  # by what may be spent
    choices = []
    for row in errors:
        table = torch.full((len(costs), capacity + 1), torch.inf, dtype=torch.float64)
        for choice, (cost, error) in enumerate(zip(costs, row, strict=True)):
            if cost <= capacity:
                table[choice, cost:] = best[: capacity + 1 - cost] + error
        best, choice_at = table.min(0)
        choices.append(choice_at)
    if best[-1].isinf():
        return None
    left, chosen = capacity, []
    for choice_at in reversed(choices):
        chosen.append(int(choice_at[left]))
        left -= costs[chosen[-1]]
    return chosen[::-1]


def export_scales(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    found: Sensitivity,
    folder: Path,
    strategy: str = "tensor",
    max_shard_size: str = "5GB",
) -> None:
    """Write the model with `k_scale` and `v_scale` of every attention module, as compressed-tensors lays them out.

    vLLM reads them for its fp8 cache: a number is stored as float8_e4m3 of itself over the scale. `config.json` says so
    in `quantization_config.kv_cache_scheme`; the weights stay as they are.

    Args:
        strategy: `tensor`, a scale (1,) for each of K and V in a layer, or `head`, (KV heads, 1, 1).

    Raises:
        ValueError: a model that is quantized already, or files that do not hold what was written.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model has a quantization_config already: scales are exported of a plain one")
    names = {id(module): name for name, module in model.named_modules()}
    modules, kept = attention_modules(model), kept_layers(model)
    needs = layer_needs(model.config.get_text_config(decoder=True))
    scales: dict[str, torch.Tensor] = {}
    for letter, absmax in (("k", found.k_absmax), ("v", found.v_absmax)):
        for module in modules:
            index = int(module.layer_idx)  # type: ignore[arg-type]  # an nn.Module's attribute
            lender = needs[index].lender
            largest = absmax[kept.index(index if lender is None else lender)]
            largest = largest[:, None, None] if strategy == "head" else largest.amax().reshape(1)
            scale = torch.where(largest > 0, largest / FP8_LARGEST, 1.0)
            scales[f"{names[id(module)]}.{letter}_scale"] = scale.contiguous()
    model.save_pretrained(folder, state_dict={**model.state_dict(), **scales}, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    granularity = "attn_head" if strategy == "head" else "tensor"
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": granularity, "dynamic": False}
    plain = {"quant_method": "compressed-tensors", "format": "dense", "quantization_status": "frozen"}
    config = read_json(path)
    config["quantization_config"] = {**plain, "config_groups": {}, "ignore": [], "kv_cache_scheme": scheme}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    written: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        written |= load_file(file)
    lost = [name for name, scale in scales.items() if name not in written or not torch.equal(written[name], scale)]
    if lost:
        raise ValueError(f"{len(lost)} scales are not in the written checkpoint, {lost[0]} among them")


def save(calibration: Calibration, path: str | Path) -> None:
    """Writes a calibration file, whole or not at all; ValueError where there is one already."""
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already: move it away or choose another output")
    fields = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in calibration.as_json().items())
    replace_text(path, "{\n" + ",\n".join(fields) + "\n}\n")
