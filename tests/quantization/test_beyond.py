"""AF4, BOF4, signed scales, outliers, MXFP4 and NVFP4, held against other implementations and against brute force."""

import itertools

import gguf
import numpy as np
import pytest
import torch

from qlora_lab.quantization import INT4, NF4, best_codebook, dequantize, normal_float, quantize, relative_rms
from qlora_lab.quantization.any_levels import quantize_levels
from qlora_lab.quantization.microscaling import decode_e2m1, encode_e2m1, quantize_mxfp4, quantize_nvfp4
from qlora_lab.quantization.optimal import af4, block_density, bof4, optimal_levels

X = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))


def test_af4_is_bitsandbytes_table():
    from bitsandbytes.functional import get_4bit_type

    theirs = get_4bit_type("af4", device="cpu").sort().values
    torch.testing.assert_close(af4(64), theirs, rtol=0, atol=2e-7)
    assert not torch.allclose(af4(128), theirs, atol=0.01)


def test_the_density_is_that_of_normal_numbers_in_blocks():
    x, density = block_density(64)
    scaled = (X.view(-1, 64) / X.view(-1, 64).abs().amax(1, keepdim=True)).flatten()
    scaled = scaled[scaled.abs() < 1].double()
    assert density.sum() * (x[1] - x[0]) == pytest.approx(1, rel=1e-9)
    for edge in (0.05, 0.2, 0.5, 0.9):
        expected = density[x.abs() < edge].sum() * (x[1] - x[0])
        assert (scaled.abs() < edge).double().mean() == pytest.approx(expected.item(), abs=2e-3)


@pytest.mark.parametrize("weight", [1, 2])
def test_an_error_counts_as_often_as_the_blocks_largest_number(weight):
    x, density = block_density(64, weight)
    largest = X.view(-1, 64).abs().amax(1, keepdim=True)
    scaled, counts = X.view(-1, 64) / largest, (largest**weight).expand(-1, 64)
    inside = scaled.abs() < 1
    found = counts[inside & (scaled.abs() < 0.3)].sum() / counts[inside].sum()
    assert found.item() == pytest.approx((density[x.abs() < 0.3].sum() * (x[1] - x[0])).item(), abs=2e-3)


def test_bof4_is_what_lloyd_finds_on_data():
    """Integration and a million numbers agree to the data's own noise, about 1/sqrt(65,536) of a level's share."""
    torch.testing.assert_close(bof4(64), best_codebook(X, 64, keep=(-1, 0, 1)), rtol=0, atol=4e-3)


@pytest.mark.parametrize(("squared", "power"), [(True, 2), (False, 1)])
@pytest.mark.parametrize("signed", [False, True])
def test_bof4_minimizes_the_error_it_is_made_for(squared, power, signed):
    """No level can be moved by 0.004 either way without a larger error on ten million fresh numbers."""
    x = torch.randn(64 * 80_000, generator=torch.Generator().manual_seed(1))

    def error(levels) -> float:
        return (quantize_levels(x, levels, 64, signed).dequantize() - x).double().abs().pow(power).mean().item()

    levels = bof4(64, squared, signed)
    least = error(levels)
    free = [i for i, level in enumerate(levels.tolist()) if level not in (-1, 0, 1)]
    assert len(free) == (14 if signed else 13)
    for i, step in itertools.product(free[::4], (-0.02, 0.02)):
        moved = levels.clone()
        moved[i] += step
        assert error(moved) > least
    assert least < error(NF4)
    if signed:
        assert (
            least
            < 0.97
            * (quantize_levels(x, bof4(64, squared), 64).dequantize() - x).double().abs().pow(power).mean().item()
        )


def test_what_no_levels_can_be_made_for_is_refused():
    with pytest.raises(ValueError, match="block_size=1, levels=16: at least 2 and 4 are needed"):
        optimal_levels(1, True, 2, (0.0, 1.0))
    with pytest.raises(ValueError, match="0 and 1 must be among"):
        optimal_levels(64, True, 2, (-1.0, 1.0))


