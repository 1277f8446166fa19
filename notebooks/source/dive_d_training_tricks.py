# %% [markdown]
# # Dive D · Which knob buys what?
#
# Every tutorial ends with the same list: gradient checkpointing, a paged optimizer, accumulation, bf16, rank, alpha. Turn
# them all on and hope. Here each one has been turned *alone*, at three seeds, on the same data. You find out which of them
# buy memory, which buy learning and what that costs elsewhere, and which buy nothing. At the end stands a recipe for 7B
# in which every line has its receipt, and the same training through TRL.
#
# | you need | |
# |---|---|
# | time | 45 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not used: what needs one was recorded on an H100 |

# %% machinery "Imports"
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import qlora_lab
from qlora_lab.classroom.checks import check_accumulate, check_beyond_seeds, check_pack, check_splits, progress
from qlora_lab.classroom.lessons.dive_d.figures import (
    plot_knobs,
    plot_pairs,
    plot_rows,
    plot_splits,
    plot_tradeoff,
    plot_undone,
)
from qlora_lab.classroom.plots import new_axes
from qlora_lab.finetuning import Batches, TokenizedSample, add_adapter, collate, fetch, load_samples, tokenize
from qlora_lab.memory import SHAPES, estimate
from qlora_lab.training.activations import checkpoint_activations
from qlora_lab.training.loop import train_steps
from qlora_lab.training.loss import token_loss_sum

warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")  # PEFT 0.21 uses an old name
logging.getLogger("transformers").setLevel(logging.ERROR)

# %%
GB = 1e9  # 10^9 bytes everywhere in this notebook

folder = Path(qlora_lab.__file__).parents[1] / "data" / "records"
record = json.loads((folder / "knobs-nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8"))
print(f"recorded on one {record['device']}, {record['date']}, by `{record['command']}`")
print(", ".join(f"{package} {version}" for package, version in record["versions"].items()))

# %% [markdown]
# ## 1 · One knob at a time
#
# The bundled model in NF4 learns the orders of [notebook 01](01_first_run.ipynb): 30 steps of 8 orders, rank 16 on all
# linears, alpha 32, learning rate 1.5e-3, bf16, torch's AdamW. That is *as it is*. Each of the other rows changes one
# thing.

