# %% [markdown]
# # Dive H · Which merge keeps what was trained?
#
# The training is over. What you have is a 4-bit base and a small file beside it, and tomorrow somebody wants to *run*
# it. There are two plans:
#
# - **Plan A: merge.** Add the adapter to the weights, once and for all. One ordinary model, no extra work per token.
# - **Plan B: keep both.** The base stays in 4 bits, the adapter beside it; several adapters can share one base.
#
# Plan A has a trap that the most natural line of code walks into: *which* weights do you add it to? You train a small
# adapter, merge it three ways, and measure what is left of it. Then you serve two adapters from one base, and learn to
# tell before any download whether a model suits QLoRA at all.
#
# | you need | |
# |---|---|
# | time | 25 minutes |
# | computing | up to 4 minutes on two CPU cores |
# | memory | 6 GB |
# | GPU | optional |

# %% machinery "Imports, the device, and a folder to try things in"
import json
import math
import tempfile
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from qlora_lab.adapters.quantized_linear import dense_weight
from qlora_lab.classroom.checks import (
    check_adapters_that_fit,
    check_merged_weight,
    check_real_parameters,
    check_verdicts,
    check_which_base,
    progress,
)
from qlora_lab.classroom.lessons.dive_h.checks import unseen_configs
from qlora_lab.classroom.lessons.dive_h.figures import plot_losses, plot_plans, plot_preflight, plot_snapped
from qlora_lab.classroom.plots import new_axes
from qlora_lab.finetuning import (
    Batches,
    add_lora,
    dequantize_linears,
    generate,
    is_exact,
    load_lora,
    load_model,
    load_samples,
    lora_layers,
    lora_parameters,
    merge,
    save_lora,
    text_loss,
    tokenize,
    train_steps,
    unload,
)
from qlora_lab.models.hardware import pick_compute_dtype, pick_device
from qlora_lab.quantization import NF4, dequantize, quantize

device = pick_device()
compute_dtype = pick_compute_dtype(device)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## 1 · Two short trainings
#
# The orders of [notebook 01](01_first_run.ipynb), but only a few dozen of them, 2 a step. You train two adapters, each on
# a fresh copy of the same 4-bit base. One turns an order into JSON. The other gets *the very same prompts*, and learns to
# answer with a label for the parcel: `15 x purple bottle > Budapest`.

# %%
orders = {split: load_samples("orders", split)["messages"] for split in ("train", "validation", "test")}


def as_label(chat):
    """The same order, answered with a parcel label."""
    order = json.loads(chat[-1]["content"])
    label = f"{order['quantity']} x {order['colour']} {order['item']} > {order['city']}"
    return [*chat[:-1], {"role": "assistant", "content": label}]


def train_adapter(chats, name, steps):
    """Train an adapter on the 4-bit base, write its files, return the model with it."""
    model, tokenizer = load_model(quantization="nf4")
    samples, _ = tokenize({"messages": chats}, tokenizer, max_length=256)
    add_lora(model, rank=16, alpha=32)
    settings = {"learning_rate": 3e-3, "compute_dtype": compute_dtype, "pad_token_id": tokenizer.pad_token_id}
    records = list(train_steps(model, Batches(samples, batch_size=2, seed=0), steps=steps, **settings))
    save_lora(model, folder / name)
    print(f"{name}: loss {records[0].loss:.2f} at the first step, {records[-1].loss:.2f} at the last")
    return model, tokenizer


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
_ = train_adapter([as_label(chat) for chat in orders["train"][:100]], "label", steps=10)

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
model, tokenizer = train_adapter(orders["train"][:100], "json", steps=24)

# %% [markdown]
# ## 2 · What is in the files?
#
# **Predict.** The bundled model has 134.5 million parameters. How many MB (10⁶ bytes) does the folder `json` take?

# %%
prediction = {"MB": 70}  # ← your guess

# %%
from safetensors import safe_open

print([path.name for path in sorted((folder / "json").iterdir())])
size = (folder / "json" / "adapter_model.safetensors").stat().st_size / 1e6
with safe_open(folder / "json" / "adapter_model.safetensors", "pt") as adapter:
    names = sorted(adapter.keys())
    for name in names[:2]:
        print(name, tuple(adapter.get_tensor(name).shape))
print(f"... {len(names)} tensors, {lora_parameters(model):,} numbers of 4 bytes: {size:.1f} MB", end="; ")
print(f"your guess: {prediction['MB']} MB")

