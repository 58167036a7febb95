"""Calibration: how many bits the keys and the values of each layer are worth, measured on text.

An error in the cache shifts the predictions by KL(exact || quantized), to second order half the mean square of
g . error, where g is the gradient of the log-likelihood of tokens drawn from the model's own predictions (the Fisher
information). One forward and one backward pass over a window give the gradient of every attention output, hence of
scores and weights, and from these g for every cached key and value. Only tokens count that are codes when a query meets
them: the first and the newest ones are exact. So each layer, each of its two tensors and each number of bits is judged
by the codes that the cache itself would write, without a pass for each. The sums over tokens and over layers take
errors to be independent of each other; measured against the divergence of real runs, one part quantized at a time.

The same gradients say which channels of keys matter, for the tables of their widths (`quant/widths.py`): an error `e`
of a key's channel moves a query's score by `q * e`, so the channel's importance is the mean of
(gradient of score * q)**2.
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
from hf_kvattn.quant.codecs import codec_for
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


@dataclass
class _Noted:
    """Keys and values `(1, Hkv, T, D)` of a layer in a window, their gradients, and channels' importance `(Hkv, D)`."""

    k: torch.Tensor
    v: torch.Tensor
    of_k: torch.Tensor
    of_v: torch.Tensor
    importance: torch.Tensor


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
def _noting(model: PreTrainedModel, noted: dict[int, _Noted]) -> Iterator[None]:
    """Forwards in this context write what each layer stores to `noted`, backward passes the gradients."""
    config = model.config.get_text_config(decoder=True)
    needs, before = layer_needs(config), config._attn_implementation

    def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any):
        out, _ = kvattn_attention(module, query, key, value, mask, **kwargs)
        i = int(module.layer_idx)
        lender = needs[i].lender
        if lender is None:
            if not (torch.isfinite(key).all() and torch.isfinite(value).all()):
                raise ValueError(f"layer {i} has keys or values that are NaN or infinite on the calibration text")
            k, v = key.detach(), value.detach()
            noted[i] = _Noted(k, v, torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(k[0, :, 0]))
        rules = Rules(mask, kwargs.get("scaling"), True, None, kwargs.get("softcap"), kwargs.get("s_aux"))
        layer = noted[i if lender is None else lender]
        out.register_hook(partial(_note, layer, query.detach(), out.detach(), rules))
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
def _note(layer: _Noted, query: torch.Tensor, out: torch.Tensor, rules: Rules, gradient: torch.Tensor) -> None:
    """Adds what one of `EVERY` queries says, by the gradient of attention's output, to the sums in `layer`.

    Args:
        query: `(1, Hq, T, D)`.
        out, gradient: `(1, T, Hq, D)`.
        rules: `mask`, a float one `(1, 1, T, T)`, `scaling`, `softcap` and `s_aux` are read.
    """
    at = torch.arange(SINKS + BLOCK, query.shape[2], EVERY, device=query.device)
    k, v = layer.k[0, :, None], layer.v[0, :, None]
    q, o, g = (x[0, :, at].unflatten(0, (len(k), -1)) for x in (query, out.transpose(1, 2), gradient.transpose(1, 2)))
    scale = scale_of(query, rules)
    scores, slope = q @ k.mT * scale, 1.0
    if rules.softcap is not None:
        scores = rules.softcap * (scores / rules.softcap).tanh()
        slope = 1 - (scores / rules.softcap).square()
    assert rules.mask is not None
    scores = scores + rules.mask[0, :, at]
    if rules.s_aux is not None:
        scores = torch.cat([scores, rules.s_aux.view(*q.shape[:2], 1, 1).expand(*q.shape[:3], 1).to(q)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    tokens = torch.arange(k.shape[2], device=query.device)
    # How often a token is a code by then: a block of the newest tokens fills up, and all of it becomes codes.
    share = (at[:, None] - tokens).clamp(0, BLOCK) / BLOCK * (tokens >= SINKS)
    meets = share.sqrt().to(q)
    of_scores = weights * (g @ v.mT - (g * o).sum(-1, keepdim=True)) * slope * scale
    layer.of_k += ((of_scores * meets).mT @ q).sum(1)
    layer.of_v += ((weights * meets).mT @ g).sum(1)
    # Widths by tokens that always are codes keep more than by all: KLD 0.0217 against 0.0228 at 2 bits, SmolLM2-135M.
    weight = (of_scores * (share == 1)).square().sum(-1, keepdim=True)
    layer.importance += (weight * q.square()).sum((1, 2))


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
    layers, heads = len(kept), kv_shape(model.config.get_text_config(decoder=True))[0]
    assert heads is not None
    if windows.shape[1] < LEAST_WINDOW:
        raise ValueError(
            f"windows of {windows.shape[1]} tokens hold no block that queries meet: {LEAST_WINDOW} at least"
        )
    generator = torch.Generator(model.device).manual_seed(seed)
    keys = torch.zeros(layers, len(BITS), dtype=torch.float64)
    values = {size: torch.zeros_like(keys) for size in sizes}
    k_absmax, v_absmax = torch.zeros(2, layers, heads)
    passes: list[dict[int, _Noted]] = [{} for _ in windows]
    with _only_activations_have_gradients(model):
        for i, ids in enumerate(tqdm(windows, desc="calibrating", unit="window", disable=not progress)):
            with _noting(model, passes[i]), torch.enable_grad():
                logits = model(ids[None].to(model.device), past_key_values=DynamicCache(config=model.config)).logits[0]
                predicted = torch.log_softmax(logits.float(), dim=-1)
                drawn = torch.multinomial(predicted.detach().exp(), 1, generator=generator)
                predicted.gather(1, drawn).sum().backward()
    tables: dict[int, list[KeyTable]] = {bits: [] for bits in BITS if codec_for(bits).by_channel}
    whole = slice(SINKS, SINKS + (windows.shape[1] - SINKS) // BLOCK * BLOCK)
    for i, layer_idx in enumerate(tqdm(kept, desc="judging", unit="layer", disable=not progress)):
        noted = [found[layer_idx] for found in passes]
        k_absmax[i], v_absmax[i] = (torch.stack([x.abs().amax((0, 2, 3)) for x in stored]).amax(0)
                                    for stored in zip(*((each.k, each.v) for each in noted), strict=True))  # fmt: skip
        sample = torch.cat([each.k[0, :, whole] for each in noted], 1)
        importance = torch.stack([each.importance for each in noted]).sum(0)
        for column, bits in enumerate(BITS):
            table = None
            if bits in tables:
                seen = importance if importance.any() else None  # a window may be too short for tokens so far away
                table = KeyTable(*(t.cpu() for t in widths.choose(sample, seen, bits)))
                tables[bits].append(table)
            for each, size in product(noted, sizes):
                key_cost, value_cost = _costs(each, bits, size, table)
                values[size][i, column] += value_cost
                keys[i, column] += key_cost / len(sizes)  # the same for each
    tokens = windows.numel()
    costs = keys / tokens, {size: x / tokens for size, x in values.items()}
    return Sensitivity(*costs, tables, k_absmax, v_absmax, tokens)


@torch.no_grad()
def _costs(noted: _Noted, bits: int, group_size: int, table: KeyTable | None) -> list[float]:
    """What the codes that a cache makes of keys and of values cost, summed over tokens, in nats."""
    layer = KVQuantizedLayer(QuantSettings(codec_for(bits), codec_for(bits), group_size, 0, SINKS, table), None, 0)
    layer.append(noted.k, noted.v)
    layer.finish_attention(dispatch.quantize_blocks)
    costs = []
    for x, stored, gradient in zip((noted.k, noted.v), layer.dense(), (noted.of_k, noted.of_v), strict=True):
        shift = ((stored - x).double() * gradient.double()).sum(-1)
        costs.append(EVERY * shift.square().sum().item() / 2)
    return costs


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