# %%
groups = [
    ["as it is"],
    ["checkpointing", "batch 4 x 2", "batch 1 x 8", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"],
    ["float16", "float32"],
    ["batch 32", "packing"],
    ["rank 4", "rank 64", "q, v", "q, k, v, o"],
    ["lr 1.5e-4", "lr 5e-4", "lr 5e-3", "lr 1.5e-2"],
]
by_knob = {knob: [run for run in record["runs"] if run["knob"] == knob] for group in groups for knob in group}
validation = {knob: [run["after"]["validation"] for run in runs] for knob, runs in by_knob.items()}
prose = {knob: [run["after"]["prose"] for run in runs] for knob, runs in by_knob.items()}
peak = {knob: [run["peak_allocated"] / GB for run in runs] for knob, runs in by_knob.items()}
speed = {knob: [record["alone"][knob]["tokens_per_second"]] for knob in by_knob}

# %% claims
assert len(by_knob) == 19 and all([run["seed"] for run in runs] == [0, 1, 2] for runs in by_knob.values())

# %% [markdown]
# **Predict.** *As it is*, the peak is 1.0 GB. Three knobs are famous for saving memory. What do they leave of it?

# %%
prediction = {"checkpointing": 0.5, "batch 4 x 2": 0.9, "adamw_8bit": 0.6}  # ← your guesses, in GB

# %% [markdown]
# Each circle is a seed: the loss on held-out *orders* and on *plain English* that nobody trained on (less is better), and
# the peak. Speed was measured once, with the GPU to itself.

# %% alt="A row for each of 19 knobs, three runs each, in four panels: loss on orders, loss on plain English, tokens per second, peak memory; a band shows how far runs of equal settings lie apart. Checkpointing and fewer samples at a time save memory and cost speed; the optimizers stay within the bands or nearly; none of these changes the losses. Batch 32 and rank 64 win on orders and lose on English; lr 1.5e-2 runs off the scale."
base, same_work = validation["as it is"], ["as it is", *groups[-1]]  # five settings with equally much to compute
panels = {  # values, how far equal settings differ, limits, ticks
    "orders\n(nats per token)": (validation, base, (0.004, 0.4), [0.005, 0.02, 0.1]),
    "plain English\n(nats per token)": (prose, prose["as it is"], (3.55, 4.15), [3.6, 3.8, 4.0]),
    "tokens/s": (speed, [speed[knob][0] for knob in same_work], (200, 8000), [300, 1000, 5000]),
    "peak (GB)": (peak, [size for knob in same_work for size in peak[knob]], (0.3, 4), [0.4, 1, 3]),
}
fig, axes = plt.subplots(1, 4, figsize=(8, 6), layout="constrained")
_ = plot_knobs(axes, groups, panels, prediction)

# %%
from qlora_lab.memory import optimizer_state_bytes, trained_tensors

adapters = trained_tensors(SHAPES["smollm2-135m"], "qlora", 16)
states, in_8_bits = (optimizer_state_bytes(adapters, name)[0] / 1e6 for name in ("adamw_torch", "adamw_8bit"))
print(*(f"{knob}: {min(peak[knob]):.2f} … {max(peak[knob]):.2f} GB" for knob in prediction), sep=", ")
print(f"AdamW's states: {states:.0f} MB; in 8 bits: {in_8_bits:.0f} MB")

# %% claims
assert sum(adapters) == by_knob["as it is"][0]["trainable"]
assert [f"{max(peak[knob]):.2f}" for knob in prediction] == ["0.48", "0.70", "1.01"]
assert f"{states:.0f} {in_8_bits:.0f} {1 - in_8_bits / states:.0%}" == "39 11 72%"

# %% [markdown]
# **What happened?** The 8-bit optimizer saves nearly three quarters of AdamW's states. But LoRA trains so little that all its
# states are {{states:.0f}} MB, and of those nobody can save half a gigabyte. What fills the GPU are *activations*, and these shrink by
# checkpointing or with fewer samples at a time.
#
# ### First, a ruler
#
# The grey bands are the most useful part of the figure: how far *equal* settings differ. For the losses these are the
# three seeds of *as it is*; for speed and peak the five rows that differ in the learning rate only, and so do the same
# work.

# %%
low, high = min(panels["tokens/s"][1]), max(panels["tokens/s"][1])
smallest, largest = min(panels["peak (GB)"][1]), max(panels["peak (GB)"][1])
print(f"equal work: {low:,.0f} … {high:,.0f} tokens/s, {smallest:.2f} … {largest:.2f} GB")
outside = {knob: value for knob, (value,) in speed.items() if not low <= value <= high}
for knob, value in sorted(outside.items(), key=lambda item: item[1]):
    print(f"  {knob:<14}{value:>6,.0f} tokens/s")

# %% claims
assert f"{low:.0f} {high:.0f} {smallest:.2f} {largest:.2f} {high / low:.1f}" == "1513 2124 0.99 1.15 1.4"
assert not {"adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "float16"} & set(outside)
assert f"{speed['paged_adamw_32bit'][0] / speed['as it is'][0] - 1:+.0%}" == "+21%"
assert outside["batch 1 x 8"] < low / 5 and outside["batch 32"] > 2 * high

# %% [markdown]
# Five times the same work, at {{low:,.0f}} to {{high:,.0f}} tokens/s. So "paged AdamW is 21 % faster" would have been a fairy tale:
# anything inside a band has shown **nothing**. (The model is so small that the GPU waits for its next kernel most of the
# time, and how long depends on the CPU's mood.) What is far outside is real: 8 passes of one sample take more than five
# times as long as one pass of 8.
#
# **Exercise D.1 ●○○ (4 minutes).** Now the losses. Three seeds of *as it is* have a spread of their own. Say `"lower"` if
# *all* values of the knob are below *all* of the base, `"higher"` if all are above, else `"open"`.


# %%
def beyond_seeds(base, knob):
    """Lists of losses, one a seed -> "lower", "higher" or "open"."""
    ### BEGIN SOLUTION (about 5 lines)
    if max(knob) < min(base):
        return "lower"
    if min(knob) > max(base):
        return "higher"
    return "open"
    ### END SOLUTION


# %%
check_beyond_seeds(beyond_seeds)

# %% [markdown]
# <details><summary>Hint 1</summary>Which two numbers decide whether all of a list are below all of another?</details>
# <details><summary>Hint 2</summary><code>max(knob) &lt; min(base)</code></details>

# %%
better = [knob for knob, values in validation.items() if max(values) < min(base)]
worse = [knob for knob, values in validation.items() if min(values) > max(base)]
by_luck = 2 / math.comb(6, 3)
print(f"orders better: {better}\norders worse:  {worse}")
print(f"by luck alone: {by_luck:.0%} of knobs, {by_luck * 18:.1f} of 18")

# %% claims
assert better == ["batch 32", "rank 64"] and by_luck == 0.1
assert worse == ["rank 4", "q, v", "q, k, v, o", "lr 1.5e-4", "lr 5e-4", "lr 1.5e-2"]
assert min(base) / max(max(validation[knob]) for knob in better) > 1.4
assert min(min(validation[knob]) for knob in worse) / max(base) > 1.4
losses = {knob: [run["losses"] for run in runs] for knob, runs in by_knob.items()}
assert losses["checkpointing"] == losses["as it is"] and losses["adamw_8bit"] == losses["paged_adamw_8bit"]

# %% [markdown]
# With 18 knobs, luck alone would put about two of them outside. These eight are outside by more than a factor of 1.4, so
# luck is not what they have in common: they are the knobs that change *how much is learned*. The memory knobs are not
# among them. Two of those even prove it: with checkpointing every recorded loss of all 90 steps is equal in **all bits**,
# and so are those of the 8-bit optimizer with and without paging.
#
# ## 2 · Checkpointing
#
# Now at 7B, from the runs of [notebook 10](10_memory_comparison.ipynb): same H100, rank 64, samples of 512 tokens.
#
# **Predict.** A common rule: *"memory −50 %, speed −20 %"*, that is 25 % more time.

# %%
prediction = {"memory": -50, "time": +25}  # ← your guesses, in %

# %%
memory = json.loads((folder / "memory-nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8"))


def run_of(batch, checkpointing, length=512, rank=64, size="7b"):
    """The recorded QLoRA run with these settings, or None."""
    wanted = {"shape": f"llama-{size}", "method": "qlora", "targets": "all-linear", "adapter_dtype": "float32"}
    wanted |= {"batch_size": batch, "sequence_length": length, "gradient_checkpointing": checkpointing}
    wanted |= {"rank": rank, "optimizer": "paged_adamw_32bit"}
    runs = [run for run in memory["runs"] if all(run[name] == value for name, value in wanted.items())]
    return runs[0] if runs and "measured" in runs[0] else None


# %% alt="Bars without and with checkpointing at 7B, 1, 4 and 16 samples of 512 tokens, and your guesses. Peak memory 7.93 to 5.43 GB, 17.0 to 6.19, 52.9 to 10.0: 31, 63 and 81 % less. Seconds a step: 48, 70 and 41 % more."
batches = (1, 4, 16)
WAYS = {"without checkpointing": False, "with checkpointing": True}
peaks, times = (
    {name: [run_of(b, on)["measured"][key] / unit for b in batches] for name, on in WAYS.items()}
    for key, unit in (("peak_allocated", GB), ("step_seconds", 1))
)
sides = {"peak allocated (GB, 10$^9$ bytes)": peaks, "seconds a step": times}
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
_ = plot_pairs(axes, [f"{b} × 512" for b in batches], sides, [70, 1.5], [prediction["memory"], prediction["time"]])

# %%
change = {
    name: [round(100 * (after / before - 1)) for before, after in zip(*values.values())]
    for name, values in {"memory": peaks, "time": times}.items()
}
print(change, "your guesses:", prediction)

# %% claims
assert change == {"memory": [-31, -63, -81], "time": [48, 70, 41]}

# %% [markdown]
# **What happened?** There is no such percentage. Weights and adapters stay as they are, activations grow with the tokens,
# and checkpointing shrinks only those: 31 % of a step with 512 tokens, 81 % of one with 8,192.
#
# And the time? "One more forward pass, so a third" holds for full fine-tuning. Let torch count the arithmetic, on a tiny
# model, once trained in full and once with LoRA:

# %%
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode


def tiny(lora=True):
    """A random LLaMA of four layers, with adapters unless all of it is trained."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=200, initializer_range=0.2, use_cache=False, **sizes))
    return add_adapter(model, rank=4, alpha=8) if lora else model


def count(model, checkpointing):
    """Floating-point operations of one forward and backward pass, and all gradients."""
    if checkpointing:
        checkpoint_activations(model)
    ids = torch.arange(3, 131).view(2, 64)
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        model.train()(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


# %%
counted = {lora: (count(tiny(lora), False), count(tiny(lora), True)) for lora in (False, True)}
for lora, ((plain, gradient), (twice, recomputed)) in counted.items():
    print(
        f"{'LoRA' if lora else 'full':<5} {plain / 1e6:.0f} MFLOP, with checkpointing {twice / plain - 1:+.0%},",
        end=" ",
    )
    print(f"gradients equal in all bits: {torch.equal(gradient, recomputed)}")

# %% claims
for lora, ((plain, gradient), (twice, recomputed)) in counted.items():
    assert torch.equal(gradient, recomputed) and f"{twice / plain - 1:+.0%}" == ("+52%" if lora else "+32%")

# %% [markdown]
# A forward pass costs 2 operations a weight and token. Full training's backward pass costs 4: gradients of activations
# *and* of weights. LoRA's weights are frozen, so 2. One more forward pass is then 2 of 6, a third, or **2 of 4, a half**.
# (By default torch stops recomputing as soon as it has what it needs. Full training profits most: the last product of
# each layer is left out. Here it was told not to.) The H100 took 41 to 70 % longer,
# in one timed step each.
#
# ### So it makes training slower?
#
# **Predict.** 16 samples of 512 tokens a step, rank 64. Card A lets you run 4 passes of 4 samples, *without* checkpointing.
# Card B runs 1 pass of 16 samples, *with* it. Which step takes longer, and by how many per cent?

# %%
prediction = {"B against A": +50}  # ← your guess, in %

# %%
passes = run_of(4, False)["measured"]
one = run_of(16, True)["measured"]
update = run_of(4, False)["phases"]["steady step: update"]["seconds"]
least, most = 4 * passes["step_seconds"] - 3 * update, 4 * passes["step_seconds"]  # with one update, with four
print(f"A: 4 × 4, without: {passes['peak_allocated'] / GB:5.1f} GB, {least:.2f} to {most:.2f} s")
print(f"B: 1 × 16, with:   {one['peak_allocated'] / GB:5.1f} GB, {one['step_seconds']:.2f} s")
print(f"your guess: {prediction['B against A']:+} %")

# %% claims
assert times["without checkpointing"][1] < times["without checkpointing"][0]
saved = (passes["peak_allocated"] - one["peak_allocated"]) / GB

# %% [markdown]
# **What happened?** B computes half as much again, needs {{saved:.1f}} GB less and is *not slower*: {{one['step_seconds']:.2f}} s against {{least:.2f}} to {{most:.2f}} (a
# pass of 4 was timed together with its update, and A updates only once). Look at the figure: without checkpointing
# a pass over 4 samples takes no longer than one over a single sample. So much of the GPU is idle, and more tokens fill it.
# Memory that is free for samples is speed. A slower card is busy sooner and should gain less. And one step each was timed:
# believe the direction, not the digits.
#
# So the order is: **first fill the card with samples, then accumulate what is missing.** The figure shows where that
# ends. Filled marks fit on the card, with a tenth left for the allocator's gaps. Black dashes were measured, on a card
# that had room for larger gaps. (Needs a running kernel.)

# %%
import ipywidgets

from qlora_lab.classroom.widgets import explore

SIZES, ROOM = [1, 2, 4, 8, 16], 0.9


def on_the_card(size, batch, checkpointing, length, rank):
    """Predicted GB, optimizer states and CUDA context included."""
    knobs = {"batch_size": batch, "sequence_length": length, "gradient_checkpointing": checkpointing, "rank": rank}
    return estimate(SHAPES[f"llama-{size}"], **knobs).total / GB


def measured_on_the_card(*settings):
    """The same from the record, reserved memory counted; None if there was no such run."""
    got = (run_of(*settings) or {}).get("measured")
    return got and (got["peak_reserved"] + got["managed_bytes"] + memory["outside_allocator_at_start"]) / GB


def draw(size, length, rank, card):
    lines = {name: [on_the_card(size, b, on, length, rank) for b in SIZES] for name, on in WAYS.items()}
    points = {name: [(b, measured_on_the_card(b, on, length, rank, size)) for b in SIZES] for name, on in WAYS.items()}
    points = {name: [(b, value) for b, value in found if value] for name, found in points.items()}
    return plot_splits(new_axes(), SIZES, lines, points, ROOM * card)


# %% alt="Predicted memory at 7B of five ways to split 16 samples of 512 tokens, from 1 x 16 to 16 x 1, without and with checkpointing, and a card of 24 GB. With checkpointing it rises from 7 to 12 GB: all fit. Without it, 8 x 2 and 16 x 1 do not."
explore(
    draw,
    size=ipywidgets.SelectionSlider(options=["7b", "13b", "33b", "65b"], description="LLaMA"),
    length=ipywidgets.SelectionSlider(options=[256, 512, 1024, 2048], value=512, description="tokens a sample"),
    rank=ipywidgets.SelectionSlider(options=[4, 16, 64], value=64, description="rank"),
    card=ipywidgets.SelectionSlider(options=[8, 12, 16, 24, 48, 80], value=24, description="card (GB)"),
)

# %% [markdown]
# **Exercise D.2 ●●○ (6 minutes).** LLaMA-7B, rank 64, 16 samples of 512 tokens a step, on four cards. Give each the split
# with the *fewest passes* that fits (predicted: at most 90 % of the card); and where it fits both ways, without
# checkpointing. Take `on_the_card` to find out.

# %%
### BEGIN SOLUTION
### STUB: splits = {8: ..., 12: ..., 24: ..., 80: ...}  # card: (micro-batch, accumulation, checkpointing)
splits = {8: (1, 16, True), 12: (8, 2, True), 24: (16, 1, True), 80: (16, 1, False)}
### END SOLUTION

# %%
check_splits(splits)

# %% [markdown]
# <details><summary>Hint 1</summary><code>on_the_card("7b", 4, True, 512, 64)</code> is the prediction for four samples
# with checkpointing.</details>
# <details><summary>Hint 2</summary>Begin with 16 samples and halve until it fits. An answer looks like
# <code>(4, 4, True)</code>.</details>

# %% [markdown]
# ## 3 · Accumulation: is 4 × 4 really 16?
#
# In the record it is: *batch 4 x 2* and *1 x 8* end where *as it is* ends. In many training scripts it was not, for years.
# They took the mean loss of each micro-batch and averaged: the **mean of the means**. (Hugging Face's blog post "Fixing
# Gradient Accumulation" tells how transformers' Trainer was cured of it.) Here is a step of four answers with 2, 4, 8 and
# 60 tokens, one a micro-batch. Beside it, how long the answers to our orders are:


# %%
def answers(targets, prompt=10):
    """Random samples: a prompt, and an answer of so many tokens."""
    draw = torch.Generator().manual_seed(0)
    return [
        TokenizedSample(tuple(torch.randint(3, 200, (prompt + n,), generator=draw).tolist()), prompt) for n in targets
    ]


def gradients(model, micro_batches, weights):
    """Adapters' gradients after a backward pass of each micro-batch's mean loss, times its weight."""
    model.zero_grad()
    for samples, weight in zip(micro_batches, weights):
        targets = sum(len(sample.ids) - sample.prompt_length for sample in samples)
        (weight * token_loss_sum(model, collate([[sample] for sample in samples], 0)) / targets).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def off(gradient, truth):
    return ((gradient - truth).norm() / truth.norm()).item()


# %%
targets = [2, 4, 8, 60]
four, model = answers(targets), tiny()
whole = gradients(model, [four], [1])
shares = [n / sum(targets) for n in targets]
by_tokens = gradients(model, [[sample] for sample in four], shares)
by_means = gradients(model, [[sample] for sample in four], [1 / 4] * 4)
tokenizer = AutoTokenizer.from_pretrained(fetch())
samples, _ = tokenize(load_samples("orders", "train").select(range(512)), tokenizer, 256)
lengths = [len(sample.ids) - sample.prompt_length for sample in samples]
print(f"orders' answers have {min(lengths)} … {max(lengths)} tokens")
print(f"weights by target tokens: off by {off(by_tokens, whole):.2%}")
print(f"mean of the means:        off by {off(by_means, whole):.0%}")

# %% claims
assert off(by_tokens, whole) < 5e-5 and off(by_means, whole) > 1

# %% [markdown]
# With the mean of means the answer of 2 tokens weighs as much as that of 60: each of its tokens counts 30 times as much. No
# error, no warning, another training. On the orders nobody would have noticed: their answers are all about equally long.
#
# **Exercise D.3 ●●● (8 minutes).** Write the loop that gets it right. `mean_loss(batch)` is the mean over a batch's targets
# (what transformers calls `model(**batch).loss`). Call `.backward()` so that the gradients add up to those of one large
# batch. A target is a label that is not −100 *and* has a token before it: the first label of a row is never predicted.


# %%
def accumulate(mean_loss, micro_batches):
    """Backward passes over all micro-batches (dicts of `input_ids` and `labels`); returns nothing."""
    ### BEGIN SOLUTION (about 4 lines)
    targets = [(batch["labels"][:, 1:] != -100).sum() for batch in micro_batches]
    for batch, count in zip(micro_batches, targets):
        (mean_loss(batch) * count / sum(targets)).backward()
    ### END SOLUTION


# %%
check_accumulate(accumulate)

# %% [markdown]
# <details><summary>Hint 1</summary>mean × targets = sum. Which number must the sum be divided by?</details>
# <details><summary>Hint 2</summary><code>(batch["labels"][:, 1:] != -100).sum()</code> counts a batch's targets. You need
# those of <em>all</em> micro-batches before the first backward pass.</details>

# %% [markdown]
# ## 4 · Padding and packing
#
# A tensor is a rectangle, samples are not. The rest is padding: computed and thrown away. *Packing* puts several samples
# into one row.
#
# **Predict.** 8 orders a batch, as they come. What share of the tensor is padding? And if they are sorted by length
# first, or packed into rows of 256 tokens?

# %%
prediction = {"as they come": 30, "similar lengths together": 10, "packed": 2}  # ← your guesses, in %

# %%
draw = torch.Generator().manual_seed(0)
chat = [min(512, max(16, round(math.exp(4.8 + 0.8 * torch.randn((), generator=draw).item())))) for _ in range(512)]
kinds = {"orders": samples, "like a chat": [TokenizedSample((7,) * n, n // 2) for n in chat]}


def tensors(samples, width, way):
    """Rows (lengths of the samples in each) of the tensors of 16 steps."""
    if way == "as they come":
        return [[[len(s.ids)] for s in samples[i : i + 8]] for i in range(0, 128, 8)]
    packing = way == "packed"
    steps = itertools.islice(Batches(samples, 4 if packing else 8, packing=packing, max_length=width), 16)
    return [[[len(s.ids) for s in row] for row in micro_batches[0]] for micro_batches in steps]


def sizes(steps):
    """Tokens in each step's tensor, padding included."""
    return [len(rows) * max(map(sum, rows)) for rows in steps]


# %% alt="Six panels of rows of tokens, padding hatched. Orders: 6 % padding as they come, 1 % with similar lengths together, 3 % packed. Samples as in a chat, of very different lengths: 54, 7 and 14 %."
fig, axes = plt.subplots(2, 3, figsize=(8, 3.6), layout="constrained")
share, extent = {}, {}
for (name, data), width, line in zip(kinds.items(), (256, 512), axes):
    for way, ax in zip(prediction, line):
        steps = tensors(data, width, way)
        used = sum(n for rows in steps for row in rows for n in row)
        share[name, way] = 1 - used / sum(sizes(steps))
        extent[name, way] = min(sizes(steps)), max(sizes(steps))
        plot_rows(ax, steps[0], width, f"{name}, {way}:\n{100 * share[name, way]:.0f} % padding")

# %%
print(f"{'padding':<25}{'orders':>7}{'your guess':>12}{'like a chat':>13}  tokens a step")
for way, guess in prediction.items():
    print(f"{way:<25}{share['orders', way]:>7.0%}{guess:>10} %{share['like a chat', way]:>13.0%}", end="  ")
    print("{:,} … {:,}".format(*extent["like a chat", way]))

# %% claims
assert [f"{value:.0%}" for value in share.values()] == ["6%", "1%", "3%", "54%", "7%", "14%"]
length = sum(len(s.ids) for s in samples) / len(samples)
assert 2 * length < 256 < 3 * length
assert [round(high / low, 1) for low, high in list(extent.values())[4:]] == [13.1, 1.2]
assert [by_knob[knob][0]["tokens"] for knob in ("as it is", "packing")] == [731.5, 551.5]

# %% [markdown]
# **What happened?** Orders are all about as long as one another: there is hardly anything to save, and packing, two to a
# row with no room for a third, pads *more* than sorting does. With lengths like those of chats (invented here: 16 to
# 512 tokens) a batch as it comes is half padding, and again sorting beats packing, at least packing that only ever looks
# at the last row.
#
# What packing does buy: every step has about as many tokens, so the memory of one step is that of all. Sorted, one step
# has thirteen times the tokens of another. (In the record packing got fewer tokens a step than *as it is*, 551 against 731:
# that row compares unequal data.)
#
# **Exercise D.4 ●●○ (7 minutes).** Pack better. Sort, look at all rows that are open, and open a new one only if a sample
# fits into none.


# %%
def pack(lengths, width):
    """Lengths of the samples -> rows, each a list of samples' numbers, whose lengths sum to at most `width`."""
    ### BEGIN SOLUTION (about 8 lines)
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        for row in rows:
            if sum(lengths[j] for j in row) + lengths[i] <= width:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows
    ### END SOLUTION


# %%
check_pack(pack)

# %% [markdown]
# <details><summary>Hint 1</summary>The numbers in order of their lengths: <code>sorted(range(len(lengths)), key=lambda i:
# lengths[i], reverse=True)</code>.</details>
# <details><summary>Hint 2</summary>Python's <code>for ... else</code>: the <code>else</code> runs if no
# <code>break</code> ended the loop.</details>

# %%
with contextlib.suppress(Exception):  # nothing yet, or not right yet
    mine = pack(chat, 512)
    print(f"your packing: {len(mine)} rows, {1 - sum(chat) / 512 / len(mine):.1%} padding")

# %% [markdown]
# ### Who sees whom?
#
# In a packed row the second sample stands behind the first, and attention looks back. Is it told where a sample begins?

# %%
first, second = answers([12, 9])
row = collate([[first, second]], pad_token_id=0)
model.eval()


def logits(ids, positions):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids)[None], position_ids=torch.as_tensor(positions)[None]).logits[0]


