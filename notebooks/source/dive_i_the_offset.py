# %% [markdown]
# # Dive I · Is NF4's odd constant the best one?
#
# One number in NF4 was chosen by somebody: the offset, `0.9677083`, from which its sixteen levels follow. bitsandbytes' documentation says
# that it was optimized to lose as little as possible. Here you check that, with a slider and with weights of your own. Then you see what a
# format does with its *scales*, and catch five wrong NF4s, three of which their error hardly betrays.
#
# | you need | |
# |---|---|
# | time | 38 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not used |

# %% machinery "Imports"
import dataclasses

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch

from qlora_lab.classroom.checks import check_best_offset, check_suspects, progress
from qlora_lab.classroom.lessons.dive_i.figures import plot_offset
from qlora_lab.classroom.lessons.dive_i.machinery import error_of, least_offset, nf4_half, q4_1
from qlora_lab.classroom.plots import new_axes, plot_codebooks, told
from qlora_lab.classroom.samples import bundled_weight, sample
from qlora_lab.classroom.widgets import explore
from qlora_lab.memory import SHAPES
from qlora_lab.quantization import (
    DYNAMIC8,
    INT4,
    INT8,
    NF4,
    bof4,
    normal_float,
    quantize,
    quantize_absmax,
    quantize_affine,
    quantize_q4_0,
    quantize_scales,
    relative_rms,
)

# %%
gaussian = sample("Gaussian", 2**20)  # a million numbers from the normal distribution
weights = bundled_weight("model.embed_tokens.weight")[::48].float()  # every 48th row of the bundled model's embeddings

# %% [markdown]
# ## 1 · Where does it come from?
#
# [Lesson 04](04_nf4.ipynb) built NF4 from quantiles, numbers that a given share of the normal distribution lies below. Sixteen levels for sixteen
# equal shares would stand in the *middle* of their shares. The outermost share ends at `1`, so its middle is at `1 − 1/32`. With fifteen
# shares it is at `1 − 1/30`. NF4 has eight positive levels, which is half of sixteen, and seven negative ones, which is half of fifteen if one of them is the zero.
# What is the mean of the two middles?

# %%
mean_of_middles = ((1 - 1 / 32) + (1 - 1 / 30)) / 2
print(f"{mean_of_middles:.7f}")

# %% claims
assert round(mean_of_middles, 7) == 0.9677083

# %% [markdown]
# It is bitsandbytes' constant, to the last digit. bitsandbytes' documentation says: "empirically optimized to minimize quantization error for typical neural
# network weight distributions". This looks like arithmetic, and not like a fit to data. A constant from arithmetic may still be the best one. So let us try others.
#
# ## 2 · Try others
#
# **Predict.** For each offset, `normal_float(4, offset)` makes sixteen levels by NF4's recipe. Quantize Gaussian numbers in blocks of {{64}}, and
# measure the relative RMS error. At which offset is it smallest?

# %%
prediction = ...  # ← your guess, between 0.9 and 0.995

# %% machinery "Errors at twenty offsets and eight block sizes, and their picture"
OFFSETS = np.linspace(0.9, 0.995, 20).tolist()
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
part = gaussian[: 2**17]  # enough for a figure, and quick: the point moves with the slider
numbers = {size: gaussian if size == 64 else part for size in BLOCK_SIZES}  # for 64, as many as in lesson 04
errors = {size: [error_of(normal_float(4, offset), x, size) for offset in OFFSETS] for size, x in numbers.items()}
best_offset_of = {size: OFFSETS[int(np.argmin(errors[size]))] for size in BLOCK_SIZES}
excess = {size: error_of(NF4, numbers[size], size) / min(errors[size]) - 1 for size in BLOCK_SIZES}


