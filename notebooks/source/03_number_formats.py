# %% [markdown]
# # 03 · What is lost with fewer bits?
#
# QLoRA holds each weight of a language model in 4 bits. Four bits can tell 16 numbers apart, and no more. So every weight
# is replaced by one of 16, and the model still talks. How can that work, and what does it cost?
#
# In this notebook you take numbers apart, build INT8 and INT4 quantization in a few lines, and break it with one single
# value. Then you repair it, and pay for the repair in bits.
#
# | you need | |
# |---|---|
# | time | 25 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not used |

# %% machinery "Imports, and random numbers that are the same each time"
import math

import torch

from qlora_lab.classroom.checks import check_fixed_rows, check_smallest_block, check_zero_point, progress
from qlora_lab.classroom.plots import new_axes
from qlora_lab.quantization import bits_per_parameter, quantize_absmax, quantize_affine, relative_rms, snr_db


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## 1 · A float is a ruler that stretches
#
# A float stores a sign, an **exponent** (between which two powers of two the number lies) and a **mantissa** (where
# between them). Here are the bits of 1.005 in the three formats that training uses:

# %% alt="The bits of 1.005 in three formats, one box for each bit. FP32: sign, 8 exponent bits, 23 mantissa bits; it holds 1.004999995. BF16: the same exponent, only 7 mantissa bits; it holds 1.0078125. FP16: 5 exponent bits, 10 mantissa bits; it holds 1.004882812."
from qlora_lab.classroom.lessons.n03.figures import plot_float_bits

FORMATS = {"FP32": (torch.float32, 8), "BF16": (torch.bfloat16, 8), "FP16": (torch.float16, 5)}  # exponent bits


def float_bits(value, dtype, exponent_bits):
    number = torch.tensor(value, dtype=dtype)
    width = 8 * number.element_size()
    as_integer = number.view(torch.int32 if width == 32 else torch.int16).item() % 2**width
    bits = f"{as_integer:0{width}b}"  # the same bits, read as an integer
    return bits[0], bits[1 : 1 + exponent_bits], bits[1 + exponent_bits :], f"{number.item():.10g}"


_ = plot_float_bits(new_axes(height=2.2), {name: float_bits(1.005, *kind) for name, kind in FORMATS.items()})

# %% [markdown]
# BF16 is the front half of FP32: the same exponent, 7 bits of mantissa instead of 23. FP16 spends its 16 bits otherwise: 5
# on the exponent, 10 on the mantissa.
#
# **Predict.** The learning rate is small and a weight is 1. You add 0.003 to it, in BF16. What comes out? And what becomes
# of 70,000 in FP16?

# %%
prediction = {"1 + 0.003 in BF16": 1.003, "70,000 in FP16": 70_000}  # ← your guesses

# %%
one, small = torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(0.003, dtype=torch.bfloat16)
result = {"1 + 0.003 in BF16": (one + small).item(), "70,000 in FP16": torch.tensor(70_000.0).half().item()}
for case, value in result.items():
    print(f"{case}: {value:g}   (your guess: {prediction[case]})")
for value in (1.005, 70_000.0, 1e-8):
    print(f"{value:>9g} → " + ", ".join(f"{n} {torch.tensor(value).to(d).item():.9g}" for n, (d, _) in FORMATS.items()))

# %% claims
assert result == {"1 + 0.003 in BF16": 1.0, "70,000 in FP16": math.inf}
assert torch.finfo(torch.float16).max == 65_504 and torch.tensor(1e-8).half() == 0
assert torch.finfo(torch.bfloat16).eps == 1 / 128 and torch.finfo(torch.float16).eps == 1 / 1024
assert round(1 / 128, 4) == 0.0078 and 0.003 < 1 / 128 / 2

# %% [markdown]
# **What happened?** Between 1 and 2, BF16 has 128 marks, 1/128 = {{1 / 128:.4f}} apart. What is less than half a step is rounded
# away: the weight *never* moves, however often you add 0.003. FP16 has marks eight times as fine, but its ruler ends at 65,504, and at
# the other end 1e-8 becomes 0. So the **mantissa buys precision, the exponent buys range**. That is why PEFT keeps
# the small matrices that LoRA trains (*adapters*) in FP32 by default, and why BF16 is preferred for the arithmetic in between: there, an overflow is worse than a coarse step.

