# %% [markdown]
# # 17 · Better codebooks
#
# NF4 is a table of sixteen numbers from 2023. Others have come since: AF4, BOF4, MXFP4, NVFP4, each with a paper that shows
# a smaller error or a faster chip. Which of them is best? In this lesson you make one yourself, put all of them on one axis, and then
# ask a model whether it notices the difference. At the end you spend spare memory where the model needs it most.
#
# | you need | |
# |---|---|
# | time | 70 minutes |
# | computing | up to 2 minutes on two CPU cores |
# | memory | 1 GB |
# | GPU | not needed |

# %% machinery "Imports, and the records"
import json
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import torch

import qlora_lab
from qlora_lab.classroom.checks import check_best_levels, check_choose, check_find_past, progress
from qlora_lab.classroom.lessons.n17 import pasts
from qlora_lab.classroom.lessons.n17.figures import (
    percent,
    plot_errors,
    plot_levels,
    plot_plans,
    plot_rises,
    plot_sensitivity,
    told,
)
from qlora_lab.classroom.plots import new_axes
from qlora_lab.classroom.samples import bundled_weight, sample
from qlora_lab.classroom.widgets import explore
from qlora_lab.quantization import NF4, af4, bof4, optimal_levels, quantize_levels, relative_rms

folder = Path(qlora_lab.__file__).parents[1] / "data" / "records"
record, on_gpu, layers = (
    json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("codebooks-cpu-x86_64", "codebooks-nvidia-h200", "sensitivity-nvidia-h200")
)
for each in (record, on_gpu, layers):
    print(f"recorded on {each['device']}, {each['date']}, by `{each['command']}`")

# %% [markdown]
# ## 1 · Best for what?
#
# Begin with a table of one. The five numbers 0, 0, 1, 2 and 12 shall all be replaced by one and the same number.
#
# **Predict.** Which is the best: 1, 3 or 6?

# %%
prediction = ...  # ← 1, 3 or 6

# %%
numbers = torch.tensor([0.0, 0, 1, 2, 12])
for level in (1, 3, 6):
    misses = (numbers - level).abs()
    print(f"{level}: the misses add up to {misses.sum():.0f}, their squares to {misses.square().sum():.0f}")
print(told(prediction))

# %% claims
assert [(numbers - n).abs().sum() for n in (1, 3, 6)] == [14, 18, 27]
assert [(numbers - n).square().sum() for n in (1, 3, 6)] == [124, 104, 149]
assert numbers.median() == 1 and numbers.mean() == 3

# %% [markdown]
# **What happened?** It depends on what you count. The sum of the misses (the *absolute* error) is least at 1, which is the median of
# the five. The sum of their squares is least at 3, their mean: squares make one large miss worse than many small ones, so the mean
# moves towards the 12. There is no best table before somebody has chosen an error.
#
# ## 2 · Make one: AF4
#
# Remember how a block is quantized: its 64 numbers are divided by the largest absolute value among them, and each becomes the nearest
# of sixteen levels between −1 and 1. Where should the levels be? *Lloyd's algorithm* finds out by repeating two steps:
#
# 1. Each number goes to its nearest level.
# 2. Each level moves to the centre of its numbers: to their median for the absolute error, to their mean for the squared one.
#
# AF4 (Yoshida, 2023) is made with medians. It looks at the positive numbers alone and gives them eight levels, the largest fixed at 1. It gives
# seven to the negative ones. In the end it puts a 0 between them.
#
# **Exercise 17.1 ●●○ (8 minutes).** Write Lloyd's algorithm for positive numbers. Begin with levels at equal distances, such as ¼, ½, ¾ and 1 for
# `count=4`; the last never moves.


# %%
def best_levels(values, count, rounds):
    """Levels with the least absolute error: Tensor[count], ascending, the last is 1; values in (0, 1]."""
    ### BEGIN SOLUTION (about 6 lines)
    levels = torch.linspace(0, 1, count + 1)[1:]
    for _ in range(rounds):
        nearest = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
        for i in range(count - 1):
            levels[i] = values[nearest == i].median()
    return levels
    ### END SOLUTION


# %%
check_best_levels(best_levels)

# %% [markdown]
# <details><summary>Hint 1</summary>The nearest level changes at the midpoints between levels. <code>torch.bucketize(values, midpoints)</code> gives each
# number the index of its level.</details>
# <details><summary>Hint 2</summary><code>values[nearest == i].median()</code> is where level i moves to, for all i but the
# last.</details>

