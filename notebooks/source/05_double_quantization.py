# %% [markdown]
# # 05 · What do the scales cost?
#
# 65 billion weights at half a byte each are 32 GB. Load LLaMA-65B in NF4 and the same weights take 36 GB. Four
# gigabytes are no weights at all: they are *scales*, one for every 64 weights. QLoRA takes three of the four back by
# quantizing the scales too: **double quantization**. You build it here in a few lines, hold it against bitsandbytes',
# and find out what it costs. (Notebook 03 explains scales and blocks, 04 the sixteen levels of NF4.)
#
# | you need | |
# |---|---|
# | time | 20 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 1 GB |
# | GPU | not needed |

# %% machinery "Imports"
import matplotlib.pyplot as plt
import torch

from qlora_lab.classroom.checks import (
    check_bits_per_parameter,
    check_diagnosis,
    check_triple_quantization,
    check_zero_point_cost,
    progress,
)
from qlora_lab.classroom.lessons.n05.checks import DISEASES, ill_restorations
from qlora_lab.classroom.lessons.n05.figures import (
    plot_block_costs,
    plot_code_levels,
    plot_restored,
    plot_scale_histograms,
    plot_stacked,
    plot_step_sizes,
)
from qlora_lab.classroom.plots import new_axes
from qlora_lab.classroom.samples import bundled_weight
from qlora_lab.memory import SHAPES
from qlora_lab.quantization import (
    DYNAMIC8,
    INT8,
    NF4,
    bits_per_parameter,
    dequantize,
    double_quantize,
    nearest_level,
    quantize,
    relative_rms,
)

# %%
linears_65b = SHAPES["llama-65b"].linear_parameters()  # what QLoRA quantizes: all but embeddings, head and norms

# %% claims
assert f"{linears_65b * 4 / 8 / 1e9:.1f} {linears_65b * 4.5 / 8 / 1e9:.1f}" == "32.4 36.4"  # GB, 10^9 bytes

# %% [markdown]
# ## 1 · Bytes that are not weights
#
# A block of NF4 is 64 codes of 4 bits, and one scale, the largest absolute value in the block (*absmax*).
#
# **Predict.** What share of a 4-bit model's bytes holds no weights? One number in 65 is a scale: that would be 1.5 %.

# %%
prediction = {"scales": 1.5}  # ← your guess, in % of all bytes

# %% alt="Two stacked horizontal bars: share of the bytes, in per cent, that are codes and that are scales. Measured, the scales take 11.1 %, one byte in nine. The second bar is your guess."
x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))  # stands in for a layer's weights
q = quantize(x, NF4, block_size=64)
share = 100 * q.absmax.nbytes / (q.codes.nbytes + q.absmax.nbytes)
guess = prediction["scales"]
rows = {
    "measured": {"codes": 100 - share, "scales": share},
    "your guess": {"codes": 100 - guess, "scales": guess},
}
ends = {"measured": f"{share:.1f} %", "your guess": f"{guess} %"}
plot_stacked(new_axes(height=1.9), rows, "share of the bytes (%)", ends).set_xlim(0, 112)
print(f"{q.codes.nbytes:,} bytes of codes, {q.absmax.nbytes:,} bytes of {q.absmax.dtype} scales")
print(f"{q.bits_per_parameter} bits per parameter")

# %% claims
assert f"{share:.1f}" == "11.1" and q.bits_per_parameter == 4 + 32 / 64 == 4.5

# %% [markdown]
# **What happened?** A scale is one number in 65, but it is eight times as wide as a code: 32 bits for 64 × 4 bits. One
# byte in nine holds no weights.
#
# Bigger blocks need fewer scales. They also let one outlier spoil more neighbours. Here are both sides, for a real
# tensor: the embedding matrix of the bundled model. (Its other weights went through 4 bits once already, see notebook
# 04.)

# %% alt="A falling curve: relative RMS error over bits per parameter, one point for each block size. From blocks of 4096 (just over 4 bits, error 0.18) to blocks of 32 (5 bits, error 0.09), each halving lowers the error by 0.010 to 0.017 and costs twice as many bits as the one before."
matrix = bundled_weight("model.embed_tokens.weight")
embedding = matrix[::32].float()  # every 32nd token's row: enough, and quick

