"""The evaluation room: is a cache faster, smaller and right, measured the way a user would meet it.

One row of `variants.py` is one cache to compare. `throughput.py` times decode steps inside the real `model.generate()`
and `tokens.py` compares what they give; `perplexity.py` measures what a cache does to the predictions; `inputs.py`
loads the model and the text. `report.py` writes the results: JSON, tables (`speed_tables.py`, `quality_tables.py`,
made of what `markdown.py` has), the plots of `plots.py`; `cards.py` makes a model card of them, in which `limits.py`
says what came out badly. `bandwidth.py` holds one layer against the memory's speed; `claims.py` measures what is said
of attention and caches, and `stated.py` judges it; `codegen.py` says what the Triton kernels compile to. Each
measurement has its command line in `scripts/`.
"""
