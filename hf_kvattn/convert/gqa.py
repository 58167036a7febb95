"""Fewer KV heads for Llama-style models: MHA to GQA or MQA, GQA to fewer heads, and GQA back to MHA.

Three ways to make one KV head of a group of them:

- `mean`: the mean of their projections, neighbours together (Ainslie et al. 2023, arXiv:2305.13245).
- `cluster`: the same mean, but the most similar heads together; query heads and columns of `o_proj` move along.
- `activation`: what loses least on calibration text. Layer by layer, with the converted layers in front:
  keys. RoPE turns each pair of channels (i, i + D/2), one complex number, by an angle. Multiplication by complex
  numbers commutes with that, so head h may see the merged key m as c_h m in each pair, with conj(c_h) folded into its
  queries. The m that loses least of the logits is the first principal component of the heads' keys, weighted by their
  queries.
  values. No rotation, so every head may read the merged value through its own D x D matrix, folded into `o_proj`: the
  first D principal components of all the group's values, weighted by `o_proj`.
  output. `o_proj` is solved again by least squares on what the converted layers before give, so that the attention's
  output is as near as possible to the original one.

All three are exact when the heads of a group are equal; `activation` also when they differ by what it may fold away.
Linear algebra is done in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

METHODS = ("mean", "cluster", "activation")
# Families whose attention is q_proj, k_proj, v_proj, RoPE over pairs (i, i + D/2) and o_proj, nothing else between.
LLAMA_STYLE = ("llama", "mistral", "qwen2", "granite", "smollm3")
RIDGE = 1e-4  # how much an input that the calibration text never shows counts, of the mean one
OUTPUT_RIDGE = 1e-2  # how strongly o_proj is kept where the calibration text says little
SMALLEST = 1e-30  # keeps a layer of zeros from dividing by 0
BATCH = 4  # calibration windows at once


@dataclass(frozen=True)
class Heads:
    """The projections of one attention layer, head by head, float64; a bias is the last column (input 1).

    Args:
        q: (Hkv, G, D, inputs), the query heads of each KV head.
        k: (Hkv, D, inputs).
        v: (Hkv, D, inputs).
        o: (Hkv, G, outputs, D), without the bias, which no merge touches.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor


def _layers(model: PreTrainedModel) -> Any:
    return model.base_model.layers


