"""How much GPU memory does a training step take? Arithmetic on plain numbers: no torch, no GPU, no model.

A step passes three moments that can be its peak, and the estimate is the largest of them:

    loss       the whole forward pass is remembered, and the logits stand twice in fp32
    backward   it has come down to the first layer: every adapter has its gradient, one layer's activations are left
    update     gradients and optimizer states, and what the optimizer itself needs

Sizes are bytes. GB is 10^9, GiB is 2^30. Activations are those of transformers' LLaMA layers under bf16 autocast with
SDPA (flash) attention, PEFT's LoRA and bitsandbytes' `Linear4bit`; each line below says which tensor it counts.
`python -m pytest tests/memory` holds the result against steps measured on a GPU (`data/records/`).
"""

from dataclasses import dataclass

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CUBLAS_WORKSPACE = 32 * 2**20  # of an H100; torch's allocator holds it
CUDA_CONTEXT = 500_000_000  # what the driver takes before the first tensor; about 0.5 GB on recent cards


@dataclass(frozen=True)
class Shape:
    """A LLaMA-architecture model; the names are those of transformers' configs."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of one layer's linears, by name."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        key_value = hidden // self.num_attention_heads * self.num_key_value_heads
        sizes = [(hidden, hidden), (hidden, key_value), (hidden, key_value), (hidden, hidden)]
        return dict(zip(LINEARS, [*sizes, (hidden, mlp), (hidden, mlp), (mlp, hidden)], strict=True))

    def linear_parameters(self) -> int:
        return self.num_hidden_layers * sum(i * o for i, o in self.linears().values())

    def embedding_parameters(self) -> int:
        """Embeddings and output head, which are one matrix when tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    def norm_parameters(self) -> int:
        return self.hidden_size * (2 * self.num_hidden_layers + 1)

    def parameters(self) -> int:
        return self.linear_parameters() + self.embedding_parameters() + self.norm_parameters()


# LLaMA: Touvron et al. 2023 (arXiv 2302.13971), table 2. The others: each model's config.json.
SHAPES = {
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama-33b": Shape(6656, 17920, 60, 52, 52, 32000),
    "llama-65b": Shape(8192, 22016, 80, 64, 64, 32000),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": Shape(8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": Shape(8192, 28672, 80, 64, 8, 128256),
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 32000),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "smollm2-360m": Shape(960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True),
    "smollm2-1.7b": Shape(2048, 8192, 24, 32, 32, 49152, tie_word_embeddings=True),
}


def from_config(config) -> Shape:
    """The shape of a transformers config with LLaMA's names (Llama, Mistral, Qwen2, SmolLM2, ...).

    Raises:
        ValueError: a config without them, such as GPT-2's.
    """
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if missing := [name for name in names if getattr(config, name, None) is None]:
        raise ValueError(f"{type(config).__name__} has no {missing[0]}: only LLaMA-like models can be estimated")
    hidden, mlp, layers, heads, vocabulary = (getattr(config, name) for name in names)
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    return Shape(hidden, mlp, layers, heads, key_value_heads, vocabulary, bool(config.tie_word_embeddings))


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes by part at the step's peak.

    parts: what lies in torch's allocator; sums to `peak_allocated`.
    outside: what the card holds besides (CUDA context, paged optimizer states).
    moment: which of the three moments is the peak.
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
        return self.peak_allocated + sum(self.outside.values())

    def table(self) -> str:
        """One line a part, largest first, in GB (10^9 bytes)."""
        lines = [f"{name:<24}{size / 1e9:9.3f} GB" for name, size in sorted(self.parts.items(), key=lambda p: -p[1])]
        lines += [f"{'peak allocated':<24}{self.peak_allocated / 1e9:9.3f} GB ({self.moment})"]
        lines += [f"{'+ ' + name:<24}{size / 1e9:9.3f} GB" for name, size in self.outside.items() if size]
        return "\n".join([*lines, f"{'total':<24}{self.total / 1e9:9.3f} GB"])


def trainable_parameters(shape, rank: int, targets="all-linear") -> int:
    """PEFT's count: A is (rank, in_features) and B (out_features, rank) for every target in every layer."""
    chosen = _chosen(shape, targets)
    return shape.num_hidden_layers * sum(rank * (i + o) for i, o in chosen.values())


def bits_per_parameter(block_size: int = 64, double: bool = True, scale_block_size: int = 256) -> float:
    """4 bits and the share of the scale: fp32 for each block, or 8 bits and an fp32 for each block of scales."""
    return 4 + (8 / block_size + 32 / (block_size * scale_block_size) if double else 32 / block_size)


