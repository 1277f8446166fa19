"""How much GPU memory does a training step take? Arithmetic on plain numbers: no torch, no GPU, no model.

A step passes several moments that can be its peak, and the estimate is the largest of them:

    forward    in the last layer while its largest product is computed, or when the logits have become a loss
    loss       the backward pass begins: the gradients of the loss and of the logits stand beside the log-softmax
    backward   in the last layer, with everything remembered, or in the first, with almost all gradients made
    update     gradients and optimizer states, and what the optimizer itself needs

Sizes are bytes. GB is 10^9, GiB is 2^30. Activations are those of transformers' LLaMA layers with SDPA (flash)
attention, PEFT's LoRA and bitsandbytes' `Linear4bit`. Each line below says which tensor it counts; its source is the
list of tensors that were alive at the peak of real steps, by the line of code that had asked for each ("explained" in
`data/records/memory-*.json`). No number is fitted. What is left over is printed by
`python -m qlora_lab.memory.record --compare`; where torch's allocator was told to let its segments grow
(`expandable_segments`), it is below 0.1 %, elsewhere the allocator rounds blocks up by as much as 1 MiB each.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS = ("full", "lora", "qlora")
CUBLAS_WORKSPACE = 32 * 2**20  # of an H100, for each thread that multiplies; torch's allocator holds it
CUDA_CONTEXT = 500_000_000  # what the driver takes before the first tensor; about 0.5 GB on recent cards


def _require_known(what: str, name: str, known, first: str | None = None) -> None:
    """Raise ValueError, in one sentence with near matches, unless `name` is in `known`."""
    if name in known:
        return
    options = [first, *known] if first else list(known)
    near = difflib.get_close_matches(str(name), options, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown {what} {name!r}: {hint}choose from {', '.join(options)}")


def _require_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}: it must be at least 1")


@dataclass(frozen=True)
class Shape:
    """A LLaMA-architecture model; the names are those of transformers' configs.

    biased: names of the linears that have a bias (Qwen2: q, k and v). head_dim: None for hidden_size / heads.

    Raises:
        ValueError: a size below 1, or head counts that do not divide.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False
    biased: tuple[str, ...] = ()
    head_dim: int | None = None

    def __post_init__(self):
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        _require_counts(**{name: getattr(self, name) for name in (*sizes, "vocab_size")})
        heads, key_value_heads = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(f"hidden_size {self.hidden_size} cannot be cut into {heads} heads: it must divide evenly")
        if heads % key_value_heads:
            raise ValueError(f"{heads} attention heads cannot share {key_value_heads} key-value heads evenly")

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of one layer's linears, by name."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        head = self.head_dim or hidden // self.num_attention_heads
        query, key_value = head * self.num_attention_heads, head * self.num_key_value_heads
        sizes = [(hidden, query), (hidden, key_value), (hidden, key_value), (query, hidden)]
        return dict(zip(LINEARS, [*sizes, (hidden, mlp), (hidden, mlp), (mlp, hidden)], strict=True))

    def linear_parameters(self) -> int:
        """Weights of all layers' linears: what QLoRA quantizes."""
        return self.num_hidden_layers * sum(i * o for i, o in self.linears().values())

    def embedding_parameters(self) -> int:
        """Embeddings and output head, which are one matrix when tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    def norm_parameters(self) -> int:
        """Two RMSNorms in each layer, and a last one."""
        return self.hidden_size * (2 * self.num_hidden_layers + 1)

    def bias_parameters(self) -> int:
        return self.num_hidden_layers * sum(self.linears()[name][1] for name in self.biased)

    def parameters(self) -> int:
        return self.linear_parameters() + self.embedding_parameters() + self.norm_parameters() + self.bias_parameters()


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
    "qwen2.5-7b": Shape(3584, 18944, 28, 28, 4, 152064, biased=("q_proj", "k_proj", "v_proj")),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "smollm2-360m": Shape(960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True),
    "smollm2-1.7b": Shape(2048, 8192, 24, 32, 32, 49152, tie_word_embeddings=True),
}

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


def shape_named(name: str) -> Shape:
    """`SHAPES[name]`, in any case of letters.

    Raises:
        ValueError: an unknown name; near matches are named.
    """
    _require_known("shape", name.lower(), SHAPES)
    return SHAPES[name.lower()]


def from_config(config) -> Shape:
    """The shape of a transformers config with LLaMA's names (Llama, Mistral, Qwen2, SmolLM2, ...).

    Raises:
        ValueError: a config of another architecture: GPT-2's, an encoder's, one with experts.
    """
    kind = type(config).__name__
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder with a decoder: only LLaMA-like decoders can be estimated")
    # encoders such as BERT have all the names, but LayerNorms
    if missing := [name for name in (*names, "rms_norm_eps") if getattr(config, name, None) is None]:
        raise ValueError(f"{kind} has no {missing[0]}: only LLaMA-like decoders can be estimated")
    if experts := [name for name in ("num_experts", "num_local_experts", "n_routed_experts") if hasattr(config, name)]:
        raise ValueError(f"{kind} has experts ({experts[0]}): only LLaMA-like decoders without can be estimated")
    hidden, mlp, layers, heads, vocabulary = (getattr(config, name) for name in names)
    biased = ["q_proj", "k_proj", "v_proj"] if getattr(config, "model_type", "") == "qwen2" else []
    biased += LINEARS[:4] if getattr(config, "attention_bias", False) else []
    biased += LINEARS[4:] if getattr(config, "mlp_bias", False) else []
    head = getattr(config, "head_dim", None)
    return Shape(
        hidden,
        mlp,
        layers,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        vocabulary,
        bool(config.tie_word_embeddings),
        tuple(biased),
        None if head is None or head * heads == hidden else head,
    )


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

    def table(self) -> str:
        """One line a part, largest first, in GB (10^9 bytes)."""
        lines = [f"{name:<24}{size / 1e9:9.3f} GB" for name, size in sorted(self.parts.items(), key=lambda p: -p[1])]
        lines += [f"{'peak allocated':<24}{self.peak_allocated / 1e9:9.3f} GB ({self.moment})"]
        lines += [f"{'+ ' + name:<24}{size / 1e9:9.3f} GB" for name, size in self.outside.items() if size]
        return "\n".join([*lines, f"{'total':<24}{self.total / 1e9:9.3f} GB"])


def trainable_parameters(shape, rank: int, targets="all-linear") -> int:
    """PEFT's count: A is (rank, in_features) and B (out_features, rank) for every target in every layer.

    Raises:
        ValueError: a rank below 1, an unknown target.
    """
    _require_counts(rank=rank)
    chosen = _chosen(shape, targets)
    return shape.num_hidden_layers * sum(rank * (i + o) for i, o in chosen.values())


def bits_per_parameter(block_size: int = 64, double: bool = True, scale_block_size: int = 256) -> float:
    """4 bits and the share of the scale: fp32 for each block, or 8 bits and an fp32 for each block of scales."""
    return 4 + (8 / block_size + 32 / (block_size * scale_block_size) if double else 32 / block_size)


def kbit_preparation_bytes(shape) -> int:
    """What `peft.prepare_model_for_kbit_training` adds to a 4-bit model in bf16: every 16-bit parameter becomes fp32.

    Those are the embeddings, the output head, the norms and the biases. `finetuning.add_adapter` does without it.
    """
    return 2 * (shape.embedding_parameters() + shape.norm_parameters() + shape.bias_parameters())


def optimizer_state_bytes(tensors: list[int], optimizer: str, parameter_bytes: int = 4) -> tuple[int, int]:
    """(bytes in torch's allocator, bytes in managed memory) of AdamW's two states.

    Args:
        tensors: elements of each trained tensor.
        optimizer: transformers' name.
        parameter_bytes: of a trained number; torch's own states have its dtype, bitsandbytes' are fp32 or 8 bits.
    """
    _require_known("optimizer", optimizer, OPTIMIZERS)
    held = managed = 0
    for elements in tensors:
        if optimizer == "adamw_torch":
            states, scales = 2 * parameter_bytes * elements, 0
        elif optimizer.endswith("8bit") and elements >= _MIN_8BIT:
            states, scales = 2 * elements, 2 * 4 * -(-elements // 256)  # an fp32 scale for each block of 256
        else:
            states, scales = 2 * 4 * elements, 0
        paged = optimizer.startswith("paged") and elements >= _MIN_PAGED
        held, managed = held + scales + (0 if paged else states), managed + (states if paged else 0)
    return held, managed


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
    full_precision: str = "float32",
    loss_chunk: int | None = None,
    update_in_backward: bool = False,
    embeddings_on_cpu: bool = False,
    preset: str | None = None,
) -> MemoryBreakdown:
    """Predict the memory of one training step on a GPU.

    Args:
        shape: `SHAPES["llama-7b"]`, or anything with the attributes and methods of `Shape`.
        method: "full" (every parameter is trained), "lora" (16-bit base) or "qlora" (4-bit base).
        rank, targets: of the adapters; targets is "all-linear", or one or a list of names from `LINEARS`.
        batch_size, sequence_length: samples in one forward pass, and tokens in each.
        gradient_checkpointing: keep each layer's input only, and compute the layer again in the backward pass.
        optimizer: transformers' name.
        adapter_dtype: "float32" (PEFT's default, under bf16 autocast) or "bfloat16" (without autocast); gradients
            follow it.
        quant_type: "nf4" or "fp4": the same size.
        double_quant: 4.127 instead of 4.5 bits a quantized parameter.
        full_precision: of "full". "float32": fp32 weights and gradients, bf16 autocast. "mixed": bf16 weights and
            gradients, and fp32 master weights, updated one tensor after the other (`record.MasterWeights`). Both take
            16 bytes a parameter, AdamW's fp32 states included.
        loss_chunk, update_in_backward, embeddings_on_cpu: as in `finetuning.Preset` and `finetuning.train_steps`.
        preset: one of `PRESETS`, which sets adapter_dtype and the three above.

    Returns:
        parts by name: "base weights" (of the linears), "quantization constants", "embeddings and head", "norms",
        "biases", "master weights", "adapters", "gradients", "optimizer states", "bf16 copies" (autocast's),
        "activations", "logits and loss", "dequantized weight" (one, while it is used), "update" (what the optimizer
        needs for itself), "cuBLAS workspace"; only those that are not 0 at the peak.

    Raises:
        ValueError: an unknown method, optimizer, dtype, target or preset; a rank, length or batch below 1.
    """
    if preset is not None:
        _require_known("preset", preset, PRESETS)
        knobs = {"adapter_dtype": adapter_dtype, "loss_chunk": loss_chunk, "update_in_backward": update_in_backward}
        knobs = {**knobs, "embeddings_on_cpu": embeddings_on_cpu, **PRESETS[preset]}
        adapter_dtype, loss_chunk = knobs["adapter_dtype"], knobs["loss_chunk"]
        update_in_backward, embeddings_on_cpu = knobs["update_in_backward"], knobs["embeddings_on_cpu"]
    _require_known("method", method, METHODS)
    _require_known("adapter_dtype", adapter_dtype, ("float32", "bfloat16"))
    _require_known("quant_type", quant_type, ("nf4", "fp4"))
    _require_known("full_precision", full_precision, ("float32", "mixed"))
    _require_known("optimizer", optimizer, OPTIMIZERS)
    _require_counts(rank=rank, batch_size=batch_size, sequence_length=sequence_length)
    if loss_chunk is not None:
        _require_counts(loss_chunk=loss_chunk)
    full, autocast = method == "full", (full_precision if method == "full" else adapter_dtype) == "float32"
    masters = full and not autocast
    tensors = trained_tensors(shape, method, rank, targets)
    trained, trained_bytes = sum(tensors), 4 if autocast else 2
    layers, hidden, vocabulary = shape.num_hidden_layers, shape.hidden_size, shape.vocab_size
    tokens = batch_size * sequence_length
    stream = 4 if full and autocast else 2  # bytes of a number that goes from layer to layer

    held = model_parts(shape, method, double_quant, full_precision)
    if embeddings_on_cpu and not shape.tie_word_embeddings:
        held["embeddings and head"] //= 2
    held["master weights"] = 4 * trained if masters else 0
    held["adapters"] = 0 if full else trained_bytes * trained
    # torch's AdamW keeps its states in the parameters' dtype, in fp32 for master weights
    held["optimizer states"], managed = optimizer_state_bytes(tensors, optimizer, 4 if full else trained_bytes)
    held["cuBLAS workspace"] = 2 * CUBLAS_WORKSPACE  # of the forward pass's thread and of the backward pass's

    # autocast casts each fp32 matrix once, and keeps the copy until the forward pass ends or the backward pass used it
    head = vocabulary * hidden if full else 0
    in_layers = shape.linear_parameters() + shape.bias_parameters() if full else trained
    copies = 2 * (in_layers + head) if autocast else 0
    layer = tokens * layer_activation_bytes(shape, method, rank, targets, autocast)
    layer_input = tokens * stream * hidden
    of_all_layers = layers * (layer_input if gradient_checkpointing else layer)
    if not full and not gradient_checkpointing:
        of_all_layers -= tokens * (4 * hidden + 4)  # the first norm: nothing before it is trained
    remembered = of_all_layers + tokens * _end_bytes(shape, full, autocast)
    # Checkpointing makes the embeddings' output a leaf that needs a gradient (`enable_input_require_grads`). Both stay
    # until the next step's loss takes the place of this one's.
    leaf = 2 * layer_input if gradient_checkpointing and not full else 0
    logits = batch_size * (sequence_length - 1) * vocabulary  # the last token has no next one
    if loss_chunk is not None:
        logits = min(logits, loss_chunk * vocabulary)
        remembered += tokens * 2 * hidden  # the last hidden states, from which each chunk's logits are computed again

    outside_layers = shape.embedding_parameters() + hidden if full else 0  # with the last norm
    of_a_layer = (trained - outside_layers) // layers  # trained numbers
    later = trained - of_a_layer - (vocabulary * hidden if full and not shape.tie_word_embeddings else 0)
    in_float32 = 4 * max(tensors) if masters else 0  # the gradient of the tensor whose master weights are updated
    one = trained_bytes * max(tensors) + in_float32 if update_in_backward else 0  # the only gradient at a time
    # torch's AdamW computes the denominators of all parameters at once; bitsandbytes' needs nothing
    denominators = (4 * max(tensors) if masters else trained_bytes * trained) if optimizer == "adamw_torch" else 0
    dequantized = dequantization_bytes(shape, double_quant) if method == "qlora" else 0
    # in a layer's last linear (down), beside what the layer keeps: the stream around the MLP and the linear's result;
    # in the backward pass the gradient of the layer's output, and the same times alpha / rank
    around = gradient = 2 * layer_input
    if method == "lora" and autocast and "down_proj" in _chosen(shape, targets):
        around += tokens * (2 + 4) * shape.intermediate_size  # x before PEFT's cast, and in fp32
    x = tokens * 2 * (hidden + shape.intermediate_size)  # of gate and up, and of down

    moments = [
        (
            "forward",
            {
                "activations": of_all_layers + leaf + around + (x if gradient_checkpointing else 0),
                "bf16 copies": copies - 2 * head * autocast,
                "dequantized weight": dequantized,
            },
        ),
        (
            "forward",
            {
                "activations": remembered + leaf,
                "bf16 copies": copies,
                "logits and loss": (2 + 4 + 4) * logits,  # the head's in bf16, the same in fp32, their log-softmax
            },
        ),
        (
            "loss",
            {
                "activations": remembered,
                "bf16 copies": 2 * head * autocast if gradient_checkpointing else copies,
                "logits and loss": (4 + 4 + 4) * logits,  # log-softmax, its gradient, the logits' gradient
            },
        ),
        (
            "backward",
            {
                "activations": of_all_layers + gradient + (layer + around if gradient_checkpointing else 0),
                "bf16 copies": 2 * of_a_layer * autocast if gradient_checkpointing else copies,
                "dequantized weight": dequantized,
                "gradients": one,
            },
        ),
        (
            "backward",
            {
                "activations": layer_input + layer + around + gradient,
                "bf16 copies": 2 * of_a_layer * autocast,
                "dequantized weight": dequantized,
                "gradients": one if update_in_backward else trained_bytes * later,
            },
        ),
        (
            "update",
            {
                "activations": leaf,
                "gradients": 0 if update_in_backward else trained_bytes * trained,
                "update": 0 if update_in_backward else in_float32 + denominators,
            },
        ),
    ]
    moment, at_peak = max(moments, key=lambda candidate: sum(candidate[1].values()))
    parts = {name: size for name, size in {**held, **at_peak}.items() if size}
    outside = {"CUDA context": CUDA_CONTEXT, "paged optimizer states": managed}
    return MemoryBreakdown(parts, outside, moment)


def model_parts(
    shape, method: str = "qlora", double_quant: bool = True, full_precision: str = "float32"
) -> dict[str, int]:
    """Bytes of the loaded model by part, before anything is added to train it: 4-bit linears, or 16 or 32 bits."""
    _require_known("method", method, METHODS)
    quantized = method == "qlora"
    each = 4 if method == "full" and full_precision == "float32" else 2
    constants = sum(_quantization_constants(i * o, double_quant) for i, o in shape.linears().values())
    return {
        "base weights": shape.linear_parameters() // 2 if quantized else each * shape.linear_parameters(),
        "quantization constants": shape.num_hidden_layers * constants if quantized else 0,
        "embeddings and head": each * shape.embedding_parameters(),
        "norms": each * shape.norm_parameters(),
        "biases": each * shape.bias_parameters(),
    }


def _quantization_constants(elements: int, double: bool) -> int:
    """Of one 4-bit linear, blocks of 64: bitsandbytes' `QuantState`, whose tables every linear has for itself."""
    blocks = -(-elements // 64)
    code = 16 * 4  # the 16 values of NF4, in fp32
    if not double:
        return 4 * blocks + code  # a scale in fp32 for each block
    # a scale in 8 bits, an fp32 scale for 256 of those, the 256 values of the 8-bit code, the scales' mean
    return blocks + 4 * -(-blocks // 256) + code + 256 * 4 + 4


def dequantization_bytes(shape, double_quant: bool = True) -> int:
    """bitsandbytes dequantizes one whole weight to bf16 for each product, forward and backward; here of the largest."""
    elements = max(i * o for i, o in shape.linears().values())
    scales = 2 * 4 * elements // 64 if double_quant else 0  # in fp32 again, before and after their mean is added
    return 2 * elements + scales


def trained_tensors(shape, method: str, rank: int = 64, targets="all-linear") -> list[int]:
    """Elements of every tensor that training changes: A and B of each target, or all the model's parameters."""
    linears, layers = shape.linears(), shape.num_hidden_layers
    if method != "full":
        _require_counts(rank=rank)
        return layers * [rank * side for sizes in _chosen(shape, targets).values() for side in sizes]
    layer = [i * o for i, o in linears.values()] + [linears[name][1] for name in shape.biased]
    matrices = [shape.vocab_size * shape.hidden_size] * (1 if shape.tie_word_embeddings else 2)
    return layers * layer + matrices + (2 * layers + 1) * [shape.hidden_size]


def layer_activation_bytes(shape, method: str, rank: int = 64, targets="all-linear", autocast: bool = True) -> int:
    """Bytes a token that one layer keeps for its backward pass.

    Args:
        autocast: the trained parameters are fp32, and autocast casts them and what they meet to bf16.
    """
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    linears, chosen = shape.linears(), _chosen(shape, "all-linear" if method == "full" else targets)
    query, key_value = linears["q_proj"][1], linears["k_proj"][1]
    copied = autocast and method != "qlora"  # see below
    # RMSNorm computes in fp32: its input, a root for each token; and the normalized input where its weight is trained
    norms = 2 * (4 * hidden + 4 + (0 if method != "full" else 4 * hidden if autocast else 2 * hidden))
    # the inputs x of the trained linears, in bf16
    if copied and method == "lora":  # PEFT's dense layer casts x to fp32 and autocast casts it back: a copy for each
        inputs = sum(2 * i for i, _ in chosen.values())
    elif copied:  # the residual stream is fp32: a copy for each linear behind a norm; the others' x are bf16 already
        inputs = 5 * 2 * hidden + 2 * mlp
    else:  # q, k and v share theirs, and gate and up; o's is the attention's output, which attention keeps
        groups = {("q_proj", "k_proj", "v_proj"): hidden, ("gate_proj", "up_proj"): hidden, ("down_proj",): mlp}
        inputs = sum(2 * size for group, size in groups.items() if set(group) & set(chosen))
    low_rank = 0 if method == "full" else 2 * rank * len(chosen)  # A x, in bf16
    attention = 2 * (query + 2 * key_value + query) + 4 * shape.num_attention_heads  # q, k, v, output; logsumexp
    products = 3 * 2 * mlp  # gate, silu(gate), up
    return norms + inputs + low_rank + attention + products


def _end_bytes(shape, full: bool, autocast: bool) -> int:
    """Bytes a token that are kept outside the layers: the last norm's, the head's input, rotary cosines and sines."""
    stream = 4 if full and autocast else 2
    head_dim = shape.linears()["q_proj"][1] // shape.num_attention_heads
    last_norm = 4 * shape.hidden_size + 4  # its input in fp32
    if full:  # normalized input, and the trained head's x
        last_norm += (stream + 2) * shape.hidden_size
    return last_norm + 2 * stream * head_dim


OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")  # transformers' names
_MIN_8BIT = 4_096  # bitsandbytes' `min_8bit_size`: states of smaller tensors are fp32
_MIN_PAGED = 100_000  # elements: bitsandbytes' `get_state_buffer` does not page smaller ones


def _chosen(shape, targets) -> dict[str, tuple[int, int]]:
    linears = shape.linears()
    names = LINEARS if targets == "all-linear" else (targets,) if isinstance(targets, str) else tuple(targets)
    if not names:
        raise ValueError(f"no target: choose 'all-linear' or from {', '.join(LINEARS)}")
    for name in names:
        _require_known("target", name, linears, first="all-linear")
    return {name: linears[name] for name in names}