# %% claims
assert len(names) == 2 * 210 and lora_parameters(model) == 4_884_480

# %% [markdown]
# **What happened?** A and B of {{len(names) // 2}} layers, 4 bytes a number, and *nothing else*: {{size:.1f}} MB. The base is not in there. The
# other file names it, with rank, alpha and the layers meant. An adapter without its base is worthless, and on another
# base of the same shapes it runs without complaint and talks nonsense. (Ours carry a fingerprint of the base, and
# `load_lora` refuses another. PEFT reads these files too; its own have no fingerprint.)

# %%
config = json.loads((folder / "json" / "adapter_config.json").read_text())
print({name: value for name, value in config.items() if name != "base_model_name_or_path"})  # a folder of this machine

# %% claims
assert config["r"] == 16 and config["lora_alpha"] == 32 and len(config["target_modules"]) == 7

# %% [markdown]
# ## 3 · Plan A: merge it
#
# A layer computes *W x + alpha / rank · B A x*. That is one matrix, if you add them up first.
#
# **Exercise H.1 ●○○ (4 minutes).** Merge one layer. `weight` is (out, in), `A` is (rank, in), `B` is (out, rank). Leave
# `weight` itself as it is.


# %%
def merged_weight(weight, A, B, alpha):
    """The one matrix that does what the layer and its adapter do together."""
    ### BEGIN SOLUTION (about 2 lines)
    rank = A.shape[0]
    return weight + alpha / rank * B @ A
    ### END SOLUTION


# %%
check_merged_weight(merged_weight)

# %% [markdown]
# <details><summary>Hint 1</summary>Which product of A and B has the weight's shape?</details>
# <details><summary>Hint 2</summary>The rank is the number of rows of A: <code>len(A)</code>.</details>

# %% [markdown]
# ### But which W?
#
# There are two: the original of the checkpoint, and what its 4 bits stand for. So there are three ways to merge:
#
# | | added to | stored in |
# |---|---|---|
# | *dequantized* | the 4-bit weights, made dense | 16 bits |
# | *requantized* | the 4-bit weights, made dense | 4 bits, rounded again |
# | *pristine* | the original weights of the checkpoint | 16 bits |
#
# *Requantized* is what PEFT's `merge_and_unload()` does on a 4-bit model: the line that everybody types. *Pristine* is
# what you get if you load the 16-bit checkpoint, put the adapter on it and merge, as many tutorials advise.

# %%
validation, _ = tokenize({"messages": orders["validation"][:8]}, tokenizer, max_length=256)
judged = orders["test"][:8]
adapted = lora_layers(model)
delta = {name: layer.delta() for name, layer in adapted.items()}  # what the adapter adds to each weight
rounded = {name: dense_weight(layer.base).float() for name, layer in adapted.items()}  # what the 4 bits stand for


def loss_of(model):
    """Validation loss, nats per token."""
    loss = text_loss(model, validation, pad_token_id=tokenizer.pad_token_id, dtype=compute_dtype)
    return loss.total / loss.tokens