def draw_offset(offset, block_size):
    _, axes = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[1, 1.25], layout="constrained")
    levels = normal_float(4, offset)
    here = (offset, error_of(levels, part, block_size))
    ax = plot_offset(axes, levels, OFFSETS, errors[block_size], here, prediction)
    ax.set_title(f"offset {offset:.4f}, blocks of {block_size}", loc="left", fontsize=11)
    return ax


# %% alt="Left, ticks from −{{1}} to {{1}}: the levels that follow from the chosen offset. Right, by how much the error exceeds the least one, over offsets from {{OFFSETS[0]:.3g}} to {{OFFSETS[-1]:.3g}}: flat around the least, at {{best_offset_of[64]:.3f}}, then ever steeper. NF4's offset, where the slider starts, is {{100 * excess[64]:.1f}} % above."
explore(
    draw_offset,
    offset=ipywidgets.FloatSlider(
        value=0.9677, min=0.9, max=0.995, step=0.0005, readout_format=".4f", description="offset"
    ),
    block_size=ipywidgets.SelectionSlider(options=BLOCK_SIZES, value=64, description="block size"),
)

# %% machinery "The best offset at each block size"
print(f"blocks of 64: {told(prediction)}")
for size in BLOCK_SIZES:
    print(f"blocks of {size:>4}: best offset {best_offset_of[size]:.3f}, NF4's error is {excess[size]:.1%} above")
free = error_of(bof4(64, squared=True), gaussian, 64)
print(f"blocks of 64, any levels beside -1, 0 and 1: error {free:.4f}; with the best offset {min(errors[64]):.4f}")

# %% claims
assert best_offset_of[64] < 0.945 and 0.025 < excess[64] < 0.03
assert min(excess, key=excess.get) == 512 and excess[512] < 0.001
assert list(best_offset_of.values()) == sorted(best_offset_of.values())
assert (normal_float(4, 0.92)[9:15] > NF4[9:15]).all() and (normal_float(4, 0.92)[1:7] < NF4[1:7]).all()  # farther out
assert 0.999 * min(errors[64]) < free < min(errors[64])

# %% [markdown]
# **What happened?** For Gaussian blocks of {{64}}, an offset near {{best_offset_of[64]:.3f}} has the least error, {{min(errors[64]):.4f}}, and NF4's error is {{100 * excess[64]:.1f}} %
# above it. The last line of the output is the best table that keeps −{{1}}, {{0}} and {{1}} and moves all else freely ([dive A](dive_a_better_codebooks.ipynb)). It is hardly better, so with the right offset, the recipe is as good as any such table.
#
# Did you guess a *larger* offset? That would follow from lesson 04: the largest of {{64}} numbers lies farther out than the recipe expects, so the others are nearer to zero. A larger offset moves the levels
# there, where equal shares of the numbers are. But equal shares are not the least error. The numbers far out are few, yet they miss by much, and the error squares that. So the levels should stand
# wider apart than equal shares do, and a *smaller* offset makes them so: all but −{{1}}, {{0}} and {{1}} move outwards.
#
# The best offset also depends on the block size. In a large block the largest number is farther out, the rest huddles near zero, and a larger offset suits it. At {{512}} NF4's is
# just right; at {{4096}} it is too small.
#
# ## 3 · Your weights
#
# Weights are no perfect Gaussian. Most have longer tails: more of them lie far from zero.
#
# **Exercise I.1 ●●○ (4 minutes).** Find the best offset for any numbers. Then ask it about the embeddings, and about a layer of a model
# that you use. (Not one of the bundled model's linear layers: they were in 4 bits before, as lesson 04 found out.)


# %%
def best_offset(x, block_size, offsets):
    """The one of `offsets` whose 16 levels have the least relative RMS error on x, in blocks of `block_size`."""
    ### BEGIN SOLUTION (about 5 lines)
    errors = []
    for offset in offsets:
        q = quantize(x, normal_float(4, offset), block_size)
        errors.append(relative_rms(x, q.dequantize()))
    return offsets[errors.index(min(errors))]
    ### END SOLUTION


