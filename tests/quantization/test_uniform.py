"""Integers of any width, against the loops of `reference`, torch's own quantizer and the lesson plan's numbers."""

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lab.quantization import (
    INT4,
    dequantize,
    level_usage,
    quantize,
    quantize_absmax,
    quantize_affine,
    quantize_q4_0,
    reference,
    relative_rms,
)

float32s = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(float32s, min_size=1, max_size=80), st.integers(2, 8), st.integers(1, 33))
def test_equal_to_the_loops(values, bits, block_size):
    x = torch.tensor(values)
    absmax, affine = quantize_absmax(x, bits, block_size), quantize_affine(x, bits, block_size)
    for block, start in enumerate(range(0, len(values), block_size)):
        part = values[start : start + block_size]
        codes, scale = reference.quantize_absmax(part, bits)
        assert absmax.codes[start : start + block_size].tolist() == codes
        assert absmax.scale[block].item() == scale
        codes, scale, minimum = reference.quantize_affine(part, bits)
        assert affine.codes[start : start + block_size].tolist() == codes
        assert (affine.scale[block].item(), affine.minimum[block].item()) == (scale, minimum)


def test_the_lesson_plans_example():
    """It says codes 10, 0, 13 and an error that is tiny. The maximum must have code 15, and the error is 0.056."""
    x = torch.tensor([0.5234, -1.2341, 0.8923])
    q = quantize_affine(x, bits=4)
    assert q.codes.tolist() == [12, 0, 15]
    restored = q.dequantize()
    assert restored[1:].tolist() == x[1:].tolist()
    assert restored[0].item() == pytest.approx(0.4670, abs=1e-4)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("quantizer", [quantize_absmax, quantize_affine])
@pytest.mark.parametrize("block_size", [None, "row", 32, 7])
def test_the_error_is_at_most_half_a_step(bits, quantizer, block_size):
    torch.manual_seed(0)
    x = torch.randn(9, 50)
    q = quantizer(x, bits, block_size)
    steps = q.scale.repeat_interleave(q.block_size)[: x.numel()].view(x.shape)
    # Half a step, and the rounding of a quotient up to 255, a product and a sum: a few units in the last place of 4
    assert ((q.dequantize() - x).abs() <= steps / 2 + 8 * 2**-22).all()
    assert q.indices().min() >= 0
    assert q.indices().max() < q.levels
    assert level_usage(q).sum().item() == pytest.approx(1)


def test_groups():
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    assert quantize_absmax(x).scale.tolist() == pytest.approx([20 / 127])
    assert quantize_absmax(x, block_size="row").scale.tolist() == pytest.approx([2 / 127, 20 / 127])
    assert quantize_absmax(x, block_size=1).scale.tolist() == pytest.approx([k / 127 for k in (1, 2, 10, 20)])
    assert quantize_affine(x, block_size="row").minimum.tolist() == [1, 10]
    assert quantize_affine(x[:, :1], block_size="row").minimum.tolist() == [1, 10]


def test_torchs_own_quantizer_agrees():
    """Symmetric INT8 a row, quantized and restored by torch; both round half to even."""
    torch.manual_seed(0)
    x = torch.randn(8, 100)
    q = quantize_absmax(x, 8, "row")
    theirs = torch.fake_quantize_per_channel_affine(x, q.scale, torch.zeros(8, dtype=torch.int32), 0, -127, 127)
    # torch multiplies by 1/scale where we divide: a number on a half may fall to the other side
    steps = (theirs / q.scale[:, None]).round() - q.codes
    assert steps.abs().max() <= 1 and (steps != 0).sum() <= 1
    assert (q.dequantize() != theirs).sum() <= 1


def test_symmetric_int4_is_the_codebook_int4():
    """Two roads to one format: nearest of the levels k/7 of absmax, and round(x / (absmax/7))."""
    torch.manual_seed(0)
    x = torch.randn(512, 512)
    integer = quantize_absmax(x, 4, 64)
    block = quantize(x, INT4)
    assert (integer.indices() != block.indices()).sum() <= 2  # ties and near-ties round differently
    assert relative_rms(x, integer.dequantize()) == pytest.approx(relative_rms(x, dequantize(block)), rel=1e-5)