def norm(tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
trained = loss_of(model)
for layer in adapted.values():
    layer.alpha = 0  # adapter off
untrained = loss_of(model)
for layer in adapted.values():
    layer.alpha = 32
print(f"validation loss without the adapter {untrained:.3f}, with it {trained:.3f}")
print(f"the adapter adds {norm(delta.values()) / norm(rounded.values()):.1%} of the weights' size")

# %% claims
assert trained < 0.2 < 1.3 < untrained

# %% [markdown]
# **Predict.** With the adapter beside it, the model has the lower of the two losses. Which loss has it merged, in each of
# the three ways?

# %%
prediction = {"dequantized": 0.04, "requantized": 0.05, "pristine": 0.06}  # ← your guesses

# %%
from peft import PeftModel


def merged_into(which):
    """A dense model with the adapter merged in, in one of the three ways."""
    base, _ = load_model(quantization=None if which == "pristine" else "nf4")
    if which == "requantized":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "may get different generations due to rounding errors"
            base = PeftModel.from_pretrained(base, folder / "json").merge_and_unload()
        return dequantize_linears(base)  # the same numbers; a CPU computes faster with dense ones
    if which != "pristine":
        base = dequantize_linears(base)
    return unload(merge(load_lora(base, folder / "json")))


def compare(merged):
    """How far off the weights are, in units of the adapter; the loss; how many orders are exactly right."""
    off = norm(merged.get_submodule(name).weight - rounded[name] - delta[name] for name in delta)
    answers = generate(merged, tokenizer, [chat[:-1] for chat in judged], 44, dtype=compute_dtype)
    exact = sum(is_exact(answer, chat[-1]["content"]) for answer, chat in zip(answers, judged))
    return off / norm(delta.values()), loss_of(merged), exact


# %% alt="Three horizontal bars: validation loss after each way of merging, with lines for the adapter beside the base and for no adapter. Dequantized and pristine end at or near the first line; requantized goes most of the way to no adapter. Diamonds are your guesses."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
losses, errors = {}, {}
print(f"{'':<14}{'weights off':>22}{'loss':>9}{'exact':>9}")
for which in ("dequantized", "requantized", "pristine"):
    merged = merged_into(which)
    errors[which], losses[which], exact = compare(merged)
    print(f"{which:<14}{errors[which]:>11.2f} × adapter{losses[which]:>9.3f}{exact:>4} of {len(judged)}")
_ = plot_losses(new_axes(height=2.4), losses, {"adapter beside": trained, "no adapter": untrained}, prediction)

# %% claims
assert errors["dequantized"] < 0.4 and 0.9 < errors["requantized"] < 1.4 and 5 < errors["pristine"] < 10
assert (
    losses["dequantized"] < trained + 0.02
    and losses["requantized"] > 10 * trained
    and losses["pristine"] < trained + 0.02
)

# %% [markdown]
# **What happened?** Three ways, three stories.
#
# - *Dequantized* is the model that you trained. (In float32, to the last digits. Stored in bf16 the sum is rounded once
#   more; the next cell says by how much.)
# - *Requantized* has lost the adapter. Its error is as large as what the adapter adds, or a little larger: what came back
#   are the base's weights with some noise. PEFT does warn, of "rounding errors". You see below why nearly all is gone.
# - *Pristine* should have been the worst: its weights are off by about seven times the adapter. That is the rounding error of
#   NF4, taken away again. And its loss is as good as that of the model you trained. An error in the weights is not an
#   error in the answers: rounding errs in all directions, a little in each; the adapter is small and all of it points
#   where it matters.
#
# So is *pristine* fine? Here it was. But it is a model that nobody has trained or validated: a long training may
# have learned to make up for the rounding, and then that part of the adapter corrects an error that is gone. If you
# merge that way, measure again. *Dequantized* needs no such trust.

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
in_bf16 = {name: (rounded[name] + delta[name]).to(torch.bfloat16).float() for name in delta}
lost = norm(in_bf16[name] - rounded[name] - delta[name] for name in delta) / norm(delta.values())
print(f"dequantized, stored in bf16: off by {lost:.2f} × adapter")

# %% claims
assert 0.05 < lost < 0.4

# %% [markdown]
# ### Why 4 bits swallow an adapter
#
# Take one block of 64 weights and its correction, and round the sum to NF4. Move the slider: what if the correction were
# larger than the one you trained?

# %%
name = "model.layers.12.mlp.up_proj"
base, correction = rounded[name].cpu(), delta[name].cpu()
factors = (1, 2, 3, 5, 7, 10, 14, 20, 30)  # times the correction that was trained


def survives(factor):
    """Share of the correction, `factor` times as large, that is still there after rounding to 4 bits."""
    wanted = factor * correction
    got = dequantize(quantize(base + wanted)) - base
    return ((got * wanted).sum() / wanted.square().sum()).item()


survival = {factor: survives(factor) for factor in factors}

# %% claims
assert survival[1] < 0.15 and survival[30] > 0.9
wanted = (base + correction).view(-1, 64)
stored = dequantize(quantize(wanted))
largest = wanted.abs().argmax(dim=1, keepdim=True)
assert torch.allclose(stored.gather(1, largest), wanted.gather(1, largest))  # these move freely

# %% alt="Left, the 64 weights of a block: base, wanted (rings) and stored in 4 bits (squares), grey lines at the levels. At × 1, where the slider starts, all three nearly coincide. Right, share of the correction that survives over its size, × 1 to × 30: hardly any at first, nearly all at the end."
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
import ipywidgets

from qlora_lab.classroom.widgets import explore

block = slice(640, 704)  # 64 weights that share a scale
scale = base.flatten()[block].abs().max()


def draw(factor):
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", width_ratios=(2, 1))
    before = base.flatten()[block]
    wanted = before + factor * correction.flatten()[block]
    stored = dequantize(quantize(wanted))
    values = [(values / scale).tolist() for values in (before, wanted, stored, NF4 * wanted.abs().max())]
    return plot_snapped(axes, *values, survival, factor)


explore(draw, factor=ipywidgets.SelectionSlider(options=factors, value=1, description="correction, times yours"))

# %% [markdown]
# The weights of a 4-bit base lie *on* the levels (grey lines), and it takes half a step to reach the next one. What moves
# a weight by less is rounded away, and your correction is of the order of a hundredth of the weights. Only the largest
# weight of a block moves freely, for the block's scale follows it. So a 4-bit weight cannot be trained by small steps:
# QLoRA keeps the steps apart, in the adapter.
#
# **Exercise H.2 ●●● (8 minutes).** You find a merged checkpoint, in bf16, and nobody remembers how it was made. You still
# have the adapter (`delta`, what it adds to this weight), the 16-bit weight (`original`) and what its 4 bits stand for
# (`rounded`). Which of the three ways was it? `quantize` and `dequantize` are at hand.


# %%
def which_base(merged, delta, original, rounded):
    """Tensors of shape (out, in) -> "dequantized", "requantized" or "pristine"."""
    ### BEGIN SOLUTION (about 6 lines)
    candidates = {
        "dequantized": rounded + delta,
        "requantized": dequantize(quantize(rounded + delta)),
        "pristine": original + delta,
    }
    distance = {name: (merged.float() - candidate).norm().item() for name, candidate in candidates.items()}
    return min(distance, key=distance.get)
    ### END SOLUTION


# %%
check_which_base(which_base)

# %% [markdown]
# <details><summary>Hint 1</summary>You can make all three candidates yourself.</details>
# <details><summary>Hint 2</summary>bf16 keeps 8 significant bits: no candidate is <em>equal</em>. Take the nearest.</details>

# %% [markdown]
# ## 4 · Plan B: keep 4 bits, change adapters
#
# Nobody ever writes to the base. So one copy of it serves any number of adapters, each request with its own. PEFT loads
# the files of section 2 under names and switches between them:

# %%
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # PEFT 0.21 uses an old name


def megabytes(model):
    """All tensors of a model, quantization constants included, in 10⁶ bytes."""
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    constants = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *constants]) / 1e6


