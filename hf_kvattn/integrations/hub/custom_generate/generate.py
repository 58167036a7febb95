"""`generate()` with a cache of hf_kvattn, for one call; transformers loads this file for `custom_generate=`."""

import hf_kvattn


def generate(model, kv_cache="static", compile=False, past_key_values=None, **arguments):
    """What `model.generate(**arguments)` returns, through a fresh cache. The model is then as it was.

    Args:
        kv_cache: as `cache` of `hf_kvattn.enable`: a name, a callable `config -> Cache`, or None for transformers' own.
        compile: as in `hf_kvattn.enable`.
        past_key_values: a cache to go on with; `kv_cache` must be None then.

    Raises:
        ValueError: an unknown `kv_cache`, one beside `past_key_values`, or a model that cannot be enabled.
    """
    if kv_cache is not None and past_key_values is not None:
        raise ValueError(
            f"kv_cache={kv_cache!r} makes a fresh cache, and past_key_values is another one (a model that is enabled "
            "with a cache passes its own): kv_cache=None goes on with that"
        )
    with hf_kvattn.enabled(model, kv_cache, compile):
        return model.generate(past_key_values=past_key_values, **arguments)