block_sizes = [32, 64, 128, 256, 512, 1024, 2048, 4096]
quantized = {size: quantize(embedding, NF4, size) for size in block_sizes}
plain = [(q.bits_per_parameter, relative_rms(embedding, dequantize(q)), size) for size, q in quantized.items()]
_ = plot_block_costs(new_axes(height=3.0), {"NF4, float32 scales, by block size": plain})

# %% claims
assert matrix.shape == (49_152, 576) and matrix.dtype == torch.bfloat16
gains = [bigger[1] - smaller[1] for smaller, bigger in zip(plain, plain[1:])]

# %% [markdown]
# Each halving of the blocks lowers the error by {{min(gains):.3f}} to {{max(gains):.3f}}, and costs twice as many bits as the one before. Small
# blocks are worth having, if only their scales were cheaper.
#
# ## 2 · Look at the scales

# %% alt="Two histograms of scales, in units of their mean. Gaussian numbers: a narrow bell around 1, from 0.53 to 1.83. Embedding matrix: wide and skewed, with its peak near 0.65 and a long tail, from 0.33 to 3.50. None is near zero."
scales = {"Gaussian numbers": q.absmax, "embedding matrix": quantized[64].absmax}
histograms = {}
for name, s in scales.items():
    print(f"{name}: {len(s):,} scales, smallest {s.min() / s.mean():.2f}, largest {s.max() / s.mean():.2f} of the mean")
    counts, edges = torch.histogram(s / s.mean(), bins=60, range=(0, 3), density=True)
    histograms[name] = (counts.tolist(), edges.tolist())
_ = plot_scale_histograms(new_axes(height=2.6), histograms, "scale, in units of the mean scale")

# %% claims
assert all(s.min() > 0.2 * s.mean() for s in scales.values())

# %% [markdown]
# All positive, none near zero; the Gaussian ones lie close together, the real ones less so. Store them in 8 bits the
# way weights are stored: blocks, here of 256, each divided by *its* absmax, each number replaced by the nearest level.
# INT8 has the levels −127/127 … 127/127.


# %%
def in_8_bits(numbers, levels):
    """Codes, second-level scales, and the numbers as they come back."""
    blocks = numbers.view(-1, 256)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = nearest_level(blocks * (1 / scale), levels)
    return codes, scale, (levels[codes] * scale).flatten()


# %% [markdown]
# **Predict.** Scales have no sign, so half of the 255 levels of INT8 lie idle. How many levels will the Gaussian scales
# use?

# %%
prediction = {"levels used": 128}  # ← your guess

# %%
unsigned = torch.arange(256) / 255  # for comparison: 0/255 ... 255/255
used, errors = {}, {}
for name, s in scales.items():
    mean = s.mean()
    ways = {"INT8": (s, INT8), "INT8, minus mean": (s - mean, INT8), "unsigned": (s, unsigned)}
    for way, (numbers, levels) in ways.items():
        codes, _, restored = in_8_bits(numbers, levels)
        used[name, way], errors[name, way] = len(codes.unique()), (restored - numbers).norm() / s.norm()
        print(f"{name:<17}{way:<16}{used[name, way]:>4} levels, relative RMS error {errors[name, way]:.4f}")
print(f"{'your guess':<17}{'INT8':<16}{prediction['levels used']:>4} levels")

# %% claims
gaussian, real = ([errors[name, way] for way in ways] for name in scales)
assert 80 < used["Gaussian numbers", "INT8"] < 90 and 2 * gaussian[1] < gaussian[0]
assert gaussian[1] < gaussian[2] and real[2] < real[1] < real[0]