# %%
base, _ = load_model(quantization="nf4")
served = PeftModel.from_pretrained(base, folder / "json", adapter_name="json")
served.load_adapter(folder / "label", adapter_name="label")
size_b = megabytes(served)
requests = [("json", orders["test"][0]), ("label", orders["test"][0]), ("label", orders["test"][1])]


def serve(adapter, chat, tokens=40):
    """Answer one request with one of the adapters."""
    served.set_adapter(adapter)
    return generate(served, tokenizer, [chat[:-1]], tokens, dtype=compute_dtype)[0]


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then a word may differ
from qlora_lab.classroom.widgets import show_answers

show_answers(
    [(chat[-2]["content"], name, serve(name, chat)) for name, chat in requests], ("order", "adapter", "answer")
)

# %% [markdown]
# The same order, word for word, and the prompt asks for JSON both times. Only the adapter differs.
#
# **Predict.** A merged model computes one matrix product a layer. Plan B looks up 4-bit codes, multiplies, and adds the
# adapter's two thin products. How many times as long does one token take?

# %%
prediction = {"times": 1.2}  # ← your guess


# %%
def milliseconds_a_token(answer, tokens=8):
    """Time between the first new token and the last, for one request."""
    times = []
    for length in (1, 1 + tokens):
        start = time.perf_counter()
        answer(length)
        times.append(time.perf_counter() - start)
    return 1000 * (times[1] - times[0]) / tokens


# %%
# NBVAL_IGNORE_OUTPUT
# because times, and the embeddings' dtype, depend on the machine
merged, chat = merged_into("dequantized"), orders["test"][2]
size_a = megabytes(merged)
time_a = milliseconds_a_token(lambda n: generate(merged, tokenizer, [chat[:-1]], n, dtype=compute_dtype))
time_b = milliseconds_a_token(lambda n: serve("json", chat, n))
print(f"plan A, one merged model        {size_a:5.0f} MB {time_a:6.0f} ms a token")
print(f"plan B, one base, two adapters  {size_b:5.0f} MB {time_b:6.0f} ms a token")
print(f"plan B takes {time_b / time_a:.1f} times as long; your guess: {prediction['times']}")

