# %% [markdown]
# # Dive K · Equal to the last bit?
#
# In lesson 07 two programs trained from *the same* 4-bit numbers, and their losses were equal. What if each of them quantizes the model itself? Both
# follow the same paper. Here you find a difference of a thousandth, hunt it down to a single step of somebody else's program, and write that step
# yourself, without having seen it. On the way you see how to test that two programs do the same, and why "almost equal" proves little.
#
# | you need | |
# |---|---|
# | time | 49 minutes |
# | computing | up to 1 minute on two CPU cores |
# | memory | 4 GB |
# | GPU | not used |

# %% machinery "Imports, the model without quantization, and two orders"
import copy

import torch

from qlora_lab.classroom.checks import check_by_table, check_ill_layers, check_missed, progress
from qlora_lab.classroom.lessons.dive_k.checks import DISEASES, ill_layers
from qlora_lab.classroom.lessons.dive_k.figures import plot_misses, plot_table
from qlora_lab.classroom.lessons.dive_k.machinery import (
    adapter_gradients,
    equal_parts,
    examine,
    first_pass,
    quantized_layers,
    side_by_side,
    table_codes,
)
from qlora_lab.classroom.plots import new_axes, told
from qlora_lab.classroom.samples import bundled_weight
from qlora_lab.finetuning import (
    add_lora,
    collate,
    dequantize_linears,
    from_bitsandbytes,
    load_model,
    load_samples,
    nf4_double,
    quantize_linears,
    tokenize,
)
from qlora_lab.quantization import DYNAMIC8, double_quantize, quantize, relative_rms

cpu = {"device": "cpu", "compute_dtype": torch.float32}
dense, tokenizer = load_model(**cpu)
samples, _ = tokenize(load_samples("orders", "train").select(range(2)), tokenizer, max_length=256)
batch = collate([[sample] for sample in samples], tokenizer.pad_token_id)

# %% [markdown]
# ## 1 · Two programs, one paper
#
# The same model is quantized twice, by us and by bitsandbytes: once in plain NF4, where every scale is a float32 number, and once with double quantization, where
# the scales are quantized to {{8}} bits as well (lesson 05). Then two orders go forward. What comes out are the **logits**, a score for every token of the vocabulary at every
# place, and the loss.
#
# **Predict.** By how much do the logits differ, relative to their size: in plain NF4, and with double quantization? A float32 number is rounded by about {{6e-8:.0e}} of its size.

# %%
prediction = {"plain": ..., "double": ...}  # ← your guesses, such as 1e-6

# %%
# NBVAL_IGNORE_OUTPUT
# because the last digits depend on the processor
ours, theirs, apart = {}, {}, {}
for name, quantizer in {"plain": quantize, "double": nf4_double}.items():
    bnb, _ = load_model(quantization="nf4", double_quant=name == "double", **cpu)
    theirs[name] = from_bitsandbytes(copy.deepcopy(bnb))  # their bytes, before they compute with them
    ours[name] = quantize_linears(copy.deepcopy(dense), quantizer=quantizer)
    (my_logits, my_loss), (logits, loss) = first_pass(ours[name], batch), first_pass(bnb, batch)
    apart[name] = {"logits": relative_rms(logits, my_logits), "loss": abs(my_loss / loss - 1)}
    print(f"{name}: logits {apart[name]['logits']:.1g} apart, losses {apart[name]['loss']:.1g} apart")
print(told(prediction))

# %% claims
assert apart["plain"]["logits"] < 1e-5 and 5e-4 < apart["double"]["logits"] < 2e-3
assert apart["double"]["loss"] < apart["double"]["logits"] / 3

# %% [markdown]
# **What happened?** Plain NF4 agrees. With double quantization the logits differ by about a thousandth, more than ten thousand times what rounding explains. Is that a bug, and whose?
#
# The losses differ, too, but by a third of that or less: they are averages over many tokens, and some scores are too high, others too low. Here they would have warned you all the same.
# A smaller fault may cancel in an average, so compare what lies *before* it.
#
# ## 2 · Which part is it?
#
# A difference at the end of {{30}} layers tells nothing about its cause. So go back to the numbers themselves, part by part. `from_bitsandbytes` has put their
# bytes into our layers, where they can be compared.

