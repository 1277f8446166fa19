# %% [markdown]
# # Dive A · Better codebooks
#
# NF4 is a table of sixteen numbers from {{2023}}. Others have come since: AF4, BOF4, MXFP4, NVFP4, each with a paper that shows a smaller
# error or a faster chip. In this lesson you make one yourself, put all of them on one axis, and ask a model whether it notices the
# difference. At the end you spend spare memory where the model needs it most.
#
# | you need | |
# |---|---|
# | time | 70 minutes |
# | computing | up to 2 minutes on two CPU cores |
# | memory | 1 GB |
# | GPU | not needed |

# %% machinery "Imports, and the records"
import json

import ipywidgets
import matplotlib.pyplot as plt
import torch

from qlora_lab.classroom.checks import check_best_levels, check_choose, check_find_past, progress
from qlora_lab.classroom.lessons.dive_a import pasts
from qlora_lab.classroom.lessons.dive_a.figures import (
    percent,
    plot_errors,
    plot_levels,
    plot_plans,
    plot_rises,
    plot_sensitivity,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.samples import bundled_weight, sample
from qlora_lab.classroom.widgets import explore
from qlora_lab.places import RECORDS
from qlora_lab.quantization import NF4, af4, bof4, optimal_levels, quantize_levels, relative_rms

record, on_gpu, layers = (
    json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("codebooks-cpu-x86_64", "codebooks-nvidia-h200", "sensitivity-nvidia-h200")
)
for each in (record, on_gpu, layers):
    print(f"recorded on {each['device']}, {each['date']}, by `{each['command']}`")

# %% [markdown]
# ## 1 · Best for what?
#
# Begin with a table of one. The five numbers `0, 0, 1, 2, 12` shall all be replaced by one and the same number.
#
# **Predict.** Which is the best: `1`, `3` or `6`?

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
# **What happened?** It depends on what you count. The sum of the misses (the *absolute* error) is least at {{numbers.median():.0f}}, which
# is the median of the five. The sum of their squares is least at {{numbers.mean():.0f}}, their mean: squares make one large miss worse than
# many small ones, so the mean moves towards the {{numbers.max():.0f}}. There is no best table before somebody has chosen an error.
#
# ## 2 · Make one: AF4
#
# Remember how a block is quantized: its {{64}} numbers are divided by the largest absolute value among them, and each becomes the nearest
# of sixteen levels between `-1` and `1`. *Lloyd's algorithm* finds good levels by repeating two steps:
#
# 1. Each number goes to its nearest level.
# 2. Each level moves to the centre of its numbers: to their median for the absolute error, to their mean for the squared one.
#
# AF4 (Yoshida, {{2023}}) is made with medians. It gives the positive numbers alone eight levels, the largest fixed at `1`, and the negative
# ones seven. In the end it puts a `0` between them.
#
# **Exercise A.1 ●●○ (8 minutes).** Write Lloyd's algorithm for positive numbers. Begin with levels at equal distances, such as ¼, ½, ¾ and
# `1` for `count=4`; the last never moves.


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
# It is AF4, up to the luck of a quarter of a million random numbers.
#
# **Predict.** AF4 is made for the absolute error. By how many per cent is its absolute error smaller than NF4's, on Gaussian numbers in
# blocks of {{64}}?

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

# %% alt="Three rows of ticks from −{{1}} to {{1}}: the levels of NF4, AF4 and BOF4-S. AF4 has three levels close together at zero, −{{-tables['AF4'][6]:.2f}}, {{0}} and {{tables['AF4'][8]:.2f}}. NF4's neighbours of zero are at −{{-tables['NF4'][6]:.2f}} and {{tables['NF4'][8]:.2f}}. BOF4-S has no level at −{{1}}; its lowest is −{{-tables['BOF4-S'][0]:.2f}}."
tables = {"NF4": NF4, "AF4": af4(), "BOF4-S": bof4(64, signed=True)}
_ = plot_levels(new_axes(height=2.2), tables)
with_zero = errors(optimal_levels(64, squared=False, weight=0, keep=(-1.0, 0.0, 1.0)))
print(f"AF4's recipe, but with the zero there from the start: absolute error {with_zero[0]:.4f}")

# %% claims
assert with_zero[0] < of_nf4[0] * 1.002 < of_af4[0]

# %% [markdown]
# **What happened?** It is *larger*, by {{of_af4[0] / of_nf4[0] - 1:.1%}}, as the minus sign says. Look at AF4 (BOF4-S belongs to the next
# section): three levels crowd around zero. The innermost two were right as long as there was no zero between them. The zero takes over most
# of their numbers, and the levels wasted there are missing farther out. With the zero in its place from the start, the same recipe is as
# good as NF4.
#
# ## 3 · Count where it counts: BOF4
#
# AF4 has a second flaw, a smaller one. Here are two blocks of four numbers, and the same miss of {{0.05}} in both, after the division:

# %%
for block in (torch.tensor([0.1, -0.2, 0.05, 0.0]), torch.tensor([2.0, -4.0, 1.0, 0.0])):
    print(f"largest {block.abs().max():.1f}: a miss of 0.05 becomes one of {0.05 * block.abs().max():.2f}")

# %% claims
keep = (-1.0, 0.0, 1.0)
by_weight = [errors(optimal_levels(64, squared=True, weight=n, keep=keep))[1] for n in (0, 2)]
heaviest = gaussian.view(-1, 64).abs().amax(1)
assert with_zero[0] / errors(bof4(64, squared=False))[0] - 1 < 1 - by_weight[1] / by_weight[0]

# %% [markdown]
# When the block is multiplied back, a miss in a block with a large maximum is a large miss. So BOF4 (Blumenberg and others, {{2025}}) gives
# each number a weight that grows with its block's maximum. It comes in two kinds, one for each error, and keeps `-1`, `0` and `1` from the
# start.
#
# <details><summary>How does one weight a median, and what does it gain?</summary>For the absolute error the weight is the maximum, and half
# of the <em>weight</em> lies on either side of the median. For the squared error it is the maximum squared, in a weighted mean. The maxima
# of Gaussian blocks of {{64}} are much alike, {{heaviest.mean():.1f}} ± {{heaviest.std():.1f}}, so this gains only
# {{1 - by_weight[1] / by_weight[0]:.1%}} of the squared error, and less of the absolute one.</details>
#
# BOF4-S has one more idea. A block is divided by its largest number *with its sign*:

# %%
block = torch.tensor([0.5, -2.0, 1.0, -1.0])
print(f"by 2: {(block / 2).tolist()}   by -2: {(block / -2).tolist()}")

# %% [markdown]
# The largest is then always at `1`. No level has to be spent on `-1`, and it can go where it is needed. The sign goes with the scale and
# costs no bit: scales in {{8}} bits have one anyway, since their mean is subtracted.
#
# **Predict.** NF4 was not made for any error. By how many per cent is its absolute error larger than that of the best table for it that
# keeps `-1`, `0` and `1`? And its squared error, beside the best table for that?

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
farthest = (NF4 - bof4(64, squared=False)).abs().max()
for signed in ("", "-S"):
    a, b = measured[f"BOF4{signed} (absolute)"], measured[f"BOF4{signed} (squared)"]
    assert a[0] < b[0] and b[1] < a[1]
assert all(abs(x - y) < 0.025 for name in made for x, y in zip(over_nf4(name), paper[name]))

# %% [markdown]
# **What happened?** In absolute error, NF4 can hardly be improved without giving up `-1`, `0` or `1`. Nobody planned that, but its
# quantiles are nearly BOF4's medians: none is farther than {{farthest:.3f}} away. In squared error there are {{behind[1]:.0%}} to gain.
# Each BOF4 is better than the other in its own error. BOF4-S's free level brings more than either. And the
# paper's ratios, for the weights of Llama-3.1 8B, are nearly those of our random numbers.
#
# ## 4 · Everything on one axis
#
# Smaller blocks have smaller errors and more scales to pay for, so compare formats at equal *bits per parameter*, scales included. Two
# formats of llama.cpp join in, in blocks of {{32}} with scales in {{16}} bits. Q4_0 has the integers `-8` to `7` and scales with a sign.
# Q4_1 has `0` to `15` and a minimum for each block. The lines in the figure have scales in {{8}} bits
# ([double quantization](05_double_quantization.ipynb)). A squared error is shown as its root, in per cent of the root mean square of the
# numbers.
#
# In the list, *Laplace* and *Student-t* are distributions with longer tails than a Gaussian: more of their numbers are far
# from zero. "Our model" is the bundled one, SmolLM2-135M. MiniLM is a small model that turns text into vectors.
#
# **Predict.** Gaussian numbers, about {{4.5}} bits per parameter ({{5}} for Q4_1), squared error. Which is best: NF4, BOF4-S, Q4_0 or Q4_1?

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


# %% alt="Error in per cent over bits per parameter, Gaussian numbers, squared error. Six falling lines with points at blocks of {{256}} to {{16}}: BOF4-S for the squared error is lowest everywhere, {{at('Gaussian', 'BOF4-S (squared)', 64, 'squared'):.1f}} % at {{4.13}} bits and {{at('Gaussian', 'BOF4-S (squared)', 16, 'squared'):.1f}} % at {{4.51}}; NF4 has {{at('Gaussian', 'NF4', 64, 'squared'):.1f}} and {{at('Gaussian', 'NF4', 16, 'squared'):.1f}}; INT4 and E2M1 are highest, {{at('Gaussian', 'INT4', 64, 'squared'):.1f}} and {{at('Gaussian', 'E2M1', 64, 'squared'):.1f}} at {{4.13}}. Single points at {{4.5}} bits: Q4_0 {{at('Gaussian', 'Q4_0', 32, 'squared'):.1f}} %, NVFP4 {{at('Gaussian', 'NVFP4', 16, 'squared'):.1f}} %; MXFP4 {{at('Gaussian', 'MXFP4', 32, 'squared'):.1f}} % at {{4.25}}; Q4_1 {{at('Gaussian', 'Q4_1', 32, 'squared'):.1f}} % at {{5}} bits."
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
table, blocks_of_32 = at("Gaussian", "BOF4-S (squared)", 64, "squared"), at("Gaussian", "NF4", 32, "squared")
assert table < blocks_of_32
assert all(at(kind, "BOF4-S (absolute)", 64, "squared") > at(kind, "NF4", 32, "squared") for kind in list(kinds)[1:4])
embeddings = [at("embeddings of our model", f"BOF4-S ({kind})", 64, "squared") for kind in ("squared", "absolute")]

# %% [markdown]
# **What happened?** In blocks of {{16}} with cheap scales, BOF4-S beats even Q4_1, which takes half a bit more. Choose the embeddings
# in the list. In blocks of {{64}} the table made for the *squared* error has a squared error of {{embeddings[0]:.1f}} %, the one made for
# the *absolute* error {{embeddings[1]:.1f}} %. These tables are best for Gaussian numbers. Embeddings have longer tails, so a block's
# maximum is larger, its other numbers lie closer to zero, and levels closer to zero suit them. The weights of MiniLM, never quantized
# before, are more Gaussian; for them the table for the squared error is the best again.
#
# Another remedy: keep the few numbers beyond four standard deviations in {{16}} bits, with their places.

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
first = {kind: rows[kind, "NF4", 64] for kind in list(kinds)[3:]}
per_bit = {
    (kind, name): (percent(first[kind], "squared") - percent(row, "squared")) / (row["bits"] - first[kind]["bits"])
    for (kind, name, size), row in rows.items()
    if row is not first[kind]
}
ours = "embeddings of our model"
assert all(per_bit[kind, "NF4, outliers apart"] < per_bit[kind, "NF4"] for kind in first)

# %% [markdown]
# It helps, and costs bits where there are many such numbers. So does halving the blocks. Compare what each gains per bit that it adds:
# outliers apart {{per_bit[ours, "NF4, outliers apart"]:.1f}} points for the embeddings and {{per_bit[mini, "NF4, outliers apart"]:.1f}} for
# MiniLM, halving {{per_bit[ours, "NF4"]:.1f}} and {{per_bit[mini, "NF4"]:.1f}}. Halving is the better buy for both.
#
# ## 5 · Why hardware chose otherwise
#
# The newest GPUs multiply 4-bit numbers directly, and none of the tables above is built into them. Their numbers are *E2M1*: a sign, two
# bits of exponent, one of mantissa.

# %%
e2m1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
print("four times the products of E2M1:", (4 * e2m1[:, None] * e2m1).unique().int().tolist())
print("different products of NF4's levels:", len((NF4[:, None] * NF4).unique()))

# %% claims
assert torch.equal((4 * e2m1[:, None] * e2m1).round(), 4 * e2m1[:, None] * e2m1)

# %% [markdown]
# Every product of two E2M1 numbers is a whole number of quarters, so small integer circuits can add up thousands of them exactly. (With
# signs there are {{2 * len((e2m1[:, None] * e2m1).unique()) - 1}}, beside NF4's {{len((NF4[:, None] * NF4).unique())}}.) An NF4 code is
# only a *name* of a number: it must be looked up and turned into bf16 before anything can be multiplied ([dive F](dive_f_why_is_it_slow.ipynb)). Inputs must have {{4}} bits, too, and a table made for weights need not suit them.
#
# Scales must be cheap as well. *MXFP4* shares one power of two among {{32}} numbers: multiplying by that only shifts an exponent. *NVFP4*
# shares an 8-bit float among {{16}}.

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
# At equal bits, E2M1's levels lose to NF4's, and a power of two as the scale loses once more. It cannot bring every maximum to {{6}},
# E2M1's largest number: powers of two are a factor of {{2}} apart, so maxima land between {{4}} and {{8}}, and what is beyond {{6}} is cut
# off. NVFP4's 8-bit float costs almost nothing beyond the levels. QLoRA multiplies in bf16 anyway, so it is free to use any table.
#
# ## 6 · Does the model notice?
#
# QLoRA's paper has a warning for those who count errors of weights. It compared two more 4-bit floats by perplexity (how
# surprised a model is by text; lower is better): E2M1 had {{31.07}}, and E3M0, which is all exponent, had {{29.48}}. And their errors?

# %%
e3m0 = torch.tensor(sorted([0.0, *(sign * 2.0**-k for k in range(7) for sign in (1, -1)), 1.0]))
for name, levels in {"E2M1": torch.cat([-e2m1.flip(0), e2m1]) / 6, "E3M0": e3m0}.items():
    print(f"{name}: squared error {100 * errors(levels)[1] ** 0.5:.1f} %")

# %% claims
from qlora_lab.quantization import FP4

both = torch.cat([-e2m1.flip(0), e2m1]) / 6
assert errors(e3m0)[1] > 2 * errors(both)[1]
assert (both.unique()[9:] == FP4.unique()[9:]).all() and both.unique()[8] != FP4.unique()[8]
in_16 = next(row for row in on_gpu["losses"] if row["format"] == "none")

# %% [markdown]
# The one with the much larger error had the better perplexity. (bitsandbytes' FP4 is neither, but E2M1 with another smallest level.) So ask a model. We put all {{210}} linear layers of the bundled model into
# each format, in blocks of {{32}} (about {{4.25}} bits per parameter; *NF3*, NF4's idea with eight levels, has one bit less). The loss is
# in *nats*, the unit of a cross-entropy with the natural logarithm: {{0.1}} nats more make the perplexity
# {{torch.tensor(0.1).exp() - 1:.0%}} larger. One text is the course's prose, the other answers to orders, the task of earlier lessons, for
# which this model is not trained.
#
# **Predict.** In {{16}} bits the loss is {{in_16["prose"]:.2f}} nats per token on prose, and {{in_16["validation"]:.2f}} on orders. By how
# much does NF4 raise that on prose?

# %%
prediction = ...  # ← your guess, in nats per token

# %% alt="Pairs of bars: the rise of the loss on prose and on answers to orders, in nats per token. NF4 {{rises['NF4']['prose']:.2f}} and {{rises['NF4']['answers to orders']:.2f}}, AF4 {{rises['AF4']['prose']:.2f}} and {{rises['AF4']['answers to orders']:.2f}}, BOF4 for the squared error {{rises['BOF4 (squared)']['prose']:.2f}} and {{rises['BOF4 (squared)']['answers to orders']:.2f}}, BOF4-S for the absolute error {{rises['BOF4-S (absolute)']['prose']:.2f}} and {{rises['BOF4-S (absolute)']['answers to orders']:.2f}}, BOF4-S for the squared error {{rises['BOF4-S (squared)']['prose']:.2f}} and {{rises['BOF4-S (squared)']['answers to orders']:.2f}}, E2M1 {{rises['E2M1']['prose']:.2f}} and {{rises['E2M1']['answers to orders']:.2f}}, INT4 {{rises['INT4']['prose']:.2f}} and {{rises['INT4']['answers to orders']:.2f}}, MXFP4 {{rises['MXFP4']['prose']:.2f}} and {{rises['MXFP4']['answers to orders']:.2f}}, NF3 {{rises['NF3']['prose']:.2f}} and {{rises['NF3']['answers to orders']:.2f}}."
names = ["NF4", "AF4", "BOF4 (squared)", "BOF4-S (absolute)", "BOF4-S (squared)", "E2M1", "INT4", "MXFP4", "NF3"]
losses = {(row["format"], row["block_size"]): row for row in on_gpu["losses"]}
texts = {"prose": "prose", "answers to orders": "validation"}
rises = {
    name: {kind: losses[name, 32][text] - losses["none", 0][text] for kind, text in texts.items()} for name in names
}
_ = plot_rises(new_axes(height=4.2), rises, prediction)
print(f"in 16 bits: {losses['none', 0]['prose']:.2f} nats per token of prose; {told(prediction)}")

# %% claims
in_64 = {
    name: {kind: losses[name, 64][text] - losses["none", 0][text] for kind, text in texts.items()}
    for name in ("NF4", "AF4", "BOF4-S (absolute)")
}
on_orders = {name: of["answers to orders"] for name, of in rises.items()}
assert min(rises, key=lambda name: rises[name]["prose"]) == "AF4" and in_64["AF4"]["prose"] > in_64["NF4"]["prose"]
assert min(on_orders, key=on_orders.__getitem__) == "BOF4-S (absolute)"

# %% [markdown]
# **What happened?** Where errors are far apart, the model notices: three bits or MXFP4 cost much. Among the good tables the order is *not*
# that of the errors, and it is another one for the other text. On orders BOF4-S (squared), which has the smallest squared error, costs
# {{on_orders["BOF4-S (squared)"]:.2f}}, NF4 {{on_orders["NF4"]:.2f}} and BOF4-S (absolute) {{on_orders["BOF4-S (absolute)"]:.2f}}.
#
# Rule or chance? Each bar is one draw: rounding moves a hundred million weights at once. In blocks of {{64}} (same record) BOF4-S
# (absolute) costs {{in_64["BOF4-S (absolute)"]["answers to orders"]:.2f}} on orders, and on prose AF4 {{in_64["AF4"]["prose"]:.2f}} and NF4
# {{in_64["NF4"]["prose"]:.2f}}. So one bar proves little. What do others find, on *WikiText-2*, articles from Wikipedia?

# %%
print(
    "WikiText-2 perplexity of Llama-3.1 8B:", {name: PUBLISHED[name][2] for name in ("NF4", "AF4", "BOF4-S (squared)")}
)
turned = {(row["format"], row["block_size"]): row["turned"] for row in record["outputs"]}
print("MiniLM's vectors turned by", {name: round(turned[name, 32], 3) for name in names})

# %% claims
assert turned["BOF4-S (squared)", 32] == min(turned[name, 32] for name in names) < 0.85 * turned["NF4", 32]
by_error = sorted(names[:-1], key=lambda name: at(mini, name, 32, "squared"))
by_turn = sorted(names[:-1], key=lambda name: turned[name, 32])
swapped = [pair for pair in zip(by_error, by_turn, strict=True) if pair[0] != pair[1]]
assert swapped == [("NF4", "AF4"), ("AF4", "NF4"), ("INT4", "MXFP4"), ("MXFP4", "INT4")]
fewer = 1 - PUBLISHED["BOF4-S (squared)"][2] / PUBLISHED["NF4"][2]

# %% [markdown]
# From NF4 to BOF4-S the paper's perplexity falls by {{fewer:.1%}}. The last line is a second opinion of ours: how far MiniLM's vectors turn
# (`1 - cosine`, the mean of {{49}} paragraphs) when its weights are rounded. BOF4-S turns them least, and the order is that of MiniLM's
# errors but for two pairs, AF4 and NF4, MXFP4 and INT4. So a smaller error is a good bet, and no promise.
#
# **Exercise A.2 ●●● (10 minutes).** One format is missing in the figure. Somebody has tried it on the bundled model and writes: *"Q4_1
# beats them all! The linear layers of SmolLM2 come back with an error of {{0.1}} %, where NF4 has {{9}} %."* The measurement is right. What
# is wrong with the claim? Think before you read on.
#
# A checkpoint in bfloat16 does not say what was done to it earlier. `pasts.FORMATS` holds five functions by name, each from a tensor to
# what is left of it after that format. Write `find_past(x, formats)`: the name of the format that left its traces in `x`, or `"never"`.
# Then ask it about the bundled model, and about one of your own.


# %%
def find_past(x, formats):
    """The name of the format that left its traces in x, or "never"."""
    ### BEGIN SOLUTION (about 4 lines)
    lost = {name: relative_rms(x, of(x)) for name, of in formats.items()}
    best = min(lost, key=lost.__getitem__)
    return best if lost[best] < 0.01 else "never"
    ### END SOLUTION


# %%
check_find_past(find_past)

# %% [markdown]
# <details><summary>Hint 1</summary>What does a number lose that already is one of a format's levels?</details>
# <details><summary>Hint 2</summary>Quantize it to each of the formats once more. <code>relative_rms(x, of(x))</code> is a few per cent or more for every 4-bit format, unless the numbers were in it before. bfloat16
# adds a rounding error of a few parts in a thousand.</details>

# %%
for name in ("model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
    x = bundled_weight(name)[
        :576
    ].float()  # ← a tensor of your own model: safetensors.safe_open(FILE, "pt").get_tensor(NAME)
    lost = ", ".join(f"{form} {relative_rms(x, of(x)):.4f}" for form, of in pasts.FORMATS.items())
    print(f"{name}: {find_past(x, pasts.FORMATS)}\n   {lost}")

# %% claims
first_down = bundled_weight("model.layers.0.mlp.down_proj.weight")[:576].float()
lost_here = relative_rms(first_down, pasts.FORMATS["NF4"](first_down))
assert abs(lost_here - percent(rows[mini, "NF4", 64], "squared") / 100) < 0.002

# %% [markdown]
# <details><summary>What you should have found</summary>The bundled model came through a file in Q4_1, and was stored as bfloat16 afterwards. Q4_1 loses nothing there because everything that it
# loses was lost already. That is why it is left out of the figure, and why errors of weights in this lesson are not measured on these
# layers. The embeddings were in {{8}} bits once, which 4-bit formats do not notice.</details>
#
# ## 7 · Which layers suffer?
#
# A *sensitive* layer makes the loss rise a lot when it alone is rounded. The bundled model
# has {{210}} linear layers, seven in each of {{30}} decoder layers: four of the attention, `q_proj` to `o_proj`, and three of the MLP,
# `gate_proj`, `up_proj` and `down_proj`. We put each by itself into NF4 and measured the loss on half of the prose.
#
# <details><summary>These layers have been in {{4}} bits before, as you found. Does that spoil their losses?</summary>It does not spare them: NF4's error is
# {{lost_here:.1%}} here, as on MiniLM's weights, and each loss is compared with that of the same model before rounding. But whether a model
# that never was in {{4}} bits has the same sensitive layers, or the same order of formats in section 6, our losses cannot say.</details>
#
# **Predict.** For how many of the {{210}} does the loss *fall* when they are rounded?

# %%
prediction = ...  # ← your guess

# %% alt="A field of seven kinds of layers by {{30}} decoder layers, coloured by the change of the loss. Most fields are pale. Rings mark the five largest: down_proj of decoder layers {{29}}, {{11}} and {{9}}, v_proj of {{6}} and {{18}}. Many fields have the other colour: there the loss falls."
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
helped = [name for name, rise in alone.items() if rise < 0]
again = sum(layers["alone"][name][other] < base[other] for name in helped)
rising = sum(rise for rise in alone.values() if rise > 0)
assert len(helped) / 2 < again < len(helped)
assert agree[other] > 0.7 and abs(agree["orders"]) < 0.1

# %% [markdown]
# **What happened?** Five layers of {{210}} make {{sum(alone[name] for name in top) / rising:.0%}} of all rises, and they rise on the other
# half of the prose, too. For {{len(helped)}} layers the loss falls, for {{again}} of them on the other half as well: rounding is a small
# step in a direction that nobody chose, and some lead downhill. The parts nearly add up to the whole, so one may plan with them. But on
# orders quite other layers suffer. A sensitivity belongs to a text.
#
# ## 8 · Spend what is left
#
# Your card has room for a little more than the 4-bit model. Which layers deserve {{16}} bits? A `down_proj` has
# {{layers["parameters"][top[0]] / layers["parameters"][top[3]]:.0f}} times as many weights as a `v_proj`.
#
# **Exercise A.3 ●●○ (6 minutes).** Write the plan, from two dicts by name. `extra` has the bytes that each layer takes beyond its {{4}}
# bits, `gains` by how much the loss falls if it alone is kept in {{16}} and all others are in {{4}}, as a plan would keep it. Pass over a
# layer that does not fit. Some gains are negative.


# %%
def choose(extra, gains, room):
    """Names of the layers to keep: at most `room` bytes together, with as much gain as a simple rule finds."""
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
# <details><summary>Hint 1</summary>In the room for one large layer there may be eight small ones. What does each byte buy?</details>
# <details><summary>Hint 2</summary>Sort by gain per byte, and take one after the other. One that does not fit is passed over; a smaller one after it may fit. One whose gain is below zero is never worth its bytes.</details>

# %%
gains = {name: all_in_4[chosen_on] - losses[chosen_on] for name, losses in layers["kept"].items()}
extra = {name: numel * (16 - 4.127) / 8 for name, numel in layers["parameters"].items()}
for room in (2e6, 5e6):
    chosen = choose(extra, gains, room)
    if isinstance(chosen, list):
        some = ", ".join(name.removeprefix("model.layers.") for name in chosen[:4])
        print(f"{room / 1e6:.0f} MB more: {len(chosen)} layers, first {some}")

# %% [markdown]
# Does such a plan keep its promise on other text? And does it beat simpler ways to spend bits: smaller blocks, or five bits for all layers
# (NF5, with {{32}} levels)?
#
# **Predict.** Plans with {{5.0}} bits per parameter, smaller blocks with {{4.5}} (our smallest), NF5 with {{5.1}}: which comes closest to
# {{16}} bits on the other half of the prose? And on orders?

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

# %% alt="Two line plots, loss above {{16}} bits over bits per parameter. Left, other prose: from {{dict(panels['the other half of the prose']['NF4, smaller blocks everywhere'])[4.13]:.2f}} with all layers in {{4}} bits, the best layers in {{8}} bits fall to {{dict(panels['the other half of the prose']['best layers in 8 bits'])[4.5]:.2f}} at {{4.5}} bits and {{dict(panels['the other half of the prose']['best layers in 8 bits'])[5.0]:.2f}} at {{5}}; in {{16}} bits to {{dict(panels['the other half of the prose']['best layers in 16 bits'])[4.5]:.2f}} and {{dict(panels['the other half of the prose']['best layers in 16 bits'])[4.99]:.2f}}; smaller blocks have {{dict(panels['the other half of the prose']['NF4, smaller blocks everywhere'])[4.51]:.2f}} at {{4.5}}, random choices {{dict(panels['the other half of the prose']['some layers in 16 bits, at random'])[4.99]:.2f}} at {{5}}; five bits everywhere has {{dict(panels['the other half of the prose']['NF5 everywhere'])[5.13]:.2f}}. Right, orders: from {{dict(panels['answers to orders']['NF4, smaller blocks everywhere'])[4.13]:.2f}}, smaller blocks fall lowest, to {{dict(panels['answers to orders']['NF4, smaller blocks everywhere'])[4.51]:.2f}} at {{4.5}} bits; five bits has {{dict(panels['answers to orders']['NF5 everywhere'])[5.13]:.2f}}; the plans {{dict(panels['answers to orders']['best layers in 8 bits'])[5.0]:.2f}} and {{dict(panels['answers to orders']['best layers in 16 bits'])[4.99]:.2f}} at {{5}}."
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
assert prose["best layers in 8 bits"][6.0] < 0 and orders["NF5 everywhere"][5.13] < orders["best layers in 8 bits"][6.0]

# %% [markdown]
# **What happened?** On the other half of the prose the plan pays: with the best layers in {{8}} bits, {{5.0}} bits per parameter have a loss only {{prose["best layers in 8 bits"][5.0]:.3f}} above that of {{16}}. NF5 spends more and is {{prose["NF5 everywhere"][5.13]:.3f}} above, and
# layers chosen at random gain next to nothing. (Below zero it is luck: layers whose rounding helped were left in {{4}} bits.) {{8}} bits do
# nearly what {{16}} do, as the last line shows, at a third of the price. On orders the plans are *worse* than smaller blocks with the same
# {{4.5}} bits: {{orders["best layers in 8 bits"][4.5]:.2f}} and {{orders["best layers in 16 bits"][4.5]:.2f}} against
# {{orders["NF4, smaller blocks everywhere"][4.51]:.2f}}. So plan with text that is like yours, and judge with more of it.
#
# For your own model, `python -m qlora_lab.experiments sensitivity --model NAME --output FOLDER` measures gains on a GPU, and
# `python -m qlora_lab.models preflight NAME --budget 5GB --gains FILE` makes the plan. The bundled model has its gains here:

# %%
from qlora_lab.models.budget import plan, read_gains
from qlora_lab.models.compatibility import preflight

model = "smollm2-135m-instruct"
planned = plan(preflight(model), read_gains(None, model), budget=115e6)
print(str(planned)[:400], "...")

# %% claims
weights = layers["parameters"]
kept_share = sum(weights[name] for name in planned.kept) / sum(weights.values())
spent = 4.127 + kept_share * (16 - 4.127)


def fall(text):
    """How much the loss falls below all in 4 bits with the plan's bits, between the two nearest measured plans."""
    (low, above_low), (high, above_high) = sorted(curve(text, "measured (kept)", "16 bits"))[:2]
    assert low < spent < high
    above = above_low + (spent - low) / (high - low) * (above_high - above_low)
    return all_in_4[text] - base[text] - above


by_worth = sorted(gains, key=lambda name: gains[name] / extra[name], reverse=True)
best_down = next(i for i, name in enumerate(by_worth) if name.endswith("down_proj"))
assert not any(name.endswith("down_proj") for name in planned.kept) and 10 < best_down < len(planned.kept)
assert sum(extra[name] for name in by_worth[: best_down + 1]) > planned.budget - planned.least
embedding_bytes = 2 * bundled_weight("model.embed_tokens.weight").numel()

# %% [markdown]
# The embeddings stay in {{16}} bits: they are {{embedding_bytes / 1e6:.0f}} of the {{planned.least / 1e6:.1f}} MB. No `down_proj` is kept,
# although three of them led section 7's list: the best comes {{best_down + 1}}th by gain per byte, and no longer fits. Is the promise of
# {{planned.gain:.3f}} kept? Between the plan's neighbours in the figure (it has {{spent:.2f}} bits) the loss falls by about
# {{fall(chosen_on):.2f}} on its own half of the prose, and {{fall(other):.2f}} on the other.
#
# bitsandbytes cannot mix {{4}} and {{8}} bits in one model, so this plan has {{4}} and {{16}}. QLoRA then *trains* adapters on the rounded
# model, which repairs much of the damage ([lesson 11](11_accuracy_comparison.ipynb)). Whether a better codebook still matters after that,
# we have not measured.
#
# ## Recap
#
# - No table is best before you name an error, a distribution and a block size. Among tables with `-1`, `0` and `1`, NF4 happens to be
#   nearly the best for the absolute error of Gaussian numbers in blocks of {{64}}.
# - A better table costs no bits. On Gaussian numbers it gains as much as halving the blocks; with longer tails smaller blocks gain more.
#   Hardware chooses numbers that are cheap to multiply.
# - A smaller error is a good bet and no promise. Which layers are sensitive depends on the text.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** back to [the map](00_start_here.ipynb).
