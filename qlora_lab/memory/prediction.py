"""How much GPU memory does a training step take? Arithmetic on plain numbers: no torch, no GPU, no model.

A step passes several moments that can be its peak (`moments.py`), and the estimate is the largest of them.

Sizes are bytes. GB is 10^9, GiB is 2^30. Activations are those of transformers' LLaMA layers with SDPA (flash)
attention, PEFT's LoRA and bitsandbytes' `Linear4bit`; of mixtures, those of our `FourBitExperts`. (gpt-oss has no
flash attention in plain transformers: its scores, some 10 bytes for each head and pair of tokens in a layer, are left
out.) Each line says which tensor it counts; its source is the list of
tensors that were alive at the peak of real steps, by the line of code that had asked for each ("explained" in
`data/records/memory-*.json`), and what the forward pass keeps on small models, byte by byte (`kept-*.json`). No number
is fitted. What is left over is printed by `python -m qlora_lab.experiments memory --compare`; where torch's allocator
was told to let its segments grow (`expandable_segments`), it is below 0.1 %, elsewhere the allocator rounds blocks up
by as much as 1 MiB each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_lab.memory.moments import held_throughout, moments
from qlora_lab.memory.processes import held_by_one, moments_beside_others, moments_of_one
from qlora_lab.memory.shapes import require_known
from qlora_lab.memory.training_step import TrainingStep

CUDA_CONTEXT = 500_000_000  # what the driver takes before the first tensor; about 0.5 GB on recent cards

# What each of `finetuning.PRESETS` sets; written twice, since this file imports nothing of ours. A test compares them.
PRESETS = {
    "standard": {},
    "in-backward": {"update_in_backward": True},
    "bf16-adapters": {"adapter_dtype": "bfloat16"},
    "lean": {
        "adapter_dtype": "bfloat16",
        "loss_chunk": 128,
        "update_in_backward": True,
        "embeddings_on_cpu": True,
    },
}


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes by part at the step's peak.

    parts: what lies in torch's allocator; sums to `peak_allocated`.
    outside: what the card holds besides (CUDA context, paged optimizer states).
    moment: which of the moments is the peak.
    """

    parts: dict[str, int]
    outside: dict[str, int]
    moment: str

    @property
    def peak_allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated()` should read over the step."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """With what lies outside torch's allocator."""
        return self.peak_allocated + sum(self.outside.values())

    @property
    def card_bytes(self) -> int:
        """What a card should have for this step: the total, 10^9 bytes, and half of activations and logits.

        Torch takes memory in large pieces, and the gaps in them grow with the tokens. The rule is from the QLoRA steps
        of LLaMA-7B and 13B in data/records/memory-nvidia-h100-80gb-hbm3.json, all of which it covers. At 65B up to
        10^9 bytes more were taken.
        """
        grows = self.parts.get("activations", 0) + self.parts.get("logits and loss", 0)
        return self.total + 10**9 + grows // 2

    def table(self) -> str:
        """One line a part, largest first, in GB (10^9 bytes)."""
        lines = [f"{name:<24}{size / 1e9:9.3f} GB" for name, size in sorted(self.parts.items(), key=lambda p: -p[1])]
        lines += [f"{'peak allocated':<24}{self.peak_allocated / 1e9:9.3f} GB ({self.moment})"]
        lines += [f"{'+ ' + name:<24}{size / 1e9:9.3f} GB" for name, size in self.outside.items() if size]
        return "\n".join([*lines, f"{'total':<24}{self.total / 1e9:9.3f} GB"])


def estimate(
    shape,
    method: str = "qlora",
    *,
    rank: int = 64,
    targets: str | Sequence[str] = "all-linear",
    batch_size: int = 1,
    sequence_length: int = 512,
    gradient_checkpointing: bool = True,
    optimizer: str = "paged_adamw_32bit",
    adapter_dtype: str = "float32",
    quant_type: str = "nf4",
    double_quant: bool = True,
    full_precision: str = "float32",
    loss_chunk: int | None = None,
    update_in_backward: bool = False,
    embeddings_on_cpu: bool = False,
    preset: str | None = None,
    processes: int = 1,
    sharding: str = "data",
    dense_base: bool = False,
) -> MemoryBreakdown:
    """Predict the memory of one training step on a GPU.

    Args:
        shape: `SHAPES["llama-7b"]`, or anything with the attributes and methods of `Shape`.
        method: "full" (every parameter is trained), "lora" (16-bit base) or "qlora" (4-bit base).
        rank, targets: of the adapters; targets is "all-linear", or one or a list of names from `LINEARS`; of a mixture,
            of its attention's and of gate_up_proj and down_proj.
        batch_size, sequence_length: samples in one forward pass, and tokens in each.
        gradient_checkpointing: keep each layer's input only, and compute the layer again in the backward pass.
        optimizer: transformers' name.
        adapter_dtype: "float32" (PEFT's default, under bf16 autocast) or "bfloat16" (without autocast); gradients
            follow it.
        quant_type: "nf4" or "fp4": the same size.
        double_quant: 4.127 instead of 4.5 bits a quantized parameter.
        full_precision: of "full". "float32": fp32 weights and gradients, bf16 autocast. "mixed": bf16 weights and
            gradients, and fp32 master weights, updated one tensor after the other. Both take
            16 bytes a parameter, AdamW's fp32 states included.
        loss_chunk, update_in_backward, embeddings_on_cpu: as in `finetuning.Preset` and `finetuning.train_steps`.
        preset: one of `PRESETS`, which sets adapter_dtype and the three above.
        processes: GPUs that take the step together; the prediction is for one of them, and its own batch_size.
        dense_base: the weights that are in 4 bits are held in bf16, too, as `TrainSettings.dense_base` does on a CPU.
        sharding: "data", each has the whole model; or "full", each has a share of every layer (see `processes.py`).

    Returns:
        parts by name: "base weights" (of the linears), "dense weights" (the same in bf16), "quantization constants",
        "embeddings and head", "norms", "biases", "routers" (of mixtures), "master weights", "adapters", "gradients",
        "optimizer states", "bf16 copies" (autocast's), "activations", "logits and loss", "dequantized weight" (one,
        while it is used), "update" (what the optimizer needs for itself), "gathered" (whole layers, of a sharded
        model), "exchange" (sums of gradients over processes), "cuBLAS workspace"; only those that are not 0 at the
        peak.

    Raises:
        ValueError: an unknown method, optimizer, dtype, target or preset; a rank, length or batch below 1.
    """
    recipe = {
        "adapter_dtype": adapter_dtype,
        "loss_chunk": loss_chunk,
        "update_in_backward": update_in_backward,
        "embeddings_on_cpu": embeddings_on_cpu,
    }
    if preset is not None:
        require_known("preset", preset, PRESETS)
        recipe.update(PRESETS[preset])
    step = TrainingStep(
        shape,
        method,
        rank=rank,
        targets=targets,
        batch_size=batch_size,
        sequence_length=sequence_length,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        quant_type=quant_type,
        double_quant=double_quant,
        full_precision=full_precision,
        **recipe,
        processes=processes,
        sharding=sharding,
        dense_base=dense_base,
    )
    if sharding == "full":
        (held, managed), candidates = held_by_one(step, processes), moments_of_one(step, processes)
    else:
        held, managed = held_throughout(step)
        candidates = moments(step) if processes == 1 else moments_beside_others(step)
    moment, at_peak = max(candidates, key=lambda candidate: sum(candidate[1].values()))
    parts = {name: size for name, size in {**held, **at_peak}.items() if size}
    return MemoryBreakdown(parts, {"CUDA context": CUDA_CONTEXT, "paged optimizer states": managed}, moment)
