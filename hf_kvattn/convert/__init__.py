"""The conversion room: checkpoints in, checkpoints out, whole or not at all.

| file | what |
|---|---|
| `gguf.py` | a GGUF file to a safetensors folder with equal logits |
| `gqa.py` | fewer KV heads: mean, cluster and activation-aware merges, and the way back |
| `calibrate.py` | how many bits each layer's keys and values are worth in a quantized cache; fp8 scales for vLLM |
| `training.py` | a short training loop: next tokens, or distillation from a teacher |
| `compare.py` | what a conversion costs, method by method, before and after uptraining |
| `output.py` | what they share: the folder that appears whole or not at all, loading back |

The command lines over it are `scripts/convert_gguf.py`, `scripts/convert_gqa.py` and `scripts/calibrate.py`;
`scripts/train_tiny.py` makes a small model with as many KV heads as query heads to try the second on.
"""
