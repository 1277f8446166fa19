# %% [markdown]
# # 05 · What do the scales cost?
#
# At half a byte for each weight, the layers of LLaMA-65B should take {{64_760_053_760 / 2 / 1e9:.1f}} GB. Load them in NF4, and they take gigabytes more. These are the
# *scales*, one for every block of {{64}} weights. QLoRA saves most of them, because it quantizes the scales, too. This is **double quantization**. You build it, count
# what it saves, and find out what it costs.
#
# | you need | |
# |---|---|
# | time | 24 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 2 GB |
# | GPU | not needed |

# %% machinery "Imports"
import torch

from qlora_lab.classroom.checks import check_bits_per_parameter, check_diagnosis, check_smaller_blocks, progress
from qlora_lab.classroom.lessons.n05.checks import DISEASES, ill_restorations
from qlora_lab.classroom.lessons.n05.figures import (
    plot_bytes,
    plot_code_levels,
    plot_restored,
    plot_savings,
    plot_scale_histograms,
)
from qlora_lab.classroom.lessons.n05.machinery import SIZES, draw_choice, errors_of_choices
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.samples import bundled_weight
from qlora_lab.finetuning import load_model, load_prose, text_loss
from qlora_lab.memory import SHAPES
from qlora_lab.quantization import (
    DYNAMIC8,
    INT8,
    NF4,
    bits_per_parameter,
    dequantize,
    double_quantize,
    quantize,
    quantize_absmax,
    quantize_scales,
    relative_rms,
)
from qlora_lab.training.chat import tokenize_text

# %% claims
assert SHAPES["llama-65b"].linear_parameters() == 64_760_053_760

# %% [markdown]
# ## 1 · Bytes that are not weights
#
# **Predict.** In NF4, {{64}} codes of four bits share one scale, a float of {{32}} bits: their absmax itself, since NF4's levels end at `1`, where INT4's codes end at `7`. What share of all bytes, in per cent, are scales?

# %%
prediction = ...  # ← in per cent

# %% alt="A bar of all bytes: codes, and at its end the scales, {{share:.1f}} per cent."
x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))  # stands in for a layer's weights
q = quantize(x, NF4, block_size=64)
share = 100 * q.absmax.nbytes / (q.codes.nbytes + q.absmax.nbytes)
_ = plot_bytes(new_axes(height=1.9), share, prediction)
print(
    f"{q.codes.nbytes:,} bytes of codes, {q.absmax.nbytes:,} bytes of scales: {q.bits_per_parameter} bits per parameter"
)

# %% claims
assert f"{share:.1f}" == f"{100 / 9:.1f}" and q.bits_per_parameter == 4 + 32 / 64 == 4.5

# %% [markdown]
# **What happened?** Only one number in {{64 + 1}} is a scale, but its {{32}} bits stand beside {{64}} × {{4}} = {{64 * 4}}. That is one byte in nine,
# and {{64_760_053_760 * 0.5 / 8 / 1e9:.0f}} GB of scales at 65B.
#
# ## 2 · Quantize the scales, too
#
# You know how to store numbers in eight bits: INT8, from lesson 03. Try it by hand on four scales: `2.0`, `2.4`, `2.7` and `3.3`. The largest gets the
# code `127`. Roughly which code does the smallest get? Then subtract the mean first, `2.6`. What is left is
# `-0.6`, `-0.2`, `0.1` and `0.7`, and the code `127` stands for `0.7`.

# %%
four = torch.tensor([2.0, 2.4, 2.7, 3.3])
for name, numbers in {"as they are": four, "minus their mean": four - four.mean()}.items():
    eight_bits = quantize_absmax(numbers, bits=8)
    print(f"{name:<17} codes {eight_bits.codes.tolist()}, half a step is {eight_bits.scale.item() / 2:.4f}")

# %% claims
assert quantize_absmax(four, bits=8).codes.tolist() == [77, 92, 104, 127]
assert quantize_absmax(four - four.mean(), bits=8).codes.tolist() == [-109, -36, 18, 127]

