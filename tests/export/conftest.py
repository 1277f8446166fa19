"""Runs of `train_qlora` as they lie on a disk, made by hand: random models of every family, with random adapters."""

import copy
import json
import pathlib

import pytest
import torch

from qlora_lab.adapters.files import add_fingerprint, base_fingerprint
from qlora_lab.adapters.peft_adapter import add_adapter
from qlora_lab.export.llama_cpp import is_here

needs_llama_cpp = pytest.mark.skipif(
    not is_here(), reason="no xllamacpp here (the extra `export`): nothing to hold files against"
)

WORDS = 320  # of the small vocabularies


@pytest.fixture(scope="session")
def small_tokenizer(tokenizer):
    """The bundled tokenizer with the first 320 tokens: its special tokens, all bytes, a few merges."""
    from transformers import PreTrainedTokenizerFast

    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    model = settings["model"]
    kept = {token: id for token, id in model["vocab"].items() if id < WORDS}
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    model["vocab"] = kept
    model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= kept.keys()]
    assert model["merges"], "no merge left: the tokens would all be bytes"
    small = copy.deepcopy(tokenizer.backend_tokenizer).from_str(json.dumps(settings))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=small, unk_token="<|endoftext|>", **names)
    made.chat_template = tokenizer.chat_template
    return made


def family_config(family: str, **changes):
    """A tiny config; sizes differ from one another, so that no two can be mixed up."""
    import transformers

    settings = {
        "vocab_size": WORDS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "architectures": None,
    }
    llama3 = {
        **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 32, "rope_theta": 10000.0},
    }
    gemma = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
    two_ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {"rope_type": "default", "rope_theta": 20000.0},
    }
    kinds = {
        "llama": ("Llama", {"tie_word_embeddings": False}),
        "llama tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 32}),
        "llama bias": ("Llama", {"attention_bias": True, "mlp_bias": False}),
        "llama 3": ("Llama", {"rope_parameters": llama3}),
        "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
        "qwen2": ("Qwen2", {}),
        "qwen3": ("Qwen3", {"head_dim": 32}),
        "gemma2": ("Gemma2", {**gemma, "num_hidden_layers": 3}),
        "gemma3": ("Gemma3Text", {**gemma, "num_hidden_layers": 7, "rope_parameters": two_ropes}),
    }
    name, own = kinds[family]
    del settings["architectures"]
    return getattr(transformers, f"{name}Config")(**{**settings, **own, **changes})


FAMILIES = [
    *("llama", "llama tied", "llama bias", "llama 3", "llama linear"),
    *("mistral", "qwen2", "qwen3", "gemma2", "gemma3"),
]


def random_model(config, seed: int = 0):
    """A model with nothing left at its initial 0 or 1: norms and biases matter, too."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def make_run(
    folder: pathlib.Path, config, tokenizer, method: str = "qlora", b: float = 0.2, kind: str = "lora", **settings
):
    """The folder of a run whose adapter is random, and its base's.

    Args:
        b: the size of B's numbers.
        kind: "lora", "rslora" or "dora".

    Returns:
        the run's folder
    """
    from qlora_lab.models.loading import load_model

    base = folder / "base"
    random_model(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model, _ = load_model(str(base), "nf4" if method == "qlora" else None, device="cpu", compute_dtype=torch.float32)
    adapted = add_adapter(model, rank=4, alpha=8, seed=1, kind=kind)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = b * torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.data *= 1 + b * torch.randn(parameter.shape, generator=generator)
    run = folder / "run"
    adapted.save_pretrained(run / "adapter")
    add_fingerprint(run / "adapter", base_fingerprint(adapted))
    said = {"model": str(base), "data": "orders", "method": method, "seed": "0", "eval_samples": "3"}
    (run / "run.json").write_text(json.dumps({**said, "compute_dtype": "float32", **settings}))
    return run


def trained_model(run: pathlib.Path):
    """The trained model as `train_qlora` had it: base in 4 bits, adapter beside it."""
    from peft import PeftModel

    from qlora_lab.models.loading import load_model

    said = json.loads((run / "run.json").read_text())
    bits = "nf4" if said["method"] == "qlora" else None
    model, _ = load_model(said["model"], bits, device="cpu", compute_dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(run / "adapter")).eval()
