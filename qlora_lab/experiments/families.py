"""The fast step on the families of models that it knows: are its losses right, and how fast is it at their sizes?

    losses   a small model of each family with random weights, its norms too: the losses of some steps in float32, and
             in bf16 with the plain step, with the fast step, and with the fast step and checkpointing
    speeds   the shapes of models that people train, with random weights in NF4, adapters on all linear layers, 512
             tokens a sample: `standard` is PEFT + bitsandbytes and `fast` ours, see `step_ways`; "trl" is SFTTrainer,
             and "unsloth, plain loop" what Unsloth's kernels do without a Trainer around them (`unsloth_speed`)

Times, peaks and the floor are those of `step_speed`.
"""

from __future__ import annotations

import argparse
import pathlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_lab.adapters.peft_adapter import add_adapter
from qlora_lab.arguments import Parser, count
from qlora_lab.experiments.gpu import empty_cache, require_gpu
from qlora_lab.experiments.record import Record
from qlora_lab.experiments.sft_trainer import standard_sft_steps
from qlora_lab.experiments.step_speed import PACKAGES, RATE, matrix_product_rate
from qlora_lab.experiments.step_ways import COMMON, LENGTH, SETTINGS, result, samples_of_steps
from qlora_lab.experiments.unsloth_process import WITHOUT_CHECKPOINTING, unsloth_runs
from qlora_lab.models.random_weights import build_random
from qlora_lab.training.batches import Batches
from qlora_lab.training.chat import TokenizedSample
from qlora_lab.training.loop import train, train_steps

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SMALL = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 1000,
}
EAGER = {"attn_implementation": "eager"}  # PyTorch's attention, transformers' choice, refuses a cap
FEATURES = {  # model: its type, and what its config sets, so that each feature is used within 200 tokens
    "llama": ("llama", {}),
    "llama 3": (
        "llama",
        {"rope_parameters": {**LLAMA3, "rope_theta": 10_000.0, "original_max_position_embeddings": 64}},
    ),
    "mistral": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {"sliding_window": 50}),
    "gemma2": ("gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 50, "attn_logit_softcapping": 0.5, **EAGER}),
    "gemma3": ("gemma3_text", {"sliding_window": 64, "sliding_window_pattern": 2, "query_pre_attn_scalar": 50}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 4.0,
        },
    ),
}
SHAPES = {  # the configs that their makers publish
    "Llama-3-8B": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            "max_position_embeddings": 131_072,
            "rope_parameters": {**LLAMA3, "rope_theta": 500_000.0, "original_max_position_embeddings": 8192},
        },
    ),
    "Qwen3-8B": (
        "qwen3",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
        },
    ),
    "Gemma-3-12B": (
        "gemma3_text",
        {
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "vocab_size": 262_208,
            "sliding_window": 1024,
            "query_pre_attn_scalar": 256,
        },
    ),
    "Phi-4": (
        "phi3",
        {
            "hidden_size": 5120,
            "intermediate_size": 17920,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 10,
            "vocab_size": 100_352,
            "max_position_embeddings": 16384,
            "original_max_position_embeddings": 16384,
        },
    ),
}
PLAIN_UNSLOTH = WITHOUT_CHECKPOINTING[1]
WAYS = ("standard", "fast", "trl", PLAIN_UNSLOTH)


def config(kind: str, **features):
    """A config of transformers, its embeddings not tied to its head where a family lets one choose."""
    common = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if not kind.startswith("gemma"):
        common["tie_word_embeddings"] = False
    return AutoConfig.for_model(kind, **common, **features)


# --- Losses -----------------------------------------------------------------------------------------------------------


def drawn_samples(vocabulary: int) -> list[TokenizedSample]:
    """32 samples of 20 to 199 random tokens, all but the first 8 of them targets."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(20, 200, (32,), generator=draw).tolist()
    rows = [torch.randint(3, vocabulary, (length,), generator=draw).tolist() for length in lengths]
    return [TokenizedSample(tuple(row), 8) for row in rows]


def small_model(name: str, device: str, compute_dtype: torch.dtype, shape: dict) -> nn.Module:
    """With adapters of rank 16 and norms that differ, the same numbers in each dtype."""
    empty_cache()
    kind, features = FEATURES[name]
    built = build_random(config(kind, **shape, **features), device=device, compute_dtype=torch.bfloat16)
    draw = torch.Generator(device).manual_seed(5)
    for p in built.parameters():
        if p.dim() == 1 and p.dtype == torch.bfloat16:
            p.data += 0.1 * torch.randn(p.shape, generator=draw, device=device).bfloat16()
    adapted = add_adapter(built, rank=16, alpha=32)
    if compute_dtype == torch.float32:
        for module in adapted.modules():
            if hasattr(module, "compute_dtype"):
                vars(module)["compute_dtype"] = torch.float32
        for p in adapted.parameters():
            if p.dtype == torch.bfloat16:
                p.data = p.data.float()
    return adapted


def losses_of(name: str, steps: int, device: str = "cuda", shape: dict = SMALL) -> dict[str, list[float]]:
    """The losses of a family's small model, by way; "float32" is what the others are held against."""
    found = {}
    for way, settings in {
        "float32": {"compute_dtype": torch.float32},
        "plain": {},
        "fast": {"fast": True},
        "fast, checkpointing": {"fast": True, "gradient_checkpointing": True},
    }.items():
        settings = {"compute_dtype": torch.bfloat16, "learning_rate": 1e-3, "progress": False, **settings}
        model = small_model(name, device, settings["compute_dtype"], shape)
        records = train(model, Batches(drawn_samples(shape["vocab_size"]), 8), steps=steps, **settings)
        found[way] = [record.loss for record in records]
    return found


