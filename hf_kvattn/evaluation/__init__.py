"""The evaluation room: is a cache faster, smaller and right, measured the way a user would meet it.

One row of `variants.py` is one cache to compare. `throughput.py` times decode steps inside the real `model.generate()`
and `tokens.py` compares what they give; `perplexity.py` measures what a cache does to the predictions; `inputs.py`
loads the model and the text; `report.py` and `plots.py` turn the results into JSON, tables and plots, `cards.py` into
model cards. `bandwidth.py` holds one layer against the memory's speed, `claims.py` what is said of attention and caches
against what is measured; `codegen.py` says what the Triton kernels compile to. Each has its command line in `scripts/`.
"""