# %% claims
assert size_b < 2 * size_a  # two merged models would be needed

# %% [markdown]
# **What happened?** Plan B decodes every layer's weights anew for every token, and PEFT adds two more products. How much
# that costs depends on the machine, and on how many requests share one decoding: a GPU that reads the codes inside the product
# reads little more than a quarter of the bytes. Measure on the machine that will serve.
#
# What plan B saves is memory, and the more adapters the more. At LLaMA-7B's size, with rank 16 on all linears:

# %% alt="Two rising lines: GB of weights over 1 to 100 adapters served, both axes logarithmic. Plan A, a merged model each, passes the 24 GB line at two models and the 80 GB line at six. Plan B, one 4-bit base with adapters, rises from 4 to 20 GB and stays below the 24 GB line."
merged_gb, base_gb, adapter_gb = 13.48, 3.87, 39_976_960 * 4 / 1e9
counts = [1, 2, 5, 10, 20, 50, 100]
memory = {
    "plan A: a merged model each": [n * merged_gb for n in counts],
    "plan B: one 4-bit base, adapters in float32": [base_gb + n * adapter_gb for n in counts],
}
_ = plot_plans(new_axes(height=3.2), counts, memory, {"24 GB": 24, "80 GB": 80})

# %% claims
assert f"{adapter_gb:.2f}" == "0.16" and 5 * merged_gb < 80 < 6 * merged_gb and base_gb + 100 * adapter_gb < 24

# %% [markdown]
# Five merged models fill a card of 80 GB. A hundred adapters and their base fit on one of 24 GB.
#
# **Exercise H.3 ●○○ (3 minutes).** How many adapters can each plan keep ready on a card? All sizes are in bytes.


