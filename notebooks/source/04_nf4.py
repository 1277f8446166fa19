# %% [markdown]
# # 04 · Which 16 numbers are best?
#
# Four bits can name sixteen numbers. QLoRA's answer to *which* is a table called NF4, which most tutorials copy and some
# copy wrongly. Here you build it until all sixteen values are equal to bitsandbytes' to the last bit. Then you put three
# claims about it to the test: that its levels are used equally often, that its odd-looking constant was chosen for the least
# error, and that it beats INT4. Expect to change your mind.
#
# | you need | |
# |---|---|
# | time | 40 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | optional, not used |

# %% machinery "Imports"
import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch

from qlora_lab.classroom.checks import (
    check_fingerprints,
    check_level_usage,
    check_normal_levels,
    check_suspects,
    progress,
)
from qlora_lab.classroom.lessons.n04.figures import (
    plot_codebooks,
    plot_error_over_bits,
    plot_errors_by_block,
    plot_histogram,
    plot_level_usage,
    plot_offset,
)
from qlora_lab.classroom.plots import new_axes
from qlora_lab.classroom.samples import DISTRIBUTIONS, bundled_weight, sample
from qlora_lab.quantization import BITSANDBYTES_NF4, FP4, INT4, NF4, quantize

# %%
gaussian = sample("Gaussian", 2**20)  # a million numbers from the normal distribution
weights = bundled_weight("model.embed_tokens.weight")[::48].float()  # every 48th row of a real model's embeddings

# %% [markdown]
# ## 1 · Five tables of sixteen
#
# In block-wise quantization, each block of 64 numbers is divided by its largest absolute value, its **absmax**. So it lies
# in [−1, 1], and a 4-bit format is a list of at most sixteen **levels** there. Each number is replaced by the nearest.
#
# Of these five *codebooks*, NF4 and FP4 (a 4-bit float: sign, 2 bits of exponent, 1 of mantissa) are bitsandbytes'. INT4 is the
# absmax grid of notebook 03. Two come from tutorials.

# %% alt="Five rows of ticks from −1 to 1, the levels of five tables; rings mark an exact zero. NF4: 16 levels, densest near 0. INT4: 15, evenly spaced. FP4: 15, three of them at or beside 0. The tutorial's NF4: 15, symmetric. The tutorial's INT4: 16, evenly spaced, the only row without a ring."
fifteen = [*NF4[:8].tolist(), *(-NF4[:7]).flip(0).tolist()]  # "NF4: −1, −0.6961, …, 0, …, 0.6961, 1"
odd_grid = (torch.arange(-15, 16, 2) / 15).tolist()  # "INT4: −15, −13, …, 13, 15"
tables = {"NF4": NF4.tolist(), "INT4": INT4.tolist(), "FP4": FP4.tolist()}
_ = plot_codebooks(new_axes(height=3), tables | {"tutorial's NF4": fifteen, "tutorial's INT4": odd_grid})

# %% [markdown]
# Look for the rings. NF4 has an exact zero and is *not* symmetric: seven negative levels, eight positive. The table in the
# tutorials mirrors its negative half; that gives fifteen values, and wastes a code. The tutorial's INT4 has no zero at all: a
# weight that was set to 0 on purpose would come back as ±1/15 of its block's maximum. Integer formats keep zero. Some give up one
# code for it (−7 … 7, fifteen levels), others use all sixteen (−8 … 7, section 6). FP4 spends two codes on zero.

# %% claims
values, counts = {name: len(set(levels)) for name, levels in tables.items()}, (len(set(fifteen)), len(set(odd_grid)))
assert values == {"NF4": 16, "INT4": 15, "FP4": 15} and counts == (15, 16)
assert (NF4 < 0).sum() == 7 and (NF4 == 0).sum() == 1 and (NF4 > 0).sum() == 8 and 0 not in odd_grid

# %% [markdown]
# ## 2 · Where the numbers are
#
# NF4's idea: weights are roughly normally distributed, so put more levels near 0. Are they? And what does a block of them look
# like after the division by its absmax?


# %% alt="Two histograms of numbers divided by their block's absmax: share of the values over −1 to 1, with NF4's levels as ticks. Gaussian numbers make a bell 4 % high, real weights a narrower one of 6 %. Both have a spike at −1 and one at +1, of around 1 %."
def scaled_blocks(x, block_size=64):
    blocks = x.flatten().view(-1, block_size)
    return blocks / blocks.abs().amax(dim=1, keepdim=True)


