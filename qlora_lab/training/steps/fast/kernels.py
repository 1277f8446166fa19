# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# Triton's stubs do not describe launches, `kernel[grid](...)`: num_warps and constexpr arguments look wrong to them.
"""Triton kernels of the fast step, for what lies between the matrix products.

A GPU should spend a training step on matrix products. Everything else (norms, rotary positions, SwiGLU, the loss,
AdamW) is a few operations per number, so its time is that of reading and writing memory. PyTorch's operators write
each intermediate result to memory and read it back; one kernel for the entire formula moves each number once. See
`quantization/kernels.py` for how a kernel is written.

    rms_norm, rms_norm_backward          with the residual connection's sum before it, or its gradient's after it
    swiglu, swiglu_backward              silu(gate) * up, or gelu(gate) * up
    cross_entropy                        the loss of each row, and the logits' gradient in the logits' place
    adamw                                clipping and update of all parameters at once

(`head_kernels.py` has those for heads of attention, `adapter_kernels.py` those for adapters.)

All arithmetic is float32, whatever the tensors' dtype; sums are taken in a fixed order, so a step always gives the same
bits. A matrix's rows may be further apart than they are long (`row stride`): see `linear.BorderedLinear`.
T is the number of tokens, H the hidden size, I the MLP's intermediate size.
"""

import math

import torch
import triton
import triton.language as tl

from qlora_lab.training.steps.fast.rows import TILE, begin, warps

# -------------------------------------------------------------------------------------------------------------- RMSNorm


