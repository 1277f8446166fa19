# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# Triton's stubs do not describe launches, `kernel[grid](...)`: num_warps and constexpr arguments look wrong to them.
"""Triton kernels of the fast step for the heads of q, k and v: positions and norms. See `kernels.py`.

rotate                               rotary position embedding, forward and (the other way round) backward
head_norm, head_norm_backward        a norm of q or k, and the rotation after it
"""

import triton
import triton.language as tl

from qlora_lab.training.steps.fast.rows import begin, warps


@triton.jit
def rotate_kernel(
    source,  # [T, HEADS, 2 * HALF] of row stride source_stride
    target,  # likewise, of row stride target_stride; may be the source
    cosine,  # [T, 2 * HALF]; both halves of a row are equal
    sine,
    source_stride,
    target_stride,
    HEADS: tl.constexpr,
    HEADS_WIDTH: tl.constexpr,  # powers of two, at least HEADS and HALF
    HALF: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    SIGN: tl.constexpr,  # 1 rotates forward, -1 back, 0 copies
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_WIDTH)[:, None]
    pair = tl.arange(0, HALF_WIDTH)[None, :]
    there = (head < HEADS) & (pair < HALF)
    place = head * (2 * HALF) + pair
    a = tl.load(source + begin(row, source_stride) + place, mask=there, other=0).to(tl.float32)
    b = tl.load(source + begin(row, source_stride) + place + HALF, mask=there, other=0).to(tl.float32)
    if SIGN:
        c = tl.load(cosine + row * (2 * HALF) + pair, mask=pair < HALF, other=0).to(tl.float32)
        s = tl.load(sine + row * (2 * HALF) + pair, mask=pair < HALF, other=0).to(tl.float32) * SIGN
        a, b = a * c - b * s, b * c + a * s
    tl.store(target + begin(row, target_stride) + place, a.to(target.dtype.element_ty), mask=there)
    tl.store(target + begin(row, target_stride) + place + HALF, b.to(target.dtype.element_ty), mask=there)


