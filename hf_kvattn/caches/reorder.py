"""Reorders batch rows, as beam search does at each step, and moves only tokens that differ between rows.

`common_prefix` `(B, B)`, int64 on the CPU, says how many leading tokens two rows are known to have in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .layer import KVLayer


def reorder_rows(layers: Sequence[KVLayer], rows: torch.Tensor, common_prefix: torch.Tensor) -> torch.Tensor:
    """Row i of every layer becomes what row `rows[i]` was; returns `common_prefix` of the new rows.

    Args:
        layers: changed in place; all of one batch size and length.
        rows: `(B',)`, from 0, on the CPU.
        common_prefix: of the rows before the change. One of another batch size, from before a `reset`, is ignored.
    """
    batch_size, seen = layers[0].batch_size, layers[0].seen
    if len(common_prefix) != batch_size:
        common_prefix = torch.zeros(batch_size, batch_size, dtype=torch.long)
    if len(rows) == batch_size:
        target = (rows != torch.arange(batch_size)).nonzero().flatten()
        source = rows[target]
        start = int(common_prefix[target, source].min())
        for layer in layers:
            layer.copy_rows(target.to(layer.device), source.to(layer.device), start)
    else:
        for layer in layers:
            layer.select(rows.to(layer.device))
    return torch.where(rows[:, None] == rows, seen, common_prefix[rows][:, rows])