# %% [markdown]
# **What happened?** A third of the levels are in use, not half: nothing lies near zero either. Once the mean is
# subtracted, scales spread over both signs, use nearly all levels, and Gaussian ones lose less than half as much.
#
# Is that the best way? Levels without a sign need no mean. They are behind for Gaussian scales and *ahead* for the real
# ones, where one large scale stretches a block's range on both sides of the mean. But the 8-bit code that bitsandbytes
# uses for scales has a sign, and the mean makes the scales fit it. (For optimizer states it has both: Adam's mean with a sign, its
# mean square without.)
#
# ## 3 · Double quantization
#
# You have it already. Subtract the mean, quantize in blocks of 256, keep codes, second-level scales and the mean:

# %%
offset = q.absmax.mean()
codes, second_scales, restored = in_8_bits(q.absmax - offset, INT8)

print(f"{len(q.absmax):,} scales: {codes.numel():,} codes of 8 bits, {second_scales.numel()} float32 and one mean")

# %% claims
ours = double_quantize(q, codebook=INT8).absmax  # the package's version
assert torch.equal(ours.codes, codes.flatten().to(torch.uint8))
assert torch.equal(ours.absmax, second_scales.flatten())
assert torch.equal(ours.dequantize(), restored + offset)

# %% [markdown]
# One thing is different in bitsandbytes: its 8-bit levels are not INT8's. Its **dynamic code** has 64 levels from 0.1
# to 1, 32 from 0.01 to 0.1, 16 in the next decade, and so on down to one. Each is the middle of one of the equal parts of
# its decade. With their negatives, 0 and 1, that makes 256.

# %% alt="Two rows of fine ticks from −1 to 1: the levels of two 8-bit codes. INT8's are evenly spaced. The dynamic code's lie so close between −0.1 and 0.1 that they merge into a block, and farther apart than INT8's everywhere else."
levels = [0.0, 1.0]
for decade in range(7):
    edges = torch.linspace(0.1, 1, 2 ** (6 - decade) + 1)
    middles = 10**-decade * ((edges[:-1] + edges[1:]) / 2)
    levels += [*middles.tolist(), *(-middles).tolist()]
dynamic = torch.tensor(sorted(levels))
_ = plot_code_levels(new_axes(height=1.9), {"INT8": INT8.tolist(), "dynamic": dynamic.tolist()}, "level")

# %% claims
assert len(dynamic) == 256 and torch.equal(dynamic, DYNAMIC8)

# %% [markdown]
# **Predict.** The dynamic code is fine where numbers are small, INT8 is the same everywhere. Which one restores the
# scales with less error? The designers of QLoRA chose the dynamic one.

# %%
prediction = {"less error": "dynamic"}  # ← "dynamic" or "INT8"

# %%
errors = {}
for name, s in scales.items():
    for code, levels in {"INT8": INT8, "dynamic": dynamic}.items():
        _, _, restored = in_8_bits(s - s.mean(), levels)
        errors[name, code] = relative_rms(s, restored + s.mean())
        print(f"{name:<17}{code:<8} relative RMS error of the scales {errors[name, code]:.4f}")
print(f"your guess: {prediction['less error']}")

# %% claims
assert all(errors[name, "INT8"] < errors[name, "dynamic"] for name in scales)

# %% [markdown]
# **What happened?** Look at where the centred, scaled numbers lie, and how far apart the levels are there:

# %% alt="Step to the next level (log scale) over the scale minus mean, as a share of its block's largest. INT8 is a flat line. Dynamic steps are {{coarser:.1f}} times as wide outside ±0.1, and ever finer towards 0. A grey histogram of the scales lies behind: only {{100 * near_zero:.0f}} % are within ±0.1."
centred = (q.absmax - offset).view(-1, 256)
scaled = (centred / centred.abs().amax(1, keepdim=True)).flatten()
counts, edges = torch.histogram(scaled, bins=50, range=(-1, 1), density=True)
steps = {name: (c.diff().tolist(), c.tolist()) for name, c in {"INT8": INT8[:255], "dynamic": dynamic}.items()}
label = "scale minus mean, over the largest of its block (grey: how many)"
_ = plot_step_sizes(new_axes(), steps, (counts.tolist(), edges.tolist()), label)
near_zero = (scaled.abs() < 0.1).float().mean()
coarser = dynamic.diff()[-10] / INT8.diff()[-10]
print(f"{near_zero:.0%} lie within ±0.1; outside, dynamic steps are {coarser:.1f} times as wide as INT8's")

