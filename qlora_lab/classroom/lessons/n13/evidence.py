"""What is said about QLoRA, put to the test: a function for each claim, which prints what it finds.

A claim is put to one or more cases, each of which says yes or no. Sources are named in the lesson, beside the claims.

The module is long because eighteen claims stand in it, in the lesson's order: each is read alone.
"""

from __future__ import annotations

import atexit
import inspect
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qlora_lab.classroom.samples import bundled_weight, sample
from qlora_lab.memory import (
    SHAPES,
    bits_per_parameter,
    kbit_preparation_bytes,
    optimizer_state_bytes,
    trained_tensors,
)
from qlora_lab.places import RECORDS
from qlora_lab.quantization import INT4, NF4, entropy, error_report, quantize, quantize_affine

GB = 1e9  # 10^9 bytes
VOTES = ("true", "depends", "false")


@dataclass(frozen=True)
class Evidence:
    """cases: whether the claim holds, case by case. values: what was found, for the text."""

    cases: tuple[bool, ...]
    values: dict[str, Any]

    @property
    def verdict(self) -> str:
        """ "true" if all cases agree with the claim, "false" if none does, "depends" if some do."""
        return "true" if all(self.cases) else "depends" if any(self.cases) else "false"


def found(*cases: object, **values: Any) -> Evidence:
    return Evidence(tuple(map(bool, cases)), values)


THEMES = {
    "Numbers": {1: "codes are used equally", 2: "NF4 beats INT4", 3: "double quantization: 3 GB at 65B"},
    "Memory": {4: "7B trains in 3.7 GB", 5: "65B on one 48 GB card", 6: "paging: never out of memory"},
    "Libraries": {
        7: "load_in_4bit=True is NF4",
        8: "4,194,304 trainable",
        9: "QLoRA on a CPU",
        10: "trust_remote_code is needed",
        11: "no training without preparing",
    },
    "Training": {
        12: "gradients are exact",
        13: "20–30 % slower",
        14: "checkpointing: −50 %, −20 %",
        15: "pad = end, that is that",
    },
    "Afterwards": {16: "costs under 2 %", 17: "merged into 4 bits, nothing is lost", 18: "works with most models"},
}
SHORT = {number: text for claims in THEMES.values() for number, text in claims.items()}


def judge(votes: dict[int, Any], tests: dict[int, Callable[[], Evidence]]) -> dict[int, Evidence]:
    """Run the test of each claim, and say its verdict beside the vote, if one was cast.

    votes: by claim, "true", "depends" or "false"; anything else is no vote. tests: by claim.
    """
    results = {}
    for claim, test in tests.items():
        print(f"{claim}: {SHORT[claim]}?")
        results[claim] = test()
        vote = votes.get(claim)
        cast = f"you voted {vote}" if vote in VOTES else "you did not vote"
        print(f"→ claim {claim}: {results[claim].verdict} ({cast})\n")
    return results


@cache
def record(name: str) -> dict[str, Any]:
    """What was measured once on one H100."""
    path = RECORDS / f"{name}-nvidia-h100-80gb-hbm3.json"
    return json.loads(path.read_text(encoding="utf-8"))


# --- Numbers ----------------------------------------------------------------------------------------------------------


def codes_are_used_equally() -> Evidence:
    """bitsandbytes quantizes a million Gaussian numbers; count the half bytes."""
    from bitsandbytes.functional import quantize_4bit

    packed, _ = quantize_4bit(sample("Gaussian", 2**20), blocksize=64, quant_type="nf4")
    codes = torch.cat([packed.flatten() >> 4, packed.flatten() & 15])
    usage = torch.bincount(codes.int(), minlength=16) / len(codes)
    rarest, most = usage.min().item(), usage.max().item()
    print(f"rarest code {rarest:.1%}, most frequent {most:.1%}, entropy {entropy(usage):.2f} of 4 bits")
    return found(rarest > 0.06, rarest=rarest, most=most)


def nf4_beats_int4() -> Evidence:
    """Relative RMS error in blocks of 64, on three kinds of numbers, beside two kinds of INT4."""
    data = {"Gaussian": sample("Gaussian", 2**20), "uniform": sample("uniform", 2**20)}
    data["real weights"] = bundled_weight("model.embed_tokens.weight")[::8].float()  # lesson 04's rows
    print(f"{'error':<14}{'NF4':>14}{'INT4':>14}{'affine INT4':>14}")
    errors, bits = {}, []
    for name, x in data.items():
        reports = [error_report(x, q) for q in (quantize(x, NF4), quantize(x, INT4), quantize_affine(x, 4, 64))]
        errors[name], bits = [r.relative_rms for r in reports], [r.bits_per_parameter for r in reports]
        print(f"{name:<14}" + "".join(f"{error:>14.4f}" for error in errors[name]))
    print(f"{'bits a weight':<14}" + "".join(f"{b:>14g}" for b in bits))
    return found(*(nf4 < other for nf4, *others in errors.values() for other in others), errors=errors)


