import pytest
import torch

from qlora_lab.classroom.samples import DISTRIBUTIONS, bundled_weight, sample

# fourth moment over the second's square: 3 for the Gaussian, 6 for Laplace, 9 for Student-t with 5 degrees of freedom
# (whose sample value converges too slowly to test), 9/5 for the uniform distribution
KURTOSIS = {"Gaussian": 3, "Laplace": 6, "uniform": 1.8}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_moments(distribution):
    x = sample(distribution, 1_000_000)
    assert x.dtype == torch.float32 and x.shape == (1_000_000,)
    assert torch.equal(x, sample(distribution, 1_000_000)) and not torch.equal(x, sample(distribution, 1_000_000, 1))
    x = x.double()
    assert abs(x.mean()) < 5e-3 and x.var() == pytest.approx(1, rel=0.01)  # five standard errors of the mean
    if distribution in KURTOSIS:
        assert x.pow(4).mean() / x.var() ** 2 == pytest.approx(KURTOSIS[distribution], rel=0.03)


def test_students_tails():
    """P(|t| > 3) for 5 degrees of freedom is 0.03010 (tables); ours is scaled to variance 1: t / sqrt(5 / 3)."""
    share = (sample("Student-t", 1_000_000).abs() > 3 / (5 / 3) ** 0.5).double().mean().item()
    assert share == pytest.approx(0.03010, abs=5 * (0.0301 / 1e6) ** 0.5)


def test_unknown_names():
    with pytest.raises(ValueError, match="'cauchy': choose from Gaussian"):
        sample("cauchy", 3)
    with pytest.raises(KeyError, match="no tensor 'nothing'"):
        bundled_weight("nothing")


def test_weight_is_the_models(bundled):
    weight = bundled_weight("model.layers.0.self_attn.q_proj.weight")
    assert weight.shape == (576, 576) and weight.dtype == torch.bfloat16
    assert bundled_weight().shape == (49152, 576)
