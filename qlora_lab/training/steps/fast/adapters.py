"""All adapters, their gradients and AdamW's state in flat tensors, which one kernel updates."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from qlora_lab.training.optimizers import without_accelerate
from qlora_lab.training.steps.fast.description import SharedInput
from qlora_lab.training.steps.fast.limits import NoFastStep, kernels


@dataclass(frozen=True, eq=False)
class Border:
    """The adapters of n layers that read the same input, and their gradients: views of the tensors of `Adapters`.

    A, A_gradient: (n * rank, in). B, B_gradient: (the layers' outputs in all, rank). The layers' matrices are stacked.
    accumulating: a step has several micro-batches, whose gradients are summed.
    """

    A: torch.Tensor
    B: torch.Tensor
    A_gradient: torch.Tensor
    B_gradient: torch.Tensor
    accumulating: bool

    def add_gradient(self, gradient: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> None:
        """Set `gradient` (A_gradient, B_gradient or rows of one) to scale * (a @ b), or add that if accumulating."""
        if self.accumulating:
            gradient.add_(a @ b, alpha=scale)
        else:
            torch.addmm(gradient, a, b, beta=0, alpha=scale, out=gradient)


class Adapters:
    """All adapters in one flat float32 tensor, and likewise their gradients and AdamW's state: one kernel updates all.

    The model's own parameters, and the entries of `optimizer.state`, become views of these tensors, so adapters and
    checkpoints are saved as usual.

    Args:
        groups: the layers by shared input, in the model's order.
        optimizer: AdamW of torch, or bitsandbytes' with 32-bit states, of these adapters and nothing else.
        dtype: of the gradients, unless they are accumulated; then it is float32.
        accumulating: a step has several micro-batches.

    Raises:
        NoFastStep: the optimizer has other parameters than the adapters'.
    """

    def __init__(self, groups: list[SharedInput], optimizer, dtype: torch.dtype, accumulating: bool):
        self.optimizer = inner = without_accelerate(optimizer)
        parameters = []
        for group in groups:
            parameters += [adapter.A for adapter in group.adapters] + [adapter.B for adapter in group.adapters]
        trained = {id(p) for group in inner.param_groups for p in group["params"]}
        if trained != {id(p) for p in parameters}:
            raise NoFastStep("something besides the linear layers' adapters is trained")
        self.parameters = parameters
        device, count = parameters[0].device, sum(p.numel() for p in parameters)
        self.flat = torch.empty(count, device=device)
        paged = getattr(inner, "get_state_buffer", None)  # bitsandbytes'
        new_moment = functools.partial(paged, dtype=torch.float32) if paged else torch.zeros_like
        self.moments = new_moment(self.flat), new_moment(self.flat)
        names = _moment_names(inner)
        self.steps = 0
        slices, start = {}, 0
        for p in parameters:
            slices[p] = part = slice(start, start := start + p.numel())
            self.flat[part].copy_(p.detach().flatten())
            p.data = self.flat[part].view_as(p)
            state = inner.state[p]
            for name, moment in zip(names, self.moments, strict=True):
                if name in state:  # resumed
                    moment[part].copy_(state[name].flatten())
                    self.steps = int(state["step"])
                state[name] = moment[part].view_as(p)
        # a gradient is one matrix product in `dtype`: more precision is of no use unless several are summed
        self.gradient = torch.zeros(count, dtype=torch.float32 if accumulating else dtype, device=device)
        gradients = {p: self.gradient[part].view_as(p) for p, part in slices.items()}
        if hasattr(inner, "page_mng"):
            inner.page_mng.paged_tensors[:] = self.moments  # frees the tensors that a checkpoint was read into
        self.accumulating = accumulating
        self.borders = [self._border(group, gradients) for group in groups]

    def _border(self, group: SharedInput, gradients: dict) -> Border | None:
        """The group's `Border`; None if none of its layers has an adapter."""
        if not group.adapters:
            return None
        A, B = [adapter.A for adapter in group.adapters], [adapter.B for adapter in group.adapters]
        return Border(
            _joined([p.data for p in A]),
            _joined([p.data for p in B]),
            _joined([gradients[p] for p in A]),
            _joined([gradients[p] for p in B]),
            self.accumulating,
        )

    def update(self, learning_rate: float, max_grad_norm: float | None, scale: float = 1.0) -> torch.Tensor:
        """Clip the gradients and take a step of AdamW, or change no parameter if the gradients' norm is not finite.

        The caller counts the step (`steps`) once it knows that there was one.

        Args:
            learning_rate: for this step.
            max_grad_norm: None for no clipping.
            scale: of the loss of which `gradient` is the gradient.

        Returns:
            the norm of the unscaled gradients before clipping, a float32 scalar
        """
        group = self.optimizer.param_groups[0]
        norm = torch.linalg.vector_norm(self.gradient, dtype=torch.float32) / scale
        kernels().adamw(
            self.flat, self.gradient, *self.moments, norm, self.steps + 1, learning_rate, group["weight_decay"],
            math.inf if max_grad_norm is None else max_grad_norm, group["betas"], group["eps"], 1 / scale,
        )  # fmt: skip
        return norm

    def write_down_steps(self) -> None:
        """Write the number of steps to the optimizer's state, so that a checkpoint holds it."""
        tensor = isinstance(self.optimizer, torch.optim.AdamW)
        step = torch.tensor(float(self.steps)) if tensor else self.steps
        for p in self.parameters:
            self.optimizer.state[p]["step"] = step


def _moment_names(optimizer) -> tuple[str, str]:
    """The optimizer's names for the running means of a gradient and of its square: torch's or bitsandbytes'."""
    return ("exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ("state1", "state2")


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    """Matrices that are adjacent in memory, as one matrix with the rows of all."""
    rows = sum(len(piece) for piece in pieces)
    return pieces[0].as_strided((rows, pieces[0].shape[1]), pieces[0].stride())