# %% [markdown]
# ## 2 · Integers: equal steps
#
# Four bits could still hold a tiny exponent (notebook 04 meets such a format, FP4). The usual way is to share it: many numbers
# get **integer codes**, and *one* scale says how long a step is. The affine scheme lays the codes 0 to 15 evenly from the smallest value to the
# largest:


# %%
def affine(x, bits):
    minimum, maximum = x.min(), x.max()
    scale = (maximum - minimum) / (2**bits - 1)  # 16 levels have 15 steps between them
    codes = ((x - minimum) / scale).round()
    return codes, minimum + scale * codes  # the codes, and the values that they stand for


# %% [markdown]
# The lesson that this course grew out of has this example: a tensor with minimum −1.2341 and maximum 0.8923, in INT4. It
# says that the values 0.5234, −1.2341 and 0.8923 get the codes 10, 0 and 13, and come back "with a tiny error".
#
# **Predict.** Do you agree? Which codes, and how far off is 0.5234 when it comes back?

# %%
prediction = {"codes": [10, 0, 13], "error of 0.5234": 0.0001}  # ← your guesses; now the lesson's

# %% alt="A ruler with 16 equally spaced codes, 0 to 15, from −1.2341 to 0.8923. An arrow leads from each value to its code: −1.2341 to 0, 0.5234 to 12, and 0.8923, the largest, to 15. Diamonds mark the codes that you guessed."
from qlora_lab.classroom.lessons.n03.figures import plot_codes

values = torch.tensor([0.5234, -1.2341, 0.8923])
codes, restored = affine(values, bits=4)
package = quantize_affine(values, bits=4)  # the package's version, used from here on

levels = [(values.min() + package.scale * code).item() for code in range(16)]
_ = plot_codes(new_axes(height=2.2), levels, values.tolist(), codes.int().tolist(), prediction["codes"])
error = (restored - values)[0].abs().item()
print(f"codes {codes.int().tolist()}, restored {[round(v, 4) for v in restored.tolist()]}")
print(f"error of 0.5234: {error:.3f}, your guess: {prediction['error of 0.5234']}")

# %% claims
assert torch.equal(codes, package.codes.float()) and torch.equal(restored, package.dequantize())
assert codes.tolist() == [12, 0, 15]

# %% [markdown]
# **What happened?** The largest value defines the end of the ruler, so it *must* get the last code, 15: were it 13, two of
# the sixteen codes would never be used. The step is 0.1418, and 0.5234 lies 12.40 steps above the minimum: code 12. It
# comes back as {{restored[0]:.4f}}, an error of {{error:.3f}}. That is a tenth of the value, and far from tiny: up to half a step is normal. The
# two ends come back exactly. Could a longer step save the lesson's codes? With 13 steps, 0.5234 would get 11.

# %% claims
step = package.scale.item()
assert round(step, 4) == 0.1418 and round((0.5234 + 1.2341) / step, 2) == 12.40
assert torch.allclose(restored[1:], values[1:], atol=1e-7) and 0.1 < error / 0.5234 < 0.11
assert round((0.5234 + 1.2341) / ((0.8923 + 1.2341) / 13)) == 11

# %% [markdown]
# **Exercise 3.1 ●●○ (6 minutes).** Programs that multiply integers (*kernels*) use the codes themselves; a float minimum is in the way. They hold
# an integer **zero point** instead, the code that stands for 0: `restored = (codes - zero_point) * scale`. The scale stays as it is; the
# zero point is −minimum / scale, rounded; a code is value / scale, rounded, plus the zero point. Keep codes within 0 to
# 2**bits − 1. (The blocks that the check uses have negative and positive values.)