# %%
check_best_offset(best_offset)

# %% [markdown]
# <details><summary>Hint 1</summary><code>quantize(x, levels, block_size)</code> takes any sixteen levels, and
# <code>relative_rms(x, q.dequantize())</code> is the error.</details>
# <details><summary>Hint 2</summary>Collect one error for each offset; <code>errors.index(min(errors))</code> is the place of the
# least.</details>

# %%
mine = weights  # ← yours: safetensors.safe_open(FILE, "pt").get_tensor(NAME).float()
best, above = least_offset(mine, 64, OFFSETS)
found = best_offset(mine, 64, OFFSETS)
print(f"blocks of 64: best offset {best:.3f}, NF4's error is {above:.1%} above")
print("your function says", f"{found:.3f}" if isinstance(found, float) else "nothing yet")

# %% claims
assert best > 0.975 and 0 < above < 0.02

# %% [markdown]
# **What happened?** The embeddings' long tails act like a larger block: one number is far out, and presses the others towards zero. So they
# want a larger offset, {{best:.3f}}. NF4's stands between what Gaussian numbers want and what these embeddings want, and loses
# {{100 * excess[64]:.1f}} % on the former and {{100 * above:.1f}} % on the latter. It is not optimal, and it is hard to beat by much with one offset for all.
# ([Dive A](dive_a_better_codebooks.ipynb) drops the recipe, and moves each level on its own.)
#
# ## 4 · A level table is half of a format
#
# Lesson 04 compared NF4 with INT4 at equal bits, and NF4 won. There, each block's scale was a float32 number. Two formats of **GGUF**,
# llama.cpp's files, are more careful. Q4_1 is affine INT4 with a scale and a minimum in *float16*. Q4_0 uses all sixteen integers from `-8` to
# `7`: a block's extreme number is at `-8`, even if it is positive, since the scale may be negative. Both have blocks of {{32}}.
#
# **Predict.** Does NF4 still win at {{4.5}} bits per parameter, and at {{5}}? It may have float16 scales, too.

# %%
vote = {"Gaussian, 4.5": ..., "embeddings, 4.5": ..., "Gaussian, 5": ..., "embeddings, 5": ...}  # "NF4" or "integers"

# %% machinery "Errors at 4.5 and at 5 bits"
fair = {}
for name, x in {"Gaussian": gaussian, "embeddings": weights}.items():
    fair[name] = {
        "NF4, blocks of 64, float32": error_of(NF4, x, 64),
        "Q4_0": relative_rms(x, quantize_q4_0(x).dequantize()),
        "NF4, blocks of 32, float16": relative_rms(x, nf4_half(x, 32)),
        "Q4_1": relative_rms(x, q4_1(x)),
        "NF4, blocks of 32, float32": error_of(NF4, x, 32),
        "NF4, blocks of 16, float16": relative_rms(x, nf4_half(x, 16)),
    }
price = dict(zip(fair["Gaussian"], (4.5, 4.5, 4.5, 5, 5, 5), strict=True))
print(f"{'':<30}{'bits':>6}{'Gaussian':>12}{'embeddings':>12}")
for form, bits in price.items():
    print(f"{form:<30}{bits:>6}{fair['Gaussian'][form]:>12.4f}{fair['embeddings'][form]:>12.4f}")
print(told(vote))

# %% claims
g, e = fair["Gaussian"], fair["embeddings"]
assert g["Q4_0"] < g["NF4, blocks of 32, float16"] and e["Q4_0"] > e["NF4, blocks of 32, float16"]
assert all(of["NF4, blocks of 64, float32"] > of["NF4, blocks of 32, float16"] for of in fair.values())
assert all(of["Q4_1"] < of["NF4, blocks of 32, float32"] for of in fair.values())
assert g["Q4_1"] < g["NF4, blocks of 16, float16"] and e["Q4_1"] > e["NF4, blocks of 16, float16"]