# %% [markdown]
# Scales have no sign, and none of these is near zero. So as they are, all codes below `77` are unused. Without their mean, the ruler only has to reach `0.7`, and its
# steps are nearly five times as fine. Do other scales look like these? Here are those of Gaussian numbers and of a real matrix, the embeddings:

# %% machinery "Histograms of scales" alt="Outlines of two histograms of scales, in units of their mean. Those of Gaussian numbers form a narrow bell around one. Those of a real matrix, the embeddings, are spread more widely, with a long tail to the right. None is near zero."
embedding = bundled_weight("model.embed_tokens.weight")[::32].float()
kinds = {"Gaussian numbers": q.absmax, "embedding matrix": quantize(embedding, NF4, 64).absmax}
histograms = {}
for name, each in kinds.items():
    counts, edges = torch.histogram(each / each.mean(), bins=60, range=(0, 3), density=True)
    histograms[name] = (counts.tolist(), edges.tolist())
_ = plot_scale_histograms(new_axes(height=2.6), histograms, "scale, in units of the mean scale")

# %% claims
assert all(0.2 * each.mean() < each.min() and each.max() < 4 * each.mean() for each in kinds.values())

# %% [markdown]
# They do.
#
# **Predict.** Store the {{len(q.absmax):,}} scales of section 1 in INT8, in blocks of {{256}}. How many of the {{255}} codes are used if the mean is *not* subtracted?

# %%
prediction = ...  # ← a number of codes

# %%
scales = q.absmax
used, lost = {}, {}
for name, numbers in {"as they are": scales, "minus their mean": scales - scales.mean()}.items():
    eight_bits = quantize_absmax(numbers, bits=8, block_size=256)
    used[name] = len(eight_bits.codes.unique())
    lost[name] = ((eight_bits.dequantize() - numbers).norm() / scales.norm()).item()
    print(f"{name:<17} {used[name]:>3} codes used, relative error of the scales {lost[name]:.4f}")
print(told(prediction))

# %% claims
assert 80 < used["as they are"] < 90 and 2 * lost["minus their mean"] < lost["as they are"]
ours = double_quantize(q, codebook=INT8).absmax.dequantize()
assert abs(relative_rms(scales, ours) - lost["minus their mean"]) < 1e-5

