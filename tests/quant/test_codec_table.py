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
from hf_kvattn.quant.layout import pack_keys, pack_values, unpack_keys, unpack_values

INT5, INT6 = Codec("int5", (4, 1)), Codec("int6", (4, 2))


@pytest.mark.parametrize("codec", [*CODECS.values(), INT5, INT6], ids=lambda codec: codec.name)
def test_a_row_is_found_by_its_argument_and_its_codes_take_the_bytes_it_says(codec, monkeypatch):
    monkeypatch.setitem(CODECS, codec.name, codec)
    assert codec_for(codec.argument) is codec and 1 <= codec.bits <= 8
    x = torch.randn(3, 32, 48)
    codes, scale, zero = codec.quantize(x, -2, codec.key_shares)
    assert codes.dtype == codec.dtype and (zero is None) == codec.symmetric
    for pack, unpack in ((pack_keys, unpack_keys), (pack_values, unpack_values)):
        packed = pack(codes, codec.planes)
        assert packed.shape == (3, 4 * codec.bits * 48)
        assert torch.equal(unpack(packed, codec.planes).view(torch.uint8), codes.view(torch.uint8))


def test_what_is_no_row_is_refused():
    for wrong in (5, 7, 4.0, True, None, "8", "int4", [4]):
        with pytest.raises(ValueError, match="bits must be one of"):
            codec_for(wrong)


def test_a_new_width_is_one_row(monkeypatch):
    """Codes of 5 bits: PyTorch quantizes and reads them; the kernels that do not know them refuse."""
    errors = {}
    monkeypatch.setitem(CODECS, "int5", INT5)
    model, inputs = tiny_model(), prompt(70)
    expected = model(**inputs).logits
    with hf_kvattn.enabled(model), torch.no_grad():
        for bits in (4, 5, 8):
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
                ("sdpa", "native kernels read int8, int4, int3, int2, not int5") if bits == 5 else ("native", None)
            )
        assert errors[8] < errors[5] < errors[4]
        tokens, _ = generate(model, inputs, 40, past_key_values=QuantizedKVCache(model.config, bits=5, group_size=16))
        with hf_kvattn.backend("reference"):
            again = QuantizedKVCache(model.config, bits=5, group_size=16)
            assert torch.equal(tokens, generate(model, inputs, 40, past_key_values=again)[0])
