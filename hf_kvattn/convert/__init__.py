"""Conversions: checkpoints in, checkpoints out, whole or not at all.

| file | what |
|---|---|
| `gguf.py` | `hf-kvattn convert-gguf`: a GGUF file to a safetensors folder with equal logits |
| `gqa.py` | fewer KV heads: mean, cluster and activation-aware merges, and the way back |
| `compare.py` | `hf-kvattn convert-gqa`: what that costs, method by method, before and after uptraining |
| `calibrate.py` | how many bits each layer's keys and values are worth in a quantized cache; fp8 scales for vLLM |
| `calibrated.py` | `hf-kvattn calibrate`: the calibrated cache beside uncalibrated ones |
| `training.py` | a short training loop: next tokens, or distillation from a teacher |
| `train_tiny.py` | `hf-kvattn train-tiny`: a small model to try conversions on |
| `output.py` | a model that is written as it was, loaded back and compared |
"""
