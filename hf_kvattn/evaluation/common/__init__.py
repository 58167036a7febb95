"""What the measurements share.

| file | what |
|---|---|
| `measurement.py` | the record of a measurement, and how one is looked up by the kind of its results |
| `variants.py` | the caches that are compared, one row each |
| `memory.py` | bytes of a cache, and how far memory rises |
| `timing.py` | medians with their spread, and ratios |
| `tokens.py` | whether two caches give the same tokens, near ties apart |
| `running.py` | the command line of a measurement on a model |
| `finished.py` | the windows that a run which goes on need not do again |
| `report.py` | `results.json` and `report.md` |
| `drawing.py` | what plots are drawn with |
"""