edges = np.linspace(-1, 1, 52)
histogram = {
    name: np.histogram(scaled_blocks(x), edges)[0] / x.numel()
    for name, x in {"Gaussian": gaussian, "real weights": weights}.items()
}
_ = plot_histogram(new_axes(), histogram, edges, NF4)

# %% [markdown]
# Real weights have a bell of their own, with more of them near zero. And there is something at the edges that no normal distribution
# has: *every* block has a number at exactly −1 or +1, the one that it was divided by. Remember those spikes.
#
# ## 3 · NF4, to the last bit
#
# Choose numbers so that equal shares of a normal distribution lie around each: **quantiles**. `normal_quantiles(p)` says below
# which value a share `p` of the distribution lies. At the ends that goes wrong: the paper's equation 4 starts at the
# quantile of 0.

# %%
from qlora_lab.quantization import normal_quantiles

try:
    normal_quantiles(torch.tensor([0.0]))
except ValueError as error:  # statistics.StatisticsError is one
    print(error)

# %% [markdown]
# It is minus infinity. So bitsandbytes starts a little further in, at an **offset** of 0.9677083, and treats the halves
# separately:

# %%
offset = 0.9677083
probabilities = torch.linspace(offset, 0.5, 9)[:-1]  # 8 of them, from the outside in; the last, 0.5, would be zero
positive = normal_quantiles(probabilities)
print("probabilities", [round(p, 4) for p in probabilities.tolist()])
print("quantiles    ", [round(q, 4) for q in positive])
print("divided      ", [round(q / positive[0], 4) for q in positive])

# %% claims
assert torch.allclose(torch.tensor(positive[::-1]) / positive[0], NF4[8:])

# %% [markdown]
# These are the eight positive levels. The negative half is made in the same way with one probability fewer.
#
# **Predict.** You compute all sixteen like this. In how many of them will every one of the 32 bits be that of bitsandbytes' table,
# if you do all of it in float64 and round once at the end?

# %%
prediction = {"equal": 16}  # ← your guess

# %%
up = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
down = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
levels = torch.cat([down, torch.zeros(1), up.flip(0)])
in_float64 = (levels / levels.max()).float()
print(f"{(in_float64 == BITSANDBYTES_NF4).sum()} of 16 equal (your guess: {prediction['equal']})")

# %% claims
assert (in_float64 == BITSANDBYTES_NF4).sum() == 6 and torch.allclose(in_float64, BITSANDBYTES_NF4)

# %% [markdown]
# **What happened?** The table was computed once, on somebody's machine, with probabilities from a float32 `linspace`. Those are
# off in the eighth digit, and the levels with them. More precise arithmetic gives better quantiles and the wrong table. A 4-bit
# checkpoint is decoded with *the* table, so here "right" means equal.
#
# **Exercise 4.1 ●●○ (6 minutes).** Write all of NF4, equal to the last bit: float32 probabilities, `normal_quantiles` (which are
# float64), float32 levels.


# %%
def normal_levels(offset):
    """16 levels, float32, ascending: 7 negative, 0, 8 positive; the largest is 1."""
    ### BEGIN SOLUTION (about 4 lines)
    up = normal_quantiles(torch.linspace(offset, 0.5, 9)[:-1])
    down = [-q for q in normal_quantiles(torch.linspace(offset, 0.5, 8)[:-1])]
    levels = torch.tensor(down + [0.0] + up[::-1])
    return levels / levels.max()
    ### END SOLUTION


# %%
check_normal_levels(normal_levels)

# %% [markdown]
# <details><summary>Hint 1</summary>The negative half: <code>linspace(offset, 0.5, 8)</code>, without the last, each quantile with
# a minus sign. They come from the outside in, which is ascending for this half.</details>
# <details><summary>Hint 2</summary>Put the halves and the zero in one list, make it a float32 tensor, divide that by its
# maximum.</details>

# %%
import bitsandbytes.functional as bnb

from qlora_lab.quantization import normal_float  # normal_levels for any number of bits