# %% claims
assert near_zero < 0.33 and f"{coarser:.1f}" == "1.8" and (dynamic.abs() < 0.1).sum() == 127

# %% [markdown]
# The dynamic code spends half of its levels between −0.1 and 0.1, and less than a third of the scales lie there. It was made
# for numbers that span many decades, such as an optimizer's states. These scales do not.
#
# **Predict.** Now make one scale in each block of 256 twenty times as large. Which code has less error?

# %%
prediction = {"less error": "INT8"}  # ← "dynamic" or "INT8"

# %%
spoiled = q.absmax.clone()
spoiled[::256] *= 20
for code, levels in {"INT8": INT8, "dynamic": dynamic}.items():
    _, _, restored = in_8_bits(spoiled - spoiled.mean(), levels)
    errors["spoiled", code] = relative_rms(spoiled, restored + spoiled.mean())
    print(f"{code:<8} relative RMS error of the scales {errors['spoiled', code]:.4f}")
print(f"your guess: {prediction['less error']}")

# %% claims
assert 5 < errors["spoiled", "INT8"] / errors["spoiled", "dynamic"] < 6

# %% [markdown]
# **What happened?** The large one stretches INT8's steps for all its neighbours. They lie near zero now, where the dynamic code
# has half of its levels. It is an insurance: a little worse on tame scales, five times better beside an outlier. Does any of it
# show in the weights? Section 6 measures that.

# %% [markdown]
# **Exercise 5.1 ●●○ (5 minutes).** Four programs store the same 2,048 scales in 8 bits and restore them. One of the
# scales has been made 20 times as large. Three of the programs are ill. Look at what each makes of the scales, and name
# what it has.

# %% alt="Four scatter plots, A to D: restored minus scale over the scale. A: straight lines of many slopes cross at about 2.6. B: below 2.6 the error grows as the scale falls; above, most are near 0. C: a thin band at 0, few stray. D: near 0 in the middle, slanted stripes up to ±0.05 on both sides."
some = q.absmax[:2048].clone()
some[700] *= 20
restored = ill_restorations(some)
fig, axes = plt.subplots(1, 4, figsize=(8, 2.6), layout="constrained", sharex=True, sharey=True)
errors = {name: (values - some).tolist() for name, values in restored.items()}
plot_restored(axes, some.tolist(), errors)
_ = axes[0].set(xlim=(1.4, 4.2), ylim=(-0.35, 0.35))  # the large scale lies outside
for name, values in restored.items():
    print(f"{name}: relative RMS error {relative_rms(some, values):.3f}")
for key, disease in DISEASES.items():
    print(f"{key!r}: {disease}")

# %%
### BEGIN SOLUTION
### STUB: diagnosis = {"A": ..., "B": ..., "C": ..., "D": ...}  # one of the five keys above for each
diagnosis = {"A": "wrong block", "B": "no sign", "C": "healthy", "D": "one scale"}
### END SOLUTION

# %%
check_diagnosis(diagnosis)

# %% [markdown]
# <details><summary>Hint 1</summary>Dots on the dashed line come back right. Which do not: those below the mean, those
# far from it, or all of them?</details>
# <details><summary>Hint 2</summary>The large scale stretches the steps of whatever shares its second-level scale. That
# should be one block of eight, not all.</details>

# %% [markdown]
# ## 4 · To six digits
#
# **Exercise 5.2 ●○○ (3 minutes).** How many bits does a parameter take? 4 for its code, its share of an 8-bit scale,
# and its share of that scale's float32 scale.


# %%
def bits(block_size, scale_block_size):
    """block_size weights share a scale, scale_block_size scales share a second-level scale."""
    ### BEGIN SOLUTION (about 1 line)
    return 4 + 8 / block_size + 32 / (block_size * scale_block_size)
    ### END SOLUTION


# %%
check_bits_per_parameter(bits)

