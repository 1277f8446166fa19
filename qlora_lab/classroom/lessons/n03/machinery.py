"""What 03_number_formats runs behind folded cells: a model whose weights are rounded, and the slider's figure."""

import contextlib
import math
from collections.abc import Iterator

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from qlora_lab.classroom.lessons.n03.figures import draw_error_sizes, draw_scaled_values
from qlora_lab.classroom.samples import DISTRIBUTIONS, sample
from qlora_lab.errors import UserError
from qlora_lab.quantization import UniformTensor, quantize_absmax

COUNT = 65_536
SAMPLES = {name: sample(name, COUNT) for name in DISTRIBUTIONS}
ORDER = torch.randperm(COUNT, generator=torch.Generator().manual_seed(5))  # the first of these become outliers
SCALED_EDGES, LOG_ERROR_EDGES = torch.linspace(-1, 1, 102), torch.linspace(-4, 1.4, 55)


def linear_layers(model) -> list[torch.nn.Linear]:
    """The linear layers of a transformers model without its output head: what QLoRA holds in 4 bits.

    Raises:
        UserError: it has none.
    """
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    if not layers:
        raise UserError(f"{type(model).__name__} has no torch.nn.Linear: take a model that is built of them, as LLaMA")
    return layers


@contextlib.contextmanager
def rounded(model, bits: int, block_size: int | None) -> Iterator[tuple[float, float]]:
    """Round the weights of all linear layers by absmax; put the old ones back at the end.

    bits: of a code; 16 leaves the weights as they are. block_size: None for one scale in each matrix. Gives the
    relative error of all these weights together, and the share of them that is zero.
    """
    layers = linear_layers(model)
    originals = [layer.weight.data for layer in layers]
    lost = total = zeros = count = 0.0
    try:
        for layer, weight in zip(layers, originals, strict=True):
            if bits < 16:
                layer.weight.data = quantize_absmax(weight, bits, block_size).dequantize()
            lost += (layer.weight.data - weight).float().square().sum().item()
            total += weight.float().square().sum().item()
            zeros += (layer.weight.data == 0).sum().item()
            count += weight.numel()
        yield math.sqrt(lost / total), zeros / count
    finally:
        for layer, weight in zip(layers, originals, strict=True):
            layer.weight.data = weight


def weights_in_deviations(model, edges: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """The weights of all linear layers, each divided by the standard deviation of its matrix.

    Returns the share in each of the equally wide bins between `edges` (float64, Tensor[bins]), the share that lies
    farther than 6 from 0, and the one that lies farthest.
    """
    counts, beyond, count, farthest = torch.zeros(len(edges) - 1, dtype=torch.float64), 0, 0, 0.0
    for layer in linear_layers(model):
        z = layer.weight.detach().flatten().float()
        z = z / z.std()
        counts += torch.histc(z, len(edges) - 1, edges[0].item(), edges[-1].item())
        beyond += int((z.abs() > 6).sum())
        count += z.numel()
        farthest = max(farthest, z[z.abs().argmax()].item(), key=abs)
    return counts / count, beyond / count, farthest


def gaussian_shares(edges: torch.Tensor) -> torch.Tensor:
    """The share of a normal distribution (mean 0, variance 1) between neighbouring edges: float64, Tensor[bins]."""
    below = torch.special.ndtr(edges.double())
    return below[1:] - below[:-1]


def shares_of(values: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """The share of the values in each of the equally wide bins between edges: float32, Tensor[bins]."""
    return torch.histc(values, len(edges) - 1, edges[0].item(), edges[-1].item()) / values.numel()


def scaled(x: torch.Tensor, q: UniformTensor) -> torch.Tensor:
    """Each value's place in its block's range: -1 at the lowest level, 1 at the highest."""
    half = q.scale * (q.levels - 1) / 2
    return (x.view(len(half), -1).T / half).T.flatten().clamp(-1, 1)


def draw_rounding(bits: int, block_size: int, distribution: str, outliers: float) -> Axes:
    """The slider's figure: where values lie among the levels, and how large their errors are.

    outliers: the share of the values that is multiplied by 20.
    """
    x = SAMPLES[distribution].clone()
    x[ORDER[: round(outliers * COUNT)]] *= 20
    q = quantize_absmax(x, bits, block_size)
    error = (q.dequantize() - x) / x.square().mean().sqrt()
    rms = error.square().mean().sqrt().item()
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    title = f"{q.levels} marks · {q.bits_per_parameter:.3f} bits per parameter"
    levels = torch.linspace(-1, 1, q.levels)
    draw_scaled_values(left, shares_of(scaled(x, q), SCALED_EDGES), SCALED_EDGES, levels, title)
    sizes = shares_of(error.abs().clamp(1e-4, 25).log10(), LOG_ERROR_EDGES)
    return draw_error_sizes(right, sizes, LOG_ERROR_EDGES, rms, f"relative error {rms:.3g}")
