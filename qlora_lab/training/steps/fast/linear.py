"""Linear layers that share their input, and their adapters, as one matrix with a border."""

from __future__ import annotations

import torch

from qlora_lab.quantization import QuantizedTensor
from qlora_lab.training.steps.fast.adapters import Border
from qlora_lab.training.steps.fast.description import SharedInput
from qlora_lab.training.steps.fast.limits import adapter_kernels

ROW_UNIT = 64  # elements, 128 bytes, for faster products (7B on an H100, rank 8: 59 ms a step instead of 64)


class BorderedLinear:
    """Linear layers that share their input, and their adapters, as one matrix with a border.

        M = [ W   sB ]     W: (out, in), the layers' weights, stacked    s: alpha / rank
            [ A      ]     A: (rank, in), likewise    sB: (out, rank), block-diagonal, one block per layer

        forward     z = x Aᵀ               y = [x z] [W sB]ᵀ        = x Wᵀ + s x Aᵀ Bᵀ
        backward    dz = dy sB             dx = [dy dz] [W; A]      = dy W + s dy B A
                    dA = dzᵀ x             dB = s dyᵀ z

    rank is the sum of the adapters' ranks. Adding the correction to y and dx afterwards would read and write both once
    more, whereas 64 columns beside 4096 make a product only 1.6 % larger. (q, k and v together have 192. In all, a
    layer of LLaMA-7B multiplies 2.8 % more forward and 1.1 % more backward.) M is dense, made whenever it is needed
    and then freed: only the 4-bit weights stay in memory.

    A bias is added to y in the same product. All of y's summands may have a common factor, the `multiplier`, which is a
    part of W and s then.

    x and dy are (T, in + width) and (T, out + width or more), with room for z and dz at the end of each row; width is
    the rank rounded up to a multiple of 8, and what is beyond the rank is zero. (x may also be (T, in), if its producer
    cannot leave room: then z is a separate tensor, and costs a product of its own.)

    With dropout each adapter reads x with other numbers set to zero, m ∘ x (m is divided by 1 - dropout). Then

        z = (m ∘ x) Aᵀ      dx = dy W + m ∘ (dz A)      dA = dzᵀ (m ∘ x)        for each adapter

    Only dx needs other products; m ∘ x is made again, from the same seed, when it is needed again.

    Args:
        group: the linear layers. border: of their adapters. dtype: of M, x and y.
        multiplier: see above.
        seed: int64, (1,), from which the dropouts are drawn; stream: the number of the first adapter's.
    """

    def __init__(
        self,
        group: SharedInput,
        border: Border | None,
        dtype: torch.dtype,
        multiplier: float,
        seed: torch.Tensor,
        stream: int,
    ):
        self.parts, self.adapters, self.sizes = group.parts, group.adapters, group.sizes
        self.border, self.dtype, self.device = border, dtype, group.parts[0].weight.device
        self.inputs, self.outputs = group.parts[0].weight.shape[1], sum(self.sizes)
        self.rank = sum(adapter.rank for adapter in self.adapters)
        self.width = -(-self.rank // 8) * 8
        self.probability = self.adapters[0].dropout if self.adapters else 0.0
        self.seed, self.stream = seed, stream
        self.multiplier = multiplier
        self.bias = self._stacked_bias()

    def _stacked_bias(self) -> torch.Tensor | None:
        """The layers' biases times the multiplier, (out,); None if none has one."""
        if all(part.bias is None for part in self.parts):
            return None
        none = [torch.zeros(size, device=self.device) for size in self.sizes]
        biases = [
            zeros if part.bias is None else part.bias.float() for part, zeros in zip(self.parts, none, strict=True)
        ]
        return (torch.cat(biases) * self.multiplier).to(self.dtype)

    @property
    def scaling(self) -> float:
        """What the adapters' B A is multiplied by."""
        return self.adapters[0].scaling * self.multiplier

    def room_for_input(self, tokens: int) -> torch.Tensor:
        """An uninitialized x with room for z: (tokens, in + width)."""
        return aligned_rows(tokens, self.inputs + self.width, self.dtype, self.device)

    def matrix(self) -> torch.Tensor:
        """M, dense: (out + width, in + width). Its lower right corner, (width, width), is uninitialized and unused."""
        m = aligned_rows(self.outputs + self.width, self.inputs + self.width, self.dtype, self.device)
        for part, rows in zip(self.parts, m[: self.outputs].split(self.sizes), strict=True):
            write_dense(part.weight, rows[:, : self.inputs])
        if self.multiplier != 1.0:
            m[: self.outputs, : self.inputs].mul_(self.multiplier)
        if self.border:
            adapted = [part.adapter is not None for part in self.parts]
            adapter_kernels().border(self.border.A, self.border.B, m, self.scaling, self.sizes, adapted)
        return m

    def project(self, m: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """z = x Aᵀ: (T, width), written behind x if there is room."""
        if not self.rank:
            return x[:, :0]
        room = x[:, self.inputs :] if x.shape[1] > self.inputs else None
        if self.probability:
            return self._project_dropped(m, x[:, : self.inputs], room)
        a = m[self.outputs :, : self.inputs].t()
        return x @ a if room is None else torch.mm(x[:, : self.inputs], a, out=room)

    def _project_dropped(self, m: torch.Tensor, x: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        """`project` with dropout."""
        z = aligned_rows(len(x), self.width, self.dtype, self.device) if z is None else z
        z[:, self.rank :] = 0
        for i, (columns, a) in enumerate(
            zip(self._by_adapter(z.t()), self._by_adapter(m[self.outputs :]), strict=True)
        ):
            torch.mm(self._dropped(x, i), a[:, : self.inputs].t(), out=columns.t())
        return z

    def _dropped(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """What the i-th adapter reads, (T, in)."""
        dropped = torch.empty(x.shape, dtype=self.dtype, device=self.device)
        adapter_kernels().dropout(x, dropped, self.probability, self.seed, self.stream + i)
        return dropped

    def _by_adapter(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cut the first `rank` rows into those of each adapter."""
        return rows[: self.rank].split(self.adapters[0].rank)

    def output(self, m: torch.Tensor, x: torch.Tensor, z: torch.Tensor, room: bool = False) -> torch.Tensor:
        """y: (T, out). With `room` (T, out + width), since its gradient, which will overwrite it, needs room for dz."""
        columns = self.outputs + (self.width if room else 0)
        with_room = aligned_rows(len(x), columns, self.dtype, self.device)
        y, (left, right) = with_room[:, : self.outputs], m[: self.outputs].split([self.inputs, self.width], dim=1)
        if x.shape[1] > self.inputs:
            self._product(x, m[: self.outputs].t(), y)
        elif self.rank:
            self._product(z, right.t(), y)  # first, since the large product adds to it before rounding
            y.addmm_(x, left.t())
        else:
            self._product(x, left.t(), y)
        return with_room

    def _product(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        """out = a b + bias."""
        if self.bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(self.bias, a, b, out=out)

    def backward(self, m: torch.Tensor, x: torch.Tensor, z: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        """Compute the adapters' gradients; return [dy dz], (T, out + width), for `input_gradient`."""
        n, border = self.outputs, self.border
        if border is None:
            return dy[:, :n]
        dz = torch.mm(dy[:, :n], m[:n, self.inputs :], out=dy[:, n : n + self.width])
        if self.probability:
            gradients = self._by_adapter(border.A_gradient)
            for i, (gradient, dz_of_one) in enumerate(zip(gradients, self._by_adapter(dz.t()), strict=True)):
                border.add_gradient(gradient, dz_of_one, self._dropped(x[:, : self.inputs], i))
        else:
            border.add_gradient(border.A_gradient, dz.t()[: self.rank], x[:, : self.inputs])
        columns = iter(z[:, : self.rank].split(self.adapters[0].rank, dim=1))
        rows = iter(border.B_gradient.split([len(adapter.B) for adapter in self.adapters]))
        for part, dy_of_part in zip(self.parts, dy[:, :n].split(self.sizes, dim=1), strict=True):
            if part.adapter:
                border.add_gradient(next(rows), dy_of_part.t(), next(columns), self.scaling)
        return dy[:, : n + self.width]

    def input_gradient(self, m: torch.Tensor, dy_dz: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """dx = [dy dz] [W; A]: (T, in)."""
        if not self.probability:
            return torch.mm(dy_dz, m[:, : self.inputs], out=out)
        dx = torch.mm(dy_dz[:, : self.outputs], m[: self.outputs, : self.inputs], out=out)
        self._add_through_adapters(m, dy_dz, dx)
        return dx

    def add_input_gradient(self, m: torch.Tensor, dy_dz: torch.Tensor, gradient: torch.Tensor) -> None:
        """gradient += [dy dz] [W; A]. gradient: (T, in)."""
        if not self.probability:
            gradient.addmm_(dy_dz, m[:, : self.inputs])
        else:
            gradient.addmm_(dy_dz[:, : self.outputs], m[: self.outputs, : self.inputs])
            self._add_through_adapters(m, dy_dz, gradient)

    def _add_through_adapters(self, m: torch.Tensor, dy_dz: torch.Tensor, dx: torch.Tensor) -> None:
        """dx += the sum over the adapters of m ∘ (dz A), with dropout."""
        pieces = zip(self._by_adapter(dy_dz[:, self.outputs :].t()), self._by_adapter(m[self.outputs :]), strict=True)
        for i, (dz, a) in enumerate(pieces):
            adapter_kernels().dropout(
                dz.t() @ a[:, : self.inputs], dx, self.probability, self.seed, self.stream + i, add=True
            )


def aligned_rows(rows: int, columns: int, dtype: torch.dtype, device) -> torch.Tensor:
    """An uninitialized matrix whose rows begin at multiples of ROW_UNIT elements."""
    return torch.empty(rows, -(-columns // ROW_UNIT) * ROW_UNIT, dtype=dtype, device=device)[:, :columns]


def write_dense(weight: torch.Tensor | QuantizedTensor, out: torch.Tensor) -> None:
    """Write a weight's dense values to `out`, a matrix of the same shape that may be part of a wider one."""
    if not isinstance(weight, QuantizedTensor):
        out.copy_(weight)
    elif out.is_cuda:
        from qlora_lab.quantization import kernels

        kernels.dequantize(weight, out=out)
    else:
        out.copy_(weight.dequantize())