alone = logits(second.ids, range(len(second.ids)))
packed = logits(row["input_ids"][0], row["position_ids"][0])[len(first.ids) :]
running = logits(row["input_ids"][0], range(len(first.ids) + len(second.ids)))[len(first.ids) :]
print("positions:", row["position_ids"][0, 18:28].tolist())
print(f"positions begin anew: logits off by {off(packed, alone):.2%}")
print(f"positions run on:     logits off by {off(running, alone):.0%}")

# %% claims
assert off(packed, alone) < 5e-5 and off(running, alone) > 0.05

# %% [markdown]
# Yes, by position ids that begin anew at 0: from these transformers builds the mask. With positions that run on, the
# second sample reads the first, and learns from it. No error, no warning either.
#
# ## 5 · Optimizer and compute dtype: what they do not buy
#
# *"A paged optimizer moves to the CPU by itself when GPU memory runs short."* True, of AdamW's states and of nothing else:

# %%
print(f"{'LLaMA-7B':<20}{'AdamW':>10}{'of it paged':>13}{'8 bits':>9}   GB")
held = {}
for method, rank in (("qlora", 16), ("qlora", 64), ("full", 16)):
    tensors = trained_tensors(SHAPES["llama-7b"], method, rank, "all-linear")
    names = ("adamw_torch", "paged_adamw_32bit", "adamw_8bit")
    plain, paged, eight = (optimizer_state_bytes(tensors, name) for name in names)
    held[method, rank] = [round(size / GB, 2) for size in (plain[0], paged[1], eight[0])]
    name = "full fine-tuning" if method == "full" else f"QLoRA, rank {rank}"
    print(f"{name:<20}{held[method, rank][0]:>10.2f}{held[method, rank][1]:>13.2f}{held[method, rank][2]:>9.2f}")

