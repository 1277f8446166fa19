"""Shapes of LLaMA-like models: sizes alone, by name or from a config."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from qlora_lab.facts import LINEARS


def require_known(what: str, name: str, known, first: str | None = None) -> None:
    """Raise ValueError, in one sentence with near matches, unless `name` is in `known`."""
    if name in known:
        return
    options = [first, *known] if first else list(known)
    near = difflib.get_close_matches(str(name), options, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown {what} {name!r}: {hint}choose from {', '.join(options)}")


def require_counts(**counts: int) -> None:
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
        require_counts(**{name: getattr(self, name) for name in (*sizes, "vocab_size")})
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

    def experts(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of one expert's fused parameters, by name; {} unless it is a mixture."""
        return {}

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

    def router_parameters(self) -> int:
        """Weights that send tokens to experts; 0 unless it is a mixture."""
        return 0

    def parameters(self) -> int:
        return (
            self.linear_parameters()
            + self.embedding_parameters()
            + self.norm_parameters()
            + self.bias_parameters()
            + self.router_parameters()
        )


@dataclass(frozen=True)
class MixtureShape(Shape):
    """A decoder with attention like a LLaMA's, and experts in the place of its MLP. intermediate_size: of one expert.

    num_experts, experts_per_token: in each layer, and how many of them a token is sent to.
    query_key_norms: numbers in the norms of a layer's queries and keys (Qwen 3, OLMoE).
    expert_biases: whether the router and the experts have biases, and each head a sink (gpt-oss).
    adapts_experts: whether PEFT's "all-linear" adapts experts and router, as in transformers 4, where they were linear.

    Gate and up are one now, of twice the rank.
    """

    num_experts: int = 8
    experts_per_token: int = 2
    query_key_norms: int = 0
    expert_biases: bool = False
    adapts_experts: bool = True

    def __post_init__(self):
        super().__post_init__()
        require_counts(num_experts=self.num_experts, experts_per_token=self.experts_per_token)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Attention's: the experts are apart."""
        return {name: sizes for name, sizes in super().linears().items() if name in LINEARS[:4]}

    def experts(self) -> dict[str, tuple[int, int]]:
        hidden, mlp = self.hidden_size, self.intermediate_size
        return {"gate_up_proj": (hidden, 2 * mlp), "down_proj": (mlp, hidden)}

    def linear_parameters(self) -> int:
        each = sum(i * o for i, o in self.experts().values())
        return super().linear_parameters() + self.num_hidden_layers * self.num_experts * each

    def norm_parameters(self) -> int:
        return super().norm_parameters() + self.num_hidden_layers * self.query_key_norms

    def bias_parameters(self) -> int:
        of_experts = self.num_experts * (1 + sum(o for _, o in self.experts().values())) + self.num_attention_heads
        return super().bias_parameters() + self.num_hidden_layers * (of_experts if self.expert_biases else 0)

    def router_parameters(self) -> int:
        return self.num_hidden_layers * self.num_experts * self.hidden_size


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


def shape_named(name: str) -> Shape:
    """`SHAPES[name]`, in any case of letters.

    Raises:
        ValueError: an unknown name; near matches are named.
    """
    require_known("shape", name.lower(), SHAPES)
    return SHAPES[name.lower()]


def from_config(config) -> Shape:
    """The shape of a transformers config with LLaMA's names (Llama, Mistral, Qwen2, SmolLM2, ...).

    Of mixtures: Mixtral, Qwen 3 MoE, OLMoE and gpt-oss.

    Raises:
        ValueError: a config of another architecture: GPT-2's, an encoder's, another with experts.
    """
    kind = type(config).__name__
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder with a decoder: only LLaMA-like decoders can be estimated")
    # encoders such as BERT have all the names, but LayerNorms
    if missing := [name for name in (*names, "rms_norm_eps") if getattr(config, name, None) is None]:
        raise ValueError(f"{kind} has no {missing[0]}: only LLaMA-like decoders can be estimated")
    if experts := [name for name in ("num_experts", "num_local_experts", "n_routed_experts") if hasattr(config, name)]:
        return _mixture(config, experts[0])
    return _shape(config)


def _shape(config) -> Shape:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
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


def _mixture(config, count: str) -> MixtureShape:
    """The shape of a config with experts. count: its name for their number."""
    kind, known = getattr(config, "model_type", ""), ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
    if kind not in known or getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"{type(config).__name__} has experts ({count}) in a way that cannot be estimated: of mixtures only "
            f"{', '.join(known)} can, and with experts in each layer"
        )
    shape = _shape(config)
    head = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    norms = {"qwen3_moe": 2 * head, "olmoe": head * (shape.num_attention_heads + shape.num_key_value_heads)}
    values = dataclasses.asdict(shape)
    if kind == "qwen3_moe":
        values["intermediate_size"] = config.moe_intermediate_size
    return MixtureShape(
        **values,
        num_experts=getattr(config, count),
        experts_per_token=config.num_experts_per_tok,
        query_key_norms=norms.get(kind, 0),
        expert_biases=kind == "gpt_oss",
        adapts_experts=kind != "gpt_oss",
    )