# %%
def zero_point_quantize(x, bits):
    """x: a float32 tensor -> codes (tensor, 0 to 2**bits - 1), scale and zero point (one number each)."""
    ### BEGIN SOLUTION (about 5 lines)
    largest = 2**bits - 1
    scale = (x.max() - x.min()) / largest
    zero_point = (-x.min() / scale).round()
    codes = ((x / scale).round() + zero_point).clamp(0, largest)
    return codes, scale, zero_point
    ### END SOLUTION


# %%
check_zero_point(zero_point_quantize)

# %% [markdown]
# <details><summary>Hint 1</summary>Four bits have 16 levels and 15 steps.</details>
# <details><summary>Hint 2</summary>Round <code>x / scale</code> and the zero point separately, add them, then
# <code>.clamp(0, 2**bits - 1)</code>: where both end in .5, two roundings up make 16.</details>

# %% [markdown]
# ## 3 · Absmax: zero in the middle
#
# Weights lie about evenly around 0. The **absmax** scheme uses that: no minimum, just a scale, and codes from −7 to 7. Zero
# stays exactly zero. Sixteen codes, one of them unused (GGUF's Q4_0 uses it: −8 … 7).


# %%
def absmax(x, bits):
    largest = 2 ** (bits - 1) - 1
    scale = x.abs().max() / largest
    codes = (x / scale).round()
    return codes, scale * codes


codes, restored = absmax(values, bits=4)
package = quantize_absmax(values, bits=4)
print(f"codes {codes.int().tolist()}, restored {[round(v, 4) for v in restored.tolist()]}")

# %% claims
assert torch.equal(codes, package.codes.float()) and torch.equal(restored, package.dequantize())

# %% [markdown]
# Which is better? Compare them on 65,536 Gaussian values, like weights, and on the same values after a ReLU, like activations
# (negative ones set to 0). Every 64 values share their constants (section 5 says why). Error means **relative RMS**: the
# root mean square of the error over that of the tensor; the **SNR** is the same in decibels, −20 log₁₀ of it. An error has a price, so the bits stand beside it: a code takes 4
# bits, and each block adds a scale of 32 bits, in the affine scheme also a minimum of 32 bits.

# %%
gaussian = torch.randn(65_536, generator=seeded(0))
data = {"Gaussian": gaussian, "after a ReLU": gaussian.relu()}
error = {}
print(f"{'':<14}{'scheme':<10}{'bits/param':>10}{'relative RMS':>14}{'SNR':>10}")
for name, x in data.items():
    for scheme in (quantize_absmax, quantize_affine):
        q = scheme(x, bits=4, block_size=64)
        restored = q.dequantize()
        error[name, scheme] = relative_rms(x, restored)
        short = scheme.__name__.removeprefix("quantize_")
        print(f"{name:<14}{short:<10}{q.bits_per_parameter:>10}", end="")
        print(f"{error[name, scheme]:>14.4f}{snr_db(x, restored):>7.1f} dB")

# %% [markdown]
# On lopsided values, affine has less than half the error: absmax wastes its seven negative codes. On Gaussian values it
# gains a sixth and costs half a bit more. Whether that is a good deal depends on what else half a bit would buy. So: what
# does a bit buy?

# %% claims
gain = {name: error[name, quantize_absmax] / error[name, quantize_affine] for name in data}
assert gain["after a ReLU"] > 2 and round(1 - 1 / gain["Gaussian"], 2) == 0.17

# %% [markdown]
# ## 4 · What a bit buys
#
# **Predict.** You go from 8 bits to 4: half the bits. How many times as large does the error become?

# %%
prediction = {"times": 2.0}  # ← your guess

# %% alt="Two nearly equal lines: signal-to-noise ratio in dB over 2 to 8 bits per parameter, absmax and affine with one scale for the tensor. Both rise almost straight, about 6 dB a bit, from nearly 0 to 40. A diamond at 4 bits is your guess; the error there is {{error[4] / error[8]:.1f}} times that of 8 bits."
from qlora_lab.classroom.lessons.n03.figures import plot_snr