# %% [markdown]
# <details><summary>Hint 1</summary>64 weights share 8 bits: 8 / 64 each.</details>
# <details><summary>Hint 2</summary>How many weights share one second-level scale? 64 × 256.</details>

# %%
d = double_quantize(q)  # with the dynamic code, blocks of 256
parts = {
    "codes": d.codes.nbytes,
    "8-bit scales": d.absmax.codes.nbytes,
    "scales of scales": d.absmax.absmax.nbytes,
    "level tables, mean": d.codebook.nbytes + d.absmax.codebook.nbytes + d.absmax.offset.nbytes,
}
for part, size in parts.items():
    print(f"{part:<19}{size:>8,} bytes {8 * size / x.numel():>9.6f} bits per parameter")
print(f"without tables {d.bits_per_parameter:.6f} bits, before {q.bits_per_parameter:.6f}")

# %% claims
assert d.nbytes == sum(parts.values()) and parts["level tables, mean"] == 1092
assert (
    d.bits_per_parameter == bits_per_parameter(64, scale_block_size=256) and f"{d.bits_per_parameter:.6f}" == "4.126953"
)

# %% [markdown]
# {{d.bits_per_parameter:.6f}} bits. The tables (16 and 256 levels of 4 bytes, and the mean) take {{parts['level tables, mean']:,}} bytes whatever the tensor's size.
# That is nothing for LLaMA's millions of weights, and all tensors could share them.
#
# ## 5 · Gigabytes
#
# You may have been taught this about double quantization: *"Weights get a scale and a zero point in FP32. Quantize both
# to INT8. This saves about 0.4 GB for a 65B model."* Three claims. One you have seen: 8 bits, yes, but not INT8. Now
# the last one.
#
# **Predict.** How many GB (10⁹ bytes) does double quantization save at 65B?

# %%
prediction = {"65B": 0.4}  # ← your guess, in GB

# %% alt="Horizontal bars: GB saved by double quantization. LLaMA 7B saves {{saved['7B']:.2f}}, 13B {{saved['13B']:.2f}}, 33B {{saved['33B']:.2f}} and 65B {{saved['65B']:.2f}}. A diamond in the 65B row is your guess."
saved_bits = q.bits_per_parameter - d.bits_per_parameter
saved = {
    size: SHAPES[f"llama-{size.lower()}"].linear_parameters() * saved_bits / 8 / 1e9
    for size in ("7B", "13B", "33B", "65B")
}
ends = {size: f"{gigabytes:.2f} GB" for size, gigabytes in saved.items()}
rows = {size: {"saved": gigabytes} for size, gigabytes in saved.items()}
plot_stacked(new_axes(height=2.4), rows, "saved by double quantization (GB, 10$^9$ bytes)", ends, prediction)
print(f"{saved_bits:.3f} bits per parameter; 65B: {saved['65B']:.1f} GB, your guess: {prediction['65B']} GB")

# %% claims
assert (
    ends == {"7B": "0.30 GB", "13B": "0.59 GB", "33B": "1.50 GB", "65B": "3.02 GB"} and f"{saved_bits:.3f}" == "0.373"
)

# %% [markdown]
# **What happened?** 0.4 looks like the number of *bits per parameter*, {{saved_bits:.3f}}, with the wrong unit. For 65 billion of
# them that makes {{saved['65B']:.1f}} GB; QLoRA's paper says "approximately 3 GB". At 7B, {{saved['7B']:.2f}} GB.
#
# And the zero point? Look for it in what bitsandbytes keeps:

# %%
import bitsandbytes.functional as bnb

packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
print("state:", ", ".join(sorted(vars(state))))
print("state.state2:", ", ".join(name for name, value in sorted(vars(state.state2).items()) if value is not None))
for name, part in {"absmax": state.absmax, "offset": state.offset, "state2.absmax": state.state2.absmax}.items():
    print(f"{name:<14}{str(part.dtype):<15}{tuple(part.shape)}")

# %% claims
assert 0 in state.code

