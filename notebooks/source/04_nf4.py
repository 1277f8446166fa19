# %% [markdown]
# # 04 · Which sixteen numbers are best?
#
# Four bits can tell sixteen numbers apart. QLoRA takes those sixteen from a table called NF4, and you trained with it in lesson 01.
# Here you build the table until it equals the one in bitsandbytes to the last bit. Then you test two claims: that its levels are used
# equally often, and that it loses less than INT4. At the end, the model that you trained gives a secret away.
#
# | you need | |
# |---|---|
# | time | 35 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not used |

# %% machinery "Imports"
import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch

from qlora_lab.classroom.checks import check_fingerprints, check_level_usage, check_normal_levels, progress
from qlora_lab.classroom.lessons.n04.figures import (
    plot_error_over_bits,
    plot_errors_by_block,
    plot_histogram,
    plot_level_usage,
)
from qlora_lab.classroom.lessons.n04.machinery import levels_in_float64
from qlora_lab.classroom.plots import new_axes, plot_codebooks, told
from qlora_lab.classroom.samples import DISTRIBUTIONS, bundled_weight, sample
from qlora_lab.classroom.widgets import explore
from qlora_lab.quantization import (
    BITSANDBYTES_NF4,
    FP4,
    INT4,
    NF4,
    best_codebook,
    entropy,
    error_report,
    level_usage,
    nearest_level,
    normal_float,
    normal_quantiles,
    quantize,
    quantize_absmax,
    quantize_affine,
    relative_rms,
)

# %%
gaussian = sample("Gaussian", 2**20)  # a million numbers from the normal distribution
weights = bundled_weight("model.embed_tokens.weight")[::8].float()  # every eighth row of a real model's embeddings

# %% [markdown]
# ## 1 · Sixteen marks on a ruler
#
# As in lesson 03, the numbers of a block share one scale: each is divided by the block's largest absolute value, the **absmax**, and so
# lies between −{{1}} and {{1}}. There the nearest of at most sixteen **levels** takes its place. The list of the levels is the format's
# **codebook**. Here is a block of four numbers, with the codebooks of INT4 and NF4:

# %%
block = torch.tensor([0.3, -1.2, 0.8, 0.1])
absmax = block.abs().max()
missed = {}
for name, levels in {"INT4": INT4, "NF4": NF4}.items():
    nearest = levels[((block / absmax)[:, None] - levels).abs().argmin(dim=1)]
    missed[name] = [round(miss, 3) for miss in (nearest * absmax - block).abs().tolist()]
    print(f"{name}: levels {[round(x, 3) for x in nearest.tolist()]}, missed by {missed[name]}")

# %% claims
assert all(missed["NF4"][i] < missed["INT4"][i] for i in (0, 3)) and missed["NF4"][2] > missed["INT4"][2]

# %% [markdown]
# NF4 comes closer to the two small numbers, `0.3` and `0.1`, and misses `0.8` by more. The reason is where its levels stand:

# %% alt="Three rows of ticks from −{{1}} to {{1}}, the levels of three codebooks; a ring marks an exact zero. NF4: {{len(set(tables['NF4']))}} levels, dense around zero and ever farther apart towards the ends. INT4: {{len(set(tables['INT4']))}}, evenly spaced. FP4: {{len(set(tables['FP4']))}}, with three of them at zero or right beside it."
tables = {"NF4": NF4.tolist(), "INT4": INT4.tolist(), "FP4": FP4.tolist()}
_ = plot_codebooks(new_axes(height=2.4), tables)

# %% claims
counts = {name: len(set(levels)) for name, levels in tables.items()}
assert counts == {"NF4": 16, "INT4": 15, "FP4": 15}
assert (NF4 < 0).sum() == 7 and (NF4 == 0).sum() == 1 and (NF4 > 0).sum() == 8
assert (FP4.abs() < 0.01).sum() == 4 and (FP4 == 0).sum() == 2  # as ticks three: zero, and one on each side