theirs = bnb.get_4bit_type("nf4", device="cpu")
packed, state = bnb.quantize_4bit(gaussian, quant_type="nf4")
ours = quantize(gaussian, NF4, block_size=64)
print(f"all 16 levels equal to bitsandbytes': {torch.equal(NF4, theirs) and torch.equal(normal_float(), theirs)}")
print(f"all {len(ours.codes):,} bytes of codes: {torch.equal(packed.flatten(), ours.codes)}", end=", ")
print(f"all {len(ours.absmax):,} scales: {torch.equal(state.absmax, ours.absmax)}")

# %% claims
assert torch.equal(normal_float(), theirs) and torch.equal(NF4, theirs)
assert torch.equal(packed.flatten(), ours.codes) and torch.equal(state.absmax, ours.absmax)

# %% [markdown]
# ## 4 · Are the sixteen levels used equally?
#
# Tutorials say so: *NF4 splits the normal distribution into bins of equal mass, so each code is used equally often.* The first half
# is in bitsandbytes' documentation, too ("approximately equal probability mass"). Does the second follow? Sixteen equal shares are
# 6.25 % each.
#
# **Predict.** A million Gaussian numbers, NF4, blocks of 64. What share does the rarest code get, and what the most frequent?

# %%
prediction = {"rarest": 6.25, "most frequent": 6.25}  # ← your guess, in per cent

# %% [markdown]
# **Exercise 4.2 ●●○ (4 minutes).** Count. `codes` is a tensor of bytes, with two 4-bit codes (*nibbles*) in each.


# %%
def usage(codes):
    """Packed uint8 codes -> 16 shares that sum to 1."""
    ### BEGIN SOLUTION (about 3 lines)
    high, low = codes >> 4, codes & 15
    counts = torch.bincount(torch.cat([high, low]), minlength=16)
    return counts / counts.sum()
    ### END SOLUTION


# %%
check_level_usage(usage)

# %% [markdown]
# <details><summary>Hint 1</summary>How do you get the upper four bits of a byte as a number? And the lower four?</details>
# <details><summary>Hint 2</summary>Bit operators, <code>>></code> and <code>&</code>; then
# <code>torch.bincount(..., minlength=16)</code>.</details>

# %% alt="Bars: share of the elements at each of NF4's 16 levels, from −1 (level 0) to 1 (level 15). They form a hill: the rarest, level {{shares.argmin()}}, has {{100 * shares.min():.1f}} %, the most frequent, level {{shares.argmax()}}, has {{100 * shares.max():.1f}} %. A dotted line marks equal shares, 6.25 %; two dashed lines are your guesses for rarest and most frequent."
from qlora_lab.quantization import entropy, level_usage  # level_usage(q) does the same for a QuantizedTensor

shares = level_usage(ours)
_ = plot_level_usage(new_axes(), shares.tolist(), prediction)
print(f"rarest {shares.min():.1%} · most frequent {shares.max():.1%} · entropy {entropy(shares):.2f} of 4 bits")

# %% claims
assert f"{shares.min():.1%} {shares.max():.1%} {entropy(shares):.2f}" == "1.7% 9.2% 3.88"

# %% [markdown]
# **What happened?** You did not quantize a normal distribution. You quantized numbers *divided by the largest of their 64
# neighbours*. How far the rest huddles towards zero depends on how large that neighbour is, so on the block size. (**Entropy**
# is what the codes are worth: 4 bits if all are equally frequent, less if some are rare.) With one fixed scale and no blocks, the
# claim is nearly true:

# %%
from qlora_lab.quantization import nearest_level

outermost = normal_quantiles(torch.tensor([offset]))[0]  # what NF4 calls 1
indices = nearest_level((gaussian / outermost).clamp(-1, 1), NF4)
fixed = torch.bincount(indices, minlength=16) / len(gaussian)
print(f"one fixed scale, no blocks: {fixed.min():.1%} to {fixed.max():.1%}")

# %% claims
assert fixed.min() > 0.05 and fixed.max() < 0.075

# %% [markdown]
# Now move the slider.

# %% alt="Bars: share of the elements at each of NF4's 16 levels, with a dotted line at equal shares, 6.25 %. Where the slider starts, at blocks of 64, they form a hill with its top at level 6 and low ends; entropy 3.89 of 4 bits. The larger the blocks, the emptier the ends."
from qlora_lab.classroom.widgets import explore

BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
small = gaussian[: 2**15]  # enough for a figure, and quick


def draw_usage(block_size):
    shares = level_usage(quantize(small, NF4, block_size))
    ax = plot_level_usage(new_axes(), shares.tolist())
    ax.set_title(f"block size {block_size}: entropy {entropy(shares):.2f} of 4 bits", loc="left")
    return ax