def three_gigabytes_at_65b() -> Evidence:
    """The bits of the scales with and without double quantization, times the weights of 65B's linear layers."""
    bits = bits_per_parameter(double=False) - bits_per_parameter()
    weights = SHAPES["llama-65b"].linear_parameters()
    saved = weights * bits / 8 / GB
    print(f"{bits_per_parameter(double=False)} − {bits_per_parameter():.3f} = {bits:.3f} bits")
    print(f"of {weights / 1e9:.1f} billion weights in linear layers: {saved:.2f} GB")
    return found(0.36 < bits < 0.38, 2.5 < saved < 3.5, bits=bits, saved=saved)


# --- Memory -----------------------------------------------------------------------------------------------------------


def seven_billion_in_3_7_gb() -> Evidence:
    """Loaded weights by arithmetic, then one recorded step of LLaMA-7B."""
    each = {}
    for name in ("llama-65b", "llama-7b", "llama-3-8b", "smollm2-135m"):
        shape = SHAPES[name]
        four_bits = shape.linear_parameters() * bits_per_parameter() / 8
        loaded = four_bits + 2 * (shape.embedding_parameters() + shape.norm_parameters())
        each[name] = loaded / shape.parameters()
        print(f"{name:<14}{loaded / GB:>7.2f} GB loaded, {each[name]:.2f} bytes a parameter")
    run = record("memory")["runs"][0]
    peak = run["measured"]["peak_allocated"] / GB
    step = f"{run['batch_size']} × {run['sequence_length']} tokens, rank {run['rank']}"
    print(f"7B, one step of {step}: {peak:.2f} GB, optimizer states not counted")
    return found(peak < 3.8, peak=peak, each=each, run=run)


def biggest_on_48_gb() -> Evidence:
    """Steps of 65B for which the allocator of an H100 was held to what a smaller card has.

    Paged optimizer states and the driver's context lie outside of the allocator. So there are two cases: what the
    allocator held, and all of it, on a card that has 48 GiB, as those called "48 GB" do.
    """
    big = [row for row in record("memory")["caps"] if row["shape"] == "llama-65b"]
    for row in big:
        got = f"{row['measured']['peak_reserved'] / GB:.1f} GB reserved" if "measured" in row else "out of memory"
        print(f"{row['card_gb']} GB, {row['preset']:<14}{got}")
    (run,) = (row["measured"] for row in big if (row["card_gb"], row["preset"]) == (48, "standard"))
    reserved, states = run["peak_reserved"] / GB, run["managed_bytes"] / GB
    whole, card = reserved + states + 0.5, 48 * 2**30 / GB
    print(f"48 GB, standard: with {states:.1f} GB of optimizer states and 0.5 for the driver {whole:.1f} GB")
    print(f"a card of 48 GiB has {card:.1f} GB")
    return found("measured" in next(row for row in big if row["card_gb"] == 48), whole < card, whole=whole, card=card)


def paging_prevents_out_of_memory() -> Evidence:
    """All recorded runs on small cards used paged AdamW. Then: which states does bitsandbytes page at all?"""
    from bitsandbytes.optim.optimizer import Optimizer8bit

    caps = record("memory")["caps"]
    failed = [row for row in caps if "out_of_memory" in row]
    print(f"{len(failed)} of {len(caps)} runs ended out of memory, all with {caps[0]['optimizer']}")
    source = inspect.getsource(Optimizer8bit.get_state_buffer)
    print(next(line.strip() for line in source.splitlines() if "numel" in line), "# then the state stays on the GPU")
    shares = []
    for rank, targets in ((64, "all-linear"), (16, ["q_proj", "k_proj", "v_proj", "o_proj"])):
        tensors = trained_tensors(SHAPES["llama-7b"], "qlora", rank, targets)
        stay, paged = optimizer_state_bytes(tensors, "paged_adamw_32bit")
        shares.append(paged / (stay + paged))
        print(f"7B, rank {rank}, {targets}: {(stay + paged) / GB:.2f} GB of states, {shares[-1]:.0%} paged")
    return found(not failed, *(share == 1 for share in shares), failed=len(failed), runs=len(caps), shares=shares)


# --- Libraries --------------------------------------------------------------------------------------------------------


