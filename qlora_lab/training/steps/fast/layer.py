"""A decoder layer's forward and backward pass, line by line, as its description says.

With the shapes of LLaMA-7B:

    x ──────────────┬─────────────(+)── x2 ─────────────┬──────────────(+)── x of the next layer     (T, 4096)
    └ norm ─ qkv ─ rotary, attention ─ o ┘  └ norm ─ gate, up ─ SwiGLU ─ down ┘
             (T, 12288)       (T, 4096)          (T, 22016)   (T, 11008)

The kernel of the following norm computes each sum (+). What other families have besides, or instead:

    norms of q and k        before the rotation; attention then reads copies, and qkv stays for the backward pass
    norms behind o, down    before the sums; their inputs are kept for the backward pass
    no norm before qkv, gate and up    they read x itself
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora_lab.training.steps.fast.adapters import Border
from qlora_lab.training.steps.fast.attention import Samples, attend, attend_backward
from qlora_lab.training.steps.fast.description import LayerDescription, Norm
from qlora_lab.training.steps.fast.limits import head_kernels, kernels
from qlora_lab.training.steps.fast.linear import BorderedLinear, aligned_rows

Angles = tuple[torch.Tensor, torch.Tensor]  # cosine and sine of each token's rotary angles, (T, head_dim) each


@dataclass(frozen=True, eq=False)
class Row:
    """What all layers need to know of a row of tokens. angles: by kind of layer, see `Attention.angles`."""

    samples: Samples
    angles: dict[str, Angles]


@dataclass(eq=False)
class Activations:
    """What a layer's backward pass needs. It deletes what it has used. All but x can be computed again from x."""

    x: torch.Tensor  # (T, H), the layer's input
    normed: torch.Tensor  # (T, H + width); x itself if there is no norm
    normed_z: torch.Tensor  # (T, width), most often the end of `normed`
    qkv: torch.Tensor  # (T, q + k + v + width), with rotary positions if q and k have no norms
    qk: torch.Tensor | None  # (T, q + k): normed and rotated, if they have
    attended: torch.Tensor  # (T, q)
    attention: tuple  # what `attend_backward` needs besides
    attended_z: torch.Tensor  # (T, width)
    mixed: torch.Tensor | None  # (T, H): what the norm behind o has read
    x2: torch.Tensor  # (T, H)
    normed2: torch.Tensor  # (T, H + width); x2 itself if there is no norm
    normed2_z: torch.Tensor  # (T, width)
    gate_up: torch.Tensor  # (T, 2 I + width)
    made: torch.Tensor | None = None  # (T, H): what the norm behind down has read; computed again if not kept