def test_zero_stays_zero_only_in_the_symmetric_scheme():
    x = torch.tensor([-0.9, 0.0, 1.4])
    assert quantize_absmax(x, 4).dequantize()[1] == 0
    q = quantize_affine(x, 4)
    assert q.dequantize()[1] != 0
    assert q.zero_point.item() == pytest.approx(0.9 / 2.3 * 15)
    assert quantize_absmax(x).zero_point is None


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-45])
def test_a_constant_block_comes_back(value):
    x = torch.full((10,), value)
    assert quantize_affine(x, 4).dequantize().tolist() == x.tolist()
    if abs(value) > 1e-40:
        assert quantize_absmax(x, 4).dequantize().tolist() == pytest.approx(x.tolist())


def test_bits_per_parameter_count_the_constants():
    x = torch.randn(64, 64)
    assert quantize_absmax(x, 4, 64).bits_per_parameter == 4.5
    assert quantize_affine(x, 4, 64).bits_per_parameter == 5.0
    assert quantize_affine(x, 4, 32).bits_per_parameter == 6.0
    assert quantize_absmax(x, 8).bits_per_parameter == 8 + 32 / 4096
    assert quantize_affine(x, 4, 32).nbytes == 4096 + 2 * 4 * 128


def test_moves_between_devices():
    for q in (quantize_absmax(torch.randn(5, 33), 4, 32), quantize_affine(torch.randn(5, 33), 4, 32)):
        moved = q.to("meta")  # there is no second device everywhere, but there is this one
        parts = [moved.codes, moved.scale] + ([] if q.minimum is None else [moved.minimum])
        assert {part.device.type for part in [moved, *parts]} == {"meta"}
        assert (moved.nbytes, moved.shape, moved.bits) == (q.nbytes, q.shape, q.bits)
        assert torch.equal(q.to("cpu").dequantize(), q.dequantize())


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), ()])
@pytest.mark.parametrize("block_size", [None, "row", 32])
@pytest.mark.parametrize("quantizer", [quantize_absmax, quantize_affine])
def test_empty_and_scalar(quantizer, block_size, shape):
    x = torch.zeros(shape)
    assert torch.equal(quantizer(x, 4, block_size).dequantize(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_come_back(dtype):
    x = torch.randn(5, 33).to(dtype).t()
    for quantizer in (quantize_absmax, quantize_affine):
        restored = quantizer(x, 8, 32).dequantize()
        assert (restored.shape, restored.dtype) == (x.shape, dtype)
        assert relative_rms(x, restored) < 0.01


@pytest.mark.parametrize("quantizer", [quantize_absmax, quantize_affine])
def test_bad_input(quantizer):
    x = torch.randn(4, 4)
    for bits in (0, 1, 9, 16):
        with pytest.raises(ValueError, match=f"bits={bits}: choose 2 to 8"):
            quantizer(x, bits)
    for block_size in (0, -1, "column"):
        with pytest.raises(ValueError, match=f"block_size={block_size!r}: choose a count from 1"):
            quantizer(x, 4, block_size)
    for wrong in (x.long(), x.to(torch.complex64), x.double(), [1.0]):
        with pytest.raises(TypeError, match="a float32, bfloat16 or float16 tensor is needed"):
            quantizer(wrong, 4)
    x[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"1 non-finite among its 16 values, the first \(nan\) at index \(2, 3\)"):
        quantizer(x, 4)


def test_a_range_that_overflows():
    with pytest.raises(ValueError, match="overflows float32: divide x by 4"):
        quantize_affine(torch.tensor([-3e38, 3e38]), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q4_0_is_what_gguf_writes(dtype):
    """Bit for bit, with ties for the farthest element, a block of zeros, and scales far below and above 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 96, generator=generator) * 10.0 ** torch.randint(-4, 4, (60, 1), generator=generator)
    x[:20] = (x[:20] * 2).round() / 2  # many ties
    x[-1] = 0
    x = x.to(dtype)
    kind = gguf.GGMLQuantizationType.Q4_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(x.float().numpy(), kind), kind)
    q = quantize_q4_0(x)
    assert torch.equal(q.dequantize(), torch.from_numpy(expected).to(dtype))
    assert (q.levels, q.block_size, q.codes.dtype) == (16, 32, torch.uint8)
    assert q.codes[:20].unique().tolist() == list(range(16)) and (q.scale < 0).any() and (q.scale > 0).any()


def test_q4_0_wants_rows_of_whole_blocks():
    with pytest.raises(ValueError, match=r"x has shape \(4, 40\): Q4_0 needs rows of a multiple of 32"):
        quantize_q4_0(torch.zeros(4, 40))
    with pytest.raises(ValueError, match="non-finite"):
        quantize_q4_0(torch.full((32,), torch.nan))