def four_bits_are_nf4() -> Evidence:
    from transformers import BitsAndBytesConfig

    default = BitsAndBytesConfig(load_in_4bit=True)
    kind, double = default.bnb_4bit_quant_type, default.bnb_4bit_use_double_quant
    print(f"{kind}, double quantization {double}, computing in {default.bnb_4bit_compute_dtype}")
    return found(kind == "nf4", double=double, dtype=default.bnb_4bit_compute_dtype)


def four_million_trainable() -> Evidence:
    """PEFT on a LLaMA-7B without a byte of weights: on the meta device, tensors have shapes and nothing else."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        llama: Any = LlamaForCausalLM(LlamaConfig())  # the defaults are LLaMA-7B's
    counted = {}
    for rank, targets in ((16, ["q_proj", "k_proj", "v_proj", "o_proj"]), (8, ["q_proj", "v_proj"])):
        adapted = get_peft_model(llama, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
        counted[rank], total = adapted.get_nb_trainable_parameters()
        print(f"r = {rank:>2}, {targets}: {counted[rank]:,} of {total:,} = {counted[rank] / total:.4%}")
        llama = adapted.unload()
    return found(counted[16] == 4_194_304, counted=counted)


@cache
def losses_on_a_cpu() -> tuple[float, ...]:
    """Three steps on one sentence: the bundled model in 4 bits, on the CPU, not prepared for training."""
    from qlora_lab.finetuning import add_adapter, load_model

    model, tokenizer = load_model("smollm2-135m-instruct", quantization="nf4", device="cpu")
    model = add_adapter(model, rank=8, alpha=16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = tokenizer("Tutorials are right until somebody runs them.", return_tensors="pt")
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return tuple(losses)


def falls(losses: tuple[float, ...]) -> bool:
    return all(after < before for before, after in zip(losses, losses[1:], strict=False))


def trains_on_a_cpu() -> Evidence:
    print(f"loss falls at every step, on the CPU, in 4 bits: {falls(losses_on_a_cpu())}")
    return found(falls(losses_on_a_cpu()))


def strangers_code_is_needed() -> Evidence:
    """Where LLaMA's code is, and what the switch does with a model folder that has a Python file."""
    from transformers import AutoConfig, LlamaForCausalLM

    print("LLaMA's code is in", LlamaForCausalLM.__module__)
    with tempfile.TemporaryDirectory() as folder:
        stranger = Path(folder) / "stranger"
        stranger.mkdir()
        (stranger / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "mine.Mine"}}), encoding="utf-8")
        (stranger / "mine.py").write_text(
            "raise SystemExit('I could have read your files and your keys.')\n", encoding="utf-8"
        )
        try:
            AutoConfig.from_pretrained(stranger, trust_remote_code=False)
        except ValueError as error:
            refused = "contains custom code which must be executed" in str(error)
    print(f"a folder with code of its own, trust_remote_code=False: {'refused' if refused else 'loaded'}")
    return found(not LlamaForCausalLM.__module__.startswith("transformers."), refused=refused)