# %%
import bitsandbytes.functional as bnb

gaussian = sample("Gaussian", 2**19)
blocks = gaussian.view(-1, 64)
scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()[: 2**18]
up, down = best_levels(scaled[scaled > 0], 8, 120), best_levels(-scaled[scaled < 0], 7, 120)
theirs = bnb.get_4bit_type("af4", device="cpu").sort().values
if isinstance(up, torch.Tensor):
    mine = torch.cat([-down.flip(0), torch.zeros(1), up])
    print(f"largest difference from bitsandbytes' table: {(mine - theirs).abs().max():.3f}")

# %% claims
assert torch.allclose(af4(), theirs, atol=2e-7)
if isinstance(up, torch.Tensor):
    assert (mine - theirs).abs().max() < 0.01

# %% [markdown]
# It is AF4, up to the luck of a quarter of a million random numbers. (The library integrates instead of drawing numbers, and
# gets all its digits: `af4()`.)
#
# **Predict.** AF4 is made for the absolute error. By how many per cent is its absolute error smaller than NF4's, on Gaussian numbers in
# blocks of 64?

# %%
prediction = ...  # ← your guess, in per cent; negative if it is larger


# %%
def errors(levels, signed=False, x=gaussian):
    """Absolute and squared error of blocks of 64."""
    error = quantize_levels(x, levels, 64, signed).dequantize() - x
    return error.abs().mean().item(), error.square().mean().item()


of_nf4, of_af4 = errors(NF4), errors(af4())
print(
    f"absolute error: NF4 {of_nf4[0]:.4f}, AF4 {of_af4[0]:.4f}, {1 - of_af4[0] / of_nf4[0]:+.1%} smaller; {told(prediction)}"
)

# %% claims
assert f"{1 - of_af4[0] / of_nf4[0]:.1%}" == "-3.2%" and of_af4[1] > of_nf4[1]

# %% alt="Three rows of ticks from −1 to 1: the levels of NF4, AF4 and BOF4-S. AF4 has three levels close together at zero, −0.05, 0 and 0.04. NF4's neighbours of zero are at −0.09 and 0.08. BOF4-S has no level at −1; its lowest is −0.86."
tables = {"NF4": NF4, "AF4": af4(), "BOF4-S": bof4(64, signed=True)}
_ = plot_levels(new_axes(height=2.2), tables)
with_zero = errors(optimal_levels(64, squared=False, weight=0, keep=(-1.0, 0.0, 1.0)))
print(f"AF4's recipe, but with the zero there from the start: absolute error {with_zero[0]:.4f}")

# %% claims
assert with_zero[0] < of_nf4[0] * 1.002 < of_af4[0]

# %% [markdown]
# **What happened?** It is *larger*. Look at the middle of AF4: three levels crowd around zero. The innermost levels of either half were
# right as long as there was no zero between them. The zero that was added afterwards takes over most of their numbers, and the levels that are wasted
# there are missing farther out. With the zero in its place from the start, the same recipe is as good as NF4.
#
# ## 3 · Count where it counts: BOF4
#
# AF4 has a second flaw. Here are two blocks of four numbers, and the same miss of 0.05 in both, after the division:

# %%
for block in (torch.tensor([0.1, -0.2, 0.05, 0.0]), torch.tensor([2.0, -4.0, 1.0, 0.0])):
    print(f"largest {block.abs().max():.1f}: a miss of 0.05 becomes one of {0.05 * block.abs().max():.2f}")

# %% [markdown]
# When the block is multiplied back, a miss in a block with a large maximum is a large miss. So BOF4 (Blumenberg and others, 2025) weights each number with its
# block's maximum. It keeps −1, 0 and 1 from the start, and comes in two kinds, one for each error.
#
# BOF4-S has one more idea. A block is divided by its largest number *with its sign*:

# %%
block = torch.tensor([0.5, -2.0, 1.0, -1.0])
print(f"by 2: {(block / 2).tolist()}   by -2: {(block / -2).tolist()}")

# %% [markdown]
# The largest is then always at +1. No level has to be spent on −1, and it can go where it is needed.
#
# **Predict.** NF4 comes from quantiles. Nobody made it for any error. How far is its absolute error above that of the best table that keeps −1, 0 and
# 1? And its squared error?

# %%
prediction = {"absolute %": ..., "squared %": ...}

# %% machinery "Errors over NF4's, and what the paper has for Llama-3.1 8B"
from qlora_lab.experiments.codebooks import PUBLISHED

