"""Numbers to try things on: random ones from several distributions, and real weights.

>>> sample("Laplace", 4, seed=1)
tensor([ 0.9812, -0.9059,  0.0070, -0.0545])
"""

import torch

DISTRIBUTIONS = ("Gaussian", "Laplace", "Student-t", "uniform")


def sample(distribution: str, count: int, seed: int = 0) -> torch.Tensor:
    """Random numbers with mean 0 and variance 1: float32, Tensor[count], the same ones for the same seed.

    distribution: one of DISTRIBUTIONS. Student-t has 5 degrees of freedom: heavier tails than Laplace's.

    Raises:
        ValueError: another distribution.
    """
    draw = torch.Generator().manual_seed(seed)
    if distribution == "Gaussian":
        return torch.randn(count, generator=draw)
    if distribution == "Laplace":
        exponential = -torch.log1p(-torch.rand(2, count, generator=draw))
        return (exponential[0] - exponential[1]) / 2**0.5
    if distribution == "Student-t":
        normal = torch.randn(6, count, generator=draw)
        return normal[0] / (normal[1:].square().mean(0) * 5 / 3).sqrt()
    if distribution == "uniform":
        return (2 * torch.rand(count, generator=draw) - 1) * 3**0.5
    raise ValueError(f"distribution is {distribution!r}: choose from {', '.join(DISTRIBUTIONS)}")


def bundled_weight(name: str = "model.embed_tokens.weight") -> torch.Tensor:
    """One tensor of the bundled model, by its name in the checkpoint: bfloat16, read without loading the model.

    Raises:
        KeyError: no such tensor; the message lists some names.
    """
    from safetensors import safe_open

    from qlora_lab.finetuning import fetch

    with safe_open(fetch() / "model.safetensors", "pt") as checkpoint:
        if name not in checkpoint.keys():  # noqa: SIM118  (it is no dict)
            raise KeyError(f"no tensor {name!r}; there are {', '.join(list(checkpoint.keys())[:9])}, ...")
        return checkpoint.get_tensor(name)