def preparation_is_needed() -> Evidence:
    """First backward passes without it: plain, and with both kinds of gradient checkpointing. Then what it costs."""
    from peft import LoraConfig, get_peft_model

    from qlora_lab.finetuning import build_random
    from qlora_lab.memory import Shape

    fails = {}
    for kind in ("no", "new", "old (reentrant)"):
        small = build_random(Shape(64, 128, 2, 4, 4, vocab_size=1000), device="cpu", compute_dtype=torch.float32)
        model: Any = get_peft_model(small, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
        if kind != "no":
            model.gradient_checkpointing_enable({"use_reentrant": kind != "new"})
        ids = torch.arange(8)[None]
        try:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            fails[kind] = any(p.grad is None for p in model.parameters() if p.requires_grad)
        except RuntimeError:
            fails[kind] = True
        print(f"without it, {kind} checkpointing: {'fails' if fails[kind] else 'trains'}")
    more = {name: kbit_preparation_bytes(SHAPES[name]) / GB for name in ("llama-7b", "llama-3-8b")}
    print(", ".join(f"{name}: {gigabytes:.2f} GB more with it" for name, gigabytes in more.items()))
    return found(*fails.values(), more=more)


def gradient_is_exact() -> Evidence:
    """An adapter on a 4-bit layer, and the same adapter on a dense layer with the rounded weights."""
    from qlora_lab.finetuning import LoraLinear, QuantizedLinear

    draw = torch.Generator().manual_seed(0)
    weight = bundled_weight("model.layers.0.mlp.up_proj.weight").float()
    rounded = quantize(weight)
    dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    dense.weight.data = rounded.dequantize()
    x = torch.randn(8, weight.shape[1], generator=draw)
    back = torch.randn(8, weight.shape[0], generator=draw)
    gradients = []
    for base in (QuantizedLinear(rounded), dense):
        start = torch.Generator().manual_seed(1)  # the same for both
        layer = LoraLinear(base, rank=4, alpha=8, generator=start)
        torch.nn.init.normal_(layer.lora_B, generator=start)
        layer(x).backward(back)
        gradients.append([of.grad for of in (layer.lora_A, layer.lora_B)])
    equal = [bool((ours == of_dense).all()) for ours, of_dense in zip(*gradients, strict=True)]
    print(f"equal to the last bit: the gradient of A {equal[0]}, of B {equal[1]}")
    return found(*equal)


# --- Training ---------------------------------------------------------------------------------------------------------

KNOBS = "shape rank targets batch_size sequence_length gradient_checkpointing optimizer adapter_dtype".split()


def pairs(knob: str, first: object, second: object) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of recorded steps that are alike in all settings but one."""
    alike = [name for name in ("method", *KNOBS) if name != knob]
    runs = record("memory")["runs"]
    for a in (run for run in runs if run[knob] == first):
        for b in (run for run in runs if run[knob] == second):
            if all(a[name] == b[name] for name in alike):
                yield a, b


def setting(run: dict[str, Any]) -> str:
    """A recorded step in few words: "7B, 4 × 512, rank 64"."""
    size = run["shape"].removeprefix("llama-").upper()
    return f"{size}, {run['batch_size']} × {run['sequence_length']}, rank {run['rank']}"


def tokens_in(run: dict[str, Any]) -> int:
    return run["batch_size"] * run["sequence_length"]


def a_quarter_slower() -> Evidence:
    """Steps with a 16-bit and a 4-bit base, by tokens in a step."""
    by_tokens: dict[int, list[float]] = {}
    for lora, qlora in sorted(pairs("method", "lora", "qlora"), key=lambda pair: tokens_in(pair[0])):
        change = 100 * (qlora["measured"]["step_seconds"] / lora["measured"]["step_seconds"] - 1)
        by_tokens.setdefault(tokens_in(lora), []).append(change)
        how = "" if lora["gradient_checkpointing"] else ", no checkpointing"
        print(f"{tokens_in(lora):>6,} tokens a step ({setting(lora)}{how}): {change:+.0f} %")
    every = [change for changes in by_tokens.values() for change in changes]
    return found(*(20 <= change <= 30 for change in every), every=every, by_tokens=by_tokens)


def checkpointing_50_20() -> Evidence:
    """Steps without and with gradient checkpointing: peak memory and tokens per second."""
    memory, speed = [], []
    print("memory: the most that torch's tensors take (of all that the card holds, less is saved: lesson 02)")
    for off, on in pairs("gradient_checkpointing", False, True):
        a, b = off["measured"], on["measured"]
        memory.append(100 * (b["peak_allocated"] / a["peak_allocated"] - 1))
        speed.append(100 * (a["step_seconds"] / b["step_seconds"] - 1))
        base = {"lora": "LoRA", "qlora": "QLoRA"}[off["method"]]
        print(f"{setting(off)}, {base:<6}memory {memory[-1]:+.0f} %, tokens/s {speed[-1]:+.0f} %")
    both = zip(memory, speed, strict=True)
    return found(*(abs(m + 50) < 10 and abs(s + 20) < 5 for m, s in both), memory=memory, speed=speed)


def pad_may_be_the_end() -> Evidence:
    """Two answers of different length, the shorter one padded. Which labels are left of their end tokens?"""
    from transformers import DataCollatorForLanguageModeling

    from qlora_lab.finetuning import TokenizedSample, collate
    from qlora_lab.models.loading import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    rows = [[*tokenizer(text)["input_ids"], end] for text in ("Yes.", "No, the end token is part of the answer.")]
    labels = {
        "mask what equals the pad token (transformers)": DataCollatorForLanguageModeling(tokenizer, mlm=False)(
            [{"input_ids": ids} for ids in rows]
        )["labels"],
        "mask what lies behind the sample's length": collate([[TokenizedSample(tuple(ids), 1)] for ids in rows], end)[
            "labels"
        ],
    }
    learned = {name: int((of == end).sum()) for name, of in labels.items()}
    for name, ends in learned.items():
        print(f"{name}: {ends} of 2 end tokens are learned")
    return found(*(ends == 2 for ends in learned.values()))


# --- Afterwards -------------------------------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "exact answers": lambda run: run["after"]["exact_match"]["test"],
    "exact answers, orders of another kind": lambda run: run["after"]["exact_match"]["shifted"],
    "perplexity, orders": lambda run: run["after"]["perplexity"]["validation"],
    "loss, orders": lambda run: math.log(run["after"]["perplexity"]["validation"]),
    "perplexity, prose": lambda run: run["after"]["perplexity"]["prose"],
}


def costs_under_2_per_cent() -> Evidence:
    """The same run with a 16-bit and a 4-bit base, one seed. Five ways to say what 4 bits cost."""
    lora, qlora = (
        {run["method"]: run for run in record("train-qlora")["runs"]}[method] for method in ("lora", "qlora")
    )
    changes = {}
    for name, of in MEASURES.items():
        changes[name] = 100 * (of(qlora) / of(lora) - 1)
        print(f"{name:<38}LoRA {of(lora):.4f}, QLoRA {of(qlora):.4f}: {changes[name]:+.1f} %")
    return found(*(abs(change) < 2 for change in changes.values()), changes=changes)


def merging_loses_nothing() -> Evidence:
    """A matrix W in 4 bits, and an adapter of a usual size (1.5 % of W) beside it. How much of it is left in the sum?

    Left is the share of the adapter in what the merge has changed, by least squares.
    """
    W = bundled_weight("model.embed_tokens.weight")[:576].float()
    draw = torch.Generator().manual_seed(0)
    adapter = torch.randn(576, 8, generator=draw) @ torch.randn(8, 576, generator=draw)
    adapter *= 0.015 * W.std() / adapter.std()
    base = quantize(W).dequantize()
    merged = {
        "into 4 bits again": quantize(base + adapter).dequantize(),
        "into the dequantized base, bf16": (base + adapter).bfloat16().float(),
    }
    left = {
        name: ((weight - base) * adapter).sum().item() / adapter.square().sum().item()
        for name, weight in merged.items()
    }
    for name, share in left.items():
        print(f"merged {name}: {share:.0%} of the adapter is left")
    return found(left["into 4 bits again"] > 0.99, left=left)


def works_with_most_models() -> Evidence:
    """Small models with random weights, loaded in 4 bits: what share of their layers' weights is packed?"""
    import transformers

    from qlora_lab.models.quiet import quiet_transformers

    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    more: dict[str, Any] = {"intermediate_size": 128, "num_key_value_heads": 2}
    configs = {
        "LLaMA": transformers.LlamaConfig(**sizes, **more),
        "GPT-2": transformers.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=128, bos_token_id=1, eos_token_id=2
        ),
        "Mixtral": transformers.MixtralConfig(**sizes, **more, num_local_experts=8),
    }
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    share = {}
    print("small models with random weights, built like")
    for name, config in configs.items():
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            small: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                quantization_config=nf4,
                device_map={"": "cpu"},
                trust_remote_code=False,
                use_safetensors=True,
            )
        inside = [p for key, p in small.named_parameters() if ".layers." in key or ".h." in key]
        packed = sum(math.prod(p.quant_state.shape) for p in inside if hasattr(p, "quant_state"))
        share[name] = packed / (packed + sum(p.numel() for p in inside if not hasattr(p, "quant_state")))
        print(f"{name:<8}{share[name]:>7.1%} of the layers' weights in 4 bits")
    return found(*(part > 0.9 for part in share.values()), share=share)