made = {
    f"BOF4{s} ({kind})": (bof4(64, kind == "squared", bool(s)), bool(s))
    for s in ("", "-S")
    for kind in ("absolute", "squared")
}
made = {"NF4": (NF4, False), "AF4": (af4(), False)} | made
measured = {name: errors(*of) for name, of in made.items()}
paper = {name: (PUBLISHED[name][0] / PUBLISHED["NF4"][0], PUBLISHED[name][1] / PUBLISHED["NF4"][1]) for name in made}


def over_nf4(name):
    return tuple(a / b for a, b in zip(measured[name], measured["NF4"], strict=True))


# %%
print(f"{'error over NF4':<20}{'absolute':>10}{'squared':>10}    {'Llama-3.1 8B, by the paper':>20}")
for name in made:
    print(
        f"{name:<20}{over_nf4(name)[0]:>10.3f}{over_nf4(name)[1]:>10.3f}{paper[name][0]:>15.3f}{paper[name][1]:>10.3f}"
    )
behind = [measured["NF4"][i] / measured[f"BOF4 ({kind})"][i] - 1 for i, kind in enumerate(("absolute", "squared"))]
print(f"NF4 is above the best by {behind[0]:.2%} and {behind[1]:.1%}; {told(prediction)}")

# %% claims
assert behind[0] < 0.001 and 0.04 < behind[1] < 0.06
for signed in ("", "-S"):
    a, b = measured[f"BOF4{signed} (absolute)"], measured[f"BOF4{signed} (squared)"]
    assert a[0] < b[0] and b[1] < a[1]
assert all(abs(x - y) < 0.025 for name in made for x, y in zip(over_nf4(name), paper[name]))

# %% [markdown]
# **What happened?** In absolute error, NF4 cannot be improved without giving up −1, 0 or 1: by chance, the quantiles lie where the medians do.
# In squared error there are {{behind[1]:.0%}} to gain. Each BOF4 wins in its own error and loses in the other, as with the five numbers. The free level brings more than
# either. And the paper, which measured this on a real model of 8 billion weights, has nearly the same ratios as we have from random numbers.
#
# ## 4 · Everything on one axis
#
# Formats differ in more than their tables. Smaller blocks have smaller errors and more scales to pay for, so compare at equal *bits per parameter*,
# scales included. Two formats of llama.cpp join in. Q4_0 has the integers −8 to 7 in blocks of 32; the number farthest from zero becomes −8, so its scale has a
# sign, too. Q4_1 has the integers 0 to 15 and keeps a minimum for each block. Their scales have 16 bits. The lines in the figure have scales in 8 bits
# ([double quantization](04_double_quantization.ipynb)).
#
# **Predict.** Gaussian numbers, about 4.5 bits per parameter, squared error. Which is best: NF4, BOF4-S, Q4_0 or Q4_1?

# %%
vote = ...  # "NF4", "BOF4-S", "Q4_0" or "Q4_1"

# %% machinery "Draw errors over bits, and let them be explored"
kinds = {
    "Gaussian": "Gaussian",
    "Laplace (longer tails)": "Laplace",
    "Student-t (longer still)": "Student-t",
    "embeddings of our model": "embeddings",
    "linear layers of MiniLM": "encoder, all linear layers",
}
by_kind = {kind: [row for row in record["errors"] if row["data"] == of] for kind, of in kinds.items()}


def draw(kind, measure):
    return plot_errors(new_axes(height=3.6), by_kind[kind], measure)


def at(kind, name, block_size, measure):
    """The error in per cent; scales in 8 bits, or the format's own."""
    row = next(
        r
        for r in by_kind[kind]
        if (r["format"], r["block_size"]) == (name, block_size) and r["scales"] in ("8 bits", "its own")
    )
    return percent(row, measure)


# %% alt="Error in per cent over bits per parameter, Gaussian numbers, squared error. Six falling lines with points at blocks of 256 to 16: BOF4-S for the squared error is lowest everywhere, 8.6 % at 4.13 bits and 7.2 % at 4.51; NF4 has 9.2 and 8.1; INT4 and E2M1 are highest, 10.8 and 10.6 at 4.13. Single points at 4.5 bits: Q4_0 8.6 %, NVFP4 9.5 %; MXFP4 11.5 % at 4.25; Q4_1 7.8 % at 5 bits."
explore(
    draw,
    kind=ipywidgets.Dropdown(options=list(kinds), value="Gaussian", description="numbers"),
    measure=ipywidgets.SelectionSlider(options=["squared", "absolute"], value="squared", description="error"),
)