# %% claims
assert list(held.values()) == [[0.32, 0.14, 0.08], [1.28, 1.28, 0.32], [53.91, 53.91, 13.69]]
for rank in (16, 64):
    assert round(run_of(1, True, rank=rank)["measured"]["managed_bytes"] / GB, 2) == held["qlora", rank][1]

# %% [markdown]
# - For full fine-tuning these tricks are worth 40 GB and more. LoRA has already done most of it: 1.28 GB at rank 64.
# - Only tensors of 100,000 numbers and more are paged: at rank 16 that is not even half. (The record counts the same bytes.)
# - As long as there is room nothing moves and nothing is saved. It is an insurance against the one long batch.
#
# And the dtype? bf16, fp16 and fp32 ended within one another's seeds; fp32 took 0.7 GB more. fp16 and bf16 cost the same
# and fail differently:

# %%
for value in (1e-8, 1 + 1 / 512, 70_000.0):
    as_fp16, as_bf16 = (torch.tensor(value).to(dtype).item() for dtype in (torch.float16, torch.bfloat16))
    print(f"{value:<14.10g} fp16 {as_fp16:<14.10g} bf16 {as_bf16:.10g}")

# %% claims
assert torch.tensor(1e-8).half() == 0 and torch.tensor(70_000.0).half().isinf()
assert torch.tensor(1 + 1 / 512).half() > 1 and torch.tensor(1 + 1 / 512).bfloat16() == 1
dtypes = [validation[knob] for knob in ("as it is", "float16", "float32")]
assert max(map(min, dtypes)) < min(map(max, dtypes))
means = {knob: sum(peak[knob]) / 3 for knob in ("as it is", "float16", "float32")}
assert f"{means['float32'] - means['as it is']:.1f} {means['float16'] - means['as it is']:.1f}" == "0.7 0.0"