class Layer:
    """A decoder layer.

    Args:
        description: what it is made of.
        borders: of its four groups of linear layers.
        dtype: of the activations and of dense matrices.
        seed: int64, (1,), from which dropouts are drawn. index: the layer's number: others have other dropouts.
    """

    def __init__(
        self,
        description: LayerDescription,
        borders: list[Border | None],
        dtype: torch.dtype,
        seed: torch.Tensor,
        index: int,
    ):
        self.description, self.dtype = description, dtype
        factors = (1.0, description.multiplier, 1.0, description.multiplier)
        if description.after_attention or description.after_mlp:
            assert description.multiplier == 1.0  # a norm would take it out again
        pieces = zip(description.groups, borders, factors, strict=True)
        linears = [
            BorderedLinear(group, border, dtype, factor, seed, stream=16 * index + 4 * i)  # of 3 adapters at most
            for i, (group, border, factor) in enumerate(pieces)
        ]
        self.qkv, self.o, self.gate_up, self.down = linears
        kind = description.attention
        self.sizes = (kind.heads * kind.head_dim, kind.kv_heads * kind.head_dim, kind.kv_heads * kind.head_dim)
        self.hidden, self.intermediate = self.qkv.inputs, self.down.inputs
        self.gelu = description.activation == "gelu_tanh"

    def forward(self, residual, delta, row: Row) -> Activations:
        """From the layer's input, residual + delta, to the gate and up projections. One of the two may be None."""
        d = self.description
        x, normed = self._entering(residual, delta, d.before_attention, self.qkv)
        matrix = self.qkv.matrix()
        normed_z = self.qkv.project(matrix, normed)
        qkv = self.qkv.output(matrix, normed, normed_z, room=True)
        del matrix, residual, delta
        qk = self._positioned(qkv, row)
        out, attention = attend(*self._read_by_attention(qkv, qk), row.samples, d.attention)
        attended = out.flatten(1)
        matrix = self.o.matrix()
        attended_z = self.o.project(matrix, attended)
        delta = self.o.output(matrix, attended, attended_z)
        del matrix
        mixed, delta = self._normed_behind(d.after_attention, delta)
        x2, normed2 = self._entering(x, delta, d.before_mlp, self.gate_up)
        del delta
        matrix = self.gate_up.matrix()
        normed2_z = self.gate_up.project(matrix, normed2)
        gate_up = self.gate_up.output(matrix, normed2, normed2_z, room=True)
        return Activations(
            x, normed, normed_z, qkv, qk, attended, attention, attended_z, mixed, x2, normed2, normed2_z, gate_up
        )

    def finish(self, a: Activations) -> torch.Tensor:
        """What the layer adds to x2, (T, H)."""
        product, matrix = self._product(a), self.down.matrix()
        made = self.down.output(matrix, product, self.down.project(matrix, product))
        del product, matrix
        a.made, delta = self._normed_behind(self.description.after_mlp, made)
        return delta

    def backward(self, a: Activations, gradient, row: Row, lowest: bool) -> None:
        """Turn the gradient at the layer's output into that at its input, in place. gradient: (T, H + width).

        lowest: below this layer nothing is trained, and the gradient is left as it is.
        """
        d, down, gate_up, o, qkv = self.description, self.down, self.gate_up, self.o, self.qkv
        product, matrix = self._product(a), down.matrix()
        z = down.project(matrix, product)
        if d.after_mlp and a.made is None:
            a.made = down.output(matrix, product, z)
        dy = self._before_norm_behind(d.after_mlp, a.made, gradient, down)
        dy_dz = down.backward(matrix, product, z, dy)
        d_product = down.input_gradient(matrix, dy_dz, out=product[:, : down.inputs])  # overwrites the product
        kernels().swiglu_backward(a.gate_up, d_product, self.intermediate, self.gelu)  # in place of gate and up
        del product, d_product, z, matrix, dy, a.made

        matrix = gate_up.matrix()
        dy_dz = gate_up.backward(matrix, a.normed2, a.normed2_z, a.gate_up)
        self._leaving(d.before_mlp, a.x2, gate_up, matrix, dy_dz, gradient)
        del a.normed2, a.normed2_z, a.gate_up, a.x2, matrix, dy_dz

        matrix = o.matrix()
        dy = self._before_norm_behind(d.after_attention, a.mixed, gradient, o)
        d_attended = o.input_gradient(matrix, o.backward(matrix, a.attended, a.attended_z, dy))
        del matrix, dy, a.mixed
        self._attention_backward(a, d_attended, row)
        del a.attended, d_attended, a.qk

        matrix = qkv.matrix()
        dy_dz = qkv.backward(matrix, a.normed, a.normed_z, a.qkv)
        if not lowest:
            self._leaving(d.before_attention, a.x, qkv, matrix, dy_dz, gradient)

    def _attention_backward(self, a: Activations, d_attended, row: Row) -> None:
        """Overwrite q, k and v in `a.qkv` with their gradients."""
        kind = self.description.attention
        read = self._read_by_attention(a.qkv, a.qk)
        out = a.attended.unflatten(1, read[0].shape[1:])
        gradients = attend_backward(d_attended.view(read[0].shape), *read, out, a.attention, row.samples, kind)
        angles = None if kind.angles is None else row.angles[kind.angles]
        q_k_v = self._q_k_v(a.qkv)
        for i, (gradient, x) in enumerate(zip(gradients, q_k_v, strict=True)):
            if i < 2 and kind.head_norms:
                norm = kind.head_norms[i]
                head_kernels().head_norm_backward(
                    gradient, x, norm.weight, norm.epsilon, x.shape[1], kind.head_dim, angles
                )
            else:
                cosine, sine = angles or (gradient[:, 0], gradient[:, 0])  # of the right shape, and not read
                sign = -1 if i < 2 and angles else 0
                head_kernels().rotate(gradient, x, cosine, sine, x.shape[1], sign)

    def _positioned(self, qkv, row: Row) -> torch.Tensor | None:
        """Rotate q and k in place; or, if they have norms, return them normed and rotated, (T, q + k)."""
        kind = self.description.attention
        angles = None if kind.angles is None else row.angles[kind.angles]
        if kind.head_norms is None:
            if angles:
                head_kernels().rotate(qkv, qkv, *angles, kind.heads + kind.kv_heads)
            return None
        qk = aligned_rows(len(qkv), sum(self.sizes[:2]), self.dtype, qkv.device)
        for norm, x, y in zip(kind.head_norms, self._q_k_v(qkv), qk.split(self.sizes[:2], dim=1), strict=False):
            head_kernels().head_norm(x, y, norm.weight, norm.epsilon, x.shape[1], kind.head_dim, angles)
        return qk

    def _read_by_attention(self, qkv, qk) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v as attention reads them; see `_q_k_v`."""
        q, k, v = self._q_k_v(qkv)
        if qk is not None:
            q, k = (part.unflatten(1, x.shape[1:]) for part, x in zip(qk.split(self.sizes[:2], 1), (q, k), strict=True))
        return q, k, v

    def _q_k_v(self, qkv) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v as views of qkv: (T, heads, head_dim), and twice (T, kv_heads, head_dim)."""
        head_dim = self.description.attention.head_dim
        q, k, v = qkv[:, : sum(self.sizes)].split(self.sizes, dim=1)
        return q.unflatten(1, (-1, head_dim)), k.unflatten(1, (-1, head_dim)), v.unflatten(1, (-1, head_dim))

    def _product(self, a: Activations) -> torch.Tensor:
        """What `down` reads: activation(gate) * up, (T, I + width)."""
        product = self.down.room_for_input(len(a.x))
        kernels().swiglu(a.gate_up, product, self.intermediate, self.gelu)
        return product

    def _entering(self, residual, delta, norm: Norm | None, linear: BorderedLinear):
        """residual + delta, (T, H), and its norm with room for the linear layer's z, or again itself without a norm."""
        if residual is None:
            residual, delta = delta, None
        if norm is None:
            total = residual if delta is None else residual + delta
            return total, total
        out = linear.room_for_input(len(residual))
        return kernels().rms_norm(residual, delta, norm.weight, norm.epsilon, out), out

    def _leaving(self, norm: Norm | None, x, linear: BorderedLinear, matrix, dy_dz, gradient) -> None:
        """Add to `gradient` what comes back through the linear layer and the norm before it."""
        if norm is None:
            linear.add_input_gradient(matrix, dy_dz, gradient[:, : self.hidden])
        else:
            d_normed = linear.input_gradient(matrix, dy_dz)
            kernels().rms_norm_backward(x, norm.weight, norm.epsilon, d_normed, gradient)

    def _normed_behind(self, norm: Norm | None, made) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What is to be kept for the backward pass, and what is added to the residual stream."""
        if norm is None:
            return None, made
        delta = torch.empty(made.shape, dtype=self.dtype, device=made.device)
        kernels().rms_norm(made, None, norm.weight, norm.epsilon, delta)
        return made, delta

    def _before_norm_behind(self, norm: Norm | None, made, gradient, linear: BorderedLinear) -> torch.Tensor:
        """The gradient before the norm behind a linear layer, with room for its dz: (T, H + width or more)."""
        if norm is None:
            return gradient
        dy = aligned_rows(len(made), self.hidden + linear.width, self.dtype, made.device)
        kernels().rms_norm_backward(made, norm.weight, norm.epsilon, gradient, dy, add=False)
        return dy
