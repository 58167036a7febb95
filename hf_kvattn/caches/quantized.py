"""`QuantizedKVCache`: keys and values as codes of 8, 4, 3 or 2 bits or fp8, quantized once and read packed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..quant.calibration import Calibration, check_group_size, default_group_size
from ..quant.codecs import codec_for
from .base import KVCache, check_max_cache_len
from .configs import check_config, kv_shape, layer_needs
from .layer import KVLayer
from .quantized_layer import KVQuantizedLayer, QuantSettings
from .static_layer import make_static_layer

MAX_SINKS = 32


class QuantizedKVCache(KVCache):
    """Stores keys and values as codes of few bits. They are quantized once; attention kernels read them packed.

        cache = QuantizedKVCache(model.config, bits=4)
        model.generate(**inputs, past_key_values=cache)

    Keys are coded per channel in blocks of 32 tokens, after the channel's mean is subtracted. Values are coded per
    token in groups of channels (KIVI, arXiv:2402.02750), after a Hadamard rotation of each head. With 4 bits and fewer
    each key channel has a width of its own: more bits where queries notice errors (`quant/few_bits.py`,
    `quant/widths.py`). The widths come from a calibration. Without one they come from the first tokens, 64 or a prompt
    of more, by their keys and the queries that met them; so many tokens are exact until then. The prompt's own forward
    sees exact keys and values.

    NaN or infinite keys or values raise ValueError, with the layer's number, before they are quantized. On a GPU no
    step waits for that check: such tokens are quantized, and one of the next steps raises, or the next `crop`, `fork`,
    copy or `save_cache`. Only `reset` makes the cache usable again.

    Args:
        config: the model's config.
        bits: of keys and values: 8, 4, 3, 2, or "fp8" (float8_e4m3fn, for GPUs that convert it in hardware: as many
            bytes as 8 bits, and larger errors; on a CPU `sdpa` reads it, slowly).
        key_bits, value_bits: of keys alone and of values alone, in the place of `bits`.
        group_size: channels that share a value scale; a multiple of 16 that divides head_dim. None means 32 with 8 bits
            (16 where 32 does not divide it), and the least one of 64 or more with fewer.
        residual_length: newest tokens that stay exact, at least; None means 0. Up to 31 more wait for their block.
        skip_layers: layers that are not quantized, by index; negative ones count from the end.
        max_cache_len: tokens that fit, allocated at once; None grows by half.
        sinks: the number of exact first tokens, 0 to 32: a model attends to them from everywhere (StreamingLLM,
            arXiv:2309.17453), so their errors count most.
        calibration: bits for each layer, key widths, `group_size` and `skip_layers`, in the place of those arguments: a
            file of `scripts/calibrate.py`, what it holds, or a `Calibration`.

    Raises:
        ValueError: impossible settings, with their values, an unsupported model, or another model's calibration.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        bits: int | str = 4,
        key_bits: int | str | None = None,
        value_bits: int | str | None = None,
        group_size: int | None = None,
        residual_length: int | None = None,
        skip_layers: Collection[int] = (),
        max_cache_len: int | None = None,
        sinks: int = 4,
        calibration: Calibration | dict[str, Any] | str | Path | None = None,
    ):
        check_config(config)
        decoder = config.get_text_config(decoder=True)
        n_layers = decoder.num_hidden_layers
        needs = layer_needs(decoder)
        kept = [i for i, need in enumerate(needs) if need.keys]
        dims = {needs[i].dim for i in kept}
        are_layers = isinstance(skip_layers, Collection) and all(type(i) is int for i in skip_layers)
        if not are_layers or any(not -n_layers <= i < n_layers for i in skip_layers):
            raise ValueError(f"skip_layers must be ints, layers of a model of {n_layers}, got {skip_layers!r}")
        if calibration is None:
            k_codecs = dict.fromkeys(kept, codec_for(bits if key_bits is None else key_bits))
            v_codecs = dict.fromkeys(kept, codec_for(bits if value_bits is None else value_bits))
            tables = dict.fromkeys(kept)
            if group_size is None:
                group_size = min(default_group_size(dim, v_codecs[kept[0]]) for dim in dims)
            for dim in dims:
                check_group_size(group_size, dim)
        else:
            if (bits, key_bits, value_bits, group_size, tuple(skip_layers)) != (4, None, None, None, ()):
                raise ValueError(
                    "a calibration sets the bits, group_size and skip_layers itself; with it came "
                    f"{bits=}, {key_bits=}, {value_bits=}, {group_size=}, {skip_layers=}"
                )
            if isinstance(calibration, dict):
                calibration = Calibration.of_json(calibration)
            made = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
            made.check_model(decoder.model_type, len(kept), *kv_shape(decoder))
            k_codecs = dict(zip(kept, map(codec_for, made.key_bits), strict=True))
            v_codecs = dict(zip(kept, map(codec_for, made.value_bits), strict=True))
            tables = dict(zip(kept, made.tables, strict=True))
            group_size, skip_layers = made.group_size, [kept[i] for i in made.skip_layers]
        residual = 0 if residual_length is None else residual_length
        if type(residual) is not int or residual < 0:
            raise ValueError(f"residual_length must be an int of at least 0, or None, got {residual_length!r}")
        if type(sinks) is not int or not 0 <= sinks <= MAX_SINKS:
            raise ValueError(f"sinks must be an int from 0 to {MAX_SINKS}, got {sinks!r}")
        check_max_cache_len(max_cache_len)
        skipped = {i % n_layers for i in skip_layers}

        def make_layer(layer_idx: int, *shape: int | None) -> KVLayer:
            if layer_idx in skipped:
                return make_static_layer(max_cache_len, layer_idx, *shape)
            exact_first = sinks if shape[-1] is None else 0  # a sliding window leaves them behind
            codecs, table = (k_codecs[layer_idx], v_codecs[layer_idx]), tables[layer_idx]
            settings = QuantSettings(*codecs, group_size, residual, exact_first, table)
            return KVQuantizedLayer(settings, max_cache_len, layer_idx, *shape)

        super().__init__(config, make_layer)
        made_with: dict[str, Any] = {"key_bits": k_codecs[kept[0]].argument, "value_bits": v_codecs[kept[0]].argument}
        made_with |= {"group_size": group_size, "skip_layers": sorted(skipped)}
        if calibration is not None:
            made_with = {"calibration": made.without_tables().as_json()}
        self.settings = {**made_with, "residual_length": residual, "max_cache_len": max_cache_len, "sinks": sinks}

    def _graph_obstacle(self) -> str | None:
        if self.settings["max_cache_len"] is None:
            return "a cache that does not grow: give QuantizedKVCache a max_cache_len"
        if any(isinstance(layer, KVQuantizedLayer) and layer.is_sliding for layer in self.kv_layers):
            return "blocks in order, not in rings, as a QuantizedKVCache of a model with sliding windows keeps them"
        return None