# --- A project, where the learner's is missing ------------------------------------------------------------------------

TEAMS = {
    "billing": ["I was charged twice", "my invoice is wrong", "the refund has not come", "please cancel my plan"],
    "login": ["I forgot my password", "my account is locked", "the code never arrives", "I cannot sign in"],
    "delivery": ["my parcel is late", "the box came empty", "I want another address", "the courier lost it"],
}
GREETINGS = ["Hello,", "Hi there,", "Dear team,"]
ENDINGS = {"No hurry.": "later", "When you have time.": "later", "It is urgent!": "now", "I need help today.": "now"}


def stand_in_project() -> Path:
    """Train on 144 requests to a help desk, which shall reach the right team, and return the run's folder.

    Raises RuntimeError, with what train_qlora says, if it fails.
    """
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    lines = [
        {"prompt": f"{hello} {what}. {end}", "response": f"{team}, {when}"}
        for team, whats in TEAMS.items()
        for hello, what, (end, when) in itertools.product(GREETINGS, whats, ENDINGS.items())
    ]
    data = folder / "requests.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = {"--data": data, "--output": folder / "run", "--steps": 8, "--batch-size": 4, "--eval-samples": 0}
    arguments = [str(part) for pair in settings.items() for part in pair]
    command = [sys.executable, "-m", "qlora_lab.train_qlora", *arguments, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(done.stderr)
    return folder / "run"
