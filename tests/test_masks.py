"""The mask function: compact where it may be, and always what `sdpa` would have been given."""

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.masks import is_compact, kvattn_mask, read_compact_mask

PATTERNS = {
    "causal": causal_mask_function,
    "sliding": sliding_window_causal_mask_function(4),
    "sliding-1": sliding_window_causal_mask_function(1),
    "bidirectional": bidirectional_mask_function,
    "chunked": chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int)),
    "or": or_masks(causal_mask_function, lambda b, h, q, k: k < 2),
    "and": and_masks(causal_mask_function, lambda b, h, q, k: k != 1),
}
PLAIN = {"causal": None, "sliding": 4, "sliding-1": 1}


def as_dense(mask, q_len: int, kv_len: int) -> torch.Tensor:
    """What the attention function makes of a mask, `(2, 1, Tq, Tk)`."""
    call = AttendCall(torch.empty(2, 1, q_len, 1), torch.empty(2, 1, kv_len, 1), torch.empty(2, 1, kv_len, 1), 1.0)
    if mask is not None and is_compact(mask):
        call.leftpad, call.window = read_compact_mask(mask)
    elif mask is not None:
        return mask
    visible = call.visible()
    return torch.ones(2, 1, q_len, kv_len, dtype=torch.bool) if visible is None else visible.expand(2, 1, -1, -1)


def padding(kind: str, length: int) -> torch.Tensor | None:
    mask = torch.ones(2, length, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "left":
        mask[0, :3] = False
    if kind == "right":
        mask[1, -2:] = False
    if kind == "hole":
        mask[0, 5] = False
    if kind == "all":
        mask[0] = False
    return mask


@pytest.mark.parametrize("kind", ["none", "ones", "left", "right", "hole", "all"])
@pytest.mark.parametrize("sizes", [(7, 7, 0, 0), (1, 9, 8, 0), (3, 10, 7, 0), (1, 6, 9, 4)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_means_what_the_stock_mask_means(pattern, sizes, kind):
    q_len, kv_len, q_offset, kv_offset = sizes
    arguments = dict(
        batch_size=2,
        q_length=q_len,
        kv_length=kv_len,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=PATTERNS[pattern],
        attention_mask=padding(kind, kv_offset + kv_len),
        use_vmap=pattern in ("or", "and"),
    )
    mask = kvattn_mask(**arguments)
    assert torch.equal(as_dense(mask, q_len, kv_len), sdpa_mask(**arguments, allow_is_causal_skip=False))
    compact = pattern in PLAIN and kind in ("none", "ones", "left", "all")
    assert compact == (mask is None or is_compact(mask)), "plain patterns with left padding stay compact, others do not"


@pytest.mark.parametrize("pattern", PLAIN)
def test_no_dense_mask_for_a_decode_step(pattern):
    mask = kvattn_mask(2, 1, 5000, 4999, 0, PATTERNS[pattern], padding("left", 5000))
    assert is_compact(mask) and mask.untyped_storage().nbytes() <= 16
    assert read_compact_mask(mask)[1] == PLAIN[pattern] and read_compact_mask(mask)[0].tolist() == [3, 0]
    unpadded = kvattn_mask(2, 1, 5000, 4999, 0, PATTERNS[pattern], padding("ones", 5000))
    assert unpadded is None if pattern == "causal" else read_compact_mask(unpadded) == (None, PLAIN[pattern])


def test_a_cache_with_an_unfilled_tail_gets_a_dense_mask():
    mask = kvattn_mask(1, 2, 10, q_offset=torch.tensor(3), mask_function=causal_mask_function)
    assert mask.tolist() == [[[[j <= i for j in range(10)] for i in (3, 4)]]]


def test_a_mask_shorter_than_the_keys_counts_the_rest_as_padding():
    mask = kvattn_mask(1, 1, 8, 7, 0, causal_mask_function, torch.ones(1, 6, dtype=torch.bool))
    assert mask.tolist() == [[[[True] * 6 + [False] * 2]]]