def rotate(source, target, cosine, sine, heads: int, sign: int = 1) -> None:
    """Rotate each pair (x[i], x[i + head_dim / 2]) of each head by its token's angles.

    source, target: (T, heads * head_dim), or the first columns of a wider matrix. cosine, sine: (T, head_dim).
    sign: 1 rotates forward; -1 rotates back, as the gradient of a rotated vector needs; 0 copies.
    """
    half = cosine.shape[1] // 2
    heads_width, half_width = triton.next_power_of_2(heads), triton.next_power_of_2(half)
    rotate_kernel[(len(source),)](
        source, target, cosine, sine, source.stride(0), target.stride(0), heads, heads_width, half, half_width,
        sign, num_warps=warps(heads_width * half_width),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- norms of q and k


@triton.jit
def head_norm_kernel(
    source,  # [T, HEADS, 2 * HALF] of row stride source_stride
    target,  # likewise, of row stride target_stride
    weight,  # [2 * HALF]; [HEADS, 2 * HALF] if ACROSS
    cosine,  # [T, 2 * HALF], read if SIGN
    sine,
    source_stride,
    target_stride,
    epsilon,
    ACROSS: tl.constexpr,  # one norm of all heads together
    HEADS: tl.constexpr,
    HEADS_WIDTH: tl.constexpr,  # powers of two, at least HEADS and HALF
    HALF: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    SIGN: tl.constexpr,  # 1: rotate; 0: do not
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_WIDTH)[:, None]
    pair = tl.arange(0, HALF_WIDTH)[None, :]
    there = (head < HEADS) & (pair < HALF)
    place = head * (2 * HALF) + pair
    a = tl.load(source + begin(row, source_stride) + place, mask=there, other=0).to(tl.float32)
    b = tl.load(source + begin(row, source_stride) + place + HALF, mask=there, other=0).to(tl.float32)
    of_weight = place if ACROSS else pair
    squares = tl.sum(a * a + b * b, 1)[:, None]
    count: tl.constexpr = 2 * HALF * HEADS if ACROSS else 2 * HALF
    scale = 1 / tl.sqrt((tl.sum(squares, 0)[None, :] if ACROSS else squares) / count + epsilon)
    a *= scale * tl.load(weight + of_weight, mask=there, other=0).to(tl.float32)
    b *= scale * tl.load(weight + of_weight + HALF, mask=there, other=0).to(tl.float32)
    if SIGN:
        c = tl.load(cosine + row * (2 * HALF) + pair, mask=pair < HALF, other=0).to(tl.float32)
        s = tl.load(sine + row * (2 * HALF) + pair, mask=pair < HALF, other=0).to(tl.float32)
        a, b = a * c - b * s, b * c + a * s
    tl.store(target + begin(row, target_stride) + place, a.to(target.dtype.element_ty), mask=there)
    tl.store(target + begin(row, target_stride) + place + HALF, b.to(target.dtype.element_ty), mask=there)


@triton.jit
def head_norm_backward_kernel(
    gradient,  # [T, HEADS, 2 * HALF] of row stride gradient_stride
    x,  # likewise, of row stride x_stride: what was normed, overwritten by its gradient
    weight,
    cosine,
    sine,
    gradient_stride,
    x_stride,
    epsilon,
    ACROSS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    SIGN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_WIDTH)[:, None]
    pair = tl.arange(0, HALF_WIDTH)[None, :]
    there = (head < HEADS) & (pair < HALF)
    place = head * (2 * HALF) + pair
    da = tl.load(gradient + begin(row, gradient_stride) + place, mask=there, other=0).to(tl.float32)
    db = tl.load(gradient + begin(row, gradient_stride) + place + HALF, mask=there, other=0).to(tl.float32)
    if SIGN:
        c = tl.load(cosine + row * (2 * HALF) + pair, mask=pair < HALF, other=0).to(tl.float32)
        s = tl.load(sine + row * (2 * HALF) + pair, mask=pair < HALF, other=0).to(tl.float32)
        da, db = da * c + db * s, db * c - da * s
    a = tl.load(x + begin(row, x_stride) + place, mask=there, other=0).to(tl.float32)
    b = tl.load(x + begin(row, x_stride) + place + HALF, mask=there, other=0).to(tl.float32)
    of_weight = place if ACROSS else pair
    da *= tl.load(weight + of_weight, mask=there, other=0).to(tl.float32)
    db *= tl.load(weight + of_weight + HALF, mask=there, other=0).to(tl.float32)
    count: tl.constexpr = 2 * HALF * HEADS if ACROSS else 2 * HALF
    squares = tl.sum(a * a + b * b, 1)[:, None]
    products = tl.sum(da * a + db * b, 1)[:, None]
    if ACROSS:
        squares = tl.sum(squares, 0)[None, :]
        products = tl.sum(products, 0)[None, :]
    scale = 1 / tl.sqrt(squares / count + epsilon)
    along = products * scale * scale / count  # the component along x, which the norm divides out
    tl.store(x + begin(row, x_stride) + place, ((da - a * along) * scale).to(x.dtype.element_ty), mask=there)
    tl.store(x + begin(row, x_stride) + place + HALF, ((db - b * along) * scale).to(x.dtype.element_ty), mask=there)


def head_norm(source, target, weight, epsilon: float, heads: int, head_dim: int, angles=None) -> None:
    """target = RMSNorm(source), then rotated as in `rotate` if there are angles.

    source, target: (T, heads, head_dim), rows of which may be further apart. weight: (head_dim,): each head is normed
    by itself; (heads * head_dim,): all together. angles: cosine and sine, (T, head_dim) each.
    """
    _launch_head_norm(head_norm_kernel, source, target, weight, epsilon, heads, head_dim, angles)


def head_norm_backward(gradient, x, weight, epsilon: float, heads: int, head_dim: int, angles=None) -> None:
    """Overwrite x, the source of `head_norm`, with its gradient, given that of the target."""
    _launch_head_norm(head_norm_backward_kernel, gradient, x, weight, epsilon, heads, head_dim, angles)


def _launch_head_norm(kernel, first, second, weight, epsilon, heads: int, head_dim: int, angles) -> None:
    half = head_dim // 2
    heads_width, half_width = triton.next_power_of_2(heads), triton.next_power_of_2(half)
    cosine, sine = angles or (first, first)  # not read
    kernel[(len(first),)](
        first, second, weight, cosine, sine, first.stride(0), second.stride(0), epsilon, len(weight) > head_dim,
        heads, heads_width, half, half_width, int(angles is not None), num_warps=warps(heads_width * half_width),
    )  # fmt: skip
