"""Codecs: pure functions between numbers and packed codes, and the packed layouts. No state of a cache.

| file | what |
|---|---|
| `codecs.py` | the table of codecs: bits, bit planes, dtype, search settings |
| `affine.py` | affine codes with a scale and a zero point for each group: 4, 3 and 2 bits |
| `symmetric.py` | symmetric codes with a scale for each group: 8 bits and fp8 |
| `rotation.py` | the Hadamard rotation of values |
| `layout.py` | how the codes of a block of 32 tokens lie in memory, for keys and for values |
| `packed.py` | the arrays of a layer's quantized tokens, and how they are dequantized |
| `blocks.py` | from whole blocks of keys and values to codes |
| `calibration.py` | which bits each layer takes, for which model, and the file that says so |
"""