# %% [markdown]
# **What happened?** On Gaussian numbers the integers win at both prices. On the embeddings NF4 wins, but at {{5}} bits only in blocks of {{16}},
# which bitsandbytes does not offer. As it comes, in blocks of {{32}} with float32 scales, it loses to Q4_1 on both. What a format does
# with its scales matters as much as its sixteen levels. That is what [lesson 05](05_double_quantization.ipynb) is about. (The embeddings are one example, with a past in 8 bits: see lesson 04. And an error of
# weights is not yet a worse model: in QLoRA's paper, NF4 with double quantization has a perplexity of {{27.41}}, INT4 one of {{34.34}}.)
#
# ### What can stand beside the codes
#
# Here are other ways to store an integer block's constants, each with its price. *After a ReLU* is the same numbers with the negative ones
# set to zero, as activations often are. Programs that multiply integers want no minimum, since it is a float. They hold a **zero point**
# instead: the code that stands for zero, −minimum / scale, rounded, and `(code − zero point) × scale` is the number.


# %% machinery "Integers with other constants"
def with_zero_point(x, block_size):
    blocks = x.view(-1, block_size)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    scale = (high - low) / 15
    zero_point = (-low / scale).round()
    codes = ((blocks / scale).round() + zero_point).clamp(0, 15)
    return ((codes - zero_point) * scale).view_as(x)


def affine_half(x, block_size):
    q = quantize_affine(x, 4, block_size)
    return dataclasses.replace(q, scale=q.scale.half().float(), minimum=q.minimum.half().float()).dequantize()


ways = {  # and the bits of a block's constants, over its size
    "absmax, blocks of 64": (lambda x: quantize_absmax(x, 4, 64).dequantize(), 32 / 64),
    "affine, blocks of 128": (lambda x: quantize_affine(x, 4, 128).dequantize(), 64 / 128),
    "affine, blocks of 64, float16": (lambda x: affine_half(x, 64), 32 / 64),
    "zero point, blocks of 64": (lambda x: with_zero_point(x, 64), 36 / 64),
    "affine, blocks of 64": (lambda x: quantize_affine(x, 4, 64).dequantize(), 64 / 64),
}
kinds = {"Gaussian": gaussian, "after a ReLU": gaussian.relu()}
integers = {way: {kind: relative_rms(x, of(x)) for kind, x in kinds.items()} for way, (of, _) in ways.items()}
print(f"{'':<32}{'bits':>8}" + "".join(f"{kind:>15}" for kind in kinds))
for way, (_, more) in ways.items():
    print(f"{way:<32}{4 + more:>8}" + "".join(f"{error:>15.4f}" for error in integers[way].values()))

# %% claims
absmax, wide, half, whole, affine = integers.values()
assert absmax["after a ReLU"] > 2 * affine["after a ReLU"] and affine["Gaussian"] < absmax["Gaussian"]
assert half["Gaussian"] < min(absmax["Gaussian"], wide["Gaussian"])
assert all(abs(half[kind] / affine[kind] - 1) < 0.001 for kind in kinds)
assert abs(whole["after a ReLU"] / affine["after a ReLU"] - 1) < 0.001

# %% [markdown]
# After a ReLU absmax wastes its seven negative codes, and affine has less than half the error. A zero point is a minimum that was moved to a
# whole number of steps. So it needs four bits instead of {{32}}, zero stays exactly zero, and on Gaussian numbers the error is only {{100 * (integers['zero point, blocks of 64']['Gaussian'] / integers['affine, blocks of 64']['Gaussian'] - 1):.1f}} %
# larger. With float16 constants, affine costs no more than absmax, and nothing is lost.
#
# And the scales? QLoRA quantizes them, too, with {{256}} levels that are not equally spaced ([lesson 05](05_double_quantization.ipynb)). bitsandbytes calls them its
# **dynamic code**: {{64}} levels from `0.1` to `1`, {{32}} in the decade below, {{16}} in the next, and so on down to one, each in the middle of an equal part of its decade.
# With their negatives, zero and one, that makes {{256}}. Here they are built, and asked whether equal steps (INT8) would serve as well:

# %% machinery "The dynamic code, and a third quantization"
levels = [0.0, 1.0]
for decade in range(7):
    edges = torch.linspace(0.1, 1, 2 ** (6 - decade) + 1)
    middles = 10**-decade * (edges[:-1] + edges[1:]) / 2
    levels += [*middles.tolist(), *(-middles).tolist()]
dynamic = torch.tensor(sorted(levels))
print(f"{len(dynamic)} levels, equal to bitsandbytes': {torch.equal(dynamic, DYNAMIC8)}")

scales = quantize(gaussian, NF4, 64).absmax
centred = (scales - scales.mean()).view(-1, 256)
near_zero = (centred.abs() < 0.1 * centred.abs().amax(1, keepdim=True)).float().mean().item()
print(
    f"within a tenth of the largest: {(dynamic.abs() < 0.1).sum()} of the levels, {near_zero:.0%} of the centred scales"
)
one_large = scales.clone()
one_large[::256] *= 20
CODES = {"INT8": INT8, "dynamic": dynamic}
for name, each in {"the scales": scales, "one in 256 twenty times as large": one_large}.items():
    of = {code: relative_rms(each, quantize_scales(each, 256, by).dequantize()) for code, by in CODES.items()}
    print(f"error of {name:<34}" + " · ".join(f"{code} {error:.4f}" for code, error in of.items()))

second_level = SHAPES["llama-65b"].linear_parameters() / (64 * 256)
saved = second_level * (32 - 8 - 32 / 256) / 8
print(f"a third quantization would save {saved / 1e6:.1f} MB at 65B")

# %% claims
assert torch.equal(dynamic, DYNAMIC8) and (dynamic.abs() < 0.1).sum() == 127 and near_zero < 0.33

# %% [markdown]
# Half of the dynamic levels lie where less than a third of the scales are, so equal steps miss these scales by less. The code was made for numbers of all sizes,
# such as an optimizer's states, and where one scale is far larger than its neighbours it is ahead. In the weights either error drowns.
#
# And why stop at two? The scales of the scales could be quantized in turn. But there is one for {{64 * 256:,}} weights, so a third step saves next to nothing.
#
# ## 5 · Six suspects
#
# Tutorials copy NF4, and some copy it wrongly. Two of their tables, beside the real ones:

# %% machinery "The tables"
fifteen = [*NF4[:8].tolist(), *(-NF4[:7]).flip(0).tolist()]  # "NF4: −1, −0.6962, …, 0, …, 0.6962, 1"
odd_grid = (torch.arange(-15, 16, 2) / 15).tolist()  # "INT4: −15, −13, …, 13, 15"
tables = {"NF4": NF4.tolist(), "a tutorial's NF4": fifteen, "INT4": INT4.tolist(), "a tutorial's INT4": odd_grid}

# %% alt="Four rows of ticks from −{{1}} to {{1}}; a ring marks an exact zero. NF4: {{len(set(tables['NF4']))}} levels, more of them positive. The tutorial's NF4 is symmetric and has {{len(set(fifteen))}}. INT4: {{len(set(tables['INT4']))}}, evenly spaced, with a zero. The tutorial's INT4: {{len(set(odd_grid))}}, evenly spaced, the only row without a ring."
_ = plot_codebooks(new_axes(height=2.6), tables)

# %% claims
counts = {name: len(set(levels)) for name, levels in tables.items()}
assert list(counts.values()) == [16, 15, 15, 16] and [0 in levels for levels in tables.values()] == [True] * 3 + [False]