error = {bits: relative_rms(gaussian, quantize_absmax(gaussian, bits).dequantize()) for bits in range(2, 9)}
decibels = {
    "absmax, whole tensor": {bits: -20 * math.log10(e) for bits, e in error.items()},
    "affine, whole tensor": {b: snr_db(gaussian, quantize_affine(gaussian, b).dequantize()) for b in range(2, 9)},
}
guess = -20 * math.log10(error[8] * prediction["times"])
_ = plot_snr(new_axes(), decibels, (4, guess, f"your guess: {prediction['times']:g} × the error of 8 bits"))
print(f"8 bits: error {error[8]:.4f}; 4 bits: {error[4]:.4f}, {error[4] / error[8]:.1f} times as large")

# %% claims
assert round(error[4] / error[8], 1) == 18.1

# %% [markdown]
# **What happened?** Bits do not count levels, they *double* them. Absmax has 127 steps on each side of 0 with 8 bits, and 7
# with 4: steps {{127 / 7:.1f}} times as long, and an error to match. In decibels, 20 log₁₀(signal / noise), a doubling is
# 6.0 dB: **every bit buys about 6 dB**, and every bit that you drop about doubles the error. At 2 bits absmax has three
# levels left, −1, 0 and 1 times the largest value, and almost everything becomes 0.
#
# (One scale for 65,536 values costs next to nothing: here, the bits of a code are the bits per parameter.)

# %%
per_bit = {scheme: (line[8] - line[4]) / 4 for scheme, line in decibels.items()}
print("dB a bit, from 4 to 8:", {scheme: round(gain, 1) for scheme, gain in per_bit.items()})

# %% claims
assert round(127 / 7, 1) == 18.1 and round(20 * math.log10(2), 1) == 6.0
assert quantize_absmax(gaussian, bits=4).bits_per_parameter < 4.001
two_bits = quantize_absmax(gaussian, bits=2)
assert two_bits.levels == 3 and (two_bits.codes == 0).float().mean() > 0.97

# %% [markdown]
# ## 5 · One bad value
#
# Those were well-behaved numbers. Some tensors of language models are not: a few values are many times larger than the rest,
# as section 7 shows.
#
# **Predict.** Multiply the first of the 65,536 values by 100. Quantize with absmax, 4 bits, one scale for the whole tensor. How
# many times as large does the error of all the *others* become?

# %%
prediction = {"times": 1.1}  # ← your guess; it is just one in 65,536

# %%
spoiled = gaussian.clone()
spoiled[0] *= 100


def error_of_others(x, scheme, bits, block_size=None):
    return relative_rms(x[1:], scheme(x, bits, block_size).dequantize()[1:])


before, after = (error_of_others(x, quantize_absmax, 4) for x in (gaussian, spoiled))
others = quantize_absmax(spoiled, 4).codes[1:]
print(f"the value is now {spoiled[0]:.1f}; the largest of the others {spoiled[1:].abs().max():.1f}")
print(
    f"error of the others: {before:.3f} → {after:.3f}, {after / before:.1f} times (your guess: {prediction['times']})"
)
print(f"codes that the others use: {others.unique().tolist()}")

# %% claims
assert round(before, 3) == 0.188 and after == 1 and round(after / before, 1) == 5.3

# %% [markdown]
# **What happened?** The one value sets the scale: a step is now {{quantize_absmax(spoiled, 4).scale.item():.1f}}, and 65,535 values, the largest of them {{gaussian.abs().max():.1f}}, round to
# zero. The tensor is *gone*: 1 is the error of answering 0 everywhere. It can be worse. Affine has no level at 0 and gives
# everybody the level that happens to be nearest. And 8 bits?

# %%
for scheme, bits in [(quantize_affine, 4), (quantize_absmax, 8), (quantize_affine, 8)]:
    before, after = (error_of_others(x, scheme, bits) for x in (gaussian, spoiled))
    print(f"{scheme.__name__}, {bits} bits: {before:.3f} → {after:.3f}, {after / before:.0f} times")

# %% claims
assert round(quantize_absmax(spoiled, 4).scale.item(), 1) == 16.1 and round(gaussian.abs().max().item(), 1) == 4.6
assert error_of_others(spoiled, quantize_affine, 4) > 3

