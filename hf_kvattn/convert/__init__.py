"""The conversion room: checkpoints in, checkpoints out, whole or not at all.

| file | what |
|---|---|
| `gguf.py` | a GGUF file to a safetensors folder with equal logits |
| `output.py` | what the converters share: the folder that appears whole or not at all, its card, errors of one line |

The command line over it is `scripts/convert_gguf.py`.
"""