# %% [markdown]
# NF4's levels are dense around zero and sparse at the ends: seven negative ones, an exact zero, eight positive ones. INT4 is lesson 03's
# absmax grid: fifteen levels at equal distances, and one code left over. FP4 is a float of four bits: a sign, two bits of exponent,
# one of mantissa. It has a `+0` and a `-0`, so two of its codes mean the same number.
#
# ## 2 · Where the numbers are
#
# Dense around zero is good if most numbers are there. Look at a million numbers from the normal distribution, and at a real model's
# weights, all divided by the absmax of their block:


# %%
def scaled_blocks(x, block_size=64):
    blocks = x.reshape(-1, block_size)
    return blocks / blocks.abs().amax(dim=1, keepdim=True)


# %% machinery "Histograms of both"
edges = np.linspace(-1, 1, 52)
histogram = {
    name: np.histogram(scaled_blocks(x), edges)[0] / x.numel()
    for name, x in {"Gaussian": gaussian, "real weights": weights}.items()
}
top = {name: 100 * shares.max() for name, shares in histogram.items()}
spikes = [100 * shares[end] for shares in histogram.values() for end in (0, -1)]

# %% alt="Two histograms over −{{1}} to {{1}}, with NF4's levels as marks below. Gaussian numbers make a bell {{top['Gaussian']:.0f}} % high, real weights a narrower one of {{top['real weights']:.0f}} %. Both end in a spike at −{{1}} and one at {{1}}, each about {{max(spikes):.0f}} % high."
_ = plot_histogram(new_axes(), histogram, edges, NF4)

# %% claims
assert all(0.5 < spike < 1.5 for spike in spikes) and top["real weights"] > top["Gaussian"]

# %% [markdown]
# Both are bells: most numbers are small, and among the real weights even more. But at the ends there is something that no bell has.
# *Every* block holds a number at exactly −{{1}} or {{1}}: the one that it was divided by. Remember those spikes.
#
# ## 3 · NF4, to the last bit
#
# NF4 takes its levels from the normal distribution's **quantiles**. The quantile of `0.9` is the number that {{90}} % of the distribution
# lie below. PyTorch calls this function `ndtri`:

# %%
torch.special.ndtri(torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0]))

# %% [markdown]
# Between two neighbours there is always the same share of the distribution, a tenth. Yet the distances grow, since numbers are rare far out.
# That is the spacing we want. Only the last quantile is useless: a normal distribution has no largest number. So bitsandbytes starts a
# little below {{1}}, at an **offset** of `0.9677083`, and goes inwards in equal steps:

# %%
offset = 0.9677083
probabilities = torch.linspace(offset, 0.5, 9)[:-1]  # without the last: the quantile of 0.5 would be zero
positive = normal_quantiles(probabilities)  # the same function, in float64
print("probabilities", [round(p, 4) for p in probabilities.tolist()])
print("quantiles    ", [round(q, 4) for q in positive])
print("divided      ", [round(q / positive[0], 4) for q in positive])

# %% claims
assert torch.allclose(torch.tensor(positive[::-1]) / positive[0], NF4[8:])

# %% [markdown]
# Those are NF4's eight positive levels, the largest first. The negative ones are made in the same way, from seven probabilities.
#
# A 4-bit code says which level, not its value. So writer and reader need *the same* table, to the last bit.
#
# **Predict.** A careful programmer computes all of this in float64, and rounds to float32 at the very end. How many of the
# sixteen levels will equal bitsandbytes' in every bit?

# %%
prediction = ...  # ← your guess, before you run the next cell

# %%
careful = levels_in_float64(offset)
equal = (careful == BITSANDBYTES_NF4).sum().item()
print(f"equal: {equal} of 16; largest difference {(careful - BITSANDBYTES_NF4).abs().max():.0e}; {told(prediction)}")

# %% claims
assert equal == 6 and torch.allclose(careful, BITSANDBYTES_NF4)