# %% [markdown]
# ### The cure: smaller families
#
# Give every block of 64 values a scale of its own, and an outlier ruins 63 neighbours instead of 65,535. Smaller blocks
# help the well-behaved tensor too, since most blocks have a smaller maximum than the whole. But scales take bits. So error goes
# over **bits per parameter**: 4 for the code, and the block's share of its constants. The stars are another way to
# spend bits: longer codes, no blocks.

# %% alt="Two plots: relative RMS error (log scale) over bits per parameter, for ever smaller blocks. Well-behaved values: absmax falls from 0.19 to 0.10, and 5 bits without blocks do better, 0.09. With one outlier: absmax falls from 1 to 0.11 at blocks of 64, but 5 or 6 bits without blocks stay near 1."
import matplotlib.pyplot as plt

from qlora_lab.classroom.lessons.n03.figures import plot_error_over_bits

SIZES = (32, 64, 128, 256, 1024, 4096, None)
_, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained", sharey=True)
for ax, (title, x) in zip(axes, {"well-behaved": gaussian, "one value × 100: error of the others": spoiled}.items()):
    curves = {}
    for scheme in (quantize_absmax, quantize_affine):
        line = [(scheme(x, 4, size).bits_per_parameter, error_of_others(x, scheme, 4, size)) for size in SIZES]
        labels = [str(size or "whole") if size in (32, 64, 128, None) else "" for size in SIZES]
        curves[scheme.__name__.removeprefix("quantize_") + ", 4 bits, blocks"] = [
            (*point, label) for point, label in zip(line, labels)
        ]
    stars = [(bits, error_of_others(x, quantize_absmax, bits), f"{bits} bits, whole") for bits in (5, 6)]
    plot_error_over_bits(ax, curves, stars, below=x is spoiled).set(title=title, xlim=(3.85, 6.9), ylim=(0.022, 6))
    ax.spines[["top", "right"]].set_visible(False)
    ax.label_outer()

# %% [markdown]
# **What happened?** On the right, blocks rescue the tensor: the error is 0.112 with blocks of 64, at 4.5 bits, against 1 for the
# whole tensor. A fifth or sixth bit rescues next to nothing, and absmax beats affine, which wins on the left: beside a value as extreme as this, absmax turns the others into 0, affine
# into whatever level is nearest. On the left, half a
# bit for blocks of 64 is well spent too (0.188 → 0.107), but beyond that, with float32 scales, a **fifth bit beats smaller blocks**: 0.088 with no
# blocks at all, 0.097 with blocks of 32, both at 5 bits. Blocks are an insurance against outliers: a good one, but not free.

# %% claims
assert round(error_of_others(spoiled, quantize_absmax, 4, 64), 3) == 0.112
assert round(error_of_others(gaussian, quantize_absmax, 4, 64), 3) == 0.107
assert round(error_of_others(gaussian, quantize_absmax, 4, 32), 3) == 0.097
assert round(error_of_others(gaussian, quantize_absmax, 5), 3) == 0.088
assert all(error_of_others(spoiled, quantize_absmax, bits) > 0.89 for bits in (5, 6))
for size in (32, 64, 128):  # at equal bits: two constants for twice as many values
    assert error_of_others(spoiled, quantize_affine, 4, 2 * size) > error_of_others(spoiled, quantize_absmax, 4, size)
    assert error_of_others(gaussian, quantize_affine, 4, 2 * size) < error_of_others(gaussian, quantize_absmax, 4, size)

# %% [markdown]
# And the slogan "INT8 is a quarter of FP32, INT4 an eighth"? It is right for the codes alone:

# %%
int8, int4 = (bits_per_parameter(64, double=False, bits=bits) for bits in (8, 4))
print(f"with a float32 scale for 64 values: INT8 {int8} bits, INT4 {int4} bits")
print(f"FP32 is {32 / int8:.2f} and {32 / int4:.2f} times as large, not 4 and 8")

# %% claims
assert (int8, int4) == (8.5, 4.5) and quantize_absmax(gaussian, 4, 64).bits_per_parameter == int4