# %%
rivals = {"NF4": 16, "BOF4-S (squared)": 16, "BOF4-S (absolute)": 16, "Q4_0": 32, "Q4_1": 32}
print(f"{'squared error (%)':<26}" + "".join(f"{name:>19}" for name in rivals))
for kind in kinds:
    print(f"{kind:<26}" + "".join(f"{at(kind, name, size, 'squared'):>19.2f}" for name, size in rivals.items()))
print(f"bits: 4.51 in blocks of 16; Q4_0 4.5, Q4_1 5 in blocks of 32; {told(vote)}")

# %% claims
gauss = {name: at("Gaussian", name, size, "squared") for name, size in rivals.items()}
assert min(gauss, key=gauss.__getitem__) == "BOF4-S (squared)"
assert gauss["Q4_1"] < gauss["NF4"] < gauss["Q4_0"]
for kind in list(kinds)[1:4]:
    assert at(kind, "BOF4-S (absolute)", 16, "squared") < at(kind, "BOF4-S (squared)", 16, "squared")
assert at("linear layers of MiniLM", "BOF4-S (squared)", 64, "squared") < at(
    "linear layers of MiniLM", "BOF4-S (absolute)", 64, "squared"
)
assert all(
    at(kind, "BOF4-S (absolute)", 16, "squared") < at(kind, name, 32, "squared")
    for kind in kinds
    for name in ("Q4_0", "Q4_1")
)
embeddings = [at("embeddings of our model", f"BOF4-S ({kind})", 64, "squared") for kind in ("squared", "absolute")]
assert f"{embeddings[0]:.1f} {embeddings[1]:.1f}" == "10.9 10.3"

# %% [markdown]
# (A squared error is shown as its root, in per cent of the root mean square of the numbers.)
#
# **What happened?** In blocks of 16 with cheap scales, BOF4-S beats even Q4_1, which takes half a bit more. Now move the sliders to the embeddings.
# The table made for the *squared* error loses, at the squared error, to the one made for the *absolute* error: in blocks of 64 it has {{embeddings[0]:.1f}} % and the
# other {{embeddings[1]:.1f}} %. These tables are best for Gaussian numbers. Embeddings have longer tails, so that a block's maximum is larger, its other numbers lie
# closer to zero, and levels closer to zero suit them. The weights of MiniLM, a small model that turns text into vectors, were published in float32 and never quantized. They are more
# Gaussian; for them the table for the squared error is the best again.
#
# One more remedy: keep the few numbers beyond four standard deviations in 16 bits, with their places.

# %%
for kind in list(kinds)[3:]:
    for name, size in (("NF4", 64), ("NF4, outliers apart", 64), ("NF4", 32)):
        row = next(r for r in by_kind[kind] if (r["format"], r["block_size"], r["scales"]) == (name, size, "8 bits"))
        print(f"{kind:<26}{name:<21}blocks of {size}: {row['bits']:.3f} bits, {percent(row, 'squared'):.2f} %")

# %% claims
rows = {
    (kind, name, size): next(
        r for r in by_kind[kind] if (r["format"], r["block_size"], r["scales"]) == (name, size, "8 bits")
    )
    for kind in list(kinds)[3:]
    for name, size in (("NF4", 64), ("NF4, outliers apart", 64), ("NF4", 32))
}
mini = "linear layers of MiniLM"
assert rows[mini, "NF4, outliers apart", 64]["bits"] < rows[mini, "NF4", 32]["bits"]

# %% [markdown]
# It helps, and costs bits where there are many such numbers. Halving the blocks does about as much for the same price.
#
# ## 5 · Why hardware chose otherwise
#
# The newest GPUs multiply 4-bit numbers directly, and none of the tables above is built into them. Their numbers are *E2M1*: a sign, two bits of
# exponent, one of mantissa.

# %%
e2m1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
print("four times the products of E2M1:", (4 * e2m1[:, None] * e2m1).unique().int().tolist())
print("different products of NF4's levels:", len((NF4[:, None] * NF4).unique()))

# %% claims
assert torch.equal((4 * e2m1[:, None] * e2m1).round(), 4 * e2m1[:, None] * e2m1)

