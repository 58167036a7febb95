"""Measurements: is a cache faster, smaller and right, measured the way a user would meet it.

`MEASUREMENTS` is the table of them: kind of results -> the module that holds it whole (what it measures, its tables,
its plot, its limits, its figures in a model card, its command line), the name of its command, and one line of help. A
new measurement is one file and one row. What they share is in `common/`; `cards.py` makes a model card of results;
`codegen.py` says what the Triton kernels compile to.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One measurement: where its `MEASUREMENT` and `COMMAND` are, the command's name, and what that does."""

    module: str
    command: str
    help: str


# In the order in which reports and cards list them.
MEASUREMENTS: dict[str, Row] = {
    "conversion": Row("hf_kvattn.convert.compare", "convert-gqa", "fewer KV heads, and what that costs"),
    "throughput": Row("hf_kvattn.evaluation.throughput", "throughput", "time and memory of decode steps, by cache"),
    "perplexity": Row("hf_kvattn.evaluation.perplexity", "perplexity", "what caches do to the predictions"),
    "claims": Row("hf_kvattn.evaluation.claims", "claims", "stated figures of attention and caches, measured"),
    "bandwidth": Row("hf_kvattn.evaluation.bandwidth", "bandwidth", "decode attention against the memory's speed"),
    "calibration": Row("hf_kvattn.convert.calibrated", "calibrate", "how many bits each layer's keys and values get"),
    "prefix": Row("hf_kvattn.evaluation.prefix", "prefix", "a prefix computed once and loaded later"),
    "stream": Row("hf_kvattn.evaluation.stream", "stream", "a text far longer than the model was trained on"),
    "beams": Row("hf_kvattn.evaluation.beams", "beams", "what beam search makes caches move"),
    "gpu_check": Row("hf_kvattn.evaluation.gpu_check.command", "gpu-check", "a GPU, checked and measured in minutes"),
    "batching": Row("hf_kvattn.evaluation.batching", "batching", "requests of many lengths in a continuous batch"),
}