def estimate(
    shape,
    method: str = "qlora",
    *,
    rank: int = 64,
    targets="all-linear",
    batch_size: int = 1,
    sequence_length: int = 512,
    gradient_checkpointing: bool = True,
    optimizer: str = "paged_adamw_32bit",
    adapter_dtype: str = "float32",
    quant_type: str = "nf4",
    double_quant: bool = True,
) -> MemoryBreakdown:
    """Predict the memory of one training step on a GPU.

    Args:
        shape: `SHAPES["llama-7b"]`, or anything with the attributes and methods of `Shape`.
        method: "lora" (16-bit base) or "qlora" (4-bit base).
        rank, targets: of the adapters; targets is "all-linear" or a list of names from `LINEARS`.
        batch_size, sequence_length: samples in one forward pass, and tokens in each.
        gradient_checkpointing: keep each layer's input only, and compute the layer again in the backward pass.
        optimizer: transformers' name.
        adapter_dtype: "float32" (PEFT's default) or "bfloat16"; gradients and fp32 optimizer states follow it.
        quant_type: "nf4" or "fp4": the same size.
        double_quant: 4.127 instead of 4.5 bits a quantized parameter.

    Raises:
        ValueError: an unknown method, optimizer, dtype or target.
    """
    if method not in ("lora", "qlora"):
        raise ValueError(f"method is {method!r}: choose 'lora' or 'qlora'")
    if adapter_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"adapter_dtype is {adapter_dtype!r}: choose 'float32' or 'bfloat16'")
    if optimizer not in _STATE_BYTES:
        raise ValueError(f"optimizer is {optimizer!r}: choose from {', '.join(_STATE_BYTES)}")
    adapters = trainable_parameters(shape, rank, targets)
    adapter_bytes = 4 if adapter_dtype == "float32" else 2
    tokens = batch_size * sequence_length
    quantized = method == "qlora"

    linear = shape.linear_parameters()
    held = {
        "base weights": linear // 2 if quantized else 2 * linear,
        "quantization constants": round(linear * (bits_per_parameter(double=double_quant) - 4) / 8) if quantized else 0,
        "embeddings and head": 2 * shape.embedding_parameters(),
        "norms": 2 * shape.norm_parameters(),
        "adapters": adapter_bytes * adapters,
    }
    states = _STATE_BYTES[optimizer] * adapters
    paged = optimizer.startswith("paged")
    if not paged:
        held["optimizer states"] = states

    held["cuBLAS workspace"] = CUBLAS_WORKSPACE
    layer = tokens * layer_activation_bytes(shape, method, rank, targets)
    inputs = tokens * 2 * shape.hidden_size  # one layer's input, bf16
    layers = shape.num_hidden_layers
    # bitsandbytes dequantizes one whole weight, forward and backward; with it goes the product's 16-bit output
    workspace = 2 * max(i * o for i, o in shape.linears().values()) if quantized else 0
    # in fp32: the logits, their log-softmax, and the gradients of both
    logits = tokens * shape.vocab_size * (4 + 4 + 4 + 4)
    gradients = adapter_bytes * adapters

    moments = {
        "loss": {
            "activations": layers * (inputs if gradient_checkpointing else layer),
            "logits and loss": logits,
        },
        "backward": {
            "activations": inputs + layer,
            "dequantized weight": workspace,
            "gradients": gradients,
        },
        "update": {
            "gradients": gradients,
            # torch's AdamW computes the denominators of all parameters at once; bitsandbytes' needs nothing
            "update": adapter_bytes * adapters if optimizer == "adamw_torch" else 0,
        },
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: size for name, size in {**held, **moments[moment]}.items() if size}
    outside = {"CUDA context": CUDA_CONTEXT, "paged optimizer states": states if paged else 0}
    return MemoryBreakdown(parts, outside, moment)


def layer_activation_bytes(shape, method: str, rank: int, targets="all-linear") -> int:
    """Bytes a token that one layer keeps for its backward pass."""
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    key_value = hidden // shape.num_attention_heads * shape.num_key_value_heads
    norms = 2 * 4 * hidden  # each RMSNorm keeps its input in fp32
    chosen = _chosen(shape, targets)
    if method == "qlora":
        # x in bf16, which q, k and v share, and gate and up; o's is the attention's output, counted there
        inputs = {("q_proj", "k_proj", "v_proj"): hidden, ("gate_proj", "up_proj"): hidden, ("down_proj",): mlp}
        adapters = sum(2 * size for group, size in inputs.items() if set(group) & set(chosen))
    else:  # PEFT's dense layer casts x to the adapter's dtype, and autocast casts it back: a copy for each target
        adapters = sum(2 * i for i, _ in chosen.values())
    adapters += 2 * rank * len(chosen)  # A x, in bf16
    attention = 2 * (hidden + 2 * key_value) + 2 * hidden + 4 * shape.num_attention_heads  # q, k, v, output, logsumexp
    mlp_products = 3 * 2 * mlp  # gate, silu(gate), up
    return norms + adapters + attention + mlp_products


_STATE_BYTES = {"adamw_torch": 8, "adamw_8bit": 2, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2}  # a parameter


def _chosen(shape, targets) -> dict[str, tuple[int, int]]:
    linears = shape.linears()
    names = LINEARS if targets == "all-linear" else tuple(targets)
    if unknown := [name for name in names if name not in linears]:
        raise ValueError(f"unknown target {unknown[0]!r}: choose 'all-linear' or from {', '.join(LINEARS)}")
    return {name: linears[name] for name in names}