# %% [markdown]
# **What happened?** Only {{equal}}. bitsandbytes' table was computed once, from probabilities in *float32*. Those are off in the eighth
# digit, and so are the levels. More careful arithmetic gives better quantiles, and another table.
#
# **Exercise 4.1 ●●○ (4 minutes).** Write all of NF4, equal to the last bit: probabilities in float32, `normal_quantiles`, then
# float32 again.


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
# <details><summary>Hint 1</summary>The negative half has one step fewer: <code>linspace(offset, 0.5, 8)</code>, without the last. Each
# quantile gets a minus sign. They come from the outside in, which is ascending for this half.</details>
# <details><summary>Hint 2</summary>Put both halves and a zero into one list, make it a float32 tensor, and divide that by its
# maximum.</details>

# %% [markdown]
# With this table, the course's own code makes the same 4-bit weights as bitsandbytes, byte by byte:

# %%
import bitsandbytes.functional as bnb

packed, state = bnb.quantize_4bit(gaussian, quant_type="nf4")
ours = quantize(gaussian, NF4, block_size=64)
print(f"all {len(ours.codes):,} bytes of codes equal: {torch.equal(packed.flatten(), ours.codes)}")
print(f"all {len(ours.absmax):,} absmax values equal: {torch.equal(state.absmax, ours.absmax)}")

# %% claims
assert torch.equal(normal_float(), bnb.get_4bit_type("nf4", device="cpu")) and torch.equal(NF4, normal_float())
assert torch.equal(packed.flatten(), ours.codes) and torch.equal(state.absmax, ours.absmax)

# %% [markdown]
# (Where the odd offset comes from, and whether there is a better one, asks [dive I](dive_i_the_offset.ipynb).)
#
# ## 4 · Are the sixteen levels used equally?
#
# Many tutorials say so: *NF4 splits the normal distribution into bins of equal mass, so each code is used equally often.* It sounds
# right: sixteen quantiles, sixteen shares of {{100 / 16:g}} %.
#
# **Predict.** A million Gaussian numbers, NF4, blocks of {{64}}. What share gets the rarest code, and what share the most frequent?

# %%
prediction = {"rarest": ..., "most frequent": ...}  # ← your guesses, in per cent

# %% [markdown]
# **Exercise 4.2 ●●○ (3 minutes).** Count. `codes` is a tensor of bytes, and each byte holds two 4-bit codes, its **nibbles**.


# %%
def usage(codes):
    """Packed uint8 codes -> 16 shares that sum to 1, that of code 0 first."""
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

# %% alt="Bars: share of the numbers at each of NF4's {{16}} levels, from −{{1}} (level {{0}}) to {{1}} (level {{15}}). They form a hill: the rarest, level {{shares.argmin()}}, has {{100 * shares.min():.1f}} %, the most frequent, level {{shares.argmax()}}, has {{100 * shares.max():.1f}} %. A dotted line marks equal shares, {{100 / 16:.2f}} %."
shares = level_usage(ours)  # what `usage` does, from the library
_ = plot_level_usage(new_axes(), shares.tolist(), prediction)
print(f"rarest {shares.min():.1%} · most frequent {shares.max():.1%} · entropy {entropy(shares):.2f} of 4 bits")
print(told(prediction))

# %% claims
assert f"{shares.min():.1%} {shares.max():.1%} {entropy(shares):.2f}" == "1.7% 9.2% 3.88"

# %% [markdown]
# **What happened?** You did not quantize a normal distribution. You quantized numbers *divided by the largest of their {{64}} neighbours*.
# That puts one number of each block at an end, and presses all others towards zero. (**Entropy** says how many bits the codes are
# worth: {{4}} if all are equally frequent, less if some are rare.) Here is the proof, the same numbers with one fixed scale and no
# blocks:

# %%
outermost = normal_quantiles(torch.tensor([offset]))[0]  # the number that NF4 calls 1
fixed = nearest_level((gaussian / outermost).clamp(-1, 1), NF4)
fixed = torch.bincount(fixed, minlength=16) / len(gaussian)
print(f"one fixed scale: rarest {fixed.min():.1%} · most frequent {fixed.max():.1%}")

# %% claims
assert fixed.min() > 0.05 and fixed.max() < 0.075

# %% [markdown]
# Now the claim is nearly true. And what will larger blocks do? Move the slider:

# %% machinery "Draw the usage at a block size"
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
small = gaussian[: 2**15]  # enough for a figure, and quick


