"""Two codes a byte: against hex digits and bitsandbytes."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lab.quantization import NF4, pack, unpack

codes = st.lists(st.integers(0, 15), max_size=300)


@settings(deadline=None, derandomize=True)
@given(codes)
def test_there_and_back(codes):
    packed = pack(torch.tensor(codes, dtype=torch.int64))
    assert packed.shape == ((len(codes) + 1) // 2,)
    assert unpack(packed, len(codes)).tolist() == codes
    assert unpack(packed).tolist() == codes + [0] * (len(codes) % 2)


@settings(deadline=None, derandomize=True)
@given(codes, st.integers(0, 15))
def test_the_hex_digits_read_like_the_codes(codes, padding):
    digits = "".join(f"{code:x}" for code in codes) + (f"{padding:x}" if len(codes) % 2 else "")
    assert bytes(pack(torch.tensor(codes, dtype=torch.uint8), padding).tolist()).hex() == digits


def test_bitsandbytes_reads_the_same_order():
    x = NF4.repeat(4)  # one block of 64, absmax 1: element i has code i % 16
    packed, _ = bnb.quantize_4bit(x, quant_type="nf4", blocksize=64)
    assert torch.equal(pack(torch.arange(16).repeat(4)), packed.flatten())


def test_any_shape():
    grid = torch.arange(15, dtype=torch.int32).view(3, 5)
    assert pack(grid.t()).tolist() == pack(grid.t().contiguous().flatten()).tolist()
    assert unpack(pack(grid).view(2, 4), 15).tolist() == list(range(15))


def test_a_count_that_does_not_fit():
    with pytest.raises(ValueError, match="2 bytes cannot hold 5 codes: 5 take 3 bytes"):
        unpack(torch.zeros(2, dtype=torch.uint8), 5)
    with pytest.raises(TypeError, match="packed is torch.int64: packed codes are torch.uint8"):
        unpack(torch.zeros(2, dtype=torch.int64))