# %% [markdown]
# Every product of two E2M1 numbers is a whole number of quarters, so small integer circuits can add up thousands of them exactly. An NF4 code is only
# a *name* of a number: it must be looked up and turned into bf16 before anything can be multiplied, as [notebook 13](13_why_is_it_slow.ipynb) showed. And what is
# multiplied with the weights must have 4 bits, too. Inputs of layers are not distributed like weights, so a table made for weights need not suit them.
#
# Scales must be cheap as well. *MXFP4* shares one power of two among 32 numbers: multiplying by that only shifts an exponent. *NVFP4* shares an 8-bit
# float among 16.

# %%
for size, hardware in ((32, "MXFP4"), (16, "NVFP4")):
    for name in ("NF4", "E2M1", hardware):
        print(f"blocks of {size}: {name:<6}{at('Gaussian', name, size, 'squared'):6.2f} %", end="   ")
    print()

# %% claims
g = {
    key: at("Gaussian", *key, "squared")
    for key in (("NF4", 32), ("E2M1", 32), ("MXFP4", 32), ("NF4", 16), ("E2M1", 16), ("NVFP4", 16))
}
assert g["NF4", 32] < g["E2M1", 32] < g["MXFP4", 32] and g["NF4", 16] < g["E2M1", 16] < g["NVFP4", 16]
assert g["NVFP4", 16] / g["E2M1", 16] < 1.02 < 1.1 < g["MXFP4", 32] / g["E2M1", 32]

# %% [markdown]
# At equal bits, E2M1's levels lose to NF4's, and a power of two as the scale loses once more: a block's maximum lands anywhere between 4 and 8, and what is beyond 6 is cut
# off. NVFP4's 8-bit float costs almost nothing beyond the levels. QLoRA multiplies in bf16 anyway, so it is free to use any table.
#
# ## 6 · Does the model notice?
#
# So far we have counted errors of weights. QLoRA's paper has a warning for that. It compared two more 4-bit floats by perplexity (how surprised a model
# is by text; lower is better): E2M1 had 31.07, and E3M0, which is all exponent, had 29.48. And their errors?

# %%
e3m0 = torch.tensor(sorted([0.0, *(sign * 2.0**-k for k in range(7) for sign in (1, -1)), 1.0]))
for name, levels in {"E2M1": torch.cat([-e2m1.flip(0), e2m1]) / 6, "E3M0": e3m0}.items():
    print(f"{name}: squared error {100 * errors(levels)[1] ** 0.5:.1f} %")

# %% claims
assert errors(e3m0)[1] > 2 * errors(torch.cat([-e2m1.flip(0), e2m1]) / 6)[1]

# %% [markdown]
# The one with the much larger error had the better perplexity. So ask a model. We put all 210 linear layers of the bundled model into each format, in blocks
# of 32 (about 4.25 bits per parameter), and measured the loss on the course's prose, and on answers to orders, which this model has not learned to give.
#
# **Predict.** In 16 bits the loss on prose is 3.42 nats per token. By how much does it rise with NF4?

# %%
prediction = ...  # ← your guess, in nats per token

# %% alt="Pairs of bars: the rise of the loss on prose and on answers to orders, in nats per token. NF4 0.20 and 0.21, AF4 0.12 and 0.31, BOF4 for the squared error 0.19 and 0.31, BOF4-S for the absolute error 0.20 and 0.01, BOF4-S for the squared error 0.21 and 0.44, E2M1 0.28 and 0.25, INT4 0.30 and 0.48, MXFP4 0.58 and 0.75, NF3 0.97 and 1.75."
names = ["NF4", "AF4", "BOF4 (squared)", "BOF4-S (absolute)", "BOF4-S (squared)", "E2M1", "INT4", "MXFP4", "NF3"]
losses = {(row["format"], row["block_size"]): row for row in on_gpu["losses"]}
texts = {"prose": "prose", "answers to orders": "validation"}
rises = {
    name: {kind: losses[name, 32][text] - losses["none", 0][text] for kind, text in texts.items()} for name in names
}
_ = plot_rises(new_axes(height=4.2), rises, prediction)
print(f"in 16 bits: {losses['none', 0]['prose']:.2f} nats per token of prose; {told(prediction)}")

# %% claims
assert f"{losses['none', 0]['prose']:.2f}" == "3.42"
assert " ".join(f"{rises[n][k]:.2f}" for n in names for k in texts) == (
    "0.20 0.21 0.12 0.31 0.19 0.31 0.20 0.01 0.21 0.44 0.28 0.25 0.30 0.48 0.58 0.75 0.97 1.75"
)

