"""Codecs: pure functions between numbers and packed codes, and the packed layouts. No state of a cache.

| file | what |
|---|---|
| `affine.py` | asymmetric integer codes with a scale and a zero for each group: 8, 4 and 2 bits |
| `layout.py` | how the codes of a block of 32 tokens lie in memory, for keys and for values |
| `packed.py` | the arrays of a layer's quantized tokens, and their dense meaning |
"""