@pytest.mark.parametrize("shape", [(8, 128), (3, 50), (7,), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_levels_are_quantizes_where_both_can(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for levels in (NF4, INT4):
        torch.testing.assert_close(
            quantize_levels(x, levels, 64).dequantize(), dequantize(quantize(x, levels, 64)), rtol=0, atol=0
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fewer_and_more_bits(bits):
    """Bits are counted with the scale of 32 bits for 64 elements; one bit more takes a third of the error at least.

    But not at 8 bits: quantiles crowd in the middle, and the tails, where errors are large, gain next to nothing.
    """
    q = quantize_levels(X, normal_float(bits), 64)
    assert q.bits_per_parameter == bits + 0.5
    fewer = relative_rms(X, quantize_levels(X, normal_float(bits - 1), 64).dequantize()) if bits > 2 else 1.0
    assert relative_rms(X, q.dequantize()) < (2 / 3 * fewer if bits < 8 else fewer)
    brute = (X[:64, None] / X[:64].abs().max() - normal_float(bits)).abs().argmin(1)
    assert torch.equal(q.codes[:64].long(), brute)


def test_a_signed_scale_puts_the_largest_number_at_one():
    x = torch.tensor([0.5, -3.0, 1.5, 0.0, 2.0, 1.0, -1.0, 0.0])
    q = quantize_levels(x, bof4(64, signed=True), 4, signed=True)
    assert q.scales.tolist() == [-3, 2]
    assert q.dequantize()[1] == -3 and q.dequantize()[4] == 2 and q.dequantize()[3] == 0
    with pytest.raises(ValueError, match="every block needs the level 1"):
        quantize_levels(x, torch.linspace(-1, 0.5, 16), signed=True)


def test_outliers_are_kept_and_no_longer_stretch_their_block():
    x = X[: 64 * 64].clone()
    x[[5, 700]] = torch.tensor([40.0, -50.0])
    plain, apart = quantize_levels(x), quantize_levels(x, outlier_sigmas=8)
    assert apart.places.tolist() == [5, 700]
    assert apart.dequantize()[[5, 700]].tolist() == [40, -50]
    assert apart.bits_per_parameter == pytest.approx(4.5 + 2 * 48 / len(x))
    others = torch.ones(len(x), dtype=torch.bool)
    others[[5, 700]] = False
    worse = (plain.dequantize() - x)[others].norm()
    assert (apart.dequantize() - x)[others].norm() < 0.75 * worse


@pytest.mark.parametrize(
    ("x", "settings", "error", "sentence"),
    [
        (torch.ones(4, dtype=torch.int32), {}, TypeError, "x is torch.int32"),
        ([1.0], {}, TypeError, "x is list"),
        (torch.tensor([1.0, float("nan")]), {}, ValueError, "non-finite"),
        (torch.ones(4), {"levels": torch.ones(1)}, ValueError, "1 levels: 2 to 256"),
        (torch.ones(4), {"levels": torch.tensor([1.0, -1.0])}, ValueError, "not sorted"),
        (torch.ones(4), {"block_size": 0}, ValueError, "block_size=0"),
    ],
)
def test_what_cannot_be_quantized_is_refused(x, settings, error, sentence):
    with pytest.raises(error, match=sentence):
        quantize_levels(x, **settings)


def test_e2m1_rounds_to_the_nearest_and_ties_to_even():
    values = decode_e2m1(torch.arange(16, dtype=torch.uint8))
    assert torch.equal(encode_e2m1(values), torch.arange(16, dtype=torch.uint8))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 100.0])
    assert decode_e2m1(encode_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6]
    assert decode_e2m1(encode_e2m1(-ties)).tolist() == [0, -1, -1, -2, -2, -4, -4, -6, -6]
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 12 - 6
    nearest = (x[:, None] - values).abs().amin(1)
    assert torch.equal((decode_e2m1(encode_e2m1(x)) - x).abs(), nearest)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 3e4])
def test_mxfp4_is_ggufs(scale):
    """But for ties, which gguf gives to the first of its table: random numbers have none."""
    x = (X[: 64 * 96] * scale).view(96, 64)
    x[3] = 0
    packed = gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.MXFP4)
    theirs = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.MXFP4))
    q = quantize_mxfp4(x)
    torch.testing.assert_close(q.dequantize(), theirs, rtol=0, atol=0)
    assert np.array_equal(packed.reshape(-1, 17)[:, 0], q.scales.numpy())
    assert q.bits_per_parameter == packed.nbytes * 8 / x.numel() == 4.25


def test_nvfp4_decodes_as_ggufs_and_is_as_close_as_its_scales_allow():
    """gguf only decodes NVFP4, and has no scale for the tensor: it is made 1 here, by a block with 6 * 448 in it."""
    x = (X[: 64 * 96]).view(96, 64).clone()
    x[0, 0] = 6 * 448
    q = quantize_nvfp4(x)
    assert q.tensor_scale == 1 and q.scales[0].float() == 448
    scales = q.scales.view(torch.uint8).view(-1, 4).numpy()
    low, high = q.codes.view(-1, 4, 2, 8)[:, :, 0], q.codes.view(-1, 4, 2, 8)[:, :, 1]
    packed = np.concatenate([scales, (low | (high << 4)).view(-1, 32).numpy()], axis=1)
    theirs = gguf.dequantize(packed.reshape(96, -1), gguf.GGMLQuantizationType.NVFP4)
    torch.testing.assert_close(q.dequantize(), torch.from_numpy(theirs), rtol=0, atol=0)
    whole = quantize_nvfp4(X.view(-1, 64))
    largest = X.view(-1, 16).abs().amax(1)
    assert (whole.block_scales() / (largest / 6) - 1).abs().max() <= 1 / 16 + 1e-6  # three bits of mantissa
    assert whole.bits_per_parameter == 4.5
    assert relative_rms(X, whole.dequantize().flatten()) < relative_rms(
        X, quantize_mxfp4(X.view(-1, 32)).dequantize().flatten()
    )


@pytest.mark.parametrize("encode", [quantize_mxfp4, quantize_nvfp4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_of_zeros_stay_zeros_and_dtypes_stay(encode, dtype):
    q = encode(torch.zeros(2, 64, dtype=dtype))
    assert torch.equal(q.dequantize(), torch.zeros(2, 64, dtype=dtype))
    assert encode(torch.zeros(0, 64)).dequantize().shape == (0, 64)
    with pytest.raises(ValueError, match=r"x has shape \(2, 40\): its rows must consist of blocks of"):
        encode(torch.zeros(2, 40))
    with pytest.raises(TypeError, match="x is torch.float64"):
        encode(torch.zeros(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="non-finite"):
        encode(torch.full((1, 32), float("inf")))