# %%
# NBVAL_IGNORE_OUTPUT
# because the mean of the scales is added up in another order on another processor
for part, equal in equal_parts(ours["double"], theirs["double"]).items():
    print(f"{part:<26}{'all equal' if equal else 'not all equal'}")
found = side_by_side(ours["plain"], ours["double"], theirs["double"])
differ = found.ours != found.theirs
print(f"{differ.sum():,} of {len(differ):,} scales have another 8-bit code: {differ.float().mean():.2%}")

# %% claims
parts = equal_parts(ours["double"], theirs["double"])
assert parts["4-bit codes"] and parts["8-bit levels"] and not parts["8-bit codes of the scales"]
assert 0.001 < differ.float().mean() < 0.004

# %% [markdown]
# So the suspect is one step: the search for the nearest level. The scales come in blocks of {{256}}. Each, minus the mean of all, is divided by the largest of its block (as an absolute value). That gives
# a number between −{{1}} and {{1}}, and wanted is the nearest of the {{256}} levels of lesson 05's 8-bit code, `DYNAMIC8`. Ours is the nearest. For each scale where the two differ, measure
# how much farther from the number theirs is.
#
# **Predict.** How much farther is it at most?

# %%
guess = ...  # ← your guess, such as 1e-3

# %% alt="A histogram of the scales where the two differ: how much farther from the number their level is than ours, in millionths. The bars begin at zero, become lower to the right, and end at {{1e6 * farther.max():.0f ±1}}."
# NBVAL_IGNORE_OUTPUT
# because the mean of the scales is added up in another order on another processor
distance = {
    name: (DYNAMIC8[codes.long()] - found.numbers).abs()
    for name, codes in vars(found).items()
    if name in ("ours", "theirs")
}
farther = (distance["theirs"] - distance["ours"])[differ]
_ = plot_misses(new_axes(height=3), farther.tolist())
print(f"at most {farther.max():.2g} farther; {told(guess)}")
print(f"{2 / farther.max():,.0f} steps of this size fit between -1 and 1")

# %% claims
grid_step = 2 / 65535
assert farther.min() >= -0.05 * grid_step and 0.8 < farther.max() / grid_step <= 1.05  # 0.05: float32's rounding
assert farther.max() > 100 * 6e-8 and DYNAMIC8.diff().max() > 100 * farther.max()

# %% [markdown]
# **What happened?** There is a limit, and it is a strange one. Rounding in float32 is hundreds of times finer. A search that is plainly wrong would err by the distance of two
# levels, hundreds of times more. It looks as if somebody reads the number off a ruler whose marks lie about {{1e6 * farther.max():.0f ±1}} millionths apart. How many marks has it?
#
# ## 3 · The ruler
#
# The limit allows at most as many steps as the last line says, and just below that lies a number that programmers like: {{65536:,}}, which is {{2}} to the power of {{16}}. So here is a guess.
# A binary search among {{256}} levels takes eight comparisons for each number. It is quicker to look it up: prepare a table for {{65536:,}} points, spread evenly from −{{1}} to {{1}}, that says which level is nearest to each
# *point*. Then move the number to its nearest point, and read. Points lie {{2}}/{{65535}} apart: that is a **grid step**.

# %% alt="A number line with two levels, the middle between them, and five grid points, each with an arrow to its nearest level. The number lies just left of the middle, so the lower level is nearer. Its nearest grid point lies right of the middle, and its arrow goes to the upper level."
_ = plot_table(new_axes(height=2.4), levels=[0.15, 3.55], grid=[0, 1, 2, 3, 4], number=1.8)

# %% [markdown]
# The picture shows how a table errs. The number lies left of the middle, so the lower level is nearer. Its nearest point lies right of the middle, and points to the upper level. The number was moved by
# half a grid step at most, towards one level and away from the other, so the level it gets is at most a *whole* step farther than the nearest. (The largest in the figure: {{farther.max() / (2 / 65535):.2f ±0.1}} steps.)
#
# That is a hypothesis. It is proved if a table gives their codes, all of them.
#
# **Exercise K.1 ●●○ (8 minutes).** Write the search by table. You need not store the {{65536:,}} points: move each number to its point, and find the level nearest to that. A number half-way
# between two points goes to the upper one. (`torch.round` does not do that: it goes to the even one.)