# %% [markdown]
# **Exercise 3.2 ●●○ (5 minutes).** Find the bugs. This function promises INT8 with a scale for each *row*. It runs, and
# shapes and dtypes are right. But the error is 0.20, where section 4 had 0.010 with 8 bits. There are **two** bugs in it.


# %%
def quantize_rows_broken(x):
    scale = x.abs().max() / 128
    codes = (x / scale).round().int().to(torch.int8)
    return codes, scale.expand(len(x), 1)


rows = -torch.randn(8, 256, generator=seeded(1)) * torch.tensor([2.0, 0.1]).repeat(4)[:, None]
codes, scale = quantize_rows_broken(rows)
print(f"{codes.dtype}, {tuple(codes.shape)}, {tuple(scale.shape)}; error {relative_rms(rows, codes * scale):.2f}")

# %% claims
assert round(relative_rms(rows, codes * scale), 2) == 0.20 and round(error[8], 3) == 0.010


# %%
def quantize_rows(x):
    """x: float32, (rows, columns) -> codes, int8 of the same shape, and scale, (rows, 1): x is near codes * scale."""
    ### BEGIN SOLUTION (about 3 lines)
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    codes = (x / scale).round().to(torch.int8)
    return codes, scale
    ### END SOLUTION


# %%
check_fixed_rows(quantize_rows)

# %% [markdown]
# <details><summary>Hint 1</summary>Look at the largest value of <code>rows</code>, and at what becomes of it:
# <code>i = rows.abs().argmax(); rows.flatten()[i], (codes * scale).flatten()[i]</code></details>
# <details><summary>Hint 2</summary>int8 goes from −128 to 127. What is 128 in it?</details>
# <details><summary>Hint 3</summary>How many different scales does the function return?</details>

# %% [markdown]
# **Exercise 3.3 ●●○ (5 minutes).** You have a budget in bits per parameter. Small blocks are better: what is the smallest block
# that you can afford? Sizes are powers of two from 32 to 4096; `constant_bits` is what a block stores besides its codes.


# %%
def smallest_block(budget, bits, constant_bits):
    """The smallest of 32, 64, ... 4096 with which bits per parameter stay within the budget."""
    ### BEGIN SOLUTION (about 3 lines)
    for block_size in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        if bits + constant_bits / block_size <= budget:
            return block_size
    ### END SOLUTION


# %%
check_smallest_block(smallest_block)

# %% [markdown]
# <details><summary>Hint</summary>How many bits does a parameter take with blocks of 64? Try the sizes, smallest first.</details>

# %% [markdown]
# With 4.5 bits, then, which is the best use of the half bit? Four ways to spend it, on Gaussian values:

# %%
from dataclasses import replace

ways = {
    "absmax, block 64, float32 scale": (quantize_absmax, 64, 32),
    "absmax, block 32, float16 scale": (quantize_absmax, 32, 16),
    "affine, block 128, float32 scale and minimum": (quantize_affine, 128, 64),
    "affine, block 64, float16 scale and minimum": (quantize_affine, 64, 32),
}
for way, (scheme, block_size, constant_bits) in ways.items():
    bits = bits_per_parameter(block_size, double=False, scale_bits=constant_bits)
    q = scheme(gaussian, 4, block_size)
    if "float16" in way:  # the constants as float16 holds them
        minimum = None if q.minimum is None else q.minimum.half().float()
        q = replace(q, scale=q.scale.half().float(), minimum=minimum)
    error[way] = relative_rms(gaussian, q.dequantize())
    print(f"{way:<45}{bits} bits   error {error[way]:.4f}")

# %% claims
assert sorted(ways, key=error.get)[0].startswith("affine, block 64, float16")
assert error["affine, block 64, float16 scale and minimum"] < error["absmax, block 32, float16 scale"]

# %% [markdown]
# Affine with float16 constants wins, ahead of twice as many scales for absmax. The codes are the same 4 bits in every line: what you
# can still save is in the constants, and notebook 05 takes that further.

