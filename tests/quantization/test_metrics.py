"""Metrics by hand, and the figures that the course quotes."""

import math

import pytest
import torch

from qlora_lab.quantization import (
    E2M1,
    FP4,
    INT4,
    NF4,
    entropy,
    error_report,
    level_usage,
    max_error,
    quantize,
    quantize_absmax,
    quantize_affine,
    relative_rms,
    snr_db,
)


def test_by_hand():
    x, restored = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert relative_rms(x, restored) == pytest.approx(0.5 / 5)
    assert snr_db(x, restored) == pytest.approx(20)
    assert max_error(x, restored) == 0.5
    assert snr_db(x, x) == math.inf
    assert max_error(torch.empty(0), torch.empty(0)) == 0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"x has shape \(3,\), restored \(3, 1\)"):
        relative_rms(torch.zeros(3), torch.zeros(3, 1))


def test_entropy_by_hand():
    assert entropy(torch.full((16,), 1 / 16)) == 4
    assert entropy(torch.tensor([1.0, 0.0])) == 0
    assert entropy(torch.tensor([0.5, 0.25, 0.25])) == 1.5


def test_level_usage_by_hand():
    x = torch.cat([NF4, NF4[:4], torch.ones(12)])
    usage = level_usage(quantize(x, block_size=32))
    assert (32 * usage).tolist() == [2] * 4 + [1] * 11 + [13]
    assert level_usage(quantize_absmax(torch.tensor([-1.0, 0.0, 1.0]), 2)).tolist() == pytest.approx([1 / 3] * 3)


def test_levels_that_nothing_chose_are_counted_too():
    """The lowest level only: all others have a share of 0, those above the last one chosen too."""
    x = -torch.ones(32)
    assert level_usage(quantize(x, block_size=32)).tolist() == [1] + 15 * [0]
    assert level_usage(quantize_absmax(x, 4)).tolist() == [1] + 14 * [0]
    assert level_usage(quantize_affine(x, 4)).tolist() == [1] + 15 * [0]


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))


def test_the_levels_of_nf4_are_not_used_equally(gaussian):
    """FACTS: from 1.7 to 9.2 %, entropy 3.88 of 4 bits, on Gaussian blocks of 64."""
    usage = level_usage(quantize(gaussian))
    assert usage.min().item() == pytest.approx(0.017, abs=5e-4)
    assert usage.max().item() == pytest.approx(0.092, abs=7e-4)
    assert entropy(usage) == pytest.approx(3.88, abs=0.01)


# FACTS: relative RMS error on Gaussian data, and what it costs. A million elements leave about 0.0002 of chance.
@pytest.mark.parametrize(
    ("quantizer", "error", "bits"),
    [
        (lambda x: quantize(x, NF4, 64), 0.0920, 4.5),
        (lambda x: quantize_affine(x, 4, 64), 0.0898, 5.0),
        (lambda x: quantize_absmax(x, 4, 64), 0.1077, 4.5),
        (lambda x: quantize(x, INT4, 64), 0.1077, 4.5),
        (lambda x: quantize(x, FP4, 64), 0.122, 4.5),
        (lambda x: quantize(x, E2M1, 64), 0.1057, 4.5),
        (lambda x: quantize(x, NF4, 32), 0.0873, 5.0),
        (lambda x: quantize_affine(x, 4, 32), 0.0782, 6.0),
        (lambda x: quantize(x, NF4, 128), 0.0956, 4.25),
        (lambda x: quantize_affine(x, 4, 128), 0.0999, 4.5),
    ],
)
def test_error_beside_cost(gaussian, quantizer, error, bits):
    report = error_report(gaussian, quantizer(gaussian))
    assert report.relative_rms == pytest.approx(error, abs=3e-4)
    assert report.snr_db == pytest.approx(-20 * math.log10(error), abs=0.05)
    assert report.bits_per_parameter == bits
    assert report.max_error > 0