# %% [markdown]
# fp16 is finer but narrow: small gradients vanish, large values overflow. So the loss is scaled up (our loop does that),
# and a step that overflows is skipped. bf16 needs none of it. Take bf16 where the hardware has it, fp16 on a T4.
#
# ## 6 · The knobs that do change learning
#
# **Predict.** The learning rate goes from 1.5e-3 to 5e-3. Orders: 0.0135 *as it is*. Plain English: 3.80. And now?

# %%
prediction = {"orders": 0.008, "English": 3.80}  # ← your guesses, in nats per token

# %% alt="A point for each run: held-out loss on orders (better to the right) against loss on plain English. Whoever moves right mostly moves up: lr 1.5e-4 stays at 3.6 in English and learns little, batch 32 and rank 64 learn most and lose in English, lr 5e-3 loses most and gains nothing over as it is."
learn = ["as it is", "batch 32", *groups[4], "lr 1.5e-4", "lr 5e-4", "lr 5e-3"]
points = {knob: list(zip(validation[knob], prose[knob])) for knob in learn}
accuracy = json.loads((folder / "accuracy-nvidia-h100-80gb-hbm3.json").read_text(encoding="utf-8"))
start = next(run["before"]["prose"] for run in accuracy["runs"] if run["method"] == "nf4-double")
labels = {"as it is": (-6, 14), "batch 32": (42, -4), "rank 4": (20, -12), "rank 64": (-44, 4), "q, v": (-22, 8)}
labels |= {"q, k, v, o": (14, 20), "lr 1.5e-4": (0, 10), "lr 5e-4": (-12, -14), "lr 5e-3": (30, 4)}
_ = plot_tradeoff(new_axes(height=4), points, start, labels, (prediction["orders"], prediction["English"]))

