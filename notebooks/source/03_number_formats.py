# %% [markdown]
# # 03 · What is lost with fewer bits?
#
# In [lesson 01](01_first_run.ipynb) you loaded a language model in 4-bit numbers. It still talked, and it could be trained. Yet
# four bits can only tell {{2**4}} things apart, so each weight of its layers was rounded to one of sixteen values. How can
# that work, and what is lost? You begin with four numbers by hand, and end with a whole model that you round.
#
# | you need | |
# |---|---|
# | time | 29 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 2 GB |
# | GPU | not used |

# %% machinery "Imports, and random numbers that are the same each time"
import torch

from qlora_lab.classroom.checks import check_best_in_budget, check_fixed_rows, progress
from qlora_lab.classroom.lessons.n03.figures import (
    plot_blocks,
    plot_codes,
    plot_error_by_bits,
    plot_float_bits,
    plot_weight_histogram,
)
from qlora_lab.classroom.lessons.n03.machinery import (
    COUNT,
    SAMPLES,
    draw_rounding,
    gaussian_shares,
    rounded,
    weights_in_deviations,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.finetuning import generate, load_model, load_prose, text_loss
from qlora_lab.quantization import quantize_absmax, relative_rms
from qlora_lab.training.chat import tokenize_text


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## 1 · Four numbers by hand
#
# Imagine an elastic ruler with marks at equal distances, numbered from `-7` to `7`. Stretch it until its ends reach the largest of
# your numbers, whatever its sign. Then replace each number by the nearest mark. That is **INT4**. For each number you store which mark it
# got, its **code**, in four bits. The distance between two marks, the **scale**, you store once for all of them.
#
# **Predict.** Your numbers are `0.30`, `-0.70`, `0.12` and `0.46`. The largest, without its sign, is `0.70`, so the scale is
# `0.70 / 7 = 0.10`. Which codes do the four get? Which of them come back exactly?

# %%
prediction = ...  # ← four codes, such as [1, -2, 3, 4]

# %% alt="A ruler with fifteen evenly spaced marks, the codes from minus seven to seven. An arrow leads from each number to its nearest mark: {{x[0]:.2f}} to {{codes[0]:.0f}}, {{x[1]:.2f}} to {{codes[1]:.0f}}, {{x[2]:.2f}} to {{codes[2]:.0f}} and {{x[3]:.2f}} to {{codes[3]:.0f}}."
x = torch.tensor([0.30, -0.70, 0.12, 0.46])
scale = x.abs().max() / 7
codes = (x / scale).round()
restored = codes * scale

_ = plot_codes(new_axes(height=2.2), scale.item(), x.tolist(), codes.int().tolist(), prediction)
print(f"codes {codes.int().tolist()}, restored {[round(value, 2) for value in restored.tolist()]};", told(prediction))

# %% claims
assert codes.tolist() == [3, -7, 1, 5] and torch.allclose(restored, torch.tensor([0.3, -0.7, 0.1, 0.5]))
assert torch.equal(codes, quantize_absmax(x, 4).codes.float())

# %% [markdown]
# **What happened?** `0.30` is exactly three steps from zero and `-0.70` is seven, so both come back as they were. `0.12`,
# {{x[2] / scale:.1f}} steps, comes back as {{restored[2]:.2f}}, and `0.46` as {{restored[3]:.2f}}. No error is larger than half a step, {{scale / 2:.2f}}.
#
# **INT8** is the same with eight bits and codes from `-127` to `127`. (Four bits have sixteen codes. A zero and seven marks on
# either side use fifteen; with a sixteenth, one side would be longer.)
#
# ## 2 · A float brings its own scale
#
# Before that, the weights were *floats*. A float shares no ruler, because it brings a scale of its own. Beside the sign, its
# **exponent** says between which two powers of two the number lies, and its **mantissa** says where between them, in equal
# steps. Here are the bits of `1.005` in the three formats that training uses:

# %% machinery "The bits of a number, in boxes, and two numbers that do not fit" alt="The bits of {{1.005}} in three formats, a box for each bit. FP32: a sign, {{8}} bits of exponent, {{23}} of mantissa; it holds {{float_bits(*FORMATS['FP32'])[3]}}. BF16: the same exponent and only {{7}} bits of mantissa; it holds {{float_bits(*FORMATS['BF16'])[3]}}. FP16: {{5}} bits of exponent, {{10}} of mantissa; it holds {{float_bits(*FORMATS['FP16'])[3]}}."
FORMATS = {"FP32": (torch.float32, 8), "BF16": (torch.bfloat16, 8), "FP16": (torch.float16, 5)}  # exponent bits


def float_bits(dtype, exponent_bits, value=1.005):
    number = torch.tensor(value, dtype=dtype)
    width = 8 * number.element_size()
    as_integer = number.view(torch.int32 if width == 32 else torch.int16).item() % 2**width
    bits = f"{as_integer:0{width}b}"  # the same bits, read as an integer
    return bits[0], bits[1 : 1 + exponent_bits], bits[1 + exponent_bits :], f"{number.item():.10g}"


_ = plot_float_bits(new_axes(height=2.2), {name: float_bits(*kind) for name, kind in FORMATS.items()})
print(f"1 + 0.003 in BF16: {torch.tensor(1.003).bfloat16().item()}")
print(
    f"70,000 in FP16: {torch.tensor(70_000.0).half().item()}; its largest number: {torch.finfo(torch.float16).max:,.0f}"
)

# %% claims
assert torch.tensor(1.003).bfloat16() == 1 and torch.tensor(70_000.0).half().isinf()

# %% [markdown]
# BF16 has the exponent of FP32 and a mantissa of seven bits. They divide the stretch from `1` to `2` into {{2**7}} steps of {{torch.finfo(torch.bfloat16).eps:.4f}}, and less
# than half a step is rounded away. (So the BF16 weight of lesson 02 never moved.) FP16 has finer steps, but a shorter exponent: it
# ends at {{torch.finfo(torch.float16).max:,.0f}}, and beyond lies only infinity. So the mantissa gives precision, and the exponent gives range.
#
# Four bits have little room for an exponent, so INT4 lets many numbers share one scale.
#
# ## 3 · What a bit buys
#
# INT4 has half as many bits as INT8. Is its error twice as large? Take {{65536:,}} random numbers from the bell-shaped
# normal distribution (*Gaussian*), which weights roughly follow. The **relative error** is the root mean square of all
# errors, divided by that of the numbers (so its full name is *relative RMS error*): `0` is perfect, and `1` is as bad as getting back nothing but zeros.
#
# **Predict.** How many times as large as INT8's is INT4's error?

# %%
prediction = ...  # ← a number

# %% alt="Relative error, on a log scale, over the bits of a code, a nearly straight line: {{error[8]:.3f}} with eight bits, {{error[4]:.3f}} with four, {{error[2]:.3f}} with two."
gaussian = torch.randn(65536, generator=seeded(0))
error = {}
for bits in range(2, 9):
    restored = quantize_absmax(gaussian, bits).dequantize()  # section 1 with any number of bits
    error[bits] = relative_rms(gaussian, restored)
_ = plot_error_by_bits(new_axes(), error, prediction)
print(f"INT8 {error[8]:.4f}, INT4 {error[4]:.4f}: {error[4] / error[8]:.1f} times as large;", told(prediction))

# %% claims
assert round(error[4] / error[8], 1) == round(127 / 7, 1) == 18.1
two_bits = quantize_absmax(gaussian, 2)
assert two_bits.levels == 3 and (two_bits.codes == 0).float().mean() > 0.97

# %% [markdown]
# **What happened?** INT8 has {{127}} steps on each side of zero, and INT4 has {{7}}. So INT4's steps are {{127 / 7:.1f}} times as long, and so are its
# errors. Each bit that you drop leaves half of the steps, or a little less: {{127}}, {{63}}, {{31}}, {{15}}, {{7}}. So **each makes
# the error about twice as large**.
#
# ## 4 · One bad value
#
# A fifth number, `7.00`, joins the four:

# %%
five = torch.cat([x, torch.tensor([7.0])])
q = quantize_absmax(five, bits=4)
print(f"scale {q.scale.item():.2f}, codes {q.codes.tolist()}, restored {q.dequantize().tolist()}")

# %% claims
assert q.codes.tolist() == [0, -1, 0, 0, 7] and round(q.scale.item(), 2) == 1

# %% [markdown]
# The ruler is stretched ten times as far, and three of the four old numbers have become zero. A value that is far larger
# than the others is an **outlier**.
#
# **Predict.** Multiply *one* of the {{len(gaussian):,}} Gaussian numbers by {{100}}. How many times as large does the error of the
# *others* become?

# %%
prediction = ...  # ← a number

# %%
spoiled = gaussian.clone()
spoiled[0] *= 100


def error_of_others(numbers, bits, block_size=None):
    restored = quantize_absmax(numbers, bits, block_size).dequantize()
    return relative_rms(numbers[1:], restored[1:])


before, after = error_of_others(gaussian, 4), error_of_others(spoiled, 4)
print(f"error of the others: {before:.3f} before, {after:.3f} after, {after / before:.1f} times;", told(prediction))
q = quantize_absmax(spoiled, 4)
print(f"a step is {q.scale.item():.1f} long; the largest of the others is {spoiled[1:].abs().max():.1f}")
print("codes that the others get:", q.codes[1:].unique().tolist())

# %% claims
assert round(before, 3) == 0.188 and after == 1 and round(after / before, 1) == 5.3

# %% [markdown]
# **What happened?** The outlier alone sets the scale. A step is now {{q.scale.item():.1f}} long, and none of the others is larger than
# {{spoiled[1:].abs().max():.1f}}, so all of them are rounded to zero. Their error is `1`, {{after / before:.1f}} times {{before:.3f}}.
#
# ## 5 · A scale for each block
#
# So let fewer numbers share a scale: cut the tensor into **blocks** of {{64}} neighbours, and give each block its own. An outlier then
# ruins {{64 - 1}} neighbours instead of {{len(gaussian) - 1:,}}.
#
# But scales take room. A scale of {{32}} bits for {{64}} numbers is half a bit for each. So we count **bits per
# parameter**: the bits of a code plus its share of the scale. You can spend them on smaller blocks (lines) or on longer codes (stars).

# %% machinery "Errors over bits per parameter" alt="Relative error, on a log scale, over bits per parameter. With the outlier, 4-bit codes fall from {{after:.0f}} with one scale to {{error_of_others(spoiled, 4, 64):.2f}} in blocks of {{64}}; longer codes with one scale stay near {{1}}. Without it, blocks of {{64}} bring {{error_of_others(gaussian, 4):.2f}} down to {{error_of_others(gaussian, 4, 64):.2f}}, and five bits with one scale have {{error_of_others(gaussian, 5):.2f}}."
tensors = {"with the outlier": spoiled, "without": gaussian}
lines, stars = {}, {}
for name, numbers in tensors.items():
    lines[name] = [(4, error_of_others(numbers, 4), "one scale")]
    lines[name] += [(4 + 32 / size, error_of_others(numbers, 4, size), str(size)) for size in (256, 128, 64, 32)]
    stars[name] = [(bits, error_of_others(numbers, bits), f"{bits} bits") for bits in (5, 6)]
    print(f"{name:<17}", " · ".join(f"{label}: {lost:.3f}" for _, lost, label in lines[name] + stars[name]))
_ = plot_blocks(new_axes(), lines, stars)

# %% claims
assert all(error_of_others(spoiled, bits) > 0.89 for bits in (5, 6))
assert quantize_absmax(gaussian, 4, 64).bits_per_parameter == 4.5 == 4 + 32 / 64
assert error_of_others(gaussian, 5) < error_of_others(gaussian, 4, 32)

# %% [markdown]
# **What happened?** With the outlier, blocks of {{64}} bring the error from {{after:.0f}} down to {{error_of_others(spoiled, 4, 64):.3f}}, and longer codes hardly help. Without it, blocks of {{64}} help, too: {{error_of_others(gaussian, 4):.3f}} becomes
# {{error_of_others(gaussian, 4, 64):.3f}}, because the largest number of a block is mostly smaller than the largest of all. But blocks of {{32}}
# cost a whole bit, and for five bits per parameter, codes of five bits with one scale are better: {{error_of_others(gaussian, 5):.3f}}
# against {{error_of_others(gaussian, 4, 32):.3f}}. It takes outliers to make such small blocks worth their bits.
#
# **Exercise 3.1 ●●○ (4 minutes).** This function promises INT8 with one scale for each *row* of a matrix. Shapes and dtypes are right, but
# the error of *every* row should be below {{0.01}}. Find the **two** bugs.


# %%
def quantize_rows_broken(x):
    scale = x.abs().max() / 128
    codes = (x / scale).round().int().to(torch.int8)
    return codes, scale.expand(len(x), 1)


rows = -torch.randn(8, 256, generator=seeded(1)) * torch.tensor([2.0, 0.1]).repeat(4)[:, None]
codes, scale = quantize_rows_broken(rows)
print("error of each row:", [round(relative_rms(*pair), 3) for pair in zip(rows, codes * scale)])

# %% claims
right = quantize_absmax(rows, 8, "row").dequantize()
assert all(relative_rms(*pair) < 0.01 for pair in zip(rows, right))
assert sum(relative_rms(*pair) > 0.01 for pair in zip(rows, codes * scale)) >= 5


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
# <details><summary>Hint 2</summary>int8 goes from <code>-128</code> to <code>127</code>. What becomes of <code>128</code> in it?</details>
# <details><summary>Hint 3</summary>How many different scales does the function return?</details>

# %% [markdown]
# **Try it.** At first one number in a thousand is an outlier, {{20}} times as large, and on the left, the others crowd around the middle mark. Choose blocks of
# {{64}} and watch them spread out. Without outliers, which kind of numbers hardly needs blocks? (*Laplace* and *Student-t* are like
# Gaussian numbers, with more of them far out.)
#
# <details><summary>The answer</summary>The uniform ones. They have no tails: the largest of all is hardly larger than the largest of any block, so blocks bring nothing but costs.</details>

# %% machinery "Sliders: bits, block size, kind of numbers, outliers" alt="Two histograms, on log scales, for the settings that you choose. At the start, left, nearly all values crowd around the middle one of fifteen evenly spaced marks. Right, the sizes of the errors: the relative error, a dashed line, is nearly as large as the numbers themselves."
from ipywidgets import Dropdown, IntSlider, SelectionSlider

from qlora_lab.classroom.widgets import explore

block_sizes = [*[(str(2**n), 2**n) for n in range(5, 13)], ("one scale", COUNT)]
outlier_shares = [(f"{share:.2%}", share) for share in (0, 0.0001, 0.001, 0.01)]
explore(
    draw_rounding,
    bits=IntSlider(4, 2, 8, description="bits"),
    block_size=SelectionSlider(options=block_sizes, value=COUNT, description="block size"),
    distribution=Dropdown(options=list(SAMPLES), description="numbers"),
    outliers=SelectionSlider(options=outlier_shares, value=0.001, description="outliers"),
)

# %% [markdown]
# ## 6 · A real model
#
# Does the model of lesson 01 have outliers? Here are the weights of all its linear layers, divided by their standard deviation, the typical
# size in their matrix. You may put the folder of a model of your own, or its name on the hub, into the cell.

# %% alt="Histogram of the weights, on a log scale, with a Gaussian as a dashed line. In the middle the two look alike. At {{6}} standard deviations the Gaussian has ended, and the weights go on, ever rarer, to {{-farthest:.0f}} on the negative side."
MODEL = "smollm2-135m-instruct"  # or your own: this takes 8 bytes a parameter, for float32 and a rounded copy
model, tokenizer = load_model(MODEL, compute_dtype=torch.float32, device="cpu")
edges = torch.linspace(-60, 60, 241)
shares, beyond, farthest = weights_in_deviations(model, edges)
_ = plot_weight_histogram(new_axes(), shares, edges, gaussian_shares(edges), farthest)
print(f"farther than 6 standard deviations: {1e6 * beyond:.0f} weights in a million; a Gaussian has 0.002")

# %% claims
is_bundled = MODEL == "smollm2-135m-instruct"
assert not is_bundled or (round(farthest) == -51 and 100 < 1e6 * beyond < 120)

# %% [markdown]
# Of Gaussian numbers, two in a *billion* lie that far out. So there are outliers.
#
# <details><summary>Is this model a fair example?</summary>Yes, with a footnote. Its linear layers were once stored in another 4-bit format, to make a small file, as you will find out in lesson 04. Below they are rounded a second time, to other marks, and you see the second loss alone.</details>
#
# **Predict.** Round all these weights in three ways (`rounded` does it, and puts the old ones back): INT8 and INT4 with one scale for each
# matrix, and INT4 in blocks of {{64}}. Which of the three models can still tell you the capital of France?

# %%
prediction = ...  # ← a list, such as ["INT8", "INT4", "INT4 in blocks"]

# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise, and then a word may differ
ways = {"not rounded": (16, None), "INT8": (8, None), "INT4": (4, None), "INT4 in blocks": (4, 64)}
question = [{"role": "user", "content": "What is the capital of France?"}]
prose = [tokenize_text(text, tokenizer) for text in load_prose()[:5]]
loss, answers = {}, {}
for way, (bits, block_size) in ways.items():
    with rounded(model, bits, block_size) as (lost, zeros):
        loss[way] = text_loss(model, prose).per_token
        answers[way] = generate(model, tokenizer, [question], max_new_tokens=16)[0]
    print(f"{way:<15} error {lost:.3f} · {zeros:3.0%} zeros · loss {loss[way]:5.2f} · {answers[way]!r}")
print(told(prediction))

# %% claims
assert not is_bundled or all("Paris" in answers[way] for way in ("not rounded", "INT8", "INT4 in blocks"))
assert not is_bundled or ("Paris" not in answers["INT4"] and loss["INT4"] > 10.9 and len(tokenizer) == 49_152)
assert not is_bundled or loss["INT8"] < loss["not rounded"] + 0.1 < loss["INT4 in blocks"]
with rounded(model, 4, None) as (_, zeros):
    assert not is_bundled or zeros > 0.5

# %% [markdown]
# **What happened?** In INT4 with one scale, outliers stretch the rulers, most weights become zero, and the model babbles. With a scale for
# each {{64}} weights the same codes suffice. That is how four bits can work.
#
# Still, the loss, on five paragraphs of English, rises from {{loss['not rounded']:.2f ±0.05}} to {{loss['INT4 in blocks']:.2f ±0.1}}. (Guessing blindly among all
# {{len(tokenizer):,}} tokens would give the logarithm of their number, {{torch.tensor(len(tokenizer)).log():.1f}}. INT4's is worse: it expects wrong tokens.) But the
# marks lie at *equal* distances, although most weights are near zero. The next lesson places them better.
#
# **Exercise 3.2 ●●○ (4 minutes).** Spend a budget, in bits per parameter, on weights of *your* model. You may choose codes of
# {{2}} to {{8}} bits, and a block size from `BLOCKS`. Which choice has the smallest error within the budget?

# %%
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def best_in_budget(weights, budget):
    """A tensor, and bits per parameter -> the pair (bits, block size) with the smallest relative error."""
    ### BEGIN SOLUTION (about 5 lines)
    choices = [(bits, size) for bits in range(2, 9) for size in BLOCKS if bits + 32 / size <= budget]

    def lost(choice):
        return relative_rms(weights, quantize_absmax(weights, *choice).dequantize())

    return min(choices, key=lost)
    ### END SOLUTION


# %%
check_best_in_budget(best_in_budget)

# %% [markdown]
# <details><summary>Hint 1</summary>First list the pairs that the budget allows. Then measure each of them.</details>
# <details><summary>Hint 2</summary>A pair costs <code>bits + 32 / size</code> bits per parameter. The error is
# <code>relative_rms(weights, quantize_absmax(weights, bits, size).dequantize())</code>.</details>

# %%
for name in ("model.layers.10.mlp.down_proj.weight", "model.embed_tokens.weight"):  # others: model.named_parameters()
    weights = model.get_parameter(name).detach()[:1024]
    print(name, {budget: best_in_budget(weights, budget) for budget in (3.5, 4.5, 5.01, 5.5)})

# %% [markdown]
# At which budget do the two matrices want different things, and why?
#
# <details><summary>One answer, for the course's model</summary>At <code>5.01</code> bits, which just allow codes of five bits in blocks of <code>4096</code>. The layer takes them. The embeddings prefer four bits in blocks of <code>32</code>, because they have more outliers. Only measuring tells.</details>
#
# ## Recap
#
# ```
#   weights of a block   0.30  −0.70   0.12   0.46  ...       64 floats
#   stored: a code each     3     −7      1      5  ...       64 × 4 bits
#   and the scale        0.10                                  1 × 32 bits     together 4.5 bits per weight
# ```
#
# - To quantize is to round to the marks of a ruler: a small code for each number, and one scale for all.
# - Each bit less about doubles the error, and one outlier spoils the scale for all that share it.
# - With a scale for each block, an outlier spoils its block only. Scales cost bits, so look at bits per parameter beside every error.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Next:** [04 · Which sixteen numbers are best?](04_nf4.ipynb)