def deviation(losses: list[float], exact: list[float]) -> float:
    """The largest relative difference of two runs' losses."""
    return max(abs(loss / other - 1) for loss, other in zip(losses, exact, strict=True))


def compare_losses(record: Record, steps: int) -> None:
    for name in FEATURES:
        if not record.rows("losses", model=name):
            record.add("losses", {"model": name, **losses_of(name, steps)})
        row = record.rows("losses", model=name)[0]
        plain, fast = (deviation(row[way], row["float32"]) for way in ("plain", "fast"))
        same = "the same losses" if row["fast"] == row["fast, checkpointing"] else "OTHER losses"
        print(
            f"{name:12} float32 {row['float32'][0]:.4f} -> {row['float32'][-1]:.4f}; off by at most: "
            f"plain {plain:.1e}, fast {fast:.1e}; checkpointing: {same}",
            flush=True,
        )


# --- Speeds -----------------------------------------------------------------------------------------------------------


def weights_in_products(model, vocabulary: int) -> int:
    """The weights of the decoder's linear layers and of the head."""
    decoder = model.get_decoder()
    linears = sum(
        module.in_features * module.out_features for module in decoder.modules() if hasattr(module, "in_features")
    )
    return linears + vocabulary * model.config.hidden_size


def compare_speeds(record: Record, steps: int, ways: tuple[str, ...], ranks: tuple[int, ...]) -> None:
    for name, (kind, features) in SHAPES.items():
        shape, vocabulary = config(kind, **features), features["vocab_size"]
        with torch.device("meta"):
            weights = weights_in_products(AutoModelForCausalLM.from_config(shape), vocabulary)
        for rank in ranks:
            rows = [
                key
                for who in WAYS
                if who in ways
                for batch, checkpointing in SETTINGS
                if not record.rows("speeds", **(key := key_of(name, rank, who, batch, checkpointing)))
            ]
            for run in made_runs(shape, vocabulary, rank, rows, steps):
                tokens = run["batch_size"] * LENGTH
                floor = 1e3 * (6 if run["gradient_checkpointing"] else 4) * weights * tokens / record.content[RATE]
                run |= {"weights": weights, "share_of_floor": floor / run["milliseconds"]}
                record.add("speeds", run)
                print(
                    f"{name:12} rank {rank:2} {run['who']:20} {run['batch_size']:2}"
                    f"{', checkpointing' if run['gradient_checkpointing'] else '':15} "
                    f"{run['tokens_per_second']:7.0f} tokens/s {run['share_of_floor']:5.0%} of the floor "
                    f"{run['peak_allocated'] / 1e9:6.2f} GB",
                    flush=True,
                )


def key_of(name: str, rank: int, who: str, batch: int, checkpointing: bool) -> dict:
    return {"model": name, "rank": rank, "who": who, "batch_size": batch, "gradient_checkpointing": checkpointing}


def made_runs(shape, vocabulary: int, rank: int, rows: list[dict], steps: int) -> Iterator[dict]:
    """These rows of one model and rank, each with its result. TRL's come after ours, since it changes the model."""
    model = None
    for row in (row for row in rows if row["who"] != PLAIN_UNSLOTH):
        if model is None:
            empty_cache()
            base = build_random(shape, device="cuda", compute_dtype=torch.bfloat16)
            model = add_adapter(base, rank=rank, alpha=rank)
        empty_cache()
        torch.cuda.reset_peak_memory_stats()
        who, batch, checkpointing = row["who"], row["batch_size"], row["gradient_checkpointing"]
        data = samples_of_steps(batch, vocabulary)
        if who == "trl":
            records = standard_sft_steps(model, data, batch, checkpointing, steps)
        else:
            settings = {"gradient_checkpointing": checkpointing, "fast": who == "fast", **COMMON}
            records = list(train_steps(model, Batches(data, batch), steps=steps, **settings))
        yield row | result(records)
    model = base = None
    theirs = [row for row in rows if row["who"] == PLAIN_UNSLOTH]
    settings = [(row["who"], row["batch_size"], row["gradient_checkpointing"]) for row in theirs]
    for run in unsloth_runs(settings, steps, shape, rank) if theirs else ():
        yield theirs[0] | run


# --- Command line -----------------------------------------------------------------------------------------------------


def add_flags(parser: Parser) -> None:
    parser.add_argument("--parts", default="losses,speeds", help="which of them (default: %(default)s)")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=f"for the speeds: {'; '.join(WAYS)}"
    )
    parser.add_argument("--ranks", type=count, nargs="+", default=[64, 16], help="for the speeds (default: 64 16)")
    parser.add_argument("--loss-steps", type=count, default=50, help="of each training (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=8, help="of each training that is timed (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, help="folder for a record, families-<gpu>.json")
    parser.add_argument("--continue-from", type=pathlib.Path, help="a record: its runs are kept and not made again")


def run(arguments: argparse.Namespace) -> None:
    require_gpu("the fast step runs on one")
    warnings.filterwarnings("ignore")
    record = Record.begin(
        "families",
        arguments.output,
        torch.cuda.get_device_name(),
        packages=PACKAGES,
        settings={
            "sequence_length": LENGTH,
            "steps": arguments.steps,
            "loss_steps": arguments.loss_steps,
            "small": SMALL,
        },
        continue_from=arguments.continue_from,
    )
    if RATE not in record.content:
        record.note(**{RATE: matrix_product_rate()})
    if "losses" in arguments.parts:
        compare_losses(record, arguments.loss_steps)
    if "speeds" in arguments.parts:
        compare_speeds(record, arguments.steps, tuple(arguments.ways), tuple(arguments.ranks))