# %%
mean = {knob: [sum(values) / 3 for values in zip(*seeds)] for knob, seeds in points.items()}
for knob, (orders, english) in sorted(mean.items(), key=lambda item: item[1][1]):
    print(f"{knob:<12} orders {orders:.4f}, English {english:.2f} ({english - start:+.2f})")

# %% claims
assert [f"{value:.3g}" for value in (*mean["as it is"], *mean["lr 5e-3"])] == ["0.0135", "3.8", "0.0131", "4.07"]
assert "lr 5e-3" not in better + worse and min(prose["lr 5e-3"]) > max(prose["as it is"])
assert max(prose["lr 5e-4"]) < min(prose["as it is"]) and f"{start:.2f}" == "3.61"
assert min(prose["rank 64"]) > max(prose["as it is"]) > min(prose["as it is"]) > max(prose["rank 4"])

# %% [markdown]
# **What happened?** On the orders the difference is `"open"`; English got clearly worse. What learns the orders faster
# (rate, rank, more samples) pays for it in what nobody trained. A likely reading: it moves the model farther from where it
# was. The loss on *your* data does not show that, so keep a text of the other kind. At 1.5e-2 both are ruined, and no NaN
# says so: the loop runs to its end.
#
# - **Targets** lie off that line. `q, k, v, o` at rank 16 learns the orders as well as rank *4* on all linears, with half
#   as many numbers again, and hurts English more; `q, v` is worse in both. Spread a small budget over all linears.
# - **Batch 32** saw four times the samples. It is not a better step, it is more data (and 3.4 GB).
# - **Rank** comes with alpha = 2 × rank here: more directions, each of them moving at the same rate.

# %%
trained = {knob: by_knob[knob][0]["trainable"] for knob in ("rank 4", "q, v", "q, k, v, o")}
print(", ".join(f"{knob}: {numbers:,} trained" for knob, numbers in trained.items()))

# %% claims
assert trained == {"rank 4": 1_221_120, "q, v": 921_600, "q, k, v, o": 1_843_200}
assert min(validation["q, v"]) > max(validation["rank 4"]) and min(prose["q, v"]) > max(prose["rank 4"])
assert abs(mean["q, k, v, o"][0] - mean["rank 4"][0]) < 0.001 and min(prose["q, k, v, o"]) > max(prose["rank 4"])
assert [run["losses"][-1] > 1.5 for run in by_knob["lr 1.5e-2"]] == [True] * 3
assert all(len(run["losses"]) == 30 for run in by_knob["lr 1.5e-2"])
assert round(max(peak["batch 32"]), 1) == 3.4

# %% [markdown]
# ### A learning rate means nothing without alpha
#
# Adam's first step does not ask how large a gradient is. So B moves by the rate, and the weight by rate × alpha / rank:

# %%
from qlora_lab.finetuning import LoraLinear


def moved(alpha, rate, steps):
    """What the adapter adds to a weight after some steps of AdamW, rank 4."""
    torch.manual_seed(0)
    layer = LoraLinear(torch.nn.Linear(64, 64, bias=False), rank=4, alpha=alpha)
    x, y = torch.randn(2, 32, 64)
    adamw = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=rate, weight_decay=0.0)
    for _ in range(steps):
        adamw.zero_grad()
        (layer(x) - y).square().mean().backward()
        adamw.step()
    return layer.delta().detach()


# %%
ratios = {}
for steps in (1, 30):
    reference = moved(32, 1e-3, steps)
    same = off(moved(64, 5e-4, steps), reference)
    ratios[steps] = [(moved(*more, steps).norm() / reference.norm()).item() for more in ((64, 1e-3), (32, 2e-3))]
    print(f"after {steps:>2} steps: alpha × 2 with rate / 2 is off by {same:.0%}")
    print(f"    alpha × 2 moves {ratios[steps][0]:.1f} times as far, rate × 2 {ratios[steps][1]:.1f} times")

# %% claims
assert all(abs(ratio - 2) < 0.1 for ratio in ratios[1]) and all(abs(ratio - 1.5) < 0.1 for ratio in ratios[30])
assert off(moved(64, 5e-4, 1), moved(32, 1e-3, 1)) < 1e-4

