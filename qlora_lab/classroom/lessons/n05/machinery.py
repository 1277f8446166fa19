"""What 05_double_quantization computes behind folded cells: the slider's figure."""

import functools

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from qlora_lab.classroom.lessons.n05.figures import draw_block_costs, draw_stacked
from qlora_lab.classroom.samples import bundled_weight
from qlora_lab.memory import SHAPES
from qlora_lab.quantization import NF4, bits_per_parameter, dequantize, double_quantize, quantize, relative_rms

SIZES = [2**n for n in range(5, 13)]  # of blocks, and of blocks of scales


@functools.cache
def errors_of_choices() -> dict[tuple[int, int | None], float]:
    """Relative error of NF4 on every 32nd row of the bundled model's embeddings.

    The keys are block size and scales that share a second-level scale: None for float32 scales.
    """
    rows = bundled_weight("model.embed_tokens.weight")[::32].float()
    errors = {}
    for size in SIZES:
        single = quantize(rows, NF4, size)
        errors[size, None] = relative_rms(rows, dequantize(single))
        for second in SIZES:
            errors[size, second] = relative_rms(rows, dequantize(double_quantize(single, second)))
    return errors


def draw_choice(block: int, second: int, double: bool, model: str) -> Axes:
    """The slider's figure: bits per parameter and GB beside blocks of 64 with float32 scales; error over bits."""
    errors = errors_of_choices()
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    scales = {"scales": 8 / block, "second-level scales": 32 / (block * second)} if double else {"scales": 32 / block}
    rows = {"blocks of 64,\nfloat32 scales": {"codes": 4, "scales": 0.5}, "yours": {"codes": 4} | scales}
    weights = SHAPES[f"llama-{model.lower()}"].linear_parameters()
    ends = {name: f"{weights * sum(row.values()) / 8 / 1e9:.1f} GB" for name, row in rows.items()}
    draw_stacked(left, rows, "bits per parameter (hatched: scales)", ends, legend=False).set_xlim(0, 6.5)
    left.set_title(f"yours: {' + '.join(f'{part:.3g}' for part in rows['yours'].values())} bits", fontsize=10)
    curves = {
        name: [(bits_per_parameter(size, each, 256), errors[size, 256 if each else None], size) for size in SIZES]
        for name, each in {"float32 scales": False, "double quantization": True}.items()
    }
    bits, error = bits_per_parameter(block, double, second), errors[block, second if double else None]
    draw_block_costs(right, curves, (bits, error)).set(xlim=(3.65, 5.15), ylim=(0.07, 0.19))
    right.set_title(f"yours, ringed: {bits:.3f} bits, error {error:.4f}", fontsize=10)
    return left