# %% [markdown]
# There is none. NF4 needs none: 0 is one of its levels. The one `offset` is the mean of all scales, a single number for
# the tensor.
#
# **Exercise 5.3 ●●○ (4 minutes).** Affine INT4 does have a zero point for each block. Suppose it were double-quantized
# like the scale: 8 bits for each block of 64, and a float32 for every 256 of them. How many GB would zero points *add*
# to a model?


# %%
def extra_gigabytes(parameters):
    """GB (10^9 bytes) that zero points of so many parameters take."""
    ### BEGIN SOLUTION (about 2 lines)
    bits_of_zero_points = 8 / 64 + 32 / (64 * 256)
    return parameters * bits_of_zero_points / 8 / 1e9
    ### END SOLUTION


# %%
check_zero_point_cost(extra_gigabytes)

# %% [markdown]
# <details><summary>Hint</summary>You have already computed what 8 bits for each 64 weights and a float32 for each 256 of those cost.</details>

# %% [markdown]
# ## 6 · What did it cost?
#
# **Predict.** The weights' relative error was 0.0920 with float32 scales. What is it now that the scales are wrong too,
# by 0.2 % (dynamic)?

# %%
prediction = {"error": 0.094}  # ← your guess: 0.092 and 0.002 is 0.094

# %%
before = relative_rms(x, dequantize(q))
of_scales = relative_rms(q.absmax, d.absmax.dequantize())
after = {
    "dynamic": relative_rms(x, dequantize(d)),
    "INT8": relative_rms(x, dequantize(double_quantize(q, codebook=INT8))),
}
print(f"float32 scales      {q.bits_per_parameter:.3f} bits   error {before:.5f}")
for code, error in after.items():
    print(f"8 bits, {code:<12}{d.bits_per_parameter:.3f} bits   error {error:.5f}")
print(f"your guess                       {prediction['error']:.5f}")
together = (before**2 + of_scales**2) ** 0.5
print(f"√({before:.4f}² + {of_scales:.4f}²) = {together:.5f}")

# %% claims
assert abs(after["dynamic"] - before) < 5e-5 and abs(together - after["dynamic"]) < 2e-5
assert after["INT8"] < after["dynamic"] and f"{before:.4f} {of_scales:.3f}" == "0.0920 0.002"

# %% [markdown]
# **What happened?** Errors that know nothing of each other add up as squares. Beside {{before:.3f}}, an error of {{of_scales:.3f}} is
# invisible: it shows in the fifth decimal. So the choice between the two codes does not matter here.
#
# So 0.373 bits were nearly free. What else could one have done with the scales?
#
# - **16-bit scales.** A scale is the absolute value of one of the block's own weights. Where those came as bf16, what
#   are the lower 16 bits of a float32 scale?
# - **Bigger blocks.** Blocks of 256 with float32 scales take 4.125 bits, almost as few as blocks of 64 with 8-bit
#   scales.

# %%
lower_halves = quantized[64].absmax.view(torch.int32) & 0xFFFF
print(f"scales of the bf16 embedding matrix with lower bits other than 0: {lower_halves.count_nonzero()}")

# %% claims
assert lower_halves.count_nonzero() == 0

# %% alt="Three falling curves: relative RMS error over bits per parameter, points at blocks of 4096 to 32. At each block size the errors are alike, but double quantization takes the fewest bits, then bf16, then float32 scales. Near 4.125 bits: 64 with double {{cheap[1]:.4f}}, 256 with float32 {{dear[1]:.4f}}."
doubled = {size: double_quantize(q, block_size=256) for size, q in quantized.items()}
double_dots = [(q.bits_per_parameter, relative_rms(embedding, dequantize(q)), size) for size, q in doubled.items()]
curves = {
    "float32 scales": plain,
    "double quantization": double_dots,
    "bf16 scales": [(bits - 16 / size, error, size) for bits, error, size in plain],
}
_ = plot_block_costs(new_axes(), curves)
cheap, dear = double_dots[1], plain[3]
print(f"64, double: {cheap[0]:.3f} bits, error {cheap[1]:.4f}. 256, float32: {dear[0]:.3f} bits, error {dear[1]:.4f}")

