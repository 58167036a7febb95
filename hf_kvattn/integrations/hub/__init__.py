"""Doors by way of the Hugging Face hub: a `custom_generate` folder, and a kernel for the `kernels` package.

model.generate(**inputs, custom_generate=hf_kvattn.integrations.hub.FOLDER, trust_remote_code=True, kv_cache="int4")
"""

from pathlib import Path

FOLDER = str(Path(__file__).parent)  # what `generate(custom_generate=)` takes; it holds `custom_generate/`