def draw_usage(block_size):
    shares = level_usage(quantize(small, NF4, block_size))
    ax = plot_level_usage(new_axes(), shares.tolist())
    ax.set_title(f"block size {block_size}: entropy {entropy(shares):.2f} of 4 bits", loc="left")
    return ax


largest = {size: gaussian.view(-1, size).abs().amax(1).mean().item() for size in BLOCK_SIZES}

# %% alt="Bars: share of the numbers at each of NF4's {{16}} levels, with a dotted line at equal shares, {{100 / 16:.2f}} %. Where the slider starts, at blocks of {{64}}, they form a hill with low ends. The larger the blocks, the emptier the ends."
explore(draw_usage, block_size=ipywidgets.SelectionSlider(options=BLOCK_SIZES, value=64, description="block size"))

# %% claims
ends = [level_usage(quantize(small, NF4, size))[[0, 15]].sum().item() for size in BLOCK_SIZES]
assert ends == sorted(ends, reverse=True)

# %% [markdown]
# The largest of {{64}} Gaussian numbers is around {{largest[64]:.1f}}, the largest of {{4096}} around {{largest[4096]:.1f}}. The more it is, the harder it
# presses the others towards zero, and the emptier the outer levels get.
#
# So the folklore is false. Does that make NF4 bad? What counts is the error. Let the computer search for the sixteen levels
# with the least error on these numbers, freely, and once with −{{1}}, {{0}} and {{1}} fixed as in NF4:

# %%
codebooks = {"NF4": NF4, "best with −1, 0, 1": best_codebook(gaussian, keep=(-1.0, 0.0, 1.0))}
codebooks["best of all"] = best_codebook(gaussian)
least = {name: relative_rms(gaussian, quantize(gaussian, of, 64).dequantize()) for name, of in codebooks.items()}
for name, error in least.items():
    print(f"{name:<20}relative RMS error {error:.4f}, at {ours.bits_per_parameter} bits per parameter")
above_kept, above_best = (least["NF4"] / error - 1 for name, error in least.items() if name != "NF4")

# %% claims
assert 0.025 < above_kept < 0.03 and 0.05 < above_best < 0.055

# %% [markdown]
# NF4's error is {{above_best:.0%}} above the least that any sixteen levels reach here, and {{above_kept:.0%}} above the least with the three
# fixed. What people say about *why* it works is false, *and* it works. ([Dive A](dive_a_better_codebooks.ipynb) makes
# such tables, and asks whether a model notices.)
#
# ## 5 · NF4 against INT4
#
# Four formats: NF4, FP4, INT4, and lesson 03's *affine* INT4, which stores a scale and a minimum for each block, so that its sixteen levels
# reach exactly from the smallest number to the largest.

# %%
FORMATS = {
    "NF4": lambda x, size: quantize(x, NF4, size),
    "INT4": lambda x, size: quantize(x, INT4, size),
    "INT4 affine": lambda x, size: quantize_affine(x, 4, size),
    "FP4": lambda x, size: quantize(x, FP4, size),
}

# %% [markdown]
# **Predict.** Gaussian numbers, the ones that NF4 is made for, in blocks of {{64}}. Which format has the smallest error?

# %%
vote = ...  # "NF4", "FP4", "INT4" or "INT4 affine"

# %% machinery "Measure four formats on five kinds of numbers, at eight block sizes"
data = {name: sample(name, 2**18) for name in DISTRIBUTIONS} | {
    "Gaussian": gaussian,
    "real weights (embeddings)": weights,
}
reports = {
    name: {form: [error_report(x, of(x, size)) for size in BLOCK_SIZES] for form, of in FORMATS.items()}
    for name, x in data.items()
}
errors = {n: {f: [r.relative_rms for r in rs] for f, rs in by.items()} for n, by in reports.items()}
at_64 = {form: reports["Gaussian"][form][1] for form in FORMATS}
bits = {form: f": {report.bits_per_parameter:g} bits at block size 64" for form, report in at_64.items()}