def check(model: PreTrainedModel) -> None:
    """Raise ValueError unless the model's attention is of the kind that can be converted."""
    name = type(model).__name__
    for layer in getattr(model.base_model, "layers", [None]):
        attention = getattr(layer, "self_attn", None)
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            if not isinstance(getattr(attention, part, None), nn.Linear):
                raise ValueError(f"{name} is not Llama-style: its attention has no separate linear {part}")
    if model.config.model_type not in LLAMA_STYLE:
        raise ValueError(f"{name} is not Llama-style: {model.config.model_type!r} is none of {LLAMA_STYLE}")
    share = (model.config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise ValueError(f"{name} rotates only {share} of its channels, which is not supported")


def _head_dim(model: PreTrainedModel) -> int:
    return int(_layers(model)[0].self_attn.head_dim)


def cache_bytes_per_token(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token adds to a cache of this dtype."""
    return 2 * len(_layers(model)) * model.config.num_key_value_heads * _head_dim(model) * dtype.itemsize


def _matrix(linear: nn.Linear) -> torch.Tensor:
    """(outputs, inputs), and one more column for a bias; float64."""
    weight = linear.weight.detach().double()
    return weight if linear.bias is None else torch.cat([weight, linear.bias.detach().double()[:, None]], dim=1)


def _read(attention: Any, kv_heads: int) -> Heads:
    head_dim = attention.head_dim
    q, k, v = (_matrix(linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    o = attention.o_proj.weight.detach().double()
    return Heads(
        q.view(kv_heads, -1, head_dim, q.shape[1]),
        k.view(kv_heads, head_dim, -1),
        v.view(kv_heads, head_dim, -1),
        o.view(len(o), kv_heads, -1, head_dim).permute(1, 2, 0, 3),
    )


def _linear(like: nn.Linear, matrix: torch.Tensor) -> nn.Linear:
    """A layer that computes `matrix`, (outputs, inputs and one for a bias if `like` has one)."""
    weight = like.weight
    linear = nn.Linear(like.in_features, len(matrix), like.bias is not None, weight.device, weight.dtype)
    state = {"weight": matrix[:, : like.in_features]}
    linear.load_state_dict(state if like.bias is None else state | {"bias": matrix[:, -1]})
    return linear


def _install(attention: Any, heads: Heads) -> None:
    """Put the heads into an attention layer, in place, whatever number of KV heads it had."""
    for name, rows in (("q_proj", heads.q.flatten(0, 2)), ("k_proj", heads.k), ("v_proj", heads.v)):
        setattr(attention, name, _linear(getattr(attention, name), rows.flatten(0, -2)))
    attention.o_proj.weight.data.copy_(heads.o.permute(2, 0, 1, 3).flatten(1))
    attention.num_key_value_groups = heads.q.shape[1]


def _with_kv_heads(model: PreTrainedModel, kv_heads: int) -> PreTrainedModel:
    """A copy that says it has `kv_heads`; its attention layers are the caller's to fill."""
    copied = copy.deepcopy(model)
    copied.config.num_key_value_heads = kv_heads
    return copied


def expand(model: PreTrainedModel) -> PreTrainedModel:
    """GQA to MHA, exact: every query head gets its own copy of its KV head. A new model; the old one is kept."""
    check(model)
    kv_heads, q_heads = model.config.num_key_value_heads, model.config.num_attention_heads
    if kv_heads == q_heads:
        raise ValueError(f"the model has a KV head for each of its {q_heads} query heads already")
    expanded = _with_kv_heads(model, q_heads)
    for layer in _layers(expanded):
        heads = _read(layer.self_attn, kv_heads)
        group = heads.q.shape[1]
        k, v = (rows.repeat_interleave(group, dim=0) for rows in (heads.k, heads.v))
        q, o = (rows.flatten(0, 1)[:, None] for rows in (heads.q, heads.o))
        _install(layer.self_attn, Heads(q, k, v, o))
    return expanded


def group_heads(cost: torch.Tensor, groups: int) -> list[list[int]]:
    """Heads in groups of equal size with a small sum of the costs of the pairs inside them.

    Neighbours are the start, and the best exchange of two heads is made until none helps.

    Args:
        cost: (H, H), symmetric.
        groups: how many; a divisor of H.
    """
    size = len(cost) // groups
    member = torch.arange(len(cost)) // size
    for _ in range(len(cost) ** 2):  # far more than it takes; rounding could exchange two heads for ever
        to_group = cost @ nn.functional.one_hot(member, groups).to(cost.dtype)
        now = to_group.gather(1, member[:, None])
        moved = to_group[:, member]  # (a, b): from a to the group of b
        change = moved + moved.T - now - now.T - 2 * cost
        change[member[:, None] == member] = 0.0
        best = int(change.argmin())
        a, b = divmod(best, len(cost))
        if change[a, b] > -1e-9 * cost.abs().max():
            break
        member[[a, b]] = member[[b, a]]
    return [(member == group).nonzero().flatten().tolist() for group in range(groups)]


def _weight_cost(heads: Heads) -> torch.Tensor:
    """(H, H): squared distances of the key and value projections, each as a share of their whole energy."""
    rows = [projection.flatten(1) / projection.norm().clamp(min=SMALLEST) for projection in (heads.k, heads.v)]
    both = torch.cat(rows, dim=1)
    return torch.cdist(both, both).square()


def _one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor) -> Heads:
    """One KV head, `k` and `v` (D, inputs), for all query heads of a group."""
    return Heads(q.flatten(0, 1)[None], k[None], v[None], o.flatten(0, 1)[None])


def _mean(heads: Heads) -> Heads:
    """All KV heads of `heads` as one: their mean."""
    return _one(heads.q, heads.k.mean(0), heads.v.mean(0), heads.o)


def _planes(rows: torch.Tensor) -> torch.Tensor:
    """(..., D, inputs) real to (..., D/2, inputs) complex: the pairs that RoPE turns."""
    first, second = rows.chunk(2, dim=-2)
    return torch.complex(first.contiguous(), second.contiguous())


def _merge_keys(heads: Heads, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The merged key (D, inputs), the queries that go with it, and the share of the logits' energy that is lost.

    Args:
        heads: one group.
        moment: (inputs, inputs), mean of x x^T over calibration tokens.
    """
    k, q = _planes(heads.k), _planes(heads.q)  # (n, P, inputs), (n, G, P, inputs)
    complex_moment = moment.to(k.dtype)
    energy = torch.einsum("ngpi,ij,ngpj->np", q, complex_moment, q.conj()).real
    scale = (energy + RIDGE * energy.mean()).clamp(min=SMALLEST).sqrt().T  # (P, n)
    covariance = torch.einsum("npi,ij,mpj->pnm", k, complex_moment, k.conj())
    values, vectors = torch.linalg.eigh(scale[:, :, None] * covariance * scale[:, None, :])
    first = vectors[:, :, -1]  # (P, n)
    # m = sum of conj(first) scale k, and k is near (first / scale) m: both sized so that m is as large as the keys.
    seen_as = first / scale
    size = seen_as.abs().square().mean(1, keepdim=True).sqrt()
    merged = torch.einsum("pn,npi->pi", size * first.conj() * scale, k)
    queries = (seen_as / size).conj().T[:, None, :, None] * q
    lost = (values[:, :-1].sum() / values.sum().clamp(min=SMALLEST)).item()
    return torch.cat([merged.real, merged.imag]), torch.cat([queries.real, queries.imag], dim=-2), lost


def _merge_values(heads: Heads, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The merged value (D, inputs), the `o` that goes with it, and the share of the output's energy that is lost."""
    head_dim = heads.v.shape[1]
    squares, basis = torch.linalg.eigh(torch.einsum("ngod,ngoe->nde", heads.o, heads.o))
    roots = squares.clamp(min=1e-12 * squares.max().item() + SMALLEST).sqrt()[:, None, :]
    root = (basis * roots) @ basis.mT  # (n, D, D): |root v| is the size of what v adds to the output
    weighted = (root @ heads.v).flatten(0, 1)  # (n D, inputs)
    values, vectors = torch.linalg.eigh(weighted @ moment @ weighted.T)
    main = vectors[:, -head_dim:]
    merged = main.T @ weighted
    seen_as = (basis / roots) @ basis.mT @ main.view(-1, head_dim, head_dim)  # (n, D, D): v is near seen_as m
    size = (heads.v.square().sum() / len(heads.v) / merged.square().sum().clamp(min=SMALLEST)).sqrt()
    size = size.clamp(min=SMALLEST)
    lost = (values[:-head_dim].sum() / values.sum().clamp(min=SMALLEST)).item()
    return size * merged, heads.o @ seen_as[:, None] / size, lost


def _principal(heads: Heads, moment: torch.Tensor) -> Heads:
    """All KV heads of `heads` as one: the principal components of their keys and values."""
    k, q, _ = _merge_keys(heads, moment)
    v, o, _ = _merge_values(heads, moment)
    return _one(q, k, v, o)


def _activation_cost(heads: Heads, moment: torch.Tensor) -> torch.Tensor:
    """(H, H): what merging each pair of KV heads would lose of the keys and of the values."""
    count = len(heads.k)
    cost = torch.zeros(count, count, dtype=torch.float64)
    for a in range(count):
        for b in range(a):
            pair = _select(heads, [a, b])
            cost[a, b] = cost[b, a] = _merge_keys(pair, moment)[2] + _merge_values(pair, moment)[2]
    return cost


def _select(heads: Heads, members: list[int]) -> Heads:
    return Heads(heads.q[members], heads.k[members], heads.v[members], heads.o[members])


def _merge(heads: Heads, groups: list[list[int]], merge: Callable[[Heads], Heads]) -> Heads:
    merged = [merge(_select(heads, members)) for members in groups]
    return Heads(*(torch.cat([getattr(one, name) for one in merged]) for name in ("q", "k", "v", "o")))


class _Calibration:
    """Runs calibration windows through the original and the converted model, one layer at a time.

    Args:
        model: the original.
        windows: token ids, (windows, tokens).
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor) -> None:
        self.calls: list[dict[str, Any]] = [{} for _ in _layers(model)]
        embedded: list[torch.Tensor] = []

        def keep(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                self.calls[index] = keywords
                if index == 0:
                    embedded.append(arguments[0])

            return hook

        hooks = [layer.register_forward_pre_hook(keep(i), with_kwargs=True) for i, layer in enumerate(_layers(model))]
        try:
            for window in windows:  # alone, so that masks and positions fit batches of any size
                model.base_model(window[None].to(model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        self.original = torch.cat(embedded)  # (windows, tokens, width): what goes into the next layer
        self.converted = self.original

    def _run(self, layer: Any, index: int, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(part, **self.calls[index]) for part in hidden.split(BATCH)])

    def original_layer(self, layer: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Step over an original layer: the second moment of its attention's inputs, and its attention's outputs.

        Returns:
            (inputs, inputs) in float64, with one more row and column of the constant 1 when there are biases, and
            (tokens, width).
        """
        attention = layer.self_attn
        moments: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []

        def hook(module: nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
            x = arguments[0].flatten(0, 1).double()
            if module.bias is not None:
                x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype, device=x.device)], dim=1)
            moments.append(x.T @ x)

        hooks = [
            attention.q_proj.register_forward_hook(hook),
            attention.o_proj.register_forward_hook(lambda module, arguments, output: outputs.append(output)),
        ]
        try:
            self.original = self._run(layer, index, self.original)
        finally:
            for one in hooks:
                one.remove()
        moment = torch.stack(moments).sum(0) / self.original[..., 0].numel()
        moment.diagonal().add_(RIDGE * moment.diagonal().mean())
        return moment, torch.cat(outputs).flatten(0, 1)

    def fit_output(self, layer: Any, index: int, target: torch.Tensor) -> None:
        """Solve `o_proj` of a converted layer again, in place, so that its output comes near `target`."""
        o_proj = layer.self_attn.o_proj
        inputs: list[torch.Tensor] = []
        hook = o_proj.register_forward_hook(lambda module, arguments, output: inputs.append(arguments[0]))
        try:
            for part in self.converted.split(BATCH):
                layer.self_attn(hidden_states=layer.input_layernorm(part), **self.calls[index])
        finally:
            hook.remove()
        z = torch.cat(inputs).flatten(0, 1)
        missing = (target - o_proj(z)).double()
        z = z.double()
        square = z.T @ z
        square.diagonal().add_(OUTPUT_RIDGE * square.diagonal().mean() + SMALLEST)
        o_proj.weight.data += torch.linalg.solve(square, z.T @ missing).T.to(o_proj.weight.dtype)

    def converted_layer(self, layer: Any, index: int) -> None:
        """Step over a converted layer."""
        self.converted = self._run(layer, index, self.converted)