explore(draw_usage, block_size=ipywidgets.SelectionSlider(options=BLOCK_SIZES, value=64, description="block size"))

# %% [markdown]
# With large blocks the outermost levels are hardly ever used, and the shares are not equal at any block size. The folklore is false.
# But is that bad? What counts is the error.
#
# ## 5 · Is 0.9677083 the best offset?
#
# **Predict.** The offset is the one free number in NF4. Make a table of 16 levels for each offset, quantize Gaussian blocks of 64,
# and measure the relative RMS error. Where is it smallest?

# %%
prediction = {"offset": 0.9677}  # ← your guess

# %%
OFFSETS = np.linspace(0.9, 0.995, 20).tolist()


def error_of(levels, size, x=small):
    """Relative RMS error with any number of levels."""
    blocks = x.reshape(-1, size)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    scaled = blocks / absmax
    error = (levels[nearest_level(scaled, levels)] - scaled) * absmax
    return (error.norm() / x.norm()).item()


curves = {
    (bits, size): [error_of(normal_float(bits, offset), size) for offset in OFFSETS]
    for bits in (2, 3, 4, 5)
    for size in BLOCK_SIZES
}


# %% alt="Left, ticks from −1 to 1: the levels that follow from the chosen offset. Right, by how many per cent the error exceeds the least one, over the offset, 0.90 to 0.995: flat around the least, at 0.935, then ever steeper. NF4's offset, 0.9677, where the slider starts, is about 3 % above."
def draw_offset(offset, bits, block_size):
    _, axes = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[1, 1.25], layout="constrained")
    levels = normal_float(bits, offset)
    here = (offset, error_of(levels, block_size))
    ax = plot_offset(axes, levels, OFFSETS, curves[bits, block_size], here)
    ax.set_title(f"{2**bits} levels · blocks of {block_size} · error {here[1]:.4f}", loc="left", fontsize=11)
    return ax


explore(
    draw_offset,
    offset=ipywidgets.FloatSlider(
        value=0.9677, min=0.9, max=0.995, step=0.0005, readout_format=".4f", description="offset"
    ),
    bits=ipywidgets.IntSlider(value=4, min=2, max=5, description="bits"),
    block_size=ipywidgets.SelectionSlider(options=BLOCK_SIZES, value=64, description="block size"),
)

# %%
many = gaussian[: 2**18]
errors = {size: [error_of(normal_float(4, offset), size, many) for offset in OFFSETS] for size in BLOCK_SIZES}
best_offset = {size: OFFSETS[int(np.argmin(errors[size]))] for size in BLOCK_SIZES}
excess = {size: error_of(NF4, size, many) / min(errors[size]) - 1 for size in BLOCK_SIZES}
print(f"your guess for blocks of 64: {prediction['offset']}")
for size in BLOCK_SIZES:
    print(f"blocks of {size:>4}: best offset {best_offset[size]:.3f}, NF4's error is {excess[size]:.1%} above")

# %% claims
assert best_offset[64] < 0.945 and 0.025 < excess[64] < 0.03
assert min(excess, key=excess.get) == 512 and excess[512] < 0.001

# %% [markdown]
# **What happened?** bitsandbytes' documentation says that the offset was "empirically optimized to minimize quantization error for
# typical neural network weight distributions". But to all seven digits it is the mean of 1 − 1/30 and 1 − 1/32, the middles of the
# outermost of 15 and of 16 equal shares. That looks like arithmetic, not like a fit. And for Gaussian blocks of 64 another one has
# less error; real weights follow below.

# %% claims
assert round((1 - 1 / 30 + 1 - 1 / 32) / 2, 7) == offset

# %% [markdown]
# In a small block the largest value is not far out, so the others spread widely over [−1, 1], and levels farther out pay off: for
# Gaussian blocks of 64, an offset near {{best_offset[64]:.3f}} has {{100 * excess[64]:.0f}} % less error. In large blocks the rest huddles near zero; at 512 NF4's offset
# is right, at 4096 too small. Heavy tails act like a larger block:

# %%
on_weights = [error_of(normal_float(4, offset), 64, weights) for offset in OFFSETS]
best = OFFSETS[int(np.argmin(on_weights))]
above = error_of(NF4, 64, weights) / min(on_weights) - 1
print(f"embeddings, blocks of 64: best offset {best:.3f}, NF4's error is {above:.1%} above")