# %% claims
assert (cheap[2], dear[2]) == (64, 256) and cheap[1] < dear[1]

# %% [markdown]
# At almost the same bits, small blocks with cheap scales beat big blocks with exact ones. And two thirds of the saving
# (16 of some 24 bits a scale) can be had without any error at all: a scale is one of the weights, and 16 bits hold it exactly in the
# checkpoint's own format (bf16 here). Counted from there, double quantization saves 0.123 bits, 1.0 GB at 65B.

# %%
beyond_bf16 = 4 + 16 / 64 - d.bits_per_parameter
print(f"{beyond_bf16:.3f} bits, {linears_65b * beyond_bf16 / 8 / 1e9:.1f} GB at 65B")

# %% claims
assert f"{beyond_bf16:.3f} {linears_65b * beyond_bf16 / 8 / 1e9:.1f}" == "0.123 1.0"

# %% [markdown]
# **Exercise 5.4 ●●○ (5 minutes).** Why stop at two? The second-level scales are float32 again. Quantize them to 8 bits
# as well, with a float32 for every 256 of *them*. How many MB does that save? Guess first: at 65B, the second step
# saved 3,020 MB.


# %%
def third_saving(parameters):
    """MB (10^6 bytes) saved by the third quantization; blocks of 64 weights, 256 scales, 256 second-level scales."""
    ### BEGIN SOLUTION (about 2 lines)
    second_level_scales = parameters / (64 * 256)
    return second_level_scales * (32 - 8 - 32 / 256) / 8 / 1e6
    ### END SOLUTION


# %%
check_triple_quantization(third_saving)

# %% [markdown]
# <details><summary>Hint 1</summary>How many second-level scales are there? One for every 64 × 256 parameters.</details>
# <details><summary>Hint 2</summary>Each takes 32 bits now, and would take 8 and its share of a third-level float32:
# 32 / 256.</details>

# %% [markdown]
# ## 7 · Is it what bitsandbytes does?
#
# `packed` and `state` above are bitsandbytes' own, with double quantization. Compare them with `d`, part by part:

# %%
# NBVAL_IGNORE_OUTPUT
# because the mean of the scales is added up in another order on another processor
theirs = state.absmax
different = (theirs != d.absmax.codes).nonzero().flatten()
print(f"4-bit codes equal: {torch.equal(packed.flatten(), d.codes)}, mean equal: {torch.equal(state.offset, offset)}")
print(f"8-bit levels equal: {torch.equal(state.state2.code, dynamic)}")
print(f"second-level scales equal: {torch.equal(state.state2.absmax, d.absmax.absmax)}")
print(f"8-bit codes: {len(different)} of {len(theirs):,} differ")

# %% claims
assert torch.equal(packed.flatten(), d.codes) and torch.equal(state.state2.absmax, d.absmax.absmax)

# %% [markdown]
# Who is right? The nearest level is the right one, so measure: how much farther from the number is their level than
# ours? bitsandbytes' CPU code finds the nearest level by a table: it rounds the number to one of 65,536 grid points
# between −1 and 1, and looks that point's level up. The number moves by half a grid step at most, towards one
# level and away from the other. So the level it gets can be a whole step, 2/65535, farther away than the nearest, and no
# more. (Its CUDA code searches the nearest level.)

# %%
# NBVAL_IGNORE_OUTPUT
# because the mean of the scales is added up in another order on another processor
numbers = (centred * (1 / centred.abs().amax(1, keepdim=True))).flatten()
farther = (dynamic[theirs.int()] - numbers).abs() - (dynamic[d.absmax.codes.int()] - numbers).abs()
grid_step = 2 / 65535
print(f"theirs is farther by {farther.max() / grid_step:.2f} grid steps at most; ours never by more than rounding")

# %% claims
assert farther.min() >= -1e-6 and farther.max() <= grid_step + 1e-6  # 1e-6: room for float32's rounding

# %% [markdown]
# Where two levels are about equally near, the table sometimes names the other one. Otherwise all is equal, and from
# the same codes come the same weights, bit for bit:

# %%
import dataclasses