@torch.no_grad()
def convert(
    model: PreTrainedModel,
    kv_heads: int,
    method: str,
    windows: torch.Tensor | None = None,
    progress: bool = False,
) -> PreTrainedModel:
    """A new model with fewer KV heads; the old one is kept.

    Raises ValueError for a model that is not Llama-style, head counts that do not divide, and a missing calibration.

    Args:
        model: of one of the families LLAMA_STYLE; float32 makes the calibration most exact.
        kv_heads: how many there shall be; a divisor of what there are, and smaller.
        method: one of METHODS.
        windows: calibration token ids, (windows, tokens); needed by `activation` alone.
        progress: show a bar on stderr.
    """
    check(model)
    now = model.config.num_key_value_heads
    if not 1 <= kv_heads < now or now % kv_heads:
        raise ValueError(f"{now} KV heads cannot be merged to {kv_heads}: it must divide them and be smaller")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {METHODS}")
    if (method == "activation") != (windows is not None):
        raise ValueError(f"calibration windows are for the method 'activation', which needs them, not for {method!r}")
    converted = _with_kv_heads(model, kv_heads)
    calibration = None if windows is None else _Calibration(model, windows)
    layers = zip(_layers(model), _layers(converted), strict=True)
    for index, (old, new) in enumerate(tqdm(layers, method, len(_layers(model)), unit="layer", disable=not progress)):
        heads = _read(old.self_attn, now)
        if calibration is None:
            cost = _weight_cost(heads) if method == "cluster" else torch.zeros(now, now)
            _install(new.self_attn, _merge(heads, group_heads(cost, kv_heads), _mean))
            continue
        moment, target = calibration.original_layer(old, index)
        groups = group_heads(_activation_cost(heads, moment), kv_heads)
        _install(new.self_attn, _merge(heads, groups, partial(_principal, moment=moment)))
        calibration.fit_output(new, index, target)
        calibration.converted_layer(new, index)
    return converted