# %% claims
assert best > 0.975 and 0 < above < 0.02

# %% [markdown]
# So at blocks of 64, NF4's constant sits between what Gaussian numbers and what these embeddings would choose, within 3 % of
# either. Not optimal, and hard to beat by much.
#
# ## 6 · NF4 against the others
#
# Four formats: NF4 and FP4; INT4 with one scale for each block; and *affine* INT4, whose blocks hold a minimum too.
#
# **Predict.** Gaussian numbers, blocks of 64. Which has the smallest error?

# %%
prediction = {"smallest error": "NF4"}  # ← your guess: "NF4", "FP4", "INT4" or "INT4 affine"

# %%
from dataclasses import replace

from qlora_lab.quantization import error_report, quantize_affine, relative_rms

FORMATS = {
    "NF4": lambda x, size: quantize(x, NF4, size),
    "INT4": lambda x, size: quantize(x, INT4, size),
    "INT4 affine": lambda x, size: quantize_affine(x, 4, size),
    "FP4": lambda x, size: quantize(x, FP4, size),
}
data = {name: sample(name, 2**18) for name in DISTRIBUTIONS} | {"real weights (embeddings)": weights}
reports = {
    name: {form: [error_report(x, of(x, size)) for size in BLOCK_SIZES] for form, of in FORMATS.items()}
    for name, x in data.items()
}

# %% alt="Five line plots, one for each kind of numbers: relative RMS error over block sizes 32 to 4096. NF4 is lowest from blocks of 128 on, except on uniform numbers, where both kinds of INT4 beat it. Affine INT4 is lowest at blocks of 32 everywhere, and on Gaussian ones of 64; FP4 is highest everywhere."
errors = {n: {f: [r.relative_rms for r in rs] for f, rs in by.items()} for n, by in reports.items()}
at_64 = {form: reports["Gaussian"][form][1] for form in FORMATS}
bits = {form: f": {report.bits_per_parameter:g} bits at block size 64" for form, report in at_64.items()}
_ = plot_errors_by_block(errors, BLOCK_SIZES, bits)

# %%
print(f"your guess: {prediction['smallest error']}\n")
print(f"{'blocks of 64':<25}" + "".join(f"{form:>12}" for form in FORMATS))
print(f"{'bits per parameter':<25}" + "".join(f"{report.bits_per_parameter:>12g}" for report in at_64.values()))
for name, by_format in errors.items():
    print(f"{name:<25}" + "".join(f"{values[1]:>12.4f}" for values in by_format.values()))

# %% claims
best = {name: min(by_format, key=lambda form: by_format[form][1]) for name, by_format in errors.items()}
assert best["Gaussian"] == best["uniform"] == "INT4 affine"
assert best["Laplace"] == best["Student-t"] == best["real weights (embeddings)"] == "NF4"
assert all(min(by, key=lambda form: by[form][0]) == "INT4 affine" for by in errors.values())  # at blocks of 32
assert all(max(by, key=lambda form: by[form][i]) == "FP4" for by in errors.values() for i in range(len(BLOCK_SIZES)))
nf4, affine = errors["Gaussian"]["NF4"], errors["Gaussian"]["INT4 affine"]
assert [a < b for a, b in zip(nf4, affine)] == [False, False] + [True] * 6  # from blocks of 128 on NF4 wins

# %% [markdown]
# **What happened?** On the very distribution that NF4 is named after, affine INT4 wins at blocks of 32 and 64: its two ends fit each
# block exactly, and all sixteen levels lie between. From 128 on NF4 wins. On heavy tails and on real weights affine wins at 32
# only, NF4 from 64 on; on uniform numbers, equal steps are best, as they should be. Elsewhere plain INT4 and FP4 are behind.
#
# But look at the second line of the table. Affine INT4 holds *two* float32 numbers for each block, and 5 bits are not 4.5. A fair
# comparison puts the price on one axis:

# %% alt="Two plots, Gaussian numbers and real weights: relative RMS error over bits per parameter, constants included; four formats, points at blocks of 256 to 32. NF4 has the lowest error at every price up to 5 bits. Only affine INT4 goes on, to 6 bits, with less error."
shown = {"Gaussian": "Gaussian", "real weights (embeddings)": "real weights"}
_, axes = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
for ax, (name, title) in zip(axes, shown.items()):
    points = {
        form: ([r.bits_per_parameter for r in rs[:4]], [r.relative_rms for r in rs[:4]], BLOCK_SIZES[:4])
        for form, rs in reports[name].items()
    }
    plot_error_over_bits(ax, points).set_title(title)
    ax.spines[["top", "right"]].set_visible(False)

