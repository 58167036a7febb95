"""Attention backends, one module each.

`reference` (the oracle), `sdpa` (PyTorch), `native` (C++ on a CPU), `flash` (flash-attn on an NVIDIA GPU),
`triton_backend` (quantized caches on a GPU).

A backend module has three functions:

- `unavailable() -> str | None`: why it cannot be used on this machine at all, or None;
- `unsupported(call) -> str | None`: why it cannot serve this `AttendCall`, or None;
- `attend(call) -> Tensor`: the result, `(B, Tq, Hq, D)` in the query's dtype.
"""
