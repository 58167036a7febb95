"""The mask function that is registered with the attention function: compact for plain patterns, dense for all others.

transformers calls it once per forward and pattern, and hands the result to every layer. There are three results:

- None: causal, no padding.
- A compact mask, uint32 `(B, 1 + window, 1, 2 or 3)`: causal with a left-padded batch, a sliding window, or both. Its
  numbers are the first visible key of each row (`leftpad`), counted from the first key of the forward's range. The
  second dimension tells the window; 1 means none. The fourth is 3 if no row is padded. It is an expanded view and takes
  no memory. It has four dimensions because transformers passes 4-D masks on unchanged, and a dtype that no mask of a
  caller's has. The window is a shape because reading a number back from a GPU would stall it. The third dimension stays
  1 where a model takes the last queries alone, `mask[:, :, -n:]` (Gemma 4).
- A dense bool mask `(B, 1, Tq, Tk)`, as for `sdpa`: everything else (packed sequences, bidirectional, chunked or custom
  masks, right padding, caches whose tail is not filled yet).
"""

from __future__ import annotations

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function


def kvattn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """The mask of one forward; see the module. Arguments as in `transformers.masking_utils.sdpa_mask`.

    Raises:
        ValueError: an `attention_mask` of another number of rows than the batch.
    """
    if attention_mask is not None and attention_mask.shape[0] != batch_size:
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)} does not fit a batch of {batch_size}")
    window = _window_of(mask_function)
    # A cache with an unfilled tail (StaticCache) is not bottom-right aligned. Its q_offset is a tensor: comparing it is
    # impossible in a trace and stalls a GPU, and another kind of mask once it is full would be another graph.
    aligned = not isinstance(q_offset, torch.Tensor) and q_offset + q_length == kv_offset + kv_length
    if window is not None and aligned and not use_vmap:
        leftpad = left_padding(attention_mask, kv_length, kv_offset)
        if leftpad is None and not window:
            return None
        if not isinstance(leftpad, bool):
            return compact_mask(leftpad, window, batch_size, device)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # a tensor works, StaticCache passes one
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        device=device,
        **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )


def compact_mask(
    leftpad: torch.Tensor | None, window: int, batch_size: int, device: torch.device | str
) -> torch.Tensor:
    """Packs `leftpad` `(B,)` (None: all 0) and `window` (0: none) into `(B, 1 + window, 1, 2 or 3)`."""
    unpadded = leftpad is None
    if leftpad is None:
        leftpad = torch.zeros(batch_size, dtype=torch.int32, device=device)
    numbers = leftpad.to(torch.int32).view(torch.uint32)
    return numbers[:, None, None, None].expand(-1, 1 + window, 1, 2 + unpadded)


def read_compact_mask(mask: torch.Tensor) -> tuple[torch.Tensor | None, int | None]:
    """`leftpad` `(B,)` int32 (None: all 0) and the window (None: none) of a compact mask."""
    return None if mask.shape[3] == 3 else mask[:, 0, 0, 0].view(torch.int32), mask.shape[1] - 1 or None


def is_compact(mask: torch.Tensor) -> bool:
    return mask.dtype == torch.uint32 and mask.shape[2] == 1 and mask.shape[3] <= 3


def _window_of(mask_function) -> int | None:
    """0 for the plain causal function, W for the sliding causal function of window W, None for any other.

    transformers builds the sliding function anew for every forward, from closures. The code of its parts tells it.
    """
    if mask_function is causal_mask_function:
        return 0
    if torch.compiler.is_dynamo_compiling():  # closures cannot be looked into
        return None
    model = sliding_window_causal_mask_function(1)
    if getattr(mask_function, "__code__", None) is not model.__code__:
        return None
    parts, model_parts = (_cells(f).get("mask_functions", ()) for f in (mask_function, model))
    if [getattr(p, "__code__", None) for p in parts] != [p.__code__ for p in model_parts]:
        return None
    windows = [w for part in parts if (w := _cells(part).get("sliding_window")) is not None]
    return windows[0] if len(windows) == 1 and isinstance(windows[0], int) else None


def _cells(function) -> dict:
    closure = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in closure), strict=True))


def left_padding(mask: torch.Tensor | None, kv_length: int, kv_offset: int) -> torch.Tensor | None | bool:
    """First visible key of each row, `(B,)`; None if no row is padded; False if the padding is not at the left.

    Args:
        mask: `(B, n)` bool over all tokens seen, True is a token; slots beyond n count as padding.
    """
    if mask is None:
        return None
    if mask.shape[-1] < kv_offset + kv_length:
        return False
    mask = mask[:, kv_offset : kv_offset + kv_length]
    if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
        return False
    leftpad = kv_length - mask.sum(-1)
    return leftpad if bool(leftpad.any()) else None
