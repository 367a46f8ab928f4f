import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cupymoe.weights import FORMATS, pack_codes, unpack_codes
from tests.weights.helpers import codes_of


def words(packed):
    return packed.numpy().view("<u4")


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.codes in ("int4", "nf4")])
def test_a_mask_and_a_shift_of_a_word_is_a_pair_of_neighbours_in_4_bits(name):
    codes = codes_of(name, 2, 3, 64)
    packed = words(pack_codes(FORMATS[name], codes))
    natural = codes.numpy().reshape(2, 3, 8, 8)
    for j in range(4):
        pair = (packed >> 4 * j) & 0x000F000F
        assert np.array_equal(pair & 0xFFFF, natural[..., 2 * j])
        assert np.array_equal(pair >> 16, natural[..., 2 * j + 1])


@pytest.mark.parametrize("name", FORMATS)
def test_fields_are_all_of_a_word(name):
    codec = FORMATS[name].codec
    places = [field.place + bit for field in codec.fields for bit in range(field.bits)]
    of_codes = [(field.code, field.first_bit + bit) for field in codec.fields for bit in range(field.bits)]
    assert sorted(places) == [*range(32)]
    assert sorted(of_codes) == [(code, bit) for code in range(32 // codec.bits) for bit in range(codec.bits)]


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.bits == 8])
def test_a_mask_and_a_shift_of_a_word_is_a_pair_of_neighbours_in_8_bits(name):
    codes = codes_of(name, 2, 3, 32)
    packed = words(pack_codes(FORMATS[name], codes))
    natural = codes.numpy().reshape(2, 3, 8, 4)
    for j in range(2):
        pair = (packed >> 8 * j) & 0x00FF00FF
        assert np.array_equal(pair & 0xFFFF, natural[..., 2 * j])
        assert np.array_equal(pair >> 16, natural[..., 2 * j + 1])


@settings(deadline=None)
@given(name=st.sampled_from([*FORMATS]), rows=st.integers(1, 4), k=st.integers(1, 100), seed=st.integers(0, 2**32))
def test_unpacking_undoes_packing_at_any_depth(name, rows, k, seed):
    torch.manual_seed(seed)
    format = FORMATS[name]
    codes = torch.randint(0, 2**format.bits, (2, rows, k), dtype=torch.uint8)
    packed = pack_codes(format, codes)
    assert packed.shape == (2, rows, format.row_bytes(k))
    assert packed.is_contiguous()
    assert torch.equal(unpack_codes(format, packed, k), codes)
    padded = packed.shape[2] * 8 // format.bits
    assert torch.all(unpack_codes(format, packed, padded)[..., k:] == format.padding_code)


@pytest.mark.parametrize("name", FORMATS)
def test_every_code(name):
    format = FORMATS[name]
    codes = torch.arange(2**format.bits, dtype=torch.uint8).expand(1, 2, -1)
    assert torch.equal(unpack_codes(format, pack_codes(format, codes), codes.shape[2]), codes)


def test_what_is_no_row_of_codes():
    format = FORMATS["int4_g32"]
    with pytest.raises(TypeError, match=r"codes must be a torch\.Tensor, got list"):
        pack_codes(format, [1])
    with pytest.raises(TypeError, match=r"codes must be uint8, got torch\.int8"):
        pack_codes(format, torch.zeros(1, 1, 32, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"codes must have three dimensions, .* got shape \[1, 32\]"):
        pack_codes(format, torch.zeros(1, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="rows must have 32 bytes for a depth of 33, got 16"):
        unpack_codes(format, torch.zeros(1, 1, 16, dtype=torch.uint8), 33)
