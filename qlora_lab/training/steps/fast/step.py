"""A training step that keeps the GPU busy: forward, backward and update of a LLaMA with adapters, written by hand.

The plain step trains any model, through transformers, PEFT and autograd: thousands of small GPU kernels per step, each
launched by Python in its turn. With few tokens per step the GPU spends most of its time waiting for the next launch.
This module takes the same step for one architecture (LLaMA and models built like it), without the gaps:

    one CUDA graph        all launches of forward and backward are recorded once and replayed in one call. A recording
                          has fixed shapes, so samples are concatenated in one row of tokens, whose length is rounded
                          up to one of a few sizes; attention is given the position where each sample begins
    larger products       q, k and v read the same input, so they are one matrix product. So are gate and up. LoRA is
                          a border of that matrix (see `BorderedLinear`)
    fused kernels         norm + residual, rotary, SwiGLU, loss, AdamW: one kernel each (see `kernels.py`)
    little kept           the backward pass is written by hand, too, and so is what it keeps: checkpointing recomputes
                          each layer except its last product, and the last layer not at all; SwiGLU's output is never
                          kept, since computing it is as fast as reading it; logits exist for some rows at a time;
                          layers' inputs may be kept in the host's memory

The numbers are those of the plain step under bf16 autocast, up to bf16's rounding: fp32 adapters and AdamW, products in
bf16. They are nearer to float32's than autocast's are. Autocast rounds a layer's output to bf16 before LoRA's
correction is added, so a correction below half a unit in the last of 8 bits is lost every time. At the beginning of
training, while B is small, many are. Here both are summed in fp32 first. (An untrained LLaMA-7B at a learning rate of
1e-4, the loss of a sample that is trained on for the second time: float32 10.83, this 10.85, autocast 11.13; the first
time 11.1 to 11.3.)

A layer, with the shapes of LLaMA-7B:

    x ──────────────┬─────────────(+)── x2 ─────────────┬──────────────(+)── x of the next layer     (T, 4096)
    └ norm ─ qkv ─ rotary, attention ─ o ┘  └ norm ─ gate, up ─ SwiGLU ─ down ┘
             (T, 12288)       (T, 4096)          (T, 22016)   (T, 11008)

The kernel of the following norm computes each sum (+). `forward` and `backward` below follow this picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from qlora_lab.training.optimizers import set_learning_rate
from qlora_lab.training.steps.contract import StepResult
from qlora_lab.training.steps.fast.adapters import Adapters
from qlora_lab.training.steps.fast.attention import Samples, attend, attend_backward
from qlora_lab.training.steps.fast.batch import FlatBatch, flatten
from qlora_lab.training.steps.fast.host_memory import HostMemory, capture_stream
from qlora_lab.training.steps.fast.limits import kernels, require_supported
from qlora_lab.training.steps.fast.linear import BorderedLinear, aligned_rows
from qlora_lab.training.steps.fast.reading import read_layer

LOGITS_AT_A_TIME = 1 << 25  # elements: 64 MiB in bf16
MOST_GRAPHS = 64

Angles = tuple[torch.Tensor, torch.Tensor]  # cosine and sine of each token's rotary angles, (T, head_dim) each


@dataclass(frozen=True, eq=False)
class Layer:
    """A decoder layer's frozen norm weights, (H,) each, and its linear layers."""

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
    """What a layer's backward pass needs. It deletes what it has used. All but x can be computed again from x."""

    x: torch.Tensor  # (T, H), the layer's input
    normed: torch.Tensor  # (T, H + rank)
    qkv: torch.Tensor  # (T, q + k + v + rank), with rotary positions
    attended: torch.Tensor  # (T, q)
    attention: tuple  # what `attend_backward` needs besides
    attended_z: torch.Tensor  # (T, rank)
    x2: torch.Tensor  # (T, H)
    normed2: torch.Tensor  # (T, H + rank)
    gate_up: torch.Tensor  # (T, 2 I + rank)


