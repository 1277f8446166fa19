"""A training step that keeps the GPU busy: forward, backward and update of a LLaMA with adapters, written by hand.

The plain step trains any model, through transformers, PEFT and autograd: thousands of small GPU kernels per step, each
launched by Python in its turn. With few tokens per step the GPU spends most of its time waiting for the next launch.
This module takes the same step for models built like LLaMA (see `families.py`), without the gaps:

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

On a GPU without bf16, such as a T4, all of this is in fp16, and the loss is scaled (`LossScale`). Nothing else differs
but the kernel of attention.

A layer's picture, and its forward and backward pass line by line, are in `layer.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from qlora_lab.training.optimizers import set_learning_rate
from qlora_lab.training.steps.contract import StepResult
from qlora_lab.training.steps.fast.adapters import Adapters
from qlora_lab.training.steps.fast.attention import Samples, has_flash
from qlora_lab.training.steps.fast.batch import FlatBatch, flatten
from qlora_lab.training.steps.fast.host_memory import HostMemory, capture_stream
from qlora_lab.training.steps.fast.layer import Activations, Angles, Layer, Row
from qlora_lab.training.steps.fast.limits import kernels, require_supported
from qlora_lab.training.steps.fast.linear import aligned_rows
from qlora_lab.training.steps.fast.loss_scale import LossScale
from qlora_lab.training.steps.fast.reading import read_model

LOGITS_AT_A_TIME = 1 << 25  # elements: 64 MiB in bf16
FEWEST_ROWS_OF_LOGITS = 512  # with fewer a GPU takes longer to read the head than to multiply by it
MOST_GRAPHS = 64


class FastStep:
    """A `Step` for one model.

    Args:
        model: a model of transformers, of one of the families in `families.py`, its linear layers dense or in 4 bits
            (this package's or bitsandbytes'), with adapters of this package or of PEFT.
        optimizer: AdamW of torch, or bitsandbytes' with 32-bit states, of the adapters.
        accelerator: 🤗 Accelerate's, which knows the processes that share a step, and has the scaler of fp16's loss.
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
        self.decoder = decoder = read_model(causal_lm)
        require_supported(causal_lm, optimizer)
        self.accelerator, self.pad_token_id = accelerator, pad_token_id
        self.dtype, self.checkpointing = dtype, gradient_checkpointing
        self.embeddings, self.head = decoder.embeddings, decoder.head.to(dtype)  # (V, H) each
        self.hidden = self.head.shape[1]
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        self.scale = LossScale(accelerator.scaler)
        groups = [group for layer in decoder.layers for group in layer.groups]
        self.adapters = Adapters(groups, optimizer, dtype, accumulating=accumulation > 1)
        borders = iter(self.adapters.borders)
        device = self.embeddings.device
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)  # of a micro-batch's dropouts
        self.layers = [
            Layer(layer, [next(borders) for _ in layer.groups], dtype, self.seed, i)
            for i, layer in enumerate(decoder.layers)
        ]
        self.dropout = any(adapter.dropout for group in groups for adapter in group.adapters)
        self.loss = torch.zeros(1, device=device)
        self.share = torch.zeros(1, device=device)  # the weight of one target in the scaled loss: scale / targets
        self.flash = device.type == "cuda" and has_flash(device)
        self.host = None
        if activation_offloading and gradient_checkpointing:
            self.host = HostMemory(len(self.layers) - 1, self.hidden, dtype, device)
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
        norm = self.adapters.update(learning_rate, self.max_grad_norm, self.scale.value)
        self._flat = following and (following, self.flattened(following))
        finite = math.isfinite(norm)
        self.adapters.steps += finite
        self.scale.update(finite)
        skipped = self.scale.scaler is not None and not finite and math.isfinite(loss)
        return StepResult(loss, norm, updated=finite, skipped=skipped)

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
        """Run forward and backward. `self.adapters.gradient` then holds the gradient of the scaled loss.

        Args:
            micro_batches: this process's, from `flattened`.
            targets: the sum of the token losses is divided by this number.

        Returns:
            the loss: float32, (1,), overwritten by the next call
        """
        scale = self.scale.value
        self.share.fill_(scale / targets)
        prepared = [self._prepared(batch) for batch in micro_batches]
        self.loss.zero_()
        if self.adapters.accumulating:
            self.adapters.gradient.zero_()
        for batch, (inputs, run) in zip(micro_batches, prepared, strict=True):
            inputs.numbers.copy_(batch.numbers, non_blocking=True)
            if self.dropout:  # from torch's own generator, whose state a checkpoint holds
                self.seed.fill_(torch.randint(1 << 62, ()).item())
            run()
        return self.loss.div_(scale)

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
        samples = Samples(starts.to(torch.int32), batch.longest, self.flash)
        x, delta = None, self._embedded(ids)
        row = Row(samples, self._angles(delta, positions))
        if self.host:
            self.host.begin(len(ids))
        for i, layer in enumerate(self.layers):
            a = layer.forward(x, delta, row)
            x, delta = a.x2, layer.finish(a)
            if not self.checkpointing or layer is self.layers[-1]:
                kept.append(a)
            elif self.host:
                self.host.send(i, a.x)
            else:
                kept.append(a.x)
            del a
        assert x is not None  # there is a layer
        x, delta = x + delta, None
        gradient = self.loss_backward(x, rows, targets)
        del x
        for i, layer in reversed(list(enumerate(self.layers))):
            a = self.host.arrived() if self.host and layer is not self.layers[-1] else kept.pop()
            if self.host and i:
                self.host.fetch(i - 1)
            if isinstance(a, torch.Tensor):
                a = layer.forward(a, None, row)
            layer.backward(a, gradient, row, lowest=i == 0)

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """The tokens' embeddings, (T, H)."""
        embedded = self.embeddings.index_select(0, ids)
        if self.decoder.embedding_scale != 1.0:
            embedded = embedded * self.decoder.embedding_scale
        return embedded.to(self.dtype)

    def _angles(self, x: torch.Tensor, positions: torch.Tensor) -> dict[str, Angles]:
        """Cosine and sine of the rotary angles, (T, head_dim) each, for each kind of layer."""
        angles = {}
        for kind, rotary in self.decoder.angles.items():
            cosine, sine = (t[0].contiguous() for t in rotary(x[None], positions[None]))
            angles[kind] = cosine, sine
        return angles

    def loss_backward(self, x, rows, targets) -> torch.Tensor:
        """Add the loss to `self.loss`; return its gradient at the last layer's output, with room for the layers' dz.

        x: the last layer's output, (T, H). rows, targets: see `FlatBatch.parts`. Returns (T, H + width).
        """
        norm = self.decoder.norm
        room = max(linear.width for layer in self.layers for linear in (layer.o, layer.down))
        gradient = aligned_rows(len(x), x.shape[1] + room, self.dtype, x.device).zero_()
        at_a_time = max(FEWEST_ROWS_OF_LOGITS, LOGITS_AT_A_TIME // len(self.head))
        for some_rows, some_targets in zip(rows.split(at_a_time), targets.split(at_a_time), strict=True):
            some = x.index_select(0, some_rows)
            normed, d_some = torch.empty_like(some), torch.zeros_like(some)
            kernels().rms_norm(some, None, norm.weight, norm.epsilon, normed)
            logits = normed @ self.head.t()  # (rows, V)
            self.loss += kernels().cross_entropy(logits, some_targets, self.share, self.decoder.logit_cap).sum()
            kernels().rms_norm_backward(some, norm.weight, norm.epsilon, logits @ self.head, d_some)
            del logits
            gradient[:, : x.shape[1]].index_add_(0, some_rows, d_some)  # each row once; padding adds zeros
        return gradient