# %% alt="Five line plots, one for each kind of numbers: relative RMS error over block sizes {{32}} to {{4096}}. NF4 is lowest from blocks of {{128}} on, except on uniform numbers, where both kinds of INT4 are lower. Affine INT4 is lowest at blocks of {{32}} everywhere, and at {{64}} on Gaussian numbers. FP4 is highest everywhere."
_ = plot_errors_by_block(errors, BLOCK_SIZES, bits)

# %% machinery "The errors at blocks of 64, and what they cost"
print(f"{'blocks of 64':<25}" + "".join(f"{form:>12}" for form in FORMATS))
print(f"{'bits per parameter':<25}" + "".join(f"{report.bits_per_parameter:>12g}" for report in at_64.values()))
for name, by_format in errors.items():
    print(f"{name:<25}" + "".join(f"{values[1]:>12.4f}" for values in by_format.values()))
print("\nGaussian:", told(vote))

# %% claims
best = {name: min(by_format, key=lambda form: by_format[form][1]) for name, by_format in errors.items()}
assert best["Gaussian"] == best["uniform"] == "INT4 affine"
assert best["Laplace"] == best["Student-t"] == best["real weights (embeddings)"] == "NF4"
assert all(min(by, key=lambda form: by[form][0]) == "INT4 affine" for by in errors.values())  # at blocks of 32
assert all(max(by, key=lambda form: by[form][i]) == "FP4" for by in errors.values() for i in range(len(BLOCK_SIZES)))
for name, by_format in errors.items():
    lowest = [min(by_format, key=lambda form, i=i, of=by_format: of[form][i]) for i in range(2, len(BLOCK_SIZES))]
    assert set(lowest) == ({"NF4"} if name != "uniform" else {"INT4 affine"}), (name, lowest)
assert all(by["INT4"][i] < by["NF4"][i] for by in [errors["uniform"]] for i in range(len(BLOCK_SIZES)))
scaled = scaled_blocks(gaussian)
smaller_end = torch.minimum(scaled.amax(1), -scaled.amin(1)).mean().item()

# %% [markdown]
# **What happened?** On the very distribution that NF4 is named after, affine INT4 wins at blocks of {{32}} and {{64}}. Its levels fit both ends
# of each block. NF4's fit only one: where the larger end is at {{1}}, the other is at {{smaller_end:.2f}} on average, and the room beyond
# is wasted. In larger blocks the numbers crowd around zero, where NF4 has its levels. So it wins from {{128}} on.
#
# Laplace and Student-t numbers have *longer tails*, more numbers far from zero, and the real weights have, too. There NF4 wins from {{64}}
# on. Uniform numbers are spread evenly, so equal steps suit them best.
#
# But look at the table's second line. Affine INT4 takes {{at_64["INT4 affine"].bits_per_parameter:g}} bits per parameter, since it stores *two*
# float32 numbers for each block. A fair comparison has the price on one axis:

# %% machinery "Error over bits"
shown = {"Gaussian": "Gaussian", "real weights (embeddings)": "real weights"}
points = {
    title: {
        form: ([r.bits_per_parameter for r in rs[:4]], [r.relative_rms for r in rs[:4]], BLOCK_SIZES[:4])
        for form, rs in reports[name].items()
    }
    for name, title in shown.items()
}

# %% alt="Two plots, Gaussian numbers and real weights: relative RMS error over bits per parameter, constants included, for four formats in blocks of {{256}} to {{32}}. At each price up to {{5}} bits, NF4's error is the lowest. Affine INT4 alone goes on, to {{6}} bits, where its error is the lowest of all."
_, axes = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
for ax, (title, of) in zip(axes, points.items()):
    plot_error_over_bits(ax, of).set_title(title)
    ax.spines[["top", "right"]].set_visible(False)

# %% claims
five_bits = {"NF4": reports["Gaussian"]["NF4"][0], "INT4 affine": reports["Gaussian"]["INT4 affine"][1]}
assert {r.bits_per_parameter for r in five_bits.values()} == {5.0}
for name in shown:  # at 4.25, 4.5 and 5 bits NF4's blocks are half as large
    assert all(a.relative_rms < b.relative_rms for a, b in zip(reports[name]["NF4"], reports[name]["INT4 affine"][1:4]))
    six = reports[name]["INT4 affine"][0]
    assert six.bits_per_parameter == 6
    assert six.relative_rms < min(r.relative_rms for f, rs in reports[name].items() if f != "INT4 affine" for r in rs)