@triton.jit
def rms_norm_kernel(
    residual,  # [T, H] of row stride RESIDUAL_STRIDE
    delta,  # [T, H] of row stride DELTA_STRIDE; None if there is nothing to add
    weight,  # [H]
    total,  # [T, H]: residual + delta, written if there is a delta
    out,  # [T, H] of row stride out_stride
    out_stride,
    epsilon,
    RESIDUAL_STRIDE: tl.constexpr,
    DELTA_STRIDE: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two, at least H
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    there = column < H
    x = tl.load(residual + row * RESIDUAL_STRIDE + column, mask=there, other=0).to(tl.float32)
    if delta is not None:
        x += tl.load(delta + row * DELTA_STRIDE + column, mask=there, other=0).to(tl.float32)
        x = x.to(total.dtype.element_ty)
        tl.store(total + row * H + column, x, mask=there)
        x = x.to(tl.float32)  # rounded, as the next kernel will read it
    scale = 1 / tl.sqrt(tl.sum(x * x, 0) / H + epsilon)
    y = x * scale * tl.load(weight + column, mask=there, other=0).to(tl.float32)
    tl.store(out + begin(row, out_stride) + column, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def rms_norm_backward_kernel(
    x,  # [T, H] of row stride X_STRIDE: what was normalized
    weight,  # [H]
    dy,  # [T, H] of row stride DY_STRIDE
    dx,  # [T, H] of row stride dx_stride; the norm's gradient is added to it, or written if not ADD
    dx_stride,
    epsilon,
    X_STRIDE: tl.constexpr,
    DY_STRIDE: tl.constexpr,
    ADD: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    there = column < H
    value = tl.load(x + row * X_STRIDE + column, mask=there, other=0).to(tl.float32)
    gradient = tl.load(dy + row * DY_STRIDE + column, mask=there, other=0).to(tl.float32)
    gradient *= tl.load(weight + column, mask=there, other=0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / H + epsilon)
    along = tl.sum(gradient * value, 0) * scale * scale / H  # the component along x, which the norm divides out
    target = dx + begin(row, dx_stride) + column
    before = tl.load(target, mask=there, other=0).to(tl.float32) if ADD else 0.0
    after = before + (gradient - value * along) * scale
    tl.store(target, after.to(dx.dtype.element_ty), mask=there)


def rms_norm(residual, delta, weight, epsilon: float, out) -> torch.Tensor:
    """Write RMSNorm(residual + delta) to `out`; return the sum. If delta is None, that is `residual` itself.

    residual, delta, out: (T, H), any of which may be part of something wider. weight: (H,).
    """
    tokens, hidden = residual.shape
    total = residual if delta is None else torch.empty_like(residual)
    width = triton.next_power_of_2(hidden)
    delta_stride = hidden if delta is None else delta.stride(0)
    rms_norm_kernel[(tokens,)](
        residual, delta, weight, total, out, out.stride(0), epsilon, residual.stride(0), delta_stride,
        hidden, width,
        num_warps=warps(width),
    )  # fmt: skip
    return total


def rms_norm_backward(x, weight, epsilon: float, dy, dx, add: bool = True) -> None:
    """Add to `dx` the gradient of sum(dy * RMSNorm(x)) with respect to x, or write it there.

    x, dy, dx: (T, H), or part of something wider.
    """
    tokens, hidden = x.shape
    width = triton.next_power_of_2(hidden)
    rms_norm_backward_kernel[(tokens,)](
        x, weight, dy, dx, dx.stride(0), epsilon, x.stride(0), dy.stride(0), add, hidden, width,
        num_warps=warps(width),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- SwiGLU


@triton.jit
def inner(gate, GELU: tl.constexpr):
    """The sigmoid's argument. SiLU is x sigmoid(x), tanh's GELU x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x³))."""
    if GELU:
        return 1.5957691216057308 * gate * (1 + 0.044715 * gate * gate)
    else:
        return gate


@triton.jit
def swiglu_kernel(gate_up, out, gate_up_stride, out_stride, GELU: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = column < SIZE
    gate = tl.load(gate_up + begin(row, gate_up_stride) + column, mask=there, other=0).to(tl.float32)
    up = tl.load(gate_up + begin(row, gate_up_stride) + SIZE + column, mask=there, other=0).to(tl.float32)
    y = gate * tl.sigmoid(inner(gate, GELU)) * up
    tl.store(out + begin(row, out_stride) + column, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def swiglu_backward_kernel(
    gate_up, dy, gate_up_stride, dy_stride, GELU: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = column < SIZE
    gate_place = gate_up + begin(row, gate_up_stride) + column
    gate = tl.load(gate_place, mask=there, other=0).to(tl.float32)
    up = tl.load(gate_place + SIZE, mask=there, other=0).to(tl.float32)
    gradient = tl.load(dy + begin(row, dy_stride) + column, mask=there, other=0).to(tl.float32)
    share = tl.sigmoid(inner(gate, GELU))
    if GELU:
        steepness = 1.5957691216057308 * (1 + 3 * 0.044715 * gate * gate)
        d_gate = gradient * up * share * (1 + gate * steepness * (1 - share))
    else:
        d_gate = gradient * up * share * (1 + gate * (1 - share))
    tl.store(gate_place, d_gate.to(gate_up.dtype.element_ty), mask=there)
    tl.store(gate_place + SIZE, (gradient * gate * share).to(gate_up.dtype.element_ty), mask=there)


def swiglu(gate_up, out, size: int, gelu: bool = False) -> None:
    """out = silu(gate) * up, or gelu(gate) * up.

    gate_up: (T, 2 I or wider), gate first. out: (T, I or wider). size: I.
    """
    grid = (len(gate_up), triton.cdiv(size, TILE))
    swiglu_kernel[grid](gate_up, out, gate_up.stride(0), out.stride(0), gelu, size, TILE, num_warps=4)


def swiglu_backward(gate_up, dy, size: int, gelu: bool = False) -> None:
    """Overwrite gate and up with their gradients. dy: (T, I), the gradient of `swiglu`'s output."""
    grid = (len(gate_up), triton.cdiv(size, TILE))
    swiglu_backward_kernel[grid](gate_up, dy, gate_up.stride(0), dy.stride(0), gelu, size, TILE, num_warps=4)


# ----------------------------------------------------------------------------------------------------------------- loss


@triton.jit
def capped(x, CAP: tl.constexpr):
    """CAP * tanh(x / CAP)."""
    return CAP * (2 * tl.sigmoid(2 * x / CAP) - 1)


@triton.jit
def cross_entropy_kernel(
    logits,  # [rows, V]: read, and overwritten by their gradient
    targets,  # int64, [rows]; negative: no target
    losses,  # float32, [rows]
    scale,  # float32, [1]: factor of losses and gradients
    V,
    CAP: tl.constexpr,  # of the logits, or None
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    factor = tl.where(target >= 0, tl.load(scale), 0.0)
    logits += row * V
    greatest = tl.full([TILE], float("-inf"), tl.float32)  # of each lane, and the sum of exp(x - greatest)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, V, TILE):
        column = start + tl.arange(0, TILE)
        x = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
        if CAP is not None:
            x = tl.where(column < V, capped(x, CAP), float("-inf"))
        higher = tl.maximum(greatest, x)
        total = total * tl.exp(greatest - tl.maximum(higher, -1e38)) + tl.exp(x - tl.maximum(higher, -1e38))
        greatest = higher
    top = tl.max(greatest, 0)
    log_total = tl.log(tl.sum(total * tl.exp(greatest - top), 0)) + top
    of_target = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
    if CAP is not None:
        of_target = capped(of_target, CAP)
    tl.store(losses + row, tl.where(target >= 0, (log_total - of_target) * factor, 0.0))
    tl.debug_barrier()  # all have read the target's logit before one overwrites it
    for start in range(0, V, TILE):
        column = start + tl.arange(0, TILE)
        x = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
        if CAP is not None:
            x = capped(x, CAP)
        gradient = (tl.exp(x - log_total) - tl.where(column == target, 1.0, 0.0)) * factor
        if CAP is not None:
            gradient *= 1 - x / CAP * (x / CAP)
        gradient = tl.where(factor == 0, 0.0, gradient)  # even if the logits of a row without target are not finite
        tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < V)


def cross_entropy(logits, targets, scale, cap: float | None = None) -> torch.Tensor:
    """Return each row's loss times `scale`, float32, (rows,), and overwrite the logits with the gradient of their sum.

    logits: (rows, V). targets: int64, (rows,); a row with a negative one has a loss and gradient of 0.
    scale: float32, (1,). cap: c, for logits of c * tanh(logit / c).
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    tile = min(4096, triton.next_power_of_2(logits.shape[1]))
    cross_entropy_kernel[(len(logits),)](
        logits, targets, losses, scale, logits.shape[1], cap, tile, num_warps=warps(tile)
    )
    return losses


# ---------------------------------------------------------------------------------------------------------------- AdamW


@triton.jit
def adamw_kernel(
    parameter,  # float32, [n]: updated
    gradient,  # [n]
    first,  # float32, [n]: running mean of the gradient, updated
    second,  # float32, [n]: of its square, updated
    norm,  # float32, [1]: of all gradients, times their factor
    factor,  # of the gradients
    largest_norm,
    rate,
    decay,
    correction1,  # 1 - beta1 ** step
    correction2,  # sqrt(1 - beta2 ** step)
    n,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPSILON: tl.constexpr,
    TILE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    size = tl.load(norm)
    there = i < tl.where(size < float("inf"), n, 0)  # changes nothing if the norm is NaN or infinite
    clip = tl.minimum(1.0, largest_norm / (size + 1e-6))  # as in torch.nn.utils.clip_grad_norm_
    g = tl.load(gradient + i, mask=there, other=0).to(tl.float32) * (clip * factor)
    m = tl.load(first + i, mask=there, other=0)
    v = tl.load(second + i, mask=there, other=0)
    p = tl.load(parameter + i, mask=there, other=0)
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    p *= 1 - rate * decay
    p -= rate / correction1 * m / (tl.sqrt(v) / correction2 + EPSILON)
    tl.store(first + i, m, mask=there)
    tl.store(second + i, v, mask=there)
    tl.store(parameter + i, p, mask=there)


def adamw(parameter, gradient, first, second, norm, step: int, rate: float, decay: float, largest_norm: float,
          betas: tuple[float, float], epsilon: float, factor: float = 1.0) -> None:  # fmt: skip
    """Take step number `step` (from 1) of AdamW on flat tensors, with gradients clipped to `largest_norm`.

    parameter, first, second: float32, (n,), updated. gradient: (n,). norm: the gradients', float32, one element; if it
    is not finite, nothing changes. rate: the learning rate. decay: the weight decay. largest_norm: infinity for no
    clipping. factor: what `gradient` is to be multiplied by; `norm` has been already.
    """
    corrections = (1 - betas[0] ** step, math.sqrt(1 - betas[1] ** step))
    n = parameter.numel()
    adamw_kernel[(triton.cdiv(n, TILE),)](
        parameter, gradient, first, second, norm, factor, largest_norm, rate, decay, *corrections, n, *betas, epsilon,
        TILE, num_warps=4,
    )  # fmt: skip
