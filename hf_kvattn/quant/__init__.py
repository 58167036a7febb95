"""Codecs: pure functions between numbers and packed codes, and the packed layouts. No state of a cache.

| file | what |
|---|---|
| `codecs.py` | which codec serves which number of bits, or fp8 |
| `affine.py` | asymmetric integer codes with a scale and a zero for each group: 4, 3 and 2 bits |
| `symmetric.py` | symmetric integer codes with a scale for each group: 8 bits |
| `float8.py` | float8_e4m3fn codes with a scale for each group: fp8 |
| `rotation.py` | the Hadamard rotation of values |
| `layout.py` | how the codes of a block of 32 tokens lie in memory, for keys and for values |
| `packed.py` | the arrays of a layer's quantized tokens, and their dense meaning |
| `calibration.py` | which bits each layer takes, for which model, and the file that says so |
"""