# %%
def by_table(numbers, levels):
    """numbers: float32 Tensor[n] in [-1, 1]; levels: float32 Tensor[256], ascending -> index of a level for each."""
    ### BEGIN SOLUTION (about 2 lines)
    points = ((numbers + 1) / 2 * 65535 + 0.5).floor() * 2 / 65535 - 1
    return torch.searchsorted((levels[1:] + levels[:-1]) / 2, points)
    ### END SOLUTION


# %%
check_by_table(by_table)

# %% [markdown]
# <details><summary>Hint 1</summary>Shift and stretch the numbers so that the points become {{0}}, {{1}}, {{2}} … {{65535}}. What moves a number to the nearest of those? Then shrink and shift back.</details>
# <details><summary>Hint 2</summary>The level nearest to a point: <code>(points[:, None] - levels).abs().argmin(1)</code>, in pieces if memory is short, or <code>torch.searchsorted</code> among the middles between levels.</details>

# %%
# NBVAL_IGNORE_OUTPUT
# because the mean of the scales is added up in another order on another processor
from_table = table_codes(found.numbers)
print(f"search among the levels: {differ.sum():,} of {len(differ):,} codes differ from theirs")
print(f"search by table:         {(from_table != found.theirs).sum():,} differ")
if torch.is_tensor(mine := by_table(found.numbers, DYNAMIC8)):
    print(f"your search by table:    {(mine != found.theirs).sum():,} differ")

# %% claims
assert (from_table != found.theirs).sum() <= 3

# %% [markdown]
# Case closed: the table explains every code.
#
# How bad can it get? The levels are not evenly spread:

# %%
gaps = DYNAMIC8.diff()
print(f"levels lie {gaps.min():.1e} to {gaps.max():.1e} apart, points of the table {2 / 65535:.1e}")
print(
    "the seven levels around zero:", *[f"{level:.1e}" for level in DYNAMIC8[DYNAMIC8.abs().argsort()[:7]].sort().values]
)

# %% claims
assert gaps.min() < 2 / 65535 < gaps.max() and DYNAMIC8.abs().min() == 0

# %% [markdown]
# **Exercise K.2 ●●● (10 minutes).** Make {{256}} scales, all above zero, for which table and search disagree for at least one in ten.

# %%
### BEGIN SOLUTION
### STUB: my_scales = ...  # a tensor of 256 positive numbers
my_scales = 1 + 1e-5 * torch.randn(256, generator=torch.Generator().manual_seed(0))
my_scales[:2] = torch.tensor([1.5, 0.5])
### END SOLUTION

# %%
check_missed(my_scales)

# %% [markdown]
# <details><summary>Hint 1</summary>Where are several levels between two grid points? Your numbers must end up there.</details>
# <details><summary>Hint 2</summary>The mean is taken off first. Then the largest number decides what all others are divided by. So let one scale be far from the mean,
# another as far on the other side (so that the mean stays), and all others very close to it.</details>

# %% [markdown]
# ## 4 · Does it matter?
#
# Another level for one scale in {{len(differ) / differ.sum():.0f ±10%}}: is their model worse than ours?

# %%
# NBVAL_IGNORE_OUTPUT
# because the mean of the scales is added up in another order on another processor
ratio = found.ours_restored / found.theirs_restored - 1
errors = {name: (vars(found)[f"{name}_restored"] - found.scales).double().square().sum() for name in ("ours", "theirs")}
print(f"one scale differs by {ratio.abs().max():.0%}")
print(f"squared error of all scales, theirs over ours: {errors['theirs'] / errors['ours']:.5f}")

# %% claims
assert 0.05 < ratio.abs().max() < 0.3 and abs(errors["theirs"] / errors["ours"] - 1) < 1e-3

