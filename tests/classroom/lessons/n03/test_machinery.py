"""What 03_number_formats does behind folded cells."""

import pytest
import torch

from qlora_lab.classroom.lessons.n03.machinery import gaussian_shares, linear_layers, rounded, weights_in_deviations
from qlora_lab.errors import UserError
from qlora_lab.quantization import quantize_absmax, relative_rms


class Model(torch.nn.Module):
    """Two linear layers and a head, with weights that are the same each time."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (torch.nn.Linear(64, 64) for _ in range(3))
        draw = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw)

    def get_output_embeddings(self):
        return self.head


def test_all_linear_layers_but_the_head_are_rounded_and_put_back():
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = torch.stack([model.first.weight.data, model.second.weight.data])
    with rounded(model, 4, 64) as (lost, zeros):
        now = torch.stack([model.first.weight.data, model.second.weight.data])
        assert torch.equal(now, quantize_absmax(weights, 4, 64).dequantize())
        assert lost == pytest.approx(relative_rms(weights, now)) and 0.05 < lost < 0.2
        assert zeros == (now == 0).float().mean() and 0.1 < zeros < 0.3
        assert torch.equal(model.head.weight.data, before["head.weight"])
    with pytest.raises(ZeroDivisionError), rounded(model, 2, None):
        raise ZeroDivisionError
    with rounded(model, 16, None) as untouched:
        assert untouched == (0, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_linear_layers_is_refused():
    model = Model()
    del model.first, model.second
    with pytest.raises(UserError, match="^Model has no torch.nn.Linear: "):
        linear_layers(model)


def test_weights_are_counted_in_deviations_of_their_matrix():
    model = Model()
    model.second.weight.data *= 100  # another size, the same shape
    model.first.weight.data[3, 5] = -40.0
    edges = torch.linspace(-60, 60, 121)
    shares, beyond, farthest = weights_in_deviations(model, edges)
    assert shares.sum() == pytest.approx(1) and beyond == 1 / (2 * 64 * 64)
    assert farthest == pytest.approx(-40 / model.first.weight.std().item())
    assert (shares - gaussian_shares(edges)).abs().max() < 0.03