# %% [markdown]
# ## 6 · Try it
#
# Left: where each value lies in its block's range, and the levels as ticks below. Right: how large the errors are. (Needs a
# running kernel.) The figure shows a tensor in which one value in a thousand is multiplied by 20: the rest huddles around the
# middle level. Choose blocks of 64 and see it spread out. Which distribution needs no blocks? Where does affine lose?

# %%
from qlora_lab.classroom.samples import DISTRIBUTIONS, sample

N = 65_536
SAMPLES = {name: sample(name, N) for name in DISTRIBUTIONS}
order = torch.randperm(N, generator=seeded(5))  # the first of these become outliers

# %%
from qlora_lab.classroom.lessons.n03.figures import plot_error_sizes, plot_scaled_values

SCALED_EDGES, LOG_ERROR_EDGES = torch.linspace(-1, 1, 102), torch.linspace(-4, 1.4, 55)


def shares(values, edges):
    """Share of the values in each of the equally wide bins."""
    return torch.histc(values, len(edges) - 1, edges[0].item(), edges[-1].item()) / values.numel()


def scaled(x, q):
    """Each value's place in its block's range: -1 at the lowest level, 1 at the highest."""
    half = q.scale * (q.levels - 1) / 2
    middle = 0 if q.minimum is None else q.minimum + half
    return ((x.view(len(half), -1).T - middle) / half).T.flatten().clamp(-1, 1)


# %%
def draw(bits, block_size, scheme, distribution, outliers):
    x = SAMPLES[distribution].clone()
    x[order[: round(outliers * N)]] *= 20
    q = {"absmax": quantize_absmax, "affine": quantize_affine}[scheme](x, bits, block_size)
    error = (q.dequantize() - x) / x.square().mean().sqrt()
    rms = error.square().mean().sqrt().item()
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    title = f"{q.levels} levels · {q.bits_per_parameter:.3f} bits per parameter"
    levels = torch.linspace(-1, 1, q.levels)
    plot_scaled_values(left, shares(scaled(x, q), SCALED_EDGES), SCALED_EDGES, levels, title)
    title = f"relative RMS {rms:.3g} · SNR {-20 * math.log10(rms):.1f} dB"
    log_error = error.abs().clamp(1e-4, 25).log10()
    return plot_error_sizes(right, shares(log_error, LOG_ERROR_EDGES), LOG_ERROR_EDGES, rms, title)


# %% alt="Two histograms (log scale) for the settings that you choose. At the start, 4 bits, absmax, one scale, 0.10 % outliers: left, nearly all values crowd around the middle one of 15 evenly spaced levels; right, the sizes of the errors peak near the RMS of the tensor: relative RMS 0.842, SNR 1.5 dB."
from ipywidgets import Dropdown, IntSlider, SelectionSlider

from qlora_lab.classroom.widgets import explore

block_sizes = [*[(str(2**n), 2**n) for n in range(5, 13)], ("whole tensor", N)]
outlier_shares = [(f"{share:.2%}", share) for share in (0, 0.0001, 0.001, 0.01)]
explore(
    draw,
    bits=IntSlider(4, 2, 8, description="bits"),
    block_size=SelectionSlider(options=block_sizes, value=N, description="block size"),
    scheme=Dropdown(options=["absmax", "affine"], description="scheme"),
    distribution=Dropdown(options=list(SAMPLES), description="distribution"),
    outliers=SelectionSlider(options=outlier_shares, value=0.001, description="outliers"),
)

# %% [markdown]
# ## 7 · Real weights
#
# How well-behaved is a real model? Here is every eighth row of SmolLM2's embedding matrix, 3.5 million weights. (Not its linear
# layers: notebook 04 shows why this checkpoint's would flatter INT4. It is one matrix of one small model, and one that QLoRA
# leaves in 16 bits; the layers of another checkpoint may be tamer or wilder.)

# %% alt="Histogram (log scale) of embedding weights in standard deviations, with a Gaussian as a dashed line. The weights' peak is narrower and their tails are far longer: 0.10 % lie beyond 6 standard deviations, where a Gaussian has two in a billion, and the farthest is at −12.9."
from qlora_lab.classroom.lessons.n03.figures import plot_weight_histogram
from qlora_lab.classroom.samples import bundled_weight