# %% claims
five_bits = {"NF4": reports["Gaussian"]["NF4"][0], "INT4 affine": reports["Gaussian"]["INT4 affine"][1]}
assert {r.bits_per_parameter for r in five_bits.values()} == {5.0}
assert five_bits["NF4"].relative_rms < five_bits["INT4 affine"].relative_rms
for name in shown:  # at 4.25, 4.5 and 5 bits NF4's blocks are half as large
    assert all(a.relative_rms < b.relative_rms for a, b in zip(reports[name]["NF4"], reports[name]["INT4 affine"][1:4]))

# %% [markdown]
# With float32 constants, NF4 has the lower error on both, at every price that both can pay. At 5 bits it is NF4 in blocks of 32 against affine
# INT4 in blocks of 64. Two formats of **GGUF**, llama.cpp's files, spend their bits better: Q4_1 is affine with *float16* constants,
# and Q4_0 uses all sixteen integer codes: the extreme value of a block, with its sign, gets −8.


# %%
def q4_0(x, size):
    """Integers −8 ... 7; the extreme value of each block gets −8."""
    blocks = x.reshape(-1, size)
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    return ((blocks / scale).round().clamp(-8, 7) * scale.half()).reshape(x.shape)


def q4_1(x, size):
    q = quantize_affine(x, 4, size)
    return replace(q, scale=q.scale.half().float(), minimum=q.minimum.half().float()).dequantize()


def nf4_half(x, size):
    q = quantize(x, NF4, size)
    return replace(q, absmax=q.absmax.half().float()).dequantize()


fair = {}
for name, x in {"Gaussian": gaussian, "embeddings": weights}.items():
    fair[name] = [relative_rms(x, of(x, 32)) for of in (q4_0, nf4_half, q4_1)] + [
        relative_rms(x, FORMATS["NF4"](x, 32).dequantize()),
        error_of(NF4, 16, x),  # with float32 scales: rounded to float16 they lose nothing that the digits below show
    ]
    print(f"{name}, blocks of 32 but for the last")
    print(f"   4.5 bits: Q4_0 {fair[name][0]:.4f}, NF4 (float16 scales) {fair[name][1]:.4f}")
    print(f"   5 bits:   Q4_1 {fair[name][2]:.4f}, NF4 (float32 scales) {fair[name][3]:.4f}", end=", ")
    print(f"NF4 (float16 scales, blocks of 16) {fair[name][4]:.4f}")

# %% claims
assert fair["Gaussian"][0] < fair["Gaussian"][1] and fair["embeddings"][0] > fair["embeddings"][1]
assert all(row[2] < row[3] for row in fair.values())
assert fair["Gaussian"][2] < fair["Gaussian"][4] and fair["embeddings"][2] > fair["embeddings"][4]

# %% [markdown]
# Against careful integers NF4 no longer wins everywhere: on Gaussian numbers the integers are ahead, at 4.5 bits and at 5; on the
# embeddings NF4 is. But at 5 bits it needs blocks of 16 for that, which bitsandbytes does not offer; with float32 scales in blocks of
# 32, which it does, Q4_1 is ahead on both. What a format does with its constants matters as much as its sixteen levels. Notebook 05
# does something about NF4's.
#
# How much is left to gain? **Lloyd's algorithm** finds the sixteen levels with the least error for given data: each number goes to
# its nearest level, each level to the mean of its numbers, again and again. `best_codebook` does that.

# %% alt="Two rows of ticks from −1 to 1: NF4's 16 levels, and the 16 with the least error on Gaussian blocks of 64. The best ones are nearly symmetric, have no level at 0 (no ring), and end at about ±0.95, short of ±1. Their error is {{error_with(best_16):.4f ±1%}}, NF4's is {{error_with(NF4):.4f ±1%}}."
from qlora_lab.quantization import best_codebook


def error_with(levels):
    return relative_rms(gaussian, quantize(gaussian, levels, 64).dequantize())