# %% [markdown]
# At first they are one knob, later nearly so (A moves with the rate alone). Before you copy a learning rate, look at the
# alpha / rank that stood beside it.
#
# ## 7 · The 7B recipe, line by line
#
# The usual one: NF4, double quantization, bf16, rank 16 (or 64), alpha 2 × rank, all seven linears, batch 4 × accumulation
# 4, checkpointing, paged AdamW. Undo one line at a time: how many GB more does a step of 7B need, 512 tokens a sample?
#
# **Predict.** Two lines save most by far. Which is first?

# %%
prediction = "16-bit base"  # ← or "no checkpointing"

# %% alt="Bars: how much more memory the 7B recipe would need with one of its lines undone. No checkpointing {{more['no checkpointing']:+.2f}} GB, a 16-bit base {{more['16-bit base']:+.2f}}, 16 x 1 instead of 4 x 4 +4.07, rank 64 +1.66, no double quantization +0.30, AdamW not paged 0.00, in 8 bits -0.24, q, k, v, o only -0.28."
recipe = {"rank": 16, "batch_size": 4, "sequence_length": 512, "gradient_checkpointing": True, "targets": "all-linear"}
recipe |= {"optimizer": "paged_adamw_32bit", "double_quant": True, "method": "qlora"}
undone = {
    "16-bit base": {"method": "lora"},
    "no double quantization": {"double_quant": False},
    "no checkpointing": {"gradient_checkpointing": False},
    "16 × 1, not 4 × 4": {"batch_size": 16},
    "rank 64": {"rank": 64},
    "AdamW, not paged": {"optimizer": "adamw_torch"},
    "AdamW in 8 bits": {"optimizer": "adamw_8bit"},
    "q, k, v, o only": {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}
total = estimate(SHAPES["llama-7b"], **recipe).total / GB
more = {line: estimate(SHAPES["llama-7b"], **(recipe | knobs)).total / GB - total for line, knobs in undone.items()}
_ = plot_undone(new_axes(height=3), more, total)

# %%
print(f"first: {max(more, key=more.get)}; your guess: {prediction}")

# %% claims
assert [f"{size:+.2f}" for size in more.values()] == (
    ["+9.61", "+0.30", "+10.67", "+4.07", "+1.66", "+0.00", "-0.24", "-0.28"]
)

# %% [markdown]
# **What happened?** At 4 × 512 tokens checkpointing saves more than the four bits do. (At 1 × 512 it saved {{peaks['without checkpointing'][0] - peaks['with checkpointing'][0]:.1f}} GB.) QLoRA
# gets a model onto the card; with samples to learn from, it lives on an older trick. Here is the recipe as a command of
# this course, and what each line has to show for itself:

# %%
from qlora_lab import train_qlora

RECIPE = """
--method qlora --compute-dtype bfloat16 --gradient-checkpointing --batch-size 16 --accumulation 1 --max-length 512
--targets all-linear --rank 16 --alpha 32 --optimizer paged_adamw_32bit --lr 2e-4 --schedule constant
"""
args = train_qlora.parser().parse_args(RECIPE.split())
mine = {"rank": args.rank, "batch_size": args.batch_size, "sequence_length": args.max_length}
needs = estimate(SHAPES["llama-7b"], args.method, optimizer=args.optimizer, **mine).total / GB
print(f"python -m qlora_lab.train_qlora --model <a 7B model> {RECIPE.strip()}")
gaps = one["peak_reserved"] / one["peak_allocated"] - 1
print(f"needs {needs:.1f} GB without gaps; at rank 64 the H100 had {gaps:.0%} of them, with nobody pressing")

# %% claims
for knobs, extra in (({"gradient_checkpointing": False}, "42.5"), ({"rank": 64}, "1.4")):  # with 16 samples at a time
    without = estimate(SHAPES["llama-7b"], args.method, optimizer=args.optimizer, **(mine | knobs)).total / GB
    assert f"{without - needs:.1f}" == extra
assert args.batch_size * args.accumulation == 16 and args.alpha == 2 * args.rank and args.gradient_checkpointing
assert f"{needs:.1f} {gaps:.0%}" == "10.3 24%" and needs * (1 + gaps) < 16 * ROOM

# %% [markdown]
# On 16 GB it is comfortable, on 12 GB a gamble.
#
# | line | what it buys | receipt |
# |---|---|---|
# | `--method qlora` | 9.6 GB, and 0.3 by double quantization | figure above; what it costs: [notebook 11](11_accuracy_comparison.ipynb) |
# | `--compute-dtype bfloat16` | 0.7 GB against fp32 at 135M, no loss scaling | section 5 |
# | `--gradient-checkpointing` | 42.5 GB (10.7 at 4 × 512 tokens), for half as much arithmetic again | figure above, section 2 |
# | `--batch-size 16 --accumulation 1` | the fewest passes; 4 × 4 if 4.1 GB are missing | section 2 |
# | `--targets all-linear` | orders *and* English, against `q, v` | section 6 |
# | `--rank 16` | 1.4 GB against 64; less is learned, less is forgotten | section 6 |
# | `--alpha 32` | nothing by itself: it scales the rate | section 6 |
# | `--optimizer paged_adamw_32bit` | 0.00 GB while there is room, an insurance | section 5 |
# | `--lr 2e-4 --schedule constant` | the authors' choice; **not** measured here at 7B | below |
#
# Its authors' own script for 7B (`scripts/finetune_guanaco_7b.sh` in artidoro/qlora) has rank 64, alpha 16, dropout 0.1,
# rate 2e-4, constant, batch 4 × 4, 1,875 steps, gradients clipped at 0.3, checkpointing. (It asks for 3 % of warm-up, too; but
# transformers' `constant` schedule ignores that.)

# %%
per_step = {
    "the authors' script": 2e-4 * 16 / 64,
    "the recipe above": args.lr * args.alpha / args.rank,
    "as it is": 1.5e-3 * 2,
}
for name, step in per_step.items():
    print(f"{name:<20} rate × alpha / rank = {step:.0e}")

# %% claims
from transformers import get_scheduler

nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
assert get_scheduler("constant", nothing, num_warmup_steps=57, num_training_steps=1875).get_last_lr() == [2e-4]
assert [f"{step:.0e}" for step in per_step.values()] == ["5e-05", "4e-04", "3e-03"] and 1875 * 16 == 30_000

# %% [markdown]
# The same "2e-4" moves a weight eight times as far with alpha 32 at rank 16 as in their script, and this course's setting
# sixty times: it has 30 steps for an easy task, they had 1,875 steps (30,000 samples). No record here says which rate is
# best for *your* 7B run. Try three, a factor of three apart, for a few dozen steps; and measure a text of the other kind.
#
# ## 8 · The same run through TRL
#
# TRL's `SFTTrainer` is what most people use. Is it another training? A tiny model with a 4-bit base and random
# weights, the same orders, five steps, once with our loop:

# %%
import datasets

from qlora_lab.finetuning import build_random
from qlora_lab.memory import Shape
from qlora_lab.training.schedules import rate

STEPS, WARMUP, RATE = 5, 2, 2e-2
batches = Batches(samples[:64], batch_size=2)


def four_bit_model():
    shape = Shape(64, 128, 2, 4, 2, vocab_size=49_152, tie_word_embeddings=True)
    base = build_random(shape, "nf4", device="cpu", compute_dtype=torch.float32)  # or load_model(quantization="nf4")
    return add_adapter(base, rank=4, alpha=8)


settings = {"learning_rate": RATE, "warmup_steps": WARMUP, "pad_token_id": tokenizer.pad_token_id}
ours = [step.loss for step in train_steps(four_bit_model(), batches, steps=STEPS, **settings)]

# %% claims
of_transformers = get_scheduler("cosine", torch.optim.AdamW(tiny().parameters()), WARMUP, STEPS)
assert of_transformers.get_last_lr() == [0] and rate(1, STEPS, WARMUP, "cosine") > 0

# %% [markdown]
# And with TRL: the same samples in the same order, `completion_mask` says which tokens are learned. Five of its defaults
# have to go. The optimizer and its schedule are handed over, since transformers' own warm-up begins at a rate of 0 and
# wastes a step.

# %%
order = [rows[0] for step in itertools.islice(batches, STEPS) for micro_batch in step for rows in micro_batch]
masks = [[0] * s.prompt_length + [1] * (len(s.ids) - s.prompt_length) for s in order]
columns = {"input_ids": [list(s.ids) for s in order], "completion_mask": masks}
changed = {
    "max_length": None,  # or samples are cut at 1,024 tokens
    "train_sampling_strategy": "sequential",  # or they are shuffled
    "bf16": False,  # or it computes in bf16
    "gradient_checkpointing": False,  # or it recomputes
    "logging_steps": 1,  # or it tells the mean of ten losses
}
rest = {"per_device_train_batch_size": 2, "max_steps": STEPS, "completion_only_loss": True, "use_cpu": True}
rest |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}