# %% [markdown]
# **What happened?** Where errors are far apart, the model notices: three bits or MXFP4 cost much. Among the good tables the order is *not* that of the
# errors, and it is another one for the other text. AF4 costs the least on prose and much on orders. BOF4-S has the smallest squared error, and is no better than
# NF4. Each bar is one draw: rounding moves a hundred million weights at once, and some of these moves help by chance. What do others find?

# %%
print(
    "WikiText-2 perplexity of Llama-3.1 8B:", {name: PUBLISHED[name][2] for name in ("NF4", "AF4", "BOF4-S (squared)")}
)
turned = {(row["format"], row["block_size"]): row["turned"] for row in record["outputs"]}
print("MiniLM's vectors turned by", {name: round(turned[name, 32], 3) for name in names})

# %% claims
assert turned["BOF4-S (squared)", 32] == min(turned[name, 32] for name in names) < 0.85 * turned["NF4", 32]

# %% [markdown]
# The paper's differences on 8 billion weights are small. The last line is a second opinion of ours: MiniLM turns a paragraph into a vector, and the numbers say how far its vectors turn (1 − cosine, the
# mean of 49 paragraphs) when its weights are rounded. There the order nearly follows the errors, and BOF4-S is the best. So a smaller error is a good bet, and no promise.
#
# **Exercise 17.2 ●●● (12 minutes).** One format is missing in the figure. Somebody has tried it on this model and writes: *"Q4_1 beats them all! The linear layers of SmolLM2
# come back with an error of 0.1 %, where NF4 has 9 %."* The measurement is right. Find out what is wrong with the claim.
#
# `pasts.FORMATS` holds five functions by name, each from a tensor to what is left of it after that format. Write `find_past(x, formats)`: it returns the name of the format that `x` was in
# once, before somebody stored it as bfloat16, or `"never"`. Then ask it about the bundled model below, and about a model of your own.


# %%
def find_past(x, formats):
    """The name of the format that x was quantized to before, or "never"."""
    ### BEGIN SOLUTION (about 4 lines)
    lost = {name: relative_rms(x, of(x)) for name, of in formats.items()}
    best = min(lost, key=lost.__getitem__)
    return best if lost[best] < 0.01 else "never"
    ### END SOLUTION


# %%
check_find_past(find_past)

# %% [markdown]
# <details><summary>Hint 1</summary>Quantize it to each of the formats. What does a number lose that already is one of the levels?</details>
# <details><summary>Hint 2</summary><code>relative_rms(x, of(x))</code> is a few per cent or more for every 4-bit format, unless the numbers were in it before. bfloat16
# adds a rounding error of a few parts in a thousand.</details>