# %% [markdown]
# At equal bits NF4 is ahead, on both. For {{5}} bits you get affine INT4 in blocks of {{64}} or NF4 in blocks of {{32}}, and NF4's error is
# smaller. That holds for float32 constants. Integer formats with cheaper ones catch up ([dive I](dive_i_the_offset.ipynb)), and
# lesson 05 makes NF4's cheaper. Never trust an error without its bits.
#
# ## 6 · The checkpoint with a past
#
# The model that you trained in lesson 01 came as bfloat16, {{16}} bits for each weight. Was it ever quantized before? Its file does not
# say. So quantize one of its linear layers in every way that you know, and its embeddings, and random numbers that really never were:

# %% machinery "Errors of two schemes with 4 and 8 bits, at four block sizes"
suspicious = {
    "linear": bundled_weight("model.layers.0.mlp.down_proj.weight").float(),
    "embedding": weights,
    "Gaussian": gaussian,
}
SCHEMES = {"absmax": quantize_absmax, "affine": quantize_affine}
print("relative RMS error at block size" + "".join(f"{size:>9}" for size in (16, 32, 64, 128)))
for name, x in suspicious.items():
    for bits_ in (4, 8):
        for scheme, quantizer in SCHEMES.items():
            row = [relative_rms(x, quantizer(x, bits_, size).dequantize()) for size in (16, 32, 64, 128)]
            print(f"{name:<12}{scheme:<8}{bits_} bits        " + "".join(f"{error:9.4f}" for error in row))

# %% [markdown]
# **Exercise 4.3 ●●○ (4 minutes).** Two of the three were quantized once, and stored as bfloat16 afterwards. In which scheme, with how
# many bits, in which block size? For each, one error in the table is too good to be true.

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
# <details><summary>Hint 2</summary>Four bits are never good to one part in a thousand by chance. With eight, look for a line that is lowest
# at one block size, and by far.</details>

# %%
linear = suspicious["linear"]
affine = relative_rms(linear, quantize_affine(linear, 4, 32).dequantize())
nf4 = relative_rms(linear, quantize(linear, NF4, 32).dequantize())
different = max(len(block.unique()) for block in linear.view(-1, 32)[:1000])
print(f"the linear layer in blocks of 32: affine INT4 {affine:.4f}, NF4 {nf4:.4f}, {nf4 / affine:.0f} times as much")
print(f"different values in a block of 32 numbers: {different} at most")

# %% claims
assert affine < 0.002 and 60 < nf4 / affine < 70 and different <= 16
in_4_bits = relative_rms(weights, quantize_absmax(weights, 4, 32).dequantize())
assert 7 / 127 * in_4_bits < 0.1 * errors["real weights (embeddings)"]["NF4"][1]  # 8 bits have 127 steps where 4 have 7

# %% [markdown]
# Your model came through a 4-bit file, and bfloat16 hides it. Each block has sixteen different values at most, so doing the same once
# more loses almost nothing. Whoever compares formats on this layer will crown affine INT4 in blocks of {{32}}, by a factor of {{nf4 / affine:.0f}}, and be
# wrong. That is why this lesson takes the embeddings: they were in {{8}} bits, whose errors are small beside those of {{4}}.
#
# And *your* favourite model? Add one of its layers to `suspicious`, in the folded cell above:
# `safetensors.safe_open(FILE, "pt").get_tensor(NAME).float()`.
#
# ## Recap
#
# - NF4's sixteen levels are quantiles of the normal distribution, dense around zero, in one fixed table: check it by equality.
# - A block divided by its absmax is not normal any more. So the levels are used unequally, and the error is near the least all the same.
# - At equal block size, affine INT4 in small blocks has less error than NF4; at equal bits, with float32 constants, NF4 has less. No error
#   without its bits, and none on weights whose past you do not know.
#
# This serves *say how NF4 differs from plain INT4* and *explain how quantization works*.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [05 · What do the scales cost?](05_double_quantization.ipynb)
