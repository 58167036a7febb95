"""Matrix products of compiled steps on a CPU, through the native kernels: `out = x @ w.T` for the few rows of a step.

A step is bound by reading the weights, and PyTorch's products of few rows do not reach the memory's speed: of one row
in bfloat16 they stay at a third of it, of two to eight rows far below. `FewRows` replaces them in the graph by the op
`hf_kvattn::linear`. The weights stay where the model keeps them: nothing is packed or copied, a weight that changes is
read as it is, and inductor keeps the graph on disk for the next process. (Inductor has fast products over weights that
are constants of the graph, and has none of these.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from ..kernels import native

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
Node = Any  # torch.fx.Node, whose arguments may be anything
Product = tuple[Node, Node, Node]  # a node of the graph, its rows, its weights


def _linear(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """`x` `(rows, in)` times each of `weights` `(out, in)`, side by side: `(rows, sum of out)` in the dtype of `x`."""
    if x.shape[0] > native.MAX_ROWS or native.cannot_multiply(x.dtype, weights[0].dtype):
        return torch.cat([x @ w.T.to(x.dtype) for w in weights], 1)  # a graph for any number of rows, or from a file
    return native.linear(x, weights)


def _linear_fake(x, weights):
    return x.new_empty(x.shape[0], sum(w.shape[0] for w in weights))


OPS: dict[str, tuple[str, Callable, Callable]] = {"linear": ("Tensor x, Tensor[] weights", _linear, _linear_fake)}


class FewRows(CustomGraphPass):
    """Replaces products of up to `native.MAX_ROWS` rows with a model's weights; those of the same rows by one op."""

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,), str(native.unavailable()))  # part of the name of what is kept on disk

    def __call__(self, graph: torch.fx.Graph) -> None:
        products: dict[tuple, list[Product]] = {}
        for node in graph.nodes:
            if node.target in (_aten.mm.default, _aten.addmm.default) and not node.kwargs:
                x, transposed = node.args[-2:]
                if (weight := _weight(x, transposed)) is not None:
                    rows = x.args[0] if x.target in _VIEWS else x  # each product has a view of its own
                    kind = rows, weight.meta["val"].shape[1], weight.meta["val"].dtype
                    products.setdefault(kind, []).append((node, x, weight))
        for found in products.values():
            for i in range(0, len(found), native.MAX_WEIGHTS):
                _replace(graph, found[i : i + native.MAX_WEIGHTS])
        graph.lint()


def _weight(x: Node, transposed: Node) -> Node | None:
    """The weights `(out, in)` that are `transposed` in a product with `x`, if the native kernels serve it; or None."""
    rows = x.meta["val"].shape[0]
    hint = rows if isinstance(rows, int) else rows.node.hint
    source = transposed
    if source.target is torch.ops.prims.convert_element_type.default:  # int8 weights: the scales come after
        source = source.args[0]
    if hint is None or hint > native.MAX_ROWS or source.target is not _aten.permute.default:
        return None
    weight = source.args[0]
    value, dtype = weight.meta["val"], x.meta["val"].dtype
    if weight.op != "placeholder" or value.device.type != "cpu" or value.stride(1) != 1:
        return None
    if (source is transposed) is not (value.dtype == dtype) or native.cannot_multiply(dtype, value.dtype):
        return None
    return weight


def _replace(graph: torch.fx.Graph, found: list[Product]) -> None:
    """Puts one op before the first of the products, and parts of its result in their places."""
    first, x, _ = found[0]
    with graph.inserting_before(first):
        product = _call(graph, torch.ops.hf_kvattn.linear.default, x, [weight for _, _, weight in found])
    begin = 0
    for node, _, weight in found:
        end = begin + weight.meta["val"].shape[0]
        with graph.inserting_before(node):
            part = product if len(found) == 1 else _call(graph, _aten.slice.Tensor, product, 1, begin, end)
            if node.target is _aten.addmm.default:
                part = _call(graph, _aten.add.Tensor, part, node.args[0])
        node.replace_all_uses_with(part)
        graph.erase_node(node)
        begin = end


def _call(graph: torch.fx.Graph, target: Callable, *args) -> Node:
    node = graph.call_function(target, args)
    example = torch.fx.map_arg(args, lambda each: each.meta["val"])
    node.meta["val"] = target(*example)  # of fake tensors
    return node


def few_rows_options() -> dict[str, Any]:
    """The options of `torch.compile` with which inductor replaces these products."""
    return {"post_grad_custom_pre_pass": FewRows()}