# %% [markdown]
# The first tutorial mirrored NF4's negative half: that makes fifteen values, and wastes a code. The second has no zero, so a weight that was
# set to {{0}} on purpose comes back as a fifteenth of its block's maximum.
#
# Now for six implementations of NF4 in blocks of {{64}}. One is right. The others have bugs that one finds in the wild: the table of
# fifteen; a table with two digits swapped; levels at the quantiles of `(i + ½)/16`, the "midpoint formula"; one scale for the whole tensor (stored once for every block); the two
# codes of each byte swapped.
#
# **Predict.** How many of the five bugs raise the error on Gaussian numbers by more than a tenth?

# %%
prediction = ...  # ← your guess

# %%
from qlora_lab.classroom.lessons.dive_i.suspects import SUSPECTS

errors_of = {}
for name, suspect in SUSPECTS.items():
    q = suspect(gaussian)
    errors_of[name] = relative_rms(gaussian, q.dequantize())
    print(f"{name}: error {errors_of[name]:.4f} at {q.bits_per_parameter} bits per parameter")
noticed = sum(error > 1.1 * min(errors_of.values()) for error in errors_of.values())
print(f"noticed: {noticed}; {told(prediction)}")

# %% claims
assert noticed == 2
right = relative_rms(gaussian, quantize(gaussian, NF4, 64).dequantize())
assert sum(error < right for error in errors_of.values()) == 1
assert sum(abs(error / right - 1) < 1e-4 for error in errors_of.values()) == 2  # the innocent one, and swapped digits

# %% [markdown]
# **What happened?** Two of five. Of the others, one raises the error by a few per cent, one leaves it where it was, and one even *lowers* it: the midpoint formula gives the middles of sixteen shares, as in
# section 1, without a zero among them, and NF4 never was the table of the least error. An implementation can pass every
# test of accuracy and still decode other people's checkpoints wrongly.
#
# **Exercise I.2 ●●● (10 minutes).** Who did what? A suspect takes a tensor and returns a `QuantizedTensor`, with `.codebook`,
# `.absmax`, `.codes` and `.indices()`. Investigate here:

# %%
q, ours = SUSPECTS["A"](gaussian), quantize(gaussian, NF4, 64)  # ← look at another one
print("levels ", [round(level, 4) for level in q.codebook.tolist()])
print("scales ", [round(scale, 4) for scale in q.absmax[:5].tolist()])
print("indices", q.indices()[:12].tolist())
print("right  ", [round(level, 4) for level in NF4.tolist()], ours.indices()[:12].tolist())

# %%
verdict = {
    ### BEGIN SOLUTION
    ### STUB: "A": ...,
    ### STUB: "B": ...,
    ### STUB: "C": ...,
    ### STUB: "D": ...,
    ### STUB: "E": ...,
    ### STUB: "F": ...,
    "A": "swapped digits",
    "B": "one scale",
    "C": "midpoint formula",
    "D": "innocent",
    "E": "15 values",
    "F": "nibbles swapped",
    ### END SOLUTION
}  # the six: innocent, 15 values, swapped digits, midpoint formula, one scale, nibbles swapped

# %%
check_suspects(verdict)

# %% [markdown]
# <details><summary>Hint 1</summary>Begin with what is easy to compare: <code>q.absmax[:5]</code> against those of <code>ours</code>, then
# <code>(q.codebook == NF4).sum()</code>.</details>
# <details><summary>Hint 2</summary>If scales and codebook are right, only the codes are left. For the others:
# <code>len(q.codebook.unique())</code>, and whether <code>0</code> is among the levels.</details>

# %% [markdown]
# ## Recap
#
# - NF4's offset is the mean of two middles, and not the one with the least error: the best one grows with the block size and with
#   the tails. It is a fair compromise all the same.
# - Levels are half of a format. Scales in fewer bits, and blocks that fit them, can make integers win.
# - A codebook is checked by equality, never by its error.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Back to the path:** [05 · What do the scales cost?](05_double_quantization.ipynb)