# %% [markdown]
# **What happened?** Some scale differs a lot, because a step between two levels can be a good part of a small scale. But where the two programs disagree, the number lies about half-way between the two levels, so that one is wrong by
# about as much as the other. The errors of all scales together are the same to less than a thousandth. Neither is better. They are two models.
#
# ## 5 · Make the inputs equal
#
# Now think of the test that you would have written first: quantize with both, compare the outputs, and allow two thousandths. It would pass. It would also pass with a real
# bug of the same size. **Whoever compares two programs first makes their inputs equal**, and then allows next to nothing. With their bytes in our layers:

# %%
# NBVAL_IGNORE_OUTPUT
# because the last digits depend on the processor
my_logits, _ = first_pass(theirs["double"], batch)
print(f"their bytes in our layers: logits {relative_rms(logits, my_logits):.1g} apart")

# %% claims
assert relative_rms(logits, my_logits) < 1e-5

# %% [markdown]
# And the way back? Here bitsandbytes has no part. Put LoRA on our 4-bit layers, and on dense layers with the same rounded weights, where autograd does all the work, and compare the gradients of all {{420}} matrices A and B.

# %%
# NBVAL_IGNORE_OUTPUT
# because the last digits depend on the processor
pair = [theirs["double"], dequantize_linears(copy.deepcopy(theirs["double"]))]
for model in pair:
    torch.manual_seed(0)
    add_lora(model, rank=16, alpha=32)
    for matrix in (p for name, p in model.named_parameters() if "lora_B" in name):
        torch.nn.init.normal_(matrix, std=0.02)  # as if it had learned: with B zero, A would get no gradient
gradients = list(zip(*(adapter_gradients(model, batch) for model in pair), strict=True))
largest = max(((a - b).norm() / b.norm()).item() for a, b in gradients)
print(f"{sum(torch.equal(a, b) for a, b in gradients)} of {len(gradients)} gradients are equal to the last bit")
print(f"largest relative difference: {largest:.1g}")

# %% claims
assert len(gradients) == 420 and largest < 1e-4 and sum(1 for _ in quantized_layers(pair[0])) == 210

# %% [markdown]
# ## 6 · Right numbers are not all
#
# Five people wrote lesson 07's 4-bit layer as an `autograd.Function`. `examine` holds a layer against the dense one with the same weights: how far apart are outputs and gradients, and how many bytes does the
# layer keep for the way back?
#
# **Exercise K.3 ●●○ (4 minutes).** Some of the five are healthy, and two may have the same disease. Below, `examine` does not tell enough: change the number of tokens and the dtype, and run the cell again, until you know what each has.

# %%
square = double_quantize(quantize(bundled_weight("model.layers.0.self_attn.q_proj.weight").float()))
for name, patient in ill_layers(square).items():
    print(name, end=": ")
    examine(patient, square, tokens=576, dtype=torch.bfloat16)  # ← change these two
print("What it may be:", *[f"{key!r}: {disease}" for key, disease in DISEASES.items()], sep="\n")

# %%
### BEGIN SOLUTION
### STUB: diagnosis = {"A": ..., "B": ..., "C": ..., "D": ..., "E": ...}  # one of the six keys above for each
diagnosis = {"A": "keeps x", "B": "coarse", "C": "healthy", "D": "keeps W", "E": "healthy"}
### END SOLUTION

# %%
check_ill_layers(diagnosis)

# %% [markdown]
# <details><summary>Hint 1</summary>W has {{576}} × {{576}} numbers. How many has x, for {{576}} tokens? Then choose another number of tokens.</details>
# <details><summary>Hint 2</summary>In bfloat16 the dense layer rounds, too. In which dtype would you see who rounds for no reason?</details>

# %% [markdown]
# ## Recap
#
# - Two right programs may quantize a model differently: one scale in {{len(differ) / differ.sum():.0f ±10%}} gets another level, about as near.
# - An average can hide differences. Compare the parts, from the first number on.
# - Make inputs equal before you compare. Then demand equality, and explain every bit that is left.

# %%
# NBVAL_IGNORE_OUTPUT
# because it counts what you have solved
progress()

# %% [markdown]
# **Back to the path:** [08 · Your data](08_your_data.ipynb)
