"""A training step without gaps: forward, backward and update of a LLaMA with adapters, written out by hand.

`train.py` trains any model, through transformers, PEFT and autograd: thousands of small GPU kernels a step, each
launched by Python when it gets there. With few tokens a step the GPU waits for the next launch most of the time. This
module does the same step for one architecture (LLaMA and what is built like it), and keeps the GPU busy:

    one CUDA graph        all launches of forward and backward are recorded once and replayed in one call. What is
                          recorded has fixed shapes, so samples are put end to end in one row of tokens, whose length
                          is rounded up to one of a few sizes; attention is told where each sample begins
    larger products       q, k and v read the same input: they are one matrix product. So are gate and up. LoRA rides
                          along as a border of that matrix (see `BorderedLinear`)
    fused kernels         norm + residual, rotary, SwiGLU, loss, AdamW: each one kernel (see `step_kernels`)
    little kept           the backward pass is ours, so we choose what it finds: checkpointing recomputes each layer
                          but its last product, the last layer not at all; SwiGLU's output is never kept, it is as
                          quickly computed as read; logits exist for some rows at a time; layers' inputs may wait in
                          the host's memory

The numbers are those of `train.py` under bf16 autocast up to bf16's rounding: fp32 adapters, fp32 AdamW, bf16 products.
They are nearer to float32's than autocast's are. There, a layer's output is rounded to bf16 before LoRA's correction is
added; a correction below half a unit in the last of 8 bits is lost, time and again: so training begins, with a small B.
Here both are summed in fp32 first. (An untrained LLaMA-7B at a learning rate of 1e-4, loss of a sample when it comes a
second time: float32 10.83, this 10.85, autocast 11.13; the first time 11.1 to 11.3.)

A layer, with the shapes of LLaMA-7B:

    x ──────────────┬─────────────(+)── x2 ─────────────┬──────────────(+)── x of the next layer     (T, 4096)
    └ norm ─ qkv ─ rotary, attention ─ o ┘  └ norm ─ gate, up ─ SwiGLU ─ down ┘
             (T, 12288)       (T, 4096)          (T, 22016)   (T, 11008)

The sums (+) are taken by the norm that comes next. `forward` and `backward` below are this picture, line by line.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass, replace

import numpy
import torch
from torch import nn

from qlora_lab.errors import UserError
from qlora_lab.finetuning.data import IGNORED, TokenizedSample
from qlora_lab.quantization import QuantizedTensor

LOGITS_AT_A_TIME = 1 << 25  # elements: 64 MiB in bf16
MOST_GRAPHS = 64
ROW_UNIT = 64  # elements: 128 bytes. Elsewhere products are slower: 7B on an H100, rank 8, 59 ms a step, not 64
DENSE = (torch.float32, torch.bfloat16, torch.float16)


class NoFastStep(UserError):
    """The fast step cannot train this model here. Its text says why, and the plain loop takes over."""


# -------------------------------------------------------------------------------------------------------- linear layers


@dataclass(frozen=True)
class AdaptedLinear:
    """A frozen linear layer and its adapter, whoever made them.

    weight: (out, in), dense or in 4 bits. lora_A: (rank, in), lora_B: (out, rank), float32; or None and None.
    """

    weight: torch.Tensor | QuantizedTensor
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    scaling: float

    @property
    def rank(self) -> int:
        return 0 if self.lora_A is None else len(self.lora_A)


class BorderedLinear:
    """Linear layers that read the same input, and their adapters, as one matrix with a border.

        M = [ W   sB ]     W: (out, in), the layers' weights one below the other    s: alpha / rank
            [ A      ]     A: (rank, in), likewise    sB: (out, rank), with one block for each layer

        forward     z = x Aᵀ               y = [x z] [W sB]ᵀ        = x Wᵀ + s x Aᵀ Bᵀ
        backward    dz = dy sB             dx = [dy dz] [W; A]      = dy W + s dy B A
                    dA = dzᵀ x             dB = s dyᵀ z

    A correction added to y and dx afterwards would read and write both once more. 64 further columns beside 4096 are
    1.6 % more of a product. (q, k and v together have 192. All in all a layer of LLaMA-7B has 2.8 % more to multiply
    forward, 1.1 % backward.) M is dense, made when it is needed and let go: 4 bits are what stays.

    x and dy come as (T, in + rank) and (T, out + rank or wider), with room for z and dz at the end of each row. (x may
    also be (T, in), if who made it could leave no room: then z is apart, and a product of its own.)
    """

    def __init__(self, parts: list[AdaptedLinear], dtype: torch.dtype):
        self.parts, self.dtype, self.device = parts, dtype, parts[0].weight.device
        self.sizes = [part.weight.shape[0] for part in parts]
        self.inputs, self.outputs = parts[0].weight.shape[1], sum(self.sizes)
        self.adapted = [part for part in parts if part.rank]
        self.rank = sum(part.rank for part in self.adapted)
        if len({(part.rank, part.scaling) for part in self.adapted}) > 1:
            raise NoFastStep("layers that read the same input have adapters of several ranks or scalings")
        # all parts' A, (rank, in), and B, (rows, rank of one), and their gradients: set by `Adapters`
        self.lora_A = self.lora_B = self.A_gradient = self.B_gradient = None

    def room_for_input(self, tokens: int) -> torch.Tensor:
        return aligned_rows(tokens, self.inputs + self.rank, self.dtype, self.device)

    def matrix(self) -> torch.Tensor:
        """M, dense: (out + rank, in + rank). Its lower right corner means nothing."""
        m = aligned_rows(self.outputs + self.rank, self.inputs + self.rank, self.dtype, self.device)
        for part, rows in zip(self.parts, m[: self.outputs].split(self.sizes), strict=True):
            write_dense(part.weight, rows[:, : self.inputs])
        if self.rank:
            has_adapter = [part.rank > 0 for part in self.parts]
            kernels().border(self.lora_A, self.lora_B, m, self.adapted[0].scaling, self.sizes, has_adapter)
        return m

    def project(self, m: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """z = x Aᵀ: (T, rank); behind x, where there is room."""
        if not self.rank:
            return x[:, :0]
        a = m[self.outputs :, : self.inputs].t()
        if x.shape[1] == self.inputs:
            return x @ a
        return torch.mm(x[:, : self.inputs], a, out=x[:, self.inputs :])

    def output(self, m: torch.Tensor, x: torch.Tensor, z: torch.Tensor, room: bool = False) -> torch.Tensor:
        """y: (T, out); with room for its gradient's dz, which will take its place: (T, out + rank)."""
        whole = aligned_rows(len(x), self.outputs + self.rank * room, self.dtype, self.device)
        y, (left, right) = whole[:, : self.outputs], m[: self.outputs].split([self.inputs, self.rank], dim=1)
        if x.shape[1] > self.inputs:
            torch.mm(x, m[: self.outputs].t(), out=y)
        elif self.rank:
            torch.mm(z, right.t(), out=y)  # the small part first: the large product adds to it before it rounds
            y.addmm_(x, left.t())
        else:
            torch.mm(x, left.t(), out=y)
        return whole

    def backward(self, m: torch.Tensor, x: torch.Tensor, z: torch.Tensor, dy: torch.Tensor, adapters: Adapters):
        """Give the adapters their gradients, and return [dy dz], ready for dx = [dy dz] [W; A]."""
        n, row = self.outputs, 0
        if self.rank:
            torch.mm(dy[:, :n], m[:n, self.inputs :], out=dy[:, n : n + self.rank])
            adapters.add_gradient(self.A_gradient, dy[:, n : n + self.rank].t(), x[:, : self.inputs])
            columns = iter(z.split(self.adapted[0].rank, dim=1))
            rows = iter(self.B_gradient.split([part.weight.shape[0] for part in self.adapted]))
        for part, size in zip(self.parts, self.sizes, strict=True):
            if part.rank:
                adapters.add_gradient(next(rows), dy[:, row : row + size].t(), next(columns), part.scaling)
            row += size
        return dy[:, : n + self.rank]

    def input_gradient(self, m: torch.Tensor, dy_dz: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """dx: (T, in)."""
        return torch.mm(dy_dz, m[:, : self.inputs], out=out)


def aligned_rows(rows: int, columns: int, dtype: torch.dtype, device) -> torch.Tensor:
    """An empty matrix whose rows begin at multiples of ROW_UNIT elements."""
    return torch.empty(rows, -(-columns // ROW_UNIT) * ROW_UNIT, dtype=dtype, device=device)[:, :columns]


def write_dense(weight: torch.Tensor | QuantizedTensor, out: torch.Tensor) -> None:
    """Write the numbers that a weight stands for. out: a matrix of its shape, maybe part of a wider one."""
    if not isinstance(weight, QuantizedTensor):
        out.copy_(weight)
    elif out.is_cuda:
        from qlora_lab.quantization import kernels

        kernels.dequantize(weight, out=out)
    else:
        out.copy_(weight.dequantize())


def read_linear(module: nn.Module, name: str) -> AdaptedLinear:
    """What a layer of this package, of PEFT or of bitsandbytes holds. Raises NoFastStep for anything else."""
    from qlora_lab.finetuning.lora import LoraLinear
    from qlora_lab.finetuning.quantized_linear import frozen_weight

    lora_A = lora_B = None
    base, scaling, dropout = module, 1.0, 0.0
    if isinstance(module, LoraLinear):
        base, lora_A, lora_B = module.base, module.lora_A, module.lora_B
        scaling, dropout, merged = module.alpha / module.rank, module.dropout, module.merged
    elif hasattr(module, "base_layer"):  # PEFT
        if len(module.active_adapters) != 1 or module.use_dora.get(module.active_adapters[0]):
            raise NoFastStep(f"{name} has several adapters or DoRA")
        base, (key,), merged = module.base_layer, module.active_adapters, module.merged
        lora_A, lora_B, scaling = module.lora_A[key].weight, module.lora_B[key].weight, module.scaling[key]
        dropout = getattr(module.lora_dropout[key], "p", 0.0)
    if lora_A is not None:
        if dropout or merged:
            raise NoFastStep(f"{name} has {'a dropout' if dropout else 'its adapter merged'}")
        if len(lora_A) % 8:
            raise NoFastStep(f"{name} has an adapter of rank {len(lora_A)}: it must be a multiple of 8")
        if lora_A.dtype != torch.float32:
            raise NoFastStep(
                f"{name} has an adapter in {lora_A.dtype}: it must be float32 (what computes is a bf16 copy)"
            )
    if getattr(base, "bias", None) is not None:
        raise NoFastStep(f"{name} has a bias")
    weight = frozen_weight(base)
    dense = isinstance(weight, torch.Tensor) and weight.dtype in DENSE
    if not dense and not isinstance(weight, QuantizedTensor):
        raise NoFastStep(f"{name} is a {type(base).__name__} with a weight that is neither dense nor in 4 bits")
    return AdaptedLinear(weight, lora_A, lora_B, scaling)


# ------------------------------------------------------------------------------------------------- adapters and AdamW


class Adapters:
    """All adapters in one flat float32 tensor, and with them their gradients and AdamW's state: one kernel updates all.

    The model's own parameters, and the entries of `optimizer.state`, become views of these: whoever saves an adapter
    or a checkpoint finds what is usual there.
    """

    def __init__(self, linears: list[BorderedLinear], optimizer, dtype: torch.dtype, accumulating: bool):
        inner = getattr(optimizer, "optimizer", optimizer)  # without 🤗 Accelerate's wrapping
        self.optimizer = inner
        parameters = []
        for linear in linears:
            parameters += [part.lora_A for part in linear.adapted] + [part.lora_B for part in linear.adapted]
        trained = {id(p) for group in inner.param_groups for p in group["params"]}
        if trained != {id(p) for p in parameters}:
            raise NoFastStep("something besides the linear layers' adapters is trained")
        self.parameters = parameters
        device, count = parameters[0].device, sum(p.numel() for p in parameters)
        self.flat = torch.empty(count, device=device)
        names = ("exp_avg", "exp_avg_sq") if isinstance(inner, torch.optim.AdamW) else ("state1", "state2")
        if hasattr(inner, "get_state_buffer"):
            self.moments = [inner.get_state_buffer(self.flat, dtype=torch.float32) for _ in names]
        else:
            self.moments = [torch.zeros_like(self.flat) for _ in names]
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
        # a product's rounding is the gradient's, unless several are added up
        self.gradient = torch.zeros(count, dtype=torch.float32 if accumulating else dtype, device=device)
        gradients = {p: self.gradient[part].view_as(p) for p, part in slices.items()}
        if hasattr(inner, "page_mng"):
            inner.page_mng.paged_tensors[:] = self.moments  # lets go of what a checkpoint was read into
        for linear in linears:
            if linear.adapted:
                linear.lora_A = _joined([part.lora_A.data for part in linear.adapted])
                linear.lora_B = _joined([part.lora_B.data for part in linear.adapted])
                linear.A_gradient = _joined([gradients[part.lora_A] for part in linear.adapted])
                linear.B_gradient = _joined([gradients[part.lora_B] for part in linear.adapted])
        self.accumulating = accumulating

    def add_gradient(self, gradient: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> None:
        """gradient = scale * (a @ b), or added to it where a step has several micro-batches."""
        if self.accumulating:
            gradient.add_(a @ b, alpha=scale)
        else:
            torch.addmm(gradient, a, b, beta=0, alpha=scale, out=gradient)

    def update(self, learning_rate: float, max_grad_norm: float | None) -> torch.Tensor:
        """Clip, take a step of AdamW, return the gradients' norm before clipping. Not finite: nothing is changed."""
        group = self.optimizer.param_groups[0]
        self.steps += 1
        norm = torch.linalg.vector_norm(self.gradient, dtype=torch.float32)
        kernels().adamw(
            self.flat, self.gradient, *self.moments, norm, self.steps, learning_rate, group["weight_decay"],
            math.inf if max_grad_norm is None else max_grad_norm, group["betas"], group["eps"],
        )  # fmt: skip
        return norm

    def write_down_steps(self) -> None:
        """Tell the optimizer's state how many steps it has seen, for who saves it."""
        tensor = isinstance(self.optimizer, torch.optim.AdamW)
        step = torch.tensor(float(self.steps)) if tensor else self.steps
        for p in self.parameters:
            self.optimizer.state[p]["step"] = step


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    """Matrices that lie one after the other in memory, as one of all their rows."""
    rows = sum(len(piece) for piece in pieces)
    return pieces[0].as_strided((rows, pieces[0].shape[1]), pieces[0].stride())


# ---------------------------------------------------------------------------------------------------------- the samples


@dataclass(frozen=True)
class FlatBatch:
    """Samples end to end in one row of tokens, filled up with padding. All in one tensor: it is one copy to the GPU.

    numbers: int64, the five parts below one after the other. tokens, sequences, targeted: their sizes T, S and R.
    longest: tokens; no sample has more. What a captured graph depends on is all but `numbers`.
    """

    numbers: torch.Tensor
    tokens: int
    sequences: int
    targeted: int
    longest: int

    @property
    def kind(self) -> tuple[int, ...]:
        return (self.tokens, self.sequences, self.targeted, self.longest)

    def parts(self) -> tuple[torch.Tensor, ...]:
        """ids and positions, (T,); starts, (S + 1,): where each sample begins, and the end (the padding is a sample,
        too, further ones are empty); rows, (R,): tokens whose successor is a target; targets, (R,): that successor, or
        -100 in rows that only fill up."""
        return self.numbers.split([self.tokens, self.tokens, self.sequences + 1, self.targeted, self.targeted])


def flatten(samples: list[TokenizedSample], pad_token_id: int) -> FlatBatch:
    """Put samples end to end. No sample sees another, and no target is another sample's token."""
    lengths = [len(sample.ids) for sample in samples]
    ids = numpy.concatenate([sample.ids for sample in samples])
    padding = rounded_up(len(ids)) - len(ids)
    lengths += [padding] * bool(padding)
    sequences = power_of_two(len(lengths))
    starts = numpy.zeros(sequences + 1, dtype=numpy.int64)
    starts[1 : len(lengths) + 1] = numpy.cumsum(lengths)
    starts[len(lengths) + 1 :] = starts[len(lengths)]
    firsts = [max(sample.prompt_length, 1) for sample in samples]
    targeted = [
        numpy.arange(start + first, start + length)
        for start, first, length in zip(starts, firsts, lengths, strict=False)
    ]
    targeted = numpy.concatenate(targeted)
    empty = rounded_up(len(targeted)) - len(targeted)
    parts = [
        *(ids, numpy.full(padding, pad_token_id)),
        *(numpy.arange(length) for length in lengths),
        starts,
        *(targeted - 1, numpy.zeros(empty, dtype=numpy.int64)),
        *(ids[targeted], numpy.full(empty, IGNORED)),
    ]
    numbers = torch.from_numpy(numpy.concatenate(parts).astype(numpy.int64, copy=False))
    longest = max(64, power_of_two(max(lengths)))
    return FlatBatch(numbers, len(ids) + padding, sequences, len(targeted) + empty, longest)


def power_of_two(n: int) -> int:
    """The next one, n itself included."""
    return 1 << (n - 1).bit_length()


def rounded_up(n: int) -> int:
    """To a multiple of an eighth of the power of two below, 64 at least: eight sizes from one power to the next."""
    size = max(64, (1 << n.bit_length()) // 16)
    return max(1, -(-n // size)) * size


# ------------------------------------------------------------------------------------------------------------ attention


@dataclass(frozen=True)
class Samples:
    """Where each sample begins, and the end: int32, (S + 1,); and the number of tokens that none exceeds."""

    starts: torch.Tensor
    longest: int


def attend(q, k, v, samples: Samples) -> tuple[torch.Tensor, tuple]:
    """Causal attention within each sample. q: (T, heads, head_dim), k and v: (T, kv_heads, head_dim).

    Returns: out, of q's shape, and what `attend_backward` needs besides.
    """
    if not q.is_cuda:
        return _attend_sample_by_sample(q, k, v, samples), ()
    starts, longest = samples.starts, samples.longest
    out, logsumexp, *random, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False
    )
    return out, (logsumexp, *random)


def attend_backward(gradient, q, k, v, out, kept: tuple, samples: Samples) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k and v, in the same order of additions each time."""
    if not q.is_cuda:
        inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        with torch.enable_grad():
            return torch.autograd.grad(_attend_sample_by_sample(*inputs, samples), inputs, gradient)
    starts, longest = samples.starts, samples.longest
    logsumexp, *random = kept
    with repeatable():
        return torch.ops.aten._flash_attention_backward(
            gradient, q, k, v, out, logsumexp, starts, starts, longest, longest, 0.0, True, *random
        )


def _attend_sample_by_sample(q, k, v, samples: Samples) -> torch.Tensor:
    """The same with PyTorch's operators, for a CPU."""
    outs, starts = [], samples.starts.tolist()
    for start, end in zip(starts, starts[1:], strict=False):
        if end > start:
            one = [tensor[start:end].transpose(0, 1)[None] for tensor in (q, k, v)]  # (1, heads, tokens, head_dim)
            out = nn.functional.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@functools.lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all, since cuBLAS keeps 32 MiB for each stream that it has ever worked on."""
    return torch.cuda.Stream(device)


@functools.lru_cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """For what travels between GPU and host beside the computation."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def repeatable():
    """Ask PyTorch for algorithms that give the same bits each time: flash attention's backward pass adds atomically."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


# ---------------------------------------------------------------------------------------------------------- the host


class HostMemory:
    """Where layers' inputs wait for their backward pass, so that the GPU's memory need not hold them all.

    Copies run on a stream of their own, beside the computation: in the forward pass one layer's input leaves while the
    next layer is computed, in the backward pass the one below arrives meanwhile. It costs nothing as long as a
    layer's input, (T, H), travels in less time than the layer takes forward. (LLaMA-7B on an H100, at 53 GB/s: 1.3 ms
    beside 6, for 8192 tokens. T cancels out, so a narrow model may lose time.)

    Whatever is copied must live until its copy is done: memory that is let go of belongs to the next kernel of the
    computing stream, which does not wait for this one. In a captured graph the copies' stream forks off from the
    capture, and `arrived` for the lowest layer has joined it again.
    """

    def __init__(self, layers: int, hidden: int, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = (layers, hidden), dtype, device
        self.stream = copy_stream(device) if device.type == "cuda" else None
        self.buffers: dict[int, torch.Tensor] = {}  # by tokens: a captured graph writes where it wrote when captured
        self.leaving = self.arriving = None

    def begin(self, tokens: int) -> None:
        """Have room for so many tokens, in pages that cannot be moved: LLaMA-7B, 8192 tokens: 2.1 GB.

        Sizes are powers of two, so all buffers that were ever needed take twice the largest at most.
        """
        capacity = power_of_two(tokens)
        if capacity not in self.buffers:
            layers, hidden = self.shape
            pinned = self.stream is not None
            self.buffers[capacity] = torch.empty(layers, capacity, hidden, dtype=self.dtype, pin_memory=pinned)
        self.buffer = self.buffers[capacity][:, :tokens]

    def send(self, i: int, x: torch.Tensor) -> None:
        """Copy layer i's input to the host. The next call, or `fetch`, waits for it, and lets go of x."""
        if self.leaving is not None:
            self._wait()
        with self._beside():
            self.buffer[i].copy_(x, non_blocking=True)
        self.leaving = x

    def fetch(self, i: int) -> None:
        """Have layer i's input copied back; `arrived` returns it."""
        if self.leaving is not None:
            self._wait()
        self.leaving, self.arriving = None, torch.empty(self.buffer[i].shape, dtype=self.dtype, device=self.device)
        with self._beside():
            self.arriving.copy_(self.buffer[i], non_blocking=True)

    def arrived(self) -> torch.Tensor:
        self._wait()
        x, self.arriving = self.arriving, None
        return x

    def _wait(self) -> None:
        """What is launched from here on begins when the copies are done."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _beside(self):
        """On the other stream, when what has been launched so far is done."""
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)


# ------------------------------------------------------------------------------------------------------------- the step


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer's frozen norms, (H,), and its linear layers."""

    norm1: torch.Tensor
    qkv: BorderedLinear
    o: BorderedLinear
    norm2: torch.Tensor
    gate_up: BorderedLinear
    down: BorderedLinear

    @property
    def linears(self) -> list[BorderedLinear]:
        return [self.qkv, self.o, self.gate_up, self.down]


@dataclass(eq=False)
class Activations:
    """What a layer's backward pass needs. All but x can be computed again from x; None: not here."""

    x: torch.Tensor | None  # (T, H)
    normed: torch.Tensor | None = None  # (T, H + rank)
    qkv: torch.Tensor | None = None  # (T, q + k + v + rank), turned
    attended: torch.Tensor | None = None  # (T, q)
    attention: tuple = ()
    attended_z: torch.Tensor | None = None  # (T, rank)
    x2: torch.Tensor | None = None  # (T, H)
    normed2: torch.Tensor | None = None  # (T, H + rank)
    gate_up: torch.Tensor | None = None  # (T, 2 I + rank)
    product: torch.Tensor | None = None  # (T, I + rank)


class FastStep:
    """Training steps of one model.

    Args:
        model: a LLaMA of transformers, its linear layers dense or in 4 bits (ours or bitsandbytes'), with adapters of
            this package or PEFT's.
        optimizer: AdamW of torch, or bitsandbytes' with 32-bit states, of the adapters.
        accelerator: 🤗 Accelerate's; tells how many processes share a step.
        accumulation: micro-batches a step.
        gradient_checkpointing: keep only each layer's input and compute the rest again.
        activation_offloading: keep these inputs in the host's memory (see `HostMemory`).
        dtype: of the activations and of dense matrices.
        capture: record CUDA graphs. Without, Python launches each kernel, as usual.

    Raises:
        NoFastStep: a model, an adapter, an optimizer or a machine that this step was not written for.
    """

    def __init__(
        self,
        model,
        optimizer,
        accelerator,
        accumulation: int = 1,
        gradient_checkpointing: bool = False,
        activation_offloading: bool = False,
        pad_token_id: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        capture: bool = True,
    ):
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = causal_lm.config
        require_supported(causal_lm, optimizer)
        self.accelerator, self.pad_token_id = accelerator, pad_token_id
        self.dtype, self.checkpointing = dtype, gradient_checkpointing
        self.epsilon = config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        decoder = causal_lm.get_decoder()
        self.embeddings = causal_lm.get_input_embeddings().weight
        self.head = causal_lm.get_output_embeddings().weight.to(dtype)  # (V, H)
        self.norm = decoder.norm.weight
        self.rotary = decoder.rotary_emb
        self.layers = [self._read(layer, f"layers.{i}") for i, layer in enumerate(decoder.layers)]
        self.q = self.layers[0].o.inputs
        self.intermediate = self.layers[0].down.inputs
        linears = [linear for layer in self.layers for linear in layer.linears]
        self.adapters = Adapters(linears, optimizer, dtype, accumulating=accumulation > 1)
        device = self.embeddings.device
        self.loss = torch.zeros(1, device=device)
        self.share = torch.zeros(1, device=device)  # of one target in the loss
        self.host = None
        if activation_offloading and gradient_checkpointing:
            self.host = HostMemory(len(self.layers) - 1, config.hidden_size, dtype, device)
        self.graphs: dict[tuple, tuple] = {}
        self._flat: tuple | None = None
        self.capture = capture and device.type == "cuda"
        if self.capture:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), capture_stream(device)

    def _read(self, layer, name: str) -> Layer:
        def bordered(parent, *names):
            parts = [read_linear(getattr(parent, n), f"{name}.{n}") for n in names]
            return BorderedLinear(parts, self.dtype)

        attention, mlp = layer.self_attn, layer.mlp
        return Layer(
            layer.input_layernorm.weight,
            bordered(attention, "q_proj", "k_proj", "v_proj"),
            bordered(attention, "o_proj"),
            layer.post_attention_layernorm.weight,
            bordered(mlp, "gate_proj", "up_proj"),
            bordered(mlp, "down_proj"),
        )

    @torch.no_grad()
    def step(self, micro_batches, targets: int, learning_rate: float, max_grad_norm: float | None, following=None):
        """Forward, backward and update.

        Args:
            micro_batches, following: this step's and the next one's, as `Batches` gives them. What the CPU has to do
                for the next step, it does while the GPU is busy with this one.
            targets: in the whole step, all processes together.

        Returns:
            the loss, float32, (1,), which the next step overwrites; the gradients' norm. If that is not finite, nothing
            was updated.
        """
        if self._flat is None or self._flat[0] is not micro_batches:
            self._flat = micro_batches, self.flattened(micro_batches)
        loss, gradient = self.gradients(self._flat[1], targets), self.adapters.gradient
        if self.accelerator.num_processes > 1:
            loss.copy_(self.accelerator.reduce(loss, reduction="sum"))
            gradient.copy_(self.accelerator.reduce(gradient, reduction="sum"))
        norm = self.adapters.update(learning_rate, max_grad_norm)
        self._flat = following and (following, self.flattened(following))
        return loss, norm

    def flattened(self, micro_batches) -> list[FlatBatch]:
        """This process' share of a step's samples, ready to be copied to the GPU."""
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = [[sample for row in rows[index::processes] for sample in row] for rows in micro_batches]
        batches = [flatten(samples, self.pad_token_id) for samples in mine]
        if self.capture:
            batches = [replace(batch, numbers=batch.numbers.pin_memory()) for batch in batches]
        return batches

    @torch.no_grad()
    def gradients(self, micro_batches: list[FlatBatch], targets: int) -> torch.Tensor:
        """Forward and backward. `self.adapters.gradient` then holds the loss' gradient.

        Args:
            targets: what the sum of all tokens' losses is divided by.

        Returns:
            the loss: float32, (1,); the next call writes to it
        """
        self.share.fill_(1 / targets)
        prepared = [self._prepared(batch) for batch in micro_batches]
        self.loss.zero_()
        if self.adapters.accumulating:
            self.adapters.gradient.zero_()
        for batch, (inputs, run) in zip(micro_batches, prepared, strict=True):
            inputs.numbers.copy_(batch.numbers, non_blocking=True)
            run()
        return self.loss

    def _prepared(self, batch: FlatBatch):
        """Tensors on the device for a batch of this kind, and what to call when they are filled."""
        if batch.kind not in self.graphs:
            device = self.embeddings.device
            inputs = replace(batch, numbers=batch.numbers.to(device))
            run = lambda: self.forward_backward(inputs)  # noqa: E731
            if self.capture and len(self.graphs) < MOST_GRAPHS:
                run = self._captured(run)
            self.graphs[batch.kind] = (inputs, run)
        return self.graphs[batch.kind]

    def _captured(self, run):
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            run()  # once as it is: compiles the kernels, and cuBLAS makes its choices
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            run()
        return graph.replay

    def forward_backward(self, batch: FlatBatch) -> None:
        """Add this batch to `self.loss`, and to the adapters' gradients (or put it there, see `Adapters`)."""
        kept: list[Activations] = []
        ids, positions, starts, rows, targets = batch.parts()
        samples = Samples(starts.to(torch.int32), batch.longest)
        x, delta = None, self.embeddings.index_select(0, ids).to(self.dtype)
        angles = [t[0].contiguous() for t in self.rotary(delta[None], positions[None])]  # cos, sin: (T, head_dim)
        if self.host:
            self.host.begin(len(ids))
        for i, layer in enumerate(self.layers):
            a = self.forward(layer, x, delta, angles, samples)
            matrix = layer.down.matrix()
            x, delta = a.x2, layer.down.output(matrix, a.product, layer.down.project(matrix, a.product))
            a.product = None  # large, and soon computed again
            if self.checkpointing and layer is not self.layers[-1]:
                if self.host:
                    self.host.send(i, a.x)
                a = Activations(None if self.host else a.x)
            kept.append(a)
            del matrix, a
        x, delta = x + delta, None
        gradient = self.loss_backward(x, rows, targets)
        del x
        for i, layer in reversed(list(enumerate(self.layers))):
            a = kept.pop()
            if a.x is None:
                a.x = self.host.arrived()
            if self.host and i:
                self.host.fetch(i - 1)
            self.backward(layer, a, gradient, angles, samples)

    def forward(self, layer: Layer, residual, delta, angles, samples: Samples) -> Activations:
        """From a layer's input, residual + delta, to the product that `down` reads."""
        x, normed = self._norm(residual, delta, layer.norm1, layer.qkv)
        a = Activations(x, normed)
        matrix = layer.qkv.matrix()
        a.qkv = layer.qkv.output(matrix, normed, layer.qkv.project(matrix, normed), room=True)
        del matrix, normed, residual, delta
        kernels().rotate(a.qkv, a.qkv, *angles, self.heads + self.kv_heads)
        out, a.attention = attend(*self._q_k_v(a.qkv), samples)
        a.attended = out.flatten(1)
        matrix = layer.o.matrix()
        a.attended_z = layer.o.project(matrix, a.attended)
        delta = layer.o.output(matrix, a.attended, a.attended_z)
        del matrix
        a.x2, a.normed2 = self._norm(x, delta, layer.norm2, layer.gate_up)
        del delta
        matrix = layer.gate_up.matrix()
        a.gate_up = layer.gate_up.output(matrix, a.normed2, layer.gate_up.project(matrix, a.normed2), room=True)
        del matrix
        self._multiply(layer, a)
        return a

    def _multiply(self, layer: Layer, a: Activations) -> None:
        a.product = layer.down.room_for_input(len(a.x))
        kernels().swiglu(a.gate_up, a.product, self.intermediate)

    def loss_backward(self, x, rows, targets) -> torch.Tensor:
        """The loss, and its gradient at the last layer's output, x: (T, H + rank), with room for the layers' dz."""
        room = max(linear.rank for layer in self.layers for linear in (layer.o, layer.down))
        gradient = aligned_rows(len(x), x.shape[1] + room, self.dtype, x.device).zero_()
        at_a_time = max(64, LOGITS_AT_A_TIME // len(self.head))
        for some_rows, some_targets in zip(rows.split(at_a_time), targets.split(at_a_time), strict=True):
            some = x.index_select(0, some_rows)
            normed, d_some = torch.empty_like(some), torch.zeros_like(some)
            kernels().rms_norm(some, None, self.norm, self.epsilon, normed)
            logits = normed @ self.head.t()  # (rows, V)
            self.loss += kernels().cross_entropy(logits, some_targets, self.share).sum()
            kernels().rms_norm_backward(some, self.norm, self.epsilon, logits @ self.head, d_some)
            del logits
            gradient[:, : x.shape[1]].index_add_(0, some_rows, d_some)  # each row once; those without target add zeros
        return gradient

    def backward(self, layer: Layer, a: Activations, gradient, angles, samples: Samples) -> None:
        """From the gradient at a layer's output to that at its input, in place. gradient: (T, H + rank)."""
        adapters, down, room = self.adapters, layer.down, layer.down.inputs
        if a.qkv is None:
            a = self.forward(layer, a.x, None, angles, samples)
        else:
            self._multiply(layer, a)

        matrix = down.matrix()
        z = down.project(matrix, a.product)
        dy_dz = down.backward(matrix, a.product, z, gradient, adapters)
        d_product = down.input_gradient(matrix, dy_dz, out=a.product[:, :room])  # in its place: it has served
        kernels().swiglu_backward(a.gate_up, d_product, self.intermediate)  # in place of gate and up
        a.product = d_product = z = None
        del matrix

        gate_up = layer.gate_up
        matrix = gate_up.matrix()
        dy_dz = gate_up.backward(matrix, a.normed2, a.normed2[:, gate_up.inputs :], a.gate_up, adapters)
        d_normed = gate_up.input_gradient(matrix, dy_dz)
        kernels().rms_norm_backward(a.x2, layer.norm2, self.epsilon, d_normed, gradient)
        a.normed2 = a.gate_up = a.x2 = None
        del matrix, d_normed, dy_dz

        matrix = layer.o.matrix()
        d_attended = layer.o.input_gradient(
            matrix, layer.o.backward(matrix, a.attended, a.attended_z, gradient, adapters)
        )
        del matrix
        q, k, v = self._q_k_v(a.qkv)
        out = a.attended.unflatten(1, q.shape[1:])
        dq, dk, dv = attend_backward(d_attended.view(q.shape), q, k, v, out, a.attention, samples)
        kernels().rotate(dq, q, *angles, self.heads, sign=-1)  # in place of q, k and v
        kernels().rotate(dk, k, *angles, self.kv_heads, sign=-1)
        kernels().rotate(dv, v, *angles, self.kv_heads, sign=0)
        a.attended = None
        del d_attended, out, dq, dk, dv

        matrix = layer.qkv.matrix()
        dy_dz = layer.qkv.backward(matrix, a.normed, a.normed[:, layer.qkv.inputs :], a.qkv, adapters)
        if layer is not self.layers[0]:  # nothing below that is trained
            d_normed = layer.qkv.input_gradient(matrix, dy_dz)
            kernels().rms_norm_backward(a.x, layer.norm1, self.epsilon, d_normed, gradient)

    def _norm(self, residual, delta, weight, linear: BorderedLinear) -> tuple[torch.Tensor, torch.Tensor]:
        """residual + delta, and its norm with room for the linear layer's z. One of them may be None."""
        if residual is None:
            residual, delta = delta, None
        out = linear.room_for_input(len(residual))
        return kernels().rms_norm(residual, delta, weight, self.epsilon, out), out

    def _q_k_v(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of (T, heads, head_dim) and twice (T, kv_heads, head_dim)."""
        head_dim = self.q // self.heads
        sizes = (self.q, self.kv_heads * head_dim, self.kv_heads * head_dim)
        q, k, v = qkv[:, : sum(sizes)].split(sizes, dim=1)
        return tuple(part.unflatten(1, (-1, head_dim)) for part in (q, k, v))


def prepare(model, optimizer, accelerator, *, compute_dtype, update_in_backward: bool, **settings) -> FastStep:
    """A FastStep for `train_steps`; `settings` are its arguments. Raises NoFastStep."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise NoFastStep("it needs a GPU")
    try:
        kernels()
    except ImportError as error:
        raise NoFastStep(f"it needs Triton ({error})") from error
    if compute_dtype != torch.bfloat16 or not torch.cuda.is_bf16_supported(including_emulation=False):
        raise NoFastStep("it computes in bfloat16, on GPUs that have it, and wants compute_dtype=torch.bfloat16")
    if update_in_backward:
        raise NoFastStep("it updates all adapters at once, not in the backward pass")
    return FastStep(model, optimizer, accelerator, **settings)


def kernels():
    """The module of Triton kernels; it is imported when the first step needs it."""
    from qlora_lab.finetuning import step_kernels

    return step_kernels


def require_supported(causal_lm, optimizer) -> None:
    """Raise NoFastStep, with the reason, unless this model is a LLaMA as we know it."""
    config = causal_lm.config
    if config.model_type not in ("llama", "mistral"):
        raise NoFastStep(f"it knows LLaMA and Mistral, and this model is a {config.model_type}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = (config.hidden_size, config.intermediate_size, head_dim)
    if any(size % 8 for size in sizes):
        raise NoFastStep(f"this model's sizes {sizes} are not all multiples of 8")
    if config.hidden_act != "silu":
        raise NoFastStep(f"the MLP's activation is {config.hidden_act}, not silu")
    if getattr(config, "sliding_window", None):
        raise NoFastStep("this model's attention has a sliding window")
    if config.rope_parameters["rope_type"] not in ("default", "linear", "llama3"):
        raise NoFastStep(f"this model's rotary embedding is of type {config.rope_parameters['rope_type']!r}")
    if causal_lm.get_input_embeddings().weight.device != causal_lm.get_output_embeddings().weight.device:
        raise NoFastStep("the embeddings lie on another device than the rest")
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.AdamW) and getattr(inner, "args", None) and inner.args.optim_bits != 32:
        raise NoFastStep("it keeps AdamW's states in 32 bits: use adamw_torch or paged_adamw_32bit")