best_16 = best_codebook(gaussian, block_size=64)
best_with_ends = best_codebook(gaussian, block_size=64, keep=(-1.0, 0.0, 1.0))
for name, levels in {"NF4": NF4, "best that keeps -1, 0, 1": best_with_ends, "best 16": best_16}.items():
    print(f"{name:<26}{error_with(levels):.4f}, all at 4.5 bits per parameter")
_ = plot_codebooks(new_axes(height=2.2), {"NF4": NF4.tolist(), "best 16": best_16.tolist()})

# %% claims
assert error_with(NF4) / error_with(best_16) < 1.06 and error_with(NF4) / error_with(best_with_ends) < 1.03

# %% [markdown]
# NF4 is within 6 % of the best error that any sixteen numbers reach on Gaussian blocks of 64, and within 3 % of the best table that
# keeps −1, 0 and 1. Both at once: what people say about *why* it works is false, and it works.
#
# Is the error what counts? The paper reports perplexity on the Pile's Common Crawl (between how many words the models hesitate; lower is
# better): 27.41 for NF4 with double quantization, 29.48 for FP4 as E3M0 (all exponent), 31.07 for FP4 as E2M1 and 34.34 for INT4.

# %%
from qlora_lab.quantization import E2M1

E3M0 = torch.tensor(sorted([0.0, *(sign * 2.0**-k for k in range(7) for sign in (1, -1))] + [1.0]))
for name, levels in {"E2M1": E2M1, "bitsandbytes' FP4": FP4, "E3M0": E3M0}.items():
    smallest = levels[levels > 0].min()
    print(f"{name:<18} smallest level {smallest:.4f}, error {error_with(levels):.4f} at 4.5 bits")

# %% claims
assert error_with(E2M1) < error_with(FP4) < error_with(E3M0) and error_with(E3M0) > 1.6 * error_with(E2M1)

# %% [markdown]
# E3M0 has the larger error here and the *better* perplexity there: the error alone does not settle it. (And beware of names:
# bitsandbytes' FP4 is neither of the two. It is E2M1 with another smallest level.)
#
# ## 7 · The checkpoint with a past
#
# The bundled model's file says bfloat16. Somebody hands you such a file and claims that it was never quantized. Can you tell?
# Quantize one of its linear layers in every way you know, next to numbers that really never were.

# %%
from qlora_lab.quantization import quantize_absmax

suspicious = {
    "linear": bundled_weight("model.layers.0.mlp.down_proj.weight").float(),
    "embedding": weights,
    "Gaussian": gaussian,
}
SCHEMES = {"absmax": quantize_absmax, "affine": quantize_affine}
print("relative RMS error at block size" + "".join(f"{size:>9}" for size in (16, 32, 64, 128)))
for name, x in suspicious.items():
    for bits in (4, 8):
        for scheme, quantizer in SCHEMES.items():
            row = [relative_rms(x, quantizer(x, bits, size).dequantize()) for size in (16, 32, 64, 128)]
            print(f"{name:<12}{scheme:<8}{bits} bits        " + "".join(f"{error:9.4f}" for error in row))

# %% [markdown]
# **Exercise 4.3 ●●○ (4 minutes).** Two of the three were quantized once and then stored as bfloat16. In which scheme, with how
# many bits and which block size? One error in the table is too good to be true for each of them.

# %%
### BEGIN SOLUTION
### STUB: verdict = {"linear": ..., "embedding": ...}  # each ("absmax" or "affine", bits, block size)
verdict = {"linear": ("affine", 4, 32), "embedding": ("absmax", 8, 32)}
### END SOLUTION

# %%
check_fingerprints(verdict)

# %% [markdown]
# <details><summary>Hint 1</summary>Read along each line: smaller blocks should always have the smaller error. Where does a line
# break that rule?</details>
# <details><summary>Hint 2</summary>Four bits are never good to one part in a thousand by chance. With 8 bits, look for a line that is lowest
# at one block size, and by far.</details>

# %%
linear = suspicious["linear"]
affine = relative_rms(linear, quantize_affine(linear, 4, 32).dequantize())
nf4 = relative_rms(linear, quantize(linear, NF4, 32).dequantize())
different = max(len(block.unique()) for block in linear.flatten().view(-1, 32)[:1000])
print(f"blocks of 32: affine INT4 {affine:.4f}, NF4 {nf4:.4f}, {nf4 / affine:.0f} times as much")
print(f"different values in a block of 32: {different} at most")