weights = bundled_weight("model.embed_tokens.weight")[::8].float()
z = weights.flatten() / weights.std()
edges = torch.linspace(-16, 16, 129)
bell = torch.special.ndtr(edges[1:].double()) - torch.special.ndtr(edges[:-1].double())
farthest = z[z.abs().argmax()].item()
_ = plot_weight_histogram(new_axes(), shares(z, edges), edges, bell, farthest)
gauss = math.erfc(6 / math.sqrt(2))
print(f"beyond 6 standard deviations: {(z.abs() > 6).float().mean():.2%} of {z.numel():,}; a Gaussian has {gauss:.0e}")

# %% claims
assert round(farthest, 1) == -12.9 and z.numel() == 3_538_944

# %% [markdown]
# **Predict.** On Gaussian values, absmax INT4 had a relative error of 0.188 with one scale for the tensor, and 0.107 with
# blocks of 64. And here?

# %%
prediction = {"whole tensor": 0.188, "block 64": 0.107}  # ← your guesses

# %%
error = {}
choices = [(quantize_absmax, 4, None), (quantize_absmax, 5, None), (quantize_absmax, 4, "row")]
choices += [(quantize_absmax, 4, 64), (quantize_affine, 4, 128), (quantize_affine, 4, 64)]
print(f"{'':<24}{'bits/param':>10}{'relative RMS':>14}")
for scheme, bits, size in choices:
    q = scheme(weights, bits, size)
    name = f"{scheme.__name__.removeprefix('quantize_')} {bits} bits, {size or 'whole'}"
    error[name] = relative_rms(weights, q.dequantize())
    print(f"{name:<24}{q.bits_per_parameter:>10.2f}{error[name]:>14.3f}")
print(f"your guesses: {prediction}")

# %% claims
assert round(error["absmax 4 bits, whole"], 2) == 0.52 and round(error["absmax 4 bits, 64"], 3) == 0.155
ends = {
    name: torch.stack([x.reshape(-1, 64).amax(1), -x.reshape(-1, 64).amin(1)])
    for name, x in {"e": weights, "g": gaussian}.items()
}
assert [round((e.amin(0) / e.amax(0)).mean().item(), 2) for e in ends.values()] == [0.67, 0.82]
assert round(error["affine 4 bits, 128"], 3) == 0.138 and round(error["absmax 5 bits, whole"], 3) == 0.247

# %% [markdown]
# **What happened?** The tails. The farthest weight is {{-farthest:.1f}} standard deviations out (of the whole tensor: rows differ in size), so one scale for all loses half the
# signal: {{error['absmax 4 bits, whole']:.2f}}. Here blocks beat the fifth bit: {{error['absmax 4 bits, 64']:.3f}} at 4.5 bits against {{error['absmax 5 bits, whole']:.3f}} at 5. And affine beats absmax by more than
# on Gaussian values, 0.138 at the *same* 4.5 bits: a large weight seldom has a twin on the other side, where absmax keeps
# levels for one: in a block of 64 the smaller end is 0.67 times the larger one on average, on Gaussian values 0.82.
#
# All these schemes put their levels at *equal* distances, although most weights lie near 0. Sixteen numbers could be
# placed better: that is NF4.
#
# ## Recap
#
# - **Explain how quantization works**: codes are small integers; a scale (and a minimum or zero point) per block turns them
#   back into numbers; the error is up to half a step.
# - Mantissa bits buy precision, exponent bits range: BF16 has FP32's range, FP16 more precision.
# - A bit doubles the levels: 6 dB, half the error. 8 to 4 bits is 18 times the error, not twice.
# - One outlier sets the scale for everybody who shares it. Blocks contain the damage, and cost bits: INT4 with a float32 scale
#   for 64 values is 4.5 bits.
# - No error without its price: put bits per parameter beside it.
#
# The exercises serve *explain how quantization works (INT8, INT4, NF4)*.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [04 · Which 16 numbers are best?](04_nf4.ipynb)