class FastStep:
    """A `Step` for one model.

    Args:
        model: a LLaMA of transformers, its linear layers dense or in 4 bits (this package's or bitsandbytes'), with
            adapters of this package or of PEFT.
        optimizer: AdamW of torch, or bitsandbytes' with 32-bit states, of the adapters.
        accelerator: 🤗 Accelerate's, which knows the processes that share a step.
        max_grad_norm: gradients are scaled down to this norm; None: never.
        accumulation: micro-batches per step.
        gradient_checkpointing: keep only each layer's input and compute the rest again in the backward pass.
        activation_offloading: keep these inputs in the host's memory (see `HostMemory`); needs checkpointing.
        pad_token_id: fills up the row of tokens; any token will do.
        dtype: of the activations and of dense matrices.
        capture: record CUDA graphs; if False, or on a CPU, Python launches each kernel.

    Raises:
        NoFastStep: a model, an adapter or an optimizer that this step does not support.
    """

    def __init__(
        self,
        model,
        optimizer,
        accelerator,
        max_grad_norm: float | None = None,
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
        read = [read_layer(layer, f"layers.{i}") for i, layer in enumerate(decoder.layers)]
        groups = [group for of_layer in read for group in of_layer]
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        self.adapters = Adapters(groups, optimizer, dtype, accumulating=accumulation > 1)
        self.layers, borders = [], iter(self.adapters.borders)
        for layer, of_layer in zip(decoder.layers, read, strict=True):
            qkv, o, gate_up, down = (BorderedLinear(group, next(borders), dtype) for group in of_layer)
            norm1, norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            self.layers.append(Layer(norm1, qkv, o, norm2, gate_up, down))
        self.q = self.layers[0].o.inputs
        self.intermediate = self.layers[0].down.inputs
        device = self.embeddings.device
        self.loss = torch.zeros(1, device=device)
        self.share = torch.zeros(1, device=device)  # the weight of one target in the loss: 1 / targets
        self.host = None
        if activation_offloading and gradient_checkpointing:
            self.host = HostMemory(len(self.layers) - 1, config.hidden_size, dtype, device)
        self.graphs: dict[tuple, tuple] = {}
        self._flat: tuple | None = None
        self.capture = capture and device.type == "cuda"
        if self.capture:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), capture_stream(device)

    @torch.no_grad()
    def run(self, micro_batches, targets: int, learning_rate: float, following=None) -> StepResult:
        """See `Step`. The CPU prepares the following step while the GPU is busy with this one."""
        set_learning_rate(self.optimizer, learning_rate)  # for readers of the optimizer; the kernel is given it below
        if self._flat is None or self._flat[0] is not micro_batches:
            self._flat = micro_batches, self.flattened(micro_batches)
        loss, gradient = self.gradients(self._flat[1], targets), self.adapters.gradient
        if self.accelerator.num_processes > 1:
            loss.copy_(self.accelerator.reduce(loss, reduction="sum"))
            gradient.copy_(self.accelerator.reduce(gradient, reduction="sum"))
        norm = self.adapters.update(learning_rate, self.max_grad_norm)
        self._flat = following and (following, self.flattened(following))
        return StepResult(loss, norm, updated=math.isfinite(norm))

    def write_state(self) -> None:
        self.adapters.write_down_steps()

    def close(self) -> None:
        """Nothing to undo: the model works as before; its trained parameters are now views of one tensor."""

    def flattened(self, micro_batches) -> list[FlatBatch]:
        """This process's share of a step's samples, one batch per micro-batch, ready to be copied to the GPU."""
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = [[sample for row in rows[index::processes] for sample in row] for rows in micro_batches]
        batches = [flatten(samples, self.pad_token_id) for samples in mine]
        if self.capture:
            batches = [replace(batch, numbers=batch.numbers.pin_memory()) for batch in batches]
        return batches

    @torch.no_grad()
    def gradients(self, micro_batches: list[FlatBatch], targets: int) -> torch.Tensor:
        """Run forward and backward. `self.adapters.gradient` then holds the gradient of the loss.

        Args:
            micro_batches: this process's, from `flattened`.
            targets: the sum of the token losses is divided by this number.

        Returns:
            the loss: float32, (1,), overwritten by the next call
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
        """Input tensors on the device for batches of this kind, and the function to call when they are filled."""
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
            run()  # once without recording: compiles the kernels, and cuBLAS chooses its own
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            run()
        return graph.replay

    def forward_backward(self, batch: FlatBatch) -> None:
        """Add the batch's loss to `self.loss`. Set the adapters' gradients, or add to them if they are accumulated."""
        kept: list[Activations | torch.Tensor] = []  # a tensor is a checkpointed layer's input
        ids, positions, starts, rows, targets = batch.parts()
        samples = Samples(starts.to(torch.int32), batch.longest)
        x, delta = None, self.embeddings.index_select(0, ids).to(self.dtype)
        cosine, sine = (t[0].contiguous() for t in self.rotary(delta[None], positions[None]))  # (T, head_dim)
        angles = cosine, sine
        if self.host:
            self.host.begin(len(ids))
        for i, layer in enumerate(self.layers):
            a = self.forward(layer, x, delta, angles, samples)
            product, matrix = self._product(layer, a), layer.down.matrix()
            x, delta = a.x2, layer.down.output(matrix, product, layer.down.project(matrix, product))
            del product  # large, and soon computed again
            if not self.checkpointing or layer is self.layers[-1]:
                kept.append(a)
            elif self.host:
                self.host.send(i, a.x)
            else:
                kept.append(a.x)
            del matrix, a
        x, delta = x + delta, None
        gradient = self.loss_backward(x, rows, targets)
        del x
        for i, layer in reversed(list(enumerate(self.layers))):
            a = self.host.arrived() if self.host and layer is not self.layers[-1] else kept.pop()
            if self.host and i:
                self.host.fetch(i - 1)
            if isinstance(a, torch.Tensor):
                a = self.forward(layer, a, None, angles, samples)
            self.backward(layer, a, gradient, angles, samples)

    def forward(self, layer: Layer, residual, delta, angles: Angles, samples: Samples) -> Activations:
        """From a layer's input, residual + delta, to the gate and up projections."""
        x, normed = self._norm(residual, delta, layer.norm1, layer.qkv)
        matrix = layer.qkv.matrix()
        qkv = layer.qkv.output(matrix, normed, layer.qkv.project(matrix, normed), room=True)
        del matrix, residual, delta
        kernels().rotate(qkv, qkv, *angles, self.heads + self.kv_heads)
        out, attention = attend(*self._q_k_v(qkv), samples)
        attended = out.flatten(1)
        matrix = layer.o.matrix()
        attended_z = layer.o.project(matrix, attended)
        delta = layer.o.output(matrix, attended, attended_z)
        del matrix
        x2, normed2 = self._norm(x, delta, layer.norm2, layer.gate_up)
        del delta
        matrix = layer.gate_up.matrix()
        gate_up = layer.gate_up.output(matrix, normed2, layer.gate_up.project(matrix, normed2), room=True)
        return Activations(x, normed, qkv, attended, attention, attended_z, x2, normed2, gate_up)

    def _product(self, layer: Layer, a: Activations) -> torch.Tensor:
        """What `down` reads: silu(gate) * up, (T, I + rank)."""
        product = layer.down.room_for_input(len(a.x))
        kernels().swiglu(a.gate_up, product, self.intermediate)
        return product

    def loss_backward(self, x, rows, targets) -> torch.Tensor:
        """Add the loss to `self.loss`; return its gradient at the last layer's output, with room for the layers' dz.

        x: the last layer's output, (T, H). rows, targets: see `FlatBatch.parts`. Returns (T, H + rank).
        """
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
            gradient[:, : x.shape[1]].index_add_(0, some_rows, d_some)  # each row once; padding adds zeros
        return gradient

    def backward(self, layer: Layer, a: Activations, gradient, angles: Angles, samples: Samples) -> None:
        """Turn the gradient at a layer's output into that at its input, in place. gradient: (T, H + rank)."""
        down = layer.down
        product, matrix = self._product(layer, a), down.matrix()
        z = down.project(matrix, product)
        dy_dz = down.backward(matrix, product, z, gradient)
        d_product = down.input_gradient(matrix, dy_dz, out=product[:, : down.inputs])  # overwrites the product
        kernels().swiglu_backward(a.gate_up, d_product, self.intermediate)  # in place of gate and up
        del product, d_product, z, matrix

        gate_up = layer.gate_up
        matrix = gate_up.matrix()
        dy_dz = gate_up.backward(matrix, a.normed2, a.normed2[:, gate_up.inputs :], a.gate_up)
        d_normed = gate_up.input_gradient(matrix, dy_dz)
        kernels().rms_norm_backward(a.x2, layer.norm2, self.epsilon, d_normed, gradient)
        del a.normed2, a.gate_up, a.x2, matrix, d_normed, dy_dz

        matrix = layer.o.matrix()
        d_attended = layer.o.input_gradient(matrix, layer.o.backward(matrix, a.attended, a.attended_z, gradient))
        del matrix
        q, k, v = self._q_k_v(a.qkv)
        out = a.attended.unflatten(1, q.shape[1:])
        dq, dk, dv = attend_backward(d_attended.view(q.shape), q, k, v, out, a.attention, samples)
        kernels().rotate(dq, q, *angles, self.heads, sign=-1)  # in place of q, k and v
        kernels().rotate(dk, k, *angles, self.kv_heads, sign=-1)
        kernels().rotate(dv, v, *angles, self.kv_heads, sign=0)
        del a.attended, d_attended, out, dq, dk, dv

        matrix = layer.qkv.matrix()
        dy_dz = layer.qkv.backward(matrix, a.normed, a.normed[:, layer.qkv.inputs :], a.qkv)
        if layer is not self.layers[0]:  # below the first layer nothing is trained
            d_normed = layer.qkv.input_gradient(matrix, dy_dz)
            kernels().rms_norm_backward(a.x, layer.norm1, self.epsilon, d_normed, gradient)

    def _norm(self, residual, delta, weight, linear: BorderedLinear) -> tuple[torch.Tensor, torch.Tensor]:
        """residual + delta, (T, H), and its norm with room for the linear layer's z. One of the two may be None."""
        if residual is None:
            residual, delta = delta, None
        out = linear.room_for_input(len(residual))
        return kernels().rms_norm(residual, delta, weight, self.epsilon, out), out

    def _q_k_v(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v as views of qkv: (T, heads, head_dim), and twice (T, kv_heads, head_dim)."""
        head_dim = self.q // self.heads
        sizes = (self.q, self.kv_heads * head_dim, self.kv_heads * head_dim)
        q, k, v = qkv[:, : sum(sizes)].split(sizes, dim=1)
        return q.unflatten(1, (-1, head_dim)), k.unflatten(1, (-1, head_dim)), v.unflatten(1, (-1, head_dim))