for each in kinds.values():
    some = each[: len(each) // 256 * 256]
    with_own_means = torch.cat([quantize_scales(block).dequantize() for block in some.split(256)])
    assert 0.95 < relative_rms(some, with_own_means) / relative_rms(some, quantize_scales(some).dequantize()) < 1

# %% [markdown]
# **What happened?** Only a third of the codes are used. Without their mean the scales use nearly all of them, and lose less than half as much. So double
# quantization stores a code of eight bits for each scale, a float32 for every {{256}} scales, their **second-level scale**, and one mean for the whole tensor. (A mean for each block would gain next to nothing.)
#
# ## 3 · The other eight bits
#
# bitsandbytes does the same, but its eight bits are not INT8. Half of the levels of its **dynamic code** lie within a tenth of zero. The others are wider apart than INT8's.

# %% alt="Two rows of fine ticks from minus one to one, the levels of two codes of eight bits. INT8's are evenly spaced. The dynamic code's are so close together near zero that they merge, and farther apart than INT8's elsewhere."
_ = plot_code_levels(new_axes(height=1.9), {"INT8": INT8.tolist(), "dynamic": DYNAMIC8.tolist()}, "level")

# %% [markdown]
# **Predict.** Which code loses less of these scales? And which loses less if one scale in every {{256}} is made twenty times as large?

# %%
prediction = {"as they are": ..., "with outliers": ...}  # ← "INT8" or "dynamic"

# %%
spoiled = scales.clone()
spoiled[::256] *= 20
errors = {}
for kind, each in {"as they are": scales, "with outliers": spoiled}.items():
    for code, levels in {"INT8": INT8, "dynamic": DYNAMIC8}.items():
        errors[kind, code] = relative_rms(each, quantize_scales(each, 256, levels).dequantize())
        print(f"{kind:<14} {code:<8} relative error of the scales {errors[kind, code]:.4f}")
print(told(prediction))

# %% claims
assert (DYNAMIC8.abs() < 0.1).sum() == 127 and DYNAMIC8.diff()[-10] > 1.7 * INT8.diff()[-10]
assert errors["as they are", "INT8"] < errors["as they are", "dynamic"]
assert 5 < errors["with outliers", "INT8"] / errors["with outliers", "dynamic"] < 6

# %% [markdown]
# **What happened?** Once the mean is gone, each block of scales is divided by its largest. Most of the quotients are larger than a tenth, where
# the dynamic code is coarse, so it loses more. But beside an outlier all the others shrink to less than a tenth, where the dynamic code's levels are close together. Then INT8's error
# is {{errors['with outliers', 'INT8'] / errors['with outliers', 'dynamic']:.1f}} times as large. (Section 2's scales have none so large. The code was made for numbers of all sizes, such as an optimizer's states: dive I.)
#
# **Exercise 5.1 ●●○ (3 minutes).** Three programs store the same {{2048:,}} scales with the dynamic code, and restore them. One of the scales has been made {{20}} times as large, and lies outside the pictures. Two of the
# programs have a fault from the list above the picture. Which has which?

# %% machinery "The three programs" alt="Three scatter plots, A to C: restored minus scale, over the scale. A: below the middle the error grows as the scale falls; above it, most errors are near zero. B: a thin band at zero, few stray. C: near zero in the middle, and slanted stripes on both sides."
import matplotlib.pyplot as plt

some = q.absmax[:2048].clone()
some[700] *= 20
restored = ill_restorations(some)
_, axes = plt.subplots(1, 3, figsize=(8, 2.6), layout="constrained", sharex=True, sharey=True)
plot_restored(axes, some.tolist(), {name: (values - some).tolist() for name, values in restored.items()})
_ = axes[0].set(xlim=(1.4, 4.2), ylim=(-0.35, 0.35))  # the large scale lies outside
for key, disease in DISEASES.items():
    print(f"{key!r}: {disease}")

# %%
### BEGIN SOLUTION
### STUB: diagnosis = {"A": ..., "B": ..., "C": ...}  # one of the four keys above for each
diagnosis = {"A": "no sign", "B": "healthy", "C": "one scale"}
### END SOLUTION

# %%
check_diagnosis(diagnosis)

# %% [markdown]
# <details><summary>Hint 1</summary>Dots on the dashed line come back right. Which do not: those below the mean, those
# far from it, or all of them?</details>
# <details><summary>Hint 2</summary>The large scale stretches the steps of whatever shares its second-level scale. That
# should be one block of eight, not all.</details>
# <details><summary>When you have them: why do they look like that?</summary>In A, a scale below the mean would need a negative level and gets zero: it comes back as the mean itself. In B, the few stray dots share their block with the large scale. In C all share the large one's scale: most end up close to zero, where the dynamic code's levels are close together, and the stripes are its coarse levels.</details>

# %% [markdown]
# ## 4 · To six digits
#
# **Exercise 5.2 ●○○ (2 minutes).** How many bits does a parameter take with double quantization? (Leave out the mean, one for millions of weights.)


# %%
def bits(block_size, scale_block_size):
    """block_size weights share a scale, scale_block_size scales share a second-level scale."""
    ### BEGIN SOLUTION (about 1 line)
    return 4 + 8 / block_size + 32 / (block_size * scale_block_size)
    ### END SOLUTION


# %%
check_bits_per_parameter(bits)

# %% [markdown]
# <details><summary>Hint 1</summary>{{64}} weights share {{8}} bits: <code>8 / 64</code> each.</details>
# <details><summary>Hint 2</summary>How many weights share one second-level scale? <code>64 * 256</code>.</details>

# %% machinery "The package's double quantization, part by part"
d = double_quantize(q)  # the package's: the dynamic code, blocks of 256
print("blocks of 64, then 256:", bits(64, 256), "by your formula")
for part, held in {"codes": d.codes, "8-bit scales": d.absmax.codes, "second-level scales": d.absmax.absmax}.items():
    print(f"{part:<20}{held.nbytes:>8,} bytes, {8 * held.nbytes / x.numel():.6f} bits per parameter")
print(f"together {d.bits_per_parameter:.6f}, before {q.bits_per_parameter:.6f}")

# %% claims
assert d.bits_per_parameter == bits_per_parameter(64, scale_block_size=256) == 4.126953125

# %% [markdown]
# ## 5 · Gigabytes
#
# **Predict.** How many GB (`10**9` bytes) does double quantization save for LLaMA-65B?

# %%
prediction = {"65B": ...}  # ← in GB

# %% alt="Bars: GB saved by double quantization. LLaMA 7B saves {{saved['7B']:.2f}}, 13B {{saved['13B']:.2f}}, 33B {{saved['33B']:.2f}} and 65B {{saved['65B']:.2f}}."
saved_bits = q.bits_per_parameter - d.bits_per_parameter
saved = {}
for model in ("7B", "13B", "33B", "65B"):
    saved[model] = SHAPES[f"llama-{model.lower()}"].linear_parameters() * saved_bits / 8 / 1e9
_ = plot_savings(new_axes(height=2.4), saved, prediction)
print(f"{saved_bits:.3f} bits per parameter; at 65B {saved['65B']:.2f} GB;", told(prediction))

# %% claims
assert {model: round(size, 2) for model, size in saved.items()} == {"7B": 0.3, "13B": 0.59, "33B": 1.5, "65B": 3.02}

# %% [markdown]
# QLoRA's paper says "approximately {{3}} GB" for 65B.
#
# > **Other numbers.** You may read that it saves "about {{0.4}} GB for a 65B model". That looks like the *bits per parameter*, {{saved_bits:.3f}}, with the wrong unit.
# > Others say that it quantizes scales *and zero points*. A zero point is the second number that an affine scheme may store. NF4 has none.
#
# **Exercise 5.3 ●●○ (2 minutes).** In blocks of {{32}}, an outlier spoils fewer weights. How many GB would they *add* to a double-quantized model? Write it for any
# model, and call it for one that you would like to train.


# %%
def extra_gigabytes(parameters):
    """GB (10^9 bytes) that so many weights take more in blocks of 32 than in blocks of 64; 256 scales share a scale."""
    ### BEGIN SOLUTION (about 2 lines)
    more_bits = (8 / 32 + 32 / (32 * 256)) - (8 / 64 + 32 / (64 * 256))
    return parameters * more_bits / 8 / 1e9
    ### END SOLUTION


# %%
check_smaller_blocks(extra_gigabytes)
print("a model of 8 billion weights:", extra_gigabytes(8e9), "GB")  # ← how many has yours?

# %% [markdown]
# <details><summary>Hint</summary>Your <code>bits</code> of the last exercise, twice.</details>

# %% [markdown]
# ## 6 · What did it cost?
#
# With float32 scales, the relative error of the *weights* is {{relative_rms(x, dequantize(q)):.4f}}. Now the scales have an error, too, of {{relative_rms(q.absmax, d.absmax.dequantize()):.4f}}, and a weight
# comes back as its level times its scale. So a scale that is {{100 * relative_rms(q.absmax, d.absmax.dequantize()):.1f}} % off makes its weights {{100 * relative_rms(q.absmax, d.absmax.dequantize()):.1f}} % off, too.
#
# **Predict.** What is the error of the weights now?

# %%
prediction = ...  # ← a number

# %%
before, after = relative_rms(x, dequantize(q)), relative_rms(x, dequantize(d))
of_scales = relative_rms(q.absmax, d.absmax.dequantize())
together = (before**2 + of_scales**2) ** 0.5
print(f"before {before:.4f}, after {after:.4f}; {told(prediction)}")
print(f"√({before:.4f}² + {of_scales:.4f}²) = {together:.4f}")

# %% claims
assert abs(after - before) < 5e-5 and abs(together - after) < 2e-5

# %% [markdown]
# **What happened?** Nearly nothing. Two errors that know nothing of each other sometimes add up and sometimes cancel. On average their *squares* add up. Here these are
# {{before**2:.6f}} and {{of_scales**2:.6f}}, so the second one hardly counts. Does the model notice? Here is its loss on lesson 03's five paragraphs:

# %% machinery "The loss of a model, with double quantization and without"
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
loss = {}
for double in (False, True):
    model, tokenizer = load_model(quantization="nf4", double_quant=double, compute_dtype=torch.float32, device="cpu")
    loss[double] = text_loss(model, [tokenize_text(text, tokenizer) for text in load_prose()[:5]]).per_token
print(f"loss with float32 scales {loss[False]:.3f}, with double quantization {loss[True]:.3f}")

# %% claims
assert abs(loss[True] - loss[False]) < 0.02 and loss[True] < 3.8
single, _ = load_model(quantization="nf4", double_quant=False, compute_dtype=torch.float32, device="cpu")
paragraphs = [[tokenize_text(text, tokenizer)] for text in load_prose()[:5]]
apart = [text_loss(model, one).per_token - text_loss(single, one).per_token for one in paragraphs]
assert min(apart) < -0.002 and max(apart) > 0.002

# %% [markdown]
# (In INT4 it was {{3.96}}, and {{3.56}} without rounding.) The third digit is luck: in some of the five paragraphs, double quantization is ahead. So {{saved_bits:.3f}} bits were nearly free.
#
# **Try it** on real weights, the embeddings. Your choice is ringed. Can you find one with fewer bits *and* a
# smaller error than blocks of {{64}} with float32 scales ({{q.bits_per_parameter}} bits, error {{errors_of_choices()[64, None]:.4f}} on fewer rows than lesson 04's)?

# %% machinery "Sliders: block sizes, double quantization, model" alt="Left, two bars of bits per parameter with their size in GB: blocks of {{64}} with float32 scales, {{64_760_053_760 * 4.5 / 8 / 1e9:.1f}}, and your choice, at first {{64_760_053_760 * bits_per_parameter() / 8 / 1e9:.1f}}. Right, relative error over bits, two falling curves: double quantization lies to the left of float32 scales. Your choice is ringed, at first {{bits_per_parameter():.3f}} bits with an error of {{errors_of_choices()[64, 256]:.4f}}."
import ipywidgets

from qlora_lab.classroom.widgets import explore

explore(
    draw_choice,
    block=ipywidgets.SelectionSlider(options=SIZES, value=64, description="block size"),
    second=ipywidgets.SelectionSlider(options=SIZES, value=256, description="scales to a second-level scale"),
    double=ipywidgets.Checkbox(value=True, description="double quantization"),
    model=ipywidgets.SelectionSlider(options=["7B", "13B", "33B", "65B"], value="65B", description="LLaMA"),
)

# %% claims
choices = errors_of_choices()
assert choices[32, 256] < choices[64, None] and bits_per_parameter(32) < 4.5

# %% [markdown]
# <details><summary>One that beats it</summary>Blocks of <code>32</code>, double quantization: half the block size, and still fewer
# bits. bitsandbytes' <code>quantize_4bit(..., blocksize=32)</code> can do it; <code>BitsAndBytesConfig</code> has no such
# setting.</details>
# <details><summary>Would scales of sixteen bits not do?</summary>For a checkpoint in bf16 they would lose nothing at all, because a scale is one of its own weights without the sign. They give two thirds of what double quantization saves. The last third, about a gigabyte at 65B, needs eight bits.</details>
#
# ## Recap
#
# ```
#   64 codes      64 × 4 bits       4         bits per parameter
#   their scale    1 × 8 bits       0.125     (as a float32: 0.5)
#   a second-level scale's share    0.00195   32 bits for 64 × 256 weights
# ```
#
# - One byte in nine of plain NF4 is a scale, so QLoRA quantizes the scales, too: their mean is subtracted, and they get eight bits each.
# - That leaves {{d.bits_per_parameter:.3f}} bits per parameter instead of {{q.bits_per_parameter}}, and saves {{saved['65B']:.1f}} GB at 65B.
# - The weights hardly notice, because independent errors add up as squares.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [06 · How can so few numbers change a model?](06_lora.ipynb)
