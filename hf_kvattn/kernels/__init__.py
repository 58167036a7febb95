"""Attention backends, one file each, and the choice between them (`dispatch.py`).

| backend | file | where |
|---|---|---|
| `reference` | `reference.py` | fp32 PyTorch: says what every call means; all others are tested against it |
| `sdpa` | `sdpa.py` | PyTorch's `scaled_dot_product_attention`, on every device |
| `native` | `native.py`, `csrc/` | C++ on a CPU |
| `flash` | `flash.py` | flash-attn on an NVIDIA GPU |
| `triton` | `triton/` | Triton on a GPU: quantized caches, rings and sinks |

A backend is given one `AttendCall` (`call.py`). `dispatch.Backend` says what functions it has.
"""