# %%
for name in ("model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
    x = bundled_weight(name)[
        :576
    ].float()  # ← a tensor of your own model: safetensors.safe_open(FILE, "pt").get_tensor(NAME)
    lost = ", ".join(f"{form} {relative_rms(x, of(x)):.4f}" for form, of in pasts.FORMATS.items())
    print(f"{name}: {find_past(x, pasts.FORMATS)}\n   {lost}")

# %% [markdown]
# <details><summary>What you should have found</summary>The bundled model came through a file in Q4_1, and was stored as bfloat16 afterwards. Q4_1 loses nothing there because everything that it
# loses was lost already. That is why it is left out of the figure, and why errors in this lesson are not measured on these layers. The embeddings were in 8 bits once, which 4-bit formats do not
# notice.</details>
#
# ## 7 · Which layers suffer?
#
# Formats are not the only choice: some layers could have more bits than others. A *sensitive* layer makes the loss rise a lot when it alone is in 4 bits.
# The bundled model has 210 linear layers, seven in each of 30 decoder layers. We put each by itself into NF4 and measured the loss on half of the prose.
#
# **Predict.** For how many of the 210 does the loss *fall* when they are rounded?

# %%
prediction = ...  # ← your guess

# %% alt="A field of seven kinds of layers by 30 decoder layers, coloured by the change of the loss. Most fields are pale. Rings mark the five largest: down_proj of decoder layers 29, 11 and 9, v_proj of 6 and 18. Many fields have the other colour: there the loss falls."
base, all_in_4 = layers["losses"]["as it is"], layers["losses"]["all in 4 bits"]
chosen_on, other = "prose, even", "prose, odd"
alone = {name: losses[chosen_on] - base[chosen_on] for name, losses in layers["alone"].items()}
_ = plot_sensitivity(new_axes(height=2.8), alone, "change of the loss")

# %%
for name in sorted(alone, key=alone.__getitem__, reverse=True)[:5]:
    elsewhere = {text: layers["alone"][name][text] - base[text] for text in (other, "orders")}
    print(f"{name:<32} {alone[name]:+.3f}; other prose {elsewhere[other]:+.3f}; orders {elsewhere['orders']:+.3f}")
print(f"the loss falls for {sum(rise < 0 for rise in alone.values())} of {len(alone)}; {told(prediction)}")
ranks = {t: torch.tensor([of[t] for of in layers["alone"].values()]).argsort().argsort().float() for t in base}
agree = {t: torch.corrcoef(torch.stack([ranks[chosen_on], ranks[t]]))[0, 1].item() for t in (other, "orders")}
print(
    f"is the order of the layers the same (1) or not at all (0)? other prose {agree[other]:.2f}, orders {agree['orders']:.2f}"
)
print(f"all alone, added up {sum(alone.values()):.3f}; all at once {all_in_4[chosen_on] - base[chosen_on]:.3f}")

# %% claims
assert sum(rise < 0 for rise in alone.values()) == 70
top = sorted(alone, key=alone.__getitem__, reverse=True)[:5]
assert [name.removeprefix("model.layers.") for name in top[:3]] == [f"{n}.mlp.down_proj" for n in (29, 11, 9)]
assert {name.removeprefix("model.layers.") for name in top[3:]} == {f"{n}.self_attn.v_proj" for n in (6, 18)}
assert all(layers["alone"][name][other] > base[other] for name in top)
assert sum(alone[name] for name in top) > 0.3 * sum(alone.values())
assert agree[other] > 0.7 and abs(agree["orders"]) < 0.1

# %% [markdown]
# **What happened?** Five layers of 210 do a third of the damage, and they do it on the other half of the prose, too. For {{sum(rise < 0 for rise in alone.values())}} layers rounding *helps*, by chance. And the
# parts add up to the whole, nearly, so that one may plan with them. But on orders the order of the layers is another one altogether. A sensitivity belongs to a text.
#
# ## 8 · Spend what is left
#
# Your card has room for a little more than the 4-bit model. Which layers deserve 16 bits? Large layers cost more, so what counts is how much the loss falls *per byte*.
#
# **Exercise 17.3 ●●○ (6 minutes).** Write the plan. `extra` has the bytes that each layer takes beyond its 4 bits, `gains` by how much the loss falls if it is kept in 16. Both are dicts by name.


# %%
def choose(extra, gains, room):
    """Names of the layers to keep, at most `room` bytes together, with large gains."""
    ### BEGIN SOLUTION (about 6 lines)
    chosen = []
    for name in sorted(extra, key=lambda name: gains[name] / extra[name], reverse=True):
        if gains[name] > 0 and extra[name] <= room:
            chosen.append(name)
            room -= extra[name]
    return chosen
    ### END SOLUTION


# %%
check_choose(choose)

# %% [markdown]
# <details><summary>Hint 1</summary>Sort by gain per byte, and take one after the other.</details>
# <details><summary>Hint 2</summary>One that does not fit is passed over; a smaller one after it may fit. One whose gain is below zero is never worth its bytes.</details>

# %%
gains = {name: all_in_4[chosen_on] - losses[chosen_on] for name, losses in layers["kept"].items()}
extra = {name: numel * (16 - 4.127) / 8 for name, numel in layers["parameters"].items()}
for room in (2e6, 5e6):
    chosen = choose(extra, gains, room)
    if isinstance(chosen, list):
        some = ", ".join(name.removeprefix("model.layers.") for name in chosen[:4])
        print(f"{room / 1e6:.0f} MB more: {len(chosen)} layers, first {some}")

# %% [markdown]
# Does such a plan keep its promise on text that it was not made with? And does it beat simpler ways to spend the same bits? Smaller blocks are one, five bits for all layers (NF5, the
# same idea with 32 levels) another.
#
# **Predict.** At about 5 bits per parameter, which is the best for the other half of the prose? And for orders?

# %%
vote = {"prose": ..., "orders": ...}  # "best layers in 16 bits", "in 8 bits", "smaller blocks" or "five bits"


# %% machinery "Gather the plans by what they are called in the figure"
def curve(text, way, *precisions):
    """Bits, and the loss above 16 bits: of several plans with the same bits, the mean."""
    points = {}
    for row in layers["plans"]:
        if (
            row["way"].startswith(way)
            and row["precision"] in precisions
            and row.get("scales") != "float32"
            and row["bits"] < 6.5
        ):
            points.setdefault(round(row["bits"], 2), []).append(row["losses"][text] - base[text])
    return [(bits, sum(some) / len(some)) for bits, some in points.items()]


panels = {
    title: {
        "NF4, smaller blocks everywhere": curve(text, "uniform", "NF4"),
        "NF5 everywhere": curve(text, "uniform", "NF5"),
        "best layers in 16 bits": curve(text, "measured (kept)", "16 bits"),
        "best layers in 8 bits": curve(text, "measured (kept)", "INT8"),
        "some layers in 16 bits, at random": curve(text, "at random", "16 bits"),
    }
    for title, text in {"the other half of the prose": other, "answers to orders": "orders"}.items()
}

# %% alt="Two line plots, loss above 16 bits over bits per parameter. Left, other prose: from 0.18 with all layers in 4 bits, the best layers in 8 bits fall to 0.04 at 4.5 bits and 0.01 at 5; in 16 bits to 0.09 and 0.04; smaller blocks stay near 0.17, random choices near 0.17; five bits everywhere has 0.07. Right, orders: from 0.40, smaller blocks fall lowest, to 0.09 at 4.5 bits; five bits has 0.14; the plans 0.2 to 0.26 at 5."
_, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
_ = plot_plans(axes, panels)

# %%
for title, curves in panels.items():
    print(title)
    for name, points in curves.items():
        print(f"   {name:<35}" + "   ".join(f"{bits:.2f} bits: {rise:+.3f}" for bits, rise in sorted(points)))
print(f"all layers in 8 bits, other prose: {layers['losses']['all in 8 bits'][other] - base[other]:+.3f}; {told(vote)}")

# %% claims
prose, orders = ({name: dict(points) for name, points in curves.items()} for curves in panels.values())
assert prose["best layers in 8 bits"][5.0] < prose["best layers in 16 bits"][4.99] < prose["NF5 everywhere"][5.13]
assert prose["NF5 everywhere"][5.13] < 0.5 * prose["NF4, smaller blocks everywhere"][4.51]
assert prose["some layers in 16 bits, at random"][4.99] > 3 * prose["best layers in 16 bits"][4.99]
assert (
    orders["NF4, smaller blocks everywhere"][4.51]
    < orders["NF5 everywhere"][5.13]
    < orders["best layers in 8 bits"][5.0]
)
assert prose["best layers in 8 bits"][6.0] < 0

# %% [markdown]
# **What happened?** On the other half of the prose the plan is worth a lot: with the best layers in 8 bits, 5 bits per parameter are nearly as good as 16, while layers
# chosen at random gain next to nothing. (Below zero it is luck: layers whose rounding happened to help were left in 4 bits.) 8 bits do for a layer what 16 do, at a third
# of the price. On orders the same plans are *worse* than five bits everywhere, and worse than smaller blocks. So plan with text that is like yours, and judge with other
# text that is like yours.
#
#
# For your own model, `python -m qlora_lab.experiments sensitivity --model NAME --output FOLDER` measures gains (layer by layer, on a GPU), and
# `python -m qlora_lab.models preflight NAME --budget 5GB --gains FILE` makes the plan. For the bundled model the gains are here:

# %%
from qlora_lab.models.budget import plan, read_gains
from qlora_lab.models.compatibility import preflight

model = "smollm2-135m-instruct"
planned = plan(preflight(model), read_gains(None, model), budget=115e6)
print(str(planned)[:400], "...")

# %% [markdown]
# bitsandbytes cannot mix 4 and 8 bits in one model, so this plan has 4 and 16. And remember what QLoRA does next: it *trains* adapters on the rounded model, and repairs
# much of the damage ([notebook 09](09_accuracy_comparison.ipynb)). Whether a better codebook still matters after that, we have not measured here.
#
# ## Recap
#
# - No table is best before you name an error, a distribution and a block size. NF4 is the best for the absolute error of Gaussian numbers in blocks of 64, as it happens;
#   for the squared error and with signed scales there is more to gain.
# - Small blocks with cheap scales lower the error of weights more than a better table. Hardware chooses numbers that are cheap to multiply.
# - A smaller error is a good bet and no promise. Which layers are sensitive depends on the text: measure on yours, and judge on more of it.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [12 · What do tutorials get wrong?](12_fact_check.ipynb)