# %% claims
assert affine < 0.002 and 60 < nf4 / affine < 70 and different <= 16
in_4_bits = relative_rms(weights, quantize_absmax(weights, 4, 32).dequantize())
assert f"{7 / 127 * in_4_bits:.3f}" == "0.007"  # 8 bits have 127 steps where 4 have 7

# %% [markdown]
# The model came to you through a 4-bit file, and bfloat16 hides it. Comparing formats on its linear layers would crown affine INT4 with
# blocks of 32, by a factor of more than sixty. That is why the figures above use the embeddings (once 8-bit: an error near {{7 / 127 * in_4_bits:.3f}} beside 0.107, and errors add as squares), and why
# a benchmark of quantizers should say where its weights come from.
#
# ## 8 · Six suspects
#
# Six implementations of NF4 with blocks of 64. One is right. The others have the bugs that one finds in the wild: a table of 15
# values; two digits swapped; levels from the "midpoint formula" Q((i + ½)/16), where Q is the normal quantile; one scale for the whole tensor; nibbles swapped.
#
# **Predict.** Of the five bugs, how many raise the error on Gaussian numbers by more than a tenth?

# %%
prediction = {"noticed by the error": 5}  # ← your guess

# %%
from qlora_lab.classroom.lessons.n04.suspects import SUSPECTS

errors_of = {}
for name, suspect in SUSPECTS.items():
    q = suspect(gaussian)
    errors_of[name] = relative_rms(gaussian, q.dequantize())
    print(f"{name}: error {errors_of[name]:.4f} at {q.bits_per_parameter} bits per parameter")
noticed = sum(error > 1.1 * min(errors_of.values()) for error in errors_of.values())
print(f"noticed: {noticed} (your guess: {prediction['noticed by the error']})")

# %% claims
assert noticed == 2

# %% [markdown]
# **What happened?** Two of five. One bug leaves the error where it was, and another *lowers* it. An implementation can pass every test
# of accuracy and still decode other people's checkpoints wrongly.
#
# **Exercise 4.4 ●●● (10 minutes).** Who did what? A suspect takes a tensor and returns a `QuantizedTensor`, with `.codebook`,
# `.absmax`, `.codes` and `.indices()`. Investigate below.

# %%
q = SUSPECTS["A"](gaussian)  # ← look at another one
print("levels ", [round(level, 4) for level in q.codebook.tolist()])
print("scales ", [round(scale, 4) for scale in q.absmax[:5].tolist()])
print("indices", q.indices()[:12].tolist())
print("right  ", ours.indices()[:12].tolist())

# %%
verdict = {
    ### BEGIN SOLUTION
    ### STUB: "A": ...,
    ### STUB: "B": ...,
    ### STUB: "C": ...,
    ### STUB: "D": ...,
    ### STUB: "E": ...,
    ### STUB: "F": ...,
    "A": "mistyped digit",
    "B": "one scale",
    "C": "midpoint formula",
    "D": "innocent",
    "E": "15 values",
    "F": "nibbles swapped",
    ### END SOLUTION
}  # the six: innocent, 15 values, mistyped digit, midpoint formula, one scale, nibbles swapped

# %%
check_suspects(verdict)

# %% [markdown]
# <details><summary>Hint 1</summary>Begin with what is easy to compare: <code>q.absmax[:5]</code> against those of <code>ours</code>, then
# <code>(q.codebook == NF4).sum()</code>.</details>
# <details><summary>Hint 2</summary>If scales and codebook are right, only the codes are left. For the others:
# <code>len(q.codebook.unique())</code>, and whether 0 is among the levels.</details>

# %% [markdown]
# ## Recap
#
# - NF4: quantiles of the normal distribution between the offset 0.9677083 and ½, eight positive, seven negative, and zero. Sixteen
#   values, not symmetric, equal to bitsandbytes' to the last bit.
# - Its levels are not used equally: 1.7 % to 9.2 % on Gaussian blocks of 64.
# - Its offset is not the one with the least error: 3 % above on Gaussian blocks of 64, none at 512.
# - Affine INT4 can have a lower error at the same block size, but pays for it; at the same bits, with float32 constants, NF4 was ahead on
#   Gaussian numbers and on embeddings. Compare errors only with the bits beside them.
# - Check a codebook by equality, and a checkpoint for its past.
#
# This serves *say how NF4 differs from plain INT4* and *explain how quantization works*.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [05 · What do the scales cost?](05_double_quantization.ipynb)