# %%
def adapters_that_fit(card, merged, base, adapter):
    """How many adapters (plan A, plan B); merged, base and adapter are the sizes of one of each."""
    ### BEGIN SOLUTION (about 3 lines)
    plan_a = card // merged
    plan_b = max(0, (card - base) // adapter)
    return plan_a, plan_b
    ### END SOLUTION


# %%
check_adapters_that_fit(adapters_that_fit)

# %% [markdown]
# <details><summary>Hint</summary>Plan B pays for the base once, even if nothing else fits. <code>//</code> rounds
# down.</details>

# %% [markdown]
# ## 5 · Does it work for every model?
#
# "Most Transformers", is the usual answer. *Before* you download 90 GB you want to know: which weights will be quantized,
# and how small does the model get? Its config is enough to find out. `preflight` builds the model without memory (on
# torch's *meta* device), lets transformers and PEFT do to it what they would do, and counts.

# %%
import transformers

from qlora_lab.finetuning import preflight

configs = {
    "LLaMA-7B": transformers.LlamaConfig(),
    "GPT-2": transformers.GPT2Config(),
    "BERT-base": transformers.BertConfig(architectures=["BertForMaskedLM"]),
    "Mixtral-8x7B": transformers.MixtralConfig(architectures=["MixtralForCausalLM"]),
}
print(preflight(configs["LLaMA-7B"]))

# %% [markdown]
# **Predict.** 4 bits are a quarter of 16. How large is each of the others, in per cent of its 16-bit size?

# %%
prediction = {"GPT-2": 29, "BERT-base": 29, "Mixtral-8x7B": 26}  # ← your guesses, in %

# %% alt="Four stacked horizontal bars: bytes after loading in per cent of the 16-bit model, split into 4 bits and left in 16 bits. LLaMA-7B 29 %, GPT-2 49 %, BERT-base 42 %, of both more than half in 16 bits; Mixtral-8x7B 98 %, almost all in 16 bits. Diamonds are your guesses."
reports = {name: preflight(config) for name, config in configs.items()}
shares = {}
for name, report in reports.items():
    whole, left = 100 * report.nbytes / report.dense_bytes, report.share_of_bytes_left
    text = f"{whole:.0f} %: {report.nbytes / 1e9:.3g} of {report.dense_bytes / 1e9:.3g} GB"
    shares[name] = (whole * (1 - left), whole * left, text)
_ = plot_preflight(new_axes(height=2.8), shares, prediction)

# %%
for name, report in reports.items():
    print(f"{name:<14}{report.verdict}")

# %% claims
assert [round(sum(share[:2])) for share in shares.values()] == [29, 49, 42, 98]
experts = sum(w.numel for w in reports["Mixtral-8x7B"].left if "experts" in w.name) / reports["Mixtral-8x7B"].parameters
assert f"{reports['LLaMA-7B'].dense_bytes / 1e9:.2f} {reports['LLaMA-7B'].nbytes / 1e9:.2f}" == "13.48 3.87"
assert f"{experts:.0%}" == "97%" and "(Conv1D, transposed)" in str(reports["GPT-2"])

# %% [markdown]
# **What happened?** Only linear layers are replaced, and a model may keep its weights elsewhere:
#
# - *GPT-2* and *BERT* have large vocabularies for their size, and the table is the output head at the same time: *tied*.
#   (GPT-2's layers are no `nn.Linear` but `Conv1D`, its transpose. bitsandbytes gets them, transposed.)
# - *Mixtral's* experts hold 97 % of the parameters, and since transformers 5 they lie in large three-dimensional
#   tensors. No linear layer, nothing to replace: a 4-bit Mixtral saves 2 %. PEFT does find the experts, though:

# %%
print(reports["Mixtral-8x7B"])

# %% [markdown]
# Try it on a model you have in mind, from a terminal. Of a model of the hub it downloads the config only:
#
# ```
# python -m qlora_lab.models preflight Qwen/Qwen2.5-7B-Instruct
# ```
#
# **Exercise H.4 ●●○ (6 minutes).** Predict the verdicts on four models. *fits*: at most half of the bytes stay in 16
# bits. *works, but*: more than half of the bytes do. *hardly pays*: more than half of the *parameters* do. Here is what
# their configs say; `preflight` would tell you, but guess first.

# %%
for name, config in unseen_configs().items():
    layers = getattr(config, "num_hidden_layers", None)
    experts = getattr(config, "num_experts", 0)
    print(
        f"{name:<14} vocabulary {config.vocab_size:>7,}, width {config.hidden_size}, {layers} layers, {experts} experts"
    )

# %%
### BEGIN SOLUTION
### STUB: verdicts = {"Llama-3-8B": ..., "Gemma-2-2B": ..., "T5-large": ..., "Qwen3-30B-A3B": ...}
verdicts = {
    "Llama-3-8B": "fits",
    "Gemma-2-2B": "works, but",
    "T5-large": "works, but",
    "Qwen3-30B-A3B": "hardly pays",
}
### END SOLUTION

# %%
check_verdicts(verdicts)

# %% [markdown]
# <details><summary>Hint 1</summary>Vocabulary × width is the embedding. Is it large beside the linears at a quarter of
# their size? Gemma and T5 tie it to the head.</details>
# <details><summary>Hint 2</summary>Some model classes name modules to keep out of low precision: look at
# <code>transformers.T5ForConditionalGeneration._keep_in_fp32_modules</code>.</details>

# %% [markdown]
# **Exercise H.5 ●●○ (3 minutes).** How many parameters has a model that is loaded in 4 bits? `numel()` counts bytes, and two weights
# share a byte. Count right. A packed weight has an attribute `quant_state`, and its `shape` is
# the real one; other parameters have no such attribute.


# %%
def real_parameters(model):
    """How many numbers the model's parameters stand for."""
    ### BEGIN SOLUTION (about 4 lines)
    total = 0
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        total += p.numel() if state is None else math.prod(state.shape)
    return total
    ### END SOLUTION


# %%
check_real_parameters(real_parameters)

# %% [markdown]
# <details><summary>Hint 1</summary><code>getattr(p, "quant_state", None)</code> is None for a weight that is not packed.</details>
# <details><summary>Hint 2</summary><code>math.prod(p.quant_state.shape)</code>. Doubling <code>numel()</code> is nearly
# right: an odd number of weights is padded.</details>

# %% [markdown]
# ## Recap
#
# - **Train a QLoRA model**: what you keep is 20 MB, and it is worth nothing without its base.
# - Plan A, *merge*: into the **dequantized** base. Merging into 4 bits rounds the adapter away; the pristine base
#   makes a model that has to be measured again.
# - Plan B, *keep 4 bits*: one base, many adapters, switched per request. It saves memory; what that costs in
#   time, measure where you serve.
# - **Configure**: look before you download. Embeddings, heads, tied weights, fused experts and what a model class keeps
#   stay in 16 bits, or in 32.
#
# These were two of the questions that learners ask: *quantize for inference too?* and *does every model work?*

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** back to [the map](00_start_here.ipynb).
