"""The table of codecs: a new width is a new row, and everything reads it."""

import pytest
import torch
from models import generate, prompt, tiny_model
from tolerance import assert_close_to_reference

import hf_kvattn
from hf_kvattn import QuantizedKVCache
from hf_kvattn.kernels import dispatch, native, sdpa
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.quant.codecs import CODECS, Codec, codec_for
from hf_kvattn.quant.layout import planes_of

INT1 = Codec("int1", 1, by_channel=True)


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
def test_a_row_is_found_by_its_argument(codec):
    assert codec_for(codec.argument) is codec and 1 <= codec.bits <= 8
    assert sum(planes_of(codec.bits)) == codec.bits


def test_what_is_no_row_is_refused():
    for wrong in (5, 7, 4.0, True, None, "8", "int4", [4]):
        with pytest.raises(ValueError, match="bits must be one of"):
            codec_for(wrong)


def test_a_new_width_is_one_row(monkeypatch):
    """Codes of 1 bit: PyTorch quantizes and reads them; the kernels that do not know them refuse."""
    errors = {}
    monkeypatch.setitem(CODECS, "int1", INT1)
    model, inputs = tiny_model(), prompt(70)
    expected = model(**inputs).logits
    with hf_kvattn.enabled(model), torch.no_grad():
        for bits in (1, 2, 4):
            cache = QuantizedKVCache(model.config, bits=bits, group_size=16)
            model(inputs["input_ids"][:, :68], past_key_values=cache)
            out = model(inputs["input_ids"][:, 68:], past_key_values=cache).logits
            errors[bits] = (out - expected[:, 68:]).square().mean()
            layer = cache.layers[0]
            k, v, packed, *_ = layer.stored_kv()
            call = AttendCall(torch.randn(2, 4, 1, 16), k, v, 0.25, packed=packed)
            assert_close_to_reference(sdpa.attend(call), call)
            assert packed.k_codes.shape[-1] == 4 * bits * 16
            assert (dispatch.auto_choice(call)[0], native.unsupported(call)) == (
                ("sdpa", "native kernels read int8, int4, int3, int2, not int1") if bits == 1 else ("native", None)
            )
        assert errors[4] < errors[2] < errors[1]
        tokens, _ = generate(model, inputs, 40, past_key_values=QuantizedKVCache(model.config, bits=1, group_size=16))
        with hf_kvattn.backend("reference"):
            again = QuantizedKVCache(model.config, bits=1, group_size=16)
            assert torch.equal(tokens, generate(model, inputs, 40, past_key_values=again)[0])
