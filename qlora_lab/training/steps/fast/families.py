"""The families of models that the fast step knows, and what one of them may have that LLaMA has not.

Most of a family's features can be seen in its modules: biases, fused projections, norms. The others are numbers in its
config, which change what transformers computes without leaving a trace in the modules. Here is listed which of them a
family's code in transformers reads. A model whose config sets another one is refused.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from qlora_lab.training.steps.fast.limits import NoFastStep

# Numbers in a config that change the computation, and the values that change nothing.
NEUTRAL = {
    "sliding_window": (None, 0),
    "no_rope_layers": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "logits_scaling": (None, 1.0),
    "attention_dropout": (None, 0.0),
    "resid_pdrop": (None, 0.0),
    "embd_pdrop": (None, 0.0),
    "use_bidirectional_attention": (None, False),
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long a row is


@dataclass(frozen=True)
class Family:
    """What a family may have that LLaMA has not.

    one_plus: its norms multiply by 1 + w. features: of NEUTRAL, those that its code reads and the fast step computes.
    windows_by_type: the sliding window is that of the layers whose `layer_types` says so; otherwise of all.
    """

    features: tuple[str, ...] = ()
    one_plus: bool = False
    windows_by_type: bool = False


GRANITE = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
FAMILIES = {
    "llama": Family(),
    "mistral": Family(("sliding_window",)),
    "qwen2": Family(("sliding_window",), windows_by_type=True),
    "qwen3": Family(("sliding_window",), windows_by_type=True),
    "phi3": Family(("sliding_window",)),
    "gemma3_text": Family(
        ("sliding_window", "query_pre_attn_scalar", "final_logit_softcapping"), one_plus=True, windows_by_type=True
    ),
    "gemma2": Family(
        ("sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        one_plus=True,
        windows_by_type=True,
    ),
    "smollm3": Family(("sliding_window", "no_rope_layers"), windows_by_type=True),
    "olmo2": Family(),
    "granite": Family(GRANITE),
}


def family_of(causal_lm) -> Family:
    """The model's family. Raises NoFastStep if it is none of FAMILIES, or has what its family has not."""
    config = causal_lm.config
    kind = config.model_type
    if kind not in FAMILIES:
        raise NoFastStep(f"it knows the families {', '.join(FAMILIES)}, and this model is a {kind}")
    family = FAMILIES[kind]
    directory = kind.removesuffix("_text")
    modelling = importlib.import_module(f"transformers.models.{directory}.modeling_{directory}")
    if getattr(modelling, type(causal_lm).__name__, None) is not type(causal_lm):
        raise NoFastStep(f"a {type(causal_lm).__name__} is not transformers' own class for {kind}")
    for name, neutral in NEUTRAL.items():
        value = getattr(config, name, None)
        if name not in family.features and value not in neutral:
            raise NoFastStep(f"this {kind}'s config sets {name} to {value}, which it does not compute for a {kind}")
    return family


def require_known_angles(config) -> None:
    """Raise NoFastStep unless the rotary angles of each kind of layer are of a type in ROPE_TYPES."""
    parameters = config.rope_parameters
    for one in [parameters] if "rope_type" in parameters else parameters.values():
        if one["rope_type"] not in ROPE_TYPES:
            raise NoFastStep(f"this model's rotary embedding is of type {one['rope_type']!r}")
        if one.get("partial_rotary_factor", 1.0) != 1.0:
            raise NoFastStep("this model rotates only a part of each head")