# %%
def sft_losses(model, adapters=None):
    """What dtype the adapters had (`adapters`, or TRL's choice), and the losses of the same steps."""
    from trl import SFTConfig, SFTTrainer

    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: rate(step + 1, STEPS, WARMUP, "cosine"))
    trainer = SFTTrainer(
        model,
        SFTConfig(tempfile.mkdtemp(), **changed, **rest),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer,
        optimizers=(adamw, schedule),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(adapters or parameter.dtype)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return str(trained[0].dtype).removeprefix("torch."), losses


# %%
# NBVAL_IGNORE_OUTPUT
# because TRL is optional (Python 3.11 and newer): without it the recorded losses are shown
from IPython.utils.capture import capture_output

RECORDED = {  # TRL 1.16.0, torch 2.13.0
    "bfloat16": [10.821074, 10.758657, 10.628865, 10.574790, 10.549689],
    "float32": [10.821074, 10.758661, 10.628654, 10.574750, 10.549627],
}
try:
    from trl import SFTConfig
except ImportError:
    SFTConfig = None
theirs = RECORDED
if SFTConfig:
    with capture_output():
        theirs = dict([sft_losses(four_bit_model()), sft_losses(four_bit_model(), torch.float32)])
else:
    print("TRL is not installed here (`pip install trl==1.16.0`): not run, its losses below are recorded")
print(f"{'our loop':<16}", *(f"{loss:.6f}" for loss in ours))
for dtype, losses in theirs.items():
    print(f"{'TRL, ' + dtype:<16}", *(f"{loss:.6f}" for loss in losses))

# %%
distance = {dtype: max(abs(a / b - 1) for a, b in zip(ours, losses)) for dtype, losses in theirs.items()}
print("within 0.1 % of our loop's:", {dtype: d < 1e-3 for dtype, d in distance.items()})

# %% claims
if SFTConfig:
    default = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    assert default["max_length"] == 1024 and default["train_sampling_strategy"] == "random"
    assert default["bf16"] is None and default["gradient_checkpointing"] and default["logging_steps"] == 10
assert list(distance) == ["bfloat16", "float32"] and max(distance.values()) < 1e-3
assert SFTConfig is None or distance["float32"] < 5e-5
assert ours[-1] < ours[0] - 0.2

# %% [markdown]
# The same losses. With one catch: they were fp32 adapters that went in. On a 4-bit base TRL turns them into **bf16**,
# silently (as the paper does, its source says). That halves their memory, but bf16 keeps 8 significant bits of a number,
# and a small update can be rounded away. To keep fp32, cast them back after the trainer is made, as above.
#
# So a training loop is not what makes a result. The knobs are, and TRL's defaults are knobs that somebody has turned
# for you: read them.
#
# ## Recap
#
# - A ruler first: equal settings, several seeds. Speeds of equal work differed by a factor of 1.4 here.
# - Memory knobs (checkpointing, accumulation, paging, 8-bit states) showed no change in what is learned. Checkpointing
#   saved 31 to 81 %, depending on the tokens, for half as much arithmetic again, not a third.
# - Fill the card with samples, with checkpointing, before you accumulate. Weight micro-batches by target tokens.
# - Rate, rank and data decide how far the model moves: better on yours, worse on the rest. All linears are worth it.
# - A learning rate is only half a setting; the other half is alpha / rank.
#
# This serves *train a QLoRA model successfully*, *measure and compare memory* and *analyse the loss of accuracy*.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** back to [the map](00_start_here.ipynb).