with_their_codes = dataclasses.replace(d, absmax=dataclasses.replace(d.absmax, codes=theirs))
equal = torch.equal(dequantize(with_their_codes), bnb.dequantize_4bit(packed, state))
print(f"same codes, same weights: {equal}")

# %% claims
assert equal

# %% [markdown]
# ## 8 · Choose your own
#
# Everything at once, on the rows of the embedding matrix. At the left the bits: codes, then scales, then scales of
# scales. At the right error over bits, your choice ringed. The upper bar, blocks of 64 with float32 scales, has the
# error printed below. Can you beat it in bits *and* error? (Needs a running kernel.)

# %%
second_sizes = [32, 64, 128, 256, 512, 1024, 2048, 4096]
errors = {(size, None): error for _, error, size in plain}
for size, single in quantized.items():
    for second in second_sizes:
        errors[size, second] = relative_rms(embedding, dequantize(double_quantize(single, second)))
print(f"block 64, float32 scales: 4.5 bits, error {errors[64, None]:.4f}")

# %% claims
assert errors[32, 256] < errors[64, None]

# %%
import ipywidgets

from qlora_lab.classroom.widgets import explore

two_curves = {name: curves[name] for name in ("float32 scales", "double quantization")}


def draw(block, second, double, model):
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    left.spines[["top", "right"]].set_visible(False)
    right.spines[["top", "right"]].set_visible(False)
    scales = {"scales": 8 / block, "scales of scales": 32 / (block * second)} if double else {"scales": 32 / block}
    rows = {"blocks of 64,\nfloat32 scales": {"codes": 4, "scales": 0.5}, "yours": {"codes": 4} | scales}
    billions = SHAPES[f"llama-{model.lower()}"].linear_parameters() / 1e9
    ends = {name: f"{billions * sum(row.values()) / 8:.1f} GB" for name, row in rows.items()}
    plot_stacked(left, rows, "bits per parameter", ends, legend=False).set_xlim(0, 6.5)
    left.set_title(" + ".join(f"{part:.3g}" for part in rows["yours"].values()) + " bits", fontsize=10)
    bits, error = bits_per_parameter(block, double, second), errors[block, second if double else None]
    plot_block_costs(right, two_curves, (bits, error), sparse=True).set(xlim=(3.65, 5.15), ylim=(0.07, 0.19))
    right.set_title(f"{bits:.3f} bits, error {error:.4f}", fontsize=10)
    return left


# %% alt="Left, two stacked bars: bits per parameter and the size in GB of blocks of 64 with float32 scales, and of your choice; at the start, for 65B, 36.4 and 33.4 GB. Right, error over bits for double quantization and float32 scales, your choice ringed; at the start 4.127 bits, error 0.1069."
explore(
    draw,
    block=ipywidgets.SelectionSlider(options=block_sizes, value=64, description="block size"),
    second=ipywidgets.SelectionSlider(options=second_sizes, value=256, description="scales that share a scale"),
    double=ipywidgets.Checkbox(value=True, description="double quantization"),
    model=ipywidgets.SelectionSlider(options=["7B", "13B", "33B", "65B"], value="65B", description="LLaMA"),
)

# %% [markdown]
# <details><summary>One that beats it</summary>Blocks of 32, double quantization: half the block size, and still fewer
# bits. bitsandbytes' <code>quantize_4bit(..., blocksize=32)</code> can do it; <code>BitsAndBytesConfig</code> has no such
# setting.</details>

# %% [markdown]
# ## Recap
#
# - Float32 scales are a ninth of a 4-bit model's bytes: 4.5 bits per parameter.
# - Double quantization: scales minus their mean, in blocks of 256, in 8 bits. 4.126953 bits per parameter, 3.0 GB less
#   at 65B (not 0.4).
# - The weights hardly notice, for independent errors add as squares. Equal steps are better for tame scales, the dynamic code
#   beside an outlier.
# - NF4 has no zero point. Small blocks with cheap scales beat big blocks with exact ones.
#
# All of it serves the item *explain how quantization works*.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [06 · How can so few numbers change a model?](06_lora.ipynb)
